"""Waiting for many files at once: poll(2), select(2), epoll(7)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.epoll import EPOLLEXCLUSIVE, EXCLUSIVE_OK, EpollFile
from kvmsentry.fs.vfs import (
    O_CLOEXEC,
    O_PATH,
    O_RDWR,
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLNVAL,
    POLLOUT,
    POLLPRI,
    POLLRDBAND,
    POLLRDNORM,
    POLLWRBAND,
    POLLWRNORM,
    TASK_IO,
    File,
)
from kvmsentry.kernel import signals
from kvmsentry.kernel.task import RLIMIT_NOFILE
from kvmsentry.kernel.traps import ERESTART_RESTARTBLOCK, ERESTARTNOHAND, WaitQueue, park
from kvmsentry.syscall.abi_time import TIMESPEC, read_timespec, write_timespec, write_timeval
from kvmsentry.syscall.sys_io import install
from kvmsentry.syscall.table import Fd, Int, Size, UInt, UserPtr, syscall

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

POLL_IN = POLLRDNORM | POLLRDBAND | POLLIN | POLLHUP | POLLERR | POLLNVAL  # fs/select.c: POLLIN_SET and so on
POLL_OUT = POLLWRBAND | POLLWRNORM | POLLOUT | POLLERR | POLLNVAL
POLL_EX = POLLPRI | POLLNVAL
EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD = 1, 2, 3
MAX_EVENTS = 0x7FFFFFFF // 12  # EP_MAX_EVENTS
STICKY_TIMEOUTS = 0x4000000  # uapi/linux/personality.h

_pollfd = struct.Struct("<iHH")
_epoll_event = struct.Struct("<IQ")
_mask = struct.Struct("<Q")
_mask_argument = struct.Struct("<QQ")

Store = Callable[[Any, int, int], None]  # write_timespec or write_timeval
# (file, events asked for) of all files that exist, for the sleep
Watched = list[tuple[File, int]]


async def _wait(task: Task, watched: Watched, scan: Callable[[], int], deadline: int | None, restart: int) -> int:
    """Sleep until `scan` counts something, or the deadline: then its count, 0. The files are held meanwhile."""
    queues: dict[WaitQueue, None] = {}
    mask = POLLERR | POLLHUP | POLLNVAL
    for file, events in watched:
        file.refs += 1
        mask |= events
        queue = file.queue_by(task) if file.flags & TASK_IO else file.queue
        if queue is not None:
            queues[queue] = None
    try:
        while True:
            woken = await park(task, "poll", *queues, mask=mask, deadline=deadline, restart=restart)
            count = scan()
            if count or not woken:
                return count
    finally:
        for file, _ in watched:
            file.put()


def _events(task: Task, file: File) -> int:
    return file.poll_by(task) if file.flags & TASK_IO else file.poll()


# -- poll ------------------------------------------------------------------------------------------------------
def _poll(task: Task, fds: int, count: int, timeout: int | None, restart: int) -> Any:
    """The work of poll(2) and ppoll(2): a count, or a coroutine that returns it; `timeout` in ns, None = for ever."""
    if count > task.rlimit(RLIMIT_NOFILE):
        raise Errno(errno.EINVAL)
    entries = list(_pollfd.iter_unpack(task.mm.read(fds, 8 * count))) if count else []
    files = task.files.files
    watched: Watched = []
    places: list[tuple[int, File, int]] = []
    answers = [0] * count
    ready = 0
    for index, (fd, events, _) in enumerate(entries):
        if fd < 0:
            continue
        file = files.get(fd)
        if file is None or file.flags & O_PATH:
            answers[index] = POLLNVAL
            ready += 1
            continue
        events |= POLLERR | POLLHUP
        got = _events(task, file) & events
        if got:
            answers[index] = got
            ready += 1
        watched.append((file, events))
        places.append((index, file, events))

    def finish(found: int) -> int:
        pack = _pollfd.pack
        if entries:
            task.mm.write(fds, b"".join([pack(e[0], e[1], a) for e, a in zip(entries, answers, strict=True)]))
        return found

    if ready or timeout == 0:
        return finish(ready)

    def scan() -> int:
        found = 0
        for index, file, events in places:
            got = answers[index] = _events(task, file) & events
            if got:
                found += 1
        return found

    deadline = None if timeout is None else task.kernel.now() + timeout
    return _poll_wait(task, watched, scan, finish, fds, count, deadline, restart)


async def _poll_wait(
    task: Task,
    watched: Watched,
    scan: Callable[[], int],
    finish: Callable[[int], int],
    fds: int,
    count: int,
    deadline: int | None,
    restart: int,
) -> int:
    try:
        return finish(await _wait(task, watched, scan, deadline, restart))
    except Errno as error:
        if error.errno == ERESTART_RESTARTBLOCK:
            task.restart = lambda t: _poll_again(t, fds, count, deadline)
        raise


def _poll_again(task: Task, fds: int, count: int, deadline: int | None) -> Any:
    """restart_syscall(2) of poll(2): what is left of the time."""
    timeout = None if deadline is None else max(0, deadline - task.kernel.now())
    return _poll(task, fds, count, timeout, ERESTART_RESTARTBLOCK)


@syscall(7)
def poll(task: Task, fds: UserPtr, count: UInt, timeout: Int) -> Any:
    """poll(2)."""
    return _poll(task, fds, count, None if timeout < 0 else timeout * 1_000_000, ERESTART_RESTARTBLOCK)


@syscall(271)
def ppoll(task: Task, fds: UserPtr, count: UInt, timeout: UserPtr, mask: UserPtr, size: Size) -> Any:
    """ppoll(2)."""
    limit = read_timespec(task.mm, timeout) if timeout else None
    wanted = _read_mask(task, mask, size)
    return _timed(task, lambda: _poll(task, fds, count, limit, ERESTARTNOHAND), wanted, limit, timeout, write_timespec)


# -- what ppoll and select do around the wait ------------------------------------------------------------------
def _read_mask(task: Task, mask: int, size: int) -> int | None:
    if not mask:
        return None
    if size != 8:
        raise Errno(errno.EINVAL)
    return int(_mask.unpack(task.mm.read(mask, 8))[0])


def _timed(
    task: Task, call: Callable[[], Any], mask: int | None, limit: int | None, where: int, store: Store
) -> Any:
    """`call()` under the signal mask `mask` (None: as it is); afterwards what is left of `limit`
    ns is stored at `where` (poll_select_finish in fs/select.c)."""
    began = task.kernel.now() if limit is not None else 0
    if mask is not None:
        signals.set_user_mask(task, mask)
    try:
        result = call()
    except Errno:
        signals.restore_mask(task)
        raise
    if result.__class__ is not int:
        return _timed_wait(task, result, limit, began, where, store)
    if mask is not None:
        signals.restore_mask(task)
    _store_left(task, limit, began, where, store)
    return result


async def _timed_wait(
    task: Task, call: Any, limit: int | None, began: int, where: int, store: Store
) -> int:
    try:
        result: int = await call
    except Errno as error:
        if error.errno != ERESTARTNOHAND:
            signals.restore_mask(task)  # else signal delivery does it
        elif not _store_left(task, limit, began, where, store):
            raise Errno(errno.EINTR) from None
        raise
    signals.restore_mask(task)
    _store_left(task, limit, began, where, store)
    return result


def _store_left(
    task: Task, limit: int | None, began: int, where: int, store: Store
) -> bool:
    """False when it could not be stored: then the call must not be restarted with the old time-out."""
    if limit is None:
        return True
    if task.process.personality & STICKY_TIMEOUTS:
        return False
    try:
        store(task.mm, where, max(0, limit - (task.kernel.now() - began)))
    except Errno:
        return False
    return True


# -- select ----------------------------------------------------------------------------------------------------
def _select(task: Task, count: int, read: int, write: int, other: int, timeout: int | None) -> Any:
    """The work of select(2) and pselect6(2)."""
    if count < 0:
        raise Errno(errno.EINVAL)
    files = task.files.files
    top = max(files, default=0) + 1
    count = min(count, max(64, -(-top // 64) * 64))  # the kernel's table ends there
    length = -(-count // 64) * 8
    valid = (1 << count) - 1
    read_set, write_set, other_set = (
        int.from_bytes(task.mm.read(where, length), "little") & valid if where and length else 0
        for where in (read, write, other)
    )
    watched: Watched = []
    rows: list[tuple[int, File, int, int, int]] = []
    asked = read_set | write_set | other_set
    while asked:
        bit = asked & -asked
        asked ^= bit
        file = files.get(bit.bit_length() - 1)
        if file is None or file.flags & O_PATH:
            raise Errno(errno.EBADF)
        wants = read_set & bit, write_set & bit, other_set & bit
        events = (POLL_IN if wants[0] else 0) | (POLL_OUT if wants[1] else 0) | (POLL_EX if wants[2] else 0)
        watched.append((file, events))
        rows.append((bit, file, *wants))
    found = [0, 0, 0]

    def scan() -> int:
        ins = outs = others = total = 0
        for bit, file, wants_in, wants_out, wants_other in rows:
            events = _events(task, file)
            if wants_in and events & POLL_IN:
                ins |= bit
                total += 1
            if wants_out and events & POLL_OUT:
                outs |= bit
                total += 1
            if wants_other and events & POLL_EX:
                others |= bit
                total += 1
        found[:] = ins, outs, others
        return total

    def finish(total: int) -> int:
        for where, bits in zip((read, write, other), found, strict=True):
            if where and length:
                task.mm.write(where, bits.to_bytes(length, "little"))
        return total

    total = scan()
    if total or timeout == 0:
        return finish(total)
    deadline = None if timeout is None else task.kernel.now() + timeout
    return _select_wait(task, watched, scan, finish, deadline)


async def _select_wait(
    task: Task, watched: Watched, scan: Callable[[], int], finish: Callable[[int], int], deadline: int | None
) -> int:
    return finish(await _wait(task, watched, scan, deadline, ERESTARTNOHAND))


@syscall(23)
def select(task: Task, count: Int, read: UserPtr, write: UserPtr, other: UserPtr, timeout: UserPtr) -> Any:
    """select(2)."""
    limit = None
    if timeout:
        seconds, micro = task.mm.read_struct(TIMESPEC, timeout)
        if seconds < 0 or micro < 0:
            raise Errno(errno.EINVAL)
        limit = seconds * 1_000_000_000 + micro * 1000
    return _timed(task, lambda: _select(task, count, read, write, other, limit), None, limit, timeout, write_timeval)


@syscall(270)
def pselect6(
    task: Task, count: Int, read: UserPtr, write: UserPtr, other: UserPtr, timeout: UserPtr, mask: UserPtr
) -> Any:
    """pselect(2); the last argument points at the mask's address and size."""
    limit = read_timespec(task.mm, timeout) if timeout else None
    wanted = _read_mask(task, *_mask_argument.unpack(task.mm.read(mask, 16))) if mask else None
    return _timed(task, lambda: _select(task, count, read, write, other, limit), wanted, limit, timeout, write_timespec)


# -- epoll -----------------------------------------------------------------------------------------------------
@syscall(213)
def epoll_create(task: Task, size: Int) -> int:
    """epoll_create(2)."""
    if size <= 0:
        raise Errno(errno.EINVAL)
    return install(task, EpollFile(O_RDWR))


@syscall(291)
def epoll_create1(task: Task, flags: UInt) -> int:
    """epoll_create1(2)."""
    if flags & ~O_CLOEXEC:
        raise Errno(errno.EINVAL)
    return install(task, EpollFile(O_RDWR), 0, bool(flags))


@syscall(233)
def epoll_ctl(task: Task, epfd: Fd, operation: Int, fd: Fd, event: UserPtr) -> int:
    """epoll_ctl(2)."""
    events = data = 0
    if operation != EPOLL_CTL_DEL:
        events, data = _epoll_event.unpack(task.mm.read(event, 12))
    epoll = task.files.get_io(epfd)
    file = task.files.get_io(fd)
    if file.queue is None:
        raise Errno(errno.EPERM)
    if epoll is file or not isinstance(epoll, EpollFile):
        raise Errno(errno.EINVAL)
    if operation != EPOLL_CTL_DEL and events & EPOLLEXCLUSIVE:
        if operation == EPOLL_CTL_MOD or isinstance(file, EpollFile) or events & ~EXCLUSIVE_OK:
            raise Errno(errno.EINVAL)
    if operation == EPOLL_CTL_ADD:
        epoll.add(fd, file, events, data)
    elif operation == EPOLL_CTL_MOD:
        epoll.modify(fd, file, events, data)
    elif operation == EPOLL_CTL_DEL:
        epoll.delete(fd, file)
    else:
        raise Errno(errno.EINVAL)
    return 0


def _epoll_wait(task: Task, epfd: int, events: int, limit: int, timeout: int | None) -> Any:
    """The work of the epoll_wait family; `timeout` in ns, None = for ever."""
    if not 0 < limit <= MAX_EVENTS:
        raise Errno(errno.EINVAL)
    epoll = task.files.get_io(epfd)
    if not isinstance(epoll, EpollFile):
        raise Errno(errno.EINVAL)
    if epoll.ready:
        count = _deliver(task, epoll, events, limit)
        if count:
            return count
    if timeout == 0:
        return 0
    return _epoll_sleep(task, epoll, events, limit, None if timeout is None else task.kernel.now() + timeout)


def _deliver(task: Task, epoll: EpollFile, where: int, limit: int) -> int:
    found = epoll.collect(limit)
    if found:
        pack = _epoll_event.pack
        try:
            task.mm.write(where, b"".join([pack(events, item.data) for item, events in found]))
        except Errno:
            epoll.put_back(found)
            raise
    return len(found)


async def _epoll_sleep(task: Task, epoll: EpollFile, where: int, limit: int, deadline: int | None) -> int:
    epoll.refs += 1
    try:
        while True:
            woken = await park(task, "epoll_wait", epoll.sleepers, deadline=deadline, restart=errno.EINTR)
            count = _deliver(task, epoll, where, limit)
            if count or not woken:
                return count
    finally:
        epoll.put()


@syscall(232)
def epoll_wait(task: Task, epfd: Fd, events: UserPtr, limit: Int, timeout: Int) -> Any:
    """epoll_wait(2)."""
    return _epoll_wait(task, epfd, events, limit, None if timeout < 0 else timeout * 1_000_000)


@syscall(281)
def epoll_pwait(task: Task, epfd: Fd, events: UserPtr, limit: Int, timeout: Int, mask: UserPtr, size: Size) -> Any:
    """epoll_pwait(2)."""
    wanted = _read_mask(task, mask, size)
    return _epoll_pwait(task, epfd, events, limit, None if timeout < 0 else timeout * 1_000_000, wanted)


@syscall(441)
def epoll_pwait2(task: Task, epfd: Fd, events: UserPtr, limit: Int, timeout: UserPtr, mask: UserPtr, size: Size) -> Any:
    """epoll_pwait2(2): the time-out is a struct timespec."""
    left = read_timespec(task.mm, timeout) if timeout else None
    return _epoll_pwait(task, epfd, events, limit, left, _read_mask(task, mask, size))


def _epoll_pwait(task: Task, epfd: int, events: int, limit: int, timeout: int | None, mask: int | None) -> Any:
    if mask is None:
        return _epoll_wait(task, epfd, events, limit, timeout)
    return under_mask(task, mask, lambda: _epoll_wait(task, epfd, events, limit, timeout))


def under_mask(task: Task, mask: int, call: Callable[[], Any], interrupted: int = errno.EINTR) -> Any:
    """`call()` with the signal mask `mask` for its duration. Where it says EINTR, a handler runs under that mask before
    the old one comes back; `interrupted` is what the application is told then (an errno, or how to restart)."""
    signals.set_user_mask(task, mask)
    try:
        result = call()
    except Errno:
        signals.restore_mask(task)
        raise
    if result.__class__ is not int:
        return _wait_under_mask(task, result, interrupted)
    signals.restore_mask(task)
    return result


async def _wait_under_mask(task: Task, call: Any, interrupted: int) -> int:
    try:
        result: int = await call
    except Errno as error:
        if error.errno == errno.EINTR:
            raise Errno(interrupted) from None
        signals.restore_mask(task)
        raise
    signals.restore_mask(task)
    return result
