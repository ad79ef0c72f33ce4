// SPDX-License-Identifier: Apache-2.0
/* Nothing but the processor: a generator of pseudo-random numbers, with an answer that is known. No system call within. */
#include "bench.h"

#define STEPS 10000000L
#define ANSWER 0xe591aa22a1553a81ul

static void generate(long n)
{
	while (n--) {
		unsigned long x = 1;

		for (long i = 0; i < STEPS; i++) {
			x = x * 6364136223846793005ul + 1442695040888963407ul;
			__asm__ volatile("" : "+r"(x));
		}
		expect(x == ANSWER);
	}
}

static const struct row rows[] = {
	{ "cpu", generate },
};

int main(int argc, char **argv)
{
	return run_rows(argc, argv, rows, sizeof(rows) / sizeof(rows[0]));
}
