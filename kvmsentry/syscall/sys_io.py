"""Reading and writing through descriptors, and the descriptors themselves.

read(2) and write(2) are the hottest calls of the system: each has a short path that decides with one test of the file's
flags that nothing is special, and leaves everything else to a slow path. Nobody sleeps on the short path; a coroutine
is made when there is something to wait for. Order of checks as in fs/read_write.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno, OutOfMemory
from kvmsentry.fs.inotify import accessed, modified
from kvmsentry.fs.pipe import new_pipe
from kvmsentry.fs.vfs import (
    O_APPEND,
    O_CLOEXEC,
    O_DIRECT,
    O_NONBLOCK,
    O_PATH,
    O_WRONLY,
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLOUT,
    POLLRDHUP,
    POLLRDNORM,
    POLLWRNORM,
    TASK_IO,
    WATCHES,
    File,
)  # fmt: skip
from kvmsentry.kernel.task import RLIM_INFINITY, RLIMIT_FSIZE, RLIMIT_NOFILE, SigInfo
from kvmsentry.kernel.traps import ERESTARTSYS, Pace, park
from kvmsentry.syscall.table import Fd, Long, Offset, Size, UInt, UserPtr, syscall
from kvmsentry.vcpu.layout import USER_TOP

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

MAX_RW_COUNT = 0x7FFFF000  # include/linux/fs.h
IOV_MAX = 1024  # UIO_MAXIOV, uapi/linux/uio.h
SSIZE_MAX = (1 << 63) - 1
BIG = 1 << 20  # more than this is done in pieces, so that a huge buffer is not faulted in for a short read
LONG = 4 << 20  # more than this may let others run in between
SIGPIPE, SIGXFSZ = 13, 25

NOT_READ = O_PATH | O_WRONLY | TASK_IO  # a file with none of these is read the short way
NOT_WRITTEN = O_PATH | TASK_IO
READ_EVENTS = POLLIN | POLLRDNORM | POLLHUP | POLLRDHUP | POLLERR
WRITE_EVENTS = POLLOUT | POLLWRNORM | POLLHUP | POLLERR

RWF_HIPRI, RWF_DSYNC, RWF_SYNC, RWF_NOWAIT, RWF_APPEND, RWF_NOAPPEND = 1, 2, 4, 8, 16, 32  # uapi/linux/fs.h

EAGAIN, EPIPE = -errno.EAGAIN, -errno.EPIPE
Fetch = Callable[[int], list[memoryview]]  # bytes already done -> views of what is left
_two_ints = struct.Struct("<ii")
_iovec = struct.Struct("<QQ")


# -- read ------------------------------------------------------------------------------------------------------------
@syscall(0)
def read(task: Task, fd: Fd, buf: UserPtr, count: Size) -> Any:
    """read(2)."""
    file = task.files.files.get(fd)
    if file is None or file.flags & NOT_READ or not 0 < count <= BIG:
        return _read_slow(task, readable(file), buf, count)
    n = file.read(task.mm.views(buf, count, True))
    if n > 0:
        if WATCHES:
            accessed(file)
        return n
    if n == EAGAIN and not file.flags & O_NONBLOCK and file.queue is not None:
        return _read_wait(task, file, lambda done: task.mm.views(buf, count, True))
    return n


def _read_slow(task: Task, file: File, buf: int, count: int) -> Any:
    """Empty and huge reads, and files that want to know who reads."""
    check_range(buf, count)
    count = min(count, MAX_RW_COUNT)
    if count <= BIG:
        return read_views(task, file, lambda done: task.mm.views(buf, count, True) if count else [])
    if not (file.seekable or file.endless):
        return read_views(task, file, lambda done: task.mm.views(buf, BIG, True))
    return _in_pieces(task, file, count, lambda done, n: file.read(task.mm.views(buf + done, n, True)))


def _in_pieces(task: Task, file: File, count: int, piece: Callable[[int, int], int]) -> Any:
    """Do `count` bytes in pieces; stops at a short one. Long ones let others run in between."""
    done = 0
    while done < count:
        if done >= LONG:
            return _in_pieces_on(task, file, count, done, piece)
        want = min(BIG, count - done)
        try:
            n = piece(done, want)
        except OutOfMemory:
            raise
        except Errno:
            if done:
                break
            raise
        if n < 0 and not done:
            return n
        done += max(n, 0)
        if n < want:
            break
    return done


async def _in_pieces_on(task: Task, file: File, count: int, done: int, piece: Callable[[int, int], int]) -> int:
    """`_in_pieces`, after `done` bytes; a signal ends it there."""
    file.refs += 1
    pace = Pace(task)
    try:
        while done < count:
            if pace.due():
                await pace.rest()
            want = min(BIG, count - done)
            n = piece(done, want)
            done += max(n, 0)
            if n < want:
                break
    except OutOfMemory:
        raise
    except Errno:
        pass  # what was done counts
    finally:
        file.put()
    return done


def read_views(task: Task, file: File, fetch: Fetch, wait: bool = True) -> Any:
    """Read into what `fetch` gives, sleeping when there is nothing (unless O_NONBLOCK or not `wait`)."""
    views = fetch(0)
    n = file.read_by(task, views) if file.flags & TASK_IO else file.read(views)
    if n.__class__ is not int:
        return n
    if n > 0:
        if WATCHES:
            accessed(file)
    elif n == EAGAIN and wait and not file.flags & O_NONBLOCK and file.queue is not None:
        return _read_wait(task, file, fetch)
    return n


def _patience(task: Task, timeout: int) -> tuple[int | None, int]:
    """(deadline, what a signal raises) of a sleep: sockets may have a timeout, and then do not restart (signal(7))."""
    return (task.kernel.now() + timeout, errno.EINTR) if timeout else (None, ERESTARTSYS)


async def _read_wait(task: Task, file: File, fetch: Fetch) -> int:
    """Sleep until there is something to read."""
    file.refs += 1  # a close by another thread does not end this read
    try:
        by_task = file.flags & TASK_IO
        queue = file.queue_by(task) if by_task else file.queue
        assert queue is not None
        deadline, restart = _patience(task, file.read_timeout)
        while True:
            if not await park(task, "read", queue, mask=READ_EVENTS, deadline=deadline, restart=restart):
                return EAGAIN
            n: int = file.read_by(task, fetch(0)) if by_task else file.read(fetch(0))
            if n != EAGAIN:
                if n > 0 and WATCHES:
                    accessed(file)
                return n
    finally:
        file.put()


# -- write -----------------------------------------------------------------------------------------------------------
@syscall(1)
def write(task: Task, fd: Fd, buf: UserPtr, count: Size) -> Any:
    """write(2)."""
    file = task.files.files.get(fd)
    if file is None or not (file.flags + 1) & 2 or file.flags & NOT_WRITTEN or not 0 < count <= BIG \
            or (file.seekable and task.process.rlimits[RLIMIT_FSIZE][0] != RLIM_INFINITY):  # fmt: skip
        return _write_slow(task, writable(file), buf, count)
    try:
        n = file.write(task.mm.views(buf, count, False))
    except Errno as error:
        return write_failed(task, error)
    if n == count:
        if WATCHES:
            modified(file)
        return n
    return _write_rest(task, file, lambda done: task.mm.views(buf + done, count - done, False), count, n)


def _write_slow(task: Task, file: File, buf: int, count: int) -> Any:
    """Empty and huge writes, limits, and files that want to know who writes."""
    check_range(buf, count)
    count = min(count, MAX_RW_COUNT)
    if count and file.seekable:
        count = limit_size(task, file, file.inode.size if file.flags & O_APPEND else file.pos, count)
        if count > LONG and not file.flags & TASK_IO:
            return _write_long(task, file, count, lambda done, n: file.write(task.mm.views(buf + done, n, False)))
    return write_views(
        task, file, lambda done: task.mm.views(buf + done, count - done, False) if count else [], count
    )


def _write_long(task: Task, file: File, count: int, piece: Callable[[int, int], int]) -> Any:
    """A long write to a file."""
    try:
        result = _in_pieces(task, file, count, piece)
    except Errno as error:
        return write_failed(task, error)
    if WATCHES:
        modified(file)
    return result


def write_views(task: Task, file: File, fetch: Fetch, count: int, wait: bool = True) -> Any:
    """Write the `count` bytes that `fetch` gives, sleeping when there is no room (unless O_NONBLOCK or not `wait`)."""
    views = fetch(0)
    try:
        n = file.write_by(task, views) if file.flags & TASK_IO else file.write(views)
    except Errno as error:
        return write_failed(task, error)
    if n.__class__ is not int:
        return n
    if n == count and n:
        if WATCHES:
            modified(file)
        return n
    return _write_rest(task, file, fetch, count, n, wait)


def _write_rest(task: Task, file: File, fetch: Fetch, count: int, n: int, wait: bool = True) -> Any:
    """A write gave `n`, which is not all: an error, an answer, or a reason to sleep."""
    if n < 0 and n != EAGAIN:
        if n == EPIPE:
            broken_pipe(task)
        return n
    if n > 0 and WATCHES:
        modified(file)
    if not wait or file.flags & O_NONBLOCK or file.queue is None or not count or (n >= 0 and not file.write_all):
        return n
    return _write_wait(task, file, fetch, count, n)


async def _write_wait(task: Task, file: File, fetch: Fetch, count: int, n: int) -> int:
    """Go on with a blocking write of which `n` bytes are done (or EAGAIN: none) until all of it is."""
    file.refs += 1
    done = max(n, 0)
    try:
        by_task = file.flags & TASK_IO
        queue = file.queue_by(task) if by_task else file.queue
        assert queue is not None
        deadline, restart = _patience(task, file.write_timeout)
        while True:
            if n == EAGAIN and not await park(
                task, "write", queue, mask=WRITE_EVENTS, deadline=deadline, restart=restart
            ):
                return done or EAGAIN
            views = fetch(done)
            n = file.write_by(task, views) if by_task else file.write(views)
            if n == EAGAIN:
                continue
            if n < 0:
                if n == EPIPE:
                    broken_pipe(task)
                return done or n
            done += n
            if WATCHES:
                modified(file)
            if n == 0 or done >= count or not file.write_all:
                return done
    except Errno as error:
        if error.errno == errno.EPIPE:
            broken_pipe(task)
        if done:
            return done
        raise
    finally:
        file.put()


def write_failed(task: Task, error: Errno) -> int:
    """A write raised `error`."""
    if error.errno == errno.EPIPE:
        broken_pipe(task)
    return -error.errno


def broken_pipe(task: Task) -> None:
    """SIGPIPE for the writer; the call returns EPIPE (pipe(7))."""
    from kvmsentry.kernel import signals

    signals.send_task(task, SigInfo(SIGPIPE, 0, pid=task.process.pid, uid=task.creds.uid))


def limit_size(task: Task, file: File, pos: int, count: int) -> int:
    """How much of a write of `count` at `pos` RLIMIT_FSIZE allows; SIGXFSZ and EFBIG for none
    (generic_write_check_limits)."""
    limit = task.process.rlimits[RLIMIT_FSIZE][0]
    if limit == RLIM_INFINITY or file.inode.mode & 0o170000 != 0o100000:
        return count
    if pos >= limit:
        from kvmsentry.kernel import signals

        signals.send_task(task, SigInfo(SIGXFSZ, 0, pid=task.process.pid, uid=task.creds.uid))
        raise Errno(errno.EFBIG)
    return min(count, limit - pos)


def readable(file: File | None) -> File:
    """`file`, if it is open for reading; EBADF."""
    if file is None or file.flags & (O_PATH | O_WRONLY):
        raise Errno(errno.EBADF)
    return file


def writable(file: File | None) -> File:
    """`file`, if it is open for writing; EBADF."""
    if file is None or file.flags & O_PATH or not (file.flags + 1) & 2:
        raise Errno(errno.EBADF)
    return file


def check_range(buf: int, count: int) -> None:
    """EFAULT when the buffer leaves user space (access_ok)."""
    if buf + count > USER_TOP:
        raise Errno(errno.EFAULT)


# -- at a position ---------------------------------------------------------------------------------------------------
@syscall(17)
def pread64(task: Task, fd: Fd, buf: UserPtr, count: Size, pos: Offset) -> Any:
    """pread(2)."""
    if pos < 0:
        raise Errno(errno.EINVAL)
    file = readable(positioned(task.files.files.get(fd)))
    if not 0 < count <= BIG:
        check_range(buf, count)
        count = min(count, MAX_RW_COUNT)
        if count:
            return _in_pieces(
                task, file, count, lambda done, n: file.pread(task.mm.views(buf + done, n, True), pos + done)
            )
        return file.pread([], pos)
    n = file.pread(task.mm.views(buf, count, True), pos)
    if not n and pos + count > SSIZE_MAX:
        raise Errno(errno.EINVAL)  # rw_verify_area
    if n > 0 and WATCHES:
        accessed(file)
    return n


@syscall(18)
def pwrite64(task: Task, fd: Fd, buf: UserPtr, count: Size, pos: Offset) -> Any:
    """pwrite(2); with O_APPEND it appends, as on Linux."""
    if pos < 0:
        raise Errno(errno.EINVAL)
    file = writable(positioned(task.files.files.get(fd)))
    check_range(buf, count)
    if pos + count > SSIZE_MAX:
        raise Errno(errno.EINVAL)  # rw_verify_area
    count = min(count, MAX_RW_COUNT)
    if file.flags & O_APPEND and file.seekable:
        pos = file.inode.size
    if count and task.process.rlimits[RLIMIT_FSIZE][0] != RLIM_INFINITY:
        count = limit_size(task, file, pos, count)
    if count > LONG:
        return _write_long(
            task, file, count, lambda done, n: file.pwrite(task.mm.views(buf + done, n, False), pos + done)
        )
    n = file.pwrite(task.mm.views(buf, count, False) if count else [], pos)
    if n > 0 and WATCHES:
        modified(file)
    return n


def positioned(file: File | None) -> File | None:
    """`file`, unless reads and writes at a position mean nothing to it: ESPIPE, whatever it is open for
    (FMODE_PREAD comes before FMODE_READ in ksys_pread64)."""
    if file is not None and not file.seekable and type(file).pread is File.pread and type(file).pwrite is File.pwrite:
        if not file.flags & O_PATH:
            raise Errno(errno.ESPIPE)
    return file


# -- vectors ---------------------------------------------------------------------------------------------------------
def fetch_iov(task: Task, vec: int, count: int) -> tuple[list[tuple[int, int]], int]:
    """The array of struct iovec at `vec` as (base, length) pairs, and their total, cut at MAX_RW_COUNT; EINVAL for more
    than IOV_MAX entries or negative lengths, EFAULT (import_iovec in lib/iov_iter.c)."""
    if count > IOV_MAX:
        raise Errno(errno.EINVAL)
    if not count:
        return [], 0
    total = 0
    iov = []
    for base, length in _iovec.iter_unpack(task.mm.read(vec, 16 * count)):
        if length > SSIZE_MAX:
            raise Errno(errno.EINVAL)
        if length:
            if base + length > USER_TOP:
                raise Errno(errno.EFAULT)
            if length > MAX_RW_COUNT - total:
                length = MAX_RW_COUNT - total
                if not length:
                    continue
            total += length
            iov.append((base, length))
        elif base > USER_TOP:
            raise Errno(errno.EFAULT)
    return iov, total


def iov_views(task: Task, iov: list[tuple[int, int]], write: bool, skip: int = 0) -> list[memoryview]:
    """Views of the memory that `iov` describes beyond the first `skip` bytes; ends early at a bad page, EFAULT when the
    first is one."""
    out: list[memoryview] = []
    views = task.mm.views
    for base, length in iov:
        if skip >= length:
            skip -= length
            continue
        want = length - skip
        try:
            got = views(base + skip, want, write)
        except Errno:
            if out:
                break
            raise
        out += got
        skip = 0
        if len(got) == 1:
            if len(got[0]) != want:
                break
        elif sum(map(len, got)) != want:
            break
    return out


@syscall(19)
def readv(task: Task, fd: Fd, vec: UserPtr, count: Size) -> Any:
    """readv(2)."""
    file = readable(task.files.files.get(fd))
    iov, total = fetch_iov(task, vec, count)
    if not total:
        return 0
    return read_views(task, file, lambda done: iov_views(task, iov, True))


@syscall(20)
def writev(task: Task, fd: Fd, vec: UserPtr, count: Size) -> Any:
    """writev(2)."""
    file = writable(task.files.files.get(fd))
    iov, total = fetch_iov(task, vec, count)
    return _writev(task, file, iov, total)


def _writev(task: Task, file: File, iov: list[tuple[int, int]], total: int, wait: bool = True) -> Any:
    if not total:
        return 0
    if file.seekable:
        total = _cut(iov, limit_size(task, file, file.inode.size if file.flags & O_APPEND else file.pos, total))
    return write_views(task, file, lambda done: iov_views(task, iov, False, done), total, wait)


def _cut(iov: list[tuple[int, int]], total: int) -> int:
    """Shorten `iov` to `total` bytes."""
    left = total
    for index, (base, length) in enumerate(iov):
        if length > left:
            iov[index] = base, left
        left -= min(length, left)
    return total


@syscall(295)
def preadv(task: Task, fd: Fd, vec: UserPtr, count: Size, pos: Offset) -> Any:
    """preadv(2)."""
    return _preadv(task, fd, vec, count, pos, 0)


@syscall(327)
def preadv2(task: Task, fd: Fd, vec: UserPtr, count: Size, pos: Offset, high: Long, flags: UInt) -> Any:
    """preadv2(2): position -1 is the file's own."""
    if pos == -1:
        file = readable(task.files.files.get(fd))
        iov, total = fetch_iov(task, vec, count)
        if not total:
            return 0
        check_rwf(flags)
        return read_views(task, file, lambda done: iov_views(task, iov, True), not flags & RWF_NOWAIT)
    return _preadv(task, fd, vec, count, pos, flags)


def _preadv(task: Task, fd: int, vec: int, count: int, pos: int, flags: int) -> int:
    if pos < 0:
        raise Errno(errno.EINVAL)
    file = readable(positioned(task.files.files.get(fd)))
    iov, total = fetch_iov(task, vec, count)
    if not total:
        return 0
    check_rwf(flags)
    n = file.pread(iov_views(task, iov, True), pos)
    if n > 0 and WATCHES:
        accessed(file)
    return n


def check_rwf(flags: int) -> None:
    """EOPNOTSUPP for unknown RWF_* flags (kiocb_set_rw_flags)."""
    if flags & ~(RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_NOWAIT | RWF_APPEND | RWF_NOAPPEND):
        raise Errno(errno.EOPNOTSUPP)
    if flags & RWF_APPEND and flags & RWF_NOAPPEND:
        raise Errno(errno.EINVAL)


@syscall(296)
def pwritev(task: Task, fd: Fd, vec: UserPtr, count: Size, pos: Offset) -> Any:
    """pwritev(2)."""
    return _pwritev(task, fd, vec, count, pos, 0)


@syscall(328)
def pwritev2(task: Task, fd: Fd, vec: UserPtr, count: Size, pos: Offset, high: Long, flags: UInt) -> Any:
    """pwritev2(2): position -1 is the file's own."""
    if pos != -1:
        return _pwritev(task, fd, vec, count, pos, flags)
    file = writable(task.files.files.get(fd))
    iov, total = fetch_iov(task, vec, count)
    check_rwf(flags)
    if flags & RWF_APPEND and file.seekable:
        file.pos = file.inode.size
    result = _writev(task, file, iov, total, not flags & RWF_NOWAIT)
    if flags & (RWF_DSYNC | RWF_SYNC) and result.__class__ is int and result > 0:
        file.fsync()
    return result


def _pwritev(task: Task, fd: int, vec: int, count: int, pos: int, flags: int) -> int:
    if pos < 0:
        raise Errno(errno.EINVAL)
    file = writable(positioned(task.files.files.get(fd)))
    iov, total = fetch_iov(task, vec, count)
    if not total:
        return 0
    check_rwf(flags)
    if file.seekable and (flags & RWF_APPEND or (file.flags & O_APPEND and not flags & RWF_NOAPPEND)):
        pos = file.inode.size
    _cut(iov, limit_size(task, file, pos, total))
    n = file.pwrite(iov_views(task, iov, False), pos)
    if n > 0:
        if WATCHES:
            modified(file)
        if flags & (RWF_DSYNC | RWF_SYNC):
            file.fsync()
    return n


@syscall(8)
def lseek(task: Task, fd: Fd, offset: Offset, whence: UInt) -> int:
    """lseek(2)."""
    file = task.files.files.get(fd)
    if file is None or file.flags & O_PATH:
        return -errno.EBADF
    if whence > 4:
        return -errno.EINVAL
    return file.seek(offset, whence)


# -- descriptors -----------------------------------------------------------------------------------------------------
@syscall(3)
def close(task: Task, fd: Fd) -> int:
    """close(2)."""
    table = task.files
    table.drop(table.remove(fd))
    return 0


@syscall(436)
def close_range(task: Task, first: UInt, last: UInt, flags: UInt) -> int:
    """close_range(2): CLOSE_RANGE_UNSHARE 2, CLOSE_RANGE_CLOEXEC 4."""
    if flags & ~6 or first > last:
        raise Errno(errno.EINVAL)
    table = task.files
    if flags & 2 and table.users > 1:
        table.users -= 1
        table = task.files = table.copy()
    chosen = sorted(fd for fd in table.files if first <= fd <= last)
    if flags & 4:
        table.cloexec.update(chosen)
    else:
        for fd in chosen:
            table.drop(table.remove(fd))
    return 0


def install(task: Task, file: File, lowest: int = 0, cloexec: bool = False) -> int:
    """Give `file` a descriptor of `task`; on EMFILE the reference that the caller passed is put."""
    try:
        return task.files.install(file, task.process.rlimits[RLIMIT_NOFILE][0], lowest, cloexec)
    except Errno:
        file.put()
        raise


@syscall(32)
def dup(task: Task, fd: Fd) -> int:
    """dup(2)."""
    return install(task, task.files.get(fd).get())


@syscall(33)
def dup2(task: Task, old: Fd, new: UInt) -> int:
    """dup2(2)."""
    if old == new:
        task.files.get(old)
        return old
    return _dup3(task, old, new, False)


@syscall(292)
def dup3(task: Task, old: Fd, new: UInt, flags: UInt) -> int:
    """dup3(2)."""
    if flags & ~O_CLOEXEC or old == new:
        raise Errno(errno.EINVAL)
    return _dup3(task, old, new, bool(flags))


def _dup3(task: Task, old: int, new: int, cloexec: bool) -> int:
    if new >= task.process.rlimits[RLIMIT_NOFILE][0] or new >= 1 << 31:
        raise Errno(errno.EBADF)
    task.files.replace(new, task.files.get(old).get(), cloexec)
    return new


@syscall(22)
def pipe(task: Task, fds: UserPtr) -> int:
    """pipe(2)."""
    return _pipe(task, fds, 0)


@syscall(293)
def pipe2(task: Task, fds: UserPtr, flags: UInt) -> int:
    """pipe2(2)."""
    if flags & ~(O_CLOEXEC | O_NONBLOCK | O_DIRECT):
        raise Errno(errno.EINVAL)
    return _pipe(task, fds, flags)


def _pipe(task: Task, fds: int, flags: int) -> int:
    reader, writer = new_pipe(task, flags)
    cloexec = bool(flags & O_CLOEXEC)
    table = task.files
    try:
        read_fd = install(task, reader, 0, cloexec)
    except Errno:
        writer.put()
        raise
    try:
        write_fd = install(task, writer, 0, cloexec)
    except Errno:
        table.remove(read_fd).put()
        raise
    try:
        task.mm.write(fds, _two_ints.pack(read_fd, write_fd))
    except Errno:
        table.remove(write_fd).put()
        table.remove(read_fd).put()
        raise
    return 0

