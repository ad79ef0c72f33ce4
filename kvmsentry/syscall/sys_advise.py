"""Memory calls of the rarer kind: advice to another process's memory, giving back a dying one's, and two old ones."""

from __future__ import annotations

import errno
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.access import may_look
from kvmsentry.kernel import cap
from kvmsentry.kernel.pidfd import PidFile
from kvmsentry.kernel.task import Process, Task
from kvmsentry.mm.vma import MAP_FIXED, MAP_LOCKED, MAP_NONBLOCK, MAP_POPULATE, MAP_SHARED, VM_LOCKED, VM_SHARED
from kvmsentry.syscall.sys_io import fetch_iov
from kvmsentry.syscall.table import Fd, Int, Size, UInt, ULong, UserPtr, syscall

MADV_WILLNEED, MADV_COLD, MADV_PAGEOUT, MADV_COLLAPSE = 3, 20, 21, 25  # uapi/asm-generic/mman-common.h
PAGE = 4096


def _process(task: Task, fd: int) -> Process:
    """Who a pidfd means; EBADF, ESRCH."""
    file = task.files.files.get(fd)
    if not isinstance(file, PidFile):
        raise Errno(errno.EBADF)
    process: Process = file.process
    if process.kernel.processes.get(process.pid) is not process:
        raise Errno(errno.ESRCH)
    return process


@syscall(440)
def process_madvise(task: Task, pidfd: Fd, vec: UserPtr, vlen: Size, advice: Int, flags: UInt) -> int:
    """process_madvise(2): MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED, MADV_COLLAPSE."""
    if flags:
        return -errno.EINVAL
    iov, total = fetch_iov(task, vec, vlen)
    process = _process(task, pidfd)
    if advice not in (MADV_WILLNEED, MADV_COLD, MADV_PAGEOUT, MADV_COLLAPSE):
        return -errno.EINVAL
    if process.zombie or process.leader.mm is None:
        return -errno.ESRCH
    if not may_look(task, process.leader) or not task.creds.capable(cap.SYS_NICE):
        return -errno.EPERM
    done = 0
    for base, length in iov:
        try:
            process.leader.mm.madvise(base, length, advice)
        except Errno:
            if not done:
                raise
            break
        done += length
    return done


@syscall(448, note="memory of a process that is killed is free at once")
def process_mrelease(task: Task, pidfd: Fd, flags: UInt) -> int:
    """process_mrelease(2): only a dying process's memory; ESRCH when it has none any more."""
    if flags:
        return -errno.EINVAL
    process = _process(task, pidfd)
    if process.zombie:
        return -errno.ESRCH
    return 0 if process.exiting else -errno.EINVAL


@syscall(216)
def remap_file_pages(task: Task, addr: UserPtr, size: Size, prot: ULong, pgoff: Size, flags: ULong) -> int:
    """remap_file_pages(2), which has been a mmap(2) of the same file since Linux 4.0."""
    if prot:
        return -errno.EINVAL
    start, size = addr & -PAGE, size & -PAGE
    if not size or start + size >= 1 << 64 or pgoff + size // PAGE >= 1 << 52:
        return -errno.EINVAL
    tree: Any = task.mm.tree
    vma = tree.find(start)
    if vma is None or not vma.flags & VM_SHARED:
        return -errno.EINVAL
    end = vma.end
    while end < start + size:  # what an earlier call has split
        following = tree.find(end)
        if following is None or following.backing is not vma.backing or following.prot != vma.prot:
            return -errno.EINVAL
        end = following.end
    how = MAP_SHARED | MAP_FIXED | (flags & MAP_NONBLOCK) | MAP_POPULATE
    if vma.flags & VM_LOCKED:
        how |= MAP_LOCKED
    task.mm.mmap(start, size, vma.prot, how, vma.backing, pgoff * PAGE, max_prot=vma.max_prot)
    return 0


@syscall(450, note="there is one memory node and no memory has a policy of its own")
def set_mempolicy_home_node(task: Task, start: ULong, length: ULong, node: ULong, flags: ULong) -> int:
    """set_mempolicy_home_node(2): ENOENT where there is no policy that could have a home."""
    if start & (PAGE - 1) or flags or node:
        return -errno.EINVAL
    end = start + (length + PAGE - 1 & -PAGE)
    if end >= 1 << 64:
        return -errno.EINVAL
    return -errno.ENOENT if end != start else 0
