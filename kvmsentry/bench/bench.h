/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the benchmark's programs share. Each is run as
 *
 *	PROGRAM BUDGET_MS SCRATCH_DIRECTORY [NAME...]
 *
 * and prints a line of JSON a figure, {"name": "getpid", "ns": median, "min": ns, "max": ns, "calls": n}, as soon as it has
 * it: what was measured before a hang is not lost. A figure is checked while it is taken: a call that answers wrongly ends
 * its row with {"name": ..., "error": ...}, and the program with status 1. No names: all.
 */
#ifndef KVMSENTRY_BENCH_H
#define KVMSENTRY_BENCH_H

#include <errno.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SLICES 5	/* at least; more until the budget is spent, should they turn out short */
#define MOST_SLICES 255

struct row {
	const char *name;
	void (*run)(long n);	/* n times; fails through expect() */
	int (*set_up)(void);	/* may be NULL */
	void (*tear_down)(void);
	long per;		/* units a run: pages, messages; 1 when 0 */
};

static const char *scratch;
static jmp_buf failed;
static char failure[256];

#define expect(condition) \
	do { \
		if (!(condition)) { \
			snprintf(failure, sizeof(failure), "line %d: %s: %s", __LINE__, #condition, strerror(errno)); \
			longjmp(failed, 1); \
		} \
	} while (0)

static inline double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static inline double timed(void (*run)(long), long n)
{
	double begin = now_ns();

	run(n);
	return now_ns() - begin;
}

static inline int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* Slices that together take about `budget` ns; the first runs, which find out how many fit, are not counted. */
static inline int measure(const struct row *row, double budget)
{
	double took, again, slices[MOST_SLICES], spent = 0;
	long n = 1, per = row->per ? row->per : 1;
	int count = 0;

	errno = 0;
	if (setjmp(failed)) {
		for (char *c = failure; *c; c++)
			if (*c == '"' || *c == '\\')
				*c = '\'';
		printf("{\"name\": \"%s\", \"error\": \"%s\"}\n", row->name, failure);
		fflush(stdout);
		return 1;
	}
	if (row->set_up)
		expect(row->set_up() == 0);
	for (;;) {
		took = timed(row->run, n);
		/* Twice, lest something else that had the processor passes for a slow call. */
		if (took * SLICES >= budget / 2) {
			again = timed(row->run, n);
			took = again < took ? again : took;
			if (took * SLICES >= budget / 2)
				break;
		}
		n *= took * SLICES * 16 < budget ? 8 : 2;
	}
	while (count < SLICES || (count < MOST_SLICES && spent < budget)) {
		took = timed(row->run, n);
		spent += took;
		slices[count++] = took / n / per;
	}
	if (row->tear_down)
		row->tear_down();
	qsort(slices, count, sizeof(*slices), by_value);
	printf("{\"name\": \"%s\", \"ns\": %.2f, \"min\": %.2f, \"max\": %.2f, \"calls\": %ld}\n", row->name,
	       slices[count / 2], slices[0], slices[count - 1], n * count);
	fflush(stdout);
	return 0;
}

static inline int run_rows(int argc, char **argv, const struct row *rows, int count)
{
	int bad = 0;

	if (argc < 3) {
		fprintf(stderr, "usage: %s BUDGET_MS SCRATCH_DIRECTORY [NAME...]\n", argv[0]);
		return 2;
	}
	scratch = argv[2];
	for (int i = 0; i < count; i++) {
		int wanted = argc == 3;

		for (int j = 3; j < argc; j++)
			wanted |= !strcmp(argv[j], rows[i].name);
		if (wanted)
			bad |= measure(&rows[i], atof(argv[1]) * 1e6);
	}
	return bad;
}

#endif
