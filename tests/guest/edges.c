/* Edges of single calls that other people's suites lean on: which errno comes first, what a refused call leaves behind. */
#include "proc_check.h"
#include <sched.h>

static void scheduling(void)
{
	unsigned long mask[16];
	struct timespec t;

	/* A negative pid is nobody's for the mask, and malformed for the rest. */
	FAILS(syscall(SYS_sched_getaffinity, -1, sizeof(mask), mask), ESRCH);
	mask[0] = 1;
	FAILS(syscall(SYS_sched_setaffinity, -1, sizeof(mask), mask), ESRCH);
	FAILS(syscall(SYS_sched_getaffinity, 0, 1, mask), EINVAL);
	FAILS(sched_getscheduler(-1), EINVAL);
	FAILS(sched_rr_get_interval(-1, &t), EINVAL);
}

int main(void)
{
	scheduling();
	puts("edges are Linux's");
	return 0;
}
