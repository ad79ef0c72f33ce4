/* POSIX message queues: order, limits, sleeping, time-outs, readiness, notification, the file system. */
#include "proc_check.h"
#include <fcntl.h>
#include <mqueue.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

static char name[32];

static mqd_t make(long count, long size, int flags)
{
	struct mq_attr attr = { .mq_maxmsg = count, .mq_msgsize = size };
	mqd_t queue = mq_open(name, O_CREAT | O_RDWR | flags, 0600, &attr);

	CHECK(queue >= 0);
	return queue;
}

static void names(void)
{
	struct mq_attr attr = { .mq_maxmsg = 0, .mq_msgsize = 10 };
	char longer[300];
	struct stat st;
	mqd_t queue;

	FAILS(mq_open(name, O_RDWR), ENOENT);
	FAILS(mq_unlink(name), ENOENT);
	FAILS(mq_open("/a/b", O_RDWR | O_CREAT, 0600, NULL), EACCES);
	FAILS(syscall(SYS_mq_open, "", O_RDWR | O_CREAT, 0600, NULL), ENOENT);
	FAILS(syscall(SYS_mq_open, ".", O_RDWR | O_CREAT, 0600, NULL), EACCES);
	FAILS(syscall(SYS_mq_open, NULL, O_RDWR | O_CREAT, 0600, NULL), EFAULT);
	memset(longer, 'x', sizeof(longer));
	longer[0] = '/';
	longer[280] = 0;
	FAILS(mq_open(longer, O_RDWR | O_CREAT, 0600, NULL), ENAMETOOLONG);
	FAILS(mq_open(name, O_RDWR | O_CREAT, 0600, &attr), EINVAL);
	attr.mq_maxmsg = 70000;
	FAILS(mq_open(name, O_RDWR | O_CREAT, 0600, &attr), EINVAL);
	attr.mq_maxmsg = -1;
	FAILS(mq_open(name, O_RDWR | O_CREAT, 0600, &attr), EINVAL);
	umask(022);
	queue = mq_open(name, O_CREAT | O_RDWR, 0666, NULL);
	CHECK(queue >= 0);
	CHECK(fstat(queue, &st) == 0 && st.st_size == 80 && (st.st_mode & 0777) == 0644 && S_ISREG(st.st_mode));
	CHECK(fcntl(queue, F_GETFD) == FD_CLOEXEC);
	CHECK(mq_getattr(queue, &attr) == 0);
	printf("default %ld messages of %ld bytes\n", attr.mq_maxmsg, attr.mq_msgsize);
	FAILS(mq_open(name, O_CREAT | O_EXCL | O_RDWR, 0600, NULL), EEXIST);
	FAILS(mq_open(name, O_CREAT | O_ACCMODE, 0600, NULL), EINVAL);
	CHECK(mq_unlink(name) == 0);
	FAILS(mq_open(name, O_RDWR), ENOENT);
	CHECK(mq_send(queue, "still", 5, 0) == 0);
	CHECK(mq_close(queue) == 0);
	FAILS(mq_close(queue), EBADF);
}

static void order(void)
{
	mqd_t queue = make(5, 16, O_NONBLOCK), reader, writer;
	char text[32];
	unsigned int priority;
	struct mq_attr attr, before;
	int fd = open("/dev/null", O_RDWR);

	FAILS(mq_receive(queue, text, 16, NULL), EAGAIN);
	FAILS(mq_receive(queue, text, 15, NULL), EMSGSIZE);
	FAILS(mq_send(queue, text, 17, 0), EMSGSIZE);
	FAILS(mq_send(queue, text, 1, 32768), EINVAL);
	FAILS(mq_send(fd, text, 1, 0), EBADF);
	FAILS(mq_receive(fd, text, 16, NULL), EBADF);
	FAILS(mq_send(queue, (char *)8, 1, 0), EFAULT);
	CHECK(mq_send(queue, "one", 3, 1) == 0);
	CHECK(mq_send(queue, "two", 3, 7) == 0);
	CHECK(mq_send(queue, "three", 5, 1) == 0);
	CHECK(mq_send(queue, "", 0, 32767) == 0);
	CHECK(mq_send(queue, "four", 4, 7) == 0);
	FAILS(mq_send(queue, "full", 4, 0), EAGAIN);
	CHECK(mq_getattr(queue, &attr) == 0 && attr.mq_curmsgs == 5 && attr.mq_flags == O_NONBLOCK);
	CHECK(read(queue, text, 4) == 4 && memcmp(text, "QSIZ", 4) == 0);
	FAILS(write(queue, "x", 1), EINVAL);
	for (int i = 0; i < 5; i++) {
		ssize_t n = mq_receive(queue, text, sizeof(text), &priority);

		CHECK(n >= 0);
		printf("%.*s at %u\n", (int)n, text, priority);
	}
	reader = mq_open(name, O_RDONLY);
	writer = mq_open(name, O_WRONLY);
	FAILS(mq_send(reader, "x", 1, 0), EBADF);
	FAILS(mq_receive(writer, text, 16, NULL), EBADF);
	attr.mq_flags = 1;
	FAILS(mq_setattr(reader, &attr, NULL), EINVAL);
	attr.mq_flags = O_NONBLOCK;
	CHECK(mq_setattr(reader, &attr, &before) == 0 && before.mq_flags == 0 && before.mq_maxmsg == 5);
	CHECK(fcntl(reader, F_GETFL) & O_NONBLOCK);
	FAILS(mq_getattr(fd, &attr), EBADF);
	CHECK(mq_unlink(name) == 0);
	close(fd), mq_close(reader), mq_close(writer), mq_close(queue);
}

static void on_alarm(int signo)
{
}

static void sleeping(void)
{
	mqd_t queue = make(1, 8, 0);
	struct timespec soon, bad = { 0, 1000000000 };
	char text[8];
	unsigned int priority;
	pid_t child;

	clock_gettime(CLOCK_REALTIME, &soon);
	FAILS(mq_timedreceive(queue, text, 8, NULL, &bad), EINVAL);
	FAILS(mq_timedreceive(queue, text, 8, NULL, &soon), ETIMEDOUT);
	soon.tv_nsec += 20000000;
	soon.tv_sec += soon.tv_nsec / 1000000000;
	soon.tv_nsec %= 1000000000;
	FAILS(mq_timedreceive(queue, text, 8, NULL, &soon), ETIMEDOUT);
	CHECK(mq_send(queue, "a", 1, 3) == 0);
	FAILS(mq_timedsend(queue, "b", 1, 9, &soon), ETIMEDOUT);
	handle(SIGALRM, on_alarm, 0);
	ualarm(20000, 0);
	FAILS(mq_send(queue, "b", 1, 9), EINTR);
	child = fork();
	if (child == 0) {
		CHECK(mq_send(queue, "late", 4, 9) == 0); /* sleeps: full */
		CHECK(mq_send(queue, "later", 5, 1) == 0);
		_exit(0);
	}
	nap(30);
	CHECK(mq_receive(queue, text, 8, &priority) == 1 && priority == 3);
	CHECK(mq_receive(queue, text, 8, &priority) == 4 && priority == 9);
	CHECK(mq_receive(queue, text, 8, &priority) == 5 && priority == 1);
	CHECK(status_of(child) == 0);
	child = fork();
	if (child == 0) {
		nap(30);
		CHECK(mq_send(queue, "hand", 4, 2) == 0);
		_exit(0);
	}
	CHECK(mq_receive(queue, text, 8, &priority) == 4 && memcmp(text, "hand", 4) == 0);
	CHECK(status_of(child) == 0);
	CHECK(mq_unlink(name) == 0);
	mq_close(queue);
}

static void readiness(void)
{
	mqd_t queue = make(1, 8, 0);
	struct pollfd p = { .fd = queue, .events = POLLIN | POLLOUT };
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.fd = queue };
	int epoll = epoll_create1(0);
	char text[8];
	pid_t child;

	CHECK(poll(&p, 1, 0) == 1 && p.revents == POLLOUT);
	CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, queue, &event) == 0);
	CHECK(epoll_wait(epoll, &event, 1, 0) == 0);
	child = fork();
	if (child == 0) {
		nap(20);
		CHECK(mq_send(queue, "x", 1, 0) == 0);
		_exit(0);
	}
	CHECK(epoll_wait(epoll, &event, 1, 5000) == 1 && event.events == EPOLLIN);
	CHECK(status_of(child) == 0);
	CHECK(poll(&p, 1, 0) == 1 && p.revents == POLLIN);
	CHECK(mq_receive(queue, text, 8, NULL) == 1);
	CHECK(epoll_wait(epoll, &event, 1, 0) == 0);
	CHECK(mq_unlink(name) == 0);
	close(epoll);
	mq_close(queue);
}

static volatile sig_atomic_t told, code, value, sender;

static void on_message(int signo, siginfo_t *info, void *context)
{
	told++;
	code = info->si_code;
	value = info->si_value.sival_int;
	sender = info->si_pid;
}

static int piped[2];

static void in_thread(union sigval v)
{
	char c = v.sival_int;

	CHECK(write(piped[1], &c, 1) == 1);
}

static void notification(void)
{
	mqd_t queue = make(4, 8, 0), second;
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 77 };
	struct sigaction sa = { .sa_sigaction = on_message, .sa_flags = SA_SIGINFO };
	struct pollfd p;
	char text[8], c;
	pid_t child;

	CHECK(sigaction(SIGRTMIN + 1, &sa, NULL) == 0);
	CHECK(mq_notify(queue, &event) == 0);
	FAILS(mq_notify(queue, &event), EBUSY);
	CHECK(mq_send(queue, "x", 1, 0) == 0);
	CHECK(told == 1 && code == SI_MESGQ && value == 77 && sender == getpid());
	CHECK(mq_notify(queue, &event) == 0); /* not empty: only an arrival in an empty queue counts */
	CHECK(mq_send(queue, "y", 1, 0) == 0 && told == 1);
	CHECK(mq_receive(queue, text, 8, NULL) == 1 && mq_receive(queue, text, 8, NULL) == 1);
	CHECK(mq_notify(queue, NULL) == 0);
	CHECK(mq_send(queue, "x", 1, 0) == 0 && told == 1);
	CHECK(mq_receive(queue, text, 8, NULL) == 1);
	/* closing any descriptor of the queue unregisters */
	CHECK(mq_notify(queue, &event) == 0);
	second = dup(queue);
	CHECK(close(second) == 0);
	CHECK(mq_notify(queue, &event) == 0);
	/* another process's close and exit do not */
	child = fork();
	if (child == 0) {
		CHECK(close(queue) == 0);
		_exit(0);
	}
	CHECK(status_of(child) == 0);
	FAILS(mq_notify(queue, &event), EBUSY);
	/* a receiver that sleeps takes the message, nobody is told */
	child = fork();
	if (child == 0) {
		CHECK(mq_receive(queue, text, 8, NULL) == 1);
		_exit(0);
	}
	nap(30);
	CHECK(mq_send(queue, "x", 1, 0) == 0);
	CHECK(status_of(child) == 0 && told == 1);
	CHECK(mq_send(queue, "x", 1, 0) == 0 && told == 2);
	CHECK(mq_receive(queue, text, 8, NULL) == 1);
	/* a thread */
	CHECK(pipe(piped) == 0);
	event.sigev_notify = SIGEV_THREAD;
	event.sigev_notify_function = in_thread;
	event.sigev_notify_attributes = NULL;
	event.sigev_value.sival_int = 42;
	if (mq_notify(queue, &event) == 0) {
		CHECK(mq_send(queue, "x", 1, 0) == 0);
		p.fd = piped[0], p.events = POLLIN;
		CHECK(poll(&p, 1, 5000) == 1 && read(piped[0], &c, 1) == 1 && c == 42);
		CHECK(mq_receive(queue, text, 8, NULL) == 1);
		CHECK(mq_notify(queue, &event) == 0);
		CHECK(mq_notify(queue, NULL) == 0);
		puts("a thread was told");
	}
	event.sigev_notify = SIGEV_SIGNAL;
	event.sigev_signo = 65;
	FAILS(syscall(SYS_mq_notify, queue, &event), EINVAL);
	event.sigev_notify = 9;
	FAILS(syscall(SYS_mq_notify, queue, &event), EINVAL);
	FAILS(mq_notify(0, NULL), EBADF);
	CHECK(mq_unlink(name) == 0);
	mq_close(queue);
}

static void limits(void)
{
	struct rlimit limit = { 1000, 819200 };
	struct mq_attr attr = { .mq_maxmsg = 10, .mq_msgsize = 1000 };
	mqd_t queue;

	CHECK(setrlimit(RLIMIT_MSGQUEUE, &limit) == 0);
	FAILS(mq_open(name, O_CREAT | O_RDWR, 0600, &attr), EMFILE);
	limit.rlim_cur = 10 * 1000 + 10 * 48 + 10 * 48;
	CHECK(setrlimit(RLIMIT_MSGQUEUE, &limit) == 0);
	queue = mq_open(name, O_CREAT | O_RDWR, 0600, &attr);
	CHECK(queue >= 0);
	CHECK(mq_unlink(name) == 0);
	FAILS(mq_open(name, O_CREAT | O_RDWR, 0600, &attr), EMFILE); /* open, so it counts */
	mq_close(queue);
	queue = mq_open(name, O_CREAT | O_RDWR, 0600, &attr);
	CHECK(queue >= 0);
	CHECK(mq_unlink(name) == 0);
	mq_close(queue);
}

static void file_system(void)
{
	char place[] = "/tmp/mqueue.XXXXXX", path[128];
	mqd_t queue = make(4, 8, 0);
	struct stat st;
	char text[100];
	int fd;

	CHECK(mkdtemp(place));
	if (mount("queues", place, "mqueue", 0, NULL) == 0) {
		snprintf(path, sizeof(path), "%s%s", place, name);
		CHECK(stat(path, &st) == 0 && st.st_size == 80);
		CHECK(mq_send(queue, "abc", 3, 0) == 0);
		fd = open(path, O_RDONLY);
		CHECK(fd >= 0);
		memset(text, 0, sizeof(text));
		CHECK(read(fd, text, sizeof(text)) > 0);
		printf("%s", text);
		CHECK(mq_receive(fd, text, 8, NULL) == 3);
		close(fd);
		CHECK(unlink(path) == 0);
		FAILS(mq_open(name, O_RDWR), ENOENT);
		FAILS(mkdir(path, 0700), EPERM);
		fd = open(path, O_CREAT | O_WRONLY, 0600);
		CHECK(fd >= 0);
		close(fd);
		CHECK(mq_unlink(name) == 0);
		FAILS(stat(path, &st), ENOENT);
		CHECK(umount(place) == 0);
		puts("mounted");
	} else {
		CHECK(mq_unlink(name) == 0);
	}
	CHECK(rmdir(place) == 0);
	mq_close(queue);
}

int main(void)
{
	snprintf(name, sizeof(name), "/kvmsentry-%d", getpid());
	names();
	order();
	sleeping();
	readiness();
	notification();
	file_system();
	limits();
	puts("messages in queues");
	return 0;
}
