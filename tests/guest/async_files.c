/* Flags of open files and the signals of O_ASYNC: fcntl(2), F_GETFL, F_SETSIG. */
#include "proc_check.h"
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define O_LARGEFILE_BIT 0100000 /* what O_LARGEFILE is to the kernel; the C library says 0 */

static volatile int told_fd, told_code, told_times;
static volatile long told_band;

static void told(int signo, siginfo_t *info, void *unused)
{
	told_fd = info->si_fd;
	told_band = info->si_band;
	told_code = info->si_code;
	told_times++;
}

/* Every open of a 64-bit program is for large files, and F_GETFL says so; what only names a place has no such flag. */
static void large_files(void)
{
	char name[] = "/tmp/asyncXXXXXX";
	int fd = mkstemp(name), ends[2];

	CHECK(fd >= 0 && fcntl(fd, F_GETFL) == (O_RDWR | O_LARGEFILE_BIT));
	close(fd);
	fd = open(name, O_RDONLY);
	CHECK(fcntl(fd, F_GETFL) == O_LARGEFILE_BIT);
	CHECK(fcntl(fd, F_SETFL, O_APPEND) == 0 && fcntl(fd, F_GETFL) == (O_APPEND | O_LARGEFILE_BIT));
	close(fd);
	fd = creat(name, 0600);
	CHECK(fcntl(fd, F_GETFL) == (O_WRONLY | O_LARGEFILE_BIT));
	close(fd);
	fd = open(name, O_PATH);
	CHECK(fcntl(fd, F_GETFL) == O_PATH);
	close(fd);
	CHECK(unlink(name) == 0 && mkfifo(name, 0600) == 0);
	fd = open(name, O_RDONLY | O_NONBLOCK);
	CHECK(fcntl(fd, F_GETFL) == (O_NONBLOCK | O_LARGEFILE_BIT));
	close(fd);
	CHECK(unlink(name) == 0);
	FAILS(open("/", O_RDONLY | O_DIRECTORY | 040000), EINVAL); /* O_DIRECT */
	CHECK(pipe(ends) == 0 && fcntl(ends[0], F_GETFL) == 0 && fcntl(ends[1], F_GETFL) == O_WRONLY);
	close(ends[0]);
	close(ends[1]);
}

/* The signal tells the descriptor O_ASYNC was set on, even when the owner and the signal are set on another later. */
static void signal_of_a_pipe(void)
{
	struct sigaction sa = { .sa_sigaction = told, .sa_flags = SA_SIGINFO };
	int ends[2], copy;

	CHECK(sigaction(SIGUSR1, &sa, NULL) == 0 && pipe(ends) == 0);
	CHECK(fcntl(ends[0], F_SETFL, O_ASYNC) == 0);
	copy = dup(ends[0]);
	CHECK(fcntl(copy, F_SETOWN, getpid()) == 0 && fcntl(copy, F_SETSIG, SIGUSR1) == 0);
	CHECK(fcntl(copy, F_SETFL, O_ASYNC) == 0);
	CHECK(write(ends[1], "x", 1) == 1);
	CHECK(told_times == 1 && told_fd == ends[0] && told_code == POLL_IN && told_band == (POLLIN | 0x40));
	close(ends[0]);
	CHECK(write(ends[1], "x", 1) == 1);
	CHECK(told_times == 2 && told_fd == ends[0]);
	close(copy);
	close(ends[1]);
}

/* There are no positions in a pipe, whichever end it is. */
static void no_positions(void)
{
	struct iovec iov;
	char byte = 0;
	int ends[2];

	iov.iov_base = &byte;
	iov.iov_len = 1;
	CHECK(pipe(ends) == 0);
	FAILS(pread(ends[0], &byte, 1, 0), ESPIPE);
	FAILS(pread(ends[1], &byte, 1, 0), ESPIPE);
	FAILS(pwrite(ends[0], &byte, 1, 0), ESPIPE);
	FAILS(pwrite(ends[1], &byte, 1, 0), ESPIPE);
	FAILS(preadv(ends[1], &iov, 1, 0), ESPIPE);
	FAILS(pwritev(ends[0], &iov, 1, 0), ESPIPE);
}

/* Nothing lies beyond the largest position, and a vector is looked at where it is empty too. */
static void far_positions(void)
{
	char name[] = "/tmp/asyncXXXXXX", bytes[16] = "";
	struct iovec iov[2] = { { (void *)-1L, 0 }, { bytes, 8 } };
	int fd = mkstemp(name);

	CHECK(fd >= 0 && write(fd, bytes, 8) == 8);
	FAILS(lseek(fd, INT64_MAX, SEEK_END), EINVAL);
	FAILS(pread(fd, bytes, 8, INT64_MAX), EINVAL);
	FAILS(pwrite(fd, bytes, 8, INT64_MAX), EINVAL);
	CHECK(lseek(fd, 0, SEEK_SET) == 0);
	FAILS(readv(fd, iov, 2), EFAULT);
	CHECK(unlink(name) == 0 && close(fd) == 0);
}

/* What comes from a noexec mount doesn't become executable later either. */
static void never_executable(void)
{
	char name[] = "/tmp/asyncXXXXXX";
	char *at;
	int fd;

	if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_PRIVATE | MS_REC, NULL) != 0)
		return;
	CHECK(mkdtemp(name));
	if (mount(NULL, name, "tmpfs", MS_NOEXEC, NULL) == 0 && chdir(name) == 0) {
		fd = open("file", O_CREAT | O_RDWR, 0600);
		CHECK(ftruncate(fd, 4096) == 0);
		FAILS((long)mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0), EPERM);
		at = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
		CHECK(at != MAP_FAILED);
		FAILS(mprotect(at, 4096, PROT_READ | PROT_EXEC), EACCES);
		CHECK(mprotect(at, 4096, PROT_READ | PROT_WRITE) == 0 && munmap(at, 4096) == 0);
		at = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
		FAILS(mprotect(at, 4096, PROT_EXEC), EACCES);
		CHECK(mprotect(at, 4096, PROT_READ | PROT_WRITE) == 0 && munmap(at, 4096) == 0);
		close(fd);
		CHECK(chdir("/") == 0 && umount(name) == 0);
	}
	CHECK(rmdir(name) == 0);
}

int main(void)
{
	large_files();
	signal_of_a_pipe();
	no_positions();
	far_positions();
	never_executable();
	puts("open files tell what Linux's tell");
	return 0;
}
