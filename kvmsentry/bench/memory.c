// SPDX-License-Identifier: Apache-2.0
/* Memory: mappings that come and go, and the first touch of a page. */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/mman.h>

#define SMALL (64 << 10)
#define PAGES 1024	/* 4 MiB */

static void map_touch_unmap(long n)
{
	while (n--) {
		char *p = mmap(NULL, SMALL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		expect(p != MAP_FAILED);
		for (int i = 0; i < SMALL; i += 4096) {
			expect(p[i] == 0);
			p[i] = 1;
		}
		expect(munmap(p, SMALL) == 0);
	}
}

/* The mapping is made and removed within the figure: a thousandth of it. */
static void touch(long n)
{
	while (n--) {
		char *p = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		expect(p != MAP_FAILED);
		for (long i = 0; i < PAGES * 4096L; i += 4096) {
			expect(p[i] == 0);
			p[i] = 1;
		}
		expect(munmap(p, PAGES * 4096) == 0);
	}
}

static const struct row rows[] = {
	{ "mmap", map_touch_unmap },
	{ "touch", touch, .per = PAGES },
};

int main(int argc, char **argv)
{
	return run_rows(argc, argv, rows, sizeof(rows) / sizeof(rows[0]));
}
