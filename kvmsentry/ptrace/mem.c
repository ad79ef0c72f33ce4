/* SPDX-License-Identifier: Apache-2.0 */
/* Application memory: one memfd, shared with the stubs. All return 0 (or a descriptor) or -errno. */
#include "pt.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "api.h"

#ifndef MFD_EXEC
#define MFD_EXEC 0x10U
#endif

int pt_memfd(void)
{
	/* MFD_EXEC: the application's code lies in it. Kernels before 6.3 do not know the flag. */
	int fd = memfd_create("kvmsentry", MFD_CLOEXEC | MFD_EXEC);

	if (fd < 0 && errno == EINVAL)
		fd = memfd_create("kvmsentry", MFD_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

int pt_map_ram(int memfd, void *at, uint64_t offset, uint64_t length)
{
	struct stat st;

	/* Never shorter: copies of files' code lie above the RAM. */
	if (fstat(memfd, &st) < 0 || (st.st_size < (off_t)(offset + length) && ftruncate(memfd, offset + length) < 0))
		return -errno;
	if (mmap(at, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, memfd, offset) == MAP_FAILED)
		return -errno;
	madvise(at, length, MADV_HUGEPAGE);	/* advice, for hosts whose shmem has huge pages */
	madvise(at, length, MADV_DONTFORK);
	return 0;
}

int pt_give_back(int memfd, uint64_t offset, uint64_t length)
{
	return fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0 ? -errno : 0;
}

/* Threads of stubs pass through the kernel at every event; those that run now need the barrier on their processors. */
int pt_memory_barrier(void)
{
	const int global = 1;	/* MEMBARRIER_CMD_GLOBAL, uapi/linux/membarrier.h */

	return syscall(SYS_membarrier, global, 0, 0) < 0 ? -errno : 0;
}
