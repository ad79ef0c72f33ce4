/* pidfd_open(2), pidfd_send_signal(2), pidfd_getfd(2), clone3(2) with CLONE_PIDFD, waitid(2) with P_PIDFD; process_vm_readv(2). */
#include "proc_check.h"
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sys/uio.h>

#ifndef P_PIDFD
#define P_PIDFD 3
#endif

static int pidfd_open(pid_t pid, unsigned int flags)
{
	return syscall(SYS_pidfd_open, pid, flags);
}

static char secret[16] = "before";

int main(void)
{
	struct clone_args args = { .flags = CLONE_PIDFD, .exit_signal = SIGCHLD };
	struct pollfd poller;
	struct iovec local, remote;
	siginfo_t info;
	char buf[16] = "";
	int fd, got, fds[2];
	pid_t pid;

	pid = fork();
	if (pid == 0) {
		for (;;)
			pause();
	}
	fd = pidfd_open(pid, 0);
	CHECK(fd >= 0 && fcntl(fd, F_GETFD) == FD_CLOEXEC);
	poller = (struct pollfd){ .fd = fd, .events = POLLIN };
	CHECK(poll(&poller, 1, 0) == 0);
	CHECK(syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0) == 0);
	FAILS(syscall(SYS_pidfd_send_signal, fd, 100, NULL, 0), EINVAL);
	FAILS(syscall(SYS_pidfd_send_signal, 1, SIGTERM, NULL, 0), EBADF);
	CHECK(syscall(SYS_pidfd_send_signal, fd, SIGTERM, NULL, 0) == 0);
	CHECK(poll(&poller, 1, 5000) == 1 && poller.revents & POLLIN);
	CHECK(waitid(P_PIDFD, fd, &info, WEXITED) == 0 && info.si_pid == pid && info.si_status == SIGTERM);
	CHECK(info.si_code == CLD_KILLED);
	FAILS(syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0), ESRCH);
	close(fd);
	FAILS(pidfd_open(999999, 0), ESRCH);
	FAILS(pidfd_open(0, 0), EINVAL);
	FAILS(pidfd_open(getpid(), 1), EINVAL);

	CHECK(pipe(fds) == 0);
	args.pidfd = (uintptr_t)&fd;
	pid = syscall(SYS_clone3, &args, sizeof(args));
	CHECK(pid >= 0);
	if (pid == 0) {
		CHECK(dup2(fds[1], 77) == 77);
		strcpy(secret, "after");
		CHECK(write(fds[1], "x", 1) == 1);
		for (;;)
			pause();
	}
	CHECK(read(fds[0], buf, 1) == 1);
	got = syscall(SYS_pidfd_getfd, fd, 77, 0);
	CHECK(got >= 0 && write(got, "y", 1) == 1 && read(fds[0], buf, 1) == 1 && buf[0] == 'y');
	FAILS(syscall(SYS_pidfd_getfd, fd, 78, 0), EBADF);
	local = (struct iovec){ buf, sizeof(buf) };
	remote = (struct iovec){ secret, sizeof(secret) };
	CHECK(process_vm_readv(pid, &local, 1, &remote, 1, 0) == sizeof(buf) && !strcmp(buf, "after"));
	strcpy(buf, "written");
	CHECK(process_vm_writev(pid, &local, 1, &remote, 1, 0) == sizeof(buf));
	memset(buf, 0, sizeof(buf));
	CHECK(process_vm_readv(pid, &local, 1, &remote, 1, 0) == sizeof(buf) && !strcmp(buf, "written"));
	CHECK(!strcmp(secret, "before"));
	remote.iov_base = (void *)8;
	FAILS(process_vm_readv(pid, &local, 1, &remote, 1, 0), EFAULT);
	FAILS(process_vm_readv(999999, &local, 1, &remote, 1, 0), ESRCH);
	CHECK(syscall(SYS_kcmp, getpid(), pid, 0, fds[0], fds[0]) == 0);
	CHECK(syscall(SYS_kcmp, getpid(), pid, 1, 0, 0) > 0);
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(waitid(P_PIDFD, fd, &info, WEXITED) == 0 && info.si_status == SIGKILL);
	args = (struct clone_args){ .flags = CLONE_PIDFD | CLONE_THREAD, .exit_signal = SIGCHLD };
	FAILS(syscall(SYS_clone3, &args, sizeof(args)), EINVAL);
	FAILS(syscall(SYS_clone3, &args, 10), EINVAL);
	puts("ok");
	return 0;
}
