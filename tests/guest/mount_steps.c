/* Mounting in steps: fsopen, fsconfig, fsmount, move_mount, open_tree, fspick, mount_setattr. Needs CAP_SYS_ADMIN. */
#include "proc_check.h"
#include <fcntl.h>
#include <linux/mount.h>
#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#define MS_REC_PRIVATE (16384 | 1 << 18)

int mount(const char *, const char *, const char *, unsigned long, const void *);
int umount2(const char *, int);

static long config(int fd, int command, const char *key, const void *value, int aux)
{
	return syscall(SYS_fsconfig, fd, command, key, value, aux);
}

static int shown(const char *place)
{
	char line[4096];
	FILE *f = fopen("/proc/self/mounts", "r");
	int count = 0;

	while (fgets(line, sizeof(line), f)) {
		char *at = strstr(line, place);

		if (at && at[strlen(place)] == ' ')
			count++;
	}
	fclose(f);
	return count;
}

static void put(int dir, const char *name, const char *text)
{
	int fd = openat(dir, name, O_CREAT | O_WRONLY, 0600);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

/* Who polls the table hears of each change once. */
static void watched_table(const char *place)
{
	int table = open("/proc/self/mounts", O_RDONLY), info = open("/proc/self/mountinfo", O_RDONLY);
	struct pollfd p[2] = { { .fd = table, .events = POLLPRI }, { .fd = info, .events = POLLIN } };
	int epoll = epoll_create1(0);
	struct epoll_event e = { .events = EPOLLPRI | EPOLLET };
	pid_t pid;

	CHECK(table >= 0 && info >= 0);
	CHECK(poll(p, 2, 0) == 1 && p[0].revents == 0 && p[1].revents == POLLIN);
	CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, info, &e) == 0 && epoll_wait(epoll, &e, 1, 0) == 0);
	CHECK(mount("none", place, "tmpfs", 0, NULL) == 0);
	CHECK(poll(p, 1, 0) == 1 && p[0].revents == (POLLPRI | POLLERR));
	CHECK(poll(p, 1, 0) == 0);
	CHECK(epoll_wait(epoll, &e, 1, 0) == 1 && e.events == (EPOLLPRI | EPOLLERR));
	CHECK(epoll_wait(epoll, &e, 1, 0) == 0);
	pid = fork();
	if (pid == 0) {
		nap(50);
		_exit(umount2(place, 0) != 0);
	}
	CHECK(poll(p, 1, 20000) == 1 && p[0].revents == (POLLPRI | POLLERR));
	CHECK(epoll_wait(epoll, &e, 1, 0) == 1);
	CHECK(status_of(pid) == 0);
	close(epoll);
	close(table);
	close(info);
}

int main(void)
{
	char place[] = "/tmp/mount.XXXXXX", second[64], path[96];
	int fs, mnt, tree;
	struct statvfs v;
	struct stat st;
	struct mount_attr attr = { 0 };

	if (unshare(CLONE_NEWNS) == -1) {
		puts("no new mount namespace");
		return 4;
	}
	CHECK(mount("none", "/", NULL, MS_REC_PRIVATE, NULL) == 0);
	CHECK(mkdtemp(place));
	snprintf(second, sizeof(second), "%s.second", place);
	CHECK(mkdir(second, 0700) == 0);

	watched_table(second);
	FAILS(syscall(SYS_fsopen, "nonesuch", 0), ENODEV);
	FAILS(syscall(SYS_fsopen, "tmpfs", 8), EINVAL);
	FAILS(syscall(SYS_fsopen, (char *)8, 0), EFAULT);
	fs = syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);
	CHECK(fs >= 0 && fcntl(fs, F_GETFD) == FD_CLOEXEC);
	FAILS(config(fs, FSCONFIG_SET_STRING, "nonesuch", "1", 0), EINVAL);
	FAILS(config(fs, FSCONFIG_SET_STRING, NULL, "1", 0), EINVAL);
	CHECK(config(fs, FSCONFIG_SET_STRING, "async", "whatever", 0) == 0);
	FAILS(config(fs, FSCONFIG_SET_FLAG, "ro", "1", 0), EINVAL);
	FAILS(config(0, FSCONFIG_SET_FLAG, "ro", NULL, 0), EINVAL);
	FAILS(config(999, FSCONFIG_SET_FLAG, "ro", NULL, 0), EBADF);
	FAILS(config(fs, 99, NULL, NULL, 0), EOPNOTSUPP);
	FAILS(syscall(SYS_fsmount, fs, 0, 0), EINVAL);
	CHECK(config(fs, FSCONFIG_SET_STRING, "source", "mine", 0) == 0);
	CHECK(config(fs, FSCONFIG_SET_STRING, "size", "1m", 0) == 0);
	CHECK(config(fs, FSCONFIG_SET_STRING, "mode", "0751", 0) == 0);
	CHECK(config(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0);
	FAILS(config(fs, FSCONFIG_SET_STRING, "size", "2m", 0), EBUSY);
	FAILS(syscall(SYS_fsmount, fs, 0, MOUNT_ATTR_IDMAP), EINVAL);
	mnt = syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID);
	CHECK(mnt >= 0);
	FAILS(syscall(SYS_fsmount, fs, 0, 0), EBUSY);
	/* usable before it has a place */
	put(mnt, "file", "abc");
	CHECK(fstat(mnt, &st) == 0 && (st.st_mode & 07777) == 0751);
	CHECK(shown(place) == 0);
	CHECK(syscall(SYS_move_mount, mnt, "", AT_FDCWD, place, MOVE_MOUNT_F_EMPTY_PATH) == 0);
	CHECK(shown(place) == 1);
	close(mnt), close(fs);
	snprintf(path, sizeof(path), "%s/file", place);
	CHECK(stat(path, &st) == 0 && st.st_size == 3);
	CHECK(statvfs(place, &v) == 0 && v.f_blocks * v.f_frsize == 1 << 20 && v.f_flag & ST_NODEV && v.f_flag & ST_NOSUID);

	/* a copy of it */
	FAILS(syscall(SYS_open_tree, AT_FDCWD, place, AT_RECURSIVE), EINVAL);
	tree = syscall(SYS_open_tree, AT_FDCWD, place, OPEN_TREE_CLOEXEC);
	CHECK(tree >= 0 && (fcntl(tree, F_GETFL) & O_PATH));
	close(tree);
	tree = syscall(SYS_open_tree, AT_FDCWD, place, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	CHECK(tree >= 0);
	attr.attr_set = MOUNT_ATTR_RDONLY;
	CHECK(syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof(attr)) == 0);
	FAILS(openat(tree, "new", O_CREAT | O_WRONLY, 0600), EROFS);
	CHECK(syscall(SYS_move_mount, tree, "", AT_FDCWD, second, MOVE_MOUNT_F_EMPTY_PATH) == 0);
	close(tree);
	snprintf(path, sizeof(path), "%s/file", second);
	CHECK(stat(path, &st) == 0);
	FAILS(open(path, O_WRONLY), EROFS);
	snprintf(path, sizeof(path), "%s/file", place);
	CHECK(truncate(path, 5) == 0);
	attr.attr_set = 0, attr.attr_clr = MOUNT_ATTR_RDONLY;
	CHECK(syscall(SYS_mount_setattr, AT_FDCWD, second, 0, &attr, sizeof(attr)) == 0);
	snprintf(path, sizeof(path), "%s/file", second);
	CHECK(truncate(path, 6) == 0);
	attr.attr_clr = 0, attr.attr_set = MOUNT_ATTR_NOATIME;
	FAILS(syscall(SYS_mount_setattr, AT_FDCWD, second, 0, &attr, sizeof(attr)), EINVAL);
	FAILS(syscall(SYS_mount_setattr, AT_FDCWD, second, 0, &attr, 8), EINVAL);
	FAILS(syscall(SYS_mount_setattr, AT_FDCWD, "/nowhere", 0, &attr, sizeof(attr)), EINVAL);
	attr.attr_set = 1ULL << 40;
	FAILS(syscall(SYS_mount_setattr, AT_FDCWD, second, 0, &attr, sizeof(attr)), EINVAL);
	memset(&attr, 0, sizeof(attr));
	CHECK(syscall(SYS_mount_setattr, AT_FDCWD, "/nowhere", 0, &attr, sizeof(attr)) == 0);
	attr.propagation = 1 << 18;
	CHECK(syscall(SYS_mount_setattr, AT_FDCWD, second, AT_RECURSIVE, &attr, sizeof(attr)) == 0);

	/* a mount that is there is moved */
	CHECK(umount2(second, 0) == 0);
	CHECK(syscall(SYS_move_mount, AT_FDCWD, place, AT_FDCWD, second, 0) == 0);
	CHECK(shown(place) == 0 && shown(second) == 1);
	FAILS(syscall(SYS_move_mount, AT_FDCWD, "/tmp", AT_FDCWD, "/nowhere", 0), ENOENT);
	FAILS(syscall(SYS_move_mount, AT_FDCWD, place, AT_FDCWD, second, 0), EINVAL);
	FAILS(syscall(SYS_move_mount, AT_FDCWD, place, AT_FDCWD, second, 8), EINVAL);

	/* and changed */
	FAILS(syscall(SYS_fspick, AT_FDCWD, place, 0), EINVAL);
	fs = syscall(SYS_fspick, AT_FDCWD, second, FSPICK_CLOEXEC);
	CHECK(fs >= 0);
	CHECK(config(fs, FSCONFIG_SET_STRING, "size", "3m", 0) == 0);
	CHECK(config(fs, FSCONFIG_CMD_RECONFIGURE, NULL, NULL, 0) == 0);
	close(fs);
	CHECK(statvfs(second, &v) == 0 && v.f_blocks * v.f_frsize == 3 << 20);
	CHECK(umount2(second, 0) == 0);

	/* a mount that was put nowhere ends with its descriptor */
	fs = syscall(SYS_fsopen, "tmpfs", 0);
	CHECK(config(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0);
	mnt = syscall(SYS_fsmount, fs, 0, 0);
	CHECK(mnt >= 0);
	put(mnt, "gone", "x");
	close(mnt), close(fs);
	CHECK(rmdir(place) == 0 && rmdir(second) == 0);
	puts("mounted in steps");
	return 0;
}
