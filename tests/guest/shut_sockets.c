/* Ends and edges of sockets: what a shutdown, an empty read and a sender that nobody asked about look like. */
#include "proc_check.h"
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

static void *shuts(void *fd)
{
	nap(100);
	CHECK(shutdown(*(int *)fd, SHUT_RD) == 0);
	return NULL;
}

/* After shutdown(2) nobody waits for a datagram; those who would not have waited get the same errno as ever. */
static void datagrams(void)
{
	struct sockaddr_in me = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(me);
	int fd = socket(AF_INET, SOCK_DGRAM, 0), other = socket(AF_INET, SOCK_DGRAM, 0);
	pthread_t thread;
	char byte;

	CHECK(bind(other, (void *)&me, sizeof(me)) == 0 && getsockname(other, (void *)&me, &length) == 0);
	FAILS(recv(fd, &byte, 1, MSG_DONTWAIT), EAGAIN);
	FAILS(setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &length, sizeof(length)), ENOENT);
	CHECK(connect(fd, (void *)&me, sizeof(me)) == 0);
	CHECK(pthread_create(&thread, NULL, shuts, &fd) == 0);
	CHECK(recv(fd, &byte, 1, 0) == 0); /* sleeps until the other thread shuts it down */
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(read(fd, &byte, 1) == 0 && recv(fd, &byte, 1, 0) == 0);
	FAILS(recv(fd, &byte, 1, MSG_DONTWAIT), EAGAIN);
	CHECK(connect(fd, (void *)&me, sizeof(me)) == 0 && recv(fd, &byte, 1, 0) == 0);
	close(fd);
	close(other);
}

/* No room is no reason for recvmsg(2) to find an end; for read(2) it is. */
static void no_room(void)
{
	struct msghdr message = { .msg_name = NULL };
	int ends[2];

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
	FAILS(recvmsg(ends[0], &message, MSG_DONTWAIT), EAGAIN);
	CHECK(read(ends[0], NULL, 0) == 0);
	CHECK(write(ends[1], "x", 1) == 1);
	CHECK(recvmsg(ends[0], &message, MSG_DONTWAIT) == 0);
	close(ends[0]);
	close(ends[1]);
}

/* A datagram carries who sent it when either end asked by then; a listener is its own peer. */
static void credentials(void)
{
	char room[CMSG_SPACE(sizeof(struct ucred))], byte;
	struct iovec iov = { &byte, 1 };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	struct ucred *sender = (void *)CMSG_DATA((struct cmsghdr *)room), peer;
	socklen_t length = sizeof(peer);
	int ends[2], on = 1, fd;

	CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) == 0);
	CHECK(write(ends[1], "x", 1) == 1);
	CHECK(setsockopt(ends[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) == 0);
	CHECK(recvmsg(ends[0], &message, 0) == 1);
	CHECK(sender->pid == 0 && sender->uid == 65534 && sender->gid == 65534);
	CHECK(write(ends[1], "x", 1) == 1);
	CHECK(recvmsg(ends[0], &message, 0) == 1);
	CHECK(sender->pid == getpid() && sender->uid == getuid() && sender->gid == getgid());
	close(ends[0]);
	close(ends[1]);

	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	CHECK(bind(fd, (void *)&name, sizeof(sa_family_t)) == 0);
	CHECK(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0);
	CHECK(peer.pid == 0 && peer.uid == (uid_t)-1);
	CHECK(listen(fd, 1) == 0 && getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0);
	CHECK(peer.pid == getpid() && peer.uid == getuid());
	close(fd);
}

/* A connection that was reset before it was accepted is accepted, and tells its error then. */
static void reset_early(void)
{
	struct sockaddr_in me = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) }, peer;
	socklen_t length = sizeof(me);
	struct linger now = { 1, 0 };
	int listener = socket(AF_INET, SOCK_STREAM, 0), fd = socket(AF_INET, SOCK_STREAM, 0), got;
	char byte;

	CHECK(bind(listener, (void *)&me, sizeof(me)) == 0 && listen(listener, 1) == 0);
	CHECK(getsockname(listener, (void *)&me, &length) == 0 && connect(fd, (void *)&me, sizeof(me)) == 0);
	CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now)) == 0 && close(fd) == 0);
	nap(50);
	length = sizeof(peer);
	got = accept(listener, (void *)&peer, &length);
	CHECK(got >= 0 && peer.sin_family == AF_INET && peer.sin_addr.s_addr == me.sin_addr.s_addr && peer.sin_port);
	FAILS(read(got, &byte, 1), ECONNRESET);
	close(got);
	close(listener);
}

/* MSG_TRUNC on a stream counts and leaves the buffer alone, with MSG_PEEK the bytes too. */
static void counted(void)
{
	struct sockaddr_in me = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(me);
	int listener = socket(AF_INET, SOCK_STREAM, 0), fd = socket(AF_INET, SOCK_STREAM, 0), got;
	char bytes[8] = "-------";

	CHECK(bind(listener, (void *)&me, sizeof(me)) == 0 && listen(listener, 1) == 0);
	CHECK(getsockname(listener, (void *)&me, &length) == 0 && connect(fd, (void *)&me, sizeof(me)) == 0);
	got = accept(listener, NULL, NULL);
	CHECK(got >= 0 && write(fd, "abcdef", 6) == 6);
	CHECK(recv(got, bytes, 7, MSG_TRUNC | MSG_PEEK) == 6 && strcmp(bytes, "-------") == 0);
	CHECK(recv(got, bytes, 2, MSG_TRUNC) == 2 && strcmp(bytes, "-------") == 0);
	CHECK(recv(got, bytes, 7, 0) == 4 && strcmp(bytes, "cdef---") == 0);
	close(got);
	close(fd);
	close(listener);
}

/* CAP_NET_ADMIN may have buffers beyond net.core.rmem_max. */
static void forced(void)
{
	int ends[2], size = 300000, got = 0, on = -5;
	socklen_t length = sizeof(got);

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
	if (setsockopt(ends[0], SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)) == 0) {
		CHECK(getsockopt(ends[0], SOL_SOCKET, SO_RCVBUF, &got, &length) == 0 && got == 2 * size);
		CHECK(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) == 0);
		CHECK(getsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &got, &length) == 0 && got == 2 * size);
		CHECK(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUFFORCE, &on, sizeof(on)) == 0);
		CHECK(getsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &got, &length) == 0 && got == 4608);
	} else {
		CHECK(errno == EPERM);
	}
	close(ends[0]);
	close(ends[1]);
}

int main(void)
{
	datagrams();
	no_room();
	credentials();
	reset_early();
	counted();
	forced();
	puts("sockets end as Linux's do");
	return 0;
}
