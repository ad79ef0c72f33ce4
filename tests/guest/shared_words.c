/*
 * Futexes are private or shared by how they are asked for, and shared ones are named by their object; what a truncated file
 * no longer has is EFAULT. Attachments of a System V segment are counted by mappings, which never grow together again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096

struct sleeper {
	uint32_t *word;
	int op, result, error;
	volatile int tid;
	pthread_t thread;
};

static int futex(uint32_t *word, int op, int value, struct timespec *timeout)
{
	return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

static void *sleeps(void *argument)
{
	struct sleeper *sleeper = argument;
	struct timespec timeout = { 20, 0 };

	sleeper->tid = gettid();
	sleeper->result = futex(sleeper->word, FUTEX_WAIT | sleeper->op, 0, &timeout);
	sleeper->error = sleeper->result ? errno : 0;
	return NULL;
}

static void begin(struct sleeper *sleeper, uint32_t *word, int op)
{
	char path[64], text[256];

	memset(sleeper, 0, sizeof(*sleeper));
	sleeper->word = word;
	sleeper->op = op;
	pthread_create(&sleeper->thread, NULL, sleeps, sleeper);
	for (;;) {
		FILE *file;
		char *state;

		snprintf(path, sizeof(path), "/proc/self/task/%d/stat", sleeper->tid);
		file = sleeper->tid ? fopen(path, "r") : NULL;
		state = file && fgets(text, sizeof(text), file) ? strrchr(text, ')') : NULL;
		if (file)
			fclose(file);
		if (state && state[2] == 'S')
			return;
		usleep(1000);
	}
}

/* Who is woken by which kind of wake, in memory of this kind. */
static void kinds(const char *what, uint32_t *word)
{
	static const int ops[] = { 0, FUTEX_PRIVATE_FLAG };

	for (int wait = 0; wait < 2; wait++)
		for (int wake = 0; wake < 2; wake++) {
			struct sleeper sleeper;
			int woken;

			begin(&sleeper, word, ops[wait]);
			woken = futex(word, FUTEX_WAKE | ops[wake], 1, NULL);
			printf("%s: wait %s, wake %s: %d\n", what, wait ? "private" : "shared", wake ? "private" : "shared", woken);
			if (woken != 1)
				futex(word, FUTEX_WAKE | ops[wait], 1, NULL);
			pthread_join(sleeper.thread, NULL);
		}
}

static void say(const char *what, int result)
{
	printf("%s: %d", what, result);
	printf(" errno %d\n", result < 0 ? errno : 0);
}

static void truncated(void)
{
	char path[] = "/tmp/words-XXXXXX";
	int fd = mkstemp(path);
	uint32_t *shared, *private, *readonly, *other;
	struct timespec soon = { 0, 1000000 };
	struct sleeper sleeper;

	unlink(path);
	if (ftruncate(fd, 2 * PAGE))
		exit(1);
	shared = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	other = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	private = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	readonly = mmap(NULL, 2 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
	kinds("shared file", shared);
	kinds("private file", private);
	begin(&sleeper, shared + 1, 0);
	say("another mapping", futex(other + 1, FUTEX_WAKE, 1, NULL));
	pthread_join(sleeper.thread, NULL);
	begin(&sleeper, readonly + 2, 0);
	say("read-only mapping, woken by the file", futex(other + 2, FUTEX_WAKE, 1, NULL));
	futex(readonly + 2, FUTEX_WAKE, 1, NULL);
	pthread_join(sleeper.thread, NULL);
	say("wait before", futex(shared + PAGE / 4, FUTEX_WAIT, 0, &soon));
	if (ftruncate(fd, PAGE))
		exit(1);
	say("wait", futex(shared + PAGE / 4, FUTEX_WAIT, 0, &soon));
	say("wait, private", futex(shared + PAGE / 4, FUTEX_WAIT_PRIVATE, 0, &soon));
	say("wake", futex(shared + PAGE / 4, FUTEX_WAKE, 1, NULL));
	say("wake, private", futex(shared + PAGE / 4, FUTEX_WAKE_PRIVATE, 1, NULL));
	say("wait, private mapping", futex(private + PAGE / 4, FUTEX_WAIT, 0, &soon));
	say("lock", futex(shared + PAGE / 4, FUTEX_LOCK_PI, 0, NULL));
	say("unlock", futex(shared + PAGE / 4, FUTEX_UNLOCK_PI, 0, NULL));
	say("requeue", syscall(SYS_futex, shared, FUTEX_REQUEUE, 1, 1, shared + PAGE / 4, 0));
	say("wake and operate", syscall(SYS_futex, shared, FUTEX_WAKE_OP, 1, 1, shared + PAGE / 4, 0));
	say("the page before", futex(shared, FUTEX_WAIT, 0, &soon));
	say("unmapped", futex((uint32_t *)8, FUTEX_WAKE, 1, NULL));
	say("unmapped, private", futex((uint32_t *)8, FUTEX_WAKE_PRIVATE, 1, NULL));
	close(fd);
}

static int attached(int id)
{
	struct shmid_ds ds;

	return shmctl(id, IPC_STAT, &ds) ? -1 : (int)ds.shm_nattch;
}

static void segments(void)
{
	int id = shmget(IPC_PRIVATE, 4 * PAGE, 0600 | IPC_CREAT);
	char *p = shmat(id, NULL, 0);

	printf("attached %d\n", attached(id));
	mprotect(p + PAGE, PAGE, PROT_READ);
	printf("one page read-only: %d\n", attached(id));
	mprotect(p + PAGE, PAGE, PROT_READ | PROT_WRITE);
	printf("and writable again: %d\n", attached(id));
	if (!fork()) {
		printf("in a child: %d\n", attached(id));
		fflush(stdout);
		_exit(0);
	}
	wait(NULL);
	printf("without it: %d\n", attached(id));
	munmap(p + 2 * PAGE, PAGE);
	printf("with a hole: %d\n", attached(id));
	shmdt(p);
	printf("detached: %d\n", attached(id));
	shmctl(id, IPC_RMID, NULL);
}

int main(void)
{
	static uint32_t word;

	setvbuf(stdout, NULL, _IOLBF, 0);
	kinds("private memory", &word);
	kinds("shared memory", mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	truncated();
	segments();
	return 0;
}
