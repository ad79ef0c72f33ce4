"""Files without a name: the inodes behind pipes, eventfds, epolls, and small helpers for their reads and writes.

Linux gives each pipe an inode of its own on `pipefs`, and all of eventfd, epoll, timerfd, signalfd, inotify, pidfd one
shared inode on `anon_inodefs` (fs/anon_inodes.c). What /proc/PID/fd/N shows for them is `File.label()`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import O_RDWR, Dentry, File, Inode, Mount, Path, SuperBlock

if TYPE_CHECKING:
    from collections.abc import Sequence


class AnonFs(SuperBlock):
    """anon_inodefs: one inode for all."""

    magic = 0x09041934  # ANON_INODE_FS_MAGIC, uapi/linux/magic.h
    fstype = "anon_inodefs"

    def __init__(self) -> None:
        super().__init__()
        self.root = Inode(self, 0o600)  # no file type: stat(2) shows none


class PipeFs(SuperBlock):
    """pipefs: an inode for each pipe."""

    magic = 0x50495045  # PIPEFS_MAGIC
    fstype = "pipefs"

    def __init__(self) -> None:
        super().__init__()
        self.root = Inode(self, 0o040755)


_anon = AnonFs()
_pipefs = PipeFs()


def anon_inode() -> Inode:
    """The inode that all anonymous files share."""
    return _anon.root


def pipefs() -> PipeFs:
    """The file system of pipes."""
    return _pipefs


class AnonFile(File):
    """A file on anon_inodefs; `name` is what stands between the brackets of `anon_inode:[eventfd]`."""

    name = b""
    splices = False

    def __init__(self, flags: int = O_RDWR) -> None:
        File.__init__(self, _anon.root, None, flags)

    def label(self) -> bytes:
        """What readlink(2) of /proc/PID/fd/N gives."""
        return b"anon_inode:[" + self.name + b"]"

    def seek(self, offset: int, whence: int) -> int:
        """Nothing happens (noop_llseek)."""
        return self.pos

    def fsync(self) -> None:
        """EINVAL, as for everything that has no storage."""
        raise Errno(errno.EINVAL)


def place_of(file: File) -> Path:
    """A place for a file that has none, so that magic links (/proc/PID/fd/N) can lead to its inode: a detached mount
    whose root is the file. Made when asked for and kept with the file."""
    place = file.path
    if place is None:
        dentry = Dentry(b"", None, file.inode)
        place = file.path = Path(Mount(file.inode.sb, dentry), dentry)
    return place


def gather(views: Sequence[memoryview], length: int) -> bytes:
    """The first `length` bytes of `views`; fewer when there are fewer."""
    if views and len(views[0]) >= length:
        return bytes(views[0][:length])
    data = bytearray()
    for view in views:
        data += view[: length - len(data)]
        if len(data) >= length:
            break
    return bytes(data)


def scatter(views: Sequence[memoryview], data: bytes | bytearray | memoryview) -> int:
    """Store `data` into `views` in order; how many bytes fitted."""
    length = len(data)
    if views and len(views[0]) >= length:
        views[0][:length] = data
        return length
    done = 0
    source = memoryview(data)
    for view in views:
        n = min(len(view), length - done)
        view[:n] = source[done : done + n]
        done += n
        if done == length:
            break
    return done
