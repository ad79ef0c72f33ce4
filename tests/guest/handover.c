/*
 * Threads that hand the processor to each other: a token goes round groups of threads by futex, thousands of times, while
 * signals hit them, others compute, start, end and fork. Every thread finds the registers, the vector state, the
 * thread-local variables and the credentials of its own after each wait.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { GROUPS = 3, MOST = 4, ROUNDS = 1500 };

struct state {
	uint64_t general[6];	/* rbx rbp r12 r13 r14 r15 */
	uint64_t vector[32];	/* xmm0-15 */
	uint32_t mxcsr, pad;
};

/*
 * The system call `nr` with general and vector registers from *in; what they are afterwards goes to *out. rdi rsi rdx are
 * the call's first three arguments, r10 r8 r9 are 0.
 */
long call_with(long nr, long a, long b, long c, const struct state *in, struct state *out);
__asm__(".globl call_with\n"
	"call_with:\n"
	"	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"	push %r9\n"		/* out */
	"	mov %rdi, %rax\n"
	"	mov %rsi, %rdi\n"
	"	mov %rdx, %rsi\n"
	"	mov %rcx, %rdx\n"
	"	mov 0(%r8), %rbx; mov 8(%r8), %rbp; mov 16(%r8), %r12\n"
	"	mov 24(%r8), %r13; mov 32(%r8), %r14; mov 40(%r8), %r15\n"
	"	.set i, 0\n"
	"	.irp x,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	movdqu (48 + 16 * i)(%r8), %xmm\\x\n"
	"	.set i, i + 1\n"
	"	.endr\n"
	"	ldmxcsr 304(%r8)\n"
	"	xor %r10d, %r10d; xor %r8d, %r8d; xor %r9d, %r9d\n"
	"	syscall\n"
	"	pop %r9\n"
	"	mov %rbx, 0(%r9); mov %rbp, 8(%r9); mov %r12, 16(%r9)\n"
	"	mov %r13, 24(%r9); mov %r14, 32(%r9); mov %r15, 40(%r9)\n"
	"	.set i, 0\n"
	"	.irp x,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	movdqu %xmm\\x, (48 + 16 * i)(%r9)\n"
	"	.set i, i + 1\n"
	"	.endr\n"
	"	stmxcsr 304(%r9)\n"
	"	pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"	ret\n");

struct group {
	_Atomic int turn;
	int members;
};

struct member {
	struct group *group;
	int index, number;
	pthread_t thread;
};

static struct group groups[GROUPS];
static struct member members[GROUPS * MOST];
static _Atomic int wrong, over;
static _Atomic long handled;
static __thread int mine;
static pthread_mutex_t joining = PTHREAD_MUTEX_INITIALIZER;	/* a thread that was joined gets no signals */

static void count(int signal)
{
	double x = signal;

	/* a handler that uses vector registers itself */
	__asm__ volatile("pcmpeqd %%xmm3, %%xmm3\n\taddsd %0, %0" : "+x"(x) : : "xmm3");
	atomic_fetch_add(&handled, 1);
}

static void fill(struct state *s, uint64_t seed)
{
	uint64_t *word = (uint64_t *)s;

	for (int i = 0; i < 38; i++)
		word[i] = seed * 0x9e3779b97f4a7c15u + i * 0x100000001b3u;
	s->mxcsr = 0x1f80 | (seed & 3) << 13;	/* rounding */
	s->pad = 0;
}

static void check(const struct member *m, const struct state *want, const struct state *got, long round)
{
	if (memcmp(want, got, 48 + 256) || (got->mxcsr & 0x6000) != (want->mxcsr & 0x6000) || mine != m->number) {
		if (!atomic_fetch_add(&wrong, 1))
			printf("member %d, round %ld: the registers are not its own\n", m->number, round);
	}
}

static void *run(void *arg)
{
	struct member *m = arg;
	struct group *g = m->group;
	struct state want, got;

	mine = m->number;
	for (long round = 0; round < ROUNDS; round++) {
		fill(&want, m->number * 1000003ul + round);
		for (;;) {
			int turn = atomic_load(&g->turn);

			if (turn == m->index)
				break;
			got.pad = 0;
			long rc = call_with(SYS_futex, (long)&g->turn, FUTEX_WAIT_PRIVATE, turn, &want, &got);
			if (rc != 0 && rc != -EAGAIN && rc != -EINTR)
				atomic_fetch_add(&wrong, 1);
			check(m, &want, &got, round);
		}
		atomic_store(&g->turn, (m->index + 1) % g->members);
		call_with(SYS_futex, (long)&g->turn, FUTEX_WAKE_PRIVATE, MOST, &want, &got);
		check(m, &want, &got, round);
	}
	return NULL;
}

static void *nothing(void *arg)
{
	return arg;
}

/* Signals to all, threads that start and end, processes that fork, until the others are done. */
static void *disturb(void *arg)
{
	unsigned seed = 1;
	struct timespec nap = { 0, 300000 };

	while (!atomic_load(&over)) {
		struct member *m = &members[rand_r(&seed) % (GROUPS * MOST)];
		pthread_t thread;

		pthread_mutex_lock(&joining);
		if (m->group)
			pthread_kill(m->thread, SIGUSR1);
		pthread_mutex_unlock(&joining);
		if (rand_r(&seed) % 8 == 0 && !pthread_create(&thread, NULL, nothing, NULL))
			pthread_join(thread, NULL);
		if (rand_r(&seed) % 64 == 0) {
			pid_t child = fork();

			if (child == 0)
				_exit(0);
			waitpid(child, NULL, 0);
		}
		nanosleep(&nap, NULL);
	}
	return arg;
}

int main(void)
{
	struct sigaction action = { .sa_handler = count };
	pthread_t disturber;
	int n = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGUSR1, &action, NULL);
	for (int i = 0; i < GROUPS; i++)
		groups[i].members = 2 + i;
	for (int i = 0; i < GROUPS; i++) {
		for (int j = 0; j < groups[i].members; j++, n++) {
			members[n] = (struct member){ &groups[i], j, n + 1, 0 };
			pthread_create(&members[n].thread, NULL, run, &members[n]);
		}
	}
	pthread_create(&disturber, NULL, disturb, NULL);
	for (int k = 0; k < n;) {
		struct timespec nap = { 0, 1000000 };
		int running;

		pthread_mutex_lock(&joining);
		running = pthread_tryjoin_np(members[k].thread, NULL);
		if (!running)
			members[k++].group = NULL;
		pthread_mutex_unlock(&joining);
		if (running)
			nanosleep(&nap, NULL);
	}
	atomic_store(&over, 1);
	pthread_join(disturber, NULL);
	printf("signals came: %s\n", atomic_load(&handled) ? "yes" : "no");
	printf("%d wrong\n", atomic_load(&wrong));
	return atomic_load(&wrong) != 0;
}
