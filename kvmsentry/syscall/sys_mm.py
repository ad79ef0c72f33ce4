"""Address spaces: mmap, munmap, mprotect, mremap, brk, madvise and their kin. The work is AddressSpace's."""

from __future__ import annotations

import errno
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs.tmpfs import label_of
from kvmsentry.fs.vfs import MS_NOEXEC
from kvmsentry.kernel.task import RLIMIT_MEMLOCK, Task
from kvmsentry.kernel.traps import Pace
from kvmsentry.mm.vma import VM_NORESERVE
from kvmsentry.syscall.table import Fd, Int, Pid, Size, UInt, ULong, UserPtr, syscall

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4  # uapi/asm-generic/mman-common.h
READ_IMPLIES_EXEC = 0x0400000  # uapi/linux/personality.h
PROT_GROWSDOWN, PROT_GROWSUP = 0x01000000, 0x02000000
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 1, 2, 3, 15
MAP_ANONYMOUS, MAP_HUGETLB, MAP_LOCKED, MAP_POPULATE, MAP_NONBLOCK = 0x20, 0x40000, 0x2000, 0x8000, 0x10000
LEGACY_MAP_MASK = 0x7C07F9F3  # include/linux/mman.h: without MAP_SYNC and MAP_FIXED_NOREPLACE
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23
MCL_CURRENT, MCL_ONFAULT = 1, 4
LONG, PIECE = 32 << 20, 4 << 20  # more than LONG is filled in pieces, so that others run in between
CAP_IPC_LOCK = 14
PAGE_MASK = 4095


@syscall(9)
def mmap(task: Task, addr: UserPtr, length: Size, prot: ULong, flags: UInt, fd: Fd, offset: ULong) -> Any:
    if offset & PAGE_MASK:
        return -errno.EINVAL
    kind = flags & MAP_TYPE
    max_prot = 7
    implied = prot & PROT_READ and task.process.personality & READ_IMPLIES_EXEC
    if flags & MAP_ANONYMOUS:
        if kind not in (MAP_SHARED, MAP_PRIVATE) or not length:
            return -errno.EINVAL
        if flags & MAP_HUGETLB:
            return -errno.ENOMEM  # no huge page is set aside (hugetlbfs has none to give)
        backing = None
    else:
        file = task.files.get_io(fd)
        if kind not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE) or not length:
            return -errno.EINVAL
        if kind == MAP_SHARED_VALIDATE and flags & ~LEGACY_MAP_MASK:
            return -errno.EOPNOTSUPP
        if not file.readable:
            return -errno.EACCES
        if kind != MAP_PRIVATE and prot & PROT_WRITE and not file.writable:
            return -errno.EACCES
        if file.path is not None and file.path.mount.flags & MS_NOEXEC:
            if prot & PROT_EXEC:
                return -errno.EPERM
            implied = 0
            max_prot = 7 & ~PROT_EXEC  # nor by mprotect(2) later (VM_MAYEXEC)
        backing = file.backing()
        if backing is None and kind == MAP_PRIVATE:  # /dev/zero: anonymous, but shown by its path
            prot |= PROT_EXEC if implied else 0
            return task.mm.mmap(addr, length, prot & 7, flags, None, 0, 7, label_of(task.kernel, file.path))
        if kind == MAP_SHARED_VALIDATE:
            flags = flags & ~MAP_TYPE | MAP_SHARED
        if kind != MAP_PRIVATE:
            writable = file.writable
            if getattr(file.inode, "seals", 0) & 0x18:  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE
                if prot & 2:
                    return -errno.EPERM
                writable = False
            if not writable:
                max_prot &= ~PROT_WRITE
    if implied:
        prot |= PROT_EXEC
    if flags & MAP_POPULATE and length > LONG and not flags & (MAP_LOCKED | MAP_NONBLOCK):
        where = task.mm.mmap(addr, length, prot & 7, flags & ~MAP_POPULATE, backing, offset, max_prot)
        return _fill_then(task, [(where, where + length, bool(prot & PROT_WRITE))], where) if prot & 7 else where
    return task.mm.mmap(addr, length, prot & 7, flags, backing, offset, max_prot)


async def _fill_then(task: Task, ranges: list[tuple[int, int, bool]], result: int, quiet: bool = True) -> int:
    """Touch every page of [(start, end, for writing)], letting others run in between; `result` in the end. What can't
    be touched is left alone, and a signal ends it, unless not `quiet` (mm_populate)."""
    pace = Pace(task)
    for start, end, write in ranges:
        for at in range(start, end, PIECE):
            try:
                if pace.due():
                    await pace.rest(errno.EINTR)
                task.mm.madvise(at, min(PIECE, end - at), MADV_POPULATE_WRITE if write else MADV_POPULATE_READ)
            except Errno as error:
                if not quiet:
                    raise
                if error.errno == errno.EINTR:
                    return result
                break
    return result


@syscall(11)
def munmap(task: Task, addr: UserPtr, length: Size) -> int:
    task.mm.munmap(addr, length)
    return 0


@syscall(10)
def mprotect(task: Task, addr: UserPtr, length: Size, prot: ULong) -> int:
    if prot & ~(7 | PROT_GROWSDOWN | PROT_GROWSUP) or prot & PROT_GROWSUP:
        return -errno.EINVAL
    if prot & PROT_READ and task.process.personality & READ_IMPLIES_EXEC:
        task.mm.mprotect(addr, length, prot, PROT_EXEC)
        return 0
    task.mm.mprotect(addr, length, prot)
    return 0


# -- protection keys: none, as on processors without PKU
@syscall(329, note="no protection keys, as on processors without them")
def pkey_mprotect(task: Task, addr: UserPtr, length: Size, prot: ULong, pkey: Int) -> int:
    if pkey != -1 and length and not addr & PAGE_MASK:
        return -errno.EINVAL
    return mprotect(task, addr, length, prot)


@syscall(330, note="EINVAL: no protection keys, as on processors without them")
def pkey_alloc(task: Task, flags: ULong, rights: ULong) -> int:
    return -errno.EINVAL


@syscall(331, note="EINVAL: no protection keys, as on processors without them")
def pkey_free(task: Task, pkey: Int) -> int:
    return -errno.EINVAL


@syscall(25)
def mremap(task: Task, old_address: UserPtr, old_size: Size, new_size: Size, flags: ULong, new_address: UserPtr) -> int:
    return task.mm.mremap(old_address, old_size, new_size, flags, new_address)


@syscall(12)
def brk(task: Task, addr: UserPtr) -> int:
    return task.mm.brk(addr)


@syscall(28)
def madvise(task: Task, addr: UserPtr, length: Size, advice: Int) -> Any:
    if advice in (MADV_POPULATE_READ, MADV_POPULATE_WRITE) and length > LONG and not addr & PAGE_MASK:
        end = addr + length + PAGE_MASK & ~PAGE_MASK
        return _fill_then(task, [(addr, end, advice == MADV_POPULATE_WRITE)], 0, False)
    task.mm.madvise(addr, length, advice)
    return 0


@syscall(27, note="pages of memory without a file that were only read, or written with zeros, may be told as absent")
def mincore(task: Task, addr: UserPtr, length: Size, vec: UserPtr) -> Any:
    if length > LONG:
        return _mincore(task, addr, length, vec)
    task.mm.write(vec, task.mm.mincore(addr, length))
    return 0


async def _mincore(task: Task, addr: int, length: int, vec: int) -> int:
    """In pieces, whose pages are looked at; other tasks have their turns in between."""
    pace = Pace(task)
    for done in range(0, length, LONG):
        task.mm.write(vec + (done >> 12), task.mm.mincore(addr + done, min(LONG, length - done)))
        if pace.due():
            await pace.rest(0)
    return 0


@syscall(26)
def msync(task: Task, addr: UserPtr, length: Size, flags: Int) -> int:
    task.mm.msync(addr, length, flags)
    return 0


def _may_lock(task: Task) -> bool:
    return task.rlimit(RLIMIT_MEMLOCK) > 0 or task.creds.capable(CAP_IPC_LOCK)


@syscall(149, note="all memory is resident already")
def mlock(task: Task, addr: UserPtr, length: Size) -> Any:
    return _mlock(task, addr, length, 0)


@syscall(325, note="all memory is resident already")
def mlock2(task: Task, addr: UserPtr, length: Size, flags: UInt) -> Any:
    if flags & ~1:
        return -errno.EINVAL
    return _mlock(task, addr, length, flags)


def _mlock(task: Task, addr: int, length: int, flags: int) -> Any:
    if not _may_lock(task):
        return -errno.EPERM
    task.mm.rlimit_memlock = task.rlimit(RLIMIT_MEMLOCK) if not task.creds.capable(CAP_IPC_LOCK) else (1 << 64) - 1
    task.mm.mlock(addr, length, bool(flags & 1) or length > LONG)
    if length > LONG and not flags & 1:
        return _fill_then(task, _locked(task, addr & ~PAGE_MASK, addr + length + PAGE_MASK & ~PAGE_MASK), 0)
    return 0


def _locked(task: Task, start: int, end: int) -> list[tuple[int, int, bool]]:
    """What locking [start, end) fills."""
    return [
        (max(start, vma.start), min(end, vma.end), bool(vma.prot & PROT_WRITE))
        for vma in task.mm.tree.range(start, end)
        if vma.prot and not vma.flags & VM_NORESERVE
    ]


@syscall(150)
def munlock(task: Task, addr: UserPtr, length: Size) -> int:
    task.mm.munlock(addr, length)
    return 0


@syscall(151, note="all memory is resident already")
def mlockall(task: Task, flags: Int) -> Any:
    if not flags or flags & ~7 or flags == 4:
        return -errno.EINVAL
    if not _may_lock(task):
        return -errno.EPERM
    task.mm.rlimit_memlock = task.rlimit(RLIMIT_MEMLOCK) if not task.creds.capable(CAP_IPC_LOCK) else (1 << 64) - 1
    if flags & MCL_CURRENT and not flags & MCL_ONFAULT and task.mm.total_pages > LONG >> 12:
        task.mm.mlockall(flags | MCL_ONFAULT)
        return _fill_then(task, _locked(task, 0, task.mm.user_top), 0)
    task.mm.mlockall(flags)
    return 0


@syscall(152)
def munlockall(task: Task) -> int:
    task.mm.munlockall()
    return 0


# -- NUMA: one node, node 0 ------------------------------------------------------------------------
MPOL_DEFAULT, MPOL_MAX, MPOL_MODE_FLAGS = 0, 7, 0xE000  # uapi/linux/mempolicy.h
MPOL_F_NODE, MPOL_F_ADDR, MPOL_F_MEMS_ALLOWED = 1, 2, 4


def _nodes(task: Task, nodemask: int, maxnode: int) -> int:
    if not nodemask or maxnode <= 1:
        return 0
    if maxnode > 4096 * 8:
        raise_einval()
    length = (maxnode - 1 + 63) // 64 * 8
    return int.from_bytes(task.mm.read(nodemask, length), "little") & ((1 << (maxnode - 1)) - 1)


def raise_einval() -> None:
    """EINVAL, as an expression."""
    raise Errno(errno.EINVAL)


@syscall(238, note="there is one memory node")
def set_mempolicy(task: Task, mode: Int, nodemask: UserPtr, maxnode: ULong) -> int:
    policy = mode & 0xFFFFFFFF & ~MPOL_MODE_FLAGS
    if policy >= MPOL_MAX:
        return -errno.EINVAL
    nodes = _nodes(task, nodemask, maxnode)
    if (policy == MPOL_DEFAULT and nodes) or nodes & ~1:
        return -errno.EINVAL
    task.mempolicy = mode, nodes
    return 0


@syscall(239, note="there is one memory node")
def get_mempolicy(task: Task, policy: UserPtr, nodemask: UserPtr, maxnode: ULong, addr: UserPtr, flags: ULong) -> int:
    if flags & ~7 or (flags & MPOL_F_MEMS_ALLOWED and flags & 3) or (nodemask and not maxnode):
        return -errno.EINVAL
    if flags & MPOL_F_ADDR:
        if task.mm.tree.find(addr) is None:
            return -errno.EFAULT
    elif addr and not flags & MPOL_F_MEMS_ALLOWED:
        return -errno.EINVAL
    mode, nodes = task.mempolicy
    if flags & MPOL_F_MEMS_ALLOWED:
        nodes = 1
    if policy:
        task.mm.write_u32(policy, 0 if flags & MPOL_F_NODE else mode)
    if nodemask:
        length = (maxnode - 1 + 63) // 64 * 8  # copy_nodes_to_user
        if length > PAGE_MASK + 1:
            return -errno.EINVAL
        task.mm.write(nodemask, nodes.to_bytes(8, "little").ljust(length, b"\0")[:length])
    return 0


@syscall(237, note="there is one memory node")
def mbind(task: Task, addr: UserPtr, length: Size, mode: ULong, nodemask: UserPtr, maxnode: ULong, flags: UInt) -> int:
    if addr & PAGE_MASK or mode & 0xFF >= MPOL_MAX or _nodes(task, nodemask, maxnode) & ~1:
        return -errno.EINVAL
    return 0


@syscall(256, note="there is one memory node")
def migrate_pages(task: Task, pid: Pid, maxnode: ULong, old_nodes: UserPtr, new_nodes: UserPtr) -> int:
    return 0 if pid == 0 or pid in task.process.pid_ns.processes else -errno.ESRCH


@syscall(279, note="there is one memory node")
def move_pages(task: Task, pid: Pid, count: ULong, pages: UserPtr, nodes: UserPtr, status: UserPtr, flags: Int) -> Any:
    if flags & ~6:
        return -errno.EINVAL
    if pid and pid not in task.process.pid_ns.processes:
        return -errno.ESRCH
    if count > 1 << 20:
        return -errno.E2BIG
    for index in range(count):
        if nodes and task.mm.read_u32(nodes + 4 * index) != 0:
            return -errno.ENODEV
        page = task.mm.read_u64(pages + 8 * index)
        present = task.mm.mmu.lookup(page & ~PAGE_MASK) if page < 1 << 47 else 0
        task.mm.write_u32(status + 4 * index, 0 if present else -errno.ENOENT & 0xFFFFFFFF)
    return 0
