/* User namespaces, user_namespaces(7): maps and who may write them, what ids are shown as, capabilities towards what a
 * namespace owns and towards nothing else. */
#include "proc_check.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <grp.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/msg.h>
#include <sys/stat.h>

#define NS_GET_USERNS 0xb701
#define NS_GET_PARENT 0xb702
#define NS_GET_OWNER_UID 0xb704

static int ended(pid_t pid)
{
	int status;

	CHECK(waitpid(pid, &status, 0) == pid);
	return status;
}

/* The errno of a write of `text` to `path`, 0 when it was taken. */
static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), failed = 0;

	if (fd < 0)
		return errno;
	if (write(fd, text, strlen(text)) < 0)
		failed = errno;
	close(fd);
	return failed;
}

static void show(const char *path)
{
	char text[4096];
	int fd = open(path, O_RDONLY);
	ssize_t n;

	CHECK(fd >= 0);
	n = read(fd, text, sizeof text - 1);
	CHECK(n >= 0);
	text[n] = 0;
	close(fd);
	printf("%s: %s%s", path, text, n ? "" : "(empty)\n");
}

static void capabilities(unsigned long long *effective, unsigned long long *permitted)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	CHECK(!syscall(SYS_capget, &header, data));
	*effective = data[0].effective | (unsigned long long)data[1].effective << 32;
	*permitted = data[0].permitted | (unsigned long long)data[1].permitted << 32;
}

#define IN_CHILD(body)                      \
	do {                                \
		fflush(stdout);             \
		pid_t child_ = fork();      \
		CHECK(child_ >= 0);         \
		if (!child_) {              \
			body;               \
			exit(0);            \
		}                           \
		CHECK(ended(child_) == 0);  \
	} while (0)

static void as_user(void)
{
	CHECK(!setgroups(0, 0));
	CHECK(!setresgid(1000, 1000, 1000));
	CHECK(!setresuid(1000, 1000, 1000));
	CHECK(!prctl(PR_SET_DUMPABLE, 1));
}

static void unmapped(void)
{
	unsigned long long effective, permitted;
	struct stat st;

	as_user();
	capabilities(&effective, &permitted);
	CHECK(!effective && !permitted);
	CHECK(!unshare(CLONE_NEWUSER));
	CHECK(getuid() == 65534 && geteuid() == 65534 && getgid() == 65534);
	capabilities(&effective, &permitted);
	printf("capabilities %llx %llx\n", effective & 0x1ffffffffff, permitted & 0x1ffffffffff);
	CHECK(!stat("/", &st) && st.st_uid == 65534 && st.st_gid == 65534);
	show("/proc/self/uid_map");
	show("/proc/self/gid_map");
	show("/proc/self/setgroups");
	FAILS(setuid(0), EINVAL); /* no such user here */
	FAILS(setresgid(-1, 5, -1), EINVAL);
	FAILS(setgroups(0, 0), EPERM);
	FAILS(unshare(CLONE_NEWUSER), EPERM); /* without a name there is no owner */
	/* exec takes the capabilities: nobody is root here */
	puts("unmapped");
}

static void mapped_by_itself(void)
{
	struct stat st;
	gid_t groups[8];

	as_user();
	CHECK(!unshare(CLONE_NEWUSER));
	CHECK(put("/proc/self/uid_map", "0 1001 1\n") == EPERM); /* somebody else */
	CHECK(put("/proc/self/uid_map", "0 1000 2\n") == EPERM); /* more than oneself */
	CHECK(put("/proc/self/uid_map", "0 1000\n") == EINVAL);
	CHECK(put("/proc/self/uid_map", "0 1000 0\n") == EINVAL);
	CHECK(put("/proc/self/uid_map", "") == EINVAL);
	CHECK(put("/proc/self/uid_map", "x 1000 1\n") == EINVAL);
	CHECK(put("/proc/self/uid_map", "0 1000 1\n0 1000 1\n") == EINVAL);
	CHECK(put("/proc/self/uid_map", "0 1000 1\n") == 0);
	CHECK(put("/proc/self/uid_map", "0 1000 1\n") == EPERM); /* once only */
	CHECK(put("/proc/self/gid_map", "0 1000 1\n") == EPERM); /* setgroups first */
	CHECK(put("/proc/self/setgroups", "maybe") == EINVAL);
	CHECK(put("/proc/self/setgroups", "deny") == 0);
	CHECK(put("/proc/self/setgroups", "allow") == EPERM);
	CHECK(put("/proc/self/gid_map", "5 1000 1\n") == 0);
	show("/proc/self/uid_map");
	show("/proc/self/gid_map");
	show("/proc/self/setgroups");
	CHECK(getuid() == 0 && getgid() == 5);
	CHECK(getgroups(8, groups) == 0);
	FAILS(setgroups(0, 0), EPERM);
	CHECK(!setuid(0));
	FAILS(setuid(1), EINVAL);
	/* The machine is not ours, the file system is not ours. */
	FAILS(sethostname("x", 1), EPERM);
	FAILS(mount("none", "/tmp", "tmpfs", 0, 0), EPERM);
	FAILS(chroot("/proc/self/nothing"), ENOENT);
	CHECK(!chroot("/"));
	FAILS(chown("/", 0, 5), EPERM);
	FAILS(chmod("/", 0755), EPERM);
	FAILS(mknod("/tmp/kvmsentry-node", S_IFCHR | 0600, 0x103), EPERM);
	FAILS(open("/etc/shadow", O_RDONLY), EACCES);
	FAILS(setpriority(PRIO_PROCESS, 0, -5), EACCES);
	int fd = open("/tmp/kvmsentry-ns-file", O_CREAT | O_RDWR | O_TRUNC, 0600);
	CHECK(fd >= 0 && !fstat(fd, &st) && st.st_uid == 0 && st.st_gid == 5);
	FAILS(fchown(fd, 7, -1), EINVAL);
	CHECK(!fchown(fd, 0, 5));
	CHECK(!unlink("/tmp/kvmsentry-ns-file"));
	/* What is made here is ours. */
	CHECK(!unshare(CLONE_NEWUTS | CLONE_NEWNS | CLONE_NEWIPC));
	CHECK(!sethostname("ours", 4));
	CHECK(!mount("none", "/tmp", "tmpfs", 0, 0));
	fd = open("/tmp/file", O_CREAT | O_RDWR, 0644);
	CHECK(fd >= 0 && !fstat(fd, &st) && st.st_uid == 0 && st.st_gid == 5);
	FAILS(mknod("/tmp/node", S_IFCHR | 0600, 0x103), EPERM);
	FAILS(mount("proc", "/proc", "proc", 0, 0), EPERM); /* of a PID namespace that is not ours */
	FAILS(umount("/proc"), EINVAL); /* locked to what is below */
	close(fd);
	CHECK(!umount("/tmp"));
	IN_CHILD({
		CHECK(!unshare(CLONE_NEWPID));
		IN_CHILD({
			CHECK(getpid() == 1);
			CHECK(!mount("proc", "/proc", "proc", 0, 0));
			show("/proc/self/uid_map");
		});
	});
	puts("mapped by itself");
}

static void mapped_from_above(void)
{
	int up[2], down[2];
	char byte, path[64];
	pid_t pid;

	CHECK(!pipe(up) && !pipe(down));
	fflush(stdout);
	pid = fork();
	if (!pid) {
		gid_t groups[2] = { 7, 1000 };

		CHECK(!unshare(CLONE_NEWUSER));
		CHECK(write(up[1], "x", 1) == 1 && read(down[0], &byte, 1) == 1);
		show("/proc/self/uid_map");
		CHECK(getuid() == 65534); /* root is not mapped */
		CHECK(!setresgid(7, 7, 7) && !setgroups(2, groups) && getgroups(0, 0) == 2);
		CHECK(!setresuid(0, 0, 0));
		CHECK(getuid() == 0 && getgid() == 7);
		FAILS(setuid(5000), EINVAL);
		int fd = open("/tmp/kvmsentry-ns-above", O_CREAT | O_EXCL | O_RDWR, 0600);
		CHECK(fd >= 0);
		CHECK(!fchown(fd, 12, 13)); /* CAP_CHOWN counts: old and new owner have names here */
		CHECK(!fchmod(fd, 0644));
		close(fd);
		fd = open("/tmp/kvmsentry-ns-above", O_RDWR); /* CAP_DAC_OVERRIDE too */
		CHECK(fd >= 0);
		CHECK(!prctl(PR_SET_DUMPABLE, 1));
		CHECK(write(up[1], "y", 1) == 1 && read(down[0], &byte, 1) == 1);
		CHECK(!setresuid(3, 3, 3));
		unsigned long long effective, permitted;
		capabilities(&effective, &permitted);
		CHECK(!effective && !permitted); /* leaving the namespace's root drops them */
		exit(0);
	}
	CHECK(read(up[0], &byte, 1) == 1);
	snprintf(path, sizeof path, "/proc/%d/uid_map", pid);
	CHECK(put(path, "0 100000 1000\n2000 200000 10\n2000 300000 1") == EINVAL);
	CHECK(put(path, "0 100000 1000\n2000 200000 10\n") == 0);
	snprintf(path, sizeof path, "/proc/%d/gid_map", pid);
	CHECK(put(path, "0 100000 1001\n") == 0);
	CHECK(write(down[1], "x", 1) == 1);
	CHECK(read(up[0], &byte, 1) == 1);
	struct stat st;
	CHECK(!stat("/tmp/kvmsentry-ns-above", &st));
	printf("from above: %d %d\n", st.st_uid, st.st_gid);
	CHECK(!unlink("/tmp/kvmsentry-ns-above"));
	snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
	int fd = open(path, O_RDONLY), other;
	uid_t owner;
	CHECK(fd >= 0 && !ioctl(fd, NS_GET_OWNER_UID, &owner) && owner == 0);
	other = ioctl(fd, NS_GET_PARENT);
	CHECK(other >= 0);
	struct stat mine;
	CHECK(!fstat(other, &st) && !stat("/proc/self/ns/user", &mine) && st.st_ino == mine.st_ino);
	FAILS(ioctl(other, NS_GET_PARENT), EPERM);
	IN_CHILD({
		CHECK(!setns(fd, CLONE_NEWUSER));
		CHECK(getuid() == 65534);
		FAILS(setns(fd, CLONE_NEWUSER), EINVAL);
		FAILS(setns(other, CLONE_NEWUSER), EPERM);
		FAILS(sethostname("x", 1), EPERM);
	});
	CHECK(write(down[1], "x", 1) == 1);
	CHECK(ended(pid) == 0);
	puts("mapped from above");
}

static void ipc(void)
{
	int id = shmget(0x4b53, 4096, IPC_CREAT | 0600);

	CHECK(id >= 0);
	IN_CHILD({
		CHECK(!unshare(CLONE_NEWIPC));
		FAILS(shmget(0x4b53, 4096, 0600), ENOENT);
		CHECK(shmget(0x4b53, 8192, IPC_CREAT | 0600) >= 0);
		struct shmid_ds ds;
		CHECK(!shmctl(shmget(0x4b53, 0, 0), IPC_STAT, &ds) && ds.shm_segsz == 8192);
		CHECK(msgget(0x4b53, IPC_CREAT | 0600) >= 0);
	});
	FAILS(msgget(0x4b53, 0600), ENOENT);
	CHECK(!shmctl(id, IPC_RMID, 0));
	puts("ipc");
}

static void limits(void)
{
	IN_CHILD({
		as_user();
		CHECK(!unshare(CLONE_NEWUSER));
		CHECK(put("/proc/self/setgroups", "deny") == 0);
		CHECK(put("/proc/self/uid_map", "0 1000 1") == 0 && put("/proc/self/gid_map", "0 1000 1") == 0);
		int depth = 1;
		while (!unshare(CLONE_NEWUSER)) {
			CHECK(put("/proc/self/uid_map", "0 0 1") == 0);
			CHECK(put("/proc/self/gid_map", "0 0 1") == 0);
			depth++;
		}
		printf("%d deep, errno %d\n", depth, errno);
	});
	FAILS(syscall(SYS_clone, CLONE_NEWUSER | CLONE_FS | SIGCHLD, 0, 0, 0, 0), EINVAL);
	FAILS(syscall(SYS_clone, CLONE_NEWUSER | CLONE_THREAD | CLONE_SIGHAND | CLONE_VM, 0, 0, 0, 0), EINVAL);
	puts("limits");
}

static void as_init_of_all(void)
{
	char *argv[] = { "sh", "-c", "id -u; id -g; cat /proc/self/uid_map; ls -ldn / | cut -d' ' -f3,4; "
			 "grep -E '^(Uid|Gid|CapEff)' /proc/self/status", 0 };

	as_user();
	CHECK(!unshare(CLONE_NEWUSER));
	CHECK(put("/proc/self/setgroups", "deny") == 0);
	CHECK(put("/proc/self/uid_map", "0 1000 1") == 0 && put("/proc/self/gid_map", "0 1000 1") == 0);
	execv("/bin/sh", argv);
	CHECK(!"exec");
}

int main(void)
{
	if (getuid()) {
		puts("needs root");
		return 4;
	}
	umask(022);
	fflush(stdout);
	pid_t pid = fork();
	if (!pid)
		exit(unshare(CLONE_NEWUSER) ? 1 : 0);
	if (ended(pid)) {
		puts("no user namespaces here");
		return 4;
	}
	IN_CHILD(unmapped());
	IN_CHILD(mapped_by_itself());
	IN_CHILD(mapped_from_above());
	IN_CHILD(ipc());
	IN_CHILD(limits());
	IN_CHILD(as_init_of_all());
	return 0;
}
