"""Moving data between descriptors without the application: sendfile(2), splice(2), tee(2), copy_file_range(2).

Each call is a `step` that moves what can be moved now and says what it would wait for; `_run` sleeps where that is
allowed. A step never takes from its source what its sink has not taken: files are read at a position, pipes are peeked.
"""

from __future__ import annotations

import errno
import stat as st
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.hostfile import HostFile
from kvmsentry.fs.inotify import accessed, modified
from kvmsentry.fs.pipe import PIPE_BUF, PipeFile
from kvmsentry.fs.vfs import O_APPEND, O_NONBLOCK, TASK_IO, WATCHES, File
from kvmsentry.kernel.traps import Pace, WaitQueue, park
from kvmsentry.syscall.sys_io import (
    EAGAIN,
    EPIPE,
    MAX_RW_COUNT,
    READ_EVENTS,
    SSIZE_MAX,
    WRITE_EVENTS,
    broken_pipe,
    fetch_iov,
    iov_views,
    limit_size,
    read_views,
    readable,
    writable,
)
from kvmsentry.syscall.table import Fd, Size, UInt, UserPtr, syscall

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

SPLICE_F_NONBLOCK, SPLICE_ALL = 2, 15  # include/linux/splice.h
CHUNK = 256 << 10
TURN = 4 << 20  # after so many bytes it is looked whether somebody else should run

_loff = struct.Struct("<q")
_buffer = memoryview(bytearray(CHUNK))  # never holds anything across a sleep

Wait = tuple[WaitQueue | None, int]
End = Callable[[int], None]  # called with the bytes moved, unless the call fails
Step = Callable[[int], tuple[int, Wait | None]]  # bytes wanted -> bytes moved or -errno, what to wait for on EAGAIN


def _run(
    task: Task, files: tuple[File, ...], step: Step, count: int, wait: bool, whole: bool, end: End
) -> Any:
    """Drive `step` for `count` bytes: all of it when `whole`, else what comes at once. EPIPE brings SIGPIPE."""
    done = 0
    while done < count:
        try:
            n, blocked = step(count - done)
        except Errno as error:
            if done:
                break
            if error.errno == errno.EPIPE:
                broken_pipe(task)
            raise
        if n > 0:
            done += n
            if not whole:
                break
            if done >= TURN:
                return _run_on(task, files, step, count, done, wait, end, None)
            continue
        if n == EAGAIN and wait and blocked is not None and blocked[0] is not None and (whole or not done):
            return _run_on(task, files, step, count, done, wait, end, blocked, whole)
        if n == EPIPE:
            broken_pipe(task)
        if n < 0 and not done:
            return n
        break
    end(done)
    return done


async def _run_on(
    task: Task,
    files: tuple[File, ...],
    step: Step,
    count: int,
    done: int,
    wait: bool,
    end: End,
    blocked: Wait | None,
    whole: bool = True,
) -> int:
    """`_run`, from where it must sleep (`blocked`) or has had its turn."""
    for file in files:
        file.refs += 1
    pace = Pace(task)
    try:
        try:
            while done < count:
                if blocked is not None:
                    queue, mask = blocked
                    assert queue is not None
                    await park(task, "splice", queue, mask=mask)
                elif pace.due():
                    await pace.rest()
                n, blocked = step(count - done)
                if n > 0:
                    done += n
                    blocked = None
                    if not whole:
                        break
                elif n != EAGAIN or not wait or blocked is None:
                    if n == EPIPE:
                        broken_pipe(task)
                    if n < 0 and not done:
                        return n
                    break
        except Errno as error:
            if error.errno == errno.EPIPE:
                broken_pipe(task)
            if not done:
                raise
        end(done)
        return done
    finally:
        for file in files:
            file.put()


def _nothing(moved: int) -> None:
    """The `end` of calls that write nothing back."""


def _put(task: Task, file: File, views: list[memoryview]) -> int:
    return file.write_by(task, views) if file.flags & TASK_IO else file.write(views)


def _read_offset(task: Task, where: int) -> int:
    offset = int(_loff.unpack(task.mm.read(where, 8))[0])
    if offset < 0:
        raise Errno(errno.EINVAL)
    return offset


def _has_positions(file: File) -> bool:
    return file.seekable and file.inode.mode & 0o170000 != st.S_IFDIR


# -- sendfile --------------------------------------------------------------------------------------------------
@syscall(40)
def sendfile(task: Task, out_fd: Fd, in_fd: Fd, offset: UserPtr, count: Size) -> Any:
    """sendfile(2)."""
    start = _read_offset(task, offset) if offset else None
    source = readable(task.files.files.get(in_fd))
    sink = writable(task.files.files.get(out_fd))
    if count > SSIZE_MAX or not _has_positions(source) or sink.flags & O_APPEND or not sink.splices:
        raise Errno(errno.EINVAL)
    count = min(count, MAX_RW_COUNT)
    at = [source.pos if start is None else start]
    if sink.seekable and count:
        count = limit_size(task, sink, sink.pos, count)

    def step(want: int) -> tuple[int, Wait | None]:
        n = source.pread([_buffer[: min(want, CHUNK)]], at[0])
        if n <= 0:
            return n, None
        n = _put(task, sink, [_buffer[:n]])
        if n > 0:
            at[0] += n
        return n, (sink.queue, WRITE_EVENTS)

    def end(moved: int) -> None:
        if start is None:
            source.pos = at[0]
        else:
            task.mm.write(offset, _loff.pack(at[0]))
        if WATCHES and moved:
            accessed(source)
            modified(sink)

    return _run(task, (source, sink), step, count, not sink.flags & O_NONBLOCK, True, end)


# -- splice ----------------------------------------------------------------------------------------------------
@syscall(275)
def splice(
    task: Task, in_fd: Fd, in_offset: UserPtr, out_fd: Fd, out_offset: UserPtr, count: Size, flags: UInt
) -> Any:
    """splice(2)."""
    if not count:
        return 0
    if flags & ~SPLICE_ALL:
        raise Errno(errno.EINVAL)
    source = readable(task.files.files.get(in_fd))
    sink = writable(task.files.files.get(out_fd))
    count = min(count, MAX_RW_COUNT)
    wait = not flags & SPLICE_F_NONBLOCK
    if isinstance(source, PipeFile) and isinstance(sink, PipeFile):
        if in_offset or out_offset:
            raise Errno(errno.ESPIPE)
        if source.pipe is sink.pipe:
            raise Errno(errno.EINVAL)
        wait = wait and not (source.flags | sink.flags) & O_NONBLOCK
        return _run(task, (source, sink), _pipe_to_pipe(source, sink, True), count, wait, False, _nothing)
    if isinstance(source, PipeFile):
        if in_offset:
            raise Errno(errno.ESPIPE)
        return _from_pipe(task, source, sink, out_offset, count, wait)
    if isinstance(sink, PipeFile):
        if out_offset:
            raise Errno(errno.ESPIPE)
        return _to_pipe(task, source, sink, in_offset, count, wait)
    raise Errno(errno.EINVAL)


def _pipe_to_pipe(source: PipeFile, sink: PipeFile, consume: bool) -> Step:
    """Moves (or, for tee, copies) what is in one pipe and fits into another."""

    def step(want: int) -> tuple[int, Wait | None]:
        taken, given = source.pipe, sink.pipe
        if not given.readers:
            return EPIPE, None
        if not taken.used:
            return (EAGAIN if taken.writers else 0), (taken.queue, READ_EVENTS)
        room = given.capacity - given.used
        if not room:
            return EAGAIN, (given.queue, WRITE_EVENTS)
        n = min(want, room, taken.used)
        _copy(taken.peek(n), given.space(n))
        given.commit(n)
        if consume:
            taken.consume(n)
        return n, None

    return step


def _copy(source: list[memoryview], target: list[memoryview]) -> None:
    """Copy between lists of views of the same total length."""
    source, target = source[::-1], target[::-1]
    while source and target:
        piece, place = source.pop(), target.pop()
        n = min(len(piece), len(place))
        place[:n] = piece[:n]
        if n < len(piece):
            source.append(piece[n:])
        if n < len(place):
            target.append(place[n:])


def _from_pipe(task: Task, source: PipeFile, sink: File, out_offset: int, count: int, wait: bool) -> Any:
    at = None
    if out_offset:
        if not _has_positions(sink):
            raise Errno(errno.EINVAL if sink.seekable else errno.ESPIPE)
        at = [_read_offset(task, out_offset)]
    if sink.flags & O_APPEND or not sink.splices:
        raise Errno(errno.EINVAL)
    if sink.seekable:
        count = limit_size(task, sink, at[0] if at else sink.pos, count)
    pipe = source.pipe
    moved = [0]

    def step(want: int) -> tuple[int, Wait | None]:
        if not pipe.used:
            if moved[0] or not pipe.writers:
                return 0, None
            return EAGAIN, (pipe.queue, READ_EVENTS)
        views = pipe.peek(want)
        n = sink.pwrite(views, at[0]) if at else _put(task, sink, views)
        if n > 0:
            pipe.consume(n)
            moved[0] += n
            if at:
                at[0] += n
        elif n == EAGAIN and moved[0]:
            return 0, None
        return n, (sink.queue, WRITE_EVENTS)

    def end(moved: int) -> None:
        if at:
            task.mm.write(out_offset, _loff.pack(at[0]))
        if WATCHES and moved:
            modified(sink)

    wait = wait and not (source.flags | (0 if sink.seekable else sink.flags)) & O_NONBLOCK
    return _run(task, (source, sink), step, count, wait, True, end)


def _to_pipe(task: Task, source: File, sink: PipeFile, in_offset: int, count: int, wait: bool) -> Any:
    at = None
    if in_offset:
        if not _has_positions(source):
            raise Errno(errno.EINVAL if source.seekable else errno.ESPIPE)
        at = [_read_offset(task, in_offset)]
    if not source.splices:
        raise Errno(errno.EINVAL)
    pipe = sink.pipe

    def step(want: int) -> tuple[int, Wait | None]:
        if not pipe.readers:
            return EPIPE, None
        if pipe.capacity - pipe.used < min(PIPE_BUF, pipe.capacity):
            return EAGAIN, (pipe.queue, WRITE_EVENTS)
        views = pipe.space(want)
        if at:
            n = source.pread(views, at[0])
        else:
            n = source.read_by(task, views) if source.flags & TASK_IO else source.read(views)
        if n > 0:
            pipe.commit(n)
            if at:
                at[0] += n
        return n, (source.queue, READ_EVENTS)

    def end(moved: int) -> None:
        if at:
            task.mm.write(in_offset, _loff.pack(at[0]))
        if WATCHES and moved:
            accessed(source)

    wait = wait and not ((0 if source.seekable else source.flags) | sink.flags) & O_NONBLOCK
    return _run(task, (source, sink), step, count, wait, False, end)


@syscall(276)
def tee(task: Task, in_fd: Fd, out_fd: Fd, count: Size, flags: UInt) -> Any:
    """tee(2)."""
    if flags & ~SPLICE_ALL:
        raise Errno(errno.EINVAL)
    if not count:
        return 0
    source = readable(task.files.files.get(in_fd))
    sink = writable(task.files.files.get(out_fd))
    if not isinstance(source, PipeFile) or not isinstance(sink, PipeFile) or source.pipe is sink.pipe:
        raise Errno(errno.EINVAL)
    wait = not flags & SPLICE_F_NONBLOCK and not (source.flags | sink.flags) & O_NONBLOCK
    count = min(count, MAX_RW_COUNT)
    return _run(task, (source, sink), _pipe_to_pipe(source, sink, False), count, wait, False, _nothing)


@syscall(278, note="pages are copied, never given away")
def vmsplice(task: Task, fd: Fd, vec: UserPtr, count: Size, flags: UInt) -> Any:
    """vmsplice(2)."""
    if flags & ~SPLICE_ALL:
        raise Errno(errno.EINVAL)
    file = task.files.get_io(fd)
    iov, total = fetch_iov(task, vec, count)
    if not total:
        return 0
    if not isinstance(file, PipeFile):
        raise Errno(errno.EBADF)
    wait = not flags & SPLICE_F_NONBLOCK
    if file.writable:
        return _run(task, (file,), _memory_to_pipe(task, iov, file), total, wait, False, _nothing)
    return read_views(task, file, lambda done: iov_views(task, iov, True), wait)


def _memory_to_pipe(task: Task, iov: list[tuple[int, int]], sink: PipeFile) -> Step:
    """Copies what fits at once: vmsplice sleeps for room, and then not for more of it (vmsplice_to_pipe)."""

    def step(want: int) -> tuple[int, Wait | None]:
        pipe = sink.pipe
        if not pipe.readers:
            return EPIPE, None
        room = pipe.capacity - pipe.used
        if not room:
            return EAGAIN, (pipe.queue, WRITE_EVENTS)
        pieces, left = [], room
        for base, length in iov:
            if left:
                pieces.append((base, min(length, left)))
                left -= pieces[-1][1]
        views = iov_views(task, pieces, False)
        n = sum(map(len, views))
        _copy(views, pipe.space(n))
        pipe.commit(n)
        return n, None

    return step


# -- copy_file_range -------------------------------------------------------------------------------------------
@syscall(326)
def copy_file_range(
    task: Task, in_fd: Fd, in_offset: UserPtr, out_fd: Fd, out_offset: UserPtr, count: Size, flags: UInt
) -> Any:
    """copy_file_range(2)."""
    source = task.files.get_io(in_fd)
    sink = task.files.get_io(out_fd)
    take = _read_offset(task, in_offset) if in_offset else source.pos
    give = _read_offset(task, out_offset) if out_offset else sink.pos
    if flags:
        raise Errno(errno.EINVAL)
    for file in (source, sink):
        kind = file.inode.mode & 0o170000
        if kind == st.S_IFDIR:
            raise Errno(errno.EISDIR)
        if kind != st.S_IFREG:
            raise Errno(errno.EINVAL)
    readable(source)
    writable(sink)
    if sink.flags & O_APPEND:
        raise Errno(errno.EBADF)
    if source.inode.sb is not sink.inode.sb or isinstance(sink, HostFile):
        raise Errno(errno.EXDEV)  # as Linux since 5.19; the host keeps a host descriptor's position, not `pos`
    if count > SSIZE_MAX or take + count >= 1 << 63 or give + count >= 1 << 63:
        raise Errno(errno.EOVERFLOW)
    source.inode.refresh()
    count = min(count, MAX_RW_COUNT, max(0, source.inode.size - take))
    if source.inode is sink.inode and take < give + count and give < take + count:
        raise Errno(errno.EINVAL)
    if not count:
        return 0
    count = limit_size(task, sink, give, count)
    done = [0]

    def step(want: int) -> tuple[int, Wait | None]:
        n = source.pread([_buffer[: min(want, CHUNK)]], take + done[0])
        if n > 0:
            n = sink.pwrite([_buffer[:n]], give + done[0])
        if n > 0:
            done[0] += n
        return n, None

    def end(moved: int) -> None:
        if not moved:
            return
        if in_offset:
            task.mm.write(in_offset, _loff.pack(take + done[0]))
        else:
            source.pos = take + done[0]
        if out_offset:
            task.mm.write(out_offset, _loff.pack(give + done[0]))
        else:
            sink.pos = give + done[0]
        if WATCHES:
            accessed(source)
            modified(sink)

    return _run(task, (source, sink), step, count, False, True, end)
