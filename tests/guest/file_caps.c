/* File capabilities: security.capability is checked when set, given by exec, lost by a write, ignored with nosuid.
 * Run as root; without CAP_SETFCAP it skips. */
#include "proc_check.h"
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#define NAME "security.capability"

static char copy[] = "/tmp/filecaps.XXXXXX";

static struct vfs_cap_data caps(unsigned int permitted, unsigned int inheritable, int effective)
{
	struct vfs_cap_data data = { .magic_etc = VFS_CAP_REVISION_2 | (effective ? VFS_CAP_FLAGS_EFFECTIVE : 0) };

	data.data[0].permitted = permitted;
	data.data[0].inheritable = inheritable;
	return data;
}

/* What the program says that runs with the file's capabilities. */
static void report(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	syscall(SYS_capget, &header, data);
	if (getuid() == 0) /* whatever the bounding set is */
		printf("root is %s\n", data[0].effective & 1 << CAP_KILL ? "whole" : "less");
	else
		printf("euid %d effective %x permitted %x dumpable %d\n", geteuid(), data[0].effective,
		       data[0].permitted, prctl(PR_GET_DUMPABLE));
	exit(0);
}

static int run(int uid, int nnp)
{
	pid_t child = fork();

	if (child == 0) {
		if (uid)
			CHECK(setgroups(0, NULL) == 0 && setgid(uid) == 0 && setuid(uid) == 0);
		if (nnp)
			CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
		execl(copy, copy, "report", NULL);
		printf("exec: %s\n", strerror(errno));
		exit(3);
	}
	return status_of(child);
}

static void fill(int fd)
{
	char buffer[65536];
	int from = open("/proc/self/exe", O_RDONLY);
	ssize_t n;

	while ((n = read(from, buffer, sizeof(buffer))) > 0)
		CHECK(write(fd, buffer, n) == n);
	close(from);
	CHECK(fchmod(fd, 0755) == 0);
}

int main(int argc, char **argv)
{
	struct vfs_cap_data data = caps(1 << CAP_NET_RAW | 1 << CAP_KILL, 0, 1), got;
	struct vfs_ns_cap_data other = { .magic_etc = VFS_CAP_REVISION_3 | VFS_CAP_FLAGS_EFFECTIVE, .rootid = 0 };
	int fd;

	setvbuf(stdout, NULL, _IONBF, 0);
	if (argc > 1)
		report();
	fd = mkstemp(copy);
	fill(fd);
	close(fd);
	if (setxattr(copy, NAME, &data, sizeof(data), 0) == -1) {
		printf("can't set capabilities: %s\n", strerror(errno));
		return 4;
	}
	CHECK(getxattr(copy, NAME, &got, sizeof(got)) == sizeof(got) && memcmp(&got, &data, sizeof(got)) == 0);
	FAILS(setxattr(copy, NAME, &data, sizeof(data) - 1, 0), EINVAL);
	FAILS(setxattr(copy, NAME, "junk", 4, 0), EINVAL);
	CHECK(run(1000, 0) == 0);
	CHECK(run(1000, 1) == 0);
	CHECK(run(0, 0) == 0);
	data = caps(1 << CAP_NET_RAW, 0, 0); /* permitted only */
	CHECK(setxattr(copy, NAME, &data, sizeof(data), 0) == 0);
	CHECK(run(1000, 0) == 0);
	other.data[0].permitted = 1 << CAP_CHOWN;
	CHECK(setxattr(copy, NAME, &other, sizeof(other), 0) == 0);
	CHECK(run(1000, 0) == 0);
	other.rootid = 12345; /* another namespace's root */
	CHECK(setxattr(copy, NAME, &other, sizeof(other), 0) == 0);
	CHECK(run(1000, 0) == 0);
	/* setuid root and capabilities: the capabilities */
	data = caps(1 << CAP_KILL, 0, 1);
	CHECK(chmod(copy, 04755) == 0 && setxattr(copy, NAME, &data, sizeof(data), 0) == 0);
	CHECK(run(1000, 0) == 0);
	CHECK(chmod(copy, 0755) == 0);
	/* not in the bounding set: a program that wants it whole does not start */
	if (fork() == 0) {
		CHECK(prctl(PR_CAPBSET_DROP, CAP_KILL, 0, 0, 0) == 0);
		CHECK(run(1000, 0) == 3 << 8);
		_exit(0);
	}
	CHECK(wait(NULL) > 0);
	/* lost by a write, and by a change of owner */
	fd = open(copy, O_WRONLY);
	CHECK(pwrite(fd, "\177", 1, 0) == 1);
	close(fd);
	FAILS(getxattr(copy, NAME, &got, sizeof(got)), ENODATA);
	CHECK(setxattr(copy, NAME, &data, sizeof(data), 0) == 0);
	CHECK(chown(copy, 0, 0) == 0);
	FAILS(getxattr(copy, NAME, &got, sizeof(got)), ENODATA);
	CHECK(setxattr(copy, NAME, &data, sizeof(data), 0) == 0);
	CHECK(removexattr(copy, NAME) == 0);
	CHECK(run(1000, 0) == 0);
	unlink(copy);
	puts("capabilities of files");
	return 0;
}
