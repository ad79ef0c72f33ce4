/* vfork(2): the child runs in the parent's memory, the parent waits for exec or exit; posix_spawn(3). */
#include "proc_check.h"
#include <spawn.h>

static volatile int shared;

int main(int argc, char **argv)
{
	char *again[] = { argv[0], "again", NULL }, *env[] = { NULL };
	int status, i;
	pid_t pid;

	if (argc > 1)
		return 11;
	for (i = 0; i < 10; i++) {
		pid = vfork();
		CHECK(pid >= 0);
		if (pid == 0) {
			shared = 7 + i;
			_exit(5);
		}
		CHECK(shared == 7 + i);
		CHECK(WEXITSTATUS(status_of(pid)) == 5);
	}
	pid = vfork();
	if (pid == 0) {
		execve("/proc/self/exe", again, env);
		_exit(1);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 11);
	pid = vfork();
	if (pid == 0) {
		execve("/no/such/program", again, env);
		_exit(errno);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == ENOENT);
	CHECK(posix_spawn(&pid, "/proc/self/exe", NULL, NULL, again, env) == 0);
	CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 11);
	CHECK(posix_spawn(&pid, "/no/such/program", NULL, NULL, again, env) == ENOENT);
	/* a child that dies of a signal wakes the parent too */
	pid = vfork();
	if (pid == 0) {
		kill(getpid(), SIGKILL);
		_exit(0);
	}
	CHECK(WTERMSIG(status_of(pid)) == SIGKILL);
	puts("ok");
	return 0;
}
