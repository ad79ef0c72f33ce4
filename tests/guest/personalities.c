/* personality(2)'s flags that a program can see the effect of, getcpu(2) and affinity, vhangup(2), write hints. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

static void protection(const char *what, void *p)
{
	char line[512], mode[8];
	unsigned long start, end;
	FILE *maps = fopen("/proc/self/maps", "r");

	while (fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %7s", &start, &end, mode) == 3 && start <= (unsigned long)p && (unsigned long)p < end)
			printf("%s: %s\n", what, mode);
	fclose(maps);
}

static void *map(int prot, int flags, int fd)
{
	return mmap(NULL, 4096, prot, flags, fd, 0);
}

int main(int argc, char **argv)
{
	struct utsname before, after;
	uint64_t hint = 3, found = 9;
	int fd, first, second;
	cpu_set_t one, all;
	void *p;

	if (argc > 1) {
		printf("after exec: %x\n", personality(0xffffffff) & READ_IMPLIES_EXEC);
		return 0;
	}
	setvbuf(stdout, NULL, _IONBF, 0);
	personality(READ_IMPLIES_EXEC);
	fd = open("/proc/self/exe", O_RDONLY);
	protection("readable", map(PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1));
	protection("shared", map(PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1));
	protection("file", map(PROT_READ, MAP_PRIVATE, fd));
	protection("write only", map(PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1));
	protection("nothing", p = map(PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1));
	mprotect(p, 4096, PROT_READ);
	protection("and readable", p);
	mprotect(p, 4096, PROT_WRITE);
	protection("and writable", p);
	if (!fork()) {
		printf("a child: %x\n", personality(0xffffffff));
		execl("/proc/self/exe", "again", "again", NULL);
	}
	wait(NULL);
	personality(0);
	mprotect(p, 4096, PROT_READ);
	protection("without the flag", p);

	uname(&before);
	personality(UNAME26);
	uname(&after);
	printf("UNAME26: %.4s, %s\n", after.release, strcmp(before.version, after.version) ? "else" : "all else as before");
	personality(0);

	sched_getaffinity(0, sizeof(all), &all);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		sched_setaffinity(0, sizeof(one), &one);
		first = sched_getcpu();
		syscall(SYS_getcpu, &second, NULL, NULL);
		if (first != cpu || second != cpu)
			printf("on %d: %d %d\n", cpu, first, second);
	}
	sched_setaffinity(0, sizeof(all), &all);
	printf("among those allowed: %d\n", CPU_ISSET(sched_getcpu(), &all) != 0);

	fd = memfd_create("hints", 0);
	printf("hint %d", fcntl(fd, F_GET_RW_HINT, &found));
	printf(" %lu", found);
	printf(" %d", fcntl(fd, F_SET_RW_HINT, &hint));
	fcntl(fd, F_GET_RW_HINT, &found);
	printf(" %lu", found);
	hint = 77;
	printf(" %d\n", fcntl(fd, F_SET_RW_HINT, &hint));

	if (!fork()) {
		setsid(); /* nothing to hang up */
		printf("vhangup: %d\n", vhangup());
		setuid(65534);
		printf("without privilege: %d", vhangup());
		printf(" errno %d\n", errno);
		_exit(0);
	}
	wait(NULL);
	return geteuid() ? 4 : 0;
}
