/* Flags of open files and the signals of O_ASYNC: fcntl(2), F_GETFL, F_SETSIG. */
#include "proc_check.h"
#include <fcntl.h>
#include <poll.h>
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

int main(void)
{
	large_files();
	signal_of_a_pipe();
	no_positions();
	puts("open files tell what Linux's tell");
	return 0;
}
