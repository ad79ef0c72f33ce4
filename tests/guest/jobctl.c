/* Sessions, process groups, stops and continues, orphaned groups, a controlling terminal where /dev/ptmx is there. */
#include "proc_check.h"
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <termios.h>

static volatile int stops, continues, last_code;

static void on_chld(int signo, siginfo_t *info, void *context)
{
	last_code = info->si_code;
	if (info->si_code == CLD_STOPPED)
		stops++;
	if (info->si_code == CLD_CONTINUED)
		continues++;
}

static void stops_and_continues(void)
{
	struct sigaction sa = { .sa_sigaction = on_chld, .sa_flags = SA_SIGINFO | SA_RESTART };
	siginfo_t info;
	int status;
	pid_t pid;

	CHECK(sigaction(SIGCHLD, &sa, NULL) == 0);
	pid = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL); /* a check that fails leaves nobody with our pipes */
		for (;;)
			pause();
	}
	nap(50);
	CHECK(kill(pid, SIGSTOP) == 0);
	CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
	CHECK(waitpid(pid, &status, WUNTRACED | WNOHANG) == 0);
	CHECK(kill(pid, SIGCONT) == 0);
	CHECK(waitpid(pid, &status, WCONTINUED) == pid && WIFCONTINUED(status));
	for (int i = 0; i < 200 && continues == 0; i++)
		nap(10); /* wait(2) may see the change before the SIGCHLD of it is sent */
	CHECK(stops == 1 && continues == 1);
	CHECK(kill(pid, SIGSTOP) == 0);
	CHECK(waitid(P_PID, pid, &info, WSTOPPED | WNOWAIT) == 0);
	CHECK(info.si_code == CLD_STOPPED && info.si_status == SIGSTOP && info.si_pid == pid);
	CHECK(waitid(P_PID, pid, &info, WSTOPPED) == 0);
	CHECK(kill(pid, SIGTERM) == 0);
	nap(10);
	CHECK(waitpid(pid, &status, WNOHANG) == 0); /* it waits for SIGCONT */
	CHECK(kill(pid, SIGCONT) == 0);
	CHECK(WTERMSIG(status_of(pid)) == SIGTERM);
	pid = fork();
	if (pid == 0) {
		raise(SIGSTOP);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(WTERMSIG(status_of(pid)) == SIGKILL);
	sa.sa_flags |= SA_NOCLDSTOP;
	CHECK(sigaction(SIGCHLD, &sa, NULL) == 0);
	stops = 0;
	pid = fork();
	if (pid == 0) {
		raise(SIGSTOP);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, WUNTRACED) == pid);
	CHECK(stops == 0);
	kill(pid, SIGCONT);
	status_of(pid);
}

static void sessions(void)
{
	pid_t pid = fork(), other;

	if (pid == 0) {
		CHECK(setsid() == getpid() && getsid(0) == getpid() && getpgrp() == getpid());
		FAILS(setsid(), EPERM);
		FAILS(setpgid(0, 0), EPERM);
		other = fork();
		if (other == 0) {
			CHECK(setpgid(0, 0) == 0 && getpgrp() == getpid());
			CHECK(getsid(0) == getppid());
			FAILS(setsid(), EPERM);
			FAILS(setpgid(0, 12345), EPERM);
			FAILS(setpgid(0, -1), EINVAL);
			_exit(0);
		}
		CHECK(status_of(other) == 0);
		FAILS(setpgid(getppid(), 0), ESRCH);
		FAILS(getpgid(999999), ESRCH);
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
}

/* A stopped group whose last link to the session dies gets SIGHUP and SIGCONT. */
static void orphaned(void)
{
	int fds[2];
	char c;
	pid_t pid;

	CHECK(pipe(fds) == 0);
	pid = fork();
	if (pid == 0) {
		pid_t child;

		CHECK(setsid() > 0);
		child = fork();
		if (child == 0) {
			signal(SIGHUP, SIG_DFL);
			setpgid(0, 0);
			raise(SIGTSTP);
			_exit(0);
		}
		CHECK(waitpid(child, NULL, WUNTRACED) == child);
		_exit(0);
	}
	close(fds[1]);
	status_of(pid);
	CHECK(read(fds[0], &c, 1) == 0); /* every holder of the other end is dead */
	close(fds[0]);
}

static void terminal(void)
{
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY), unlocked = 0, number, slave, status;
	char name[64];
	pid_t pid;

	if (master < 0)
		return;
	CHECK(ioctl(master, TIOCSPTLCK, &unlocked) == 0 && ioctl(master, TIOCGPTN, &number) == 0);
	snprintf(name, sizeof(name), "/dev/pts/%d", number);
	slave = open(name, O_RDWR | O_NOCTTY);
	CHECK(slave >= 0);
	pid = fork();
	if (pid == 0) {
		pid_t job;
		char buf[16];

		CHECK(setsid() > 0 && ioctl(slave, TIOCSCTTY, 0) == 0);
		CHECK(tcgetpgrp(slave) == getpid());
		signal(SIGTTOU, SIG_IGN);
		job = fork();
		if (job == 0) {
			signal(SIGTTOU, SIG_DFL);
			setpgid(0, 0);
			/* in the background: reading stops it, once in the foreground it is served */
			_exit(read(slave, buf, sizeof(buf)) == 3 ? 6 : 1);
		}
		setpgid(job, job);
		CHECK(waitpid(job, &status, WUNTRACED) == job && WIFSTOPPED(status) && WSTOPSIG(status) == SIGTTIN);
		CHECK(tcsetpgrp(slave, job) == 0);
		CHECK(kill(-job, SIGCONT) == 0);
		CHECK(write(master, "hi\n", 3) == 3);
		CHECK(WEXITSTATUS(status_of(job)) == 6);
		CHECK(tcsetpgrp(slave, getpid()) == 0);
		job = fork();
		if (job == 0) {
			signal(SIGINT, SIG_DFL);
			setpgid(0, 0);
			for (;;)
				pause();
		}
		setpgid(job, job);
		CHECK(tcsetpgrp(slave, job) == 0);
		CHECK(write(master, "\003", 1) == 1);
		status = status_of(job);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT);
		CHECK(tcsetpgrp(slave, getpid()) == 0);
		/* the leader's end hangs the foreground up */
		job = fork();
		if (job == 0) {
			for (;;)
				pause();
		}
		_exit(job > 0 ? 0 : 1);
	}
	CHECK(status_of(pid) == 0);
	close(slave);
	close(master);
}

int main(void)
{
	stops_and_continues();
	sessions();
	orphaned();
	terminal();
	puts("ok");
	return 0;
}
