"""timerfd_create(2): a timer whose expirations are read.

A periodic timer is armed anew when its expirations are read, not when it expires (as in fs/timerfd.c): an application
that asks for a nanosecond's period and never reads costs one callback.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import AnonFile, scatter
from kvmsentry.fs.vfs import POLLIN, POLLRDNORM
from kvmsentry.kernel.traps import Timer, WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

TFD_IOC_SET_TICKS = 0x40085400  # uapi/linux/timerfd.h
NS = 1_000_000_000

_u64 = struct.Struct("<Q")


class TimerFile(AnonFile):
    """A timerfd. `real`: its absolute times are times of day. All other times are ns of kernel.now()."""

    name = b"timerfd"

    def __init__(self, kernel: Kernel, clock: int, real: bool, flags: int) -> None:
        super().__init__(flags)
        self.kernel, self.clock, self.real = kernel, clock, real
        self.queue: WaitQueue = WaitQueue()
        self.deadline: int | None = None  # of the next expiration; None: disarmed
        self.interval = 0
        self.ticks = 0  # expirations not read
        self.expired = False  # the deadline has passed and the timer waits to be armed anew
        self.settime_flags = 0
        self._timer: Timer | None = None

    def _arm(self) -> None:
        assert self.deadline is not None
        self._timer = self.kernel.timers.at(self.deadline, self._due)

    def _due(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.expired = True
        self.ticks += 1
        self.queue.wake(POLLIN | POLLRDNORM)

    def _catch_up(self) -> None:
        """Count what has come due meanwhile."""
        if self.deadline is None:
            return
        now = self.kernel.now()
        if not self.expired and self.deadline <= now:
            self._due()  # the callback is on its way; the reader is faster

    def _forward(self) -> None:
        """A periodic timer that has expired: count the periods missed and arm it for the next."""
        if self.expired and self.interval and self.deadline is not None:
            periods = (self.kernel.now() - self.deadline) // self.interval + 1
            self.deadline += periods * self.interval
            self.ticks += periods - 1
            self.expired = False
            self._arm()

    def times(self) -> tuple[int, int]:
        """(interval, time left), ns; 0 left when disarmed."""
        self._catch_up()
        self._forward()
        if self.deadline is None or self.expired:
            return self.interval, 0
        return self.interval, max(1, self.deadline - self.kernel.now())

    def set(self, interval: int, value: int, absolute: bool, flags: int = 0) -> tuple[int, int]:
        """Arm it (value 0: disarm), return what `times` gave before; all in ns."""
        old = self.times()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.interval, self.ticks, self.expired, self.settime_flags = interval, 0, False, flags
        self.deadline = None
        if value:
            if absolute:
                self.deadline = value - self.kernel.monotonic_to_real() if self.real else value
            else:
                self.deadline = self.kernel.now() + value
            if self.deadline <= self.kernel.now():
                self._due()
            else:
                self._arm()
        return old

    def read(self, views: list[memoryview]) -> int:
        """Eight bytes: expirations since the last read; -EAGAIN when none, EINVAL for a short buffer."""
        if sum(map(len, views)) < 8:
            raise Errno(errno.EINVAL)
        self._catch_up()
        if not self.ticks:
            return -errno.EAGAIN
        self._forward()
        ticks, self.ticks = self.ticks, 0
        if not self.interval:
            self.expired = False
            self.deadline = None
        scatter(views, _u64.pack(ticks & (1 << 64) - 1))
        return 8

    def write(self, views: list[memoryview]) -> int:
        """EINVAL."""
        raise Errno(errno.EINVAL)

    def poll(self) -> int:
        """POLLIN when it has expired."""
        self._catch_up()
        return POLLIN | POLLRDNORM if self.ticks else 0

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """TFD_IOC_SET_TICKS, as checkpoint/restore uses it."""
        if request != TFD_IOC_SET_TICKS:
            raise Errno(errno.ENOTTY)
        ticks = _u64.unpack(task.mm.read(argument, 8))[0]
        if not ticks:
            raise Errno(errno.EINVAL)
        self.ticks = ticks
        self.queue.wake(POLLIN | POLLRDNORM)
        return 0

    def release(self) -> None:
        """The timer ends with the file."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def fdinfo(self) -> str:
        """As proc(5) shows it."""
        interval, left = self.times()
        return (
            f"clockid: {self.clock}\nticks: {self.ticks}\nsettime flags: 0{self.settime_flags:o}\n"
            f"it_value: ({left // NS}, {left % NS})\nit_interval: ({interval // NS}, {interval % NS})\n"
        )
