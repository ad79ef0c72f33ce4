/* What musl does its own way: threads and their stacks, locks, name look-ups, dlopen, signals, processes, temporary files. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <locale.h>
#include <netdb.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS 16

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static __thread int mine;
static int whose, total;

static void *thread(void *arg)
{
	int i, n = (int)(long)arg;
	char stack[60000];

	memset(stack, n, sizeof(stack));
	mine = n;
	pthread_barrier_wait(&barrier);
	for (i = 0; i < 50; i++) {
		pthread_mutex_lock(&lock);
		while (whose != n)
			pthread_cond_wait(&turn, &lock);
		whose = (whose + 1) % THREADS;
		total += mine + stack[i] - n;
		pthread_cond_broadcast(&turn);
		pthread_mutex_unlock(&lock);
	}
	return (void *)(long)(mine * 2);
}

static void *cancelled(void *arg)
{
	for (;;)
		pause();
	return arg;
}

static void handler(int signo, siginfo_t *info, void *context)
{
	char text[64];
	int n = snprintf(text, sizeof(text), "signal %d, value %d\n", signo, info->si_value.sival_int);

	if (write(1, text, n) != n)
		_exit(9);
}

int main(int argc, char **argv)
{
	struct sigaction act = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
	struct addrinfo *found, hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM };
	char *words[] = { "sh", "-c", "echo spawned; exit 7", NULL }, name[] = "/tmp/muslXXXXXX", line[64];
	pthread_t threads[THREADS];
	int status, (*plus)(int, int);
	long sum = 0, i;
	void *result, *library;
	sem_t *sem;
	pid_t pid;
	FILE *pipe;

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("== %s, %s\n", argv[1], setlocale(LC_ALL, "C.UTF-8"));
	pthread_barrier_init(&barrier, NULL, THREADS);
	for (i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, thread, (void *)i))
			return 1;
	for (i = 0; i < THREADS; i++) {
		pthread_join(threads[i], &result);
		sum += (long)result;
	}
	printf("threads %ld %d\n", sum, total);
	pthread_create(&threads[0], NULL, cancelled, NULL);
	pthread_cancel(threads[0]);
	pthread_join(threads[0], &result);
	printf("cancelled %d\n", result == PTHREAD_CANCELED);

	sigaction(SIGRTMIN + 3, &act, NULL);
	sigqueue(getpid(), SIGRTMIN + 3, (union sigval){ .sival_int = 42 });

	if (posix_spawnp(&pid, "sh", NULL, NULL, words, environ) || waitpid(pid, &status, 0) != pid)
		return 2;
	printf("child %d\n", WEXITSTATUS(status));
	pipe = popen("echo through a pipe", "r");
	if (!pipe || !fgets(line, sizeof(line), pipe))
		return 3;
	printf("%s", line);
	pclose(pipe);

	sem = mmap(NULL, sizeof(*sem), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	sem_init(sem, 1, 0);
	pid = fork();
	if (!pid) {
		sem_post(sem);
		_exit(0);
	}
	printf("semaphore %d\n", sem_wait(sem));
	waitpid(pid, NULL, 0);

	status = getaddrinfo("localhost", "80", &hints, &found);
	printf("localhost: %s\n", status ? gai_strerror(status) : "found");
	close(mkstemp(name));
	printf("removed %d\n", unlink(name));
	library = dlopen("./plus.so", RTLD_NOW);
	if (library) {
		*(void **)&plus = dlsym(library, "plus");
		printf("plus %d\n", plus(40, 2));
	} else {
		printf("no dlopen\n");
	}
	strftime(line, sizeof(line), "%F %T %Z", gmtime(&(time_t){ 1000000000 }));
	printf("%s, %s\n", line, strerror(ENOTEMPTY));
	for (i = 0, result = NULL; i < 20; i++)
		result = realloc(result, 1 << i);
	printf("realloc %d\n", result != NULL);
	return 0;
}
