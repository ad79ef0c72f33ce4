/* Calls that few programs make: file handles, process_madvise, remap_file_pages, old and refused ones. */
#include "proc_check.h"
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>

static void handles(void)
{
	char space[sizeof(struct file_handle) + 128], again[sizeof(space)], path[64], text[8];
	struct file_handle *handle = (void *)space, *second = (void *)again;
	int mount_id, fd, root, opened;

	snprintf(path, sizeof(path), "/dev/shm/handle.%d", getpid());
	fd = open(path, O_CREAT | O_RDWR, 0600);
	CHECK(fd >= 0 && write(fd, "abc", 3) == 3);
	handle->handle_bytes = 0;
	if (name_to_handle_at(AT_FDCWD, path, handle, &mount_id, 0) == -1 && errno == EOPNOTSUPP) {
		puts("no handles"); /* not a tmpfs */
		return;
	}
	CHECK(errno == EOVERFLOW && handle->handle_bytes > 0 && handle->handle_bytes <= 128);
	CHECK(name_to_handle_at(AT_FDCWD, path, handle, &mount_id, 0) == 0);
	second->handle_bytes = 128;
	CHECK(name_to_handle_at(fd, "", second, &mount_id, AT_EMPTY_PATH) == 0);
	CHECK(handle->handle_bytes == second->handle_bytes && handle->handle_type == second->handle_type);
	CHECK(memcmp(handle->f_handle, second->f_handle, handle->handle_bytes) == 0);
	FAILS(name_to_handle_at(AT_FDCWD, path, handle, &mount_id, 8), EINVAL);
	second->handle_bytes = 129;
	FAILS(name_to_handle_at(AT_FDCWD, path, second, &mount_id, 0), EINVAL);
	FAILS(name_to_handle_at(AT_FDCWD, "/nowhere", handle, &mount_id, 0), ENOENT);
	root = open("/dev/shm", O_RDONLY | O_DIRECTORY);
	opened = open_by_handle_at(root, handle, O_RDONLY);
	if (opened == -1 && errno == EPERM) {
		puts("not privileged");
	} else {
		CHECK(opened >= 0 && read(opened, text, 8) == 3 && memcmp(text, "abc", 3) == 0);
		close(opened);
		second->handle_bytes = 0;
		FAILS(open_by_handle_at(root, second, O_RDONLY), EINVAL);
		close(fd);
		CHECK(unlink(path) == 0);
		FAILS(open_by_handle_at(root, handle, O_RDONLY), ESTALE);
		puts("opened by handle");
	}
	unlink(path);
	close(root);
}

static void advice(void)
{
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct iovec v = { page, 8192 };
	int fd = syscall(SYS_pidfd_open, getpid(), 0), status;
	pid_t child;

	page[0] = 1;
	CHECK(syscall(SYS_process_madvise, fd, &v, 1, MADV_COLD, 0) == 8192);
	CHECK(page[0] == 1);
	FAILS(syscall(SYS_process_madvise, fd, &v, 1, MADV_COLD, 1), EINVAL);
	FAILS(syscall(SYS_process_madvise, 0, &v, 1, MADV_COLD, 0), EBADF);
	FAILS(syscall(SYS_process_mrelease, 0, 0), EBADF);
	FAILS(syscall(SYS_process_mrelease, fd, 0), EINVAL);
	FAILS(syscall(SYS_process_mrelease, fd, 1), EINVAL);
	close(fd);
	child = fork();
	if (child == 0)
		_exit(0);
	fd = syscall(SYS_pidfd_open, child, 0);
	CHECK(status_of(child) == 0);
	FAILS(syscall(SYS_process_madvise, fd, &v, 1, MADV_COLD, 0), ESRCH);
	FAILS(syscall(SYS_process_mrelease, fd, 0), ESRCH);
	close(fd);
	(void)status;
}

static void remapping(void)
{
	int fd = memfd_create("pages", 0);
	char *p;

	CHECK(ftruncate(fd, 4 * 4096) == 0);
	p = mmap(NULL, 4 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(p != MAP_FAILED);
	for (int i = 0; i < 4; i++)
		p[i * 4096] = '0' + i;
	CHECK(remap_file_pages(p, 4096, 0, 3, 0) == 0);
	CHECK(remap_file_pages(p + 3 * 4096, 4096, 0, 0, 0) == 0);
	CHECK(p[0] == '3' && p[4096] == '1' && p[3 * 4096] == '0');
	p[0] = 'x';
	CHECK(remap_file_pages(p, 2 * 4096, 0, 2, 0) == 0);
	CHECK(p[4096] == 'x');
	FAILS(remap_file_pages(p, 4096, PROT_READ, 0, 0), EINVAL);
	FAILS(remap_file_pages(p, 0, 0, 0, 0), EINVAL);
	munmap(p, 4 * 4096);
	p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	FAILS(remap_file_pages(p, 4096, 0, 0, 0), EINVAL);
	close(fd);
}

static void old(void)
{
	static const int gone[] = { 156, 174, 177, 178, 180, 181, 182, 183, 184, 185, 205, 211, 214, 215, 236 };
	struct {
		int free;
		unsigned long inodes;
		char names[12];
	} u;
	char name[64];
	struct stat st;
	long n;

	for (size_t i = 0; i < sizeof(gone) / sizeof(*gone); i++)
		FAILS(syscall(gone[i], 0, 0, 0, 0, 0), ENOSYS);
	FAILS(syscall(SYS_ustat, 0xfffff, &u), EINVAL);
	CHECK(stat("/dev/shm", &st) == 0);
	CHECK(syscall(SYS_ustat, st.st_dev, &u) == 0);
	n = syscall(SYS_sysfs, 1, "tmpfs");
	CHECK(n >= 0 && n < syscall(SYS_sysfs, 3));
	CHECK(syscall(SYS_sysfs, 2, n, name) == 0 && strcmp(name, "tmpfs") == 0);
	FAILS(syscall(SYS_sysfs, 1, "nonesuch"), EINVAL);
	FAILS(syscall(SYS_sysfs, 4), EINVAL);
}

static void mapped_files(void)
{
	char name[128], text[256], path[] = "/tmp/mapped.XXXXXX", byte;
	int fd = mkstemp(path), again;
	ssize_t n;
	char *p;

	CHECK(fd >= 0 && ftruncate(fd, 8192) == 0 && pwrite(fd, "m", 1, 0) == 1);
	p = mmap(NULL, 8192, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(p != MAP_FAILED);
	close(fd);
	snprintf(name, sizeof(name), "/proc/self/map_files/%lx-%lx", (long)p, (long)p + 8192);
	n = readlink(name, text, sizeof(text) - 1);
	CHECK(n > 0);
	text[n] = 0;
	CHECK(strcmp(text, path) == 0);
	CHECK(unlink(path) == 0);
	again = open(name, O_RDONLY); /* the file itself, which has no name any more */
	if (again == -1)
		CHECK(errno == EPERM);
	else
		CHECK(read(again, &byte, 1) == 1 && byte == 'm' && close(again) == 0);
	snprintf(name, sizeof(name), "/proc/self/map_files/%lx-%lx", (long)p, (long)p + 4096);
	FAILS(readlink(name, text, sizeof(text)), ENOENT);
	FAILS(readlink("/proc/self/map_files/nonsense", text, sizeof(text)), ENOENT);
	munmap(p, 8192);
}

/* The clocks that nobody can sleep by. */
static void sleepless_clocks(void)
{
	struct timespec t = { 0, 1 };

	FAILS(syscall(SYS_clock_nanosleep, CLOCK_THREAD_CPUTIME_ID, 0, &t, NULL), EOPNOTSUPP);
	FAILS(syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC_RAW, 0, &t, NULL), EOPNOTSUPP);
	FAILS(syscall(SYS_clock_nanosleep, 12345, 0, &t, NULL), EINVAL);
}

static void memory_policies(void)
{
	unsigned long first_node = 1;
	int mode = -1, status;

	CHECK(syscall(SYS_get_mempolicy, &mode, NULL, 0, &mode, 2) == 0 && mode == 0); /* MPOL_F_ADDR */
	FAILS(syscall(SYS_get_mempolicy, &mode, NULL, 0, NULL, 2), EFAULT);
	FAILS(syscall(SYS_get_mempolicy, &mode, NULL, 0, &mode, 0), EINVAL);
	FAILS(syscall(SYS_get_mempolicy, &mode, NULL, 0, NULL, 64), EINVAL);

	/* It is a thread's, and its children's. */
	CHECK(syscall(SYS_set_mempolicy, 2, &first_node, 64) == 0);	/* MPOL_BIND */
	if (!fork())
		_exit(syscall(SYS_get_mempolicy, &mode, NULL, 0, NULL, 0) || mode != 2);
	CHECK(wait(&status) > 0 && status == 0);
	CHECK(syscall(SYS_set_mempolicy, 0, NULL, 0) == 0);
}

static void barriers(void)
{
	long known = syscall(SYS_membarrier, 0, 0, 0);

	CHECK(known > 0 && (known & 127) == 127);
	FAILS(syscall(SYS_membarrier, 32, 0, 0), EPERM);
	CHECK(syscall(SYS_membarrier, 64, 0, 0) == 0 && syscall(SYS_membarrier, 32, 0, 0) == 0);
	FAILS(syscall(SYS_membarrier, 8, 0, 0), EPERM);
	CHECK(syscall(SYS_membarrier, 16, 0, 0) == 0 && syscall(SYS_membarrier, 8, 0, 0) == 0);
	FAILS(syscall(SYS_membarrier, 3, 0, 0), EINVAL);
}

static void extents(void)
{
	struct fiemap map = { .fm_length = ~0ULL };
	int fd = open("/dev/shm", O_TMPFILE | O_RDWR, 0600);

	if (fd >= 0) {
		FAILS(ioctl(fd, FS_IOC_FIEMAP, &map), EOPNOTSUPP);
		close(fd);
	}
}

int main(void)
{
	mapped_files();
	barriers();
	memory_policies();
	sleepless_clocks();
	extents();
	handles();
	advice();
	remapping();
	old();
	puts("rare calls");
	return 0;
}
