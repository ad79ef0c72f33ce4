/* What the man pages say in passing: which of two errors wins, what a child inherits. */
#include "proc_check.h"
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>

static void mappings(void)
{
	int fd = memfd_create("file", 0);

	CHECK(fd >= 0 && ftruncate(fd, 4096) == 0);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_SHARED, 99, 0) == MAP_FAILED && errno == EBADF);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE | 1 << 9, fd, 0) == MAP_FAILED && errno == EOPNOTSUPP);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0) == MAP_FAILED && errno == EOPNOTSUPP);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE | MAP_NORESERVE, fd, 0) != MAP_FAILED);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED | 1 << 9, fd, 0) != MAP_FAILED);
	close(fd);
}

static void positions(void)
{
	char byte = 0;
	struct iovec v = { &byte, 1 };
	int ends[2], fd;

	CHECK(pipe(ends) == 0);
	FAILS(pread(ends[1], &byte, 1, 0), ESPIPE); /* before it is found not to be open for reading */
	FAILS(pwrite(ends[0], &byte, 1, 0), ESPIPE);
	FAILS(preadv(ends[1], &v, 1, 0), ESPIPE);
	FAILS(pwritev(ends[0], &v, 1, 0), ESPIPE);
	FAILS(preadv2(ends[1], &v, 1, -1, 0), EBADF);
	fd = open("/proc/self/exe", O_PATH);
	FAILS(pread(fd, &byte, 1, 0), EBADF);
	close(fd);
	close(ends[0]);
	close(ends[1]);
}

/* A child's default slack is what its parent's was. */
static void slack(void)
{
	pid_t child;

	CHECK(prctl(PR_SET_TIMERSLACK, 70000) == 0);
	child = fork();
	if (child == 0) {
		CHECK(prctl(PR_GET_TIMERSLACK) == 70000 && prctl(PR_SET_TIMERSLACK, 60000) == 0);
		CHECK(prctl(PR_SET_TIMERSLACK, 0) == 0 && prctl(PR_GET_TIMERSLACK) == 70000);
		_exit(0);
	}
	CHECK(status_of(child) == 0 && prctl(PR_SET_TIMERSLACK, 0) == 0 && prctl(PR_GET_TIMERSLACK) == 50000);
}

/* struct sched_attr without the clamps. */
struct attributes {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

#define DEADLINE 6
#define RESET_ON_FORK 1

static int set(pid_t pid, struct attributes *a)
{
	return syscall(SYS_sched_setattr, pid, a, 0);
}

static int child_is(int policy, int nice)
{
	struct sched_param param;
	pid_t child = fork();

	if (child == 0)
		_exit(sched_getscheduler(0) != policy || getpriority(PRIO_PROCESS, 0) != nice ||
		      sched_getparam(0, &param) || param.sched_priority);
	CHECK(child > 0);
	return status_of(child) == 0;
}

/* SCHED_RESET_ON_FORK keeps a real-time policy and a good nice value from the children; SCHED_DEADLINE needs it. */
static void schedules(void)
{
	struct sched_param param = { .sched_priority = 0 };
	struct attributes a = { sizeof(a), DEADLINE, 0, 0, 0, 10000000, 30000000, 0 }, got;
	siginfo_t info;
	pid_t child;

	CHECK(sched_setscheduler(0, SCHED_OTHER | SCHED_RESET_ON_FORK, &param) == 0);
	CHECK(sched_getscheduler(0) == (SCHED_OTHER | SCHED_RESET_ON_FORK));
	CHECK(setpriority(PRIO_PROCESS, 0, 4) == 0 && child_is(SCHED_OTHER, 4));
	if (sched_setscheduler(0, SCHED_OTHER, &param) == -1) {
		CHECK(errno == EPERM); /* only the privileged take it away again */
		return;
	}
	child = fork();
	if (child == 0)
		_exit(0);
	CHECK(waitid(P_PID, child, &info, WEXITED | WNOWAIT) == 0 && sched_getscheduler(child) == SCHED_OTHER);
	CHECK(status_of(child) == 0);
	FAILS(sched_getscheduler(child), ESRCH);
	param.sched_priority = 7;
	if (sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &param) == -1) {
		CHECK(errno == EPERM);
		return;
	}
	CHECK(child_is(SCHED_OTHER, 0));
	CHECK(syscall(SYS_sched_getattr, 0, &got, sizeof(got), 0) == 0 && got.policy == SCHED_RR && got.priority == 7);
	CHECK(got.flags == RESET_ON_FORK && got.nice == 0);
	a.deadline = 1000000;
	FAILS(set(0, &a), EINVAL); /* shorter than the runtime */
	a.deadline = 30000000;
	a.period = 20000000;
	FAILS(set(0, &a), EINVAL);
	a.period = 0;
	FAILS(syscall(SYS_sched_setattr, 0, &a, 1), EINVAL);
	FAILS(set(1 << 22, &a), ESRCH);
	CHECK(set(0, &a) == 0);
	CHECK(syscall(SYS_sched_getattr, 0, &got, sizeof(got), 0) == 0 && got.policy == DEADLINE && !got.flags);
	CHECK(got.runtime == 10000000 && got.deadline == 30000000 && got.period == 30000000);
	FAILS(fork(), EAGAIN);
	a.flags = RESET_ON_FORK;
	CHECK(set(0, &a) == 0 && child_is(SCHED_OTHER, 0));
	param.sched_priority = 0;
	CHECK(sched_setscheduler(0, SCHED_OTHER, &param) == 0);
}

static volatile sig_atomic_t told;

static void on_signal(int signo, siginfo_t *info, void *context)
{
	(void)signo;
	(void)context;
	told = info->si_value.sival_int;
}

static void *queued(void *unused)
{
	siginfo_t info = { .si_code = SI_QUEUE };

	(void)unused;
	info.si_value.sival_int = 777;
	CHECK(syscall(SYS_rt_sigqueueinfo, gettid(), SIGUSR1, &info) == 0);
	info.si_code = SI_USER;
	CHECK(syscall(SYS_rt_sigqueueinfo, gettid(), 0, &info) == 0);
	FAILS(syscall(SYS_rt_sigqueueinfo, getpid(), 0, &info), EPERM); /* its own number is the thread's */
	return NULL;
}

/* Any thread's number names its process. */
static void signal_by_thread(void)
{
	struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };
	pthread_t thread;

	CHECK(sigaction(SIGUSR1, &sa, NULL) == 0);
	CHECK(pthread_create(&thread, NULL, queued, NULL) == 0 && pthread_join(thread, NULL) == 0);
	CHECK(told == 777);
}

static volatile sig_atomic_t warnings;

static void on_limit(int signo, siginfo_t *info, void *context)
{
	(void)signo;
	(void)context;
	warnings += info->si_code == SI_KERNEL;
}

/* A warning at the soft limit, and the end at the hard one; a child has its own time and the same limits. */
static void processor_limit(void)
{
	int *seen = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), status;
	struct sigaction sa = { .sa_sigaction = on_limit, .sa_flags = SA_SIGINFO };
	struct rlimit limit = { 1, 2 };
	pid_t child = fork(), own;

	CHECK(seen != MAP_FAILED && child >= 0);
	if (child == 0) {
		CHECK(sigaction(SIGXCPU, &sa, NULL) == 0 && setrlimit(RLIMIT_CPU, &limit) == 0);
		own = fork();
		if (own == 0) {
			while (!warnings)
				;
			CHECK(getrlimit(RLIMIT_CPU, &limit) == 0 && limit.rlim_max == 2);
			*seen = limit.rlim_cur;
			for (;;)
				;
		}
		status = status_of(own);
		_exit(!(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && !warnings));
	}
	CHECK(status_of(child) == 0 && *seen == 2);
	munmap(seen, 4096);
}

/* What has no splice_read or splice_write says so at once, even when the pipe has nothing yet. */
static void splices(void)
{
	loff_t *fixed;
	int empty, ends[2], event = eventfd(0, 0), directory = open("/", O_RDONLY), file = open("/proc/self/exe", O_RDONLY);

	CHECK(pipe(ends) == 0);
	FAILS(splice(ends[0], NULL, event, NULL, 8, 0), EINVAL);
	FAILS(splice(event, NULL, ends[1], NULL, 8, 0), EINVAL);
	FAILS(splice(directory, NULL, ends[1], NULL, 8, 0), EINVAL);
	FAILS(sendfile(event, file, NULL, 8), EINVAL);
	FAILS(sendfile(ends[1], directory, NULL, 8), EINVAL);
	/* The offset is written back also when nothing moved. */
	fixed = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	empty = memfd_create("empty", 0);
	FAILS(sendfile(ends[1], empty, fixed, 8), EFAULT);
	FAILS(splice(empty, fixed, ends[1], NULL, 8, 0), EFAULT);
	CHECK(copy_file_range(empty, fixed, file = memfd_create("other", 0), NULL, 8, 0) == 0);
	munmap(fixed, 4096);
	close(empty);
	close(ends[0]);
	close(ends[1]);
	close(event);
	close(directory);
	close(file);
}

static void pairs(void)
{
	int fds[2];

	FAILS(socketpair(AF_INET, SOCK_STREAM, 0, fds), EOPNOTSUPP);
	FAILS(socketpair(AF_INET, SOCK_DGRAM, IPPROTO_TCP, fds), EPROTONOSUPPORT);
	FAILS(socketpair(AF_INET6, SOCK_STREAM, IPPROTO_ICMP, fds), EPROTONOSUPPORT);
	FAILS(socketpair(AF_UNIX, SOCK_STREAM, 17, fds), EPROTONOSUPPORT);
}

/* vmsplice gives what fits; the rest is for the next call. */
static void memory_to_pipe(void)
{
	static char data[100000], got[sizeof(data)];
	struct iovec v[2] = { { data, 10 }, { data + 10, sizeof(data) - 10 } };
	int ends[2], room;
	ssize_t n;

	memset(data, 'x', sizeof(data));
	memcpy(data, "beginning, and on", 17);
	CHECK(pipe(ends) == 0);
	room = fcntl(ends[1], F_GETPIPE_SZ);
	n = vmsplice(ends[1], v, 2, 0);
	CHECK(n > 10 && n <= room && room < (int)sizeof(data));
	FAILS(vmsplice(ends[1], v, 2, SPLICE_F_NONBLOCK), EAGAIN);
	CHECK(read(ends[0], got, sizeof(got)) == n && memcmp(got, data, n) == 0);
	FAILS(vmsplice(ends[1], &(struct iovec){ (void *)16, 8 }, 1, 0), EFAULT);
	close(ends[0]);
	signal(SIGPIPE, SIG_IGN);
	FAILS(vmsplice(ends[1], v, 2, 0), EPIPE);
	close(ends[1]);
}

/* A word for each page: which are there. The frame numbers are nobody's business. */
static void page_map(void)
{
	char *pages = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int fd = open("/proc/self/pagemap", O_RDONLY), clear;
	uint64_t words[3];
	off_t at = (uintptr_t)pages / 4096 * 8;

	CHECK(fd >= 0 && pages != MAP_FAILED && madvise(pages, 8 << 20, MADV_NOHUGEPAGE) == 0);
	pages[0] = 1;
	CHECK(pread(fd, words, 8, at) == 8 && words[0] >> 63 && !(words[0] >> 61 & 3) && words[0] >> 56 & 1);
	CHECK(munmap(pages, 4096) == 0);
	CHECK(pread(fd, words, 8, at) == 8 && !words[0]);
	CHECK(shared != MAP_FAILED);
	*shared = 1;
	CHECK(pread(fd, words, 8, (uintptr_t)shared / 4096 * 8) == 8 && words[0] >> 63 && (words[0] >> 61 & 3) == 1);
	CHECK(pread(fd, words, sizeof(words), (uintptr_t)words / 4096 * 8) == sizeof(words) && words[0] >> 63);
	FAILS(pread(fd, words, 8, at + 1), EINVAL);
	FAILS(pread(fd, words, 7, at), EINVAL);
	CHECK(pread(fd, words, 8, 1L << 60) == 0);
	munmap(pages + 4096, (8 << 20) - 4096);
	munmap(shared, 4096);
	close(fd);
	clear = open("/proc/self/clear_refs", O_WRONLY);
	CHECK(clear >= 0 && pwrite(clear, "4\n", 2, 0) == 2 && pwrite(clear, "5", 1, 0) == 1);
	FAILS(pwrite(clear, "0", 1, 0), EINVAL);
	FAILS(pwrite(clear, "6", 1, 0), EINVAL);
	FAILS(pwrite(clear, "x", 1, 0), EINVAL);
	close(clear);
}

int main(void)
{
	page_map();
	memory_to_pipe();
	splices();
	pairs();
	processor_limit();
	signal_by_thread();
	mappings();
	positions();
	slack();
	schedules();
	puts("as the man pages say");
	return 0;
}
