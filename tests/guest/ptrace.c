/* ptrace(2): every kind of stop, what is read and written in them, and what waits tell. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/ptrace.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static int failed;

#ifndef PTRACE_ARCH_PRCTL
#define PTRACE_ARCH_PRCTL 30	/* arch/x86/include/uapi/asm/ptrace-abi.h */
#endif

#define CHECK(what)                                                                                        \
	do {                                                                                               \
		if (!(what)) {                                                                             \
			printf("line %d: %s (errno %d, status %x)\n", __LINE__, #what, errno, status);     \
			failed = 1;                                                                        \
		}                                                                                          \
	} while (0)

static int status;

static long pt(long request, pid_t pid, unsigned long address, unsigned long data)
{
	return syscall(SYS_ptrace, request, pid, address, data);
}

static int stopped_with(pid_t pid, int code)
{
	status = 0;
	return waitpid(pid, &status, __WALL) == pid && status == (code << 8 | 0x7f);
}

static int ended_with(pid_t pid, int wanted)
{
	status = 0;
	return waitpid(pid, &status, __WALL) == pid && status == wanted;
}

static struct user_regs_struct regs_of(pid_t pid)
{
	struct user_regs_struct r = { 0 };

	CHECK(!pt(PTRACE_GETREGS, pid, 0, (long)&r));
	return r;
}

/* A child that asked to be traced and stopped itself, then runs `body`. */
static pid_t child(void (*body)(void))
{
	pid_t pid = fork();

	if (!pid) {
		if (pt(PTRACE_TRACEME, 0, 0, 0))
			_exit(99);
		raise(SIGSTOP);
		body();
		_exit(0);
	}
	CHECK(stopped_with(pid, SIGSTOP));
	return pid;
}

static pid_t plain_child(void (*body)(void))
{
	pid_t pid = fork();

	if (!pid) {
		body();
		_exit(0);
	}
	return pid;
}

/* -- system calls -- */
static void some_calls(void)
{
	long id = syscall(SYS_getppid);

	if (id != 4711)
		_exit(1);
	if (syscall(SYS_gettid) != -EPERM && errno != ENOANO)
		_exit(2);
	syscall(SYS_close, 77);
	_exit(syscall(SYS_getpid) == 12 ? 5 : 6);
}

static void test_syscalls(void)
{
	pid_t pid = child(some_calls);
	struct ptrace_syscall_info info;
	struct user_regs_struct r;
	int calls = 0;

	CHECK(!pt(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL));
	CHECK(pt(PTRACE_SETOPTIONS, pid, 0, 0x80000000) == -1 && errno == EINVAL);
	CHECK(pt(PTRACE_GET_SYSCALL_INFO, pid, sizeof(info), (long)&info) == 24 && info.op == PTRACE_SYSCALL_INFO_NONE);
	for (;;) {
		CHECK(!pt(PTRACE_SYSCALL, pid, 0, 0));
		if (!stopped_with(pid, SIGTRAP | 0x80))
			break;
		CHECK(pt(PTRACE_GET_SYSCALL_INFO, pid, sizeof(info), (long)&info) == 80);
		CHECK(info.op == PTRACE_SYSCALL_INFO_ENTRY && info.arch == AUDIT_ARCH_X86_64);
		r = regs_of(pid);
		CHECK(r.orig_rax == info.entry.nr && (long)r.rax == -ENOSYS && r.rip == info.instruction_pointer);
		CHECK(r.cs == 0x33 && r.ss == 0x2b && r.rsp == info.stack_pointer && r.rcx == r.rip);
		if (r.orig_rax == SYS_gettid) {	/* another number, and not run at all */
			r.orig_rax = -1;
			CHECK(!pt(PTRACE_SETREGS, pid, 0, (long)&r));
		} else if (r.orig_rax == SYS_close) {
			CHECK(info.entry.args[0] == 77);
			r.orig_rax = SYS_exit;	/* for a moment */
			r.rdi = 3;
			CHECK(!pt(PTRACE_SETREGS, pid, 0, (long)&r));
			r.orig_rax = SYS_getpid;
			CHECK(!pt(PTRACE_POKEUSR, pid, offsetof(struct user_regs_struct, orig_rax), SYS_getpid));
		}
		calls++;
		CHECK(!pt(PTRACE_SYSCALL, pid, 0, 0));
		if (!stopped_with(pid, SIGTRAP | 0x80))
			break;
		CHECK(pt(PTRACE_GET_SYSCALL_INFO, pid, sizeof(info), (long)&info) == 33);
		CHECK(info.op == PTRACE_SYSCALL_INFO_EXIT);
		r = regs_of(pid);
		CHECK((long)r.rax == info.exit.rval && info.exit.is_error == (info.exit.rval < 0));
		if (calls == 1) {
			CHECK(r.orig_rax == SYS_tgkill || r.orig_rax == SYS_getppid || r.orig_rax == SYS_rt_sigprocmask);
		}
		if (r.orig_rax == SYS_getppid) {
			CHECK(info.exit.rval == getpid());
			r.rax = 4711;
		} else if (r.orig_rax == (unsigned long)-1) {
			r.rax = -ENOANO;
		} else if (r.orig_rax == SYS_getpid) {
			r.rax = 12;
		}
		CHECK(!pt(PTRACE_SETREGS, pid, 0, (long)&r));
	}
	CHECK(status == 0x500);
}

static void emulated(void)
{
	_exit(syscall(SYS_reboot, 1, 2, 3) == 77 && syscall(SYS_kill, 1, 2) == 78 ? 4 : 5);
}

static void test_sysemu(void)
{
	pid_t pid = child(emulated);
	struct user_regs_struct r;

	CHECK(!pt(PTRACE_SYSEMU, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	r = regs_of(pid);
	while (r.orig_rax != SYS_reboot) {	/* what raise() does after the signal */
		r.rax = 0;
		CHECK(!pt(PTRACE_SETREGS, pid, 0, (long)&r));
		CHECK(!pt(PTRACE_SYSEMU, pid, 0, 0));
		CHECK(stopped_with(pid, SIGTRAP));
		r = regs_of(pid);
	}
	CHECK(r.rdi == 1 && r.rsi == 2 && r.rdx == 3);
	r.rax = 77;
	CHECK(!pt(PTRACE_SETREGS, pid, 0, (long)&r));
	CHECK(!pt(PTRACE_SYSEMU, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	r = regs_of(pid);
	CHECK(r.orig_rax == SYS_kill);
	r.rax = 78;
	CHECK(!pt(PTRACE_SETREGS, pid, 0, (long)&r));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(ended_with(pid, 0x400));
}

/* -- steps -- */
extern char step_start[], step_syscall[], step_after[], step_end[];

static __attribute__((noinline)) void steps(void)
{
	__asm__ volatile(
		"step_start:\n"
		"	int3\n"
		"	mov	$39, %%eax\n"
		"	nop\n"
		"step_syscall:\n"
		"	syscall\n"
		"step_after:\n"
		"	pushfq\n"
		"	pop	%%rcx\n"
		"	mov	$3, %%ecx\n"
		"1:	loop	1b\n"
		"step_end:\n"
		"	nop\n"
		: : : "rax", "rcx", "r11", "memory");
}

static volatile int handled;

static void handler(int signo)
{
	handled = signo;
}

static void steps_and_signal(void)
{
	signal(SIGUSR1, handler);
	steps();
	raise(SIGUSR2);
	_exit(handled == SIGUSR1 ? 9 : 8);
}

static void test_steps(void)
{
	pid_t pid = child(steps_and_signal);
	struct user_regs_struct r;
	siginfo_t si;
	int n = 0, call = 0;

	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	CHECK(!pt(PTRACE_GETSIGINFO, pid, 0, (long)&si) && si.si_signo == SIGTRAP && si.si_code == SI_KERNEL);
	r = regs_of(pid);
	CHECK(r.rip == (unsigned long)step_start + 1);
	for (; r.rip != (unsigned long)step_end && n < 100; n++) {
		unsigned long before = r.rip;

		CHECK(!pt(PTRACE_SINGLESTEP, pid, 0, 0));
		CHECK(stopped_with(pid, SIGTRAP));
		r = regs_of(pid);
		CHECK(!pt(PTRACE_GETSIGINFO, pid, 0, (long)&si));
		CHECK(!(r.eflags & 0x100));
		if (before == (unsigned long)step_syscall) {
			call = r.rip == (unsigned long)step_after && (int)r.rax == pid && si.si_code == TRAP_BRKPT;
		} else {
			CHECK(si.si_code == TRAP_TRACE && si.si_addr == (void *)r.rip);
		}
	}
	CHECK(call);
	CHECK(n == 9);
	/* A step with a signal ends before the handler's first instruction. */
	CHECK(!pt(PTRACE_SINGLESTEP, pid, 0, SIGUSR1));
	CHECK(stopped_with(pid, SIGTRAP));
	r = regs_of(pid);
	CHECK(r.rip == (unsigned long)handler && r.rdi == SIGUSR1);
	/* Not the signal that it sent, and another one instead of it. */
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGUSR2));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(ended_with(pid, 0x900));
}

static volatile double numbers[2] = { 1.25, 2.5 };

static void breakpoint_body(void)
{
	double a, b = numbers[1];

	steps();
	a = numbers[0];
	__asm__ volatile("int3" : "+x"(a));
	_exit(a + b == 100.5 + b ? 3 : 4);
}

/* -- memory and registers -- */
static void test_memory(void)
{
	pid_t pid = child(breakpoint_body);
	unsigned long address = (unsigned long)step_after, word = 0, old;
	struct user_fpregs_struct fp;
	struct user_regs_struct r, again;
	uint8_t xstate[16384] __attribute__((aligned(64)));
	struct iovec iov;
	char line[256], buffer[8];
	FILE *f;
	int fd, traced_by = 0;

	CHECK(!pt(PTRACE_PEEKTEXT, pid, address, (long)&word));
	old = word;
	CHECK((word & 0xffff) == 0x599c);	/* pushfq, pop %rcx */
	CHECK(!pt(PTRACE_POKETEXT, pid, address, (word & ~0xffUL) | 0xcc));
	CHECK(*(volatile uint8_t *)step_after == 0x9c);	/* a copy of the child's own */
	CHECK(!pt(PTRACE_PEEKDATA, pid, address, (long)&word) && (word & 0xff) == 0xcc);
	CHECK(pt(PTRACE_PEEKDATA, pid, 8, (long)&word) == -1 && errno == EIO);
	CHECK(pt(PTRACE_POKEDATA, pid, 8, 0) == -1 && errno == EIO);
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));	/* the one in the program */
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	r = regs_of(pid);
	CHECK(r.rip == address + 1);
	CHECK(!pt(PTRACE_POKETEXT, pid, address, old));
	r.rip = address;
	r.rbx = 0x1122334455667788;
	r.r15 = 15;
	CHECK(!pt(PTRACE_SETREGS, pid, 0, (long)&r));
	memset(&again, 0, sizeof(again));
	iov = (struct iovec){ &again, sizeof(again) };
	CHECK(!pt(PTRACE_GETREGSET, pid, NT_PRSTATUS, (long)&iov) && iov.iov_len == sizeof(again));
	CHECK(!memcmp(&again, &r, sizeof(r)) || again.eflags != r.eflags);
	CHECK(!pt(PTRACE_ARCH_PRCTL, pid, (long)&word, 0x1003) && word == r.fs_base);	/* ARCH_GET_FS */
	CHECK(pt(PTRACE_ARCH_PRCTL, pid, (long)&word, 0x1) == -1 && errno == EINVAL);
	iov = (struct iovec){ &again, 16 };
	CHECK(!pt(PTRACE_GETREGSET, pid, NT_PRSTATUS, (long)&iov) && iov.iov_len == 16);
	iov = (struct iovec){ &again, 15 };
	CHECK(pt(PTRACE_GETREGSET, pid, NT_PRSTATUS, (long)&iov) == -1 && errno == EINVAL);
	CHECK(pt(PTRACE_GETREGSET, pid, 0x7777, (long)&iov) == -1 && errno == EINVAL);
	CHECK(!pt(PTRACE_PEEKUSR, pid, offsetof(struct user, regs.rbx), (long)&word) && word == 0x1122334455667788);
	CHECK(pt(PTRACE_PEEKUSR, pid, 3, (long)&word) == -1 && errno == EIO);
	CHECK(pt(PTRACE_PEEKUSR, pid, sizeof(struct user) + 16, (long)&word) == -1 && errno == EIO);
	CHECK(!pt(PTRACE_PEEKUSR, pid, offsetof(struct user, u_debugreg[7]), (long)&word) && !(word & 0xff));
	CHECK(pt(PTRACE_POKEUSR, pid, offsetof(struct user, regs.fs_base), 1UL << 63) == -1 && errno == EIO);

	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	/* 1.25 lies in some XMM register: make it 100.5, by the legacy area first, then by XSTATE. */
	CHECK(!pt(PTRACE_GETFPREGS, pid, 0, (long)&fp));
	CHECK((fp.cwd & 0x3f) == 0x3f && (fp.mxcsr & 0x1f80) == 0x1f80);
	double value;
	int found = 0;
	for (int i = 0; i < 16; i++) {
		memcpy(&value, (char *)fp.xmm_space + 16 * i, 8);
		if (value == 1.25) {
			value = 99.5;
			memcpy((char *)fp.xmm_space + 16 * i, &value, 8);
			found++;
		}
	}
	CHECK(found);
	CHECK(!pt(PTRACE_SETFPREGS, pid, 0, (long)&fp));
	iov = (struct iovec){ xstate, sizeof(xstate) };
	CHECK(!pt(PTRACE_GETREGSET, pid, NT_X86_XSTATE, (long)&iov) && iov.iov_len >= 576);
	uint64_t xcr0;
	memcpy(&xcr0, xstate + 464, 8);
	CHECK((xcr0 & 3) == 3);
	for (int i = 0; i < 16; i++) {
		memcpy(&value, xstate + 160 + 16 * i, 8);
		if (value == 99.5) {
			value = 100.5;
			memcpy(xstate + 160 + 16 * i, &value, 8);
		}
	}
	CHECK(!pt(PTRACE_SETREGSET, pid, NT_X86_XSTATE, (long)&iov));
	iov.iov_len = 100;
	CHECK(pt(PTRACE_SETREGSET, pid, NT_X86_XSTATE, (long)&iov) == -1);

	/* /proc */
	snprintf(line, sizeof(line), "/proc/%d/mem", pid);
	fd = open(line, O_RDWR);
	CHECK(fd >= 0);
	CHECK(pread(fd, buffer, 8, address) == 8 && !memcmp(buffer, &old, 8));
	CHECK(pwrite(fd, &old, 8, address) == 8);
	CHECK(pread(fd, buffer, 8, 8) == -1 && errno == EIO);
	close(fd);
	snprintf(line, sizeof(line), "/proc/%d/status", pid);
	f = fopen(line, "r");
	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "TracerPid: %d", &traced_by) == 1)
			CHECK(traced_by == getpid());
		if (!strncmp(line, "State:", 6))
			CHECK(!strcmp(line, "State:\tt (tracing stop)\n"));
	}
	CHECK(traced_by);
	if (f)
		fclose(f);
	/* process_vm_writev does not write where the process may not. */
	struct iovec here = { &old, 8 }, there = { (void *)address, 8 };
	CHECK(process_vm_readv(pid, &here, 1, &there, 1, 0) == 8);
	CHECK(process_vm_writev(pid, &here, 1, &there, 1, 0) == -1 && errno == EFAULT);
	CHECK(!pt(PTRACE_DETACH, pid, 0, 0));
	CHECK(ended_with(pid, 0x300));
}

/* -- signals -- */
static void signals_body(void)
{
	struct sigaction sa = { .sa_handler = handler };
	sigset_t set;

	sigaction(SIGUSR1, &sa, NULL);
	signal(SIGUSR2, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN);
	sigprocmask(SIG_BLOCK, &set, NULL);
	union sigval v = { .sival_int = 5 };
	sigqueue(getpid(), SIGRTMIN, v);
	v.sival_int = 6;
	sigqueue(getpid(), SIGRTMIN, v);
	raise(SIGUSR2);
	if (handled != SIGUSR1)
		_exit(1);
	raise(SIGTERM);
	_exit(2);
}

static void test_signals(void)
{
	pid_t pid = child(signals_body);
	struct ptrace_peeksiginfo_args args = { 0, PTRACE_PEEKSIGINFO_SHARED, 10 };
	siginfo_t si, many[10];
	uint64_t mask = 0;

	CHECK(!pt(PTRACE_GETSIGINFO, pid, 0, (long)&si) && si.si_code == SI_TKILL && si.si_pid == pid);
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGUSR2));	/* also one that is ignored */
	CHECK(pt(PTRACE_PEEKSIGINFO, pid, (long)&args, (long)many) == 2);
	CHECK(many[0].si_signo == SIGRTMIN && many[0].si_value.sival_int == 5 && many[1].si_value.sival_int == 6);
	args.off = 1;
	CHECK(pt(PTRACE_PEEKSIGINFO, pid, (long)&args, (long)many) == 1 && many[0].si_value.sival_int == 6);
	args.flags = 0;
	CHECK(pt(PTRACE_PEEKSIGINFO, pid, (long)&args, (long)many) == 0);
	args.flags = 8;
	CHECK(pt(PTRACE_PEEKSIGINFO, pid, (long)&args, (long)many) == -1 && errno == EINVAL);
	CHECK(!pt(PTRACE_GETSIGMASK, pid, 8, (long)&mask) && mask == 1UL << (SIGRTMIN - 1));
	CHECK(pt(PTRACE_GETSIGMASK, pid, 4, (long)&mask) == -1 && errno == EINVAL);
	CHECK(!pt(PTRACE_SETSIGMASK, pid, 8, (long)&mask));
	CHECK(!pt(PTRACE_CONT, pid, 0, SIGUSR1));
	CHECK(stopped_with(pid, SIGTERM));
	CHECK(pt(PTRACE_CONT, pid, 0, 100) == -1 && errno == EIO);
	memset(&si, 0, sizeof(si));
	si.si_signo = SIGTERM;
	si.si_code = SI_QUEUE;
	CHECK(!pt(PTRACE_SETSIGINFO, pid, 0, (long)&si));
	CHECK(!pt(PTRACE_CONT, pid, 0, SIGTERM));
	CHECK(ended_with(pid, SIGTERM));
	CHECK(pt(PTRACE_CONT, pid, 0, 0) == -1 && errno == ESRCH);
}

/* -- events -- */
static void fork_body(void)
{
	pid_t pid = fork();

	if (!pid)
		_exit(11);
	waitpid(pid, &status, 0);
	if (!(pid = vfork()))
		_exit(12);
	waitpid(pid, &status, 0);
	_exit(13);
}

static unsigned long message(pid_t pid)
{
	unsigned long m = ~0UL;

	CHECK(!pt(PTRACE_GETEVENTMSG, pid, 0, (long)&m));
	return m;
}

static void test_events(void)
{
	pid_t pid = child(fork_body), kid;

	CHECK(!pt(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACEVFORKDONE |
		  PTRACE_O_TRACEEXIT));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_FORK << 8));
	kid = message(pid);
	CHECK(stopped_with(kid, SIGSTOP));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(!pt(PTRACE_CONT, kid, 0, 0));
	CHECK(stopped_with(kid, SIGTRAP | PTRACE_EVENT_EXIT << 8));
	CHECK(message(kid) == 0xb00);
	CHECK(!pt(PTRACE_CONT, kid, 0, 0));
	CHECK(ended_with(kid, 0xb00));		/* its tracer's first, then its parent's */
	CHECK(stopped_with(pid, SIGCHLD));
	CHECK(!pt(PTRACE_CONT, pid, 0, SIGCHLD));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_VFORK << 8));
	kid = message(pid);
	CHECK(stopped_with(kid, SIGSTOP));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(!pt(PTRACE_DETACH, kid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_VFORK_DONE << 8));
	CHECK(message(pid) == (unsigned long)kid);
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	status = 0;
	CHECK(stopped_with(pid, SIGCHLD));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_EXIT << 8));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(ended_with(pid, 0xd00));
}

static void exec_body(void)
{
	execl("/proc/self/exe", "ptrace", "nothing", NULL);
	_exit(50);
}

static void test_exec(void)
{
	pid_t pid = child(exec_body);

	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(ended_with(pid, 0x1500));

	pid = child(exec_body);
	CHECK(!pt(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACEEXEC));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_EXEC << 8));
	CHECK(message(pid) == (unsigned long)pid);
	CHECK(!pt(PTRACE_KILL, pid, 0, 0));
	CHECK(ended_with(pid, SIGKILL));
}

static void *exec_thread(void *unused)
{
	exec_body();
	return unused;
}

static void exec_by_thread(void)
{
	pthread_t t;

	pthread_create(&t, NULL, exec_thread, NULL);
	pthread_join(t, NULL);
}

static void test_exec_by_thread(void)
{
	pid_t pid = child(exec_by_thread), tid;

	CHECK(!pt(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACEEXEC | PTRACE_O_TRACECLONE));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_CLONE << 8));
	tid = message(pid);
	CHECK(stopped_with(tid, SIGSTOP));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(!pt(PTRACE_CONT, tid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_EXEC << 8));
	CHECK(message(pid) == (unsigned long)tid);
	CHECK(pt(PTRACE_CONT, tid, 0, 0) == -1 && errno == ESRCH);
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(ended_with(pid, 0x1500));
}

/* -- SEIZE, INTERRUPT, LISTEN and group stops -- */
static void sleep_body(void)
{
	for (;;)
		pause();
}

static void spin_body(void)
{
	for (volatile unsigned long i = 0;; i++)
		;
}

static void test_seize(void (*body)(void))
{
	pid_t pid = plain_child(body);
	siginfo_t si;

	CHECK(pt(PTRACE_SEIZE, pid, 1, 0) == -1 && errno == EIO);
	CHECK(!pt(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD));
	CHECK(pt(PTRACE_SEIZE, pid, 0, 0) == -1 && errno == EPERM);
	CHECK(pt(PTRACE_CONT, pid, 0, 0) == -1 && errno == ESRCH);	/* it is not stopped */
	CHECK(waitpid(pid, &status, WNOHANG) == 0);
	CHECK(!pt(PTRACE_INTERRUPT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_STOP << 8));
	CHECK(!pt(PTRACE_GETSIGINFO, pid, 0, (long)&si) && si.si_code == (SIGTRAP | PTRACE_EVENT_STOP << 8));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	kill(pid, SIGSTOP);
	CHECK(stopped_with(pid, SIGSTOP));
	CHECK(pt(PTRACE_LISTEN, pid, 0, 0) == -1 && errno == EIO);
	CHECK(!pt(PTRACE_CONT, pid, 0, SIGSTOP));
	CHECK(stopped_with(pid, SIGSTOP | PTRACE_EVENT_STOP << 8));
	CHECK(!pt(PTRACE_LISTEN, pid, 0, 0));
	CHECK(waitpid(pid, &status, WNOHANG) == 0);
	CHECK(pt(PTRACE_CONT, pid, 0, 0) == -1 && errno == ESRCH);
	kill(pid, SIGCONT);
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_STOP << 8));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGCONT));
	CHECK(!pt(PTRACE_DETACH, pid, 0, SIGTERM));
	CHECK(ended_with(pid, SIGTERM));
}

static void test_attach(void)
{
	pid_t pid = plain_child(sleep_body);
	siginfo_t si;

	CHECK(pt(PTRACE_ATTACH, getpid(), 0, 0) == -1 && errno == EPERM);
	CHECK(pt(PTRACE_ATTACH, 32000, 0, 0) == -1 && errno == ESRCH);
	CHECK(!pt(PTRACE_ATTACH, pid, 0, 0));
	CHECK(stopped_with(pid, SIGSTOP));
	CHECK(pt(PTRACE_INTERRUPT, pid, 0, 0) == -1 && errno == EIO);
	CHECK(!pt(PTRACE_CONT, pid, 0, SIGSTOP));
	CHECK(stopped_with(pid, SIGSTOP));		/* the group stop of one that was not seized */
	CHECK(pt(PTRACE_GETSIGINFO, pid, 0, (long)&si) == -1 && errno == EINVAL);
	CHECK(!pt(PTRACE_DETACH, pid, 0, 0));		/* and so it stays stopped */
	memset(&si, 0, sizeof(si));
	CHECK(!waitid(P_PID, pid, &si, WSTOPPED) && si.si_code == CLD_STOPPED && si.si_status == SIGSTOP);
	CHECK(!pt(PTRACE_ATTACH, pid, 0, 0));
	CHECK(!waitid(P_PID, pid, &si, WSTOPPED) && si.si_code == CLD_TRAPPED && si.si_status == SIGSTOP);
	kill(pid, SIGCONT);
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGCONT) || stopped_with(pid, SIGCONT));
	CHECK(!pt(PTRACE_DETACH, pid, 0, 0));
	kill(pid, SIGKILL);
	CHECK(ended_with(pid, SIGKILL));
}

/* -- threads, a tracer's death, somebody else's child -- */
static void *thread_body(void *unused)
{
	syscall(SYS_exit, 7);
	return unused;
}

static void threads_body(void)
{
	pthread_t t;

	pthread_create(&t, NULL, thread_body, NULL);
	sleep_body();
}

static void test_threads(void)
{
	pid_t pid = child(threads_body), tid;

	CHECK(!pt(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_CLONE << 8));
	tid = message(pid);
	CHECK(stopped_with(tid, SIGSTOP));
	CHECK(!pt(PTRACE_CONT, tid, 0, 0));
	CHECK(ended_with(tid, 0x700));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	kill(pid, SIGKILL);
	CHECK(ended_with(pid, SIGKILL));
}

static void test_tracer_dies(int options, int wanted)
{
	pid_t pid = plain_child(sleep_body), tracer = fork();
	int fds[2];

	if (!tracer) {
		if (pt(PTRACE_SEIZE, pid, 0, options) || pt(PTRACE_INTERRUPT, pid, 0, 0) ||
		    waitpid(pid, &status, __WALL) != pid)
			_exit(1);
		_exit(0);
	}
	CHECK(!pipe(fds));
	close(fds[0]);
	close(fds[1]);
	CHECK(ended_with(tracer, 0));
	kill(pid, SIGTERM);
	CHECK(ended_with(pid, wanted));
}

static void test_not_the_parent(void)
{
	pid_t pid = plain_child(sleep_body), tracer;
	siginfo_t si;

	signal(SIGUSR1, handler);	/* before there is anybody to send it */
	handled = 0;
	tracer = fork();
	if (!tracer) {
		int bad = 0;

		bad |= pt(PTRACE_SEIZE, pid, 0, 0) ? 1 : 0;
		kill(pid, SIGTERM);
		bad |= stopped_with(pid, SIGTERM) ? 0 : 2;
		bad |= pt(PTRACE_CONT, pid, 0, SIGTERM) ? 4 : 0;
		/* A zombie that is ours to see first. */
		bad |= waitid(P_PID, pid, &si, WEXITED | WNOWAIT) ? 8 : 0;
		bad |= si.si_code == CLD_KILLED && si.si_status == SIGTERM ? 0 : 16;
		kill(getppid(), SIGUSR1);
		usleep(30000);
		bad |= ended_with(pid, SIGTERM) ? 0 : 32;
		_exit(bad);
	}
	while (!handled)
		usleep(1000);
	CHECK(waitpid(pid, &status, WNOHANG) == 0);
	CHECK(ended_with(pid, SIGTERM));
	CHECK(ended_with(tracer, 0));
}

/* -- seccomp -- */
static void seccomp_body(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE | 0x1234),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getuid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP | 7),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { 6, code };

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		_exit(60);
	if (syscall(SYS_getppid) != 4242)
		_exit(61);
	if (syscall(SYS_getppid) != getpid())
		_exit(62);
	syscall(SYS_getuid);
	_exit(63);
}

static void test_seccomp(void)
{
	pid_t pid = child(seccomp_body);
	struct ptrace_syscall_info info;
	siginfo_t si;

	CHECK(!pt(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACESECCOMP | PTRACE_O_TRACESYSGOOD));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_SECCOMP << 8));
	CHECK(message(pid) == 0x1234);
	CHECK(pt(PTRACE_GET_SYSCALL_INFO, pid, sizeof(info), (long)&info) == 84);
	CHECK(info.op == PTRACE_SYSCALL_INFO_SECCOMP && info.seccomp.nr == SYS_getppid &&
	      info.seccomp.ret_data == 0x1234);
	CHECK(!pt(PTRACE_POKEUSR, pid, offsetof(struct user, regs.orig_rax), -1));
	CHECK(!pt(PTRACE_POKEUSR, pid, offsetof(struct user, regs.rax), 4242));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_SECCOMP << 8));
	CHECK(!pt(PTRACE_POKEUSR, pid, offsetof(struct user, regs.orig_rax), SYS_getpid));
	/* The call's own stops come around the filter: the exit's alone is left. */
	CHECK(!pt(PTRACE_SYSCALL, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP | 0x80));
	CHECK(pt(PTRACE_GET_SYSCALL_INFO, pid, sizeof(info), (long)&info) == 33 && info.exit.rval == pid);
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGSYS));
	CHECK(!pt(PTRACE_GETSIGINFO, pid, 0, (long)&si) && si.si_code == 1 && si.si_syscall == SYS_getuid &&
	      si.si_errno == 7);
	CHECK(regs_of(pid).rax == SYS_getuid);
	CHECK(!pt(PTRACE_CONT, pid, 0, SIGSYS));
	status = 0;
	CHECK(waitpid(pid, &status, 0) == pid && WTERMSIG(status) == SIGSYS);
}

/* -- the processor's own breakpoints -- */
static volatile long watched;

static void watched_body(void)
{
	watched = 1;
	steps();
	_exit(watched);
}

static unsigned long debug_register(pid_t pid, int n)
{
	unsigned long value = 0;

	CHECK(!pt(PTRACE_PEEKUSR, pid, offsetof(struct user, u_debugreg) + 8 * n, (long)&value));
	return value;
}

static long set_debug_register(pid_t pid, int n, unsigned long value)
{
	return pt(PTRACE_POKEUSR, pid, offsetof(struct user, u_debugreg) + 8 * n, value);
}

static void test_debug_registers(void)
{
	pid_t pid = child(watched_body);
	siginfo_t si;

	CHECK(set_debug_register(pid, 0, 1UL << 63) == -1 && errno == EINVAL);
	CHECK(!set_debug_register(pid, 0, (unsigned long)&watched));
	CHECK(set_debug_register(pid, 7, 2UL << 16 | 1) == -1 && errno == EINVAL);	/* input and output */
	if (set_debug_register(pid, 7, 1UL << 16 | 3UL << 18 | 1)) {
		CHECK(errno == ENOSPC);		/* there are none here; nothing else may be said */
		CHECK(debug_register(pid, 7) == 0);
		CHECK(!pt(PTRACE_KILL, pid, 0, 0));
		CHECK(ended_with(pid, SIGKILL));
		return;
	}
	CHECK(debug_register(pid, 7) == (1UL << 16 | 3UL << 18 | 1));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	CHECK(!pt(PTRACE_GETSIGINFO, pid, 0, (long)&si) && si.si_code == 4);	/* TRAP_HWBKPT */
	CHECK((debug_register(pid, 6) & 0xf) == 1);
	CHECK(!set_debug_register(pid, 7, 0));
	CHECK(!set_debug_register(pid, 1, (unsigned long)step_after));
	CHECK(!set_debug_register(pid, 7, 4));
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));	/* the int3 */
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));
	CHECK(stopped_with(pid, SIGTRAP));
	CHECK(regs_of(pid).rip == (unsigned long)step_after);
	CHECK(!pt(PTRACE_GETSIGINFO, pid, 0, (long)&si) && si.si_code == 4);
	CHECK(!pt(PTRACE_CONT, pid, 0, 0));	/* the instruction runs now */
	CHECK(ended_with(pid, 0x100));
}

/* -- who may look: no more than ptrace_may_access says -- */
static void test_permission(void)
{
	pid_t pid = plain_child(sleep_body), other;
	char word[8], path[64];
	struct iovec here = { word, 8 }, there = { (void *)&failed, 4 };

	if (geteuid()) {
		kill(pid, SIGKILL);
		CHECK(ended_with(pid, SIGKILL));
		return;
	}
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	other = fork();
	if (!other) {
		int bad = 0;

		if (setresgid(1234, 1234, 1234) || setresuid(1234, 1234, 1234))
			_exit(99);
		bad |= pt(PTRACE_ATTACH, pid, 0, 0) == -1 && errno == EPERM ? 0 : 1;
		bad |= pt(PTRACE_SEIZE, pid, 0, 0) == -1 && errno == EPERM ? 0 : 2;
		bad |= process_vm_readv(pid, &here, 1, &there, 1, 0) == -1 && errno == EPERM ? 0 : 4;
		bad |= open(path, O_RDONLY) == -1 && errno == EACCES ? 0 : 8;
		_exit(bad);
	}
	CHECK(ended_with(other, 0));
	/* Its own kind, but not dumpable. */
	other = fork();
	if (!other) {
		pid_t mine;
		int bad = 0;

		if (setresgid(1234, 1234, 1234) || setresuid(1234, 1234, 1234))
			_exit(99);
		prctl(PR_SET_DUMPABLE, 0);
		mine = plain_child(sleep_body);
		bad |= pt(PTRACE_ATTACH, mine, 0, 0) == -1 && errno == EPERM ? 0 : 1;
		bad |= process_vm_readv(mine, &here, 1, &there, 1, 0) == -1 && errno == EPERM ? 0 : 2;
		kill(mine, SIGKILL);
		_exit(bad);
	}
	CHECK(ended_with(other, 0));
	kill(pid, SIGKILL);
	CHECK(ended_with(pid, SIGKILL));
}

/* -- an interrupted call goes on after a stop, and does not after an inferior call -- */
static void read_body(void)
{
	int fds[2];
	char c;
	struct timespec t = { 0, 50000000 };

	if (pipe(fds))
		_exit(1);
	if (nanosleep(&t, NULL))
		_exit(2);
	if (!fork()) {
		usleep(1500000);	/* after all interruptions, also on a busy machine */
		_exit(write(fds[1], "x", 1) != 1);
	}
	_exit(read(fds[0], &c, 1) == 1 && c == 'x' ? 20 : 30 + errno);
}

static void test_restarts(void)
{
	pid_t pid = plain_child(read_body);

	CHECK(!pt(PTRACE_SEIZE, pid, 0, 0));
	for (int i = 0; i < 20; i++) {
		CHECK(!pt(PTRACE_INTERRUPT, pid, 0, 0));
		CHECK(stopped_with(pid, SIGTRAP | PTRACE_EVENT_STOP << 8));
		CHECK(!pt(PTRACE_CONT, pid, 0, 0));
		usleep(4000);
	}
	while (waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status))
		CHECK(WSTOPSIG(status) == SIGCHLD && !pt(PTRACE_CONT, pid, 0, 0));
	CHECK(status == 0x1400);
}

int main(int argc, char **argv)
{
	if (argc > 1)
		return 21;
	setbuf(stdout, NULL);
#define RUN(call) (printf("%s\n", #call), call)
	RUN(test_syscalls());
	RUN(test_sysemu());
	RUN(test_steps());
	RUN(test_memory());
	RUN(test_signals());
	RUN(test_events());
	RUN(test_exec());
	RUN(test_exec_by_thread());
	RUN(test_seize(sleep_body));
	RUN(test_seize(spin_body));
	RUN(test_attach());
	RUN(test_threads());
	RUN(test_tracer_dies(0, SIGTERM));
	RUN(test_tracer_dies(PTRACE_O_EXITKILL, SIGKILL));
	RUN(test_not_the_parent());
	RUN(test_seccomp());
	RUN(test_debug_registers());
	RUN(test_permission());
	RUN(test_restarts());
	printf(failed ? "failed\n" : "as Linux\n");
	return failed;
}
