"""Asynchronous I/O contexts (io_setup(2), fs/aio.c): the ring of events and what is under way.

The ring is a shared mapping in the application's memory, whose address is the context's id. Programs may take events
out of it themselves, moving `head`; so `head` is read there each time and believed only within bounds, while `tail`
and the events are kept by us. Reads and writes are done by the time io_submit returns; what stays under way are polls.

    +0 id  +4 nr  +8 head  +12 tail  +16 magic  +20 compat  +24 incompat  +28 header length  +32 events, 32 bytes each
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.eventfd import EventFile
from kvmsentry.fs.tmpfs import TmpFile, memory_file
from kvmsentry.fs.vfs import O_RDWR, POLLERR, POLLHUP, TASK_IO, File
from kvmsentry.kernel.traps import WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

AIO_RING_MAGIC, COMPAT_FEATURES, HEADER = 0xA10A10A1, 1, 32  # fs/aio.c
EVENT = struct.Struct("<QQqq")  # struct io_event: data, obj, res, res2 (uapi/linux/aio_abi.h)
_HEADER = struct.Struct("<8I")
_word = struct.Struct("<I")
MAP_SHARED, PROT_READ, PROT_WRITE = 1, 1, 2
NR_MOST = 0x10000000 // EVENT.size


class Context:
    """One context. `nr` events have room in the ring, one less can be outstanding."""

    def __init__(self, task: Task, wanted: int) -> None:
        kernel = task.kernel
        self.kernel, self.wanted = kernel, wanted
        slots = max(wanted, 4 * len(kernel.all_cpus)) * 2 + 2
        size = HEADER + slots * EVENT.size + 4095 & -4096
        self.nr = (size - HEADER) // EVENT.size
        self.size = size
        self.file = TmpFile(memory_file(kernel, b"/[aio]"), None, O_RDWR)
        self.file.fallocate(0, 0, size)
        header = (0, self.nr, 0, 0, AIO_RING_MAGIC, COMPAT_FEATURES, 0, HEADER)
        self._store(0, _HEADER.pack(*header))
        self.tail = 0
        self.active: dict[PollRequest, None] = {}
        self.reserved = 0  # requests being submitted or under way
        self.completed = WaitQueue()
        self.dead = False
        self.id = task.mm.mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, self.file.backing(), 0)

    def _store(self, offset: int, data: bytes) -> None:
        self.file.pwrite([memoryview(data)], offset)

    def head(self) -> int:
        """Up to where events were taken, by io_getevents or by the application itself."""
        word = bytearray(4)
        self.file.pread([memoryview(word)], 8)
        return int(_word.unpack(word)[0]) % self.nr

    def waiting(self) -> int:
        """Events in the ring."""
        return (self.tail - self.head()) % self.nr

    def reserve(self) -> bool:
        """Is there room for the event of one request more? Then it is the request's."""
        if self.reserved + self.waiting() >= self.nr - 1:
            return False
        self.reserved += 1
        return True

    def complete(self, data: int, obj: int, result: int, eventfd: EventFile | None) -> None:
        """A request is done: its event goes into the ring (aio_complete)."""
        self.reserved -= 1
        if self.dead:
            return
        self._store(HEADER + self.tail * EVENT.size, EVENT.pack(data, obj, result, 0))
        self.tail = (self.tail + 1) % self.nr
        self._store(12, _word.pack(self.tail))
        if eventfd is not None:
            eventfd.signal()
        self.completed.wake()

    def take(self, most: int, mm: Any, address: int) -> int:
        """Up to `most` events out of the ring into user memory; how many (aio_read_events_ring). EFAULT leaves them in
        the ring."""
        head = self.head()
        count = min(most, (self.tail - head) % self.nr)
        if not count:
            return 0
        data = bytearray(count * EVENT.size)
        first = min(count, self.nr - head) * EVENT.size
        view = memoryview(data)
        self.file.pread([view[:first]], HEADER + head * EVENT.size)
        if first < len(data):
            self.file.pread([view[first:]], HEADER)
        mm.write(address, data)
        self._store(8, _word.pack((head + count) % self.nr))
        return count

    def kill(self) -> None:
        """io_destroy(2) and the end of the address space: what is under way is dropped, sleepers get EINVAL."""
        self.dead = True
        for request in list(self.active):
            request.finish(0)
        self.completed.wake()
        charge(self.kernel, -self.wanted)


def charge(kernel: Kernel, count: int) -> None:
    """fs.aio-nr changes by `count`; EAGAIN over fs.aio-max-nr."""
    from kvmsentry.fs.proc.sysctl import sysctl

    values = sysctl(kernel)
    number = values.number("fs/aio-nr") + count
    if count > 0 and number > values.number("fs/aio-max-nr"):
        raise Errno(errno.EAGAIN)
    values.values["fs/aio-nr"] = str(number)


class PollRequest:
    """IOCB_CMD_POLL: one event when `file` is ready, a waiter of its queue until then (aio_poll)."""

    __slots__ = ("context", "task", "file", "events", "data", "obj", "eventfd", "queue")

    def __init__(
        self, context: Context, task: Task, file: File, events: int, data: int, obj: int, eventfd: EventFile | None
    ) -> None:
        self.context, self.task, self.file = context, task, file
        self.events = events | POLLERR | POLLHUP
        self.data, self.obj, self.eventfd = data, obj, eventfd
        self.queue = file.queue_by(task) if file.flags & TASK_IO else file.queue

    def start(self) -> None:
        """Complete now or wait; EINVAL where nothing ever tells that it is time (a file without poll)."""
        file, queue = self.file, self.queue
        file.get()
        if self.eventfd is not None:
            self.eventfd.get()
        self.context.active[self] = None
        if self.notify(self.events):
            return
        if queue is None:
            del self.context.active[self]
            if self.eventfd is not None:
                self.eventfd.put()
            file.put()
            raise Errno(errno.EINVAL)
        queue.add(self)

    def notify(self, mask: int) -> bool:
        """The queue was woken."""
        if self not in self.context.active:
            return False
        file = self.file
        ready = (file.poll_by(self.task) if file.flags & TASK_IO else file.poll()) & self.events
        if not ready:
            return False
        self.finish(ready)
        return True

    def finish(self, result: int) -> None:
        """Its event, and it is gone."""
        self.context.active.pop(self, None)
        if self.queue is not None:
            self.queue.remove(self)
        self.context.complete(self.data, self.obj, result, self.eventfd)
        if self.eventfd is not None:
            self.eventfd.put()
        self.file.put()


def contexts(mm: Any) -> dict[int, Context]:
    """The contexts of an address space, by id."""
    if mm.aio is None:
        mm.aio = {}
    found: dict[int, Context] = mm.aio
    return found


def end_space(mm: Any) -> None:
    """The last user leaves the address space (exit_aio)."""
    found, mm.aio = mm.aio, None
    for context in found.values():
        context.kill()
