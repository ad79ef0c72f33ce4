/* Frames, masks, alternate stacks, restarts, order of realtime signals, siginfo of everything that sends. */
#include "proc_check.h"
#include <immintrin.h>
#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <ucontext.h>

static volatile int count, order[16];
static siginfo_t last;
static volatile long trapno, errcode;
static sigjmp_buf out;
static volatile uintptr_t stack_low, stack_high, handler_sp;

static void counter(int signo)
{
	order[count++ & 15] = signo;
}

static void keeper(int signo, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;

	last = *info;
	trapno = uc->uc_mcontext.gregs[REG_TRAPNO];
	errcode = uc->uc_mcontext.gregs[REG_ERR];
	count++;
}

static void thrower(int signo, siginfo_t *info, void *context)
{
	keeper(signo, info, context);
	siglongjmp(out, 1);
}

static void handle_info(int signo, void (*handler)(int, siginfo_t *, void *), int flags)
{
	struct sigaction sa = { .sa_sigaction = handler, .sa_flags = flags | SA_SIGINFO };

	CHECK(sigaction(signo, &sa, NULL) == 0);
}

static void masks(void)
{
	sigset_t set, old, pending;

	handle(SIGUSR1, counter, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGKILL);
	CHECK(sigprocmask(SIG_BLOCK, &set, &old) == 0);
	CHECK(sigprocmask(SIG_BLOCK, NULL, &set) == 0);
	CHECK(sigismember(&set, SIGUSR1) && !sigismember(&set, SIGKILL));
	count = 0;
	raise(SIGUSR1);
	raise(SIGUSR1);
	kill(getpid(), SIGUSR1);
	CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1) && count == 0);
	CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
	CHECK(count == 2); /* one for the thread, one for the process */
	FAILS(sigprocmask(77, &set, NULL), EINVAL);
	FAILS(sigaction(SIGKILL, &(struct sigaction){ .sa_handler = counter }, NULL), EINVAL);
	FAILS(sigaction(65, NULL, NULL), EINVAL);
}

static void realtime(void)
{
	sigset_t set, old;
	int i;

	sigemptyset(&set);
	for (i = 0; i < 3; i++) {
		handle(SIGRTMIN + i, counter, 0);
		sigaddset(&set, SIGRTMIN + i);
	}
	CHECK(sigprocmask(SIG_BLOCK, &set, &old) == 0);
	for (i = 2; i >= 0; i--) {
		CHECK(sigqueue(getpid(), SIGRTMIN + i, (union sigval){ .sival_int = 1 }) == 0);
		CHECK(sigqueue(getpid(), SIGRTMIN + i, (union sigval){ .sival_int = 2 }) == 0);
	}
	for (i = 0; i < 6; i++) {
		siginfo_t info;

		CHECK(sigwaitinfo(&set, &info) == SIGRTMIN + i / 2);
		CHECK(info.si_value.sival_int == 1 + i % 2 && info.si_code == SI_QUEUE && info.si_pid == getpid());
	}
	count = 0;
	kill(getpid(), SIGRTMIN + 1);
	kill(getpid(), SIGRTMIN);
	CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
	/* frames are stacked lowest first, so the highest runs first */
	CHECK(count == 2 && order[0] == SIGRTMIN + 1 && order[1] == SIGRTMIN);
}

static void waiting(void)
{
	struct timespec soon = { 0, 20000000 }, never = { 0, -1 };
	sigset_t set;
	pid_t pid;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	FAILS(sigtimedwait(&set, NULL, &soon), EAGAIN);
	FAILS(sigtimedwait(&set, NULL, &never), EINVAL);
	pid = fork();
	if (pid == 0) {
		nap(20);
		kill(getppid(), SIGUSR2);
		_exit(0);
	}
	CHECK(sigwaitinfo(&set, &last) == SIGUSR2 && last.si_pid == pid && last.si_code == SI_USER);
	status_of(pid);
	handle(SIGUSR1, counter, 0);
	pid = fork();
	if (pid == 0) {
		nap(20);
		kill(getppid(), SIGUSR1);
		_exit(0);
	}
	FAILS(sigwaitinfo(&set, &last), EINTR);
	status_of(pid);
	CHECK(sigprocmask(SIG_UNBLOCK, &set, NULL) == 0);
}

static void suspend(void)
{
	sigset_t set, none, now;

	handle(SIGUSR1, counter, 0);
	sigemptyset(&none);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	count = 0;
	raise(SIGUSR1);
	FAILS(sigsuspend(&none), EINTR);
	CHECK(count == 1);
	CHECK(sigprocmask(SIG_BLOCK, NULL, &now) == 0 && sigismember(&now, SIGUSR1));
	CHECK(sigprocmask(SIG_UNBLOCK, &set, NULL) == 0);
}

static void poke_later(int milliseconds, int signo)
{
	if (fork() == 0) {
		nap(milliseconds);
		kill(getppid(), signo);
		nap(20);
		_exit(0);
	}
}

static void restarts(void)
{
	int fds[2], status;
	struct timespec t = { 0, 80000000 }, left = { 0, 0 };
	char c = 'x';
	pid_t writer;

	CHECK(pipe(fds) == 0);
	handle(SIGUSR1, counter, 0);
	poke_later(20, SIGUSR1);
	FAILS(read(fds[0], &c, 1), EINTR);
	wait(&status);
	handle(SIGUSR1, counter, SA_RESTART);
	writer = fork();
	if (writer == 0) {
		nap(20);
		kill(getppid(), SIGUSR1);
		nap(20);
		CHECK(write(fds[1], &c, 1) == 1);
		_exit(0);
	}
	count = 0;
	CHECK(read(fds[0], &c, 1) == 1 && count == 1);
	status_of(writer);
	/* never restarted, whatever SA_RESTART says */
	poke_later(20, SIGUSR1);
	FAILS(nanosleep(&t, &left), EINTR);
	CHECK(left.tv_nsec > 0 && left.tv_nsec < 80000000);
	wait(&status);
	poke_later(20, SIGUSR1);
	FAILS(pause(), EINTR);
	wait(&status);
	/* a stop without a handler: the sleep goes on */
	writer = fork();
	if (writer == 0) {
		struct timespec long_sleep = { 0, 60000000 };

		_exit(nanosleep(&long_sleep, NULL) == 0 ? 3 : 4);
	}
	nap(10);
	kill(writer, SIGSTOP);
	nap(10);
	kill(writer, SIGCONT);
	CHECK(WEXITSTATUS(status_of(writer)) == 3);
	close(fds[0]);
	close(fds[1]);
}

static void faults(void)
{
	char *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile int zero = 0;

	handle_info(SIGSEGV, thrower, 0);
	handle_info(SIGFPE, thrower, 0);
	handle_info(SIGILL, thrower, 0);
	handle_info(SIGTRAP, keeper, 0);
	if (sigsetjmp(out, 1) == 0) {
		*(volatile int *)0x1238 = 1;
		CHECK(0);
	}
	CHECK(last.si_signo == SIGSEGV && last.si_code == SEGV_MAPERR && last.si_addr == (void *)0x1238);
	CHECK(trapno == 14 && errcode == 6);
	if (sigsetjmp(out, 1) == 0) {
		*(volatile char *)page = 1;
		CHECK(0);
	}
	CHECK(last.si_code == SEGV_ACCERR && last.si_addr == page);
	if (sigsetjmp(out, 1) == 0) {
		zero = 5 / zero;
		CHECK(0);
	}
	CHECK(last.si_signo == SIGFPE && last.si_code == FPE_INTDIV && trapno == 0);
	if (sigsetjmp(out, 1) == 0) {
		__asm__ volatile("ud2");
		CHECK(0);
	}
	CHECK(last.si_signo == SIGILL && last.si_code == ILL_ILLOPN && trapno == 6);
	if (sigsetjmp(out, 1) == 0) {
		__asm__ volatile("hlt");
		CHECK(0);
	}
	CHECK(last.si_signo == SIGSEGV && last.si_code == SI_KERNEL && trapno == 13);
	count = 0;
	__asm__ volatile("int3");
	CHECK(count == 1 && last.si_signo == SIGTRAP && last.si_code == SI_KERNEL && trapno == 3);
	handle(SIGSEGV, SIG_DFL, 0);
	handle(SIGFPE, SIG_DFL, 0);
	munmap(page, 4096);
}

static void faults_kill(void)
{
	struct rlimit none = { 0, 0 };
	sigset_t set;
	int how;

	for (how = 0; how < 3; how++) {
		int status;
		pid_t pid = fork();

		if (pid == 0) {
			setrlimit(RLIMIT_CORE, &none);
			sigfillset(&set);
			if (how == 0)
				signal(SIGSEGV, SIG_IGN);
			else if (how == 1)
				sigprocmask(SIG_SETMASK, &set, NULL);
			*(volatile int *)8 = 1;
			_exit(0);
		}
		status = status_of(pid);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV && !WCOREDUMP(status));
	}
}

static void on_altstack(int signo)
{
	stack_t now;

	handler_sp = (uintptr_t)__builtin_frame_address(0);
	CHECK(sigaltstack(NULL, &now) == 0 && now.ss_flags == SS_ONSTACK);
	FAILS(sigaltstack(&(stack_t){ .ss_flags = SS_DISABLE }, NULL), EPERM);
	count++;
}

static void altstack(void)
{
	static char space[65536];
	stack_t stack = { .ss_sp = space, .ss_size = sizeof(space) }, old;

	CHECK(sigaltstack(&stack, &old) == 0 && old.ss_flags == SS_DISABLE);
	handle(SIGUSR1, on_altstack, SA_ONSTACK);
	count = 0;
	raise(SIGUSR1);
	CHECK(count == 1 && handler_sp > (uintptr_t)space && handler_sp < (uintptr_t)space + sizeof(space));
	FAILS(sigaltstack(&(stack_t){ .ss_sp = space, .ss_size = 100 }, NULL), ENOMEM);
	CHECK(sigaltstack(&(stack_t){ .ss_flags = SS_DISABLE }, NULL) == 0);
}

static long recurse(long depth)
{
	volatile char pad[4096];

	pad[0] = depth;
	return depth < 0 ? 0 : recurse(depth + 1) + pad[0];
}

static void stack_overflow(void)
{
	static char space[65536];
	pid_t pid = fork();

	if (pid == 0) {
		stack_t stack = { .ss_sp = space, .ss_size = sizeof(space) };

		sigaltstack(&stack, NULL);
		handle_info(SIGSEGV, thrower, SA_ONSTACK);
		if (sigsetjmp(out, 1) == 0)
			recurse(0);
		_exit(last.si_signo == SIGSEGV ? 9 : 1);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 9);
}

static void changer(int signo, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;

	uc->uc_mcontext.gregs[REG_RBX] = 0x1234;
	uc->uc_mcontext.gregs[REG_RIP] += 2;
	CHECK(uc->uc_mcontext.fpregs != NULL && ((uintptr_t)uc->uc_mcontext.fpregs & 63) == 0);
	CHECK((uc->uc_mcontext.gregs[REG_CSGSFS] & 0xffff) == 0x33);
	sigaddset(&uc->uc_sigmask, SIGUSR2);
}

static void context_changes(void)
{
	unsigned long rbx = 0;
	sigset_t now;

	handle_info(SIGILL, changer, 0);
	__asm__ volatile("ud2" : "+b"(rbx));
	CHECK(rbx == 0x1234);
	CHECK(sigprocmask(SIG_BLOCK, NULL, &now) == 0 && sigismember(&now, SIGUSR2));
	sigemptyset(&now);
	CHECK(sigprocmask(SIG_SETMASK, &now, NULL) == 0);
	handle(SIGILL, SIG_DFL, 0);
}

static void clobber(int signo)
{
	double x = 1.5;
	int i;

	for (i = 0; i < 10; i++)
		x = x * 1.25 + signo;
	__asm__ volatile("pxor %%xmm3, %%xmm3\n\tpxor %%xmm15, %%xmm15" ::: "xmm3", "xmm15");
	count += x > 0;
}

static void fpu(void)
{
	double a = 3.25, b = 0;
	unsigned int mxcsr = 0x1f80 | 0x6000, after = 0;

	handle(SIGUSR1, clobber, 0);
	count = 0;
	__asm__ volatile("ldmxcsr %2\n\t"
			 "movsd %3, %%xmm3\n\t"
			 "mov %4, %%edi\n\t"
			 "mov %5, %%esi\n\t"
			 "mov $62, %%eax\n\t"
			 "syscall\n\t"
			 "movsd %%xmm3, %0\n\t"
			 "stmxcsr %1"
			 : "=m"(b), "=m"(after)
			 : "m"(mxcsr), "m"(a), "r"(getpid()), "r"(SIGUSR1)
			 : "rax", "rdi", "rsi", "rcx", "r11", "xmm3", "memory");
	CHECK(count == 1 && b == 3.25 && (after & 0x6000) == 0x6000);
	after = 0x1f80;
	__asm__ volatile("ldmxcsr %0" ::"m"(after));
}

static void avx(void)
{
	float in[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, result[8] = { 0 };

	if (!__builtin_cpu_supports("avx"))
		return;
	count = 0;
	__asm__ volatile("vmovups %1, %%ymm9\n\t"
			 "mov %2, %%edi\n\t"
			 "mov %3, %%esi\n\t"
			 "mov $62, %%eax\n\t"
			 "syscall\n\t"
			 "vmovups %%ymm9, %0\n\t"
			 "vzeroupper"
			 : "=m"(result)
			 : "m"(in), "r"(getpid()), "r"(SIGUSR1)
			 : "rax", "rdi", "rsi", "rcx", "r11", "xmm9", "memory");
	CHECK(count == 1 && memcmp(in, result, sizeof(in)) == 0);
}

static void infos(void)
{
	struct itimerval soon = { .it_value = { 0, 5000 } };
	pid_t pid;

	handle_info(SIGUSR1, keeper, 0);
	count = 0;
	kill(getpid(), SIGUSR1);
	CHECK(last.si_code == SI_USER && last.si_pid == getpid() && last.si_uid == getuid());
	syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGUSR1);
	CHECK(last.si_code == SI_TKILL && last.si_pid == getpid());
	handle_info(SIGCHLD, keeper, 0);
	pid = fork();
	if (pid == 0)
		_exit(6);
	while (last.si_signo != SIGCHLD)
		nap(1);
	CHECK(last.si_code == CLD_EXITED && last.si_pid == pid && last.si_status == 6);
	status_of(pid);
	handle(SIGCHLD, SIG_DFL, 0);
	handle_info(SIGALRM, keeper, 0);
	CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
	while (last.si_signo != SIGALRM)
		nap(1);
	CHECK(last.si_code == SI_KERNEL);
	count = 0;
	handle_info(SIGUSR1, keeper, SA_RESETHAND);
	raise(SIGUSR1);
	CHECK(count == 1);
	CHECK(sigaction(SIGUSR1, NULL, &(struct sigaction){ 0 }) == 0);
	signal(SIGUSR1, SIG_IGN);
	CHECK(raise(SIGUSR1) == 0);
}

static volatile int depth, deepest;

static void nested(int signo)
{
	depth++;
	if (depth > deepest)
		deepest = depth;
	if (depth < 3)
		raise(signo);
	depth--;
}

static void nesting(void)
{
	handle(SIGUSR1, nested, SA_NODEFER);
	raise(SIGUSR1);
	CHECK(deepest == 3);
	deepest = depth = 0;
	handle(SIGUSR1, counter, 0);
}

int main(void)
{
	masks();
	realtime();
	waiting();
	suspend();
	restarts();
	faults();
	faults_kill();
	altstack();
	stack_overflow();
	context_changes();
	fpu();
	avx();
	infos();
	nesting();
	puts("ok");
	return 0;
}
