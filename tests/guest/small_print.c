/* What the man pages say in passing: which of two errors wins, what a child inherits. */
#include "proc_check.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>

static void mappings(void)
{
	int fd = memfd_create("file", 0);

	CHECK(fd >= 0 && ftruncate(fd, 4096) == 0);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_SHARED, 99, 0) == MAP_FAILED && errno == EBADF);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE | 1 << 9, fd, 0) == MAP_FAILED && errno == EOPNOTSUPP);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0) == MAP_FAILED && errno == EOPNOTSUPP);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE | MAP_NORESERVE, fd, 0) != MAP_FAILED);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED | 1 << 9, fd, 0) != MAP_FAILED);
	close(fd);
}

static void positions(void)
{
	char byte = 0;
	struct iovec v = { &byte, 1 };
	int ends[2], fd;

	CHECK(pipe(ends) == 0);
	FAILS(pread(ends[1], &byte, 1, 0), ESPIPE); /* before it is found not to be open for reading */
	FAILS(pwrite(ends[0], &byte, 1, 0), ESPIPE);
	FAILS(preadv(ends[1], &v, 1, 0), ESPIPE);
	FAILS(pwritev(ends[0], &v, 1, 0), ESPIPE);
	FAILS(preadv2(ends[1], &v, 1, -1, 0), EBADF);
	fd = open("/proc/self/exe", O_PATH);
	FAILS(pread(fd, &byte, 1, 0), EBADF);
	close(fd);
	close(ends[0]);
	close(ends[1]);
}

/* A child's default slack is what its parent's was. */
static void slack(void)
{
	pid_t child;

	CHECK(prctl(PR_SET_TIMERSLACK, 70000) == 0);
	child = fork();
	if (child == 0) {
		CHECK(prctl(PR_GET_TIMERSLACK) == 70000 && prctl(PR_SET_TIMERSLACK, 60000) == 0);
		CHECK(prctl(PR_SET_TIMERSLACK, 0) == 0 && prctl(PR_GET_TIMERSLACK) == 70000);
		_exit(0);
	}
	CHECK(status_of(child) == 0 && prctl(PR_SET_TIMERSLACK, 0) == 0 && prctl(PR_GET_TIMERSLACK) == 50000);
}

int main(void)
{
	mappings();
	positions();
	slack();
	puts("as the man pages say");
	return 0;
}
