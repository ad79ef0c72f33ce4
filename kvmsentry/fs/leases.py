"""Leases: who holds one is told before somebody else opens or truncates the file, who waits meanwhile (F_SETLEASE in
fcntl(2), fs/locks.c).

    holder   F_SETLEASE -> Lease in FileLocks.leases                SIGIO -> writes back, F_SETLEASE -+
    breaker  open, truncate -> break_leases: marks it, tells the holder, sleeps ...... until then, or lease-break-time

A lease belongs to an open file and ends with it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.fdtable import files_of
from kvmsentry.fs.locks import F_RDLCK, F_UNLCK, F_WRLCK, FileLocks, ends_with, locks_of
from kvmsentry.fs.vfs import O_ACCMODE, O_NONBLOCK, File, Inode
from kvmsentry.kernel.traps import park

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

O_RDONLY = 0


class Lease:
    """What one open file holds. `unlock`, `downgrade`: a breaker waits for that much; the times (ns of kernel.now())
    are when it is done without the holder, None for never."""

    __slots__ = ("kind", "pid", "tell", "unlock", "downgrade", "unlock_at", "downgrade_at")

    def __init__(self, kind: int, pid: int, tell: Callable[[], None]) -> None:
        self.kind, self.pid, self.tell = kind, pid, tell
        self.unlock = self.downgrade = False
        self.unlock_at: int | None = None
        self.downgrade_at: int | None = None

    def shown(self) -> int:
        """What F_GETLEASE tells: the kind it is about to become (target_leasetype)."""
        return F_UNLCK if self.unlock else F_RDLCK if self.downgrade else self.kind

    def conflicts(self, writes: bool) -> bool:
        """Is an open for writing, or for reading only, in the way of it?"""
        return writes or self.kind == F_WRLCK


def _change(locks: FileLocks, file: File, kind: int) -> None:
    """The lease of `file` becomes `kind`, and who waited for that looks again (lease_modify)."""
    lease = locks.leases[file]
    if kind == F_UNLCK:
        del locks.leases[file]
        file.owner = None
    else:
        lease.kind = kind
        if kind == F_RDLCK:
            lease.downgrade, lease.downgrade_at = False, None
    locks.queue.wake()


def _expire(locks: FileLocks, now: int) -> None:
    """Holders that took too long lose their leases (time_out_leases)."""
    for file, lease in list(locks.leases.items()):
        if lease.unlock_at is not None and now >= lease.unlock_at:
            _change(locks, file, F_UNLCK)
        elif lease.downgrade_at is not None and now >= lease.downgrade_at:
            _change(locks, file, F_RDLCK)


def get(task: Task, file: File) -> int:
    """F_GETLEASE."""
    locks: FileLocks | None = file.inode.locks
    if locks is None or not locks.leases:
        return F_UNLCK
    _expire(locks, task.kernel.now())
    lease = locks.leases.get(file)
    return F_UNLCK if lease is None else lease.shown()


def release(task: Task, file: File) -> None:
    """F_SETLEASE with F_UNLCK; EAGAIN without a lease."""
    locks: FileLocks | None = file.inode.locks
    if locks is None or file not in locks.leases:
        raise Errno(errno.EAGAIN)
    _change(locks, file, F_UNLCK)


def take(task: Task, file: File, kind: int, tell: Callable[[], None]) -> None:
    """F_SETLEASE with F_RDLCK or F_WRLCK; `tell` sends the signal. EAGAIN: somebody has the file open in a way that
    conflicts, waits to, or has a lease that does (generic_add_lease)."""
    inode = file.inode
    locks = locks_of(inode)
    _expire(locks, task.kernel.now())
    if _open_elsewhere(task, file, kind):
        raise Errno(errno.EAGAIN)
    own = locks.leases.get(file)
    for lease in locks.leases.values():
        if lease is own:
            if lease.unlock or (lease.downgrade and kind == F_WRLCK):
                raise Errno(errno.EAGAIN)  # who waits counts as having opened it
        elif kind == F_WRLCK or lease.unlock:
            raise Errno(errno.EAGAIN)
    if own is not None:
        _change(locks, file, kind)
        return
    ends_with(file, locks)
    locks.leases[file] = Lease(kind, task.process.pid, tell)


def _open_elsewhere(task: Task, file: File, kind: int) -> bool:
    """Is the file open for writing; for F_WRLCK, is it open at all but for `file` (check_conflicting_open)?"""
    inode = file.inode
    if kind == F_RDLCK:
        return inode.writers > 0
    if inode.writers != int(file.counted):
        return True
    return any(each is not file for each in files_of(task.kernel, inode))


def break_leases(task: Task, inode: Inode, flags: int) -> Coroutine[Any, Any, None] | None:
    """Somebody opens `inode` with the open(2) `flags`: None when no lease is in the way. Else its holders are told,
    and the coroutine waits for them; EWOULDBLOCK with O_NONBLOCK (__break_lease)."""
    locks: FileLocks | None = inode.locks
    if locks is None or not locks.leases:
        return None
    writes = flags & O_ACCMODE != O_RDONLY
    if _ask(task, locks, writes) is None:
        return None
    if flags & O_NONBLOCK:
        raise Errno(errno.EWOULDBLOCK)
    return _wait(task, locks, writes)


def _ask(task: Task, locks: FileLocks, writes: bool) -> list[Lease] | None:
    """The leases in the way, whose holders know of it now; None when there are none."""
    from kvmsentry.fs.proc.sysctl import sysctl

    now = task.kernel.now()
    _expire(locks, now)
    found = [lease for lease in locks.leases.values() if lease.conflicts(writes)]
    if not found:
        return None
    seconds = sysctl(task.kernel).number("fs/lease-break-time")
    until = now + seconds * 1_000_000_000 if seconds else None
    for lease in found:
        if writes and not lease.unlock:
            lease.unlock, lease.unlock_at = True, until
        elif not writes and not (lease.unlock or lease.downgrade):
            lease.downgrade, lease.downgrade_at = True, until
        else:
            continue
        lease.tell()
    return found


async def _wait(task: Task, locks: FileLocks, writes: bool) -> None:
    while (found := _ask(task, locks, writes)) is not None:
        times = [at for lease in found for at in (lease.unlock_at, lease.downgrade_at) if at is not None]
        await park(task, "lease", locks.queue, deadline=min(times, default=None))
