/*
 * core(5): when a core file is written, and that it holds what the process was: registers of each thread, the signal,
 * the auxiliary vector, the files mapped, memory as coredump_filter and madvise(2) select it.
 *
 * kernel.core_pattern must be "core" and core_uses_pid 0, as they are by default; else the program skips.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/procfs.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define MAGIC 0x1122334455667788ULL

static volatile struct shared {
	char *written, *untouched, *hidden, *common, *file, *huge;
	unsigned long rip_low, rip_high;
	pid_t tids[3];
	char auxv[1024];
	int auxv_length;
} *shared;

static void fill(void)
{
	int fd;

	shared->written = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	*(uint64_t *)(shared->written + 2 * PAGE) = MAGIC;
	mprotect(shared->written, 4 * PAGE, PROT_NONE);
	shared->hidden = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	*(uint64_t *)shared->hidden = MAGIC;
	madvise(shared->hidden, 2 * PAGE, MADV_DONTDUMP);
	shared->common = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	*(uint64_t *)(shared->common + PAGE) = MAGIC;
	fd = open("data", O_RDWR | O_CREAT | O_TRUNC, 0644);
	ftruncate(fd, 2 * PAGE);
	pwrite(fd, "written", 7, PAGE);
	shared->file = mmap(NULL, 2 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	shared->huge = mmap(NULL, 1UL << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	*(uint64_t *)(shared->huge + (1UL << 39)) = MAGIC;
	madvise(shared->huge, 1UL << 39, MADV_DONTDUMP);
	madvise(shared->huge + (1UL << 39) + PAGE, (1UL << 39) - PAGE, MADV_DONTDUMP);
	fd = open("/proc/self/auxv", O_RDONLY);
	shared->auxv_length = read(fd, (void *)shared->auxv, sizeof(shared->auxv));
	close(fd);
	shared->tids[0] = getpid();
}

static void *sleeper(void *argument)
{
	shared->tids[1] = gettid();
	pause();
	return argument;
}

static void *spinner(void *argument)
{
	volatile unsigned long count = 0;

	shared->tids[2] = gettid();
	for (;;)
		count++;
	return argument;
}

static __attribute__((noinline)) void fault(void)
{
	shared->rip_low = (unsigned long)fault;
	shared->rip_high = shared->rip_low + 256;
	*(volatile int *)0x1230 = 1;
}

static void with_threads(void)
{
	pthread_t a, b;

	fill();
	pthread_create(&a, NULL, sleeper, NULL);
	pthread_create(&b, NULL, spinner, NULL);
	while (!shared->tids[1] || !shared->tids[2])
		usleep(1000);
	usleep(20000);
	fault();
}

static void aborts(void) { abort(); }
static void quits(void) { kill(getpid(), SIGQUIT); }
static void terminates(void) { kill(getpid(), SIGTERM); }
static void killed(void) { kill(getpid(), SIGKILL); }
static void hidden(void) { prctl(PR_SET_DUMPABLE, 0); abort(); }
static void bare(void) { fill(); abort(); }

static void other_user(void)
{
	/* Linux makes a process that changed its ids undumpable. */
	if (setresuid(65534, 65534, 65534))
		_exit(9);
	abort();
}

static void other_user_dumpable(void)
{
	if (setresuid(65534, 65534, 65534) || prctl(PR_SET_DUMPABLE, 1))
		_exit(9);
	abort(); /* the directory is not its own */
}

static void filtered(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { 4, code };

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
	syscall(SYS_getppid);
}

/* Runs `what` in a child; prints how it ended and whether there is a core file. */
static void try(const char *name, void (*what)(void), rlim_t limit)
{
	struct rlimit rlimit = { limit, RLIM_INFINITY };
	struct stat st;
	siginfo_t info;
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		setrlimit(RLIMIT_CORE, &rlimit);
		what();
		_exit(7);
	}
	waitid(P_PID, pid, &info, WEXITED | WNOWAIT);
	waitpid(pid, &status, 0);
	printf("%s: signal %d, core %d, si_code %s, ", name, WTERMSIG(status), !!WCOREDUMP(status),
	       info.si_code == CLD_DUMPED ? "CLD_DUMPED" : info.si_code == CLD_KILLED ? "CLD_KILLED" : "else");
	if (lstat("core", &st))
		printf("no file\n");
	else
		printf("file %o, owner %d, links %d\n", st.st_mode, st.st_uid, (int)st.st_nlink);
}

static char *core;
static size_t core_length;

static int map_core(void)
{
	struct stat st;
	int fd = open("core", O_RDONLY);

	if (fd < 0 || fstat(fd, &st))
		return -1;
	core_length = st.st_size;
	core = mmap(NULL, core_length, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	return core == MAP_FAILED ? -1 : 0;
}

static Elf64_Phdr *segment_of(const char *address)
{
	Elf64_Ehdr *header = (Elf64_Ehdr *)core;
	Elf64_Phdr *table = (Elf64_Phdr *)(core + header->e_phoff);

	for (int i = 0; i < header->e_phnum; i++)
		if (table[i].p_type == PT_LOAD && table[i].p_vaddr <= (uintptr_t)address &&
		    (uintptr_t)address < table[i].p_vaddr + table[i].p_memsz)
			return &table[i];
	return NULL;
}

static void show_memory(const char *name, const char *address)
{
	Elf64_Phdr *segment = segment_of(address);

	printf("%s: ", name);
	if (!segment) {
		printf("not there\n");
		return;
	}
	if (segment->p_filesz <= (uintptr_t)address - segment->p_vaddr) {
		printf("not written\n");
		return;
	}
	printf("flags %d, %s\n", segment->p_flags,
	       *(uint64_t *)(core + segment->p_offset + ((uintptr_t)address - segment->p_vaddr)) == MAGIC ? "magic" : "else");
}

static void show_notes(void)
{
	Elf64_Ehdr *header = (Elf64_Ehdr *)core;
	Elf64_Phdr *note = (Elf64_Phdr *)(core + header->e_phoff);
	char *at = core + note->p_offset, *end = at + note->p_filesz;
	char sleeping[64] = "";
	int threads = 0;

	printf("type %d machine %d ehsize %d phentsize %d notes first %d\n", header->e_type, header->e_machine,
	       header->e_ehsize, header->e_phentsize, note->p_type == PT_NOTE);
	while (at < end) {
		Elf64_Nhdr *head = (Elf64_Nhdr *)at;
		char *name = at + sizeof(*head), *data = name + ((head->n_namesz + 3) & ~3);

		at = data + ((head->n_descsz + 3) & ~3);
		if (head->n_type == NT_PRSTATUS && !strcmp(name, "CORE")) {
			struct elf_prstatus *status = (void *)data;
			struct user_regs_struct *regs = (void *)&status->pr_reg;
			int which = -1;

			for (int i = 0; i < 3; i++)
				if (shared->tids[i] == status->pr_pid)
					which = i;
			printf("PRSTATUS %d: signal %d %d, fpvalid %d, ppid %d, thread %s", (int)head->n_descsz,
			       status->pr_info.si_signo, status->pr_cursig, status->pr_fpvalid, status->pr_ppid == getpid(),
			       threads ? "other" : "dying");
			if (which == 0)
				printf(" rip %s, orig_rax %lld", regs->rip >= shared->rip_low && regs->rip < shared->rip_high ?
				       "in fault" : "elsewhere", (long long)regs->orig_rax);
			if (which == 1)	/* threads come in any order */
				snprintf(sleeping, sizeof(sleeping), "call %d, rax %lld", (int)regs->orig_rax, (long long)regs->rax);
			printf(", cs %llx ss %llx\n", regs->cs, regs->ss);
			threads++;
		} else if (head->n_type == NT_PRPSINFO && !strcmp(name, "CORE")) {
			struct elf_prpsinfo *info = (void *)data;

			printf("PRPSINFO %d: state %d %c, nice %d, uid %d, pid %d, sid %d, %s, %s\n", (int)head->n_descsz,
			       info->pr_state, info->pr_sname, info->pr_nice, info->pr_uid, info->pr_pid == shared->tids[0],
			       info->pr_sid == getsid(0), info->pr_fname, strrchr(info->pr_psargs, '/'));
		} else if (head->n_type == NT_SIGINFO && !strcmp(name, "CORE")) {
			siginfo_t *info = (void *)data;

			printf("SIGINFO %d: %d code %d address %p\n", (int)head->n_descsz, info->si_signo, info->si_code,
			       info->si_signo == SIGSEGV ? info->si_addr : NULL);
		} else if (head->n_type == NT_AUXV && !strcmp(name, "CORE")) {
			int length = head->n_descsz < (size_t)shared->auxv_length ? head->n_descsz : shared->auxv_length;

			printf("AUXV: %s\n", memcmp(data, (void *)shared->auxv, length) ? "differs" : "same");
		} else if (head->n_type == NT_FILE && !strcmp(name, "CORE")) {
			uint64_t *words = (void *)data, count = words[0];
			char *path = (char *)(words + 2 + 3 * count);
			int program = 0, file = 0, anonymous = 0;

			for (uint64_t i = 0; i < count; i++, path += strlen(path) + 1) {
				program += !!strstr(path, "core_dumps");
				anonymous += !strcmp(path, "/dev/zero (deleted)");
				if (words[2 + 3 * i] == (uintptr_t)shared->file)
					file = words[3 + 3 * i] - words[2 + 3 * i];
			}
			printf("FILE: page size %d, program %d, the file %d, shared memory %d\n", (int)words[1], program > 2, file,
			       anonymous);
		} else if (head->n_type == NT_FPREGSET && !strcmp(name, "CORE")) {
			printf("FPREGSET %d: control %x\n", (int)head->n_descsz, *(uint16_t *)data);
		} else if (head->n_type == NT_X86_XSTATE && !strcmp(name, "LINUX")) {
			printf("X86_XSTATE: %d\n", head->n_descsz > 512);
		} /* a newer kernel has more of them */
	}
	printf("threads %d; %s\n", threads, sleeping);
}

static void show_core(const char *name, void (*what)(void))
{
	unlink("core");
	memset((void *)shared, 0, sizeof(*shared));
	try(name, what, RLIM_INFINITY);
	if (map_core()) {
		printf("no core\n");
		return;
	}
	show_notes();
	show_memory("private memory", shared->written + 2 * PAGE);
	show_memory("MADV_DONTDUMP", shared->hidden);
	show_memory("shared memory", shared->common + PAGE);
	show_memory("private file", shared->file);
	show_memory("far in a huge mapping", shared->huge + (1UL << 39));
	munmap(core, core_length);
}

static void choose(const char *filter)
{
	char text[16] = "";
	int fd = open("/proc/self/coredump_filter", O_RDWR);

	write(fd, filter, strlen(filter));
	lseek(fd, 0, SEEK_SET);
	read(fd, text, sizeof(text) - 1);
	close(fd);
	printf("coredump_filter %s", text);
}

static int is_set(const char *path, const char *want)
{
	char text[128] = "";
	int fd = open(path, O_RDONLY);

	read(fd, text, sizeof(text) - 1);
	close(fd);
	return !strcmp(text, want);
}

int main(void)
{
	char directory[] = "/tmp/core-XXXXXX";
	struct stat st;

	if (!is_set("/proc/sys/kernel/core_pattern", "core\n") || !is_set("/proc/sys/kernel/core_uses_pid", "0\n") ||
	    geteuid()) {
		printf("another core_pattern, or not root\n");
		return 4;
	}
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!mkdtemp(directory) || chdir(directory))
		return 1;
	try("no limit set", aborts, 0);
	try("less than a page", aborts, 4095);
	try("SIGTERM", terminates, RLIM_INFINITY);
	try("SIGKILL", killed, RLIM_INFINITY);
	try("not dumpable", hidden, RLIM_INFINITY);
	try("other ids", other_user, RLIM_INFINITY);
	try("other ids, dumpable, not its directory", other_user_dumpable, RLIM_INFINITY);
	chmod(".", 0777);
	try("other ids, dumpable", other_user_dumpable, RLIM_INFINITY);
	chmod(".", 0700);
	try("over another's file", aborts, RLIM_INFINITY);
	try("SIGQUIT, over the old one", quits, RLIM_INFINITY);
	link("core", "second");
	try("a second name", aborts, RLIM_INFINITY);
	unlink("core");
	symlink("second", "core");
	try("a symbolic link", aborts, RLIM_INFINITY);
	unlink("core");
	mkdir("core", 0700);
	try("a directory", aborts, RLIM_INFINITY);
	rmdir("core");
	try("seccomp", filtered, RLIM_INFINITY);
	unlink("core");
	try("one page", aborts, PAGE);
	if (!stat("core", &st))
		printf("%s\n", st.st_size > 0 && st.st_size <= PAGE ? "cut" : "not cut");
	try("ten pages", aborts, 10 * PAGE);
	if (!stat("core", &st))
		printf("%s\n", st.st_size >= 9 * PAGE && st.st_blocks * 512 <= 32 * PAGE ? "cut" : "not cut");
	unlink("second");

	show_core("threads", with_threads);
	choose("0x0");
	show_core("nothing chosen", bare);
	choose("2");
	show_core("shared memory chosen", bare);
	choose("0x1ff");
	show_core("everything chosen", bare);
	unlink("core");
	unlink("data");
	if (chdir("/") || rmdir(directory))
		return 1;
	return 0;
}
