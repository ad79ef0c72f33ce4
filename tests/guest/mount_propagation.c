/*
 * Shared subtrees: peers, slaves, private and unbindable mounts; binds, moves and unmounts that propagate; mount
 * namespaces, less privileged ones too; pivot_root; what MNT_EXPIRE and remounting look at. mount_namespaces(7).
 */
#include "proc_check.h"
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#define MNT_DETACH 2
#define MNT_EXPIRE 4

int mount(const char *, const char *, const char *, unsigned long, const void *);
int umount2(const char *, int);

static char base[] = "/tmp/propagation.XXXXXX";

struct peers {
	int shared, master, from, unbindable, count; /* count: mounts at that path; the rest is of the topmost */
};

static struct peers at(const char *path)
{
	struct peers p = { 0 };
	char line[4096], place[1024], full[256];
	FILE *f = fopen("/proc/self/mountinfo", "r");

	snprintf(full, sizeof(full), "%s%s", *path == '/' ? "" : base, path);
	if (*path != '/')
		snprintf(full, sizeof(full), "%s/%s", base, path);
	CHECK(f);
	while (fgets(line, sizeof(line), f)) {
		char *fields, *end;

		CHECK(sscanf(line, "%*d %*d %*s %*s %1023s", place) == 1);
		if (strcmp(place, full))
			continue;
		end = strstr(line, " - ");
		CHECK(end);
		*end = 0;
		p = (struct peers){ .count = p.count + 1 };
		if ((fields = strstr(line, " shared:")))
			p.shared = atoi(fields + 8);
		if ((fields = strstr(line, " master:")))
			p.master = atoi(fields + 8);
		if ((fields = strstr(line, " propagate_from:")))
			p.from = atoi(fields + 16);
		p.unbindable = strstr(line, " unbindable") != NULL;
	}
	fclose(f);
	return p;
}

static void dir(const char *path)
{
	CHECK(mkdir(path, 0755) == 0 || errno == EEXIST);
}

static void type(const char *path, int flags)
{
	CHECK(mount(NULL, path, NULL, flags, NULL) == 0);
}

static void tmpfs(const char *path)
{
	CHECK(mount("none", path, "tmpfs", 0, NULL) == 0);
}

static void bind_mount(const char *from, const char *to)
{
	CHECK(mount(from, to, NULL, MS_BIND, NULL) == 0);
}

/* A fresh tmpfs on `base`, which is the working directory then, with directories a to d that are private mounts. */
static void fresh(void)
{
	static const char *const names[] = { "a", "b", "c", "d" };

	CHECK(chdir("/") == 0);
	umount2(base, MNT_DETACH);
	tmpfs(base);
	type(base, MS_PRIVATE);
	CHECK(chdir(base) == 0);
	for (int i = 0; i < 4; i++)
		dir(names[i]);
	tmpfs("a");
	dir("a/x");
	dir("a/y");
	dir("a/z");
}

static int here(const char *path)
{
	return access(path, F_OK) == 0;
}

static void touch(const char *path)
{
	int fd = open(path, O_CREAT | O_WRONLY, 0644);

	CHECK(fd >= 0);
	close(fd);
}

static void types(void)
{
	fresh();
	CHECK(at("a").count == 1 && !at("a").shared && !at("a").master);
	FAILS(mount(NULL, "b", NULL, MS_SHARED, NULL), EINVAL); /* no mount's root */
	FAILS(mount(NULL, "a", NULL, MS_SHARED | MS_PRIVATE, NULL), EINVAL);
	FAILS(mount(NULL, "a", NULL, MS_SHARED | 2, NULL), EINVAL);
	type("a", MS_SHARED);
	CHECK(at("a").shared > 0);
	type("a", MS_SLAVE); /* of nobody: private */
	CHECK(!at("a").shared && !at("a").master);
	type("a", MS_UNBINDABLE);
	CHECK(at("a").unbindable);
	FAILS(mount("a", "b", NULL, MS_BIND, NULL), EINVAL);
	FAILS(mount("a/x", "b", NULL, MS_BIND | MS_REC, NULL), EINVAL);
	bind_mount(".", "b"); /* without what is mounted below */
	CHECK(here("b/a") && !here("b/a/x"));
	CHECK(umount2("b", 0) == 0);
	CHECK(mount(".", "b", NULL, MS_BIND | MS_REC, NULL) == 0); /* unbindable mounts are left out */
	CHECK(!here("b/a/x") && at("b").count == 1 && at("b/a").count == 0);
	CHECK(umount2("b", 0) == 0);
	type("a", MS_PRIVATE);
	tmpfs("a/x");
	type("a", MS_SHARED | MS_REC);
	CHECK(at("a").shared && at("a/x").shared && at("a").shared != at("a/x").shared);
	type("a", MS_PRIVATE | MS_REC);
	CHECK(!at("a").shared && !at("a/x").shared);
}

static void peers(void)
{
	int group;

	fresh();
	type("a", MS_SHARED);
	group = at("a").shared;
	bind_mount("a", "b");
	bind_mount("a/x", "c");
	CHECK(at("b").shared == group && at("c").shared == group);
	tmpfs("a/y");
	touch("a/y/file");
	CHECK(here("b/y/file") && at("b/y").shared == at("a/y").shared && at("a/y").shared);
	CHECK(at("c/y").count == 0); /* c shows x only */
	dir("a/x/in");
	tmpfs("c/in");
	touch("c/in/file");
	CHECK(here("a/x/in/file") && here("b/x/in/file"));
	CHECK(umount2("b/x/in", 0) == 0);
	CHECK(!here("a/x/in/file") && !here("c/in/file"));
	CHECK(umount2("a/y", 0) == 0 && !here("b/y/file"));
	type("b", MS_PRIVATE);
	tmpfs("a/y");
	touch("a/y/file");
	CHECK(!here("b/y/file") && !at("b").shared && at("c").shared == group);
}

static void slaves(void)
{
	int group;

	fresh();
	type("a", MS_SHARED);
	group = at("a").shared;
	bind_mount("a", "b");
	type("b", MS_SLAVE);
	CHECK(at("b").master == group && !at("b").shared);
	tmpfs("a/x");
	touch("a/x/file");
	CHECK(here("b/x/file") && at("b/x").master == at("a/x").shared && !at("b/x").shared);
	tmpfs("b/y");
	touch("b/y/own");
	CHECK(!here("a/y/own"));
	/* What the master mounts where the slave has something goes below it. */
	tmpfs("a/y");
	touch("a/y/file");
	CHECK(here("b/y/own") && !here("b/y/file") && at("b/y").count == 2);
	CHECK(umount2("b/y", 0) == 0 && here("b/y/file"));
	CHECK(umount2("a/y", 0) == 0 && at("b/y").count == 0);
	/* ... and goes from below it. */
	tmpfs("a/y");
	tmpfs("b/y");
	touch("b/y/own");
	CHECK(umount2("a/y", 0) == 0 && here("b/y/own") && at("b/y").count == 1);
	/* A slave that is shared passes it on. */
	type("b", MS_SHARED);
	CHECK(at("b").master == group && at("b").shared && at("b").shared != group);
	bind_mount("b", "c");
	CHECK(at("c").master == group && at("c").shared == at("b").shared);
	bind_mount("b", "d");
	type("d", MS_SLAVE);
	CHECK(at("d").master == at("b").shared);
	tmpfs("a/z");
	touch("a/z/file");
	CHECK(here("b/z/file") && here("c/z/file") && here("d/z/file"));
	CHECK(at("b/z").shared == at("c/z").shared && at("b/z").master == at("a/z").shared);
	CHECK(at("d/z").master == at("b/z").shared && !at("d/z").shared);
	CHECK(umount2("c/z", 0) == 0 && !here("b/z/file") && !here("d/z/file") && here("a/z/file"));
	/* With the last member of its group a slave gets that one's master. */
	type("b", MS_PRIVATE);
	CHECK(at("d").master == at("c").shared);
	type("c", MS_PRIVATE);
	CHECK(at("d").master == group);
	type("a", MS_PRIVATE);
	CHECK(!at("d").master);
}

/* A slave whose master is not in sight, below a group that is. */
static void dominating(void)
{
	int first, second;
	pid_t pid;

	fresh();
	dir("root");
	tmpfs("root");
	dir("root/a");
	dir("root/c");
	dir("root/proc");
	bind_mount("/proc", "root/proc");
	bind_mount("a", "root/a");
	CHECK(umount2("root/a", 0) == 0);
	type("a", MS_SHARED);
	first = at("a").shared;
	bind_mount("a", "root/a");
	bind_mount("a", "b");
	type("b", MS_SLAVE);
	type("b", MS_SHARED);
	second = at("b").shared;
	bind_mount("b", "root/c");
	type("root/c", MS_SLAVE);
	CHECK(at("root/c").master == second && !at("root/c").from);
	pid = fork();
	if (pid == 0) {
		CHECK(chroot("root") == 0 && chdir("/") == 0);
		CHECK(at("/a").shared == first);
		CHECK(at("/c").master == second && at("/c").from == first);
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
}

static void moves(void)
{
	fresh();
	bind_mount("a", "b");
	CHECK(mount("b", "c", NULL, MS_MOVE, NULL) == 0);
	CHECK(here("c/x") && !here("b/x"));
	FAILS(mount("b", "c", NULL, MS_MOVE, NULL), EINVAL);
	FAILS(mount("c", "c/x", NULL, MS_MOVE, NULL), ELOOP);
	tmpfs("a/x");
	touch("a/x/file");
	type("a", MS_SHARED);
	FAILS(mount("a/x", "d", NULL, MS_MOVE, NULL), EINVAL); /* from a shared parent */
	bind_mount("a", "b");
	tmpfs("d");
	touch("d/moved");
	type("d", MS_UNBINDABLE);
	FAILS(mount("d", "a/y", NULL, MS_MOVE, NULL), EINVAL);
	type("d", MS_PRIVATE);
	CHECK(mount("d", "a/y", NULL, MS_MOVE, NULL) == 0);
	CHECK(here("b/y/moved") && !here("d/moved") && at("b/y").shared == at("a/y").shared);
	touch("file");
	FAILS(mount("c", "file", NULL, MS_MOVE, NULL), EINVAL);
	FAILS(mount("c", "file", NULL, MS_BIND, NULL), ENOTDIR);
}

static void unmounts(void)
{
	int go[2], fd;
	pid_t pid;
	char c;

	fresh();
	type("a", MS_SHARED);
	bind_mount("a", "b");
	tmpfs("a/x");
	CHECK(pipe(go) == 0);
	pid = fork();
	if (pid == 0) {
		close(go[1]);
		CHECK(chdir("b/x") == 0);
		_exit(read(go[0], &c, 1));
	}
	close(go[0]);
	nap(100);
	FAILS(umount2("a/x", 0), EBUSY); /* the copy is in use */
	CHECK(umount2("a/x", MNT_DETACH) == 0 && at("b/x").count == 0);
	close(go[1]);
	CHECK(status_of(pid) == 0);
	/* A copy with something of its own below it stays. */
	type("b", MS_SLAVE);
	tmpfs("a/x");
	dir("a/x/in");
	tmpfs("b/x/in");
	touch("b/x/in/own");
	CHECK(umount2("a/x", 0) == 0 && here("b/x/in/own") && at("b/x").count == 1);
	/* Whole trees. */
	tmpfs("a/y");
	dir("a/y/in");
	tmpfs("a/y/in");
	CHECK(at("b/y/in").count == 1);
	FAILS(umount2("a/y", 0), EBUSY);
	CHECK(umount2("a/y", MNT_DETACH) == 0);
	CHECK(at("b/y").count == 0 && at("b/y/in").count == 0 && at("a/y/in").count == 0);
	/* What is detached lives on, its mounts apart from each other. */
	tmpfs("c");
	touch("c/file");
	dir("c/in");
	tmpfs("c/in");
	touch("c/in/deep");
	fd = open("c", O_RDONLY | O_DIRECTORY);
	CHECK(umount2("c", MNT_DETACH) == 0 && !here("c/file"));
	CHECK(faccessat(fd, "file", F_OK, 0) == 0);
	CHECK(faccessat(fd, "in", F_OK, 0) == 0 && faccessat(fd, "in/deep", F_OK, 0) == -1);
	CHECK(fchdir(fd) == 0 && mount("none", "in", "tmpfs", 0, NULL) == -1);
	CHECK(chdir(base) == 0);
	close(fd);
}

static void expiry(void)
{
	fresh();
	tmpfs("b");
	touch("b/file");
	FAILS(umount2("b", MNT_EXPIRE | MNT_DETACH), EINVAL);
	FAILS(umount2("b", MNT_EXPIRE), EAGAIN);
	CHECK(here("b/file"));
	FAILS(umount2("b", MNT_EXPIRE), EAGAIN);
	CHECK(umount2("b", MNT_EXPIRE) == 0 && !here("b/file"));
	tmpfs("b");
	CHECK(chdir("b") == 0);
	FAILS(umount2(".", MNT_EXPIRE), EBUSY);
	FAILS(umount2(".", 0), EBUSY);
	CHECK(chdir(base) == 0 && umount2("b", 0) == 0);
}

static void remounts(void)
{
	struct statfs s;
	int fd;

	fresh();
	touch("a/file");
	bind_mount("a", "b");
	fd = open("b/file", O_WRONLY);
	FAILS(mount(NULL, "b", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL), EBUSY);
	FAILS(mount(NULL, "a", NULL, MS_REMOUNT | MS_RDONLY, NULL), EBUSY);
	CHECK(mount(NULL, "a", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL) == 0);
	FAILS(open("a/file", O_WRONLY), EROFS);
	CHECK(write(fd, "x", 1) == 1);
	close(fd);
	CHECK(mount(NULL, "a", NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0); /* the file system: everywhere */
	FAILS(open("b/file", O_WRONLY), EROFS);
	CHECK(mount(NULL, "a", NULL, MS_REMOUNT, NULL) == 0);
	CHECK(symlink("file", "a/link") == 0);
	CHECK(mount(NULL, "b", NULL, MS_REMOUNT | MS_BIND | MS_NOSYMFOLLOW, NULL) == 0);
	CHECK(statfs("b", &s) == 0 && s.f_flags & 0x2000);
	FAILS(open("b/link", O_RDONLY), ELOOP);
	fd = open("a/link", O_RDONLY);
	CHECK(fd >= 0 && close(fd) == 0);
}

static void descriptors(void)
{
	struct mount_attr attr = { .propagation = MS_SHARED };
	int tree, inner, group;

	fresh();
	CHECK(syscall(SYS_mount_setattr, -1, "/nonsense", 0, &attr, sizeof(attr)) == -1);
	attr.propagation = MS_SHARED | MS_SLAVE;
	FAILS(syscall(SYS_mount_setattr, AT_FDCWD, "a", 0, &attr, sizeof(attr)), EINVAL);
	attr.propagation = MS_SHARED;
	CHECK(syscall(SYS_mount_setattr, AT_FDCWD, "a", 0, &attr, sizeof(attr)) == 0);
	group = at("a").shared;
	CHECK(group);
	tmpfs("a/x");
	touch("a/x/file");
	/* A copy without a place is a peer, but nothing appears on it. */
	tree = syscall(SYS_open_tree, AT_FDCWD, "a", OPEN_TREE_CLONE | 0x8000);
	CHECK(tree >= 0 && faccessat(tree, "x/file", F_OK, 0) == 0);
	tmpfs("a/y");
	touch("a/y/file");
	CHECK(faccessat(tree, "y/file", F_OK, 0) == -1);
	attr = (struct mount_attr){ .attr_set = MOUNT_ATTR_RDONLY };
	CHECK(syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof(attr)) == 0);
	CHECK(syscall(SYS_move_mount, tree, "", AT_FDCWD, "b", 4) == 0);
	CHECK(at("b").shared == group && here("b/x/file") && !here("b/y/file"));
	FAILS(open("b/new", O_CREAT | O_WRONLY, 0644), EROFS);
	close(tree);
	tmpfs("a/z");
	touch("a/z/file");
	CHECK(here("b/z/file"));
	/* One that went to a shared place was propagated. */
	tree = syscall(SYS_open_tree, AT_FDCWD, "a/x", OPEN_TREE_CLONE);
	dir("a/z/in");
	CHECK(syscall(SYS_move_mount, tree, "", AT_FDCWD, "a/z/in", 4) == 0 && here("b/z/in/file"));
	close(tree);
	/* The last descriptor takes a tree without a place away: what is below it is apart then. */
	tree = syscall(SYS_open_tree, AT_FDCWD, "a", OPEN_TREE_CLONE | 0x8000);
	inner = openat(tree, "x", O_RDONLY | O_DIRECTORY);
	close(tree);
	CHECK(faccessat(inner, "file", F_OK, 0) == 0);
	close(inner);
	/* Groups can be given away. */
	fresh();
	type("a", MS_SHARED);
	dir("from");
	tmpfs("from");
	dir("from/in");
	bind_mount("from/in", "b");
	bind_mount("from", "c");
	FAILS(syscall(SYS_move_mount, AT_FDCWD, "from", AT_FDCWD, "b", 0x100), EINVAL); /* private */
	type("from", MS_SHARED);
	FAILS(syscall(SYS_move_mount, AT_FDCWD, "from", AT_FDCWD, "a", 0x100), EINVAL);
	FAILS(syscall(SYS_move_mount, AT_FDCWD, "from/in", AT_FDCWD, "b", 0x100), EINVAL);
	CHECK(syscall(SYS_move_mount, AT_FDCWD, "from", AT_FDCWD, "b", 0x100) == 0);
	CHECK(at("b").shared == at("from").shared && !at("c").shared);
	dir("from/in/deep");
	tmpfs("b/deep");
	touch("b/deep/file");
	CHECK(here("from/in/deep/file"));
	FAILS(syscall(SYS_move_mount, AT_FDCWD, "from", AT_FDCWD, "b", 0x100), EINVAL);
	type("from", MS_SLAVE);
	CHECK(at("from").master == at("b").shared);
	CHECK(syscall(SYS_move_mount, AT_FDCWD, "from", AT_FDCWD, "c", 0x100) == 0);
	CHECK(at("c").master == at("b").shared && !at("c").shared);
}

/* Parent and child take turns: each byte through `turns` says that the other may go on. */
static int turns[2];

static void turn(void)
{
	char c = 0;

	CHECK(write(turns[0], &c, 1) == 1 && read(turns[0], &c, 1) == 1);
}

static void wait_turn(void)
{
	char c;

	CHECK(read(turns[0], &c, 1) == 1);
}

static void pass(void)
{
	CHECK(write(turns[0], "", 1) == 1);
}

static pid_t forked(void)
{
	int pair[2];
	pid_t pid;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	pid = fork();
	CHECK(pid >= 0);
	turns[0] = pair[pid == 0];
	close(pair[pid != 0]);
	if (pid == 0)
		wait_turn();
	return pid;
}

static void namespaces(void)
{
	char name[64];
	int group, fd;
	pid_t pid;

	fresh();
	type("a", MS_SHARED);
	group = at("a").shared;
	tmpfs("b");
	pid = forked();
	if (pid == 0) {
		CHECK(unshare(CLONE_NEWNS) == 0);
		CHECK(at("a").shared == group && !at("b").shared);
		tmpfs("a/x");
		touch("a/x/file");
		tmpfs("b");
		touch("b/own");
		dir("c/point");
		turn();
		CHECK(here("a/y/file"));
		type("/", MS_REC | MS_SLAVE);
		CHECK(at("a").master == group && !at("a").shared);
		tmpfs("a/z");
		touch("a/z/own");
		tmpfs("d");
		turn();
		CHECK(!here("a/x/file"));
		CHECK(here("a/z/own"));
		CHECK(at("d").count == 0); /* its name is gone */
		pass();
		_exit(0);
	}
	turn();
	CHECK(here("a/x/file") && !here("b/own"));
	tmpfs("a/y");
	touch("a/y/file");
	turn();
	CHECK(!here("a/z/own"));
	CHECK(umount2("a/x", 0) == 0);
	CHECK(rmdir("d") == 0); /* a mount point elsewhere only */
	FAILS(rmdir("a"), EBUSY);
	FAILS(rename("a", "e"), EBUSY);
	turn();
	CHECK(status_of(pid) == 0);
	close(turns[0]);
	/* A mount namespace must not hold itself, and lives as long as a descriptor of it. */
	touch("c/file");
	snprintf(name, sizeof(name), "/proc/self/ns/mnt");
	FAILS(mount(name, "c/file", NULL, MS_BIND, NULL), EINVAL);
	pid = forked();
	if (pid == 0) {
		CHECK(unshare(CLONE_NEWNS) == 0);
		type("/", MS_REC | MS_PRIVATE);
		tmpfs("c");
		touch("c/inner");
		turn();
		_exit(0);
	}
	turn();
	snprintf(name, sizeof(name), "/proc/%d/ns/mnt", pid);
	fd = open(name, O_RDONLY);
	pass();
	CHECK(status_of(pid) == 0);
	close(turns[0]);
	pid = fork();
	if (pid == 0) {
		CHECK(setns(fd, CLONE_NEWNS) == 0 && chdir(base) == 0);
		CHECK(here("c/inner"));
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
	close(fd);
}

static void write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

/* A less privileged namespace receives and does not pass on; what came with it it cannot take apart. */
static void locked(void)
{
	int group;
	pid_t pid;

	fresh();
	type("a", MS_SHARED);
	group = at("a").shared;
	tmpfs("a/x");
	touch("a/x/file");
	CHECK(mount("none", "b", "tmpfs", MS_RDONLY, NULL) == 0);
	pid = forked();
	if (pid == 0) {
		struct mount_attr attr = { .attr_clr = MOUNT_ATTR_RDONLY };
		int tree;

		CHECK(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0);
		turn();
		CHECK(at("a").master == group && !at("a").shared);
		FAILS(umount2("a/x", 0), EINVAL);
		FAILS(umount2("a/x", MNT_DETACH), EINVAL);
		FAILS(umount2("a", MNT_DETACH), EINVAL);
		FAILS(mount("a/x", "c", NULL, MS_MOVE, NULL), EINVAL);
		FAILS(mount("a", "c", NULL, MS_BIND, NULL), EINVAL);
		FAILS(syscall(SYS_open_tree, AT_FDCWD, "a", OPEN_TREE_CLONE), EINVAL);
		FAILS(mount(NULL, "b", NULL, MS_REMOUNT | MS_BIND, NULL), EPERM);
		FAILS(syscall(SYS_mount_setattr, AT_FDCWD, "b", 0, &attr, sizeof(attr)), EPERM);
		attr = (struct mount_attr){ .attr_clr = MOUNT_ATTR__ATIME, .attr_set = MOUNT_ATTR_NOATIME };
		FAILS(syscall(SYS_mount_setattr, AT_FDCWD, "b", 0, &attr, sizeof(attr)), EPERM);
		CHECK(mount("a", "c", NULL, MS_BIND | MS_REC, NULL) == 0 && here("c/x/file"));
		FAILS(umount2("c/x", 0), EINVAL);
		CHECK(umount2("c", MNT_DETACH) == 0); /* all of it may go */
		tree = syscall(SYS_open_tree, AT_FDCWD, "a", OPEN_TREE_CLONE | 0x8000);
		CHECK(tree >= 0 && close(tree) == 0);
		tmpfs("a/z");
		touch("a/z/own");
		CHECK(umount2("a/z", 0) == 0);
		turn();
		CHECK(here("a/y/file") && here("a/y/in/deep"));
		FAILS(umount2("a/y/in", 0), EINVAL);
		CHECK(umount2("a/y", MNT_DETACH) == 0 && !here("a/y/file"));
		turn();
		CHECK(!here("a/x/file")); /* who has the say may take it away */
		pass();
		_exit(0);
	}
	turn();
	{
		char name[64];

		snprintf(name, sizeof(name), "/proc/%d/setgroups", pid);
		write_text(name, "deny");
		snprintf(name, sizeof(name), "/proc/%d/uid_map", pid);
		write_text(name, "0 0 1");
		snprintf(name, sizeof(name), "/proc/%d/gid_map", pid);
		write_text(name, "0 0 1");
	}
	turn();
	CHECK(!here("a/z/own"));
	tmpfs("d");
	touch("d/file");
	dir("d/in");
	tmpfs("d/in");
	touch("d/in/deep");
	CHECK(mount("d", "a/y", NULL, MS_BIND | MS_REC, NULL) == 0);
	turn();
	CHECK(here("a/y/file"));
	CHECK(umount2("a/x", 0) == 0);
	turn();
	CHECK(status_of(pid) == 0);
	close(turns[0]);
}

static void pivots(void)
{
	pid_t pid;

	fresh();
	pid = fork();
	if (pid == 0) {
		CHECK(unshare(CLONE_NEWNS) == 0);
		tmpfs("b");
		dir("b/old");
		dir("b/in");
		touch("b/file");
		bind_mount("/proc", "c");
		dir("b/proc");
		CHECK(mount("c", "b/proc", NULL, MS_MOVE, NULL) == 0);
		tmpfs("b/in");
		dir("b/in/point");
		FAILS(syscall(SYS_pivot_root, "b", "a/x"), EINVAL); /* not below it */
		FAILS(syscall(SYS_pivot_root, "b", "b/file"), ENOTDIR);
		type("b", MS_SHARED);
		FAILS(syscall(SYS_pivot_root, "b", "b/old"), EINVAL); /* the old one goes to a shared mount */
		type("b", MS_PRIVATE);
		type(base, MS_SHARED);
		FAILS(syscall(SYS_pivot_root, "b", "b/old"), EINVAL); /* it comes from one */
		type(base, MS_PRIVATE);
		FAILS(syscall(SYS_pivot_root, "b/old", "b/old"), EINVAL); /* no mount's root */
		CHECK(chdir("b") == 0);
		CHECK(syscall(SYS_pivot_root, ".", "in/point") == 0);
		CHECK(access("/in/point/etc", F_OK) == 0 && access("/file", F_OK) == 0);
		CHECK(chdir("/") == 0 && umount2("/in/point", MNT_DETACH) == 0);
		CHECK(at("/").count == 1 && at("/in").count == 1);
		/* Again, in place. */
		CHECK(mount("none", "/old", "tmpfs", 0, NULL) == 0);
		CHECK(mkdir("/old/proc", 0755) == 0);
		CHECK(mount("/proc", "/old/proc", NULL, MS_MOVE, NULL) == 0);
		touch("/old/new");
		CHECK(chdir("/old") == 0 && syscall(SYS_pivot_root, ".", ".") == 0);
		CHECK(at("/").count == 2);
		CHECK(umount2(".", MNT_DETACH) == 0 && at("/").count == 1);
		CHECK(access("/new", F_OK) == 0 && access("/file", F_OK) == -1);
		_exit(0);
	}
	CHECK(status_of(pid) == 0);
}

int main(void)
{
	if (unshare(CLONE_NEWNS) == -1 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == -1) {
		printf("no mount namespaces here\n");
		return 4;
	}
	umask(0);
	CHECK(mkdtemp(base));
	types();
	peers();
	slaves();
	dominating();
	moves();
	unmounts();
	expiry();
	remounts();
	descriptors();
	namespaces();
	locked();
	pivots();
	CHECK(chdir("/") == 0 && umount2(base, MNT_DETACH) == 0 && rmdir(base) == 0);
	printf("mounts propagate\n");
	return 0;
}
