/* TCP, UDP and their options over loopback. Prints what it saw; ports are not shown. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <net/if.h>
#include <unistd.h>

static long show(const char *what, long n)
{
	printf("%s: %ld%s%s\n", what, n, n < 0 ? " " : "", n < 0 ? strerrorname_np(errno) : "");
	return n;
}

static short ready(int fd, int wait)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT | POLLRDHUP };

	poll(&p, 1, wait);
	return p.revents;
}

static void option(int s, int level, int name, int value, const char *what)
{
	int got = -1;
	socklen_t size = sizeof(got);
	int set = setsockopt(s, level, name, &value, sizeof(value));
	int e = errno, get = getsockopt(s, level, name, &got, &size);

	printf("%s: %s, %d size %d\n", what, set ? strerrorname_np(e) : "set", get ? -1 : got, size);
}

static void tcp(int family)
{
	struct sockaddr_storage a = { .ss_family = family };
	socklen_t n = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6), size;
	struct sockaddr_storage from;
	int l = socket(family, SOCK_STREAM, 0), c, d, value, e;
	struct tcp_info info;
	struct timeval tv = { 0, 30000 };
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET };
	char buf[32];
	static char big[1 << 20];
	long total = 0, got;

	printf("-- tcp %d\n", family);
	if (family == AF_INET)
		((struct sockaddr_in *)&a)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	else
		((struct sockaddr_in6 *)&a)->sin6_addr = in6addr_loopback;
	show("recv unconnected", recv(l, buf, 1, MSG_DONTWAIT));
	show("bind short", bind(l, (struct sockaddr *)&a, 4));
	show("bind", bind(l, (struct sockaddr *)&a, n));
	show("accept early", accept(l, NULL, NULL));
	show("listen", listen(l, 5));
	getsockname(l, (struct sockaddr *)&a, &n);
	c = socket(family, SOCK_STREAM, 0);
	show("connect", connect(c, (struct sockaddr *)&a, n));
	show("connect again", connect(c, (struct sockaddr *)&a, n));
	size = sizeof(from);
	d = accept4(l, (struct sockaddr *)&from, &size, SOCK_NONBLOCK);
	printf("accepted: %d, family %d, size %d, flags %o\n", d >= 0, from.ss_family, size, fcntl(d, F_GETFL));
	show("nothing yet", recv(d, buf, 1, 0));
	show("send", send(c, "hello", 5, 0));
	printf("ready %x\n", ready(d, 1000) & POLLIN);
	ioctl(d, FIONREAD, &value);
	printf("FIONREAD %d\n", value);
	show("peek", recv(d, buf, 2, MSG_PEEK));
	show("recv", recv(d, buf, sizeof(buf), 0));
	e = epoll_create1(0);
	epoll_ctl(e, EPOLL_CTL_ADD, d, &ev);
	printf("epoll %d\n", epoll_wait(e, &ev, 1, 0));
	show("writev", writev(c, (struct iovec[]){ { "ab", 2 }, { "cde", 3 } }, 2));
	printf("epoll %d\n", epoll_wait(e, &ev, 1, 1000));
	show("readv", readv(d, (struct iovec[]){ { buf, 2 }, { buf + 2, 9 } }, 2));
	setsockopt(c, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
	show("timeout", recv(c, buf, 1, 0));
	option(c, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
	option(c, IPPROTO_TCP, TCP_KEEPIDLE, 77, "TCP_KEEPIDLE");
	option(c, SOL_SOCKET, SO_KEEPALIVE, 1, "SO_KEEPALIVE");
	option(c, SOL_SOCKET, SO_REUSEPORT, 1, "SO_REUSEPORT");
	option(c, SOL_SOCKET, SO_SNDBUF, 20000, "SO_SNDBUF");
	option(c, SOL_SOCKET, SO_BUSY_POLL, 0, "SO_BUSY_POLL");
	option(c, SOL_SOCKET, SO_SELECT_ERR_QUEUE, 1, "SO_SELECT_ERR_QUEUE");
	size = sizeof(value);
	show("groups of nobody we know", getsockopt(c, SOL_SOCKET, SO_PEERGROUPS, &value, &size));
	option(c, IPPROTO_TCP, 9999, 1, "nonsense");
	size = sizeof(value);
	show("another protocol's option", getsockopt(c, IPPROTO_UDP, 1, &value, &size));
	show("no protocol's option", getsockopt(c, 500, 1, &value, &size));
	size = sizeof(info);
	getsockopt(c, IPPROTO_TCP, TCP_INFO, &info, &size);
	printf("state %d\n", info.tcpi_state);
	if (!fork()) {
		for (int i = 0; i < 4; i++)
			if (write(c, big, sizeof(big)) != sizeof(big))
				_exit(1);
		_exit(0);
	}
	close(c);
	fcntl(d, F_SETFL, 0);
	while ((got = recv(d, big, sizeof(big), MSG_WAITALL)) > 0)
		total += got;
	wait(&value);
	printf("%ld bytes, %ld at the end, writer %d, ready %x\n", total, got, value, ready(d, 1000));
	show("send to half closed", send(d, "x", 1, MSG_NOSIGNAL));
	usleep(20000);
	show("send after reset", send(d, "x", 1, MSG_NOSIGNAL));
	close(d);
	close(l);
	c = socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	show("connect refused", connect(c, (struct sockaddr *)&a, n) < 0 && errno == EINPROGRESS ? 0 : -1);
	ready(c, 1000);
	size = sizeof(value);
	getsockopt(c, SOL_SOCKET, SO_ERROR, &value, &size);
	printf("error %s\n", strerrorname_np(value ? value : errno));
	close(c);
	c = socket(family, SOCK_STREAM, 0);
	show("connect refused, blocking", connect(c, (struct sockaddr *)&a, n));
	show("shutdown unconnected", shutdown(c, SHUT_RD));
	close(c);
}

static void udp(void)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) }, from;
	struct sockaddr unspec = { .sa_family = AF_UNSPEC };
	socklen_t n = sizeof(a), size = sizeof(from);
	int s = socket(AF_INET, SOCK_DGRAM, 0), t = socket(AF_INET, SOCK_DGRAM, 0), one = 1, i;
	char buf[64], control[256];
	struct iovec iov = { buf, 3 };
	struct msghdr m = { .msg_name = &from, .msg_namelen = sizeof(from), .msg_iov = &iov, .msg_iovlen = 1,
			    .msg_control = control, .msg_controllen = sizeof(control) };
	struct mmsghdr mm[4];
	struct timespec ts = { 1, 0 };

	printf("-- udp\n");
	bind(s, (struct sockaddr *)&a, n);
	getsockname(s, (struct sockaddr *)&a, &n);
	show("send unconnected", send(t, "x", 1, 0));
	show("sendto", sendto(t, "datagram", 8, 0, (struct sockaddr *)&a, n));
	setsockopt(s, IPPROTO_IP, IP_PKTINFO, &one, sizeof(one));
	show("sendto", sendto(t, "datagram", 8, 0, (struct sockaddr *)&a, n));
	ready(s, 1000);
	show("recvfrom", recvfrom(s, buf, sizeof(buf), 0, (struct sockaddr *)&from, &size));
	printf("from %s\n", inet_ntoa(from.sin_addr));
	show("recvmsg", recvmsg(s, &m, 0));
	printf("flags %x name %d", m.msg_flags, m.msg_namelen);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
		printf(" [%d %d %zu]", c->cmsg_level, c->cmsg_type, c->cmsg_len);
	printf("\n");
	show("connect", connect(t, (struct sockaddr *)&a, n));
	show("send", send(t, "", 0, 0));
	show("empty", recv(s, buf, 1, 0));
	memset(mm, 0, sizeof(mm));
	for (i = 0; i < 4; i++) {
		mm[i].msg_hdr.msg_iov = &iov;
		mm[i].msg_hdr.msg_iovlen = 1;
	}
	show("sendmmsg", sendmmsg(t, mm, 4, 0));
	show("recvmmsg", recvmmsg(s, mm, 4, MSG_WAITFORONE, &ts));
	printf("lengths %d %d\n", mm[0].msg_len, mm[3].msg_len);
	show("disconnect", connect(t, &unspec, sizeof(unspec)));
	show("send", send(t, "x", 1, 0));
	show("nothing", recv(s, buf, 1, MSG_DONTWAIT));
	option(s, IPPROTO_IP, IP_TTL, 33, "IP_TTL");
	option(s, IPPROTO_IP, IP_TOS, 16, "IP_TOS");
	option(s, SOL_SOCKET, SO_BROADCAST, 1, "SO_BROADCAST");
	show("too long", sendto(t, (char[70000]){ 0 }, 70000, 0, (struct sockaddr *)&a, n));
}

static void multicast(void)
{
	struct sockaddr_in6 group = { .sin6_family = AF_INET6, .sin6_port = htons(45678) };
	int s = socket(AF_INET6, SOCK_DGRAM, 0);
	struct ipv6_mreq member = { .ipv6mr_interface = if_nametoindex("lo") };
	struct in6_pktinfo from = { .ipi6_addr = in6addr_loopback };

	show("where from", setsockopt(s, IPPROTO_IPV6, IPV6_PKTINFO, &from, sizeof(from)));
	show("nowhere", setsockopt(s, IPPROTO_IPV6, IPV6_PKTINFO, NULL, 0));
	inet_pton(AF_INET6, "ff01::114", &member.ipv6mr_multiaddr);
	group.sin6_addr = member.ipv6mr_multiaddr;
	group.sin6_scope_id = member.ipv6mr_interface;
	option(s, IPPROTO_IPV6, IPV6_MULTICAST_IF, member.ipv6mr_interface, "IPV6_MULTICAST_IF");
	show("no interface", setsockopt(s, IPPROTO_IPV6, IPV6_MULTICAST_IF, &(int){ 99999 }, 4));
	show("bind", bind(s, (struct sockaddr *)&group, sizeof(group)));
	show("join", setsockopt(s, IPPROTO_IPV6, IPV6_JOIN_GROUP, &member, sizeof(member)));
	show("again", setsockopt(s, IPPROTO_IPV6, IPV6_JOIN_GROUP, &member, sizeof(member)));
	show("leave", setsockopt(s, IPPROTO_IPV6, IPV6_LEAVE_GROUP, &member, sizeof(member)));
	close(s);
}

int main(void)
{
	struct ifreq r = { .ifr_name = "lo" };
	int s = socket(AF_INET, SOCK_DGRAM, 0);

	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(60);
	tcp(AF_INET);
	tcp(AF_INET6);
	udp();
	multicast();
	show("seqpacket", socket(AF_INET, SOCK_SEQPACKET, 0));
	show("tcp as dgram", socket(AF_INET, SOCK_DGRAM, IPPROTO_TCP));
	show("raw 0", socket(AF_INET, SOCK_RAW, 0));
	show("SIOCGIFINDEX", ioctl(s, SIOCGIFINDEX, &r));
	printf("index %d\n", r.ifr_ifindex);
	show("SIOCGIFADDR", ioctl(s, SIOCGIFADDR, &r));
	printf("address %s\n", inet_ntoa(((struct sockaddr_in *)&r.ifr_addr)->sin_addr));
	show("SIOCGIFFLAGS", ioctl(s, SIOCGIFFLAGS, &r));
	printf("flags %x\n", r.ifr_flags);
	strcpy(r.ifr_name, "nothere");
	show("SIOCGIFINDEX of none", ioctl(s, SIOCGIFINDEX, &r));
	return 0;
}
