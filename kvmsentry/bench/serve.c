// SPDX-License-Identifier: Apache-2.0
/*
 * A server and its client in one sandbox, over loopback:
 *
 *	serve NAME http|redis PORT CONNECTIONS REQUESTS -- SERVER [ARGUMENT...]
 *
 * Starts the server, waits until it answers, sends REQUESTS requests over CONNECTIONS connections, one outstanding on each,
 * checks every answer, stops the server, and prints a line of JSON: {"name": NAME, "ns": ns a request, ...}.
 * http asks for / and wants status 200; redis sets and gets a key.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 64
#define PATIENCE 20	/* seconds for the server to come up */

static const char http[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
static const char set[] = "*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$5\r\nvalue\r\n", set_answer[] = "+OK\r\n";
static const char get[] = "*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n", get_answer[] = "$5\r\nvalue\r\n";

static struct connection {
	char buffer[8192];
	size_t have;
	int asked;	/* requests sent on this connection */
} connections[MOST];
static struct pollfd polls[MOST];
static pid_t server;
static int is_http;

/* Ends the server too. */
static void give_up(const char *what)
{
	fprintf(stderr, "serve: %s: %s\n", what, strerror(errno));
	if (server > 0)
		kill(server, SIGKILL);
	exit(1);
}

static int dial(int port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0)
		give_up("socket");
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (connect(fd, (struct sockaddr *)&to, sizeof(to))) {
		close(fd);
		return -1;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

static void ask(int i)
{
	const char *text = is_http ? http : connections[i].asked % 2 ? get : set;
	size_t length = strlen(text);

	if (write(polls[i].fd, text, length) != (ssize_t)length)
		give_up("write");
	connections[i].asked++;
	connections[i].have = 0;
}

/* 1 when the answer is there and right. */
static int answered(int i)
{
	struct connection *c = &connections[i];
	ssize_t n = read(polls[i].fd, c->buffer + c->have, sizeof(c->buffer) - 1 - c->have);

	if (n <= 0)
		give_up("read");
	c->have += n;
	c->buffer[c->have] = 0;
	if (is_http) {
		char *body = strstr(c->buffer, "\r\n\r\n"), *length = strcasestr(c->buffer, "content-length:");

		if (!body)
			return 0;
		if (strncmp(c->buffer, "HTTP/1.1 200", 12) || !length)
			give_up("not the answer of a web server");
		return c->have >= (size_t)(body + 4 - c->buffer) + strtoul(length + 15, NULL, 10);
	}
	const char *wanted = c->asked % 2 ? set_answer : get_answer;

	if (strncmp(c->buffer, wanted, c->have < strlen(wanted) ? c->have : strlen(wanted)))
		give_up("not redis's answer");
	return c->have == strlen(wanted);
}

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(int argc, char **argv)
{
	int port, count, requests, sent = 0, done = 0, status;
	double begin, took, deadline = now_ns() + PATIENCE * 1e9;
	struct timespec pause = { 0, 5000000 };

	if (argc < 8 || strcmp(argv[6], "--"))
		return 2;
	is_http = !strcmp(argv[2], "http");
	port = atoi(argv[3]);
	count = atoi(argv[4]) > MOST ? MOST : atoi(argv[4]);
	requests = atoi(argv[5]);
	signal(SIGPIPE, SIG_IGN);
	fflush(stdout);
	server = fork();
	if (server == 0) {
		dup2(2, 1);	/* figures go to stdout, what the server says does not */
		prctl(PR_SET_PDEATHSIG, SIGTERM);
		execvp(argv[7], argv + 7);
		perror(argv[7]);
		_exit(127);
	}
	for (int i = 0; i < count; i++) {
		while ((polls[i].fd = dial(port)) < 0) {
			if (waitpid(server, &status, WNOHANG) == server) {
				fprintf(stderr, "serve: the server ended with status %#x\n", status);
				return 1;
			}
			if (now_ns() > deadline)
				give_up("the server does not answer");
			nanosleep(&pause, NULL);
		}
		polls[i].events = POLLIN;
	}
	begin = now_ns();
	for (int i = 0; i < count && sent < requests; i++, sent++)
		ask(i);
	while (done < requests) {
		if (poll(polls, count, PATIENCE * 1000) <= 0) {
			fprintf(stderr, "serve: %d of %d answers, then no more\n", done, requests);
			give_up("poll");
		}
		for (int i = 0; i < count; i++) {
			if (!polls[i].revents || !answered(i))
				continue;
			done++;
			if (sent < requests) {
				ask(i);
				sent++;
			}
		}
	}
	took = now_ns() - begin;
	kill(server, SIGTERM);
	if (waitpid(server, &status, 0) != server)
		give_up("waitpid");
	printf("{\"name\": \"%s\", \"ns\": %.1f, \"min\": %.1f, \"max\": %.1f, \"calls\": %d}\n", argv[1], took / requests,
	       took / requests, took / requests, requests);
	return 0;
}
