"""inotify(7): marks on inodes, events in queues.

A mark hangs on the inode it watches (`inode.watches`) and in `vfs.WATCHES`, which is empty as long as nobody watches
anything: whoever has news tests that first. Events about a child go to the marks of its directory with the child's
name, and to the child's own marks without one (fsnotify_parent and fsnotify in fs/notify).
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import AnonFile
from kvmsentry.fs.fdtable import files_of
from kvmsentry.fs.vfs import POLLIN, POLLRDNORM, WATCHES, File, Inode, Path
from kvmsentry.kernel.traps import WaitQueue

if TYPE_CHECKING:
    from kvmsentry.fs.dnotify import Dnotify
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

# uapi/linux/inotify.h
IN_ACCESS, IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_CLOSE_NOWRITE, IN_OPEN = 1, 2, 4, 8, 16, 32
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 64, 128, 256, 512, 1024, 2048
IN_UNMOUNT, IN_Q_OVERFLOW, IN_IGNORED = 0x2000, 0x4000, 0x8000
IN_ONLYDIR, IN_DONT_FOLLOW, IN_EXCL_UNLINK, IN_MASK_CREATE, IN_MASK_ADD = 1 << 24, 1 << 25, 1 << 26, 1 << 28, 1 << 29
IN_ISDIR, IN_ONESHOT = 1 << 30, 1 << 31
DN_RENAMED = 0x10000000  # FS_RENAME of linux/fsnotify_backend.h: a rename within one directory, for dnotify only
IN_ALL_EVENTS = 0xFFF
ALWAYS = IN_UNMOUNT | IN_IGNORED  # told whether asked for or not

MAX_QUEUED = 16384  # /proc/sys/fs/inotify/max_queued_events
MAX_WATCHES = 65536  # max_user_watches
FIONREAD = 0x541B

_header = struct.Struct("<iIII")
_int = struct.Struct("<i")
_cookie = 0


class Mark:
    """One watch: an inode, which events of it, and whose."""

    __slots__ = ("owner", "wd", "inode", "mask")

    def __init__(self, owner: InotifyFile | Dnotify, wd: int, inode: Inode, mask: int) -> None:
        self.owner, self.wd, self.inode, self.mask = owner, wd, inode, mask


class InotifyFile(AnonFile):
    """An inotify instance."""

    name = b"inotify"

    def __init__(self, flags: int) -> None:
        super().__init__(flags)
        self.queue: WaitQueue = WaitQueue()
        self.marks: dict[int, Mark] = {}
        self.events: deque[tuple[int, int, int, bytes]] = deque()  # wd, mask, cookie, name
        self.last_wd = 0

    def add_watch(self, inode: Inode, mask: int) -> int:
        """Watch `inode`, or change what is watched of it; the watch descriptor. EEXIST with IN_MASK_CREATE, ENOSPC."""
        for mark in inode.watches or ():
            if mark.owner is self:
                if mask & IN_MASK_CREATE:
                    raise Errno(errno.EEXIST)
                keep = mark.mask if mask & IN_MASK_ADD else 0
                mark.mask = keep | (mask & ~(IN_MASK_ADD | IN_MASK_CREATE))
                return mark.wd
        if len(WATCHES) >= MAX_WATCHES:
            raise Errno(errno.ENOSPC)
        self.last_wd += 1
        mark = Mark(self, self.last_wd, inode, mask & ~(IN_MASK_ADD | IN_MASK_CREATE))
        self.marks[mark.wd] = mark
        WATCHES[mark] = None
        if inode.watches is None:
            inode.watches = {}
        inode.watches[mark] = None
        return mark.wd

    def remove_watch(self, wd: int) -> None:
        """inotify_rm_watch(2): EINVAL for a number that is none."""
        mark = self.marks.get(wd)
        if mark is None:
            raise Errno(errno.EINVAL)
        drop(mark)
        self.post(wd, IN_IGNORED, 0, b"")

    def post(self, wd: int, mask: int, cookie: int, name: bytes) -> None:
        """Queue an event; one that repeats the last is dropped, and too many become an overflow."""
        events = self.events
        event = (wd, mask, cookie, name)
        if events and events[-1] == event:
            return
        if len(events) >= MAX_QUEUED:
            event = (-1, IN_Q_OVERFLOW, 0, b"")
            if events[-1] == event:
                return
        events.append(event)
        self.queue.wake(POLLIN | POLLRDNORM)

    def read(self, views: list[memoryview]) -> int:
        """As many whole events as fit; EINVAL when not even the first does."""
        events = self.events
        if not events:
            return -errno.EAGAIN
        room = sum(map(len, views))
        out = bytearray()
        while events:
            wd, mask, cookie, name = events[0]
            padded = -(-(len(name) + 1) // 16) * 16 if name else 0
            if len(out) + 16 + padded > room:
                break
            events.popleft()
            out += _header.pack(wd, mask, cookie, padded) + name.ljust(padded, b"\0")
        if not out:
            raise Errno(errno.EINVAL)
        at = 0
        for view in views:
            n = min(len(view), len(out) - at)
            view[:n] = out[at : at + n]
            at += n
        return len(out)

    def poll(self) -> int:
        """POLLIN when there are events."""
        return POLLIN | POLLRDNORM if self.events else 0

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """FIONREAD."""
        if request != FIONREAD:
            raise Errno(errno.ENOTTY)
        size = sum(16 + (-(-(len(event[3]) + 1) // 16) * 16 if event[3] else 0) for event in self.events)
        task.mm.write(argument, _int.pack(size))
        return 0

    def release(self) -> None:
        """All marks go."""
        for mark in list(self.marks.values()):
            drop(mark)

    def label(self) -> bytes:
        """Without brackets, as Linux names it."""
        return b"anon_inode:inotify"

    def fdinfo(self) -> str:
        """A line for each mark."""
        return "".join(
            f"inotify wd:{mark.wd:x} ino:{mark.inode.ino:x} sdev:{mark.inode.sb.dev:x} "
            f"mask:{mark.mask & (IN_ALL_EVENTS | IN_EXCL_UNLINK | IN_ONESHOT):x} ignored_mask:0\n"
            for mark in self.marks.values()
        )


def drop(mark: Mark) -> None:
    """Take `mark` off its inode; no error when it is gone."""
    mark.owner.marks.pop(mark.wd, None)
    WATCHES.pop(mark, None)
    watches = mark.inode.watches
    if watches is not None:
        watches.pop(mark, None)
        if not watches:
            mark.inode.watches = None


def new_cookie() -> int:
    """A number that joins the two halves of a rename."""
    global _cookie
    _cookie = (_cookie + 1) & 0xFFFFFFFF
    return _cookie


def notify(inode: Inode, mask: int, name: bytes = b"", cookie: int = 0) -> None:
    """Tell the marks on `inode` of the events `mask` (with IN_ISDIR where the subject is a directory); `name` is the
    child's when `inode` is its directory. Callers test `inode.watches` (or vfs.WATCHES) first. IN_DELETE_SELF and
    IN_UNMOUNT end the marks."""
    events = mask & ~IN_ISDIR
    for mark in list(inode.watches or ()):
        wanted = mark.mask & events
        if not wanted and not events & ALWAYS:
            continue
        mark.owner.post(mark.wd, (wanted | (events & ALWAYS)) | (mask & IN_ISDIR), cookie, name)
        if mark.mask & IN_ONESHOT:
            drop(mark)
            mark.owner.post(mark.wd, IN_IGNORED, 0, b"")
    if events & (IN_DELETE_SELF | IN_UNMOUNT):
        for mark in list(inode.watches or ()):
            drop(mark)
            mark.owner.post(mark.wd, IN_IGNORED, 0, b"")


def notify_place(place: Path | None, inode: Inode, mask: int) -> None:
    """Tell of an event that concerns a file found at `place`: its directory's marks, with the name, and its own."""
    if inode.mode & 0o170000 == 0o040000:
        mask |= IN_ISDIR
    if place is not None:
        dentry = place.dentry
        parent = dentry.parent.inode
        if dentry.parent is not dentry and parent is not None and parent.watches:
            if not dentry.unlinked or any(not mark.mask & IN_EXCL_UNLINK for mark in parent.watches):
                notify(parent, mask, dentry.name)
    if inode.watches:
        notify(inode, mask)


def accessed(file: File) -> None:
    """Something was read from `file`."""
    notify_place(file.path, file.inode, IN_ACCESS)


def modified(file: File) -> None:
    """Something was written to `file`, or its size changed."""
    notify_place(file.path, file.inode, IN_MODIFY)


def opened(file: File) -> None:
    """`file` was opened."""
    notify_place(file.path, file.inode, IN_OPEN)


def closed(file: File) -> None:
    """The last descriptor of `file` is gone (called by File.put)."""
    inode = file.inode
    notify_place(file.path, inode, IN_CLOSE_WRITE if (file.flags + 1) & 2 else IN_CLOSE_NOWRITE)
    if inode.watches and (kernel := inode.__dict__.get("orphan_of")) is not None:
        orphaned(kernel, inode)


def orphaned(kernel: Kernel, inode: Inode) -> None:
    """The last name of a watched `inode` is gone: IN_DELETE_SELF, but not before the last descriptor of it is gone too
    (the inode's eviction, fsnotify_inoderemove); `closed` asks again then."""
    if any(files_of(kernel, inode)):
        inode.__dict__["orphan_of"] = kernel
        return
    inode.__dict__.pop("orphan_of", None)
    notify(inode, IN_DELETE_SELF)


def executed(file: File) -> None:
    """A program is about to run from `file`: it was opened and looked into."""
    notify_place(file.path, file.inode, IN_OPEN)
    notify_place(file.path, file.inode, IN_ACCESS)
