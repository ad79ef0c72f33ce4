/* procfs' mount options: hidepid, gid and subset, proc(5). */
#include "proc_check.h"
#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>

static char place[] = "/tmp/proc.XXXXXX";
static pid_t stranger;

static const char *result(int failed)
{
	return failed ? strerrorname_np(errno) : "ok";
}

static void show(const char *what)
{
	static const char *const names[] = { "", "/comm", "/status", "/fd", "/task", "/cmdline" };
	char path[128], line[512];
	struct stat st;
	int fd, seen = 0, fixed = 0, own = 0;
	struct dirent *entry;
	DIR *directory;

	printf("%s:", what);
	for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
		snprintf(path, sizeof path, "%s/%d%s", place, stranger, names[i]);
		printf(" %s", result(stat(path, &st)));
		fd = open(path, O_RDONLY);
		printf("/%s", result(fd < 0));
		if (fd >= 0)
			close(fd);
	}
	directory = opendir(place);
	CHECK(directory);
	while ((entry = readdir(directory))) {
		seen |= atoi(entry->d_name) == stranger;
		own |= atoi(entry->d_name) == getpid();
		fixed |= !strcmp(entry->d_name, "meminfo");
	}
	closedir(directory);
	snprintf(path, sizeof path, "%s/self/status", place);
	CHECK(!stat(path, &st));
	snprintf(path, sizeof path, "%s/meminfo", place);
	printf(" meminfo %s", result(stat(path, &st)));
	snprintf(path, sizeof path, "%s/sys/kernel/ostype", place);
	printf(" ostype %s", result(stat(path, &st)));
	printf(" listed %d %d %d\n", seen, own, fixed);
	FILE *mounts = fopen("/proc/self/mounts", "r");
	while (fgets(line, sizeof line, mounts))
		if (strstr(line, place))
			printf("    %s", strstr(line, " proc "));
	fclose(mounts);
}

/* `show` as a user, as a user in the group, and as root. */
static void everybody(const char *options)
{
	gid_t group = 4242;

	printf("-- %s\n", options);
	for (int in_group = 0; in_group < 2; in_group++) {
		pid_t pid = fork();
		if (!pid) {
			CHECK(!setgroups(in_group, &group) && !setresgid(1000, 1000, 1000) && !setresuid(1000, 1000, 1000));
			show(in_group ? "group" : "user");
			_exit(0);
		}
		CHECK(!status_of(pid));
	}
	show("root"); /* last: a name once looked up fails differently for others */
}

int main(void)
{
	static const char *const options[] = {
		"", "hidepid=1", "hidepid=noaccess,gid=4242", "hidepid=2", "hidepid=invisible,gid=4242", "hidepid=4",
		"hidepid=ptraceable,gid=4242", "subset=pid", "subset=pid,hidepid=2",
	};

	setvbuf(stdout, 0, _IONBF, 0);
	if (unshare(CLONE_NEWNS) || mount("", "/", "", MS_REC | MS_PRIVATE, NULL)) {
		puts("no mount namespaces here");
		return 4;
	}
	CHECK(mkdtemp(place) && !chmod(place, 0755));
	stranger = fork();
	if (!stranger) {
		pause();
		_exit(0);
	}
	for (unsigned i = 0; i < sizeof options / sizeof *options; i++) {
		CHECK(!mount("proc", place, "proc", 0, options[i]));
		everybody(options[i]);
		CHECK(!umount(place));
	}
	FAILS(mount("proc", place, "proc", 0, "hidepid=3"), EINVAL);
	FAILS(mount("proc", place, "proc", 0, "subset=all"), EINVAL);
	FAILS(mount("proc", place, "proc", 0, "nonsense"), EINVAL);
	CHECK(!mount("proc", place, "proc", 0, "hidepid=2"));
	CHECK(!mount("proc", place, "proc", MS_REMOUNT, "gid=4242"));
	everybody("remounted");
	CHECK(!umount(place) && !rmdir(place) && !kill(stranger, SIGKILL));
	return 0;
}
