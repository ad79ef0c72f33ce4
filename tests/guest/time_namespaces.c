/* Time namespaces: time_namespaces(7). Who comes in when, what the clocks are ahead, and who may write the offsets. */
#include "proc_check.h"
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/timerfd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif
#define DAY 86400
#define MONOTONIC_AHEAD (10 * DAY)
#define BOOTTIME_AHEAD (20 * DAY)

extern char **environ;
static struct timespec before; /* CLOCK_BOOTTIME where we began */
static const clockid_t clocks[] = { CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE, CLOCK_BOOTTIME };

static long seconds_of(clockid_t clock, int by_call)
{
	struct timespec now;

	CHECK(!(by_call ? syscall(SYS_clock_gettime, clock, &now) : clock_gettime(clock, &now)));
	return now.tv_sec;
}

/* Days that `clock` is ahead of where we began, for both ways to ask. */
static int days(clockid_t clock)
{
	int asked = (seconds_of(clock, 1) - before.tv_sec) / DAY, read = (seconds_of(clock, 0) - before.tv_sec) / DAY;

	CHECK(asked == read);
	return asked;
}

static int inside(void)
{
	return days(CLOCK_MONOTONIC) == 10 && days(CLOCK_BOOTTIME) == 20;
}

static int outside(void)
{
	return !days(CLOCK_MONOTONIC) && !days(CLOCK_BOOTTIME);
}

static long put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), error;
	long done;

	CHECK(fd >= 0);
	done = write(fd, text, strlen(text));
	error = errno;
	close(fd);
	errno = error;
	return done;
}

static ino_t ns(const char *path)
{
	struct stat st;

	CHECK(!stat(path, &st));
	return st.st_ino;
}

static void *nothing(void *unused)
{
	return unused;
}

static long clone3(uint64_t flags)
{
	uint64_t args[8] = { flags, 0, 0, 0, flags & CLONE_VM ? 0 : SIGCHLD };

	return syscall(SYS_clone3, args, sizeof args);
}

static void offsets(void)
{
	static const char file[] = "/proc/self/timens_offsets";
	char text[128], line[128];
	struct timespec now;
	int fd;
	long n;

	FAILS(put(file, "monotonic 1 0"), EACCES); /* the first namespace's stand */
	CHECK(!unshare(CLONE_NEWTIME));
	CHECK(ns("/proc/self/ns/time") != ns("/proc/self/ns/time_for_children"));
	FAILS(put(file, "monotonic 1"), EINVAL);
	FAILS(put(file, "realtime 1 0"), EINVAL);
	FAILS(put(file, "0 1 0"), EINVAL);
	FAILS(put(file, "monotonic 1 1000000000"), EINVAL);
	FAILS(put(file, ""), EINVAL);
	FAILS(put(file, "monotonic 9223372036 0"), ERANGE);
	FAILS(put(file, "monotonic -9223372037 0"), ERANGE);
	CHECK(!clock_gettime(CLOCK_MONOTONIC, &now));
	sprintf(line, "1 %ld 0", -now.tv_sec - 5);
	FAILS(put(file, line), ERANGE); /* before its beginning */
	CHECK(put(file, "boottime 2 500000000\nmonotonic 3 7\n") == 35);
	fd = open(file, O_RDWR);
	n = read(fd, text, sizeof text);
	CHECK(n > 0);
	CHECK(write(fd, "7 1 0", 5) == -1 && errno == EINVAL); /* not at the beginning */
	close(fd);
	printf("%.*s", (int)n, text);
	sprintf(line, "monotonic %d 0\nboottime %d 0\nnonsense", MONOTONIC_AHEAD, BOOTTIME_AHEAD);
	CHECK(put(file, line) == (long)(strlen(line) - strlen("nonsense")));
	puts("offsets");
}

static void in_child(void)
{
	struct timespec now, rest = { 0, 0 };
	struct itimerspec set = { { 0, 0 }, { 0, 0 } }, left;
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1 };
	struct sysinfo info;
	uint64_t ticks;
	int word = 0;
	double up;
	char text[512], *at;
	timer_t timer;
	FILE *file;

	for (unsigned i = 0; i < sizeof clocks / sizeof *clocks; i++)
		CHECK(days(clocks[i]) == (clocks[i] == CLOCK_BOOTTIME ? 20 : 10));
	CHECK(!sysinfo(&info) && (info.uptime - before.tv_sec) / DAY == 20);
	file = fopen("/proc/uptime", "r");
	CHECK(file && fscanf(file, "%lf", &up) == 1 && ((long)up - before.tv_sec) / DAY == 20);
	fclose(file);
	file = fopen("/proc/self/stat", "r");
	CHECK(file && fgets(text, sizeof text, file));
	at = strrchr(text, ')');
	for (int i = 2; i < 22; i++) /* field 22: start time */
		at = strchr(at + 1, ' ');
	fclose(file);
	CHECK((atol(at) / sysconf(_SC_CLK_TCK) - before.tv_sec) / DAY == 20);

	sigset_t mask;
	siginfo_t got;
	sigemptyset(&mask), sigaddset(&mask, SIGUSR1);
	CHECK(!sigprocmask(SIG_BLOCK, &mask, NULL));
	for (unsigned i = 0; i < 2; i++) {
		clockid_t clock = i ? CLOCK_BOOTTIME : CLOCK_MONOTONIC;

		CHECK(!clock_gettime(clock, &now));
		now.tv_sec++;
		set.it_value = now;
		int fd = timerfd_create(clock, 0);
		CHECK(fd >= 0 && !timerfd_settime(fd, TFD_TIMER_ABSTIME, &set, NULL));
		CHECK(!timerfd_gettime(fd, &left) && left.it_value.tv_sec <= 1);
		CHECK(!timer_create(clock, &event, &timer) && !timer_settime(timer, TIMER_ABSTIME, &set, NULL));
		CHECK(!timer_gettime(timer, &left) && left.it_value.tv_sec <= 1);
		CHECK(!clock_nanosleep(clock, TIMER_ABSTIME, &now, &rest));
		CHECK(!clock_gettime(clock, &left.it_value));
		CHECK(left.it_value.tv_sec >= now.tv_sec && left.it_value.tv_sec < now.tv_sec + 60);
		CHECK(read(fd, &ticks, 8) == 8 && ticks == 1);
		CHECK(sigwaitinfo(&mask, &got) == SIGUSR1 && got.si_code == SI_TIMER);
		set.it_value.tv_sec = 1, set.it_value.tv_nsec = 0; /* long before the beginning: has passed */
		CHECK(!timerfd_settime(fd, TFD_TIMER_ABSTIME, &set, NULL) && read(fd, &ticks, 8) == 8 && ticks == 1);
		CHECK(!timer_settime(timer, TIMER_ABSTIME, &set, NULL) && sigwaitinfo(&mask, &got) == SIGUSR1);
		CHECK(!clock_nanosleep(clock, TIMER_ABSTIME, &set.it_value, NULL));
		close(fd), timer_delete(timer);
	}
	CHECK(!clock_gettime(CLOCK_MONOTONIC, &now));
	now.tv_nsec = 0, now.tv_sec++;
	FAILS(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 0, &now, NULL, FUTEX_BITSET_MATCH_ANY), ETIMEDOUT);
	CHECK(seconds_of(CLOCK_MONOTONIC, 1) >= now.tv_sec);
	CHECK(ns("/proc/self/ns/time") == ns("/proc/self/ns/time_for_children"));
	FAILS(put("/proc/self/timens_offsets", "monotonic 0 0"), EACCES);
	pid_t pid = fork(); /* its children are here too, and nested ones begin with the same offsets */
	if (!pid) {
		CHECK(inside() && !unshare(CLONE_NEWTIME));
		pid = fork();
		if (!pid)
			_exit(!inside());
		CHECK(!status_of(pid));
		_exit(0);
	}
	CHECK(!status_of(pid));
	puts("child");
}

/* From outside: exec is where the new address space is. */
static void goes_with_exec(const char *program)
{
	char *argv[] = { (char *)program, "inside", NULL }, line[128];
	pid_t pid = fork(); /* so that we ourselves stay outside */

	CHECK(pid >= 0);
	if (!pid) {
		CHECK(!unshare(CLONE_NEWTIME));
		sprintf(line, "monotonic %d 0\nboottime %d 0", MONOTONIC_AHEAD, BOOTTIME_AHEAD);
		CHECK(put("/proc/self/timens_offsets", line) == (long)strlen(line));
		pid = vfork();
		if (!pid)
			_exit(!outside()); /* where its parent is: it has the parent's address space */
		CHECK(pid > 0 && !status_of(pid));
		CHECK(!posix_spawn(&pid, program, NULL, NULL, argv, environ));
		CHECK(!status_of(pid) && outside());
		execv(program, argv);
		_exit(1);
	}
	CHECK(!status_of(pid));
	puts("exec");
}

static void threads(void)
{
	pthread_t thread;
	int error = pthread_create(&thread, NULL, nothing, NULL);

	printf("a thread beside another namespace for children: %s\n", strerror(error));
	if (!error)
		CHECK(!pthread_join(thread, NULL));
}

static void entering(int home, int other)
{
	pid_t pid;

	CHECK(outside() && !setns(other, CLONE_NEWTIME) && inside());
	CHECK(!setns(home, 0) && outside());
	FAILS(setns(home, CLONE_NEWUTS), EINVAL);
	for (int i = 0; i < 100; i++)
		CHECK(!setns(i & 1 ? home : other, 0) && (i & 1 ? outside() : inside()));
	pid = fork();
	if (!pid) {
		CHECK(!setresuid(1000, 1000, 1000));
		FAILS(setns(other, CLONE_NEWTIME), EPERM);
		FAILS(unshare(CLONE_NEWTIME), EPERM);
		FAILS(clone3(CLONE_NEWTIME), EPERM);
		_exit(0);
	}
	CHECK(!status_of(pid));
	pid = clone3(CLONE_NEWTIME); /* comes in with its first breath */
	if (!pid) {
		CHECK(ns("/proc/self/ns/time") == ns("/proc/self/ns/time_for_children") && outside());
		FAILS(put("/proc/self/timens_offsets", "monotonic 0 0"), EACCES);
		_exit(0);
	}
	CHECK(pid > 0 && !status_of(pid));
	puts("entering");
}

int main(int argc, char **argv)
{
	int home, other;

	setvbuf(stdout, 0, _IONBF, 0);
	CHECK(!clock_gettime(CLOCK_BOOTTIME, &before));
	before.tv_sec -= 3600; /* clocks differ a little */
	if (argc > 1) { /* after exec: the offsets are part of what we began with */
		before.tv_sec -= BOOTTIME_AHEAD;
		return !inside();
	}
	home = open("/proc/self/ns/time", O_RDONLY);
	if (home < 0) {
		puts("no time namespaces here");
		return 4;
	}
	if (geteuid()) {
		puts("needs root");
		return 4;
	}
	offsets();
	CHECK(outside());
	threads();
	other = open("/proc/self/ns/time_for_children", O_RDONLY);
	CHECK(other >= 0);
	pid_t pid = fork();
	if (!pid) {
		in_child();
		_exit(0);
	}
	CHECK(!status_of(pid));
	CHECK(!setns(home, 0));
	entering(home, other);
	CHECK(outside());
	goes_with_exec("/proc/self/exe");
	return 0;
}
