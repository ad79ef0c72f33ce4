"""epoll(7).

An item stands in the wait queue of the file it watches. When the file becomes ready, the item enters its epoll's ready
list, and one sleeper wakes; waiting costs what is ready, not what is watched. Whether an item on the list is ready
still is asked of the file when events are fetched (ep_send_events in fs/eventpoll.c).
"""

from __future__ import annotations

import errno
from collections import OrderedDict

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import AnonFile
from kvmsentry.fs.vfs import POLLERR, POLLHUP, POLLIN, POLLRDNORM, File
from kvmsentry.kernel.traps import WaitQueue

# uapi/linux/eventpoll.h
EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET = 1 << 28, 1 << 29, 1 << 30, 1 << 31
PRIVATE = EPOLLEXCLUSIVE | EPOLLWAKEUP | EPOLLONESHOT | EPOLLET
EXCLUSIVE_OK = 0x1 | 0x4 | POLLERR | POLLHUP | EPOLLWAKEUP | EPOLLET | EPOLLEXCLUSIVE
MAX_NESTS = 4  # EP_MAX_NESTS
MAX_ITEMS = 1 << 20  # /proc/sys/fs/epoll/max_user_watches, per epoll


class Item:
    """A file under watch. `events` are the POLL* bits that count (0 once a one-shot has fired), `mode` the EPOLL*
    bits."""

    __slots__ = ("epoll", "file", "fd", "events", "mode", "data")

    def __init__(self, epoll: EpollFile, file: File, fd: int, events: int, data: int) -> None:
        self.epoll, self.file, self.fd, self.data = epoll, file, fd, data
        self.set_events(events)

    def set_events(self, events: int) -> None:
        """Split what the application asks for; errors and hang-ups always count."""
        self.mode = events & PRIVATE
        self.events = (events & ~PRIVATE) | POLLERR | POLLHUP

    def notify(self, mask: int) -> bool:
        """The file has news; never takes it from others."""
        self.fire(mask)
        return False

    def fire(self, mask: int) -> bool:
        """The file has news. True when somebody woke."""
        if not mask & self.events:
            return False
        epoll = self.epoll
        epoll.ready[self] = None
        return epoll.wake()

    def ended(self, file: File) -> None:
        """The last descriptor of the file was closed."""
        self.epoll.drop(self)


class Herd:
    """The exclusive items on one file: they stand in its queue as one, and news goes to them in turn until somebody
    wakes (EPOLLEXCLUSIVE)."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: OrderedDict[Item, None] = OrderedDict()

    def notify(self, mask: int) -> bool:
        """The file has news."""
        for item in list(self.items):
            if item.fire(mask):
                self.items.move_to_end(item)
                break
        return False


class EpollFile(AnonFile):
    """An epoll instance. Those who poll it wait in `queue`, those in epoll_wait(2) in `sleepers`, who are woken one at
    a time."""

    name = b"eventpoll"

    def __init__(self, flags: int) -> None:
        super().__init__(flags)
        self.queue: WaitQueue = WaitQueue()
        self.sleepers = WaitQueue()
        self.items: dict[tuple[int, File], Item] = {}
        self.ready: OrderedDict[Item, None] = OrderedDict()
        self.parents: dict[Item, None] = {}  # items of other epolls that watch this one

    def wake(self) -> bool:
        """Something is ready. True when a sleeper woke."""
        woke = bool(self.sleepers.waiters) and self.sleepers.wake(POLLIN, 1) > 0
        if self.queue.waiters:
            self.queue.wake(POLLIN | POLLRDNORM)
        return woke

    # -- control ---------------------------------------------------------------------------------------------------
    def add(self, fd: int, file: File, events: int, data: int) -> None:
        """EPOLL_CTL_ADD: EEXIST, EPERM for files that are always ready, ELOOP, ENOSPC."""
        if (fd, file) in self.items:
            raise Errno(errno.EEXIST)
        if file.queue is None:
            raise Errno(errno.EPERM)
        if len(self.items) >= MAX_ITEMS:
            raise Errno(errno.ENOSPC)
        if isinstance(file, EpollFile) and (_reaches(file, self) or _below(file) + _above(self) > MAX_NESTS + 1):
            raise Errno(errno.ELOOP)
        item = Item(self, file, fd, events, data)
        self.items[fd, file] = item
        if item.mode & EPOLLEXCLUSIVE:
            herd = file.__dict__.get("herd")
            if herd is None:
                herd = file.__dict__["herd"] = Herd()
                file.queue.add(herd)
            herd.items[item] = None
        else:
            file.queue.add(item)
        if file.endings is None:
            file.endings = {}
        file.endings[item.ended] = None
        if isinstance(file, EpollFile):
            file.parents[item] = None
        self._check(item)

    def modify(self, fd: int, file: File, events: int, data: int) -> None:
        """EPOLL_CTL_MOD: ENOENT; EINVAL for exclusive items."""
        item = self.items.get((fd, file))
        if item is None:
            raise Errno(errno.ENOENT)
        if (item.mode | events) & EPOLLEXCLUSIVE:
            raise Errno(errno.EINVAL)
        item.set_events(events)
        item.data = data
        self._check(item)

    def delete(self, fd: int, file: File) -> None:
        """EPOLL_CTL_DEL: ENOENT."""
        item = self.items.get((fd, file))
        if item is None:
            raise Errno(errno.ENOENT)
        self.drop(item)

    def _check(self, item: Item) -> None:
        if item.file.poll() & item.events:
            self.ready[item] = None
            self.wake()

    def drop(self, item: Item) -> None:
        """Forget an item."""
        self.items.pop((item.fd, item.file), None)
        self.ready.pop(item, None)
        file = item.file
        herd = file.__dict__.get("herd") if item.mode & EPOLLEXCLUSIVE else None
        if herd is not None:
            herd.items.pop(item, None)
            if not herd.items and file.queue is not None:
                del file.__dict__["herd"]
                file.queue.remove(herd)
        elif file.queue is not None:
            file.queue.remove(item)
        if file.endings is not None:
            file.endings.pop(item.ended, None)
        if isinstance(file, EpollFile):
            file.parents.pop(item, None)

    # -- events ----------------------------------------------------------------------------------------------------
    def collect(self, limit: int) -> list[tuple[Item, int]]:
        """Up to `limit` items that are ready now, with their events. Level-triggered ones stay on the list, behind the
        others; one-shots are disarmed."""
        found: list[tuple[Item, int]] = []
        again: list[Item] = []
        ready = self.ready
        while ready and len(found) < limit:
            item, _ = ready.popitem(last=False)
            events = item.file.poll() & item.events
            if events:
                found.append((item, events))
                mode = item.mode
                if mode & EPOLLONESHOT:
                    item.events = 0
                elif not mode & EPOLLET:
                    again.append(item)
        for item in again:
            ready[item] = None
        if ready and self.sleepers.waiters:
            self.sleepers.wake(POLLIN, 1)  # there is more: the next one may look
        return found

    def put_back(self, found: list[tuple[Item, int]]) -> None:
        """Events that could not be delivered (EFAULT) are ready again."""
        for item, events in found:
            if item.mode & EPOLLONESHOT:
                item.events = events | POLLERR | POLLHUP
            self.ready[item] = None

    def poll(self) -> int:
        """POLLIN when an item is ready."""
        ready = self.ready
        while ready:
            item = next(iter(ready))
            if item.file.poll() & item.events:
                return POLLIN | POLLRDNORM
            del ready[item]
        return 0

    def read(self, views: list[memoryview]) -> int:
        """EINVAL: an epoll is not read."""
        raise Errno(errno.EINVAL)

    def write(self, views: list[memoryview]) -> int:
        """EINVAL."""
        raise Errno(errno.EINVAL)

    def release(self) -> None:
        """Nothing is watched any more."""
        for item in list(self.items.values()):
            self.drop(item)

    def fdinfo(self) -> str:
        """A line for each item."""
        return "".join(
            f"tfd: {item.fd:8d} events: {(item.events | item.mode):8x} data: {item.data:16x}  pos:{item.file.pos} "
            f"ino:{item.file.inode.ino:x} sdev:{item.file.inode.sb.dev:x}\n"
            for item in self.items.values()
        )


def _children(epoll: EpollFile) -> list[EpollFile]:
    return [item.file for item in epoll.items.values() if isinstance(item.file, EpollFile)]


def _reaches(start: EpollFile, target: EpollFile) -> bool:
    """Does `start` watch `target`, directly or not?"""
    seen: set[EpollFile] = set()
    stack = [start]
    while stack:
        epoll = stack.pop()
        if epoll is target:
            return True
        if epoll not in seen:
            seen.add(epoll)
            stack += _children(epoll)
    return False


def _below(epoll: EpollFile) -> int:
    """How many epolls the longest chain from `epoll` downwards has."""
    return 1 + max((_below(child) for child in _children(epoll)), default=0)


def _above(epoll: EpollFile) -> int:
    """How many epolls the longest chain from `epoll` upwards has."""
    return 1 + max((_above(item.epoll) for item in epoll.parents), default=0)
