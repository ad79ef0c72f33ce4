/* Which events inotify(7) tells of, when and in which order; and directories that are read into too little memory. */
#include "proc_check.h"
#include <dirent.h>
#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>

static int queue;

/* The next events must be these, as "watch descriptor, mask" pairs, and no more. */
static void told(int n, const uint32_t *wanted, int line)
{
	char buffer[4096] __attribute__((aligned(8)));
	ssize_t length = read(queue, buffer, sizeof(buffer)), at = 0;
	int i = 0;

	if (length < 0)
		length = 0;
	for (; at < length; i++) {
		struct inotify_event *event = (void *)(buffer + at);

		at += sizeof(*event) + event->len;
		if (i < n && (uint32_t)event->wd == wanted[2 * i] && event->mask == wanted[2 * i + 1])
			continue;
		fprintf(stderr, "line %d: event %d is %d:%#x\n", line, i, event->wd, event->mask);
		exit(1);
	}
	if (i != n) {
		fprintf(stderr, "line %d: %d events, not %d\n", line, i, n);
		exit(1);
	}
}

#define TOLD(...)                                                                        \
	do {                                                                             \
		const uint32_t wanted[] = { __VA_ARGS__ };                               \
		told(sizeof(wanted) / sizeof(*wanted) / 2, wanted, __LINE__);            \
	} while (0)

static void touch(const char *name)
{
	int fd = open(name, O_CREAT | O_RDWR, 0700);

	CHECK(fd >= 0);
	close(fd);
}

/* What is open has lost its name but is not gone: IN_DELETE_SELF comes with the last close. */
static void last_names(void)
{
	int fd, file, directory, self = IN_ATTRIB | IN_DELETE_SELF;

	touch("file");
	file = inotify_add_watch(queue, "file", self);
	CHECK(unlink("file") == 0);
	TOLD(file, IN_ATTRIB, file, IN_DELETE_SELF, file, IN_IGNORED);

	touch("file");
	CHECK(link("file", "other") == 0);
	file = inotify_add_watch(queue, "file", self);
	fd = open("file", O_RDONLY);
	CHECK(unlink("other") == 0 && unlink("file") == 0);
	TOLD(file, IN_ATTRIB); /* twice the same is once */
	close(fd);
	TOLD(file, IN_DELETE_SELF, file, IN_IGNORED);

	touch("file");
	touch("other");
	file = inotify_add_watch(queue, "other", self);
	CHECK(rename("file", "other") == 0);
	TOLD(file, IN_ATTRIB, file, IN_DELETE_SELF, file, IN_IGNORED);
	CHECK(unlink("other") == 0);

	CHECK(mkdir("directory", 0700) == 0);
	directory = inotify_add_watch(queue, "directory", IN_DELETE_SELF);
	CHECK(rmdir("directory") == 0);
	TOLD(directory, IN_DELETE_SELF, directory, IN_IGNORED);

	CHECK(mkdir("directory", 0700) == 0);
	directory = inotify_add_watch(queue, "directory", IN_DELETE_SELF);
	fd = open("directory", O_RDONLY);
	CHECK(rmdir("directory") == 0);
	TOLD();
	close(fd);
	TOLD(directory, IN_DELETE_SELF, directory, IN_IGNORED);
}

static void uses(void)
{
	struct timespec times[2] = { { 5, 0 }, { 0, UTIME_OMIT } };
	char entries[1024];
	int fd, wd;

	touch("file");
	wd = inotify_add_watch(queue, "file", IN_ALL_EVENTS);
	CHECK(utimensat(AT_FDCWD, "file", times, 0) == 0);
	TOLD(wd, IN_ACCESS);
	times[1] = times[0];
	CHECK(utimensat(AT_FDCWD, "file", times, 0) == 0);
	TOLD(wd, IN_ATTRIB);
	times[0].tv_nsec = UTIME_OMIT;
	CHECK(utimensat(AT_FDCWD, "file", times, 0) == 0);
	TOLD(wd, IN_MODIFY);
	CHECK(inotify_rm_watch(queue, wd) == 0 && unlink("file") == 0);
	TOLD(wd, IN_IGNORED);

	CHECK(symlink("/bin/true", "program") == 0);
	wd = inotify_add_watch(queue, "program", IN_OPEN | IN_ACCESS | IN_CLOSE);
	if (fork() == 0) {
		execl("program", "program", NULL);
		_exit(1);
	}
	CHECK(wait(NULL) > 0);
	CHECK(read(queue, entries, 32) == 32);
	CHECK(((struct inotify_event *)entries)->mask == IN_OPEN && ((struct inotify_event *)entries + 1)->mask == IN_ACCESS);
	while (read(queue, entries, sizeof(entries)) > 0)
		;
	CHECK(inotify_rm_watch(queue, wd) == 0 && unlink("program") == 0);
	TOLD(wd, IN_IGNORED);

	CHECK(mkdir("directory", 0700) == 0);
	wd = inotify_add_watch(queue, "directory", IN_ACCESS);
	fd = open("directory", O_RDONLY);
	CHECK(syscall(SYS_getdents64, fd, entries, sizeof(entries)) > 0);
	TOLD(wd, IN_ACCESS | IN_ISDIR);
	CHECK(rmdir("directory") == 0);
	FAILS(syscall(SYS_getdents64, fd, entries, sizeof(entries)), ENOENT);
	close(fd);
	TOLD(wd, IN_IGNORED);
}

static void short_memory(void)
{
	char *pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char name[64];
	int fd, i, n, found = 0;

	CHECK(pages != MAP_FAILED && munmap(pages + 4096, 4096) == 0);
	CHECK(mkdir("many", 0700) == 0 && chdir("many") == 0);
	for (i = 0; i < 100; i++) {
		snprintf(name, sizeof(name), "a name of some length %d", i);
		touch(name);
	}
	fd = open(".", O_RDONLY);
	FAILS(syscall(SYS_getdents64, fd, pages, 0x80000000u), EINVAL);
	FAILS(syscall(SYS_getdents64, fd, pages, 0xffffffffu), EINVAL);
	FAILS(syscall(SYS_getdents64, fd, pages + 4096, 4096), EFAULT);
	while ((n = syscall(SYS_getdents64, fd, pages + 3000, 4096)) > 0) {
		CHECK(n <= 1096);
		for (i = 0; i < n; found++)
			i += *(unsigned short *)(pages + 3000 + i + 16);
	}
	CHECK(n == 0 && found == 102);
	for (i = 0; i < 100; i++) {
		snprintf(name, sizeof(name), "a name of some length %d", i);
		CHECK(unlink(name) == 0);
	}
	CHECK(chdir("..") == 0 && rmdir("many") == 0);
}

int main(void)
{
	char name[] = "/tmp/watchesXXXXXX";

	queue = inotify_init1(IN_NONBLOCK);
	CHECK(queue >= 0 && mkdtemp(name) && chdir(name) == 0);
	last_names();
	uses();
	short_memory();
	CHECK(chdir("/") == 0 && rmdir(name) == 0);
	puts("watches tell what Linux's tell");
	return 0;
}
