/* The clocks agree with one another, through libc (the vDSO, where there is one) and through the system call, and never go back. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t ns(const struct timespec *t) { return t->tv_sec * 1000000000ll + t->tv_nsec; }

static int64_t by_libc(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return ns(&t);
}

static int64_t by_call(clockid_t clock)
{
	struct timespec t;

	syscall(SYS_clock_gettime, clock, &t);
	return ns(&t);
}

static volatile int64_t latest;
static int backwards;

/* Each thread reads a time that another has published, then the clock: it must not be earlier. */
static void *race(void *unused)
{
	for (int i = 0; i < 20000; i++) {
		int64_t seen = latest, now = by_libc(CLOCK_MONOTONIC);

		if (now < seen)
			__atomic_add_fetch(&backwards, 1, __ATOMIC_SEQ_CST);
		if (now > latest)
			latest = now;
	}
	return unused;
}

int main(void)
{
	static const clockid_t clocks[] = { CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_RAW };
	int bad = 0;

	for (int round = 0; round < 30; round++) {
		for (int i = 0; i < 3; i++) {	/* RAW is its own clock on Linux: only that it goes on is looked at */
			int64_t a = by_libc(clocks[i]), b = by_call(clocks[i]), c = by_libc(clocks[i]);

			/* a <= b <= c, to within the coarseness of comparing two sources */
			bad += a > b + 20000 || b > c + 20000;
		}
		usleep(20000);
	}
	printf("libc and call disagree: %d\n", bad);

	int64_t before = by_libc(CLOCK_MONOTONIC);
	for (int i = 0; i < 100000; i++) {
		int64_t now = by_libc(CLOCK_MONOTONIC);

		if (now < before)
			backwards++;
		before = now;
	}
	pthread_t threads[3];
	for (int i = 0; i < 3; i++)
		pthread_create(&threads[i], NULL, race, NULL);
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	printf("went back: %d\n", backwards);

	struct timeval tv;
	gettimeofday(&tv, NULL);
	int64_t wall = by_libc(CLOCK_REALTIME);
	int64_t apart = wall - (tv.tv_sec * 1000000000ll + tv.tv_usec * 1000ll);
	printf("gettimeofday agrees: %d, time agrees: %d\n", apart >= 0 && apart < 50000000, wall / 1000000000 - time(NULL) <= 0);
	int64_t start = by_libc(CLOCK_MONOTONIC), start_wall = by_libc(CLOCK_REALTIME), raw = by_libc(CLOCK_MONOTONIC_RAW);
	usleep(300000);
	int64_t slept = by_libc(CLOCK_MONOTONIC) - start, slept_wall = by_libc(CLOCK_REALTIME) - start_wall;
	printf("slept: %d %d %d\n", slept >= 300000000, slept_wall >= 299000000, by_libc(CLOCK_MONOTONIC_RAW) - raw >= 299000000);
	return 0;
}
