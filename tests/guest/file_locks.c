/* Record locks as F_GETLK tells them, and who gives way to whom. */
#include "proc_check.h"
#include <fcntl.h>

static char name[] = "/tmp/locksXXXXXX";

/* Nobody in the way: only the type changes, l_start stays relative to where the caller meant it. */
static void asked(void)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_CUR, .l_start = -3, .l_len = -2, .l_pid = 77 };
	int fd = open(name, O_RDWR);
	pid_t pid;

	CHECK(ftruncate(fd, 20) == 0 && lseek(fd, 10, SEEK_SET) == 10);
	CHECK(fcntl(fd, F_GETLK, &lock) == 0);
	CHECK(lock.l_type == F_UNLCK && lock.l_whence == SEEK_CUR && lock.l_start == -3 && lock.l_len == -2);
	CHECK(lock.l_pid == 77);
	lock.l_type = F_WRLCK;
	CHECK(fcntl(fd, F_SETLK, &lock) == 0); /* bytes 5 and 6 */
	pid = fork();
	if (pid == 0) {
		struct flock seen = { .l_type = F_RDLCK, .l_whence = SEEK_END, .l_start = -14 };

		CHECK(fcntl(fd, F_GETLK, &seen) == 0);
		CHECK(seen.l_type == F_WRLCK && seen.l_whence == SEEK_SET && seen.l_start == 5 && seen.l_len == 2);
		CHECK(seen.l_pid == getppid());
		seen = (struct flock){ .l_type = F_RDLCK, .l_whence = SEEK_END, .l_start = -13 };
		CHECK(fcntl(fd, F_GETLK, &seen) == 0);
		CHECK(seen.l_type == F_UNLCK && seen.l_whence == SEEK_END && seen.l_start == -13 && seen.l_len == 0);
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
	close(fd);
}

static volatile sig_atomic_t told, told_fd;

static void on_break(int signo, siginfo_t *info, void *context)
{
	told++;
	told_fd = info->si_fd;
}

/* A child that opens (or truncates) the file at once; its wait status is 0 when that worked. */
static pid_t breaker(int flags)
{
	pid_t pid = fork();

	if (pid)
		return pid;
	if (flags == -1)
		_exit(truncate(name, 0) != 0);
	_exit(open(name, flags) < 0 ? errno : 0);
}

static void hear(void)
{
	int i;

	for (i = 0; i < 2000 && !told; i++)
		nap(10);
	CHECK(told == 1);
	told = 0;
}

static void leases(void)
{
	struct sigaction action = { .sa_sigaction = on_break, .sa_flags = SA_SIGINFO | SA_RESTART };
	int fd = open(name, O_RDONLY), writer, status;
	pid_t pid;

	FAILS(fcntl(fd, F_SETLEASE, 7), EINVAL);
	FAILS(fcntl(fd, F_SETLEASE, F_UNLCK), EAGAIN);
	CHECK(fcntl(fd, F_GETLEASE) == F_UNLCK);
	writer = open("/dev/null", O_RDONLY);
	FAILS(fcntl(writer, F_SETLEASE, F_RDLCK), EINVAL);
	close(writer);
	writer = open(name, O_WRONLY);
	FAILS(fcntl(fd, F_SETLEASE, F_RDLCK), EAGAIN); /* somebody writes, and be it we */
	FAILS(fcntl(fd, F_SETLEASE, F_WRLCK), EAGAIN);
	close(writer);
	if (fcntl(fd, F_SETLEASE, F_WRLCK) == -1) {
		CHECK(errno == EAGAIN || errno == EINVAL); /* a file system that has none, or shares its files with another */
		close(fd);
		puts("no leases");
		return;
	}
	CHECK(fcntl(fd, F_GETLEASE) == F_WRLCK && fcntl(fd, F_GETOWN) == getpid());
	CHECK(sigaction(SIGIO, &action, NULL) == 0 && sigaction(SIGRTMIN, &action, NULL) == 0);

	/* Who does not want to wait is refused, and the holder is told all the same. */
	FAILS(open(name, O_RDONLY | O_NONBLOCK), EWOULDBLOCK);
	hear();
	CHECK(fcntl(fd, F_GETLEASE) == F_RDLCK); /* what it is asked to become */
	FAILS(open(name, O_WRONLY | O_NONBLOCK), EWOULDBLOCK);
	hear();
	CHECK(fcntl(fd, F_GETLEASE) == F_UNLCK);
	CHECK(fcntl(fd, F_SETLEASE, F_UNLCK) == 0);

	/* A reader is content with a read lease. */
	CHECK(fcntl(fd, F_SETSIG, SIGRTMIN) == 0 && fcntl(fd, F_SETLEASE, F_WRLCK) == 0);
	pid = breaker(O_RDONLY);
	hear();
	CHECK(told_fd == fd);
	nap(50);
	CHECK(waitpid(pid, &status, WNOHANG) == 0);
	CHECK(fcntl(fd, F_SETLEASE, F_RDLCK) == 0 && fcntl(fd, F_GETLEASE) == F_RDLCK);
	CHECK(status_of(pid) == 0);
	pid = breaker(O_RDONLY);
	CHECK(status_of(pid) == 0 && !told);

	/* A writer is not; two may hold read leases, none a write lease beside one. */
	writer = open(name, O_RDONLY);
	CHECK(fcntl(writer, F_SETLEASE, F_RDLCK) == 0);
	FAILS(fcntl(fd, F_SETLEASE, F_WRLCK), EAGAIN);
	CHECK(fcntl(writer, F_SETLEASE, F_UNLCK) == 0 && close(writer) == 0);
	pid = breaker(O_RDWR);
	hear();
	FAILS(fcntl(fd, F_SETLEASE, F_RDLCK), EAGAIN);
	CHECK(fcntl(fd, F_SETLEASE, F_UNLCK) == 0);
	CHECK(status_of(pid) == 0);

	/* Closing gives way too. */
	CHECK(fcntl(fd, F_SETSIG, 0) == 0 && fcntl(fd, F_SETLEASE, F_RDLCK) == 0);
	pid = breaker(-1);
	hear();
	close(fd);
	CHECK(status_of(pid) == 0);
	puts("leases");
}

int main(void)
{
	CHECK(close(mkstemp(name)) == 0);
	asked();
	leases();
	CHECK(unlink(name) == 0);
	puts("locks are Linux's");
	return 0;
}
