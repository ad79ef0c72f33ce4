/* Credentials: set*id, groups, capabilities, prctl, limits, priorities. Only what root can show is skipped for others. */
#include "proc_check.h"
#include <fcntl.h>
#include <linux/capability.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/times.h>
#include <grp.h>

static void capabilities(uint64_t *effective, uint64_t *permitted)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	CHECK(syscall(SYS_capget, &header, data) == 0);
	*effective = data[0].effective | (uint64_t)data[1].effective << 32;
	*permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
}

static void ids_are(uid_t r, uid_t e, uid_t s)
{
	uid_t ruid, euid, suid;

	CHECK(getresuid(&ruid, &euid, &suid) == 0);
	CHECK(ruid == r && euid == e && suid == s);
}

static void in_child(void (*function)(void))
{
	pid_t pid = fork();

	if (pid == 0) {
		function();
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
}

static void all_change(void)
{
	uint64_t e, p;

	CHECK(setuid(1000) == 0);
	ids_are(1000, 1000, 1000);
	capabilities(&e, &p);
	CHECK(e == 0 && p == 0);
	FAILS(setuid(0), EPERM);
	FAILS(setresuid(0, -1, -1), EPERM);
	FAILS(setgroups(0, NULL), EPERM);
	CHECK(setresuid(-1, 1000, 1000) == 0);
}

static void effective_and_back(void)
{
	uint64_t e, p;

	CHECK(seteuid(1000) == 0);
	ids_are(0, 1000, 0);
	capabilities(&e, &p);
	CHECK(e == 0 && p != 0);
	CHECK(seteuid(0) == 0);
	capabilities(&e, &p);
	CHECK(e == p);
	CHECK(setreuid(1000, 1001) == 0);
	ids_are(1000, 1001, 1001);
}

static void keep(void)
{
	uint64_t e, p;

	CHECK(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0);
	CHECK(setresuid(1000, 1000, 1000) == 0);
	capabilities(&e, &p);
	CHECK(e == 0 && p != 0);
}

static void files(void)
{
	gid_t groups[] = { 7, 5, 6 }, got[8];

	CHECK(setgroups(3, groups) == 0 && getgroups(8, got) == 3);
	CHECK(got[0] == 5 && got[1] == 6 && got[2] == 7 && getgroups(0, NULL) == 3);
	FAILS(getgroups(1, got), EINVAL);
	CHECK(setfsuid(1000) == 0 && setfsuid(-1) == 1000);
	CHECK(setfsgid(1000) == 0 && setfsgid(-1) == 1000);
	CHECK(setegid(5) == 0 && getegid() == 5);
}

static void kills(void)
{
	pid_t pid = fork();

	if (pid == 0) {
		pause();
		_exit(0);
	}
	in_child(all_change);
	if (fork() == 0) {
		CHECK(setuid(1000) == 0);
		FAILS(kill(pid, SIGTERM), EPERM);
		FAILS(kill(pid, 0), EPERM);
		CHECK(kill(pid, SIGCONT) == 0); /* the same session */
		_exit(0);
	}
	CHECK(wait(NULL) > 0);
	CHECK(kill(pid, SIGKILL) == 0);
	status_of(pid);
}

static void bounding(void)
{
	CHECK(prctl(PR_CAPBSET_READ, CAP_CHOWN, 0, 0, 0) == 1);
	CHECK(prctl(PR_CAPBSET_DROP, CAP_CHOWN, 0, 0, 0) == 0);
	CHECK(prctl(PR_CAPBSET_READ, CAP_CHOWN, 0, 0, 0) == 0);
	FAILS(prctl(PR_CAPBSET_READ, 64, 0, 0, 0), EINVAL);
	FAILS(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_KILL, 0, 0), EPERM);
	CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_KILL, 0, 0) == 0);
}

static void switches(void)
{
	char name[16] = "";
	int value = 0;

	CHECK(prctl(PR_SET_NAME, "a name that is too long", 0, 0, 0) == 0);
	CHECK(prctl(PR_GET_NAME, name, 0, 0, 0) == 0 && strcmp(name, "a name that is ") == 0);
	CHECK(prctl(PR_SET_PDEATHSIG, SIGUSR1, 0, 0, 0) == 0);
	CHECK(prctl(PR_GET_PDEATHSIG, &value, 0, 0, 0) == 0 && value == SIGUSR1);
	FAILS(prctl(PR_SET_PDEATHSIG, 100, 0, 0, 0), EINVAL);
	CHECK(prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 1);
	CHECK(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0 && prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0);
	CHECK(prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0) == 0 && prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0) == 1000);
	FAILS(prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0), EINVAL);
	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
	FAILS(prctl(12345, 0, 0, 0, 0), EINVAL);
}

static void limits(void)
{
	struct rlimit old, now;

	CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0 && old.rlim_cur > 3);
	now = (struct rlimit){ 20, old.rlim_max };
	CHECK(setrlimit(RLIMIT_NOFILE, &now) == 0);
	FAILS(dup2(1, 20), EBADF);
	CHECK(dup2(1, 19) == 19);
	now = (struct rlimit){ 10, 5 };
	FAILS(setrlimit(RLIMIT_NOFILE, &now), EINVAL);
	FAILS(getrlimit(100, &now), EINVAL);
	CHECK(prlimit(0, RLIMIT_NOFILE, &old, &now) == 0 && now.rlim_cur == 20);
	FAILS(prlimit(999999, RLIMIT_NOFILE, NULL, &now), ESRCH);
}

static void priorities(void)
{
	struct tms t;
	struct rusage usage;

	errno = 0;
	CHECK(setpriority(PRIO_PROCESS, 0, 5) == 0 && getpriority(PRIO_PROCESS, 0) == 5);
	CHECK(setpriority(PRIO_PROCESS, 0, 100) == 0 && getpriority(PRIO_PROCESS, 0) == 19);
	FAILS(getpriority(9, 0), EINVAL);
	FAILS(getpriority(PRIO_PROCESS, 999999), ESRCH);
	CHECK(times(&t) != (clock_t)-1 && getrusage(RUSAGE_SELF, &usage) == 0 && usage.ru_maxrss > 0);
	FAILS(getrusage(5, &usage), EINVAL);
}

static void set_user_id(void)
{
	char path[] = "/tmp/ids.XXXXXX", buf[65536], *argv[] = { "x", "su", NULL };
	int fd = mkstemp(path), in = open("/proc/self/exe", O_RDONLY), status;
	ssize_t n;
	pid_t pid;

	CHECK(fd >= 0 && in >= 0);
	while ((n = read(in, buf, sizeof(buf))) > 0)
		CHECK(write(fd, buf, n) == n);
	CHECK(fchown(fd, 1234, 1235) == 0 && fchmod(fd, 06755) == 0);
	close(fd);
	close(in);
	pid = fork();
	if (pid == 0) {
		CHECK(setresgid(1000, 1000, 1000) == 0 && setresuid(1000, 1000, 1000) == 0);
		execv(path, argv);
		_exit(1);
	}
	status = status_of(pid);
	pid = fork();
	if (pid == 0) {
		CHECK(setresgid(1000, 1000, 1000) == 0 && setresuid(1000, 1000, 1000) == 0);
		CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
		execv(path, argv);
		_exit(1);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 31);
	unlink(path);
	/* a nosuid /tmp shows 31 */
	CHECK(WEXITSTATUS(status) == 30 || WEXITSTATUS(status) == 31);
}

int main(int argc, char **argv)
{
	if (argc > 1) {
		if (geteuid() == 1234 && getegid() == 1235 && getuid() == 1000)
			return 30;
		return geteuid() == 1000 && getegid() == 1000 ? 31 : 1;
	}
	CHECK(getuid() == geteuid() && getgid() == getegid());
	if (getuid() == 0) {
		in_child(all_change);
		in_child(effective_and_back);
		in_child(keep);
		in_child(files);
		in_child(bounding);
		kills();
		set_user_id();
	}
	in_child(switches);
	in_child(limits);
	in_child(priorities);
	puts("ok");
	return 0;
}
