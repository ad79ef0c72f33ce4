"""Linux's asynchronous I/O: io_setup(2), io_destroy(2), io_submit(2), io_cancel(2), io_getevents(2), io_pgetevents(2).
What libaio, databases and QEMU call; not POSIX aio(7), which is threads."""

from __future__ import annotations

import errno
import struct
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs.eventfd import EventFile
from kvmsentry.fs.inotify import accessed, modified
from kvmsentry.fs.vfs import O_APPEND, TASK_IO, WATCHES, File
from kvmsentry.kernel import aio
from kvmsentry.kernel.aio import EVENT, Context, PollRequest, charge, contexts
from kvmsentry.kernel.task import Task
from kvmsentry.kernel.traps import ERESTARTNOHAND, RESTART_CODES, park
from kvmsentry.syscall.sys_io import (
    MAX_RW_COUNT,
    RWF_APPEND,
    RWF_DSYNC,
    RWF_NOWAIT,
    RWF_SYNC,
    check_range,
    check_rwf,
    fetch_iov,
    iov_views,
    limit_size,
    read_views,
    readable,
    writable,
    write_views,
)
from kvmsentry.syscall.sys_poll import under_mask
from kvmsentry.syscall.table import Long, UInt, ULong, UserPtr, syscall

# struct iocb: data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved2, flags, resfd
IOCB = struct.Struct("<QIiHhIQQqQII")  # uapi/linux/aio_abi.h
PREAD, PWRITE, FSYNC, FDSYNC, POLL, PREADV, PWRITEV = 0, 1, 2, 3, 5, 7, 8
IOCB_FLAG_RESFD, IOCB_FLAG_IOPRIO = 1, 2
KIOCB_KEY = 0
KTIMESPEC = struct.Struct("<qq")
NS = 1_000_000_000
_sigset_pointer = struct.Struct("<QQ")


def _context(task: Task, number: int) -> Context:
    found = task.mm.aio.get(number) if task.mm.aio is not None else None
    if found is None:
        raise Errno(errno.EINVAL)
    context: Context = found
    return context


@syscall(206)
def io_setup(task: Task, nr_events: UInt, ctxp: UserPtr) -> int:
    """io_setup(2)."""
    if task.mm.read_u64(ctxp) or not nr_events or nr_events > aio.NR_MOST:
        return -errno.EINVAL
    charge(task.kernel, nr_events)
    try:
        context = Context(task, nr_events)
    except Errno:
        charge(task.kernel, -nr_events)
        return -errno.ENOMEM
    contexts(task.mm)[context.id] = context
    try:
        task.mm.write_u64(ctxp, context.id)
    except Errno:
        _destroy(task, context)
        raise
    return 0


def _destroy(task: Task, context: Context) -> None:
    del task.mm.aio[context.id]
    context.kill()
    try:
        task.mm.munmap(context.id, context.size)
    except Errno:
        pass  # the application has put something else there, which can't be split: it stays


@syscall(207)
def io_destroy(task: Task, ctx: ULong) -> int:
    """io_destroy(2)."""
    _destroy(task, _context(task, ctx))
    return 0


@syscall(
    209, note="reads and writes are done when io_submit returns; a pipe or socket that is not ready makes it sleep"
)
def io_submit(task: Task, ctx: ULong, nr: Long, iocbpp: UserPtr) -> Any:
    """io_submit(2): how many requests were taken; the error of the first when none was."""
    if nr < 0:
        return -errno.EINVAL
    context = _context(task, ctx)
    done = 0
    try:
        while done < min(nr, context.nr):
            result = _submit(task, context, task.mm.read_u64(iocbpp + 8 * done))
            if result is not None:
                return _submit_rest(task, context, iocbpp, done, min(nr, context.nr), result)
            done += 1
    except Errno:
        if not done:
            raise
    return done


async def _submit_rest(task: Task, context: Context, iocbpp: int, done: int, nr: int, work: Any) -> int:
    """The request at `done` has to sleep first."""
    try:
        while True:
            if work is not None:
                await work
            done += 1
            if done >= nr or context.dead:
                return done
            work = _submit(task, context, task.mm.read_u64(iocbpp + 8 * done))
    except Errno:
        if not done:
            raise
        return done


def _submit(task: Task, context: Context, address: int) -> Any:
    """One request (io_submit_one): None when it was taken, a coroutine when taking it must sleep."""
    data, _, rw_flags, opcode, _, fd, buf, nbytes, offset, reserved, flags, resfd = IOCB.unpack(
        task.mm.read(address, IOCB.size)
    )
    if reserved or nbytes >= 1 << 63:
        raise Errno(errno.EINVAL)
    if not context.reserve():
        raise Errno(errno.EAGAIN)
    try:
        file = task.files.get_io(fd)
        eventfd: EventFile | None = None
        if flags & IOCB_FLAG_RESFD:
            target = task.files.get_io(resfd)
            if not isinstance(target, EventFile):
                raise Errno(errno.EINVAL)
            eventfd = target
        task.mm.write_u32(address + 8, KIOCB_KEY)
        if opcode == POLL:
            if buf >> 16 or offset or nbytes or rw_flags:
                raise Errno(errno.EINVAL)
            PollRequest(context, task, file, buf, data, address, eventfd).start()
            return None
        if opcode in (FSYNC, FDSYNC):
            if buf or offset or nbytes or rw_flags:
                raise Errno(errno.EINVAL)
            work: Any = _sync(file)
        elif opcode in (PREAD, PREADV, PWRITE, PWRITEV):
            work = _transfer(task, file, opcode, buf, nbytes, offset, rw_flags)
        else:
            raise Errno(errno.EINVAL)
    except BaseException:
        context.reserved -= 1
        raise
    if work.__class__ is int:
        context.complete(data, address, work, eventfd)
        return None
    return _later(context, data, address, eventfd, work)


async def _later(context: Context, data: int, address: int, eventfd: EventFile | None, work: Any) -> None:
    if eventfd is not None:
        eventfd.get()
    result = -errno.EINTR
    try:
        result = await work
    except Errno as error:
        if error.errno not in RESTART_CODES:  # aio_rw_done: no way to restart
            result = -error.errno
    finally:
        context.complete(data, address, result, eventfd)
        if eventfd is not None:
            eventfd.put()


def _sync(file: File) -> int:
    """fsync's answer; EINVAL for files that know none."""
    try:
        file.fsync()
    except Errno as error:
        if error.errno == errno.EINVAL:
            raise
        return -error.errno
    return 0


def _transfer(task: Task, file: File, opcode: int, buf: int, nbytes: int, offset: int, rw_flags: int) -> Any:
    """A read or write: its result, or a coroutine. What is wrong with the request is raised, what the file says is the
    event's result."""
    reading = opcode in (PREAD, PREADV)
    (readable if reading else writable)(file)
    check_rwf(rw_flags & 0xFFFFFFFF)
    if opcode in (PREADV, PWRITEV):
        iov, total = fetch_iov(task, buf, nbytes)
    else:
        check_range(buf, nbytes)
        total = min(nbytes, MAX_RW_COUNT)
        iov = [(buf, total)] if total else []
    if offset < 0 and file.seekable:
        raise Errno(errno.EINVAL)
    wait = not rw_flags & RWF_NOWAIT
    try:
        if reading:
            if not file.seekable or file.flags & TASK_IO:
                return read_views(task, file, lambda done: iov_views(task, iov, True), wait)
            n = file.pread(iov_views(task, iov, True), offset) if iov else 0
            if n > 0 and WATCHES:
                accessed(file)
            return n
        if not file.seekable or file.flags & TASK_IO:
            return write_views(task, file, lambda done: iov_views(task, iov, False, done), total, wait)
        if file.flags & O_APPEND or rw_flags & RWF_APPEND:
            offset = file.inode.size
        left = limit_size(task, file, offset, total)
        views = []
        for view in iov_views(task, iov, False):
            views.append(view[:left])
            left -= len(views[-1])
            if not left:
                break
        n = file.pwrite(views, offset) if views else 0
        if n > 0:
            if WATCHES:
                modified(file)
            if rw_flags & (RWF_DSYNC | RWF_SYNC):
                file.fsync()
        return n
    except Errno as error:
        return -error.errno


@syscall(210)
def io_cancel(task: Task, ctx: ULong, iocb: UserPtr, result: UserPtr) -> int:
    """io_cancel(2): only a poll can be caught under way. EINPROGRESS: its event comes through the ring."""
    if task.mm.read_u32(iocb + 8) != KIOCB_KEY:
        return -errno.EINVAL
    context = _context(task, ctx)
    for request in context.active:
        if request.obj == iocb:
            request.finish(0)
            return -errno.EINPROGRESS
    return -errno.EINVAL


def _getevents(task: Task, ctx: int, least: int, most: int, events: int, timeout: int) -> Any:
    deadline = None
    if timeout:
        seconds, nanoseconds = task.mm.read_struct(KTIMESPEC, timeout)
        deadline = task.kernel.now() + max(0, min(seconds * NS + nanoseconds, 1 << 62))
    context = _context(task, ctx)
    if not 0 <= least <= most:
        return -errno.EINVAL
    got = _collect(task, context, most, events, 0)
    if got >= least or (deadline is not None and deadline <= task.kernel.now()):
        return got
    return _getevents_wait(task, context, least, most, events, deadline, got)


def _collect(task: Task, context: Context, most: int, events: int, have: int) -> int:
    """Move events to user memory behind the `have` that are there; how many are there now."""
    try:
        return have + context.take(most - have, task.mm, events + have * EVENT.size)
    except Errno:
        if not have:
            raise
        return have


async def _getevents_wait(
    task: Task, context: Context, least: int, most: int, events: int, deadline: int | None, have: int
) -> int:
    while have < least:
        try:
            in_time = await park(task, "io_getevents", context.completed, deadline=deadline, restart=errno.EINTR)
        except Errno:
            if have:
                return have
            raise
        if context.dead:
            return have or -errno.EINVAL
        have = _collect(task, context, most, events, have)
        if not in_time:
            break
    return have


@syscall(208)
def io_getevents(task: Task, ctx: ULong, min_nr: Long, nr: Long, events: UserPtr, timeout: UserPtr) -> Any:
    """io_getevents(2)."""
    return _getevents(task, ctx, min_nr, nr, events, timeout)


@syscall(333)
def io_pgetevents(
    task: Task, ctx: ULong, min_nr: Long, nr: Long, events: UserPtr, timeout: UserPtr, usig: UserPtr
) -> Any:
    """io_getevents(2) with a signal mask for its duration; `usig` points at the mask's address and size."""
    mask = None
    if usig:
        pointer, size = task.mm.read_struct(_sigset_pointer, usig)
        if pointer:
            if size != 8:
                return -errno.EINVAL
            mask = task.mm.read_u64(pointer)
    if mask is None:
        return _getevents(task, ctx, min_nr, nr, events, timeout)
    return under_mask(
        task, mask, lambda: _getevents(task, ctx, min_nr, nr, events, timeout), interrupted=ERESTARTNOHAND
    )
