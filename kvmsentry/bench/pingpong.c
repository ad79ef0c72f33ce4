// SPDX-License-Identifier: Apache-2.0
/* Two that take turns: a byte there and a byte back through pipes and a socket pair, and a word that two threads hand over. */
#define _GNU_SOURCE
#include "bench.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static int out = -1, in = -1;
static pid_t partner;

/* Sends every byte back, one more than it was, until the other end is closed. */
static void echo(int from, int to)
{
	unsigned char byte;

	while (read(from, &byte, 1) == 1) {
		byte++;
		if (write(to, &byte, 1) != 1)
			_exit(1);
	}
	_exit(0);
}

static int start_pipes(void)
{
	int there[2], back[2];

	if (pipe(there) || pipe(back))
		return -1;
	partner = fork();
	if (partner == 0) {
		close(there[1]);
		close(back[0]);
		echo(there[0], back[1]);
	}
	close(there[0]);
	close(back[1]);
	out = there[1];
	in = back[0];
	return partner < 0 ? -1 : 0;
}

static int start_sockets(void)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		return -1;
	partner = fork();
	if (partner == 0) {
		close(pair[0]);
		echo(pair[1], pair[1]);
	}
	close(pair[1]);
	out = in = pair[0];
	return partner < 0 ? -1 : 0;
}

static void stop_partner(void)
{
	int status;

	close(out);
	if (in != out)
		close(in);
	waitpid(partner, &status, 0);
	if (status)
		fprintf(stderr, "the partner ended with status %#x\n", status);
}

static void exchange(long n)
{
	while (n--) {
		unsigned char sent = n, got;

		expect(write(out, &sent, 1) == 1);
		expect(read(in, &got, 1) == 1);
		expect(got == (unsigned char)(sent + 1));
	}
}

/* 0: ours, 1: the partner's, 2: the end. Each waits for its turn asleep: no spinning, the kernel wakes it. */
static atomic_int turn;
static pthread_t thread;

static void hand_over(int to)
{
	atomic_store(&turn, to);
	syscall(SYS_futex, &turn, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
}

static int wait_while(int value)
{
	int now;

	while ((now = atomic_load(&turn)) == value)
		syscall(SYS_futex, &turn, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
	return now;
}

static void *other(void *arg)
{
	while (wait_while(0) == 1)
		hand_over(0);
	return arg;
}

static int start_thread(void)
{
	atomic_store(&turn, 0);
	return pthread_create(&thread, NULL, other, NULL);
}

static void stop_thread(void)
{
	hand_over(2);
	pthread_join(thread, NULL);
}

static void take_turns(long n)
{
	while (n--) {
		hand_over(1);
		expect(wait_while(1) == 0);
	}
}

static const struct row rows[] = {
	{ "pipe", exchange, start_pipes, stop_partner },
	{ "futex", take_turns, start_thread, stop_thread },
	{ "socketpair", exchange, start_sockets, stop_partner },
};

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	return run_rows(argc, argv, rows, sizeof(rows) / sizeof(rows[0]));
}
