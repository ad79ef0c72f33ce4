/* AF_UNIX: names, connections, types, readiness, ends. Prints what it saw; the same inside. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static int sigpipes;

static void on_pipe(int signo)
{
	sigpipes++;
}

static long show(const char *what, long n)
{
	printf("%s: %ld%s%s\n", what, n, n < 0 ? " " : "", n < 0 ? strerrorname_np(errno) : "");
	return n;
}

static short ready(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT | POLLRDHUP };

	poll(&p, 1, 0);
	return p.revents;
}

static socklen_t name(struct sockaddr_un *a, const char *path)
{
	memset(a, 0, sizeof(*a));
	a->sun_family = AF_UNIX;
	if (path[0] == '@') {
		memcpy(a->sun_path + 1, path + 1, strlen(path) - 1);
		return offsetof(struct sockaddr_un, sun_path) + strlen(path);
	}
	strcpy(a->sun_path, path);
	return sizeof(*a);
}

static void show_name(const char *what, int (*get)(int, struct sockaddr *, socklen_t *), int fd)
{
	struct sockaddr_un a;
	socklen_t n = sizeof(a);

	memset(&a, 0, sizeof(a));
	if (get(fd, (struct sockaddr *)&a, &n) < 0) {
		printf("%s: %s\n", what, strerrorname_np(errno));
		return;
	}
	printf("%s: length %d family %d first %d\n", what, n, a.sun_family, n > 2 ? a.sun_path[0] : -1);
}

static void streams(void)
{
	struct sockaddr_un a;
	socklen_t n;
	char buf[16];
	struct stat st;
	int l = socket(AF_UNIX, SOCK_STREAM, 0), c, d, c2, value;
	socklen_t size = sizeof(value);

	n = name(&a, "sock");
	show("read unconnected", read(l, buf, 1));
	show("send unconnected", send(l, "x", 1, MSG_NOSIGNAL));
	show("listen unbound", listen(l, 5));
	show("bind", bind(l, (struct sockaddr *)&a, n));
	show("bind again", bind(l, (struct sockaddr *)&a, n));
	c = socket(AF_UNIX, SOCK_STREAM, 0);
	show("bind taken", bind(c, (struct sockaddr *)&a, n));
	show("connect to no listener", connect(c, (struct sockaddr *)&a, n));
	show("accept without listen", accept(l, NULL, NULL));
	show("listen", listen(l, 1));
	stat("sock", &st);
	printf("mode %o\n", st.st_mode);
	printf("listener ready %x\n", ready(l));
	show("open", open("sock", O_RDWR));
	c2 = socket(AF_UNIX, SOCK_DGRAM, 0);
	show("connect of another type", connect(c2, (struct sockaddr *)&a, n));
	close(c2);
	show("connect", connect(c, (struct sockaddr *)&a, n));
	printf("listener ready %x\n", ready(l));
	c2 = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	show("connect 2", connect(c2, (struct sockaddr *)&a, n));
	close(c2);
	c2 = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	show("connect 3, backlog full", connect(c2, (struct sockaddr *)&a, n));
	close(c2);
	d = accept4(l, NULL, NULL, SOCK_CLOEXEC);
	show("accept", d >= 0 ? 0 : -1);
	printf("flags %x\n", fcntl(d, F_GETFD));
	show_name("client", getsockname, c);
	show_name("client's peer", getpeername, c);
	show_name("server", getsockname, d);
	show_name("server's peer", getpeername, d);
	show("connect again", connect(c, (struct sockaddr *)&a, n));
	getsockopt(l, SOL_SOCKET, SO_ACCEPTCONN, &value, &size);
	printf("accepting %d\n", value);

	show("send", send(c, "hello world", 11, 0));
	show("FIONREAD", ioctl(d, FIONREAD, &value));
	printf("%d bytes wait\n", value);
	memset(buf, 0, sizeof(buf));
	show("peek", recv(d, buf, 5, MSG_PEEK));
	show("recv", recv(d, buf, 5, 0));
	show("recv rest", recv(d, buf, sizeof(buf), 0));
	show("recv nothing", recv(d, buf, 1, MSG_DONTWAIT));
	show("oob off a pair", recv(d, buf, 1, MSG_ERRQUEUE | MSG_DONTWAIT));
	printf("ready %x %x\n", ready(c), ready(d));
	show("shutdown", shutdown(c, SHUT_WR));
	printf("ready %x %x\n", ready(c), ready(d));
	show("recv at the end", recv(d, buf, 1, 0));
	show("send after shutdown", send(c, "x", 1, MSG_NOSIGNAL));
	show("write after shutdown", write(c, "x", 1));
	printf("SIGPIPE %d\n", sigpipes);
	show("other way", send(d, "back", 4, 0));
	show("it came", recv(c, buf, sizeof(buf), 0));
	show("send, then close", send(d, "lost", 4, 0));
	close(c);
	printf("ready %x\n", ready(d));
	show("read", read(d, buf, 1));
	show("read", read(d, buf, 1));
	show("send to closed", send(d, "x", 1, MSG_NOSIGNAL));
	close(d);
	close(l);
	show("connect to closed", connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&a, n));
	unlink("sock");
	show("connect to unlinked", connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&a, n));
}

static void resets(void)
{
	struct sockaddr_un a;
	socklen_t n = name(&a, "@kvmsentry-reset");
	int l = socket(AF_UNIX, SOCK_STREAM, 0), c = socket(AF_UNIX, SOCK_STREAM, 0), p[2], value;
	socklen_t size = sizeof(value);
	char buf[4];

	show("bind abstract", bind(l, (struct sockaddr *)&a, n));
	listen(l, 3);
	show("connect", connect(c, (struct sockaddr *)&a, n));
	close(l);
	printf("ready %x\n", ready(c));
	show("read from a listener that went", read(c, buf, 1));
	show("read again", read(c, buf, 1));
	socketpair(AF_UNIX, SOCK_STREAM, 0, p);
	write(p[0], "unread", 6);
	close(p[1]);
	getsockopt(p[0], SOL_SOCKET, SO_ERROR, &value, &size);
	printf("error %s\n", value ? strerrorname_np(value) : "none");
	l = socket(AF_UNIX, SOCK_STREAM, 0);
	show("name is free again", bind(l, (struct sockaddr *)&a, n));
	close(l);
	l = socket(AF_UNIX, SOCK_STREAM, 0);
	a.sun_family = AF_UNIX;
	show("autobind", bind(l, (struct sockaddr *)&a, 2));
	show_name("autobound", getsockname, l);
}

static void packets(int type, const char *kind)
{
	int p[2], i, value;
	char buf[64];
	struct iovec iov = { buf, 3 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	printf("-- %s\n", kind);
	socketpair(AF_UNIX, type, 0, p);
	show("send", send(p[0], "first", 5, 0));
	show("send", send(p[0], "second", 6, 0));
	show("send nothing", send(p[0], "", 0, 0));
	ioctl(p[1], FIONREAD, &value);
	printf("first has %d\n", value);
	show("short recv", recvmsg(p[1], &m, 0));
	printf("flags %x\n", m.msg_flags);
	show("with MSG_TRUNC", recv(p[1], buf, 2, MSG_TRUNC));
	show("empty one", recv(p[1], buf, sizeof(buf), MSG_DONTWAIT));
	show("no more", recv(p[1], buf, sizeof(buf), MSG_DONTWAIT));
	for (i = 0; i < 3; i++)
		writev(p[1], (struct iovec[]){ { "ab", 2 }, { "cde", 3 } }, 2);
	show("gathered", read(p[0], buf, sizeof(buf)));
	show("too long", send(p[0], malloc(1 << 20), 1 << 20, 0));
	shutdown(p[0], SHUT_WR);
	printf("ready %x %x\n", ready(p[0]), ready(p[1]));
	show("recv after shutdown", recv(p[1], buf, 1, MSG_DONTWAIT));
	close(p[0]);
	printf("ready %x\n", ready(p[1]));
	show("send to closed", send(p[1], "x", 1, MSG_NOSIGNAL));
	close(p[1]);
}

static void datagrams(void)
{
	struct sockaddr_un a, b, from;
	socklen_t na = name(&a, "@kvmsentry-a"), nb = name(&b, "@kvmsentry-b"), nf = sizeof(from);
	int s = socket(AF_UNIX, SOCK_DGRAM, 0), t = socket(AF_UNIX, SOCK_DGRAM, 0), i;
	char buf[16];

	bind(s, (struct sockaddr *)&a, na);
	show("sendto", sendto(t, "hi", 2, 0, (struct sockaddr *)&a, na));
	show("recvfrom", recvfrom(s, buf, sizeof(buf), 0, (struct sockaddr *)&from, &nf));
	printf("from length %d\n", nf);
	bind(t, (struct sockaddr *)&b, nb);
	show("connect", connect(t, (struct sockaddr *)&a, na));
	show("send", send(t, "named", 5, 0));
	nf = sizeof(from);
	show("recvfrom", recvfrom(s, buf, sizeof(buf), 0, (struct sockaddr *)&from, &nf));
	printf("from length %d %.11s\n", nf, from.sun_path + 1);
	show("answer", sendto(s, "x", 1, 0, (struct sockaddr *)&from, nf));
	show("answered", recv(t, buf, sizeof(buf), 0));
	for (i = 0; send(t, "x", 1, MSG_DONTWAIT) == 1; i++)
		;
	show("full", -1);
	printf("queue full: %s, writable %x\n", i > 5 ? "yes" : "no", ready(t) & POLLOUT);
	show("drain", recv(s, buf, 1, 0));
	close(s);
	show("send to closed", send(t, "x", 1, 0));
	show("send without peer", send(t, "x", 1, 0));
	show("listen", listen(t, 1));
	show("accept", accept(t, NULL, NULL));
	close(t);
}

static void blocking(void)
{
	int p[2], status, e;
	static char block[300000];
	struct epoll_event ev = { .events = EPOLLOUT | EPOLLET }, got;
	struct timeval tv = { 0, 30000 };
	long total = 0, n;

	socketpair(AF_UNIX, SOCK_STREAM, 0, p);
	if (!fork()) {
		close(p[1]);
		for (int i = 0; i < 20; i++)
			if (write(p[0], block, sizeof(block)) != sizeof(block))
				_exit(1);
		_exit(0);
	}
	close(p[0]);
	while ((n = recv(p[1], block, sizeof(block), MSG_WAITALL)) > 0)
		total += n;
	wait(&status);
	printf("%ld bytes, writer %d\n", total, status);
	close(p[1]);

	socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, p);
	while (write(p[0], block, sizeof(block)) > 0)
		;
	show("full", -1);
	printf("ready %x\n", ready(p[0]));
	e = epoll_create1(0);
	epoll_ctl(e, EPOLL_CTL_ADD, p[0], &ev);
	printf("events %d\n", epoll_wait(e, &got, 1, 0));
	while (read(p[1], block, sizeof(block)) > 0)
		;
	printf("events %d", epoll_wait(e, &got, 1, 0));
	printf(" %x\n", got.events);
	printf("events %d\n", epoll_wait(e, &got, 1, 0));
	close(p[0]);
	close(p[1]);

	socketpair(AF_UNIX, SOCK_STREAM, 0, p);
	setsockopt(p[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
	show("recv with timeout", recv(p[0], block, 1, 0));
	show("read with timeout", read(p[0], block, 1));
}

int main(void)
{
	char dir[] = "/tmp/unixXXXXXX";

	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGPIPE, on_pipe);
	alarm(60);
	if (chdir(mkdtemp(dir)))
		return 1;
	streams();
	resets();
	packets(SOCK_DGRAM, "dgram");
	packets(SOCK_SEQPACKET, "seqpacket");
	datagrams();
	blocking();
	show("socket of nonsense type", socket(AF_UNIX, SOCK_RDM, 0));
	show("socket of nonsense protocol", socket(AF_UNIX, SOCK_STREAM, 7));
	show("socket of nonsense family", socket(99, SOCK_STREAM, 0));
	show("not a socket", send(0, "x", 1, 0));
	show("no descriptor", send(77, "x", 1, 0));
	chdir("/");
	rmdir(dir);
	return 0;
}
