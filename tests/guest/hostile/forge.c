/*
 * Threads that hand a token round, while another writes what it likes into their channels with the Sentry (kvmsentry/vcpu/
 * README.md): states, commands, targets, all the rest. They may crash or hang; nobody else may. forge SEED SECONDS
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { THREADS = 3 };
static const uint64_t CHANNELS = 0xffffff0000010000ul;
static _Atomic int turn;

static void *hand_on(void *arg)
{
	int me = (long)arg, now;

	for (;;) {
		while ((now = atomic_load(&turn)) != me)
			syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, now, NULL, NULL, 0);
		atomic_store(&turn, (me + 1) % THREADS);
		syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, THREADS, NULL, NULL, 0);
	}
	return NULL;
}

static void end_thread(int signal)
{
	syscall(SYS_exit, signal);
}

int main(int argc, char **argv)
{
	unsigned seed = argc > 1 ? atoi(argv[1]) : 1, wild = seed % 2;
	pthread_t thread;

	for (int fatal = SIGILL; fatal <= SIGSEGV; fatal++)
		if (fatal != SIGKILL)
			signal(fatal, end_thread);
	for (long i = 0; i < THREADS; i++)
		pthread_create(&thread, NULL, hand_on, (void *)i);
	usleep(20000);
	for (;;) {
		volatile uint32_t *channel = (volatile uint32_t *)(CHANNELS + 4096 * (rand_r(&seed) % (THREADS + 1)));
		unsigned pause = rand_r(&seed) % 100000;

		switch (rand_r(&seed) % (wild ? 4 : 3)) {
		case 0:
			channel[0] = rand_r(&seed) % 5;		/* state */
			break;
		case 1:
			channel[1] = rand_r(&seed) % 5;		/* command */
			break;
		case 2:
			*(volatile uint64_t *)(channel + 12) = CHANNELS + 4096 * (rand_r(&seed) % (THREADS + 2));
			break;
		default:
			channel[rand_r(&seed) % 1024] = rand_r(&seed);
		}
		while (pause--)
			__asm__ volatile("");
	}
}
