/* mincore(2): which pages are there, of memory that was touched, asked for, given back, shared and inherited. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 8

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static void show(const char *what, void *p)
{
	unsigned char vec[PAGES];

	if (mincore(p, PAGES * PAGE, vec)) {
		printf("%s: errno %d\n", what, errno);
		return;
	}
	printf("%s:", what);
	for (int i = 0; i < PAGES; i++)
		printf(" %d", vec[i] & 1);
	printf("\n");
	fflush(stdout);
}

static char *fresh(int flags)
{
	return mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
}

int main(void)
{
	char *p = fresh(MAP_PRIVATE), *q;
	unsigned char vec[PAGES];

	show("fresh", p);
	p[2 * PAGE] = 1;
	p[5 * PAGE + 123] = 2;
	show("two touched", p);
	mlock(p + PAGE, PAGE);
	show("one locked", p);
	munlock(p + PAGE, PAGE);
	show("and unlocked", p);
	madvise(p, PAGES * PAGE, MADV_DONTNEED);
	show("given back", p);
	printf("populate %d\n", madvise(p + 3 * PAGE, 2 * PAGE, MADV_POPULATE_READ));
	show("populated for reading", p);
	if (!fork()) {
		show("a child", p);
		_exit(0);
	}
	wait(NULL);
	mprotect(p, PAGES * PAGE, PROT_READ);
	show("read-only", p);
	mlock(p, PAGES * PAGE);
	show("locked read-only", p);
	show("MAP_POPULATE", fresh(MAP_PRIVATE | MAP_POPULATE));
	show("MAP_LOCKED", fresh(MAP_PRIVATE | MAP_LOCKED));
	q = fresh(MAP_SHARED);
	show("fresh and shared", q);
	q[4 * PAGE] = 1;
	show("one touched", q);
	mlock(q, 2 * PAGE);
	show("two locked", q);
	mlockall(MCL_FUTURE);
	show("mlockall", fresh(MAP_PRIVATE));
	munlockall();
	show("munlockall", fresh(MAP_PRIVATE));
	munmap(q + PAGE, PAGE);
	show("a hole", q);
	printf("%d", mincore(p + 1, PAGE, vec));
	printf(" %d", errno);
	printf(" %d", mincore(p, PAGE, NULL));
	printf(" %d", errno);
	printf(" %d\n", mincore(p, 0, NULL));
	return 0;
}
