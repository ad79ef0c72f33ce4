/* A program that steps through its own system calls, and one that returns from a signal to nowhere. */
#include "proc_check.h"
#include <ucontext.h>

#define TF 0x100UL

static volatile int traps;
static unsigned long seen[64];

static void on_trap(int signo, siginfo_t *info, void *context)
{
	ucontext_t *u = context;

	if (traps < 64)
		seen[traps] = u->uc_mcontext.gregs[REG_RIP];
	traps++;
}

static void steps(void)
{
	struct sigaction sa = { .sa_sigaction = on_trap, .sa_flags = SA_SIGINFO };
	unsigned long flags, r11;
	long pid, call;
	int inside = 0;

	CHECK(sigaction(SIGTRAP, &sa, NULL) == 0);
	asm volatile("lea 1f(%%rip), %[call]\n\t"
		     "pushfq\n\t"
		     "orq %[tf], (%%rsp)\n\t"
		     "popfq\n\t"
		     "nop\n\t"
		     "1: syscall\n\t"
		     "nop\n\t"
		     "nop\n\t"
		     "pushfq\n\t"
		     "pop %[flags]\n\t"
		     "mov %%r11, %[r11]\n\t"
		     "pushfq\n\t"
		     "andq %[untf], (%%rsp)\n\t"
		     "popfq"
		     : [flags] "=&r"(flags), [r11] "=&r"(r11), [call] "=&r"(call), "=a"(pid)
		     : [tf] "i"(TF), [untf] "i"(~TF), "a"(SYS_getpid)
		     : "rcx", "r11", "memory", "cc");
	CHECK(pid == getpid());
	CHECK((flags & TF) && (r11 & TF));
	/* each instruction traps; the call and the one behind it count as one or two, by processor */
	CHECK(traps >= 8 && traps <= 10);
	for (int i = 0; i < traps; i++) {
		unsigned long at = seen[i] - (unsigned long)call;

		CHECK(at + 16 < 64); /* nothing but the program's own instructions is ever seen */
		inside += at == 3;
	}
	CHECK(inside == 1); /* the trap behind the first nop after the call */
}

static volatile unsigned long wild, got, code;
static gregset_t whole;

static void on_segv(int signo, siginfo_t *info, void *context)
{
	ucontext_t *u = context;

	got = u->uc_mcontext.gregs[REG_RIP];
	code = info->si_code;
	memcpy(u->uc_mcontext.gregs, whole, sizeof(whole));
}

static void on_usr1(int signo, siginfo_t *info, void *context)
{
	ucontext_t *u = context;

	memcpy(whole, u->uc_mcontext.gregs, sizeof(whole));
	u->uc_mcontext.gregs[REG_RIP] = wild;
	u->uc_mcontext.gregs[REG_RCX] = wild;
}

static void nowhere(void)
{
	struct sigaction usr1 = { .sa_sigaction = on_usr1, .sa_flags = SA_SIGINFO };
	struct sigaction segv = { .sa_sigaction = on_segv, .sa_flags = SA_SIGINFO };

	CHECK(sigaction(SIGUSR1, &usr1, NULL) == 0 && sigaction(SIGSEGV, &segv, NULL) == 0);
	for (int bit = 47; bit < 64; bit++) {
		wild = 1UL << bit, got = 0;
		CHECK(raise(SIGUSR1) == 0);
		CHECK(got == wild);
	}
	wild = 0xffffffff81000000UL;
	CHECK(raise(SIGUSR1) == 0);
	CHECK(got == wild && code == 1);
}

int main(void)
{
	steps();
	nowhere();
	puts("stepped");
	return 0;
}
