// SPDX-License-Identifier: Apache-2.0
/* Processes: fork and wait, with and without an exec of this same program. */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/wait.h>

static char *self;

static void fork_wait(long n)
{
	while (n--) {
		int status;
		pid_t pid = fork();

		if (pid == 0)
			_exit(7);
		expect(pid > 0);
		expect(waitpid(pid, &status, 0) == pid);
		expect(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	}
}

static void fork_exec(long n)
{
	while (n--) {
		int status;
		pid_t pid = fork();

		if (pid == 0) {
			execl(self, self, "exit", NULL);
			_exit(1);
		}
		expect(pid > 0);
		expect(waitpid(pid, &status, 0) == pid);
		expect(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	}
}

static const struct row rows[] = {
	{ "fork", fork_wait },
	{ "exec", fork_exec },
};

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "exit"))
		return 7;
	self = argv[0];
	return run_rows(argc, argv, rows, sizeof(rows) / sizeof(rows[0]));
}
