/* Futexes under contention: plain, robust and priority-inheriting mutexes, condition variables, timeouts, membarrier. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 4, ROUNDS = 3000 };

static pthread_mutex_t mutex;
static long counter;

static long futex(uint32_t *word, int op, uint32_t val, const void *timeout, uint32_t *word2, uint32_t val3)
{
	return syscall(SYS_futex, word, op, val, timeout, word2, val3);
}

static void *count(void *unused)
{
	for (int i = 0; i < ROUNDS; i++) {
		pthread_mutex_lock(&mutex);
		counter++;
		pthread_mutex_unlock(&mutex);
	}
	return unused;
}

static void contend(const char *name, int protocol)
{
	pthread_mutexattr_t attr;
	pthread_t threads[THREADS];

	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setprotocol(&attr, protocol);
	pthread_mutex_init(&mutex, &attr);
	counter = 0;
	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, count, NULL);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	printf("%s: %ld\n", name, counter);
}

static void *die_holding(void *arg)
{
	pthread_mutex_lock(arg);
	return NULL;
}

static void robust(const char *name, int protocol)
{
	pthread_mutexattr_t attr;
	pthread_mutex_t held;
	pthread_t thread;

	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutexattr_setprotocol(&attr, protocol);
	pthread_mutex_init(&held, &attr);
	pthread_create(&thread, NULL, die_holding, &held);
	pthread_join(thread, NULL);
	int got = pthread_mutex_lock(&held);
	printf("%s: owner died %d, consistent %d, unlock %d\n", name, got == EOWNERDEAD, pthread_mutex_consistent(&held),
	       pthread_mutex_unlock(&held));
}

static void shared_between_processes(void)
{
	uint32_t *word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t pid = fork();

	if (pid == 0) {
		while (__atomic_load_n(word, __ATOMIC_SEQ_CST) == 0)
			futex(word, FUTEX_WAIT, 0, NULL, NULL, 0);
		__atomic_store_n(word + 1, 7, __ATOMIC_SEQ_CST);
		futex(word + 1, FUTEX_WAKE, 1, NULL, NULL, 0);
		_exit(0);
	}
	usleep(20000);
	__atomic_store_n(word, 1, __ATOMIC_SEQ_CST);
	futex(word, FUTEX_WAKE, 1, NULL, NULL, 0);
	while (__atomic_load_n(word + 1, __ATOMIC_SEQ_CST) != 7)
		futex(word + 1, FUTEX_WAIT, 0, NULL, NULL, 0);
	waitpid(pid, NULL, 0);
	printf("shared: %u\n", word[1]);
}

static uint32_t from, to;
static int woken;

static void *sleep_on_from(void *unused)
{
	futex(&from, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
	__atomic_add_fetch(&woken, 1, __ATOMIC_SEQ_CST);
	return unused;
}

static void requeue(void)
{
	pthread_t threads[THREADS];
	long moved = 0;

	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, sleep_on_from, NULL);
	while (moved < THREADS) {	/* one woken, three moved */
		long n = futex(&from, FUTEX_CMP_REQUEUE_PRIVATE, moved ? 0 : 1, (void *)(long)THREADS, &to, 0);

		if (n > 0)
			moved += n;
		usleep(1000);
	}
	usleep(20000);
	printf("requeue: %ld, woken so far %d\n", moved, woken);
	while (__atomic_load_n(&woken, __ATOMIC_SEQ_CST) < THREADS)
		futex(&to, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	printf("all woken: %d\n", woken);
}

static void edges(void)
{
	uint32_t word = 5, second = 3;
	struct timespec past = { 0, 1 }, bad = { 0, 1000000000 }, brief = { 0, 1000000 };

	printf("differs: %d\n", futex(&word, FUTEX_WAIT, 4, NULL, NULL, 0) < 0 ? errno : 0);
	printf("times out: %d\n", futex(&word, FUTEX_WAIT, 5, &brief, NULL, 0) < 0 ? errno : 0);
	printf("bad time: %d\n", futex(&word, FUTEX_WAIT, 5, &bad, NULL, 0) < 0 ? errno : 0);
	printf("past: %d\n", futex(&word, FUTEX_WAIT_BITSET, 5, &past, NULL, ~0u) < 0 ? errno : 0);
	printf("no bits: %d\n", futex(&word, FUTEX_WAIT_BITSET, 5, NULL, NULL, 0) < 0 ? errno : 0);
	printf("unaligned: %d\n", futex((uint32_t *)((char *)&word + 1), FUTEX_WAKE, 1, NULL, NULL, 0) < 0 ? errno : 0);
	printf("nowhere: %d\n", futex((uint32_t *)16, FUTEX_WAIT, 0, NULL, NULL, 0) < 0 ? errno : 0);
	printf("unknown: %d\n", futex(&word, 99, 0, NULL, NULL, 0) < 0 ? errno : 0);
	printf("wake op: %ld", futex(&word, FUTEX_WAKE_OP, 1, (void *)1, &second, FUTEX_OP(FUTEX_OP_ADD, 4, FUTEX_OP_CMP_EQ, 3)));
	printf(" -> %u\n", second);
	printf("not mine: %d\n", futex(&word, FUTEX_UNLOCK_PI, 0, NULL, NULL, 0) < 0 ? errno : 0);
	word = 0;
	printf("lock pi: %ld", futex(&word, FUTEX_LOCK_PI, 0, NULL, NULL, 0));
	printf(" mine %d", (word & FUTEX_TID_MASK) == (uint32_t)gettid());
	printf(" again %d\n", futex(&word, FUTEX_LOCK_PI, 0, NULL, NULL, 0) < 0 ? errno : 0);
	printf("unlock pi: %ld", futex(&word, FUTEX_UNLOCK_PI, 0, NULL, NULL, 0));
	printf(" -> %u\n", word);
}

/* A word of a file names a page of it: behind the file's end there is none. */
static void cut_off(void)
{
	int fd = memfd_create("words", 0);
	uint32_t *words = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (ftruncate(fd, 8192) || futex(words, FUTEX_WAKE, 1, NULL, NULL, 0) || ftruncate(fd, 4096))
		perror("words");
	printf("cut off: %ld", futex(words, FUTEX_WAKE, 1, NULL, NULL, 0));
	printf(", %d\n", futex(words + 1024, FUTEX_WAKE, 1, NULL, NULL, 0) < 0 ? errno : 0);
	munmap(words, 8192);
	close(fd);
}

/* A thread that ends with a word on which another sleeps, and on no list: the word goes to the sleeper all the same. */
static uint32_t word;

static void *end_holding(void *unused)
{
	word = syscall(SYS_gettid);
	while (!(__atomic_load_n(&word, __ATOMIC_SEQ_CST) & FUTEX_WAITERS))
		usleep(1000);
	return unused;
}

static void orphaned(void)
{
	pthread_t thread;

	word = 0;
	pthread_create(&thread, NULL, end_holding, NULL);
	while (!__atomic_load_n(&word, __ATOMIC_SEQ_CST))
		usleep(1000);
	int got = futex(&word, FUTEX_LOCK_PI, 0, NULL, NULL, 0);
	printf("orphaned: %d, mine %d, marked %d\n", got, (int)(word & FUTEX_TID_MASK) == gettid(),
	       !!(word & FUTEX_OWNER_DIED));
	printf("given back: %d\n", (int)futex(&word, FUTEX_UNLOCK_PI, 0, NULL, NULL, 0));
	pthread_join(thread, NULL);
}

/* Who has the higher priority of the real-time ones is woken first, and every one of them before the others. */
static int woken_order[4], woken_count;

static void *sleep_at(void *arg)
{
	int priority = *(int *)arg;
	struct sched_param param = { .sched_priority = priority };

	if (priority)
		pthread_setschedparam(pthread_self(), SCHED_FIFO, &param);
	futex(&word, FUTEX_WAIT, 0, NULL, NULL, 0);
	pthread_mutex_lock(&mutex);
	woken_order[woken_count++] = priority;
	pthread_mutex_unlock(&mutex);
	return NULL;
}

static void ranks(void)
{
	static const int priorities[4] = { 0, 3, 20, 10 };
	struct sched_param param = { .sched_priority = 1 };
	pthread_t threads[4];

	if (sched_setscheduler(0, SCHED_FIFO, &param) == -1) /* needs CAP_SYS_NICE */
		return;
	param.sched_priority = 0;
	sched_setscheduler(0, SCHED_OTHER, &param);
	pthread_mutex_init(&mutex, NULL);
	word = 0;
	for (int i = 0; i < 4; i++) {
		pthread_create(&threads[i], NULL, sleep_at, (void *)&priorities[i]);
		usleep(50000);
	}
	for (int i = 1; i <= 4; i++) {
		futex(&word, FUTEX_WAKE, 1, NULL, NULL, 0);
		for (int seen = 0; seen < i; usleep(1000)) {
			pthread_mutex_lock(&mutex);
			seen = woken_count;
			pthread_mutex_unlock(&mutex);
		}
	}
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	printf("by rank: %d %d %d %d\n", woken_order[0], woken_order[1], woken_order[2], woken_order[3]);
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	contend("plain", PTHREAD_PRIO_NONE);
	contend("inheriting", PTHREAD_PRIO_INHERIT);
	robust("robust", PTHREAD_PRIO_NONE);
	robust("robust inheriting", PTHREAD_PRIO_INHERIT);
	shared_between_processes();
	requeue();
	edges();
	cut_off();
	orphaned();
	ranks();
	printf("membarrier: %d %d\n", (int)syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0),
	       (int)syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0));
	return 0;
}
