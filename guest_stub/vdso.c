/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vDSO: clocks without a call, from the time-stamp counter and the parameters that the Sentry keeps in the page before
 * this image (kvmsentry/kernel/vdso.py). What it cannot answer it asks by the system call, which also makes the Sentry bring
 * the parameters up to date. Names and versions as in Linux's arch/x86/entry/vdso.
 */
#include <stdint.h>

struct timespec {
	int64_t sec, nsec;
};

enum base { SINCE_START, WALL, SINCE_BOOT };	/* a time namespace may have the first and the last apart */

/* Written by the Sentry: `sequence` is odd while it writes. */
struct vvar {
	uint32_t sequence;
	uint32_t usable;
	uint64_t tsc;		/* when the rest was true */
	uint64_t valid;		/* ticks from then on for which it is true enough */
	uint64_t multiplier;	/* ns = ticks * multiplier >> 32 */
	uint64_t base[3];	/* ns: monotonic, wall, since boot */
};

extern const volatile struct vvar vvar __attribute__((visibility("hidden")));

enum { REALTIME, MONOTONIC, RAW = 4, REALTIME_COARSE, MONOTONIC_COARSE, BOOTTIME, TAI = 11 };
enum { SYS_GETTIMEOFDAY = 96, SYS_TIME = 201, SYS_CLOCK_GETTIME = 228, SYS_CLOCK_GETRES = 229, SYS_GETCPU = 309 };
#define NS 1000000000ull

static inline long call(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

static inline uint64_t ticks(void)
{
	uint32_t low, high;

	/* The fence keeps the read from being done before what the program did before it. */
	__asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/* ns; -1: ask. */
static inline int64_t now(enum base which)
{
	uint32_t before;
	uint64_t since, base;

	do {
		before = __atomic_load_n(&vvar.sequence, __ATOMIC_ACQUIRE);
		if (before & 1 || !vvar.usable)
			return -1;
		since = ticks() - vvar.tsc;
		if ((int64_t)since < 0)
			since = 0;	/* another processor's counter may be some ticks behind */
		if (since > vvar.valid)
			return -1;
		since = (unsigned __int128)since * vvar.multiplier >> 32;
		base = vvar.base[which];
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
	} while (__atomic_load_n(&vvar.sequence, __ATOMIC_RELAXED) != before);
	return base + since;
}

long __vdso_clock_gettime(int clock, struct timespec *to)
{
	int64_t ns = -1;

	if (clock == REALTIME || clock == REALTIME_COARSE || clock == TAI)
		ns = now(WALL);
	else if (clock == MONOTONIC || clock == RAW || clock == MONOTONIC_COARSE)
		ns = now(SINCE_START);
	else if (clock == BOOTTIME)
		ns = now(SINCE_BOOT);
	if (ns < 0)
		return call(SYS_CLOCK_GETTIME, clock, (long)to, 0);
	to->sec = ns / NS;
	to->nsec = ns % NS;
	return 0;
}

long __vdso_gettimeofday(struct timespec *to, void *zone)
{
	int64_t ns = zone ? -1 : now(WALL);

	if (ns < 0 || !to)
		return call(SYS_GETTIMEOFDAY, (long)to, (long)zone, 0);
	to->sec = ns / NS;
	to->nsec = ns % NS / 1000;
	return 0;
}

long __vdso_time(int64_t *to)
{
	int64_t ns = now(WALL);

	if (ns < 0)
		return call(SYS_TIME, (long)to, 0, 0);
	if (to)
		*to = ns / NS;
	return ns / NS;
}

long __vdso_clock_getres(int clock, struct timespec *to)
{
	return call(SYS_CLOCK_GETRES, clock, (long)to, 0);
}

long __vdso_getcpu(uint32_t *cpu, uint32_t *node, void *unused)
{
	return call(SYS_GETCPU, (long)cpu, (long)node, (long)unused);
}

#define WEAK(name) long name() __attribute__((weak, alias("__vdso_" #name)))
WEAK(clock_gettime);
WEAK(gettimeofday);
WEAK(time);
WEAK(clock_getres);
WEAK(getcpu);
