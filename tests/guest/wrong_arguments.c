/* Several arguments are wrong at once: the errno is that of the one that Linux looks at first. */
#include "proc_check.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>

#define BAD ((void *)0x10)
#define NOBODY 0x3fffffff

static void signals(void)
{
	FAILS(kill(NOBODY, 99), ESRCH);
	FAILS(kill(getpid(), 99), EINVAL);
	FAILS(syscall(SYS_tkill, NOBODY, 99), ESRCH);
	FAILS(syscall(SYS_tkill, 0, 99), EINVAL);
	FAILS(syscall(SYS_tgkill, getpid(), NOBODY, 99), ESRCH);
	FAILS(syscall(SYS_tgkill, getpid(), getpid(), 99), EINVAL);
	FAILS(syscall(SYS_rt_sigqueueinfo, NOBODY, 99, BAD), EFAULT);
	FAILS(syscall(SYS_rt_tgsigqueueinfo, 0, 0, 99, BAD), EFAULT);
	FAILS(syscall(SYS_signalfd4, -1, BAD, 8, 99), EFAULT);
	FAILS(syscall(SYS_signalfd4, -1, BAD, 9, 99), EINVAL);
	FAILS(syscall(SYS_waitid, 99, 1, BAD, 0, NULL), EFAULT);
	FAILS(syscall(SYS_waitid, 99, 1, NULL, 0, NULL), EINVAL);
}

static void limits_and_clocks(void)
{
	FAILS(syscall(SYS_setrlimit, 99, BAD), EFAULT);
	FAILS(syscall(SYS_prlimit64, NOBODY, 99, BAD, NULL), EFAULT);
	FAILS(syscall(SYS_prlimit64, NOBODY, 99, NULL, NULL), ESRCH);
	FAILS(syscall(SYS_setitimer, 99, BAD, NULL), EFAULT);
	FAILS(syscall(SYS_timer_create, 99, BAD, BAD), EFAULT);
	FAILS(syscall(SYS_clock_settime, 99, BAD), EINVAL);
	FAILS(syscall(SYS_clock_adjtime, 99, BAD), EFAULT);
	FAILS(syscall(SYS_settimeofday, BAD, NULL), EFAULT);
	FAILS(syscall(SYS_sched_setparam, NOBODY, BAD), EFAULT);
	FAILS(syscall(SYS_sched_setparam, -1, BAD), EINVAL);
	FAILS(syscall(SYS_set_mempolicy, 99, BAD, 64), EINVAL);
}

static void files(void)
{
	int epoll = epoll_create1(0), event = eventfd(0, 0), pipes[2], null = open("/dev/null", O_RDWR);
	char byte;

	FAILS(truncate(BAD, -1), EINVAL);
	FAILS(mknod(BAD, 0170000, 0), EINVAL);
	FAILS(mknod(BAD, S_IFDIR, 0), EPERM);
	FAILS(openat(-5, "", O_RDONLY), ENOENT);
	FAILS(mkdirat(-5, "", 0), ENOENT);
	FAILS(rename("/nowhere/x", BAD), ENOENT);
	FAILS(syscall(SYS_renameat2, -5, BAD, -5, BAD, 99), EINVAL);
	FAILS(link("/nowhere/x", BAD), ENOENT);
	FAILS(syscall(SYS_utimensat, -5, BAD, BAD, 99), EFAULT);
	FAILS(syscall(SYS_memfd_create, BAD, 0xffffffffu), EINVAL);
	FAILS(readahead(null, 0, -1), EINVAL);
	CHECK(lseek(epoll, 5, SEEK_SET) == 0 && lseek(event, 5, SEEK_SET) == 0);
	CHECK(pipe(pipes) == 0);
	FAILS(lseek(pipes[0], 0, SEEK_SET), ESPIPE);
	FAILS(syscall(SYS_read, pipes[0], &byte, -1L), EFAULT);
	FAILS(syscall(SYS_write, pipes[1], &byte, -1L), EFAULT);
	FAILS(syscall(SYS_vmsplice, null, BAD, 1, 0), EFAULT);
	FAILS(syscall(SYS_preadv2, pipes[0], BAD, -1L, -1L, 0, 0xffff), EINVAL);
	FAILS(syscall(SYS_process_vm_readv, NOBODY, BAD, 1, NULL, 0, 0), EFAULT);
	close(epoll);
	close(event);
	close(null);
	close(pipes[0]);
	close(pipes[1]);
}

static void sockets(void)
{
	int null = open("/dev/null", O_RDWR), local = socket(AF_UNIX, SOCK_STREAM, 0), size = 4, value;

	FAILS(connect(null, BAD, -1), EINVAL);
	FAILS(connect(null, BAD, 8), EFAULT);
	FAILS(connect(-1, BAD, -1), EBADF);
	FAILS(sendto(-1, (void *)-1L, 1, 0, NULL, 0), EFAULT);
	FAILS(recvfrom(null, (void *)-1L, 1, 0, NULL, NULL), EFAULT);
	FAILS(sendmsg(-1, BAD, 0x80000000), EINVAL);
	FAILS(recvmsg(null, BAD, 0x80000000), EINVAL);
	FAILS(accept4(-1, NULL, NULL, 0xffff), EBADF);
	FAILS(accept4(null, NULL, NULL, 0xffff), EINVAL);
	FAILS(syscall(SYS_socketpair, 99, SOCK_STREAM, 0, BAD), EFAULT);
	FAILS(setsockopt(null, SOL_SOCKET, SO_DEBUG, &value, -1), ENOTSOCK);
	FAILS(setsockopt(local, 99, SO_DEBUG, BAD, 4), EOPNOTSUPP);
	FAILS(getsockopt(local, 99, SO_DEBUG, BAD, (void *)&size), EOPNOTSUPP);
	close(null);
	close(local);
}

static void system_v(void)
{
	int id = shmget(IPC_PRIVATE, 4096, 0600);

	FAILS(shmctl(NOBODY, IPC_SET, BAD), EFAULT);
	FAILS(msgctl(NOBODY, IPC_SET, BAD), EFAULT);
	FAILS(syscall(SYS_semctl, NOBODY, 0, IPC_SET, BAD), EFAULT);
	FAILS(syscall(SYS_msgsnd, -1, BAD, -1L, 0), EFAULT);
	CHECK(id >= 0 && shmctl(id, IPC_RMID, NULL) == 0);
	FAILS(shmat(id, NULL, 0) == (void *)-1 ? -1 : 0, EINVAL);
	id = msgget(IPC_PRIVATE, 0600);
	CHECK(id >= 0 && msgctl(id, IPC_RMID, NULL) == 0);
	FAILS(msgrcv(id, BAD, 1, 0, IPC_NOWAIT), EINVAL);
}

int main(void)
{
	signals();
	limits_and_clocks();
	files();
	sockets();
	system_v();
	puts("wrong arguments");
	return 0;
}
