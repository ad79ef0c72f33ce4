/* Edges of single calls that other people's suites lean on: which errno comes first, what a refused call leaves behind. */
#include "proc_check.h"
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/kcmp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <asm/termbits.h>

static void scheduling(void)
{
	unsigned long mask[16];
	struct timespec t;

	/* A negative pid is nobody's for the mask, and malformed for the rest. */
	FAILS(syscall(SYS_sched_getaffinity, -1, sizeof(mask), mask), ESRCH);
	mask[0] = 1;
	FAILS(syscall(SYS_sched_setaffinity, -1, sizeof(mask), mask), ESRCH);
	FAILS(syscall(SYS_sched_getaffinity, 0, 1, mask), EINVAL);
	FAILS(sched_getscheduler(-1), EINVAL);
	FAILS(sched_rr_get_interval(-1, &t), EINVAL);
}

static void signals_through_proc(void)
{
	pid_t pid = fork();
	char path[64];
	int fd, task;

	if (pid == 0) {
		pause();
		_exit(0);
	}
	snprintf(path, sizeof(path), "/proc/%d", pid);
	fd = open(path, O_RDONLY | O_DIRECTORY);
	CHECK(fd >= 0);
	snprintf(path, sizeof(path), "/proc/%d/task/%d", pid, pid);
	task = open(path, O_RDONLY | O_DIRECTORY);
	CHECK(task >= 0);
	FAILS(syscall(SYS_pidfd_send_signal, task, SIGTERM, NULL, 0), EBADF);
	FAILS(syscall(SYS_pidfd_send_signal, open("/", O_RDONLY), SIGTERM, NULL, 0), EBADF);
	CHECK(syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0) == 0);
	CHECK(syscall(SYS_pidfd_send_signal, fd, SIGTERM, NULL, 0) == 0);
	CHECK(status_of(pid) == SIGTERM);
	FAILS(syscall(SYS_pidfd_send_signal, fd, SIGTERM, NULL, 0), ESRCH);
}

static uint32_t word, other, third;

static long futex(uint32_t *a, int op, uint32_t value, long timeout_or_count, uint32_t *b, uint32_t value3)
{
	return syscall(SYS_futex, a, op | FUTEX_PRIVATE_FLAG, value, timeout_or_count, b, value3);
}

static void *plain_waiter(void *unused)
{
	CHECK(futex(&word, FUTEX_WAIT, 0, 0, NULL, 0) == 0);
	return NULL;
}

static void *requeued_waiter(void *unused)
{
	FAILS(futex(&word, FUTEX_WAIT_REQUEUE_PI, 0, 0, &other, 0), EWOULDBLOCK);
	return NULL;
}

static void on_signal(int signo)
{
}

/* FUTEX_CMP_REQUEUE_PI and the waiters must agree; a signal before the move waits on, one after it gives up. */
static void requeue_pi(void)
{
	struct sigaction action = { .sa_handler = on_signal };
	pthread_t thread;

	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	CHECK(pthread_create(&thread, NULL, plain_waiter, NULL) == 0);
	nap(200);
	FAILS(futex(&word, FUTEX_CMP_REQUEUE_PI, 1, 0, &other, 0), EINVAL);
	CHECK(futex(&word, FUTEX_WAKE, 1, 0, NULL, 0) == 1);
	CHECK(pthread_join(thread, NULL) == 0);

	CHECK(futex(&other, FUTEX_LOCK_PI, 0, 0, NULL, 0) == 0);
	CHECK(pthread_create(&thread, NULL, requeued_waiter, NULL) == 0);
	nap(200);
	FAILS(futex(&word, FUTEX_CMP_REQUEUE, 1, INT_MAX, &other, 0), EINVAL);
	FAILS(futex(&word, FUTEX_CMP_REQUEUE_PI, 1, 0, &third, 0), EINVAL);
	CHECK(pthread_kill(thread, SIGUSR1) == 0);
	nap(200);
	CHECK(futex(&word, FUTEX_CMP_REQUEUE_PI, 1, 0, &other, 0) == 1);
	CHECK(pthread_kill(thread, SIGUSR1) == 0);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(futex(&other, FUTEX_UNLOCK_PI, 0, 0, NULL, 0) == 0);
	CHECK(other == 0);
}

/* Who reads about itself is in read(2). */
static void own_system_call(void)
{
	char buffer[200], expected[100];
	int fd = open("/proc/self/syscall", O_RDONLY);

	CHECK(fd >= 0);
	snprintf(expected, sizeof(expected), "%d 0x%x 0x%lx 0x%lx 0x", SYS_read, fd, (long)buffer, sizeof(buffer));
	CHECK(syscall(SYS_read, fd, buffer, sizeof(buffer)) > (long)strlen(expected));
	CHECK(strncmp(buffer, expected, strlen(expected)) == 0);
}

static volatile int told, told_fd, told_code;

static void on_event(int signo, siginfo_t *info, void *context)
{
	told++;
	told_fd = info->si_fd;
	told_code = info->si_code;
}

static void touch(const char *path)
{
	int fd = open(path, O_CREAT | O_WRONLY, 0600);

	CHECK(fd >= 0);
	close(fd);
}

/* F_NOTIFY: once, or until the directory is closed. */
static void directory_signals(void)
{
	struct sigaction action = { .sa_sigaction = on_event, .sa_flags = SA_SIGINFO };
	char name[] = "/tmp/edgesXXXXXX";
	int fd, file;

	CHECK(mkdtemp(name) && chdir(name) == 0);
	CHECK(sigaction(SIGRTMIN, &action, NULL) == 0);
	fd = open(".", O_RDONLY);
	file = open("f", O_CREAT | O_RDWR, 0600);
	CHECK(fd >= 0 && file >= 0);
	FAILS(fcntl(file, F_NOTIFY, DN_CREATE), ENOTDIR);
	CHECK(fcntl(file, F_NOTIFY, 0) == 0);
	CHECK(fcntl(fd, F_SETSIG, SIGRTMIN) == 0);
	CHECK(fcntl(fd, F_NOTIFY, DN_CREATE) == 0);
	CHECK(fcntl(fd, F_GETOWN) == getpid());
	CHECK(write(file, "x", 1) == 1 && told == 0);
	touch("a");
	CHECK(told == 1 && told_fd == fd && told_code == 3); /* POLL_MSG */
	touch("b");
	CHECK(told == 1);
	CHECK(fcntl(fd, F_NOTIFY, DN_MODIFY | DN_DELETE | DN_ATTRIB | DN_MULTISHOT) == 0);
	CHECK(write(file, "x", 1) == 1 && told == 2);
	CHECK(unlink("a") == 0 && told == 3);
	CHECK(chmod("b", 0644) == 0 && told == 4);
	CHECK(rename("b", "c") == 0 && told == 5);
	CHECK(fcntl(fd, F_NOTIFY, 0) == 0);
	CHECK(unlink("c") == 0 && told == 5);
	CHECK(fcntl(fd, F_NOTIFY, DN_DELETE | DN_MULTISHOT) == 0);
	close(fd);
	CHECK(unlink("f") == 0 && told == 5);
	/* A rename is one only within the directory. */
	CHECK(mkdir("below", 0700) == 0);
	touch("moved");
	fd = open(".", O_RDONLY);
	CHECK(fcntl(fd, F_SETSIG, SIGRTMIN) == 0 && fcntl(fd, F_NOTIFY, DN_RENAME | DN_MULTISHOT) == 0);
	CHECK(rename("moved", "below/moved") == 0 && rename("below/moved", "moved") == 0 && told == 5);
	CHECK(rename("moved", "again") == 0 && told == 6);
	close(fd);
	CHECK(unlink("again") == 0 && rmdir("below") == 0);
	CHECK(chdir("/") == 0 && rmdir(name) == 0);
}

/* A length of 0 in the middle of a mapping is nothing to do. */
/* Events of the watched file itself: its links are counted, and no directory is called one. */
static void ends_of_watched(void)
{
	static const uint32_t wanted[] = { IN_DELETE_SELF, IN_IGNORED, IN_ATTRIB,
					   IN_ATTRIB, IN_DELETE_SELF, IN_IGNORED };
	struct inotify_event events[8];
	char name[] = "/tmp/edgesXXXXXX";
	int fd = inotify_init1(IN_NONBLOCK), file, again;
	size_t i;

	CHECK(mkdtemp(name) && chdir(name) == 0);
	CHECK(mkdir("d", 0700) == 0);
	touch("f");
	CHECK(inotify_add_watch(fd, "d", IN_ALL_EVENTS & ~(IN_OPEN | IN_CLOSE)) > 0);
	CHECK(inotify_add_watch(fd, "f", IN_ALL_EVENTS & ~(IN_OPEN | IN_CLOSE)) > 0);
	CHECK(rmdir("d") == 0 && link("f", "g") == 0);
	CHECK(read(fd, events, sizeof(events)) == 3 * sizeof(*events));
	for (i = 0; i < 3; i++)
		CHECK(events[i].mask == wanted[i] && events[i].len == 0);
	CHECK(unlink("g") == 0 && read(fd, events, sizeof(events)) == sizeof(*events) && events->mask == IN_ATTRIB);
	CHECK(unlink("f") == 0);
	CHECK(read(fd, events, sizeof(events)) == 3 * sizeof(*events));
	for (i = 0; i < 3; i++)
		CHECK(events[i].mask == wanted[i + 3] && events[i].len == 0);
	/* Open, it is not gone: what is written is still told. */
	file = open("f", O_CREAT | O_RDWR, 0600);
	CHECK(inotify_add_watch(fd, "f", IN_MODIFY | IN_ATTRIB | IN_DELETE_SELF) > 0 && unlink("f") == 0);
	CHECK(read(fd, events, sizeof(events)) == sizeof(*events) && events->mask == IN_ATTRIB);
	again = dup(file);
	CHECK(close(file) == 0 && write(again, "x", 1) == 1);
	CHECK(read(fd, events, sizeof(events)) == sizeof(*events) && events->mask == IN_MODIFY);
	CHECK(close(again) == 0);
	CHECK(read(fd, events, sizeof(events)) == 2 * sizeof(*events));
	CHECK(events[0].mask == IN_DELETE_SELF && events[1].mask == IN_IGNORED);
	close(fd);
	CHECK(chdir("/") == 0 && rmdir(name) == 0);
}

static void nothing_to_flush(void)
{
	int fd = open("/dev/null", O_RDWR);

	FAILS(fsync(fd), EINVAL);
	FAILS(fdatasync(fd), EINVAL);
	close(fd);
	fd = open("/tmp", O_RDONLY | O_DIRECTORY);
	CHECK(fsync(fd) == 0);
	close(fd);
}

/* A directory that was removed while it was open has nothing to list. */
static void removed_directory(void)
{
	char name[] = "/tmp/edgesXXXXXX", entries[512];
	int fd;

	CHECK(mkdtemp(name));
	fd = open(name, O_RDONLY | O_DIRECTORY);
	CHECK(syscall(SYS_getdents64, fd, entries, sizeof(entries)) > 0);
	CHECK(rmdir(name) == 0);
	FAILS(syscall(SYS_getdents64, fd, entries, sizeof(entries)), ENOENT);
	FAILS(syscall(SYS_getdents, fd, entries, sizeof(entries)), ENOENT);
	close(fd);
}

/* In a set-group-id directory of a group that is not ours, no set-group-id program can be made: not even for a umask. */
static void strangers_group(void)
{
	char name[] = "/tmp/edgesXXXXXX";
	struct stat st;
	int mask, fd;
	pid_t pid;

	CHECK(mkdtemp(name));
	if (getuid() != 0) {
		CHECK(rmdir(name) == 0);
		return;
	}
	CHECK(chown(name, 4711, 4712) == 0 && chmod(name, 02777) == 0);
	pid = fork();
	if (pid == 0) {
		CHECK(setgroups(0, NULL) == 0 && setgid(4713) == 0 && setuid(4711) == 0 && chdir(name) == 0);
		for (mask = 0; mask <= 010; mask += 010) {
			umask(mask);
			fd = open("made", O_CREAT | O_EXCL | O_WRONLY, 02770);
			CHECK(fd >= 0 && fstat(fd, &st) == 0 && close(fd) == 0);
			CHECK(st.st_gid == 4712 && (st.st_mode & 07777) == (0770 & ~mask));
			CHECK(unlink("made") == 0);
			CHECK(mknod("made", S_IFREG | 02770, 0) == 0 && stat("made", &st) == 0);
			CHECK(st.st_gid == 4712 && (st.st_mode & 07777) == (0770 & ~mask));
			CHECK(unlink("made") == 0);
		}
		/* Without the group's right to execute, the bit means something else. */
		fd = open("made", O_CREAT | O_EXCL | O_WRONLY, 02760);
		CHECK(fd >= 0 && fstat(fd, &st) == 0 && close(fd) == 0 && (st.st_mode & 07777) == 02760);
		CHECK(unlink("made") == 0);
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
	CHECK(rmdir(name) == 0);
}

static void no_memory(void)
{
	char *at = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	CHECK(mlock(at + 4096, 0) == 0 && munlock(at + 4096, 0) == 0 && mprotect(at + 4096, 0, PROT_READ) == 0);
	CHECK(madvise(at + 4096, 0, MADV_DONTFORK) == 0 && msync(at + 4096, 0, MS_SYNC) == 0);
	CHECK(mlock(at + 4096, 4096) == 0);
	CHECK(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
	memset(at, 1, 3 * 4096);
	CHECK(munmap(at, 3 * 4096) == 0);
}

static void compared(void)
{
	pid_t pid = fork();

	if (pid == 0) {
		pause();
		_exit(0);
	}
	CHECK(syscall(SYS_kcmp, getpid(), pid, KCMP_SYSVSEM, 0, 0) == 0);
	CHECK(syscall(SYS_kcmp, getpid(), pid, KCMP_VM, 0, 0) > 0);
	CHECK(syscall(SYS_kcmp, getpid(), pid, KCMP_FILE, 0, 0) == 0);
	kill(pid, SIGKILL);
	CHECK(status_of(pid) == SIGKILL);
}

static void locked_terminal(void)
{
	int fd = posix_openpt(O_RDWR | O_NOCTTY);
	struct termios t, lock;

	CHECK(fd >= 0 && ioctl(fd, TCGETS, &t) == 0);
	CHECK(ioctl(fd, TIOCGLCKTRMIOS, &lock) == 0 && lock.c_lflag == 0 && lock.c_cc[VINTR] == 0);
	memset(&lock, 0, sizeof(lock));
	lock.c_lflag = ECHO;
	lock.c_cc[VINTR] = 1;
	CHECK(ioctl(fd, TIOCSLCKTRMIOS, &lock) == 0);
	t.c_lflag &= ~(ECHO | ICANON);
	t.c_cc[VINTR] = 5;
	t.c_cc[VQUIT] = 6;
	CHECK(ioctl(fd, TCSETS, &t) == 0 && ioctl(fd, TCGETS, &t) == 0);
	CHECK(t.c_lflag & ECHO && !(t.c_lflag & ICANON) && t.c_cc[VINTR] == 3 && t.c_cc[VQUIT] == 6);
	CHECK(ioctl(fd, TIOCGLCKTRMIOS, &lock) == 0 && lock.c_lflag == ECHO && lock.c_cc[VINTR] == 1);
	close(fd);
}

/* System call numbers are ints: what RAX has above does not count, for numbers that exist and for those that do not. */
static void numbers(void)
{
	CHECK(syscall(SYS_getpid | 1L << 32) == getpid());
	CHECK(syscall(SYS_getpid | 0x80000001L << 32) == getpid());
	FAILS(syscall(0x7fffffffL), ENOSYS);
	FAILS(syscall(-1L), ENOSYS);
	FAILS(syscall(600 | 1L << 32), ENOSYS);
}

static void unnamed_files(void)
{
	char name[] = "/tmp/edgesXXXXXX";
	int fd;

	if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_PRIVATE | MS_REC, NULL) != 0)
		return;
	CHECK(mkdtemp(name));
	if (mount(NULL, name, "tmpfs", 0, "nr_inodes=3") == 0 && chdir(name) == 0) {
		fd = open(".", O_WRONLY | O_TMPFILE, 0600);
		CHECK(fd >= 0 && linkat(fd, "", AT_FDCWD, "named", AT_EMPTY_PATH) == 0);
		close(fd);
		fd = open(".", O_WRONLY | O_TMPFILE, 0600);
		CHECK(fd >= 0);
		FAILS(linkat(AT_FDCWD, "named", AT_FDCWD, "again", 0), ENOSPC);
		CHECK(linkat(fd, "", AT_FDCWD, "second", AT_EMPTY_PATH) == 0);
		FAILS(open("third", O_CREAT | O_WRONLY, 0600), ENOSPC);
		close(fd);
		CHECK(chdir("/") == 0 && umount(name) == 0);
	}
	CHECK(rmdir(name) == 0);
}

int main(void)
{
	numbers();
	unnamed_files();
	locked_terminal();
	compared();
	no_memory();
	nothing_to_flush();
	removed_directory();
	strangers_group();
	ends_of_watched();
	directory_signals();
	own_system_call();
	scheduling();
	signals_through_proc();
	requeue_pi();
	puts("edges are Linux's");
	return 0;
}
