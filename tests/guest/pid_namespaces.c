/* PID namespaces, pid_namespaces(7): numbers on both sides of the border, an init's privileges and its end, setns(2),
 * unshare(2). */
#include "proc_check.h"

#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define NS_GET_USERNS 0xb701
#define NS_GET_PARENT 0xb702
#define NS_GET_NSTYPE 0xb703

static pid_t spawn(unsigned long flags)
{
	return syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
}

static int ended(pid_t pid)
{
	int status;

	pid_t found = waitpid(pid, &status, 0);

	CHECK(found > 0 && (pid < 0 || found == pid));
	return status;
}

static volatile siginfo_t last;
static volatile int caught;

static void on_signal(int signo, siginfo_t *info, void *context)
{
	memcpy((void *)&last, info, sizeof last);
	caught++;
}

static void catch(int signo)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };

	CHECK(!sigaction(signo, &action, 0));
}

static void field(const char *path, const char *name, char *value)
{
	char line[256];
	FILE *file = fopen(path, "r");

	CHECK(file);
	while (fgets(line, sizeof line, file))
		if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':') {
			strcpy(value, line + strlen(name) + 1);
			fclose(file);
			return;
		}
	CHECK(!"field");
}

static int count_numbers(const char *text)
{
	int count = 0, in = 0;

	for (; *text; text++) {
		int digit = *text >= '0' && *text <= '9';

		count += digit && !in;
		in = digit;
	}
	return count;
}

static void numbers(void)
{
	int up[2], down[2], pair[2];
	struct ucred creds;
	socklen_t size = sizeof creds;
	char value[256], path[64];
	pid_t pid, told;

	CHECK(!pipe(up) && !pipe(down));
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	pid = spawn(CLONE_NEWPID);
	CHECK(pid >= 0);
	if (!pid) {
		pid_t child, grandchild;

		CHECK(getpid() == 1 && syscall(SYS_gettid) == 1 && getppid() == 0);
		CHECK(getpgrp() == 0 && getsid(0) == 0); /* both are led from outside */
		CHECK(!kill(1, 0) && !kill(getpid(), 0));
		FAILS(kill(2, 0), ESRCH);
		child = fork();
		if (!child) {
			CHECK(getpid() == 2 && getppid() == 1);
			_exit(7);
		}
		CHECK(child == 2 && ended(2) == 7 << 8);
		child = fork();
		CHECK(child == 0 || child == 3);
		if (!child) {
			CHECK(setsid() == 3 && getsid(0) == 3 && getpgid(0) == 3 && getpgrp() == 3);
			_exit(0);
		}
		CHECK(ended(-1) == 0);
		child = fork();
		if (!child)
			pause();
		CHECK(child == 4);
		CHECK(!setpgid(4, 4) && getpgid(4) == 4 && getpgid(1) == 0);
		CHECK(!kill(-4, SIGKILL) && ended(4) == SIGKILL);
		/* A namespace within the namespace. */
		grandchild = spawn(CLONE_NEWPID);
		if (!grandchild) {
			CHECK(getpid() == 1 && getppid() == 0);
			CHECK(write(up[1], "n", 1) == 1);
			pause();
		}
		CHECK(grandchild == 5);
		CHECK(read(down[0], value, 1) == 1);
		CHECK(!kill(5, SIGKILL) && ended(5) == SIGKILL); /* from above it dies */
		CHECK(recv(pair[1], value, 1, 0) == 1);
		_exit(0);
	}
	CHECK(read(up[0], value, 1) == 1);
	/* The tree seen from outside: the child's number here has a second one, the grandchild's a third. */
	snprintf(path, sizeof path, "/proc/%d/status", pid);
	field(path, "NSpid", value);
	CHECK(strtol(value, 0, 10) == pid && count_numbers(value) == 2 && strstr(value, "\t1\n"));
	field(path, "PPid", value);
	CHECK(strtol(value, 0, 10) == getpid());
	snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, pid);
	FILE *file = fopen(path, "r");
	CHECK(file && fscanf(file, "%d", &told) == 1);
	fclose(file);
	snprintf(path, sizeof path, "/proc/%d/status", told);
	field(path, "NSpid", value);
	CHECK(strtol(value, 0, 10) == told && count_numbers(value) == 3 && strstr(value, "\t5\t1\n"));
	CHECK(write(down[1], "x", 1) == 1);
	CHECK(!getsockopt(pair[0], SOL_SOCKET, SO_PEERCRED, &creds, &size) && creds.pid == getpid());
	CHECK(send(pair[0], "x", 1, 0) == 1);
	CHECK(ended(pid) == 0);
	close(up[0]), close(up[1]), close(down[0]), close(down[1]), close(pair[0]), close(pair[1]);
	puts("numbers");
}

static void credentials(void)
{
	int pair[2], on = 1;
	char control[CMSG_SPACE(sizeof(struct ucred))], byte;
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	struct ucred creds;
	pid_t pid;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
	CHECK(!setsockopt(pair[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
	pid = spawn(CLONE_NEWPID);
	if (!pid) {
		CHECK(write(pair[1], "a", 1) == 1);
		CHECK(recvmsg(pair[1], &msg, 0) == 1);
		memcpy(&creds, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof creds);
		CHECK(creds.pid == 0); /* somebody outside */
		_exit(0);
	}
	CHECK(recvmsg(pair[0], &msg, 0) == 1);
	memcpy(&creds, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof creds);
	CHECK(creds.pid == pid);
	CHECK(write(pair[0], "b", 1) == 1);
	CHECK(ended(pid) == 0);
	close(pair[0]), close(pair[1]);
	puts("credentials");
}

static void signals_of_init(void)
{
	int pipes[2];
	char byte;
	pid_t pid;

	CHECK(!pipe(pipes));
	pid = spawn(CLONE_NEWPID);
	if (!pid) {
		pid_t child;

		catch(SIGUSR1);
		child = fork();
		if (!child) {
			CHECK(!kill(1, SIGKILL) && !kill(1, SIGTERM) && !kill(1, SIGSTOP)); /* ignored: no handlers */
			CHECK(!kill(1, SIGUSR1));
			_exit(0);
		}
		while (!caught)
			nap(1);
		CHECK(last.si_pid == child && last.si_code == SI_USER);
		CHECK(ended(child) == 0);
		caught = 0;
		CHECK(write(pipes[1], "x", 1) == 1);
		while (!caught)
			nap(1);
		CHECK(last.si_pid == 0 && last.si_code == SI_USER); /* from above */
		CHECK(write(pipes[1], "x", 1) == 1);
		for (;;)
			pause();
	}
	CHECK(read(pipes[0], &byte, 1) == 1);
	CHECK(!kill(pid, SIGTERM)); /* also from above: no handler, no effect */
	CHECK(!kill(pid, SIGUSR1));
	CHECK(read(pipes[0], &byte, 1) == 1);
	CHECK(!kill(pid, SIGKILL));
	CHECK(ended(pid) == SIGKILL);
	close(pipes[0]), close(pipes[1]);
	puts("signals of init");
}

static void end_of_init(void)
{
	int pipes[2];
	char byte;
	pid_t pid;

	CHECK(!pipe(pipes));
	pid = spawn(CLONE_NEWPID);
	if (!pid) {
		/* An orphan comes to init, whoever is a subreaper above. */
		pid_t child = fork();

		if (!child) {
			if (!fork()) {
				while (getppid() != 1)
					nap(1);
				_exit(3);
			}
			_exit(0);
		}
		int first = ended(-1), second = ended(-1);

		CHECK(first + second == 3 << 8);
		for (int i = 0; i < 3; i++)
			if (!fork()) {
				signal(SIGTERM, SIG_IGN);
				if (!fork())
					pause();
				pause();
			}
		nap(20);
		_exit(5); /* and they all die before anybody is told */
	}
	close(pipes[1]);
	CHECK(ended(pid) == 5 << 8);
	CHECK(read(pipes[0], &byte, 1) == 0); /* the last holder is gone already */
	close(pipes[0]);
	puts("end of init");
}

static void unshared(void)
{
	pid_t pid = fork();

	if (!pid) {
		int first, other;
		struct stat mine, childrens;

		CHECK(!unshare(CLONE_NEWPID));
		pid_t self = getpid();

		CHECK(syscall(SYS_getpid) == self); /* it stays where it is */
		FAILS(open("/proc/self/ns/pid_for_children", O_RDONLY), ENOENT); /* until there is an init */
		FAILS(unshare(CLONE_NEWPID), EINVAL);
		FAILS(syscall(SYS_clone, CLONE_VM | CLONE_SIGHAND | CLONE_THREAD, 0, 0, 0, 0), EINVAL);
		first = fork();
		if (!first) {
			CHECK(getpid() == 1);
			pause();
		}
		CHECK(!stat("/proc/self/ns/pid", &mine) && !stat("/proc/self/ns/pid_for_children", &childrens));
		CHECK(mine.st_ino != childrens.st_ino);
		other = fork();
		if (!other) {
			CHECK(getpid() == 2 && getppid() == 0);
			_exit(0);
		}
		CHECK(ended(other) == 0);
		CHECK(!kill(first, SIGKILL) && ended(first) == SIGKILL);
		FAILS(fork(), ENOMEM); /* the namespace is closed */
		_exit(0);
	}
	CHECK(ended(pid) == 0);
	puts("unshare");
}

static void entered(void)
{
	char path[64], text[64];
	int fd, parent, pipes[2];
	pid_t pid, child;
	struct stat mine, theirs;

	CHECK(!pipe(pipes));
	pid = spawn(CLONE_NEWPID | CLONE_NEWUTS);
	if (!pid) {
		CHECK(!sethostname("inner", 5));
		CHECK(write(pipes[1], "x", 1) == 1);
		pause();
	}
	CHECK(read(pipes[0], text, 1) == 1);
	snprintf(path, sizeof path, "/proc/%d/ns/pid", pid);
	fd = open(path, O_RDONLY);
	CHECK(fd >= 0);
	CHECK(ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWPID);
	parent = ioctl(fd, NS_GET_PARENT);
	CHECK(parent >= 0);
	CHECK(!stat("/proc/self/ns/pid", &mine) && !fstat(parent, &theirs) && mine.st_ino == theirs.st_ino);
	close(parent);
	parent = ioctl(fd, NS_GET_USERNS);
	CHECK(parent >= 0 && ioctl(parent, NS_GET_NSTYPE) == CLONE_NEWUSER);
	CHECK(!stat("/proc/self/ns/user", &mine) && !fstat(parent, &theirs) && mine.st_ino == theirs.st_ino);
	close(parent);
	child = fork();
	if (!child) {
		int grandchild;

		FAILS(setns(fd, CLONE_NEWUTS), EINVAL);
		FAILS(setns(0, 0), EINVAL);
		CHECK(!setns(fd, CLONE_NEWPID));
		grandchild = fork();
		if (!grandchild) {
			CHECK(getpid() == 2 && getppid() == 0 && !kill(1, 0));
			_exit(9);
		}
		CHECK(grandchild > 2 && ended(grandchild) == 9 << 8);
		_exit(0);
	}
	CHECK(ended(child) == 0);
	/* By pidfd, several at once. */
	int pidfd = syscall(SYS_pidfd_open, pid, 0);

	CHECK(pidfd >= 0);
	child = fork();
	if (!child) {
		FAILS(setns(pidfd, 0), EINVAL);
		CHECK(!setns(pidfd, CLONE_NEWPID | CLONE_NEWUTS));
		CHECK(!gethostname(text, sizeof text) && !strcmp(text, "inner"));
		child = fork();
		if (!child)
			_exit(getpid() == 3 ? 0 : 1);
		CHECK(ended(child) == 0);
		_exit(0);
	}
	CHECK(ended(child) == 0);
	CHECK(!kill(pid, SIGKILL) && ended(pid) == SIGKILL);
	FAILS(setns(pidfd, CLONE_NEWPID), ESRCH);
	close(fd), close(pidfd), close(pipes[0]), close(pipes[1]);
	puts("setns");
}

static void chosen(void)
{
	pid_t wanted[3] = { 1, 0, 0 };
	struct clone_args args = { .flags = CLONE_NEWPID, .exit_signal = SIGCHLD,
				   .set_tid = (uintptr_t)wanted, .set_tid_size = 1 };
	pid_t pid = syscall(SYS_clone3, &args, sizeof args);

	CHECK(pid >= 0);
	if (!pid) {
		CHECK(getpid() == 1);
		args.flags = 0;
		wanted[0] = 4242;
		pid = syscall(SYS_clone3, &args, sizeof args);
		if (!pid)
			_exit(getpid() == 4242 ? 0 : 1);
		CHECK(pid == 4242 && ended(pid) == 0);
		wanted[0] = 1;
		FAILS(syscall(SYS_clone3, &args, sizeof args), EEXIST);
		_exit(0);
	}
	CHECK(ended(pid) == 0);
	wanted[0] = 5;
	args.flags = CLONE_NEWPID;
	FAILS(syscall(SYS_clone3, &args, sizeof args), EINVAL); /* the first must be 1 */
	puts("set_tid");
}

/* The number that the namespace counts on from (Documentation/admin-guide/sysctl/kernel.rst, ns_last_pid). */
static void counted(void)
{
	pid_t pid = spawn(CLONE_NEWPID);
	char text[16] = "";
	int fd;

	CHECK(pid >= 0);
	if (!pid) {
		fd = open("/proc/sys/kernel/ns_last_pid", O_RDWR);
		if (fd < 0 && errno == ENOENT)
			_exit(0); /* a host without CONFIG_CHECKPOINT_RESTORE */
		CHECK(fd >= 0);
		CHECK(read(fd, text, sizeof text) == 2 && !strcmp(text, "1\n"));
		CHECK(pwrite(fd, "500", 3, 0) == 3);
		pid = fork();
		if (!pid)
			_exit(0);
		CHECK(pid == 501 && ended(pid) == 0);
		FAILS(pwrite(fd, "5000000", 7, 0), EINVAL);
		FAILS(pwrite(fd, "-1", 2, 0), EINVAL);
		CHECK(!setuid(65534));
		FAILS(pwrite(fd, "600", 3, 0), EPERM);
		_exit(0);
	}
	CHECK(ended(pid) == 0);
}

static void mounted(void)
{
	pid_t pid = spawn(CLONE_NEWPID | CLONE_NEWNS);

	if (!pid) {
		char text[64], value[256];
		ssize_t n;
		int child;

		CHECK(!mount("none", "/", 0, MS_REC | MS_PRIVATE, 0));
		CHECK(!mount("proc", "/proc", "proc", 0, 0));
		n = readlink("/proc/self", text, sizeof text);
		CHECK(n == 1 && text[0] == '1');
		n = readlink("/proc/thread-self", text, sizeof text);
		CHECK(n == 8 && !memcmp(text, "1/task/1", 8));
		child = fork();
		if (!child)
			pause();
		CHECK(!access("/proc/1", F_OK) && !access("/proc/2/task/2/status", F_OK));
		FAILS(access("/proc/3", F_OK), ENOENT);
		field("/proc/2/status", "PPid", value);
		CHECK(!strcmp(value, "\t1\n"));
		field("/proc/2/status", "NSpid", value);
		CHECK(!strcmp(value, "\t2\n"));
		field("/proc/1/status", "NSsid", value);
		CHECK(!strcmp(value, "\t0\n"));
		_exit(0);
	}
	CHECK(ended(pid) == 0);
	puts("proc");
}

/* reboot(2) ends the namespace, and its parent is told how. */
static void rebooted(void)
{
	static const struct {
		int command, signal;
	} all[] = { { RB_AUTOBOOT, SIGHUP }, { RB_HALT_SYSTEM, SIGINT }, { RB_POWER_OFF, SIGINT } };

	for (int i = 0; i < 6; i++) {
		int status;
		pid_t pid = spawn(CLONE_NEWUSER | CLONE_NEWPID), child;

		if (pid == -1) {
			printf("no user namespaces here\n");
			return;
		}
		if (!pid) {
			if (getpid() != 1)	/* never the machine */
				_exit(1);
			FAILS(reboot(0x12345), EINVAL);
			child = i < 3 ? 0 : fork();
			if (!child)
				_exit(reboot(all[i % 3].command) ? 2 : 3);
			pause();
			_exit(4);
		}
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == all[i % 3].signal);
	}
}

int main(void)
{
	setvbuf(stdout, 0, _IONBF, 0);
	pid_t pid = spawn(CLONE_NEWPID | CLONE_NEWNS);

	if (pid == -1) {
		printf("no PID namespaces here: %s\n", strerror(errno));
		return 4;
	}
	if (!pid)
		_exit(0);
	CHECK(ended(pid) == 0);
	numbers();
	credentials();
	signals_of_init();
	end_of_init();
	unshared();
	entered();
	chosen();
	counted();
	mounted();
	rebooted();
	return 0;
}
