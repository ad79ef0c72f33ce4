/* Seccomp: strict mode, filters over numbers and arguments, each answer, inheritance, who may install. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

static int bad;

#define CHECK(what, ok) do { if (!(ok)) { printf("FAILED line %d: %s (errno %d)\n", __LINE__, what, errno); bad = 1; } } while (0)
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(k) BPF_STMT(BPF_RET | BPF_K, k)
#define UNLESS(k, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, k, 0, skip)

static int install_flags(struct sock_filter *code, int n, int flags)
{
	struct sock_fprog prog = { n, code };

	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &prog);
}

#define INSTALL(code) install_flags(code, sizeof(code) / sizeof(*(code)), 0)

/* A filter that answers `action` to one call and lets the others pass. */
static int answer(int nr, unsigned action)
{
	struct sock_filter code[] = {
		LOAD(arch), UNLESS(AUDIT_ARCH_X86_64, 3),
		LOAD(nr), UNLESS(nr, 1), RETURN(action), RETURN(SECCOMP_RET_ALLOW),
	};

	return INSTALL(code);
}

static void report(const char *what, void (*child)(void))
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		bad = 0;
		child();
		fflush(stdout);
		_exit(bad);
	}
	waitpid(pid, &status, 0);
	if (WIFSIGNALED(status))
		printf("%s: signal %d\n", what, WTERMSIG(status));
	else
		printf("%s: exit %d\n", what, WEXITSTATUS(status));
	bad |= WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

static void strict(void)
{
	char c;
	int fds[2];

	if (pipe(fds) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
		syscall(SYS_exit, 1);
	syscall(SYS_exit, write(fds[1], "x", 1) == 1 && read(fds[0], &c, 1) == 1 && c == 'x' ? 7 : 1);
}

static void strict_kills(void)
{
	syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 0, NULL);
	getppid();
	syscall(SYS_exit, 1);
}

static void error(void)
{
	CHECK("install", !answer(SYS_getppid, SECCOMP_RET_ERRNO | 77));
	CHECK("errno", syscall(SYS_getppid) == -1 && errno == 77);
	CHECK("others pass", getpid() > 0);
	CHECK("install again", !answer(SYS_getppid, SECCOMP_RET_ERRNO | 5));
	CHECK("the newest counts among equals", syscall(SYS_getppid) == -1 && errno == 5);
	CHECK("mode", prctl(PR_GET_SECCOMP) == 2);
	CHECK("no strict mode after filters", prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) == -1 && errno == EINVAL);
	CHECK("install zero", !answer(SYS_getuid, SECCOMP_RET_ERRNO | 0));
	CHECK("error 0 is success", syscall(SYS_getuid) == 0);
	CHECK("install huge", !answer(SYS_getgid, SECCOMP_RET_ERRNO | 0xffff));
	CHECK("errors end at 4095", syscall(SYS_getgid) == -1 && errno == 4095);
}

static void arguments(void)
{
	struct sock_filter code[] = {
		LOAD(nr), UNLESS(SYS_lseek, 5),
		LOAD(args[1]), UNLESS(0x89abcdef, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]) + 4), UNLESS(0x01234567, 1),
		RETURN(SECCOMP_RET_ERRNO | 88), RETURN(SECCOMP_RET_ALLOW),
	};
	int fd = open("/dev/null", O_RDONLY);

	CHECK("install", !INSTALL(code));
	CHECK("one half is not enough", syscall(SYS_lseek, fd, 0x89abcdefUL, 9) == -1 && errno == EINVAL);
	CHECK("both halves", syscall(SYS_lseek, fd, 0x0123456789abcdefUL, 9) == -1 && errno == 88);
	CHECK("after a match, again none", syscall(SYS_lseek, fd, 0, 9) == -1 && errno == EINVAL);
}

static void arithmetic(void)
{
	struct sock_filter code[] = {
		LOAD(nr), UNLESS(SYS_getpriority, 15),
		LOAD(args[0]),
		BPF_STMT(BPF_ST, 3),
		BPF_STMT(BPF_ALU | BPF_MUL | BPF_K, 6),
		BPF_STMT(BPF_MISC | BPF_TAX, 0),
		BPF_STMT(BPF_LD | BPF_MEM, 3),
		BPF_STMT(BPF_ALU | BPF_ADD | BPF_X, 0),
		BPF_STMT(BPF_ALU | BPF_LSH | BPF_K, 4),
		BPF_STMT(BPF_ALU | BPF_RSH | BPF_K, 2),
		BPF_STMT(BPF_ALU | BPF_DIV | BPF_K, 3),
		BPF_STMT(BPF_ALU | BPF_SUB | BPF_K, 1),
		BPF_STMT(BPF_ALU | BPF_XOR | BPF_K, 0xff),
		BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xfff),
		BPF_STMT(BPF_ALU | BPF_OR | BPF_K, SECCOMP_RET_ERRNO),
		BPF_STMT(BPF_ALU | BPF_NEG, 0), BPF_STMT(BPF_ALU | BPF_NEG, 0),
		BPF_STMT(BPF_RET | BPF_A, 0), RETURN(SECCOMP_RET_ALLOW),
	};

	code[1].jf = 16;
	CHECK("install", !INSTALL(code));
	for (int i = 1; i < 200; i += 37) {
		CHECK("an error", syscall(SYS_getpriority, i, 0) == -1);
		printf("%d ", errno);
	}
	printf("\n");
}

static volatile int caught;
static void *volatile site;

static void on_sys(int signo, siginfo_t *info, void *context)
{
	ucontext_t *u = context;

	caught = info->si_syscall;
	CHECK("siginfo", signo == SIGSYS && info->si_code == 1 && info->si_errno == 1234);
	CHECK("arch", info->si_arch == AUDIT_ARCH_X86_64);
	CHECK("address", (greg_t)info->si_call_addr == u->uc_mcontext.gregs[REG_RIP]);
	CHECK("number in rax", u->uc_mcontext.gregs[REG_RAX] == info->si_syscall);
	CHECK("arguments", u->uc_mcontext.gregs[REG_RDI] == 11 && u->uc_mcontext.gregs[REG_RSI] == 22);
	u->uc_mcontext.gregs[REG_RAX] = 4242;
}

static void trap(void)
{
	struct sigaction sa = { .sa_sigaction = on_sys, .sa_flags = SA_SIGINFO };

	sigaction(SIGSYS, &sa, NULL);
	CHECK("install", !answer(SYS_getpriority, SECCOMP_RET_TRAP | 1234));
	CHECK("the handler's answer", syscall(SYS_getpriority, 11, 22) == 4242);
	CHECK("number", caught == SYS_getpriority);
}

static void trap_without_handler(void)
{
	answer(SYS_getppid, SECCOMP_RET_TRAP);
	signal(SIGSYS, SIG_IGN);	/* forced all the same */
	getppid();
}

static void trap_while_blocked(void)
{
	sigset_t set;

	sigfillset(&set);
	answer(SYS_getppid, SECCOMP_RET_TRAP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	getppid();
}

static void kill_process(void)
{
	answer(SYS_getppid, SECCOMP_RET_KILL_PROCESS);
	signal(SIGSYS, SIG_IGN);
	getppid();
}

static void *getter(void *unused)
{
	return (void *)(long)getppid();
}

static void kill_thread(void)
{
	pthread_t t;

	CHECK("install", !answer(SYS_getppid, SECCOMP_RET_KILL_THREAD));
	pthread_create(&t, NULL, getter, NULL);
	pthread_join(t, NULL);
	printf("the others live\n");
}

static void kill_process_of_thread(void)
{
	pthread_t t;

	answer(SYS_getppid, SECCOMP_RET_KILL_PROCESS);
	pthread_create(&t, NULL, getter, NULL);
	pthread_join(t, NULL);
}

static void severity(void)
{
	CHECK("install", !answer(SYS_getppid, SECCOMP_RET_ERRNO | 9));
	CHECK("install", !answer(SYS_getppid, SECCOMP_RET_LOG));
	CHECK("an error beats the log", syscall(SYS_getppid) == -1 && errno == 9);
	CHECK("install", !answer(SYS_getuid, SECCOMP_RET_TRACE));
	CHECK("nobody traces", syscall(SYS_getuid) == -1 && errno == ENOSYS);
	CHECK("install", !answer(SYS_getuid, SECCOMP_RET_ERRNO | 8));
	CHECK("an error beats the tracer", syscall(SYS_getuid) == -1 && errno == 8);
	CHECK("install", !answer(SYS_getgid, 0x12340000));
	getgid();	/* what nobody knows kills */
}

static pthread_barrier_t barrier;

static void *sibling(void *unused)
{
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier);
	long n = syscall(SYS_getppid);
	return (void *)(n == -1 && errno == 66 ? 0L : 1L);
}

static void tsync(void)
{
	struct sock_filter code[] = { LOAD(nr), UNLESS(SYS_getppid, 1), RETURN(SECCOMP_RET_ERRNO | 66), RETURN(SECCOMP_RET_ALLOW) };
	void *result = NULL;
	pthread_t t;

	pthread_barrier_init(&barrier, NULL, 2);
	pthread_create(&t, NULL, sibling, NULL);
	pthread_barrier_wait(&barrier);
	CHECK("install", !install_flags(code, 4, SECCOMP_FILTER_FLAG_TSYNC));
	pthread_barrier_wait(&barrier);
	pthread_join(t, &result);
	CHECK("the sibling too", !result);
}

static void *diverges(void *unused)
{
	CHECK("own filter", !answer(SYS_getuid, SECCOMP_RET_ERRNO | 3));
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier);
	return (void *)syscall(SYS_gettid);
}

static void tsync_refused(void)
{
	struct sock_filter code[] = { RETURN(SECCOMP_RET_ALLOW) };
	pthread_t t;
	void *tid;
	int got;

	pthread_barrier_init(&barrier, NULL, 2);
	pthread_create(&t, NULL, diverges, NULL);
	pthread_barrier_wait(&barrier);
	got = install_flags(code, 1, SECCOMP_FILTER_FLAG_TSYNC);
	CHECK("esrch", install_flags(code, 1, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH) == -1 && errno == ESRCH);
	pthread_barrier_wait(&barrier);
	pthread_join(t, &tid);
	CHECK("the thread that went its own way is named", got > 0 && got == (long)tid);
}

static void inheritance(void)
{
	char *argv[] = { "sh", "-c", "grep -E '^(Seccomp|NoNewPrivs|Seccomp_filters):' /proc/self/status; cd /tmp || echo refused", NULL };

	CHECK("no new privileges", !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK("install", !answer(SYS_chdir, SECCOMP_RET_ERRNO | EPERM));
	fflush(stdout);
	execv("/bin/sh", argv);
	bad = 1;
}

static void who_may(void)
{
	if (setuid(65534) && errno != EPERM)
		CHECK("setuid", 0);
	CHECK("privileged only", answer(SYS_getppid, SECCOMP_RET_ALLOW) == -1 && errno == EACCES);
	CHECK("no new privileges", !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK("then it may", !answer(SYS_getppid, SECCOMP_RET_ALLOW));
}

static void refusals(void)
{
	struct sock_filter falls_off[] = { LOAD(nr) };
	struct sock_filter unaligned[] = { BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 2), RETURN(0) };
	struct sock_filter outside[] = { BPF_STMT(BPF_LD | BPF_W | BPF_ABS, sizeof(struct seccomp_data)), RETURN(0) };
	struct sock_filter narrow[] = { BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 0), RETURN(0) };
	struct sock_filter far[] = { UNLESS(1, 5), RETURN(SECCOMP_RET_ALLOW) };
	struct sock_filter zero[] = { BPF_STMT(BPF_ALU | BPF_DIV | BPF_K, 0), RETURN(0) };
	struct sock_filter modulo[] = { BPF_STMT(BPF_ALU | BPF_MOD | BPF_K, 3), RETURN(0) };
	struct sock_filter unset[] = { BPF_STMT(BPF_LD | BPF_MEM, 3), RETURN(SECCOMP_RET_ALLOW) };
	struct sock_filter fine[] = { RETURN(SECCOMP_RET_ALLOW) };
	unsigned action;

	CHECK("empty", install_flags(fine, 0, 0) == -1 && errno == EINVAL);
	CHECK("no end", INSTALL(falls_off) == -1 && errno == EINVAL);
	CHECK("unaligned", INSTALL(unaligned) == -1 && errno == EINVAL);
	CHECK("outside", INSTALL(outside) == -1 && errno == EINVAL);
	CHECK("bytes", INSTALL(narrow) == -1 && errno == EINVAL);
	CHECK("far jump", INSTALL(far) == -1 && errno == EINVAL);
	CHECK("division by 0", INSTALL(zero) == -1 && errno == EINVAL);
	CHECK("modulo", INSTALL(modulo) == -1 && errno == EINVAL);
	CHECK("memory never set", INSTALL(unset) == -1 && errno == EINVAL);
	CHECK("flags", install_flags(fine, 1, 1 << 20) == -1 && errno == EINVAL);
	CHECK("pointer", syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, 8) == -1 && errno == EFAULT);
	CHECK("program", install_flags((void *)8, 1, 0) == -1 && errno == EFAULT);
	CHECK("operation", syscall(SYS_seccomp, 99, 0, 0) == -1 && errno == EINVAL);
	CHECK("strict with arguments", syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 0, fine) == -1 && errno == EINVAL);
	CHECK("prctl mode", prctl(PR_SET_SECCOMP, 5, 0) == -1 && errno == EINVAL);
	CHECK("off", prctl(PR_GET_SECCOMP) == 0);
	action = SECCOMP_RET_TRAP;
	CHECK("known action", !syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action));
	action = 0x12340000;
	CHECK("unknown action", syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == -1 && errno == EOPNOTSUPP);
}

int main(void)
{
	report("strict", strict);
	report("strict kills", strict_kills);
	report("errors", error);
	report("arguments", arguments);
	report("arithmetic", arithmetic);
	report("trap", trap);
	report("trap without a handler", trap_without_handler);
	report("trap while blocked", trap_while_blocked);
	report("kill process", kill_process);
	report("kill thread", kill_thread);
	report("kill the thread's process", kill_process_of_thread);
	report("severity", severity);
	report("siblings", tsync);
	report("siblings refuse", tsync_refused);
	report("inheritance", inheritance);
	report("who may", who_may);
	report("refusals", refusals);
	return bad;
}
