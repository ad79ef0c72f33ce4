/* Threads: create and join, mutexes, conditions, thread-local storage, signals to threads, exit and exec from one. */
#include "proc_check.h"
#include <pthread.h>
#include <semaphore.h>

#define THREADS 100

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ready = PTHREAD_COND_INITIALIZER;
static __thread int mine = 5;
static int total, waiting, go;
static volatile pid_t handled_by;

static void *adder(void *argument)
{
	int i;

	CHECK(mine == 5);
	mine = (int)(intptr_t)argument;
	for (i = 0; i < 100; i++) {
		pthread_mutex_lock(&lock);
		total++;
		pthread_mutex_unlock(&lock);
	}
	CHECK(mine == (int)(intptr_t)argument);
	return argument;
}

static void *waiter(void *argument)
{
	pthread_mutex_lock(&lock);
	waiting++;
	while (!go)
		pthread_cond_wait(&ready, &lock);
	waiting--;
	pthread_mutex_unlock(&lock);
	return NULL;
}

static void on_signal(int signo)
{
	handled_by = syscall(SYS_gettid);
}

static sem_t up, done;
static volatile pid_t tid_of;

static void *sleeper(void *argument)
{
	tid_of = syscall(SYS_gettid);
	sem_post(&up);
	while (sem_wait(&done) == -1 && errno == EINTR)
		;
	return NULL;
}

static void *robust_holder(void *argument)
{
	CHECK(pthread_mutex_lock(argument) == 0);
	return NULL;
}

static void *leaver(void *argument)
{
	_exit(9);
}

static void *in_exec(void *argument)
{
	char *argv[] = { "threads", "again", NULL };

	execv("/proc/self/exe", argv);
	_exit(1);
}

static void *forever(void *argument)
{
	for (;;)
		pause();
	return NULL;
}

static void *spinner(void *argument)
{
	for (;;)
		__asm__ volatile("pause");
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS], one;
	pthread_mutexattr_t attr;
	pthread_mutex_t robust;
	void *result;
	pid_t pid;
	int i;

	if (argc > 1)
		return getpid() == syscall(SYS_gettid) ? 21 : 1;
	for (i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, adder, (void *)(intptr_t)i) == 0);
	for (i = 0; i < THREADS; i++)
		CHECK(pthread_join(threads[i], &result) == 0 && result == (void *)(intptr_t)i);
	CHECK(total == THREADS * 100);

	for (i = 0; i < 20; i++)
		CHECK(pthread_create(&threads[i], NULL, waiter, NULL) == 0);
	for (;;) {
		pthread_mutex_lock(&lock);
		if (waiting == 20)
			break;
		pthread_mutex_unlock(&lock);
		nap(1);
	}
	go = 1;
	pthread_cond_broadcast(&ready);
	pthread_mutex_unlock(&lock);
	for (i = 0; i < 20; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(waiting == 0);

	handle(SIGUSR1, on_signal, 0);
	CHECK(sem_init(&up, 0, 0) == 0 && sem_init(&done, 0, 0) == 0);
	CHECK(pthread_create(&one, NULL, sleeper, NULL) == 0);
	sem_wait(&up);
	CHECK(pthread_kill(one, SIGUSR1) == 0);
	while (!handled_by)
		nap(1);
	CHECK(handled_by == tid_of && tid_of != getpid());
	sem_post(&done);
	CHECK(pthread_join(one, NULL) == 0);
	FAILS(syscall(SYS_tgkill, getpid(), tid_of, 0), ESRCH);

	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &attr);
	CHECK(pthread_create(&one, NULL, robust_holder, &robust) == 0 && pthread_join(one, NULL) == 0);
	CHECK(pthread_mutex_lock(&robust) == EOWNERDEAD);
	CHECK(pthread_mutex_consistent(&robust) == 0 && pthread_mutex_unlock(&robust) == 0);

	/* one thread's exit_group takes sleepers and spinners along */
	pid = fork();
	if (pid == 0) {
		CHECK(pthread_create(&one, NULL, forever, NULL) == 0);
		CHECK(pthread_create(&one, NULL, spinner, NULL) == 0);
		CHECK(pthread_create(&one, NULL, leaver, NULL) == 0);
		forever(NULL);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 9);

	/* the leader may go first */
	pid = fork();
	if (pid == 0) {
		CHECK(pthread_create(&one, NULL, leaver, NULL) == 0);
		pthread_exit(NULL);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 9);

	/* exec from a thread: it has the process's id afterwards, and is alone */
	pid = fork();
	if (pid == 0) {
		CHECK(pthread_create(&one, NULL, forever, NULL) == 0);
		CHECK(pthread_create(&one, NULL, in_exec, NULL) == 0);
		forever(NULL);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 21);
	puts("ok");
	return 0;
}
