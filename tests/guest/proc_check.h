/* What the guest programs about processes share: a check that says where it failed. */
#ifndef PROC_CHECK_H
#define PROC_CHECK_H

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                                   \
	do {                                                                                               \
		if (!(condition)) {                                                                        \
			fprintf(stderr, "%s:%d: %s (errno %d %s)\n", __FILE__, __LINE__, #condition, errno, \
				strerror(errno));                                                          \
			exit(1);                                                                           \
		}                                                                                          \
	} while (0)

#define FAILS(call, number)                        \
	do {                                       \
		errno = 0;                         \
		CHECK((call) == -1);               \
		CHECK(errno == (number));          \
	} while (0)

static inline void nap(int milliseconds)
{
	struct timespec t = { milliseconds / 1000, milliseconds % 1000 * 1000000L };

	while (nanosleep(&t, &t) == -1 && errno == EINTR)
		;
}

/* Waits for pid and gives its status. */
static inline int status_of(pid_t pid)
{
	int status;
	pid_t got;

	do
		got = waitpid(pid, &status, 0);
	while (got == -1 && errno == EINTR);
	CHECK(got == pid);
	return status;
}

static inline void handle(int signo, void (*handler)(int), int flags)
{
	struct sigaction sa = { .sa_handler = handler, .sa_flags = flags };

	CHECK(sigaction(signo, &sa, NULL) == 0);
}

#endif
