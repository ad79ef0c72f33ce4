/* SPDX-License-Identifier: Apache-2.0 */
/* Host memory behind guest-physical memory. Addresses are ours; all return 0 or -errno. */
#include "ks.h"

#include <linux/membarrier.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "api.h"

void *ks_reserve(uint64_t length)
{
	const u64 huge = 2 << 20;
	uint8_t *p = mmap(NULL, length + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	u64 skip;

	if (p == MAP_FAILED)
		return NULL;
	skip = -(u64)p & (huge - 1);	/* GPA and host address are congruent mod 2 MiB: huge pages fit in both */
	if (skip)
		munmap(p, skip);
	munmap(p + skip + length, huge - skip);
	return p + skip;
}

void ks_unreserve(void *base, uint64_t length)
{
	munmap(base, length);
}

int ks_map_ram(void *at, uint64_t length, int huge)
{
	if (mmap(at, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		return -errno;
	madvise(at, length, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);	/* advice: a kernel without it is fine */
	madvise(at, length, MADV_DONTFORK);
	return 0;
}

/* What may not be written is a private mapping, never stored to but by ks_warm: it shows the page cache just as well. */
int ks_map_file(void *at, uint64_t length, int fd, uint64_t offset, int writable)
{
	const int private = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED;

	if (!writable && mmap(at, length, PROT_READ | PROT_WRITE, private, fd, offset) != MAP_FAILED)
		return 0;
	/* also where a strict overcommit policy would count the private one */
	if (mmap(at, length, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED)
		return -errno;
	return 0;
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23	/* since Linux 5.14 */
#endif

/*
 * Copies of our own in place of the page cache's pages of a file that is not written. KVM prefetches shadow entries only of
 * pages that are writable on the host: guests then take one fault for eight neighbours. Advice; -errno when nothing came of it.
 */
int ks_warm(void *at, uint64_t length)
{
	return madvise(at, length, MADV_POPULATE_WRITE) < 0 ? -errno : 0;
}

int ks_unmap(void *at, uint64_t length)
{
	if (mmap(at, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		return -errno;
	return 0;
}

int ks_give_back(void *at, uint64_t length)
{
	return madvise(at, length, MADV_DONTNEED) < 0 ? -errno : 0;
}

void ks_zero(void *at, uint64_t length)
{
	memset(at, 0, length);
}

void ks_copy(void *to, const void *from, uint64_t length)
{
	memmove(to, from, length);
}

uint32_t ks_cmpxchg32(void *word, uint32_t expected, uint32_t desired)
{
	__atomic_compare_exchange_n((uint32_t *)word, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	return expected;
}

int ks_memory_barrier(void)
{
	static int registered;

	if (!registered && !syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0))
		registered = 1;
	/* The global one waits for every processor to schedule: milliseconds, but it is there since Linux 4.3. */
	if (syscall(SYS_membarrier, registered ? MEMBARRIER_CMD_PRIVATE_EXPEDITED : MEMBARRIER_CMD_GLOBAL, 0, 0))
		return -errno;
	return 0;
}

/* Through the kernel, which finds a missing page of a truncated file where a load of ours would get SIGBUS. */
int64_t ks_safe_read(const void *from, void *to, uint64_t length)
{
	struct iovec local = { to, length }, remote = { (void *)from, length };
	ssize_t n = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);

	return n < 0 ? -errno : n;
}

int64_t ks_safe_write(void *to, const void *from, uint64_t length)
{
	struct iovec local = { (void *)from, length }, remote = { to, length };
	ssize_t n = process_vm_writev(getpid(), &local, 1, &remote, 1, 0);

	return n < 0 ? -errno : n;
}
