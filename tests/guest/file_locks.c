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

int main(void)
{
	CHECK(close(mkstemp(name)) == 0);
	asked();
	CHECK(unlink(name) == 0);
	puts("locks are Linux's");
	return 0;
}
