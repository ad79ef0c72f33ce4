/* execve(2), execveat(2): arguments, scripts, errors, what is kept and what is reset, ETXTBSY, E2BIG. */
#include "proc_check.h"
#include <elf.h>
#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>

static char dir[64] = "/tmp/exec.XXXXXX";
static char self[4096];

static const char *path(const char *name)
{
	static char buf[4][256];
	static int n;

	n = (n + 1) & 3;
	snprintf(buf[n], sizeof(buf[n]), "%s/%s", dir, name);
	return buf[n];
}

static void put(const char *name, const char *text, mode_t mode)
{
	int fd = open(path(name), O_CREAT | O_WRONLY | O_TRUNC, 0600);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	CHECK(fchmod(fd, mode) == 0 && close(fd) == 0);
}

/* Runs a program in a child; gives its exit status, or 200 + errno when exec failed. */
static int run(const char *program, char *const argv[], char *const envp[])
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		execve(program, argv, envp);
		_exit(200 + errno);
	}
	status = status_of(pid);
	CHECK(WIFEXITED(status));
	return WEXITSTATUS(status);
}

static char *no_env[] = { NULL };

static void errors(void)
{
	char *argv[] = { "x", NULL };

	put("text", "just text\n", 0755);
	put("empty", "", 0755);
	put("plain", "#!/bin/true\n", 0644);
	put("lost", "#!/no/such/interpreter\n", 0755);
	put("loop", "", 0755);
	CHECK(run(path("none"), argv, no_env) == 200 + ENOENT);
	CHECK(run(path("text"), argv, no_env) == 200 + ENOEXEC);
	CHECK(run(path("empty"), argv, no_env) == 200 + ENOEXEC);
	CHECK(run(path("plain"), argv, no_env) == 200 + EACCES);
	CHECK(run(path("lost"), argv, no_env) == 200 + ENOENT);
	CHECK(run(dir, argv, no_env) == 200 + EACCES);
	CHECK(run(path("text/x"), argv, no_env) == 200 + ENOTDIR);
	CHECK(run("", argv, no_env) == 200 + ENOENT);
	CHECK(symlink("turning", path("turning")) == 0);
	CHECK(run(path("turning"), argv, no_env) == 200 + ELOOP);
	FAILS(syscall(SYS_execve, 8, argv, no_env), EFAULT);
	FAILS(syscall(SYS_execve, self, 8, no_env), EFAULT);
}

static void arguments(void)
{
	char *argv[] = { "name", "one", "", "three", NULL }, *env[] = { "A=1", "MODE=args", NULL };
	static char big[140000];
	char *huge[] = { "x", big, NULL };
	static char *many[40000], chunk[200];
	int i;

	CHECK(run(self, argv, env) == 50);
	CHECK(run(self, NULL, (char *[]){ "MODE=null", NULL }) == 51);
	memset(big, 'x', sizeof(big) - 1);
	CHECK(run(self, huge, no_env) == 200 + E2BIG);
	big[131000] = 0;
	CHECK(run(self, huge, (char *[]){ "MODE=big", NULL }) == 52);
	memset(chunk, 'y', sizeof(chunk) - 1);
	for (i = 0; i < 39999; i++)
		many[i] = chunk;
	CHECK(run(self, many, no_env) == 200 + E2BIG);
}

static void scripts(void)
{
	char text[8192], *argv[] = { "zero", "a b", NULL }, *env[] = { "MODE=script", NULL };
	int i;

	snprintf(text, sizeof(text), "#! %s -x  -y \nrest", self);
	put("script", text, 0755);
	CHECK(run(path("script"), argv, env) == 60);
	snprintf(text, sizeof(text), "#!%s\n", self);
	put("s0", text, 0755);
	for (i = 1; i < 7; i++) {
		char name[8];

		snprintf(name, sizeof(name), "s%d", i);
		snprintf(text, sizeof(text), "#!%s/s%d\n", dir, i - 1);
		put(name, text, 0755);
	}
	CHECK(run(path("s4"), argv, (char *[]){ "MODE=depth", NULL }) == 61);
	CHECK(run(path("s5"), argv, (char *[]){ "MODE=depth", NULL }) == 200 + ELOOP);
	put("blank", "#!   \n", 0755);
	CHECK(run(path("blank"), argv, env) == 200 + ENOEXEC);
}

static void on_signal(int signo)
{
}

static void kept(void)
{
	char *argv[] = { "x", NULL }, *env[] = { "MODE=kept", NULL };
	sigset_t set;
	pid_t pid = fork();

	if (pid == 0) {
		CHECK(dup2(1, 50) == 50 && dup2(1, 51) == 51);
		CHECK(fcntl(51, F_SETFD, FD_CLOEXEC) == 0);
		handle(SIGUSR1, on_signal, 0);
		signal(SIGUSR2, SIG_IGN);
		sigemptyset(&set);
		sigaddset(&set, SIGHUP);
		sigprocmask(SIG_BLOCK, &set, NULL);
		raise(SIGHUP);
		alarm(100);
		umask(031);
		prctl(PR_SET_NAME, "other", 0, 0, 0);
		execve(self, argv, env);
		_exit(1);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 70);
}

static int check_kept(void)
{
	struct sigaction sa;
	sigset_t set;
	char name[16];

	CHECK(fcntl(50, F_GETFD) == 0);
	FAILS(fcntl(51, F_GETFD), EBADF);
	CHECK(sigaction(SIGUSR1, NULL, &sa) == 0 && sa.sa_handler == SIG_DFL);
	CHECK(sigaction(SIGUSR2, NULL, &sa) == 0 && sa.sa_handler == SIG_IGN);
	CHECK(sigprocmask(SIG_BLOCK, NULL, &set) == 0 && sigismember(&set, SIGHUP));
	CHECK(sigpending(&set) == 0 && sigismember(&set, SIGHUP));
	CHECK(alarm(0) > 90 && umask(0) == 031);
	CHECK(prctl(PR_GET_NAME, name, 0, 0, 0) == 0 && strcmp(name, "other") != 0);
	return 70;
}

static void busy(void)
{
	char buf[65536], *argv[] = { "x", NULL };
	int in = open(self, O_RDONLY), out = open(path("copy"), O_CREAT | O_WRONLY, 0755), status;
	ssize_t n;
	pid_t pid;

	CHECK(in >= 0 && out >= 0);
	while ((n = read(in, buf, sizeof(buf))) > 0)
		CHECK(write(out, buf, n) == n);
	CHECK(run(path("copy"), argv, no_env) == 200 + ETXTBSY);
	close(out);
	CHECK(run(path("copy"), argv, (char *[]){ "MODE=exit", NULL }) == 33);
	pid = fork();
	if (pid == 0) {
		do /* the parent may have it open for writing just now */
			execve(path("copy"), argv, (char *[]){ "MODE=sleep", NULL });
		while (errno == ETXTBSY);
		_exit(1);
	}
	for (;;) {
		int fd = open(path("copy"), O_WRONLY);

		if (fd == -1) {
			CHECK(errno == ETXTBSY);
			break;
		}
		close(fd);
		nap(1);
	}
	kill(pid, SIGKILL);
	status = status_of(pid);
	CHECK(WTERMSIG(status) == SIGKILL);
	CHECK((out = open(path("copy"), O_WRONLY)) >= 0);
	close(out);
	close(in);
}

static void at(void)
{
	char *argv[] = { "x", NULL }, *env[] = { "MODE=exit", NULL }, name[64];
	int dirfd = open(dir, O_PATH | O_DIRECTORY), fd = open(self, O_RDONLY), script;
	int memory = memfd_create("m", 0), in = open(self, O_RDONLY);
	char buf[65536];
	ssize_t n;
	pid_t pid;

	CHECK(dirfd >= 0 && fd >= 0 && memory >= 0);
	pid = fork();
	if (pid == 0) {
		syscall(SYS_execveat, dirfd, "copy", argv, env, 0);
		_exit(1);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 33);
	pid = fork();
	if (pid == 0) {
		syscall(SYS_execveat, fd, "", argv, env, AT_EMPTY_PATH);
		_exit(1);
	}
	CHECK(WEXITSTATUS(status_of(pid)) == 33);
	while ((n = read(in, buf, sizeof(buf))) > 0)
		CHECK(write(memory, buf, n) == n);
	close(memory);
	FAILS(syscall(SYS_execveat, fd, "", argv, env, 0), ENOENT);
	FAILS(syscall(SYS_execveat, fd, "", argv, env, AT_EMPTY_PATH | 0x10), EINVAL);
	FAILS(syscall(SYS_execveat, dirfd, "turning", argv, env, AT_SYMLINK_NOFOLLOW), ELOOP);
	FAILS(syscall(SYS_execveat, 99, "x", argv, env, 0), EBADF);
	script = open(path("script"), O_RDONLY | O_CLOEXEC);
	FAILS(syscall(SYS_execveat, script, "", argv, env, AT_EMPTY_PATH), ENOENT);
	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	CHECK(run(name, argv, env) == 33);
	close(script);
	close(dirfd);
	close(fd);
	close(in);
}

static int child(const char *mode, int argc, char **argv)
{
	if (strcmp(mode, "args") == 0) {
		CHECK(argc == 4 && !strcmp(argv[0], "name") && !strcmp(argv[2], "") && !strcmp(argv[3], "three"));
		CHECK(!strcmp(getenv("A"), "1") && argv[4] == NULL);
		CHECK(!strcmp((char *)getauxval(AT_EXECFN), self));
		CHECK(getauxval(AT_PAGESZ) == 4096 && getauxval(AT_UID) == getuid() && !getauxval(AT_SECURE));
		CHECK(getauxval(AT_RANDOM) && getauxval(AT_CLKTCK) == 100);
		return 50;
	}
	if (strcmp(mode, "null") == 0)
		return argc == 1 && argv[0][0] == 0 ? 51 : 1;
	if (strcmp(mode, "big") == 0)
		return argc == 2 && strlen(argv[1]) == 131000 ? 52 : 1;
	if (strcmp(mode, "script") == 0) {
		CHECK(argc == 4 && !strcmp(argv[1], "-x  -y") && strstr(argv[2], "/script") && !strcmp(argv[3], "a b"));
		CHECK(strstr((char *)getauxval(AT_EXECFN), "/script"));
		return 60;
	}
	if (strcmp(mode, "depth") == 0)
		return argc == 7 && strstr(argv[1], "/s0") && strstr(argv[5], "/s4") ? 61 : 1;
	if (strcmp(mode, "kept") == 0)
		return check_kept();
	if (strcmp(mode, "sleep") == 0)
		pause();
	return 33;
}

int main(int argc, char **argv)
{
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	char *names[] = { "text", "empty", "plain", "lost", "loop", "turning", "script", "blank", "copy", "s0", "s1", "s2", "s3",
			  "s4", "s5", "s6" };
	unsigned int i;

	CHECK(n > 0);
	self[n] = 0;
	if (getenv("MODE"))
		return child(getenv("MODE"), argc, argv);
	CHECK(mkdtemp(dir) != NULL);
	errors();
	arguments();
	scripts();
	kept();
	busy();
	at();
	for (i = 0; i < sizeof(names) / sizeof(*names); i++)
		CHECK(unlink(path(names[i])) == 0);
	CHECK(rmdir(dir) == 0);
	puts("ok");
	return 0;
}
