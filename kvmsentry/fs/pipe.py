"""Pipes and FIFOs: pipe(7), fifo(7).

A pipe is a ring of bytes, so that any read and any write is at most two copies; both ends and everybody who waits share
one queue and tell their interests apart by the mask. Where Linux counts pages, we count bytes: a pipe is writable when
PIPE_BUF bytes are free, which is also what makes writes up to PIPE_BUF atomic. Packets (O_DIRECT) put a list of lengths
beside the ring.
"""

from __future__ import annotations

import errno
import struct
import time
from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs import ringbuffer
from kvmsentry.fs.anon import pipefs
from kvmsentry.fs.vfs import (
    O_ACCMODE,
    O_DIRECT,
    O_NONBLOCK,
    O_RDONLY,
    O_WRONLY,
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLOUT,
    POLLRDNORM,
    POLLWRNORM,
    File,
    Inode,
    Path,
)  # fmt: skip
from kvmsentry.kernel.traps import WaitQueue, park

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

PIPE_BUF = 4096  # uapi/linux/limits.h
DEFAULT_CAPACITY = 65536
MAX_CAPACITY = 1 << 20  # /proc/sys/fs/pipe-max-size; nobody in a sandbox may exceed it
SOFT_TOTAL = 64 << 20  # /proc/sys/fs/pipe-user-pages-soft: beyond it new pipes are small and old ones don't grow
S_IFIFO = 0o010000
FIONREAD = 0x541B  # uapi/asm-generic/ioctls.h

READABLE = POLLIN | POLLRDNORM
WRITABLE = POLLOUT | POLLWRNORM

_int = struct.Struct("<i")
_spare: list[memoryview] = []  # rings of dead pipes of the default size, warm in the cache
_total = 0  # bytes of capacity of all pipes


def make_ring(capacity: int) -> memoryview:
    """A buffer for a pipe, possibly one that was used before: what it holds is garbage."""
    if capacity == DEFAULT_CAPACITY and _spare:
        return _spare.pop()
    return memoryview(bytearray(capacity))


class Pipe:
    """The bytes on the way and who is at the ends. `used` bytes start at `head` of `ring`."""

    __slots__ = ("capacity", "ring", "head", "used", "readers", "writers", "reader_opens", "writer_opens", "queue",
                 "packets")  # fmt: skip

    def __init__(self) -> None:
        global _total
        self.capacity = DEFAULT_CAPACITY if _total < SOFT_TOTAL else PIPE_BUF
        _total += self.capacity
        self.ring: memoryview | None = None  # made by the first write
        self.head = self.used = 0
        self.readers = self.writers = 0
        self.reader_opens = self.writer_opens = 0  # how often an end was opened (FIFO rules)
        self.queue = WaitQueue()
        self.packets: deque[list[int]] | None = None  # [length, is packet] of successive runs while there are packets

    # -- data --------------------------------------------------------------------------------------------------------
    def read(self, views: list[memoryview]) -> int:
        """Take what there is, up to the size of `views`; 0 at the end of file, -EAGAIN when empty."""
        used = self.used
        if not used:
            return -errno.EAGAIN if self.writers and views else 0
        if self.packets is not None:
            return self._read_packets(views)
        ring = self.ring
        assert ring is not None
        done = ringbuffer.take(ring, self.head, views, used)
        free = self.capacity - used
        self._advance(done)
        if free < PIPE_BUF and self.queue.waiters and free + done >= PIPE_BUF:
            self.queue.wake(WRITABLE)
        return done

    def write(self, views: list[memoryview], packet: bool = False) -> int:
        """Put in what fits (all or nothing up to PIPE_BUF); -EPIPE without readers, -EAGAIN when there is no room."""
        if not self.readers:
            return -errno.EPIPE
        used, capacity = self.used, self.capacity
        total = len(views[0]) if len(views) == 1 else sum(map(len, views))
        free = capacity - used
        if total > free:
            if free < PIPE_BUF or total <= PIPE_BUF:
                return -errno.EAGAIN
            total = free
        if not total:
            return 0
        ring = self.ring
        if ring is None:
            ring = self.ring = make_ring(capacity)
        ringbuffer.put(ring, self.head + used, views, total)
        self.used = used + total
        if packet or self.packets is not None:
            self._mark(total, packet)
        if self.queue.waiters:
            self.queue.wake(READABLE)
        return total

    # -- packets -----------------------------------------------------------------------------------------------------
    def _mark(self, length: int, packet: bool) -> None:
        """`length` bytes were appended: remember where they end."""
        runs = self.packets
        if runs is None:
            runs = self.packets = deque()
            if self.used > length:
                runs.append([self.used - length, 0])
        if not packet and runs and not runs[-1][1]:
            runs[-1][0] += length
        elif not packet:
            runs.append([length, 0])
        else:
            while length > 0:
                runs.append([min(length, PIPE_BUF), 1])
                length -= PIPE_BUF

    def _read_packets(self, views: list[memoryview]) -> int:
        """Read up to the end of the first packet; what does not fit of a packet is lost (pipe2(2), O_DIRECT)."""
        runs, room, done, lost = self.packets, sum(map(len, views)), 0, 0
        assert runs is not None
        while runs and room > 0:
            length, packet = runs[0]
            n = min(length, room)
            done += n
            room -= n
            if packet:
                lost = length - n
                runs.popleft()
                break
            if n < length:
                runs[0][0] -= n
            else:
                runs.popleft()
        left = done
        for view in views:
            for piece in self.peek(min(len(view), left)):
                view[: len(piece)] = piece
                view = view[len(piece) :]
                left -= len(piece)
                self._advance(len(piece))
        self._advance(lost)
        if not runs:
            self.packets = None
        self.queue.wake(WRITABLE)
        return done

    # -- for splice(2): the bytes in place ---------------------------------------------------------------------------
    def peek(self, limit: int, skip: int = 0) -> list[memoryview]:
        """The next `limit` bytes after `skip` where they lie; they stay in the pipe."""
        limit = min(limit, self.used - skip)
        if limit <= 0:
            return []
        assert self.ring is not None
        start = self.head + skip
        if start >= self.capacity:
            start -= self.capacity
        end = start + limit
        if end <= self.capacity:
            return [self.ring[start:end]]
        return [self.ring[start:], self.ring[: end - self.capacity]]

    def consume(self, length: int) -> None:
        """Take `length` peeked bytes out."""
        free = self.capacity - self.used
        self._advance(length)
        runs = self.packets
        while runs and length:
            n = min(runs[0][0], length)
            runs[0][0] -= n
            length -= n
            if not runs[0][0]:
                runs.popleft()
        if runs is not None and not runs:
            self.packets = None
        if free < PIPE_BUF <= self.capacity - self.used:
            self.queue.wake(WRITABLE)

    def _advance(self, length: int) -> None:
        self.used -= length
        self.head = (self.head + length) % self.capacity if self.used else 0

    def space(self, limit: int) -> list[memoryview]:
        """Where the next `limit` bytes will lie, as far as there is room; fill it, then `commit`."""
        limit = min(limit, self.capacity - self.used)
        if limit <= 0:
            return []
        if self.ring is None:
            self.ring = make_ring(self.capacity)
        start = (self.head + self.used) % self.capacity
        end = start + limit
        if end <= self.capacity:
            return [self.ring[start:end]]
        return [self.ring[start:], self.ring[: end - self.capacity]]

    def commit(self, length: int) -> None:
        """`length` bytes were filled in."""
        if length > 0:
            self.used += length
            if self.packets is not None:
                self._mark(length, False)
            self.queue.wake(READABLE)

    # -- size --------------------------------------------------------------------------------------------------------
    def resize(self, size: int) -> int:
        """F_SETPIPE_SZ: the new capacity, a power of two of pages; EINVAL, EPERM over the limits, EBUSY when it would
        lose data."""
        global _total
        if size > 1 << 31:
            raise Errno(errno.EINVAL)
        capacity = PIPE_BUF if size <= PIPE_BUF else 1 << (size - 1).bit_length()
        if capacity > self.capacity and (capacity > MAX_CAPACITY or _total + capacity - self.capacity > SOFT_TOTAL):
            raise Errno(errno.EPERM)
        if capacity < self.used:
            raise Errno(errno.EBUSY)
        ring = None
        if self.used:
            ring = memoryview(bytearray(capacity))
            at = 0
            for piece in self.peek(self.used):
                ring[at : at + len(piece)] = piece
                at += len(piece)
        _total += capacity - self.capacity
        self.ring, self.head, self.capacity = ring, 0, capacity
        if capacity - self.used >= PIPE_BUF:
            self.queue.wake(WRITABLE)
        return capacity

    def free(self) -> None:
        """Both ends are gone: drop the bytes."""
        global _total
        if self.ring is not None and self.capacity == DEFAULT_CAPACITY and len(_spare) < 16:
            _spare.append(self.ring)
        _total -= self.capacity
        self.capacity = 0
        self.ring = self.packets = None
        self.head = self.used = 0


class PipeFile(File):
    """An end of a pipe; the access mode in `flags` says which."""

    write_all = True

    def __init__(self, pipe: Pipe, inode: Inode, path: Path | None, flags: int) -> None:
        File.__init__(self, inode, path, flags)
        self.pipe = pipe
        self.queue = pipe.queue
        self.quiet_opens = -1  # a FIFO opened with O_NONBLOCK before its writer: no POLLHUP until one came
        access = flags & O_ACCMODE
        if access != O_WRONLY:
            pipe.readers += 1
            pipe.reader_opens += 1
        if access != O_RDONLY:
            pipe.writers += 1
            pipe.writer_opens += 1
        self.read = pipe.read  # type: ignore[method-assign]  # straight to the ring: read(2) pays no method in between
        if not flags & O_DIRECT:
            self.write = pipe.write  # type: ignore[method-assign]

    def write(self, views: list[memoryview]) -> int:
        """A write in packet mode, as O_DIRECT may have been set or not by now."""
        return self.pipe.write(views, bool(self.flags & O_DIRECT))

    def flags_changed(self) -> None:
        """F_SETFL may have switched packet mode."""
        if self.flags & O_DIRECT:
            self.__dict__.pop("write", None)

    def poll(self) -> int:
        """POLLIN, POLLOUT; POLLHUP without writers, POLLERR without readers."""
        pipe, access, mask = self.pipe, self.flags & O_ACCMODE, 0
        if access != O_WRONLY:
            if pipe.used:
                mask = READABLE
            if not pipe.writers and self.quiet_opens != pipe.writer_opens:
                mask |= POLLHUP
        if access != O_RDONLY:
            if pipe.capacity - pipe.used >= PIPE_BUF:
                mask |= WRITABLE
            if not pipe.readers:
                mask |= POLLERR
        return mask

    def release(self) -> None:
        """An end is closed: the other one hears of it."""
        pipe, access = self.pipe, self.flags & O_ACCMODE
        if access != O_WRONLY:
            pipe.readers -= 1
            if not pipe.readers:
                pipe.queue.wake(WRITABLE | POLLERR)
        if access != O_RDONLY:
            pipe.writers -= 1
            if not pipe.writers:
                pipe.queue.wake(READABLE | POLLHUP)
        if not pipe.readers and not pipe.writers:
            pipe.free()
            self.inode.__dict__.pop("pipe", None)

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """FIONREAD: how many bytes are in the pipe."""
        if request == FIONREAD:
            task.mm.write(argument, _int.pack(self.pipe.used))
            return 0
        raise Errno(errno.ENOTTY)

    def fsync(self) -> None:
        """EINVAL: a pipe has no storage."""
        raise Errno(errno.EINVAL)


class UnnamedPipeFile(PipeFile):
    """An end of a pipe made by pipe(2)."""

    def label(self) -> bytes:
        """What /proc/PID/fd/N shows; FIFOs have a path instead."""
        return b"pipe:[%d]" % self.inode.ino


def new_pipe(task: Task, flags: int) -> tuple[PipeFile, PipeFile]:
    """The read end and the write end of a new pipe; flags: O_NONBLOCK, O_DIRECT."""
    creds = task.creds
    inode = Inode(pipefs(), S_IFIFO | 0o600, creds.fsuid, creds.fsgid)
    pipe = Pipe()
    inode.pipe = pipe  # type: ignore[attr-defined]
    reader = UnnamedPipeFile(pipe, inode, None, O_RDONLY | (flags & O_NONBLOCK))
    return reader, UnnamedPipeFile(pipe, inode, None, O_WRONLY | (flags & (O_NONBLOCK | O_DIRECT)))


def open_fifo(task: Task, inode: Inode, path: Path | None, flags: int) -> PipeFile | Coroutine[Any, Any, PipeFile]:
    """Open a FIFO: the file, or a coroutine that waits for the other end first; ENXIO for O_WRONLY | O_NONBLOCK without
    a reader; fifo(7). A pipe that is opened again, through /proc/PID/fd, waits for nobody (is_pipe in fifo_open)."""
    access = flags & O_ACCMODE
    if access == 3:
        raise Errno(errno.EINVAL)
    pipe: Pipe | None = inode.__dict__.get("pipe")
    if inode.sb is pipefs():
        if pipe is None:
            raise Errno(errno.ENXIO)  # its ends were closed while the path was walked
        return UnnamedPipeFile(pipe, inode, path, flags)
    if access == O_WRONLY and flags & O_NONBLOCK and (pipe is None or not pipe.readers):
        raise Errno(errno.ENXIO)
    if pipe is None:
        pipe = Pipe()
        inode.pipe = pipe  # type: ignore[attr-defined]
        inode.mtime = time.time_ns()
    file = PipeFile(pipe, inode, path, flags)
    pipe.queue.wake()  # whoever waits in open for this end
    if access == O_RDONLY and not pipe.writers:
        if flags & O_NONBLOCK:
            file.quiet_opens = pipe.writer_opens
            return file
        return _wait_for_partner(task, file)
    if access == O_WRONLY and not pipe.readers:
        return _wait_for_partner(task, file)
    return file


async def _wait_for_partner(task: Task, file: PipeFile) -> PipeFile:
    """Until the other end was opened, even if it is closed again by now (wait_for_partner in fs/pipe.c)."""
    pipe = file.pipe
    reading = file.flags & O_ACCMODE == O_RDONLY
    seen = pipe.writer_opens if reading else pipe.reader_opens
    try:
        while (pipe.writer_opens if reading else pipe.reader_opens) == seen:
            await park(task, "fifo open", pipe.queue)
    except Errno:
        file.put()
        raise
    return file

