/* Timers with periods that no processor keeps up with: they must starve nobody, and count what was missed. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/mempolicy.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int bad;
static volatile sig_atomic_t ticks, alarms;
static timer_t timer;

#define CHECK(what, ok) do { if (!(ok)) { printf("FAILED line %d: %s (errno %d)\n", __LINE__, what, errno); bad = 1; } } while (0)

static void set(long interval, long value)
{
	struct itimerspec spec = { { 0, interval }, { 0, value } };

	CHECK("settime", !timer_settime(timer, 0, &spec, NULL));
}

static long left(long *interval)
{
	struct itimerspec spec;

	CHECK("gettime", !timer_gettime(timer, &spec));
	*interval = spec.it_interval.tv_nsec;
	return spec.it_value.tv_sec * 1000000000 + spec.it_value.tv_nsec;
}

static void on_tick(int signo, siginfo_t *info, void *context)
{
	if (++ticks == 300)
		set(0, 0);
}

static void on_alarm(int signo)
{
	struct itimerval off = { { 0, 0 }, { 0, 0 } };

	if (++alarms == 300)
		setitimer(ITIMER_REAL, &off, NULL);
}

static void nap(long ms)
{
	struct timespec left = { 0, ms * 1000000 };

	while (nanosleep(&left, &left) && errno == EINTR)
		;
}

static void storm(clockid_t clock, long period)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN };
	unsigned long spins = 0;

	ticks = 0;
	CHECK("create", !timer_create(clock, &event, &timer));
	set(period, 1);
	while (ticks < 300)
		spins++;
	CHECK("delete", !timer_delete(timer));
}

static void blocked(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN };
	struct timespec none = { 0, 0 };
	siginfo_t info;
	sigset_t set_;
	long interval, rest;

	sigemptyset(&set_);
	sigaddset(&set_, SIGRTMIN);
	sigprocmask(SIG_BLOCK, &set_, NULL);
	CHECK("create", !timer_create(CLOCK_MONOTONIC, &event, &timer));
	set(1000000, 1000000);
	nap(60);
	rest = left(&interval);
	CHECK("time left is within the period", rest > 0 && rest <= 1000000 && interval == 1000000);
	CHECK("taken", sigtimedwait(&set_, &info, &none) == SIGRTMIN);
	CHECK("missed ones are counted", info.si_code == SI_TIMER && info.si_overrun >= 50 && info.si_overrun < 50000);
	CHECK("the same", timer_getoverrun(timer) == info.si_overrun);
	nap(20);
	CHECK("it went on", sigtimedwait(&set_, &info, &none) == SIGRTMIN && info.si_overrun >= 10);
	nap(5);
	set(0, 1000000);	/* its signal is queued; the new setting is another timer */
	nap(20);
	CHECK("one signal", sigtimedwait(&set_, &info, &none) == SIGRTMIN);
	CHECK("no more", sigtimedwait(&set_, &info, &none) == -1 && errno == EAGAIN);
	CHECK("disarmed", left(&interval) == 0 && interval == 0);
	CHECK("delete", !timer_delete(timer));
	sigprocmask(SIG_UNBLOCK, &set_, NULL);
}

static void ignored(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1 };
	long interval;

	signal(SIGRTMIN + 1, SIG_IGN);
	CHECK("create", !timer_create(CLOCK_MONOTONIC, &event, &timer));
	set(1, 1);
	nap(10);
	left(&interval);
	CHECK("still set", interval == 1);
	CHECK("delete", !timer_delete(timer));
}

/* Ignored once it is no longer blocked: the count of the one that was taken stands, and the timer starves nobody. */
static void ignored_later(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGCONT };
	sigset_t set_;
	int count;

	sigemptyset(&set_);
	sigaddset(&set_, SIGCONT);
	sigprocmask(SIG_BLOCK, &set_, NULL);
	CHECK("create", !timer_create(CLOCK_MONOTONIC, &event, &timer));
	set(2, 1);
	nap(50);
	sigprocmask(SIG_UNBLOCK, &set_, NULL);
	count = timer_getoverrun(timer);
	CHECK("counted", count >= 20000000);
	nap(30);
	CHECK("stands", timer_getoverrun(timer) == count);
	CHECK("delete", !timer_delete(timer));
}

/* Each timer has a place of its own in the queue, also with an ordinary signal. */
static void two_of_a_kind(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1 };
	struct timespec none = { 0, 0 };
	timer_t first, second;
	siginfo_t info;
	sigset_t set_;
	int values = 0;

	sigemptyset(&set_);
	sigaddset(&set_, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set_, NULL);
	event.sigev_value.sival_int = 1;
	CHECK("create", !timer_create(CLOCK_MONOTONIC, &event, &timer));
	set(0, 1);
	first = timer;
	event.sigev_value.sival_int = 2;
	CHECK("create", !timer_create(CLOCK_MONOTONIC, &event, &timer));
	set(0, 1);
	second = timer;
	nap(20);
	kill(getpid(), SIGUSR1);	/* this one is there already */
	while (sigtimedwait(&set_, &info, &none) == SIGUSR1)
		values = values * 10 + (info.si_code == SI_TIMER ? info.si_value.sival_int : 9);
	CHECK("both, in their order", values == 12);
	CHECK("delete", !timer_delete(first) && !timer_delete(second));
}

static void silent(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_NONE };
	long interval, rest;

	CHECK("create", !timer_create(CLOCK_MONOTONIC, &event, &timer));
	set(0, 1000000);
	nap(5);
	CHECK("over", left(&interval) == 0);
	set(50000000, 1000000);
	nap(5);
	rest = left(&interval);
	CHECK("in its next period", rest > 0 && rest <= 50000000);
	CHECK("delete", !timer_delete(timer));
}

static void nodes(void)
{
	unsigned char mask[16];
	int mode = -1;

	memset(mask, 0xff, sizeof(mask));
	if (syscall(SYS_get_mempolicy, &mode, mask, 0, 0, 0) == -1 && errno == ENOSYS)
		return;
	CHECK("no room", syscall(SYS_get_mempolicy, NULL, mask, 0, 0, MPOL_F_MEMS_ALLOWED) == -1 && errno == EINVAL);
	CHECK("two words", !syscall(SYS_get_mempolicy, NULL, mask, 129, 0, MPOL_F_MEMS_ALLOWED));
	CHECK("node 0", (mask[0] & 1) && !mask[8] && !mask[15]);
	CHECK("too much room", syscall(SYS_get_mempolicy, NULL, mask, 1UL << 40, 0, MPOL_F_MEMS_ALLOWED) == -1 && errno == EINVAL);
}

int main(void)
{
	struct sigaction sa = { .sa_sigaction = on_tick, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct itimerval fast = { { 0, 1 }, { 0, 1 } };

	sigaction(SIGRTMIN, &sa, NULL);
	signal(SIGALRM, on_alarm);
	storm(CLOCK_MONOTONIC, 1);
	storm(CLOCK_REALTIME, 1000);
	storm(CLOCK_PROCESS_CPUTIME_ID, 1000);
	setitimer(ITIMER_REAL, &fast, NULL);
	while (alarms < 300)
		;
	blocked();
	ignored();
	ignored_later();
	two_of_a_kind();
	silent();
	nodes();
	printf("%s\n", bad ? "bad" : "ok");
	return bad;
}
