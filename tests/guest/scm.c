/* Ancillary data of Unix sockets: descriptors in flight, credentials, what does not fit, cycles. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static long show(const char *what, long n)
{
	printf("%s: %ld%s%s\n", what, n, n < 0 ? " " : "", n < 0 ? strerrorname_np(errno) : "");
	return n;
}

static ssize_t send_fds(int s, const char *text, int *fds, int count, struct ucred *creds)
{
	char control[CMSG_SPACE(300 * sizeof(int)) + CMSG_SPACE(sizeof(*creds))] = { 0 };
	struct iovec iov = { (char *)text, strlen(text) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control };
	struct cmsghdr *c = (struct cmsghdr *)control;

	if (count) {
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(c), fds, count * sizeof(int));
		m.msg_controllen += CMSG_SPACE(count * sizeof(int));
		c = (struct cmsghdr *)(control + m.msg_controllen);
	}
	if (creds) {
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_CREDENTIALS;
		c->cmsg_len = CMSG_LEN(sizeof(*creds));
		memcpy(CMSG_DATA(c), creds, sizeof(*creds));
		m.msg_controllen += CMSG_SPACE(sizeof(*creds));
	}
	return sendmsg(s, &m, MSG_NOSIGNAL);
}

/* Receives up to `room` bytes with `control` bytes of room; tells and closes what came. */
static void take(int s, int room, int control_room, int flags)
{
	char control[2048] = { 0 }, buf[256];
	struct iovec iov = { buf, room };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control_room ? control : NULL,
			    .msg_controllen = control_room };
	ssize_t n = recvmsg(s, &m, flags | MSG_DONTWAIT);

	if (n < 0) {
		printf("recvmsg: %s\n", strerrorname_np(errno));
		return;
	}
	printf("recvmsg: %zd '%.*s' flags %x control %zu", n, (int)n, buf, m.msg_flags, m.msg_controllen);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		printf(" [type %d len %zu", c->cmsg_type, c->cmsg_len);
		if (c->cmsg_type == SCM_RIGHTS) {
			int count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			int *fds = (int *)CMSG_DATA(c);

			printf(" cloexec %d", fcntl(fds[0], F_GETFD));
			for (int i = 0; i < count; i++)
				if (close(fds[i]))
					printf(" BAD");
		} else {
			struct ucred *u = (struct ucred *)CMSG_DATA(c);

			printf(" pid %s uid %d gid %d", u->pid == getpid() ? "mine" : u->pid == 0 ? "none" : "other",
			       u->uid, u->gid);
		}
		printf("]");
	}
	printf("\n");
}

static int lowest(void)
{
	int fd = dup(0);

	close(fd);
	return fd;
}

int main(void)
{
	int p[2], q[2], fds[300], one = 1, before = lowest(), i;
	struct ucred me = { getpid(), getuid(), getgid() }, u;
	socklen_t size = sizeof(u);
	char c;

	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(30);
	socketpair(AF_UNIX, SOCK_STREAM, 0, p);
	pipe(q);
	for (i = 0; i < 300; i++)
		fds[i] = q[1];
	show("three files", send_fds(p[0], "abc", fds, 3, NULL));
	take(p[1], 256, 1024, 0);
	show("one file", send_fds(p[0], "xyz", fds, 1, NULL));
	take(p[1], 1, 1024, MSG_CMSG_CLOEXEC);
	take(p[1], 256, 1024, 0);
	show("no room", send_fds(p[0], "none", fds, 2, NULL));
	take(p[1], 256, 0, 0);
	show("room for one", send_fds(p[0], "one", fds, 2, NULL));
	take(p[1], 256, CMSG_LEN(sizeof(int)), 0);
	show("peek", send_fds(p[0], "peek", fds, 2, NULL));
	take(p[1], 256, 1024, MSG_PEEK);
	take(p[1], 256, 1024, 0);
	write(p[0], "plain", 5);
	send_fds(p[0], "with", fds, 1, NULL);
	write(p[0], "after", 5);
	take(p[1], 256, 1024, 0);
	take(p[1], 256, 1024, 0);
	send_fds(p[0], "dropped", fds, 1, NULL);
	show("read drops files", read(p[1], (char[16]){ 0 }, 16));
	show("too many", send_fds(p[0], "many", fds, 254, NULL));
	fds[1] = 999;
	show("bad file", send_fds(p[0], "bad", fds, 2, NULL));
	fds[1] = q[1];

	close(q[1]);
	fds[0] = q[0];
	send_fds(p[0], "pipe", fds, 1, NULL);
	close(q[0]);
	take(p[1], 256, 1024, 0);

	printf("-- credentials\n");
	getsockopt(p[0], SOL_SOCKET, SO_PEERCRED, &u, &size);
	printf("peer %s %d %d\n", u.pid == getpid() ? "mine" : "other", u.uid, u.gid);
	write(p[0], "early", 5);
	setsockopt(p[1], SOL_SOCKET, SO_PASSCRED, &one, sizeof(one));
	write(p[0], "later", 5);
	take(p[1], 256, 1024, 0);
	take(p[1], 256, 1024, 0);
	show("explicit", send_fds(p[0], "me", NULL, 0, &me));
	take(p[1], 256, 1024, 0);
	if (!fork()) {
		write(p[0], "child", 5);
		_exit(0);
	}
	wait(NULL);
	write(p[0], "parent", 6);
	take(p[1], 256, 1024, 0);
	take(p[1], 256, 1024, 0);
	socketpair(AF_UNIX, SOCK_DGRAM, 0, q);
	setsockopt(q[1], SOL_SOCKET, SO_PASSCRED, &one, sizeof(one));
	write(q[0], "dgram", 5);
	take(q[1], 256, 1024, 0);
	if (!fork()) {
		setgid(65534);
		setuid(65534);
		me.pid = getpid();
		show("a lie", send_fds(p[0], "lie", NULL, 0, &(struct ucred){ getpid(), 0, 0 }));
		me.uid = me.gid = 65534;
		show("the truth", send_fds(p[0], "me", NULL, 0, &me));
		fflush(stdout);
		_exit(0);
	}
	wait(NULL);
	take(p[1], 256, 1024, 0);
	close(q[0]);
	close(q[1]);
	close(p[0]);
	close(p[1]);

	printf("-- cycles\n");
	for (i = 0; i < 200; i++) { /* a pipe's end inside the cycle tells when it is gone */
		pipe(fds);
		socketpair(AF_UNIX, SOCK_STREAM, 0, p);
		socketpair(AF_UNIX, SOCK_DGRAM, 0, q);
		send_fds(p[0], "a", (int[]){ q[1], fds[1] }, 2, NULL);
		send_fds(q[0], "b", (int[]){ p[1] }, 1, NULL);
		close(p[0]);
		close(p[1]);
		close(q[0]);
		close(q[1]);
		close(fds[1]);
		if (i == 199)
			show("end of the pipe", read(fds[0], &c, 1));
		close(fds[0]);
	}
	socketpair(AF_UNIX, SOCK_STREAM, 0, p); /* a deep chain, each in the one before */
	for (i = 0; i < 400; i++) {
		socketpair(AF_UNIX, SOCK_STREAM, 0, q);
		send_fds(q[0], "c", (int[]){ p[1] }, 1, NULL);
		close(p[1]);
		close(p[0]);
		p[0] = q[0];
		p[1] = q[1];
	}
	close(p[0]);
	close(p[1]);
	printf("descriptors left %d\n", lowest() - before);
	return 0;
}
