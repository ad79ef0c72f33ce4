/* A file and its shared mapping: when its times move, and what becomes of bytes stored behind its end. */
#include "proc_check.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

enum { PAGE = 4096, SIZE = 1000 };

static int fd;
static char *map;

static int empty_file(void)
{
	char path[] = "/tmp/mapped_filesXXXXXX";
	int file = mkstemp(path);

	CHECK(file >= 0 && unlink(path) == 0);
	return file;
}

static struct stat now(void)
{
	struct stat st;

	CHECK(fstat(fd, &st) == 0);
	return st;
}

static int later(struct timespec a, struct timespec b)
{
	return a.tv_sec > b.tv_sec || (a.tv_sec == b.tv_sec && a.tv_nsec > b.tv_nsec);
}

static void times(void)
{
	struct stat before, after;

	fd = empty_file();
	CHECK(ftruncate(fd, SIZE) == 0);
	before = now();
	nap(30);
	map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(map != MAP_FAILED);
	after = now();
	CHECK(later(after.st_atim, before.st_atim)); /* mapping it reads it */
	CHECK(!later(after.st_mtim, before.st_mtim));
	nap(30);
	map[0] = 'a';
	CHECK(msync(map, PAGE, MS_SYNC) == 0);
	after = now();
	CHECK(later(after.st_mtim, before.st_mtim) && later(after.st_ctim, before.st_ctim));
	munmap(map, PAGE);
	before = now();
	nap(30);
	map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(map != MAP_FAILED && msync(map, PAGE, MS_SYNC) == 0 && map[0] == 'a');
	after = now();
	CHECK(!later(after.st_mtim, before.st_mtim)); /* nobody could have stored through this one */
	munmap(map, PAGE);
	close(fd);
}

/* What is stored behind the end is not the file's, and gone once the page was written out. */
static void behind_the_end(void)
{
	char byte = 1;

	fd = empty_file();
	CHECK(ftruncate(fd, SIZE) == 0);
	map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(map != MAP_FAILED);
	map[SIZE - 1] = 'i';
	map[SIZE + 100] = 'o';
	CHECK(msync(map, PAGE, MS_SYNC) == 0 && map[SIZE - 1] == 'i' && map[SIZE + 100] == 0);
	CHECK(ftruncate(fd, 2 * SIZE) == 0);
	CHECK(pread(fd, &byte, 1, SIZE - 1) == 1 && byte == 'i');
	CHECK(pread(fd, &byte, 1, SIZE + 100) == 1 && byte == 0);
	munmap(map, PAGE);
	close(fd);
}

static void lengths(void)
{
	fd = empty_file();
	/* Longer than any address space comes before further than any file. */
	CHECK(mmap(NULL, -PAGE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == ENOMEM);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0x7ffffffffffff000) == MAP_FAILED && errno == EOVERFLOW);
	close(fd);
}

int main(void)
{
	struct statfs where;

	CHECK(statfs("/tmp", &where) == 0);
	if (where.f_type == 0x01021994) { /* Linux's tmpfs keeps none of this */
		puts("/tmp is a tmpfs");
		return 4;
	}
	times();
	behind_the_end();
	lengths();
	puts("as Linux keeps them");
	return 0;
}
