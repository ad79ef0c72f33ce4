/* fork(2), wait4(2), waitid(2), orphans, subreapers, clone(2) flags. */
#include "proc_check.h"
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

static volatile int seen;

static void on_chld(int signo)
{
	seen++;
}

static void basics(void)
{
	int status, fds[2], value = 1;
	struct rusage usage;
	pid_t pid;

	CHECK(pipe(fds) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		value = 2;
		CHECK(write(fds[1], &value, sizeof(value)) == sizeof(value));
		_exit(getppid() > 0 ? 42 : 1);
	}
	CHECK(read(fds[0], &status, sizeof(status)) == sizeof(status) && status == 2);
	CHECK(value == 1);
	CHECK(wait4(pid, &status, 0, &usage) == pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
	FAILS(waitpid(pid, &status, 0), ECHILD);
	FAILS(waitpid(-1, &status, WNOHANG), ECHILD);
	FAILS(waitpid(-1, &status, 0x100), EINVAL);
	close(fds[0]);
	close(fds[1]);
}

/* The largest a child ever was, for whoever waits for it; freed memory and another program's size count too. */
static void sizes(void)
{
	const long megabytes = 24;
	struct rusage own, waited, children;
	pid_t pid;

	CHECK(getrusage(RUSAGE_CHILDREN, &children) == 0 && children.ru_maxrss < megabytes * 1024);
	pid = fork();
	if (pid == 0) {
		char *memory = mmap(NULL, megabytes << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		CHECK(memory != MAP_FAILED);
		memset(memory, 1, megabytes << 20);
		CHECK(munmap(memory, megabytes << 20) == 0);
		CHECK(getrusage(RUSAGE_SELF, &own) == 0 && own.ru_maxrss >= megabytes * 1024);
		CHECK(getrusage(RUSAGE_CHILDREN, &children) == 0 && children.ru_maxrss == 0);
		execl("/bin/true", "true", NULL);
		_exit(1);
	}
	CHECK(wait4(pid, NULL, 0, &waited) == pid && waited.ru_maxrss >= megabytes * 1024);
	CHECK(getrusage(RUSAGE_CHILDREN, &children) == 0 && children.ru_maxrss >= waited.ru_maxrss);
	CHECK(getrusage(RUSAGE_SELF, &own) == 0 && own.ru_maxrss > 0); /* perhaps the size of who executed us */
	/* What nobody waits for is nobody's. */
	CHECK(signal(SIGCHLD, SIG_IGN) != SIG_ERR);
	pid = fork();
	if (pid == 0) {
		char *memory = mmap(NULL, megabytes << 21, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		CHECK(memory != MAP_FAILED);
		memset(memory, 1, megabytes << 21);
		_exit(0);
	}
	FAILS(wait(NULL), ECHILD);
	CHECK(signal(SIGCHLD, SIG_DFL) != SIG_ERR);
	CHECK(getrusage(RUSAGE_CHILDREN, &children) == 0 && children.ru_maxrss == waited.ru_maxrss);
}

static void no_hang(void)
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		pause();
		_exit(0);
	}
	CHECK(waitpid(pid, &status, WNOHANG) == 0);
	CHECK(kill(pid, SIGTERM) == 0);
	status = status_of(pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
}

static void with_waitid(void)
{
	siginfo_t info;
	pid_t pid = fork();

	if (pid == 0)
		_exit(7);
	memset(&info, 0, sizeof(info));
	CHECK(waitid(P_PID, pid, &info, WEXITED | WNOWAIT) == 0);
	CHECK(info.si_pid == pid && info.si_status == 7 && info.si_code == CLD_EXITED && info.si_signo == SIGCHLD);
	CHECK(waitid(P_ALL, 0, &info, WEXITED) == 0 && info.si_pid == pid);
	FAILS(waitid(P_PID, pid, &info, WEXITED), ECHILD);
	FAILS(waitid(P_PID, pid, &info, 0), EINVAL);
}

static void many(void)
{
	pid_t pids[20];
	int i, got = 0;

	for (i = 0; i < 20; i++) {
		pids[i] = fork();
		CHECK(pids[i] >= 0);
		if (pids[i] == 0)
			_exit(i);
	}
	for (i = 0; i < 20; i++) {
		int status, j;
		pid_t pid = wait(&status);

		for (j = 0; j < 20 && pids[j] != pid; j++)
			;
		CHECK(j < 20 && WEXITSTATUS(status) == j);
		pids[j] = 0;
		got++;
	}
	CHECK(got == 20);
}

static void groups(void)
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		pause();
		_exit(0);
	}
	CHECK(setpgid(pid, pid) == 0 && getpgid(pid) == pid);
	FAILS(waitpid(0, &status, WNOHANG), ECHILD);
	CHECK(waitpid(-pid, &status, WNOHANG) == 0);
	CHECK(kill(-pid, SIGKILL) == 0);
	CHECK(waitpid(-pid, &status, 0) == pid && WTERMSIG(status) == SIGKILL);
}

static void reaping(void)
{
	int status;
	pid_t pid;

	handle(SIGCHLD, on_chld, 0);
	seen = 0;
	pid = fork();
	if (pid == 0)
		_exit(0);
	CHECK(WIFEXITED(status_of(pid)));
	while (!seen)
		nap(1);
	handle(SIGCHLD, SIG_IGN, 0);
	pid = fork();
	if (pid == 0)
		_exit(0);
	FAILS(waitpid(pid, &status, 0), ECHILD);
	handle(SIGCHLD, on_chld, SA_NOCLDWAIT);
	seen = 0;
	pid = fork();
	if (pid == 0)
		_exit(0);
	for (;;) {
		int got = waitpid(pid, &status, 0);

		if (got == -1 && errno == EINTR)
			continue;
		CHECK(got == -1 && errno == ECHILD);
		break;
	}
	CHECK(seen == 1);
	handle(SIGCHLD, SIG_DFL, 0);
}

static void orphans(void)
{
	int fds[2], status;
	pid_t pid, grandchild, parent;

	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0);
	CHECK(pipe(fds) == 0);
	pid = fork();
	if (pid == 0) {
		pid_t mine = getpid();

		if (fork() == 0) {
			while (getppid() == mine)
				nap(1);
			parent = getppid();
			CHECK(write(fds[1], &parent, sizeof(parent)) == sizeof(parent));
			_exit(5);
		}
		_exit(0);
	}
	status_of(pid);
	CHECK(read(fds[0], &parent, sizeof(parent)) == sizeof(parent) && parent == getpid());
	grandchild = wait(&status);
	CHECK(grandchild > 0 && WEXITSTATUS(status) == 5);
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0);
}

static void death_signal(void)
{
	int fds[2], status;
	char c;
	pid_t pid;

	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0);
	CHECK(pipe(fds) == 0);
	pid = fork();
	if (pid == 0) {
		if (fork() == 0) {
			CHECK(prctl(PR_SET_PDEATHSIG, SIGUSR1, 0, 0, 0) == 0);
			CHECK(write(fds[1], "x", 1) == 1);
			for (;;)
				pause();
		}
		CHECK(read(fds[0], &c, 1) == 1);
		_exit(0);
	}
	status_of(pid);
	CHECK(wait(&status) > 0 && WIFSIGNALED(status) && WTERMSIG(status) == SIGUSR1);
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0);
}

static int in_clone(void *argument)
{
	*(int *)argument = 9;
	close(100);
	return 3;
}

static void clones(void)
{
	char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	int value = 0, status;
	pid_t pid, tid = 0;

	CHECK(dup2(1, 100) == 100);
	pid = clone(in_clone, stack + 65536, CLONE_VM | CLONE_FILES | SIGCHLD, &value);
	CHECK(pid > 0 && WEXITSTATUS(status_of(pid)) == 3 && value == 9);
	FAILS(fcntl(100, F_GETFD), EBADF);
	value = 0;
	pid = clone(in_clone, stack + 65536, SIGCHLD, &value);
	CHECK(WEXITSTATUS(status_of(pid)) == 3 && value == 0);
	/* a child that sends no SIGCHLD is for __WCLONE or __WALL only */
	pid = clone(in_clone, stack + 65536, CLONE_PARENT_SETTID, &value, &tid);
	CHECK(pid > 0 && tid == pid);
	FAILS(waitpid(pid, &status, 0), ECHILD);
	CHECK(waitpid(pid, &status, __WALL) == pid);
	pid = clone(in_clone, stack + 65536, 0, &value);
	CHECK(waitpid(pid, &status, __WCLONE) == pid);
	FAILS(syscall(SYS_clone, CLONE_THREAD, 0, 0, 0, 0), EINVAL);
	FAILS(syscall(SYS_clone, CLONE_SIGHAND, 0, 0, 0, 0), EINVAL);
	FAILS(syscall(SYS_clone, CLONE_NEWNS | CLONE_FS, 0, 0, 0, 0), EINVAL);
}

static void limit(void)
{
	pid_t pid = fork();

	if (pid == 0) {
		struct rlimit none = { 0, 0 };

		if (getuid() == 0)
			CHECK(setuid(65533) == 0);
		CHECK(setrlimit(RLIMIT_NPROC, &none) == 0);
		FAILS(fork(), EAGAIN);
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
}

int main(void)
{
	basics();
	sizes();
	no_hang();
	with_waitid();
	many();
	groups();
	reaping();
	orphans();
	death_signal();
	clones();
	limit();
	puts("ok");
	return 0;
}
