/* Linux asynchronous I/O by its system calls: transfers, polls, cancelling, events taken by call and out of the ring. */
#include "proc_check.h"
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

struct ring {
	unsigned int id, nr, head, tail, magic, compat, incompat, header_length;
	struct io_event events[];
};

static aio_context_t context;

static long setup(unsigned int n, aio_context_t *c)
{
	return syscall(SYS_io_setup, n, c);
}

static long submit(long n, struct iocb **list)
{
	return syscall(SYS_io_submit, context, n, list);
}

static long events(long least, long most, struct io_event *e, struct timespec *t)
{
	return syscall(SYS_io_getevents, context, least, most, e, t);
}

static struct iocb request(int op, int fd, void *buf, size_t n, off_t offset)
{
	return (struct iocb){ .aio_lio_opcode = op, .aio_fildes = fd, .aio_buf = (uintptr_t)buf, .aio_nbytes = n,
			      .aio_offset = offset, .aio_data = 0x1234 };
}

/* Submits one, gives its result. */
static long one(struct iocb *r)
{
	struct io_event e;

	CHECK(submit(1, &r) == 1);
	CHECK(events(1, 1, &e, NULL) == 1);
	CHECK(e.data == 0x1234 && e.obj == (uintptr_t)r && e.res2 == 0);
	return e.res;
}

static void wrong(void)
{
	aio_context_t c = 1;
	struct iocb r = request(IOCB_CMD_PREAD, 99, NULL, 0, 0), *list = &r;
	struct io_event e;

	FAILS(setup(4, &c), EINVAL);
	c = 0;
	FAILS(setup(0, &c), EINVAL);
	FAILS(setup(4, (void *)8), EFAULT);
	FAILS(setup(1 << 30, &c), EINVAL);
	FAILS(setup(1 << 22, &c), EAGAIN);
	FAILS(syscall(SYS_io_destroy, 0), EINVAL);
	FAILS(syscall(SYS_io_destroy, &c), EINVAL);
	FAILS(submit(-1, &list), EINVAL);
	FAILS(submit(1, &list), EBADF);
	FAILS(submit(1, (void *)8), EFAULT);
	list = (void *)8;
	FAILS(submit(1, &list), EFAULT);
	CHECK(submit(0, NULL) == 0);
	FAILS(syscall(SYS_io_submit, 0, 1, &list), EINVAL);
	FAILS(events(2, 1, &e, NULL), EINVAL);
	FAILS(events(-1, 1, &e, NULL), EINVAL);
	list = &r;
	r.aio_fildes = 0;
	r.aio_lio_opcode = 6;
	FAILS(submit(1, &list), EINVAL);
	r.aio_lio_opcode = 99;
	FAILS(submit(1, &list), EINVAL);
	r.aio_lio_opcode = IOCB_CMD_PREAD;
	r.aio_reserved2 = 1;
	FAILS(submit(1, &list), EINVAL);
}

static void files(void)
{
	char path[] = "/tmp/aio.XXXXXX", text[32] = "";
	int fd = mkstemp(path), ro = open(path, O_RDONLY), efd = eventfd(0, 0);
	struct iocb r, a, b, c, *list[] = { &a, &b, &c };
	struct iovec iov[2] = { { text, 3 }, { text + 10, 3 } };
	struct io_event e[4];
	uint64_t n;

	CHECK(fd >= 0 && ro >= 0);
	r = request(IOCB_CMD_PWRITE, fd, "0123456789", 10, 5);
	CHECK(one(&r) == 10);
	CHECK(lseek(fd, 0, SEEK_CUR) == 0 && lseek(fd, 0, SEEK_END) == 15);
	r = request(IOCB_CMD_PREAD, ro, text, sizeof(text), 7);
	CHECK(one(&r) == 8 && memcmp(text, "23456789", 8) == 0);
	r = request(IOCB_CMD_PREAD, ro, text, sizeof(text), 100);
	CHECK(one(&r) == 0);
	r = request(IOCB_CMD_PREADV, ro, iov, 2, 5);
	CHECK(one(&r) == 6 && memcmp(text, "012", 3) == 0 && memcmp(text + 10, "345", 3) == 0);
	r = request(IOCB_CMD_PWRITEV, fd, iov, 2, 0);
	CHECK(one(&r) == 6);
	r = request(IOCB_CMD_FSYNC, fd, NULL, 0, 0);
	CHECK(one(&r) == 0);
	r = request(IOCB_CMD_FDSYNC, fd, NULL, 0, 0);
	CHECK(one(&r) == 0);
	r = request(IOCB_CMD_PREAD, ro, (void *)8, 10, 0);
	CHECK(one(&r) == -EFAULT);
	r = request(IOCB_CMD_PWRITE, ro, text, 1, 0);
	list[0] = &r;
	FAILS(submit(1, list), EBADF);
	r = request(IOCB_CMD_PREAD, ro, text, 1, -1);
	FAILS(submit(1, list), EINVAL);
	r = request(IOCB_CMD_FSYNC, fd, text, 0, 0);
	FAILS(submit(1, list), EINVAL);
	/* several, one bad: those before it are taken; the eventfd counts */
	list[0] = &a;
	a = request(IOCB_CMD_PREAD, ro, text, 4, 0);
	a.aio_flags = IOCB_FLAG_RESFD;
	a.aio_resfd = efd;
	b = a;
	c = request(IOCB_CMD_PREAD, 99, text, 4, 0);
	CHECK(submit(3, list) == 2);
	CHECK(read(efd, &n, 8) == 8 && n == 2);
	CHECK(events(0, 4, e, NULL) == 2 && e[0].obj == (uintptr_t)&a && e[1].obj == (uintptr_t)&b);
	a.aio_resfd = fd;
	FAILS(submit(1, list), EINVAL);
	a.aio_resfd = 99;
	FAILS(submit(1, list), EBADF);
	unlink(path);
	close(fd), close(ro), close(efd);
}

static void on_alarm(int signo)
{
}

static void polls(void)
{
	struct iocb r, *list = &r;
	struct io_event e;
	struct timespec soon = { 0, 20000000 }, none = { 0, 0 };
	int p[2], null = open("/etc/passwd", O_RDONLY);
	pid_t child;
	char c;

	CHECK(pipe(p) == 0);
	r = request(IOCB_CMD_POLL, p[0], (void *)POLLIN, 0, 0);
	CHECK(submit(1, &list) == 1);
	CHECK(events(1, 1, &e, &none) == 0);
	CHECK(events(1, 1, &e, &soon) == 0);
	CHECK(write(p[1], "x", 1) == 1);
	CHECK(events(1, 1, &e, NULL) == 1 && (e.res & POLLIN) && e.obj == (uintptr_t)&r);
	CHECK(one(&r) == POLLIN); /* ready already */
	CHECK(read(p[0], &c, 1) == 1);
	CHECK(submit(1, &list) == 1);
	child = fork();
	if (child == 0) {
		nap(20);
		CHECK(write(p[1], "y", 1) == 1);
		_exit(0);
	}
	CHECK(events(1, 1, &e, NULL) == 1 && (e.res & POLLIN));
	CHECK(status_of(child) == 0);
	CHECK(read(p[0], &c, 1) == 1);
	/* cancelling */
	FAILS(syscall(SYS_io_cancel, context, &r, &e), EINVAL);
	CHECK(submit(1, &list) == 1);
	FAILS(syscall(SYS_io_cancel, context, &r, &e), EINPROGRESS);
	CHECK(events(1, 1, &e, NULL) == 1 && e.obj == (uintptr_t)&r && e.res == 0);
	/* what can't be polled, and wrong fields */
	r = request(IOCB_CMD_POLL, null, (void *)POLLPRI, 0, 0);
	FAILS(submit(1, &list), EINVAL);
	r = request(IOCB_CMD_POLL, null, (void *)POLLIN, 0, 0);
	CHECK(one(&r) == POLLIN);
	r = request(IOCB_CMD_POLL, p[0], (void *)0x10001, 0, 0);
	FAILS(submit(1, &list), EINVAL);
	/* a signal ends the wait */
	handle(SIGALRM, on_alarm, SA_RESTART);
	ualarm(20000, 0);
	FAILS(events(1, 1, &e, NULL), EINTR);
	/* reads of a pipe */
	CHECK(write(p[1], "abc", 3) == 3);
	char text[4];
	r = request(IOCB_CMD_PREAD, p[0], text, 4, 0);
	CHECK(one(&r) == 3);
	close(p[0]), close(p[1]), close(null);
}

static void masked(void)
{
	struct {
		const void *mask;
		size_t size;
	} usig;
	uint64_t none = 0, all = ~0ULL;
	struct io_event e;
	struct timespec soon = { 0, 30000000 };

	usig.mask = &none, usig.size = 8;
	handle(SIGUSR1, on_alarm, 0);
	CHECK(syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, NULL, 8) == 0);
	kill(getpid(), SIGUSR1);
	FAILS(syscall(SYS_io_pgetevents, context, 1, 1, &e, NULL, &usig), EINTR);
	usig.size = 4;
	FAILS(syscall(SYS_io_pgetevents, context, 1, 1, &e, NULL, &usig), EINVAL);
	usig.size = 8;
	CHECK(syscall(SYS_io_pgetevents, context, 1, 1, &e, &soon, &usig) == 0);
	CHECK(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8) == 0);
}

/* As libaio, QEMU and fio do it. */
static void out_of_the_ring(void)
{
	struct ring *ring = (void *)context;
	struct iocb r = request(IOCB_CMD_PREAD, open("/dev/zero", O_RDONLY), &r, 0, 0), *list = &r;
	struct io_event e;
	char byte;

	CHECK(ring->magic == 0xa10a10a1 && ring->header_length == 32 && ring->incompat == 0 && ring->nr >= 8);
	CHECK(ring->head == ring->tail);
	r.aio_buf = (uintptr_t)&byte, r.aio_nbytes = 1;
	for (unsigned int i = 0; i < 3 * ring->nr; i++) {
		unsigned int head = ring->head;

		CHECK(submit(1, &list) == 1);
		CHECK(ring->tail == (head + 1) % ring->nr);
		CHECK(ring->events[head].obj == (uintptr_t)&r && ring->events[head].res == 1);
		if (i % 2)
			ring->head = (head + 1) % ring->nr;
		else
			CHECK(events(1, 1, &e, NULL) == 1);
	}
	/* full */
	long n = 0;
	while (submit(1, &list) == 1)
		n++;
	CHECK(errno == EAGAIN && n > 0);
	struct io_event *many = calloc(n, sizeof(*many));
	CHECK(events(n, n, many, NULL) == n && many[n - 1].res == 1);
	close(r.aio_fildes);
}

int main(void)
{
	aio_context_t other = 0;
	pid_t child;
	struct io_event e;

	CHECK(setup(8, &context) == 0 && context);
	wrong();
	files();
	polls();
	masked();
	out_of_the_ring();
	/* a child has none of it */
	child = fork();
	if (child == 0) {
		FAILS(events(0, 1, &e, NULL), EINVAL);
		CHECK(setup(8, &other) == 0);
		_exit(0);
	}
	CHECK(status_of(child) == 0);
	CHECK(setup(8, &other) == 0 && other != context);
	CHECK(syscall(SYS_io_destroy, other) == 0);
	FAILS(syscall(SYS_io_destroy, other), EINVAL);
	puts("asynchronous input and output");
	return 0;
}
