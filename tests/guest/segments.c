/* Selectors that name no descriptor are #GP, and nothing can lie where a descriptor table would be at address 0. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

static sigjmp_buf again;

static void handler(int signo, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;

	printf("signal %d code %d address %p trap %d\n", signo, info->si_code, info->si_addr,
	       (int)uc->uc_mcontext.gregs[REG_TRAPNO]);
	siglongjmp(again, 1);
}

int main(void)
{
	static const uint16_t selectors[] = { 0x07, 0x0f, 0x17, 0x1b, 0xff, 0xffff };
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
	volatile char *low;

	sigaction(SIGSEGV, &action, NULL);
	for (unsigned i = 0; i < sizeof(selectors) / sizeof(*selectors); i++) {
		struct { uint32_t offset; uint16_t selector; } __attribute__((packed)) target = { 0x10000, selectors[i] };

		printf("load %x: ", selectors[i]);
		fflush(stdout);
		if (!sigsetjmp(again, 1))
			asm volatile("mov %0, %%gs" : : "r"(selectors[i]));
		printf("jump to %x: ", selectors[i]);
		fflush(stdout);
		if (!sigsetjmp(again, 1))
			asm volatile("lcall *%0" : : "m"(target) : "memory");
	}
	low = mmap((void *)0x10000, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
	printf("lowest page: %d\n", low == (void *)0x10000);
	*low = 1;
	printf("below it: ");
	fflush(stdout);
	if (!sigsetjmp(again, 1))
		low[-8] = 1;
	printf("at null: ");
	fflush(stdout);
	if (!sigsetjmp(again, 1))
		*(volatile int *)(low - 0x10000 + 8) = 1;
	return 0;
}
