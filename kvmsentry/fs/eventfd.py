"""eventfd(2): a counter that is read and written as a file."""

from __future__ import annotations

import errno

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import AnonFile, gather, scatter
from kvmsentry.fs.vfs import POLLERR, POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM
from kvmsentry.kernel.traps import WaitQueue

FULL = (1 << 64) - 1  # ULLONG_MAX: never reached by a write


class EventFile(AnonFile):
    """An eventfd. With `semaphore`, a read takes one (EFD_SEMAPHORE)."""

    name = b"eventfd"

    def __init__(self, count: int, semaphore: bool, flags: int) -> None:
        super().__init__(flags)
        self.queue: WaitQueue = WaitQueue()
        self.count, self.semaphore = count, semaphore

    def read(self, views: list[memoryview]) -> int:
        """Eight bytes: the count, which becomes 0 (or 1, one less); -EAGAIN at 0, EINVAL for a short buffer."""
        if sum(map(len, views)) < 8:
            raise Errno(errno.EINVAL)
        count = self.count
        if not count:
            return -errno.EAGAIN
        taken = 1 if self.semaphore else count
        self.count = count - taken
        scatter(views, taken.to_bytes(8, "little"))
        if self.queue.waiters:
            self.queue.wake(POLLOUT | POLLWRNORM)
        return 8

    def write(self, views: list[memoryview]) -> int:
        """Adds eight bytes' worth; -EAGAIN when it would overflow, EINVAL for a short buffer or all ones."""
        data = gather(views, 8)
        if len(data) < 8:
            raise Errno(errno.EINVAL)
        value = int.from_bytes(data, "little")
        if value == FULL:
            raise Errno(errno.EINVAL)
        if self.count + value >= FULL:
            return -errno.EAGAIN
        self.count += value
        if value and self.queue.waiters:
            self.queue.wake(POLLIN | POLLRDNORM)
        return 8

    def signal(self, value: int = 1) -> None:
        """For the kernel's own use (AIO and the like): add, saturating."""
        self.count = min(FULL, self.count + value)
        self.queue.wake(POLLIN | POLLRDNORM)

    def poll(self) -> int:
        """POLLIN above 0, POLLOUT when 1 could be added, POLLERR at the overflow value."""
        count = self.count
        mask = POLLIN | POLLRDNORM if count else 0
        if count == FULL:
            mask |= POLLERR
        elif count < FULL - 1:
            mask |= POLLOUT | POLLWRNORM
        return mask

    def fdinfo(self) -> str:
        """The count, in hex."""
        return f"eventfd-count: {self.count:16x}\n"
