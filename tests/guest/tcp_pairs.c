/* TCP between two sockets of one machine: order of bytes, what is queued, half closes, resets, urgent data, readiness. */
#include "proc_check.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>

static int listener(int family, void *name, socklen_t length)
{
	int fd = socket(family, SOCK_STREAM, 0), zero = 0;

	CHECK(fd >= 0);
	if (family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, 26, &zero, sizeof(zero));	/* IPV6_V6ONLY */
	CHECK(bind(fd, name, length) == 0);
	CHECK(listen(fd, 16) == 0);
	CHECK(getsockname(fd, name, &length) == 0);
	return fd;
}

static struct sockaddr_in here;

static int listen4(void)
{
	here = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	return listener(AF_INET, &here, sizeof(here));
}

static int dial(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	CHECK(connect(fd, (void *)&here, sizeof(here)) == 0);
	return fd;
}

static void connection(int *client, int *server)
{
	int fd = listen4();

	*client = dial();
	*server = accept(fd, NULL, NULL);
	CHECK(*server >= 0);
	close(fd);
}

static short ready(int fd, short events)
{
	struct pollfd p = { fd, events, 0 };

	CHECK(poll(&p, 1, 0) >= 0);
	return p.revents;
}

static void expect_bytes(int fd, const char *text)
{
	char buffer[256];
	size_t done = 0, length = strlen(text);

	while (done < length) {
		ssize_t n = read(fd, buffer + done, length - done);

		CHECK(n > 0);
		if (n <= 0)
			return;
		done += n;
	}
	CHECK(!memcmp(buffer, text, length));
}

static void sent_before_accept(void)
{
	int fd = listen4(), client = dial(), server;

	CHECK(write(client, "early ", 6) == 6);
	server = accept(fd, NULL, NULL);
	CHECK(write(client, "late", 4) == 4);
	CHECK(ready(server, POLLIN) == POLLIN);
	expect_bytes(server, "ea");
	expect_bytes(server, "rly late");
	CHECK(recv(server, &fd, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
	close(client);
	close(server);
	close(fd);
}

/* What ends a direction, or is not in the order of bytes, counts also when nobody has accepted yet. */
static void ended_before_accept(void)
{
	int fd = listen4(), client = dial(), server;
	char c = 0;

	CHECK(write(client, "all", 3) == 3);
	CHECK(shutdown(client, SHUT_WR) == 0);
	FAILS(send(client, "x", 1, MSG_NOSIGNAL), EPIPE);
	server = accept(fd, NULL, NULL);
	FAILS(send(client, "x", 1, MSG_NOSIGNAL), EPIPE);
	CHECK(ready(server, POLLIN | POLLRDHUP) == (POLLIN | POLLRDHUP));
	expect_bytes(server, "all");
	CHECK(recv(server, &c, 1, MSG_DONTWAIT) == 0);
	CHECK(write(server, "answer", 6) == 6);
	expect_bytes(client, "answer");
	close(client);
	close(server);

	client = dial();
	CHECK(write(client, "ab", 2) == 2 && send(client, "!", 1, MSG_OOB) == 1 && write(client, "cd", 2) == 2);
	server = accept(fd, NULL, NULL);
	CHECK(write(client, "ef", 2) == 2);
	expect_bytes(server, "ab");
	CHECK(recv(server, &c, 1, MSG_OOB) == 1 && c == '!');
	expect_bytes(server, "cdef");
	CHECK(recv(server, &c, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
	close(client);
	close(server);
	close(fd);
}

static void families(void)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_addr = in6addr_any };
	int fd = listener(AF_INET6, &any, sizeof(any)), client, server;
	struct sockaddr_in6 six = { .sin6_family = AF_INET6, .sin6_addr = in6addr_loopback, .sin6_port = any.sin6_port };

	here = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = any.sin6_port };
	client = dial();
	server = accept(fd, NULL, NULL);
	CHECK(write(client, "four", 4) == 4);
	expect_bytes(server, "four");
	close(client);
	close(server);
	client = socket(AF_INET6, SOCK_STREAM, 0);
	if (connect(client, (void *)&six, sizeof(six)) == 0) {
		server = accept(fd, NULL, NULL);
		CHECK(write(server, "six", 3) == 3);
		expect_bytes(client, "six");
		close(server);
	}
	close(client);
	close(fd);
}

static void looking_without_taking(void)
{
	int client, server, n = -1;
	char buffer[16];

	connection(&client, &server);
	CHECK(ready(server, POLLIN | POLLOUT) == POLLOUT);
	CHECK(write(client, "0123456789", 10) == 10);
	CHECK(ready(server, POLLIN | POLLOUT) == (POLLIN | POLLOUT));
	CHECK(ioctl(server, FIONREAD, &n) == 0 && n == 10);
	CHECK(recv(server, buffer, 4, MSG_PEEK) == 4 && !memcmp(buffer, "0123", 4));
	CHECK(recv(server, buffer, 4, MSG_TRUNC) == 4);	/* thrown away */
	CHECK(recv(server, buffer, 16, 0) == 6 && !memcmp(buffer, "456789", 6));
	CHECK(ioctl(server, FIONREAD, &n) == 0 && n == 0);
	close(client);
	close(server);
}

static void half_closed(void)
{
	int client, server;
	char c;

	connection(&client, &server);
	CHECK(write(client, "last", 4) == 4);
	CHECK(shutdown(client, SHUT_WR) == 0);
	FAILS(send(client, "x", 1, MSG_NOSIGNAL), EPIPE);
	expect_bytes(server, "last");
	CHECK(read(server, &c, 1) == 0);
	CHECK(ready(server, POLLIN | POLLRDHUP) == (POLLIN | POLLRDHUP));
	CHECK(write(server, "answer", 6) == 6);	/* the other way is open still */
	CHECK(ready(client, POLLIN) == POLLIN);
	expect_bytes(client, "answer");
	close(server);
	CHECK(read(client, &c, 1) == 0);
	CHECK(ready(client, POLLIN | POLLRDHUP) == (POLLIN | POLLRDHUP | POLLHUP));
	close(client);
}

static void closed_with_bytes_unread(void)
{
	int client, server, error = 0;
	socklen_t length = sizeof(error);
	char c;

	connection(&client, &server);
	CHECK(write(server, "kept", 4) == 4);
	CHECK(write(client, "never read", 10) == 10);
	close(server);
	expect_bytes(client, "kept");
	CHECK(read(client, &c, 1) == -1 && errno == ECONNRESET);
	CHECK(getsockopt(client, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0);
	FAILS(send(client, "x", 1, MSG_NOSIGNAL), EPIPE);
	close(client);
}

static void closed_when_all_was_read(void)
{
	int client, server;
	char c;

	connection(&client, &server);
	CHECK(write(client, "all", 3) == 3);
	CHECK(write(server, "rest", 4) == 4);
	expect_bytes(server, "all");
	close(server);
	expect_bytes(client, "rest");
	CHECK(read(client, &c, 1) == 0);
	CHECK(send(client, "x", 1, MSG_NOSIGNAL) == 1);	/* answered by a reset */
	CHECK(ready(client, POLLIN) & POLLHUP);
	FAILS(send(client, "x", 1, MSG_NOSIGNAL), EPIPE);
	close(client);
}

static void urgent(void)
{
	int client, server, mark = -1;
	char c = 0;

	connection(&client, &server);
	CHECK(write(client, "ab", 2) == 2);
	CHECK(send(client, "!", 1, MSG_OOB) == 1);
	CHECK(write(client, "cd", 2) == 2);
	CHECK(ready(server, POLLPRI) == POLLPRI);
	CHECK(recv(server, &c, 1, MSG_OOB) == 1 && c == '!');
	expect_bytes(server, "ab");
	expect_bytes(server, "cd");
	CHECK(ioctl(server, SIOCATMARK, &mark) == 0);
	close(client);
	close(server);
}

static void fill(int fd, long *total)
{
	static char block[10000];
	ssize_t n;

	while ((n = send(fd, block, sizeof(block), MSG_DONTWAIT)) > 0)
		*total += n;
	CHECK(n == -1 && errno == EAGAIN);
}

static void full_and_drained(void)
{
	static char block[65536];
	int client, server;
	long total = 0;
	ssize_t n;

	connection(&client, &server);
	fill(client, &total);
	CHECK(total > 10000);
	CHECK(ready(client, POLLOUT) == 0);
	while ((n = recv(server, block, sizeof(block), MSG_DONTWAIT)) > 0)
		total -= n;
	for (int i = 0; total && i < 1000; i++) {	/* Linux's own loopback may be a moment behind */
		usleep(1000);
		while ((n = recv(server, block, sizeof(block), MSG_DONTWAIT)) > 0)
			total -= n;
	}
	CHECK(total == 0);
	CHECK(ready(client, POLLOUT) == POLLOUT);
	close(client);
	close(server);
}

static void small_buffers(void)
{
	int fd = listen4(), client = dial(), server, size = 4096;
	static char block[300000];
	ssize_t n;

	CHECK(setsockopt(client, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)) == 0);
	server = accept(fd, NULL, NULL);
	CHECK(setsockopt(server, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)) == 0);
	n = send(client, block, sizeof(block), MSG_DONTWAIT);
	CHECK(n > 0 && n < 200000);	/* what is on the way has a limit */
	close(server);
	close(client);
	close(fd);
}

static long sum;

static void *sink(void *arg)
{
	static unsigned char block[70000];
	int fd = *(int *)arg;
	unsigned char want = 0;
	ssize_t n;

	while ((n = read(fd, block, sizeof(block))) > 0) {
		for (ssize_t i = 0; i < n; i++) {
			CHECK(block[i] == want);
			want = want == 250 ? 0 : want + 1;
		}
		sum += n;
	}
	CHECK(n == 0);
	return NULL;
}

static void many_bytes_in_order(void)
{
	static unsigned char block[251 * 400];
	int client, server;
	pthread_t thread;
	long left = 40 * sizeof(block);

	for (size_t i = 0; i < sizeof(block); i++)
		block[i] = i % 251;
	connection(&client, &server);
	pthread_create(&thread, NULL, sink, &server);
	while (left) {
		size_t at = (40 * sizeof(block) - left) % sizeof(block), n = sizeof(block) - at;
		ssize_t done = write(client, block + at, n);

		CHECK(done > 0);
		if (done <= 0)
			break;
		left -= done;
	}
	close(client);
	pthread_join(thread, NULL);
	CHECK(sum == 40 * (long)sizeof(block));
	close(server);
}

static void edges(void)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET | EPOLLRDHUP }, got;
	int client, server, epoll = epoll_create1(0);

	connection(&client, &server);
	CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, server, &event) == 0);
	CHECK(epoll_wait(epoll, &got, 1, 0) == 0);
	CHECK(write(client, "a", 1) == 1);
	CHECK(epoll_wait(epoll, &got, 1, 1000) == 1 && got.events == EPOLLIN);
	CHECK(epoll_wait(epoll, &got, 1, 0) == 0);	/* told once */
	CHECK(write(client, "b", 1) == 1);
	CHECK(epoll_wait(epoll, &got, 1, 1000) == 1 && got.events == EPOLLIN);
	expect_bytes(server, "ab");
	CHECK(epoll_wait(epoll, &got, 1, 0) == 0);
	close(client);
	CHECK(epoll_wait(epoll, &got, 1, 1000) == 1 && got.events == (EPOLLIN | EPOLLRDHUP));
	close(server);
	close(epoll);
}

static void by_option_and_by_child(void)
{
	int client, server, one = 3;
	char buffer[8];

	connection(&client, &server);
	CHECK(write(client, "ring", 4) == 4);
	CHECK(setsockopt(server, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof(one)) == 0);
	CHECK(write(client, "host", 4) == 4);
	expect_bytes(server, "ringhost");
	if (fork() == 0) {
		close(server);
		CHECK(write(client, "from the child", 14) == 14);
		_exit(0);
	}
	close(client);
	expect_bytes(server, "from the child");
	CHECK(read(server, buffer, sizeof(buffer)) == 0);
	int status;
	CHECK(wait(&status) > 0 && status == 0);
	close(server);
}

static void a_file_sent(void)
{
	int client, server, file = open("/proc/self/exe", O_RDONLY);
	char head[4] = "";

	connection(&client, &server);
	CHECK(sendfile(client, file, NULL, 4) == 4);
	CHECK(recv(server, head, 4, MSG_WAITALL) == 4 && !memcmp(head, "\177ELF", 4));
	close(file);
	close(client);
	close(server);
}

static void connected_while_accepted(void)
{
	int fd = listen4(), client = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), server, error = -1;
	socklen_t length = sizeof(error);
	struct pollfd p = { client, POLLOUT, 0 };

	CHECK(connect(client, (void *)&here, sizeof(here)) == 0 || errno == EINPROGRESS);
	server = accept(fd, NULL, NULL);
	CHECK(server >= 0);
	CHECK(poll(&p, 1, 1000) == 1 && p.revents == POLLOUT);
	CHECK(getsockopt(client, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0);
	CHECK(write(client, "x", 1) == 1);
	expect_bytes(server, "x");
	close(client);
	close(server);
	close(fd);
}

int main(void)
{
	sent_before_accept();
	ended_before_accept();
	families();
	looking_without_taking();
	half_closed();
	closed_with_bytes_unread();
	closed_when_all_was_read();
	urgent();
	full_and_drained();
	small_buffers();
	many_bytes_in_order();
	edges();
	by_option_and_by_child();
	a_file_sent();
	connected_while_accepted();
	puts("all as it should be");
	return 0;
}
