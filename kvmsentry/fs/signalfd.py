"""signalfd(2): signals taken by reading.

Whoever reads takes signals of its own, also through a descriptor it inherited: therefore the TASK_IO calls. Where
nobody is known to ask (epoll), the process that made the file is meant.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import AnonFile
from kvmsentry.fs.vfs import POLLIN, POLLRDNORM, TASK_IO
from kvmsentry.kernel.traps import WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.task import SigInfo, Task

# struct signalfd_siginfo, uapi/linux/signalfd.h: signo errno code pid uid fd tid band overrun trapno status int,
# ptr utime stime addr, addr_lsb, syscall, call_addr, arch
_info = struct.Struct("<IiiIIiIIIIii QQQQ H2xi QI 28x")
SIZE = 128
assert _info.size == SIZE


def pack(info: SigInfo) -> bytes:
    """A signal as signalfd tells of it."""
    field = info.fields.get
    value = field("value", 0)
    return _info.pack(
        info.signo,
        info.errno,
        info.code,
        field("pid", 0) & 0xFFFFFFFF,
        field("uid", 0) & 0xFFFFFFFF,
        field("fd", 0),
        field("timerid", 0) & 0xFFFFFFFF,
        field("band", 0) & 0xFFFFFFFF,
        field("overrun", 0) & 0xFFFFFFFF,
        field("trapno", 0) & 0xFFFFFFFF,
        (field("status", 0) & 0x7FFFFFFF) - (field("status", 0) & 0x80000000),
        (value & 0x7FFFFFFF) - (value & 0x80000000),
        value & (1 << 64) - 1,
        field("utime", 0),
        field("stime", 0),
        field("addr", 0) & (1 << 64) - 1,
        field("addr_lsb", 0),
        field("syscall", 0),
        field("call_addr", 0),
        field("arch", 0),
    )


class SignalFile(AnonFile):
    """A signalfd; `mask` says which signals it takes."""

    name = b"signalfd"

    def __init__(self, task: Task, mask: int, flags: int) -> None:
        super().__init__(flags | TASK_IO)
        self.mask = mask
        self.maker = task
        self.queue: WaitQueue = task.process.signal_events

    def read_by(self, task: Task, views: list[memoryview]) -> int:
        """As many signals as fit; -EAGAIN when none is pending, EINVAL for a buffer smaller than one."""
        from kvmsentry.kernel import signals

        room = sum(map(len, views)) // SIZE
        if not room:
            raise Errno(errno.EINVAL)
        out = bytearray()
        while len(out) < room * SIZE:
            info = signals.dequeue(task, self.mask)
            if info is None:
                break
            out += pack(info)
        if not out:
            return -errno.EAGAIN
        signals.recompute_all(task.process)
        done = 0
        for view in views:
            n = min(len(view), len(out) - done)
            view[:n] = out[done : done + n]
            done += n
        return len(out)

    def write_by(self, task: Task, views: list[memoryview]) -> int:
        """EINVAL."""
        raise Errno(errno.EINVAL)

    def poll_by(self, task: Task) -> int:
        """POLLIN when `task` has a signal that a read would take."""
        pending = task.pending.mask | task.process.pending.mask
        return POLLIN | POLLRDNORM if pending & self.mask else 0

    def poll(self) -> int:
        """For epoll: the maker's signals."""
        return self.poll_by(self.maker)

    def queue_by(self, task: Task) -> WaitQueue:
        """Where `task`'s signals are announced."""
        return task.process.signal_events

    def changed(self) -> None:
        """The mask is another: those who wait look again."""
        self.queue.wake(POLLIN | POLLRDNORM)

    def fdinfo(self) -> str:
        """The mask, in hex."""
        return f"sigmask:\t{self.mask:016x}\n"


