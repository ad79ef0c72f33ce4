"""File locks: flock(2), and record locks of fcntl(2), POSIX and OFD.

    inode.locks -> FileLocks: .flocks  who has flock'ed the whole file (owner: the open file description)
                              .records byte ranges, sorted; owner: the descriptor table (POSIX) or the open file (OFD)
                              .leases  see fs/leases.py

A POSIX lock's owner is the table of descriptors, as `current->files` in fs/locks.c: threads share it, a fork does not
inherit it, and closing any descriptor of the file releases it (FdTable.drop). OFD locks and flocks end with their open
file. Ranges are half-open; END stands for the end of the address range, which l_len 0 means.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel.traps import WaitQueue, park

if TYPE_CHECKING:
    from kvmsentry.fs.leases import Lease
    from kvmsentry.fs.vfs import File, Inode
    from kvmsentry.kernel.task import Task

END = 1 << 63  # OFFSET_MAX + 1
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2  # uapi/asm-generic/fcntl.h
MAX_RECORDS = 16384  # on one inode; ENOLCK beyond
LOCK_SH, LOCK_EX, LOCK_NB, LOCK_UN, LOCK_MAND = 1, 2, 4, 8, 32


class Record:
    """One locked range of one owner."""

    __slots__ = ("start", "end", "kind", "owner", "pid")

    def __init__(self, start: int, end: int, kind: int, owner: Any, pid: int) -> None:
        self.start, self.end, self.kind, self.owner, self.pid = start, end, kind, owner, pid


class FileLocks:
    """All locks on one inode."""

    __slots__ = ("flocks", "records", "leases", "queue")

    def __init__(self) -> None:
        self.flocks: dict[Any, tuple[int, int]] = {}  # open file -> (LOCK_SH or LOCK_EX, pid)
        self.records: list[Record] = []
        self.leases: dict[File, Lease] = {}  # fs/leases.py
        self.queue = WaitQueue()

    def conflict(self, owner: Any, kind: int, start: int, end: int) -> Record | None:
        """The first record of somebody else that forbids (kind, start, end) to `owner`."""
        for record in self.records:
            if record.start < end and start < record.end and record.owner is not owner:
                if F_WRLCK in (record.kind, kind):
                    return record
        return None

    def set(self, owner: Any, kind: int, start: int, end: int, pid: int) -> None:
        """Put the range into the state `kind` for `owner`: splits, merges, removes what `owner` had there."""
        kept: list[Record] = []
        for record in self.records:
            if record.owner is not owner or record.end < start or end < record.start:
                kept.append(record)
            elif record.kind == kind:  # touches or overlaps: melts into the new one
                start, end = min(start, record.start), max(end, record.end)
            else:
                if record.start < start:
                    kept.append(Record(record.start, min(start, record.end), record.kind, owner, record.pid))
                if record.end > end:
                    kept.append(Record(max(end, record.start), record.end, record.kind, owner, record.pid))
        if len(kept) >= MAX_RECORDS and kind != F_UNLCK:
            raise Errno(errno.ENOLCK)
        if kind != F_UNLCK:
            kept.append(Record(start, end, kind, owner, pid))
        kept.sort(key=lambda record: record.start)
        self.records = kept
        self.queue.wake()

    def closed(self, owner: Any) -> None:
        """`owner` (a descriptor table, an open file) gave up the file: its records go."""
        left = [record for record in self.records if record.owner is not owner]
        if len(left) != len(self.records):
            self.records = left
            self.queue.wake()

    def ended(self, file: File) -> None:
        """The open file is gone: its flock, its OFD locks and its lease go."""
        if self.flocks.pop(file, None) is not None or self.leases.pop(file, None) is not None:
            self.queue.wake()
        self.closed(file)


# Who waits for whom: POSIX owners only, as OFD locks take no part in deadlock detection (fcntl(2)).
_waiting: dict[Any, tuple[FileLocks, int, int, int]] = {}  # owner -> (locks, kind, start, end)


def locks_of(inode: Inode) -> FileLocks:
    """The locks of `inode`, made on first use."""
    locks: FileLocks | None = inode.locks
    if locks is None:
        locks = inode.locks = FileLocks()
    return locks


def ends_with(file: File, locks: FileLocks) -> None:
    """`locks` are to be told when `file` is closed."""
    if file.endings is None:
        file.endings = {}
    file.endings[locks.ended] = None


def would_deadlock(owner: Any, blocker: Any) -> bool:
    """Does `blocker` wait, through any chain, for `owner`? (posix_locks_deadlock in fs/locks.c)"""
    for _ in range(10):  # MAX_DEADLK_ITERATIONS
        wait = _waiting.get(blocker)
        if wait is None:
            return False
        locks, kind, start, end = wait
        record = locks.conflict(blocker, kind, start, end)
        if record is None:
            return False
        blocker = record.owner
        if blocker is owner:
            return True
    return False


def set_record(task: Task, file: File, owner: Any, kind: int, start: int, end: int, wait: bool) -> Any:
    """F_SETLK and F_SETLKW: 0, a coroutine that waits, or EAGAIN, EDEADLK. `owner` is `file` for OFD locks."""
    locks = locks_of(file.inode)
    if owner is file:
        ends_with(file, locks)
    pid = -1 if owner is file else task.process.pid
    if kind == F_UNLCK or locks.conflict(owner, kind, start, end) is None:
        if kind == F_UNLCK and not locks.records:
            return 0
        locks.set(owner, kind, start, end, pid)
        return 0
    if not wait:
        return -errno.EAGAIN
    return _wait_for_record(task, file, locks, owner, kind, start, end, pid)


async def _wait_for_record(
    task: Task, file: File, locks: FileLocks, owner: Any, kind: int, start: int, end: int, pid: int
) -> int:
    key = owner if owner is not file else None
    file.refs += 1
    try:
        while True:
            record = locks.conflict(owner, kind, start, end)
            if record is None:
                locks.set(owner, kind, start, end, pid)
                return 0
            if key is not None:
                if would_deadlock(owner, record.owner):
                    raise Errno(errno.EDEADLK)
                _waiting[key] = (locks, kind, start, end)
            await park(task, "record lock", locks.queue)
    finally:
        if key is not None:
            _waiting.pop(key, None)
        file.put()


def flock(task: Task, file: File, kind: int, wait: bool) -> Any:
    """flock(2): kind is LOCK_SH, LOCK_EX or LOCK_UN; 0, -EWOULDBLOCK, or a coroutine that waits. Changing the kind
    gives up the old lock first, as on Linux."""
    locks = locks_of(file.inode)
    had = locks.flocks.pop(file, None)
    if kind == LOCK_UN:
        if had is not None:
            locks.queue.wake()
        return 0
    if had is not None and had[0] == kind:
        locks.flocks[file] = had
        return 0
    ends_with(file, locks)
    if not _flock_conflict(locks, kind):
        locks.flocks[file] = (kind, task.process.pid)
        if had is not None:
            locks.queue.wake()
        return 0
    if had is not None:
        locks.queue.wake()
    if not wait:
        return -errno.EWOULDBLOCK
    return _wait_for_flock(task, file, locks, kind)


def _flock_conflict(locks: FileLocks, kind: int) -> bool:
    return any(LOCK_EX in (kind, other) for other, _ in locks.flocks.values())


async def _wait_for_flock(task: Task, file: File, locks: FileLocks, kind: int) -> int:
    file.refs += 1
    try:
        while _flock_conflict(locks, kind):
            await park(task, "flock", locks.queue)
        locks.flocks[file] = (kind, task.process.pid)
        return 0
    finally:
        file.put()
