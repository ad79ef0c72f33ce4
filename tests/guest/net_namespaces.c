/* Network namespaces, network_namespaces(7): a loopback device that is down until somebody sets it up, ports and abstract
 * names of their own. */
#include "proc_check.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

static struct sockaddr_in at(const char *host, int port)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_port = htons(port) };

	inet_pton(AF_INET, host, &sin.sin_addr);
	return sin;
}

static int link_up(int up)
{
	struct ifreq ifr = { .ifr_name = "lo" };
	int fd = socket(AF_INET, SOCK_DGRAM, 0), result;

	CHECK(fd >= 0 && !ioctl(fd, SIOCGIFFLAGS, &ifr));
	if (up)
		ifr.ifr_flags |= IFF_UP;
	result = ioctl(fd, SIOCSIFFLAGS, &ifr);
	close(fd);
	return result;
}

static void down(void)
{
	struct ifreq ifr = { .ifr_name = "lo" };
	struct sockaddr_in there = at("127.0.0.1", 80), away = at("192.0.2.1", 80);
	int tcp = socket(AF_INET, SOCK_STREAM, 0), udp = socket(AF_INET, SOCK_DGRAM, 0);

	CHECK(tcp >= 0 && udp >= 0);
	CHECK(!ioctl(udp, SIOCGIFFLAGS, &ifr) && ifr.ifr_flags == IFF_LOOPBACK);
	FAILS(ioctl(udp, SIOCGIFADDR, &ifr), EADDRNOTAVAIL);
	strcpy(ifr.ifr_name, "eth0");
	FAILS(ioctl(udp, SIOCGIFFLAGS, &ifr), ENODEV);
	CHECK(if_nametoindex("lo") == 1);
	FAILS(connect(tcp, (void *)&there, sizeof there), ENETUNREACH);
	FAILS(sendto(udp, "x", 1, 0, (void *)&away, sizeof away), ENETUNREACH);
	FAILS(bind(udp, (void *)&there, sizeof there), EINVAL); /* it got a port all the same */
	CHECK(!bind(tcp, (void *)&away, sizeof away)); /* there are no routes yet that could tell */
	close(tcp), close(udp);
	puts("down");
}

static void tcp(void)
{
	struct sockaddr_in sin = at("0.0.0.0", 80), name;
	socklen_t size = sizeof name;
	int listener = socket(AF_INET, SOCK_STREAM, 0), client, server, value;
	char text[16];

	CHECK(!bind(listener, (void *)&sin, sizeof sin) && !listen(listener, 4));
	value = socket(AF_INET, SOCK_STREAM, 0);
	FAILS(bind(value, (void *)&sin, sizeof sin), EADDRINUSE);
	close(value);
	client = socket(AF_INET, SOCK_STREAM, 0);
	sin = at("192.0.2.1", 81);
	FAILS(bind(client, (void *)&sin, sizeof sin), EADDRNOTAVAIL);
	sin = at("127.0.0.1", 81);
	FAILS(connect(client, (void *)&sin, sizeof sin), ECONNREFUSED);
	FAILS(send(client, "x", 1, MSG_NOSIGNAL), EPIPE);
	FAILS(recv(client, text, 1, 0), ENOTCONN);
	FAILS(getpeername(client, (void *)&name, &size), ENOTCONN);
	close(client);
	client = socket(AF_INET, SOCK_STREAM, 0);
	sin = at("127.0.0.1", 80);
	value = 1;
	CHECK(!setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &value, sizeof value));
	CHECK(!connect(client, (void *)&sin, sizeof sin));
	FAILS(connect(client, (void *)&sin, sizeof sin), EISCONN);
	server = accept(listener, (void *)&name, &size);
	CHECK(server >= 0 && name.sin_addr.s_addr == sin.sin_addr.s_addr);
	int port = name.sin_port;
	CHECK(!getsockname(client, (void *)&name, &size) && name.sin_port == port);
	CHECK(!getpeername(client, (void *)&name, &size) && name.sin_port == htons(80));
	CHECK(!getsockname(server, (void *)&name, &size) && name.sin_port == htons(80));
	struct pollfd poller = { server, POLLIN, 0 };
	CHECK(poll(&poller, 1, 0) == 0);
	CHECK(write(client, "hello", 5) == 5);
	CHECK(poll(&poller, 1, 1000) == 1 && poller.revents == POLLIN);
	CHECK(recv(server, text, 16, MSG_PEEK) == 5 && read(server, text, 16) == 5 && !memcmp(text, "hello", 5));
	CHECK(!shutdown(client, SHUT_WR) && read(server, text, 1) == 0);
	CHECK(write(server, "bye", 3) == 3);
	close(server);
	CHECK(read(client, text, 16) == 3 && read(client, text, 16) == 0);
	close(client), close(listener);
	/* A client that waits in accept. */
	listener = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(!listen(listener, 1) && !getsockname(listener, (void *)&name, &size) && name.sin_port);
	pid_t pid = fork();
	if (!pid) {
		nap(20);
		name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
		client = socket(AF_INET, SOCK_STREAM, 0);
		CHECK(!connect(client, (void *)&name, sizeof name) && write(client, "late", 4) == 4);
		_exit(0);
	}
	server = accept(listener, 0, 0);
	CHECK(server >= 0 && read(server, text, 16) == 4);
	CHECK(waitpid(pid, &value, 0) == pid && value == 0);
	close(server), close(listener);
	puts("tcp");
}

static void udp(void)
{
	struct sockaddr_in sin = at("127.0.0.1", 53), name;
	socklen_t size = sizeof name;
	int one = socket(AF_INET, SOCK_DGRAM, 0), other = socket(AF_INET, SOCK_DGRAM, 0);
	char text[16];

	CHECK(!bind(one, (void *)&sin, sizeof sin));
	CHECK(!connect(other, (void *)&sin, sizeof sin) && send(other, "ask", 3, 0) == 3);
	CHECK(recvfrom(one, text, 16, 0, (void *)&name, &size) == 3);
	CHECK(sendto(one, "answer", 6, 0, (void *)&name, size) == 6 && recv(other, text, 16, 0) == 6);
	FAILS(recv(other, text, 1, MSG_DONTWAIT), EAGAIN);
	FAILS(send(one, "x", 1, 0), EDESTADDRREQ);
	close(one);
	CHECK(send(other, "x", 1, 0) == 1); /* and the answer is that nobody is there */
	FAILS(send(other, "x", 1, 0), ECONNREFUSED);
	close(other);
	puts("udp");
}

static long number(const char *path, const char *set)
{
	char text[32] = "";
	int fd = open(path, set ? O_RDWR : O_RDONLY);

	CHECK(fd >= 0);
	if (set)
		CHECK(write(fd, set, strlen(set)) == (ssize_t)strlen(set) && lseek(fd, 0, SEEK_SET) == 0);
	CHECK(read(fd, text, sizeof(text) - 1) > 0);
	close(fd);
	return atol(text);
}

/* Each namespace has its own numbers below /proc/sys/net: whose they are is settled when the file is opened. */
static void numbers(int home)
{
	static const char tag[] = "/proc/sys/net/ipv4/conf/lo/tag";
	static const char first[] = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
	int here = open("/proc/self/ns/net", O_RDONLY);
	long before;

	CHECK(number(tag, NULL) == 0 && number("/proc/sys/net/ipv4/conf/lo/disable_policy", NULL) == 1);
	CHECK(number(first, NULL) == 1024);
	CHECK(!setns(home, CLONE_NEWNET));
	before = number(tag, NULL);
	CHECK(!setns(here, CLONE_NEWNET));
	CHECK(number(tag, "17") == 17 && number(first, "80") == 80);
	pid_t pid = fork();
	if (!pid) {
		struct sockaddr_in low = at("0.0.0.0", 79), high = at("0.0.0.0", 80);
		int s = socket(AF_INET, SOCK_STREAM, 0);

		CHECK(!setresuid(1000, 1000, 1000));
		FAILS(bind(s, (void *)&low, sizeof(low)), EACCES);
		CHECK(!bind(s, (void *)&high, sizeof(high)));
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
	CHECK(!setns(home, CLONE_NEWNET) && number(tag, NULL) == before);
	CHECK(!setns(here, CLONE_NEWNET) && number(tag, NULL) == 17);
	close(here);
}

int main(void)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX, .sun_path = "\0kvmsentry-test" };
	socklen_t size = offsetof(struct sockaddr_un, sun_path) + 15;
	int named = socket(AF_UNIX, SOCK_STREAM, 0), home, other;

	setvbuf(stdout, 0, _IONBF, 0);
	home = open("/proc/self/ns/net", O_RDONLY);
	CHECK(home >= 0 && !bind(named, (void *)&un, size) && !listen(named, 1));
	if (unshare(CLONE_NEWNET)) {
		printf("no network namespaces here: %s\n", strerror(errno));
		return 4;
	}
	down();
	other = socket(AF_UNIX, SOCK_STREAM, 0);
	FAILS(connect(other, (void *)&un, size), ECONNREFUSED);
	CHECK(!link_up(1));
	tcp();
	udp();
	pid_t pid = fork();
	int status;
	if (!pid) { /* nothing of this is seen in yet another one, or by who may not */
		CHECK(!unshare(CLONE_NEWNET) && !setresuid(1000, 1000, 1000));
		FAILS(link_up(1), EPERM);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	numbers(home);
	CHECK(!setns(home, CLONE_NEWNET));
	close(other);
	other = socket(AF_UNIX, SOCK_STREAM, 0);
	CHECK(!connect(other, (void *)&un, size));
	puts("home");
	return 0;
}
