/* Calls that move or make so much memory that they are done in pieces: the result is that of one piece. */
#include "proc_check.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define MB (1UL << 20)

static char *memory(size_t n, int flags)
{
	char *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

static int resident(char *p, size_t n)
{
	unsigned char *vec = malloc(n / 4096);
	size_t count = 0;

	CHECK(mincore(p, n, vec) == 0);
	for (size_t i = 0; i < n / 4096; i++)
		count += vec[i] & 1;
	free(vec);
	return count == n / 4096;
}

int main(void)
{
	size_t n = 21 * MB + 123;
	char *a = memory(n, 0), *b = memory(n, 0), *p;
	int fd = memfd_create("long", 0);
	struct iovec here = { b, n }, there = { a, n };
	struct rlimit lock;
	struct stat st;

	for (size_t i = 0; i < n; i++)
		a[i] = i * 2654435761U >> 24;
	CHECK(write(fd, a, n) == (ssize_t)n);
	CHECK(lseek(fd, 0, SEEK_CUR) == (off_t)n && fstat(fd, &st) == 0 && st.st_size == (off_t)n);
	CHECK(pread(fd, b, n, 0) == (ssize_t)n && memcmp(a, b, n) == 0);
	memset(b, 0, n);
	CHECK(lseek(fd, 100, SEEK_SET) == 100 && read(fd, b, n) == (ssize_t)n - 100 && memcmp(a + 100, b, n - 100) == 0);
	CHECK(pwrite(fd, a, n, 50) == (ssize_t)n && pread(fd, b, n, 50) == (ssize_t)n && memcmp(a, b, n) == 0);
	memset(b, 0, n);
	CHECK(process_vm_readv(getpid(), &here, 1, &there, 1, 0) == (ssize_t)n && memcmp(a, b, n) == 0);
	memset(b, 0, n);
	CHECK(getrandom(b, 5 * MB, 0) == 5 * MB);
	CHECK(memcmp(b, b + MB, MB) && memcmp(b + 4 * MB, a, MB) && b[n - 1] == 0);
	for (int i = 0; i < 2; i++) {
		int device = open(i ? "/dev/urandom" : "/dev/zero", O_RDONLY);

		CHECK(read(device, b, 9 * MB) == 9 * MB && (i || !memcmp(b, b + MB, 8 * MB)));
		CHECK(pread(device, b, 9 * MB, 5) == 9 * MB);
		close(device);
	}
	/* a bad page in the middle: what is before it counts */
	CHECK(mprotect(b + 12 * MB, 4096, PROT_NONE) == 0);
	CHECK(munmap(b + (12 * MB), 4096) == 0);
	CHECK(pread(fd, b, n, 50) == 12 * MB);
	CHECK(ftruncate(fd, 0) == 0);
	CHECK(fallocate(fd, 0, 0, 70 * MB) == 0);
	CHECK(fstat(fd, &st) == 0 && st.st_size == 70 * MB && st.st_blocks == 70 * MB / 512);
	CHECK(pwrite(fd, "x", 1, 69 * MB) == 1);
	CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, MB, 60 * MB) == 0);
	CHECK(fstat(fd, &st) == 0 && st.st_blocks == 10 * MB / 512);
	CHECK(pread(fd, b, 1, 69 * MB) == 1 && b[0] == 'x');
	CHECK(fallocate(fd, FALLOC_FL_KEEP_SIZE, 70 * MB, 40 * MB) == 0);
	CHECK(fstat(fd, &st) == 0 && st.st_size == 70 * MB && st.st_blocks == 50 * MB / 512);
	close(fd);
	p = memory(50 * MB, MAP_POPULATE);
	CHECK(resident(p, 50 * MB) && p[49 * MB] == 0);
	munmap(p, 50 * MB);
	p = memory(50 * MB, 0);
	CHECK(madvise(p, 50 * MB, 23 /* MADV_POPULATE_WRITE */) == 0 && resident(p, 50 * MB));
	CHECK(mprotect(p, 4096, PROT_READ) == 0);
	FAILS(madvise(p, 50 * MB, 23), EINVAL);
	munmap(p, 50 * MB);
	if (getrlimit(RLIMIT_MEMLOCK, &lock) == 0 && (lock.rlim_cur >= 50 * MB || geteuid() == 0)) {
		p = memory(50 * MB, 0);
		CHECK(mlock(p, 50 * MB) == 0 && resident(p, 50 * MB));
		CHECK(munlock(p, 50 * MB) == 0);
		munmap(p, 50 * MB);
	}
	puts("long calls");
	return 0;
}
