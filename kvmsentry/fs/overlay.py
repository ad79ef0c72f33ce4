"""The container's root: a read-only tree of the Gofer with everything that changes in guest memory above it
(overlayfs).

There are not two inodes for one file here. An `OverlayInode` is a tmpfs inode that may have a `lower`: a regular file
whose data is still the lower's until the first write (`store` is None), or a directory whose names come from below
unless `entries` says otherwise (None there is a whiteout). So attributes change without copying data, an inode keeps
its number when it is copied up, hard links stay together, a descriptor opened before a copy-up sees what is written
after it, and a directory that came from below is renamed like any other. In all of these Linux's overlayfs is laxer
than POSIX; we need not be.

Nothing is ever written to the lower tree, which must not change while it is used.
"""

from __future__ import annotations

import errno
import stat as st
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.filemap import GoferBacking
from kvmsentry.fs.goferfs import GoferInode, GoferSuper
from kvmsentry.fs.pages import PAGE, PageStore, Pool
from kvmsentry.fs.tmpfs import TmpFile, TmpInode, TmpSuper, default_inodes, label_of
from kvmsentry.fs.vfs import File, Inode, Path, SuperBlock

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

OVERLAYFS_SUPER_MAGIC = 0x794C7630  # uapi/linux/magic.h
_FIRST_INO = 1 << 40  # of inodes made here; the lower ones keep the host's numbers
_MISSING = object()


class OverlaySuper(TmpSuper):
    """`lower` with memory above it; `size` limits the memory in bytes, 0 = as the guest's RAM."""

    fstype = "overlay"
    magic = OVERLAYFS_SUPER_MAGIC
    dates_mappings = True

    def __init__(self, kernel: Kernel, lower: GoferSuper, size: int = 0) -> None:
        SuperBlock.__init__(self)
        assert lower.private, "an overlay's lower tree must not change"
        self.kernel, self.lower = kernel, lower
        self.pool = Pool(kernel.frames, kernel.memory, -(-size // PAGE))
        self.inode_limit, self.inodes = default_inodes(kernel), 0
        self._ino = _FIRST_INO
        self.linked: dict[GoferInode, OverlayInode] = {}  # lower files with several names, once they were seen
        self.root = OverlayInode(self, lower.root)

    def new_inode(self, mode: int, uid: int = 0, gid: int = 0) -> OverlayInode:
        """An inode with nothing below it."""
        self.charge()
        inode = OverlayInode.__new__(OverlayInode)
        TmpInode.__init__(inode, self, mode, uid, gid)
        inode.lower = inode.lower_paged = None
        inode.changed = False
        if inode.entries is not None:
            inode.size = PAGE
        return inode

    def wrap(self, lower: GoferInode) -> OverlayInode:
        """The inode that shows `lower`."""
        if lower.nlink > 1 and lower.mode & 0o170000 != st.S_IFDIR:
            inode = self.linked.get(lower)
            if inode is None:
                inode = self.linked[lower] = OverlayInode(self, lower)
            return inode
        return OverlayInode(self, lower)


class OverlayInode(TmpInode):
    """A file of the overlay. `changed`: `entries` holds more than lower names that were looked up."""

    __slots__ = ("lower", "lower_paged", "changed")

    sb: OverlaySuper
    lower: GoferInode | None
    lower_paged: weakref.ref[GoferBacking] | None

    def __init__(
        self, sb: OverlaySuper, lower: GoferInode
    ) -> None:  # no super(): every file that is looked at gets one
        self.sb, self.lower, self.lower_paged = sb, lower, None
        self.ino, self.mode, self.uid, self.gid, self.nlink = lower.ino, lower.mode, lower.uid, lower.gid, lower.nlink
        self.rdev, self.size = lower.rdev, lower.size
        self.atime, self.mtime, self.ctime, self.btime = lower.atime, lower.mtime, lower.ctime, lower.btime
        self.locks = self.watches = None
        self.writers = self.seals = self.links = 0
        self.entries = {} if lower.mode & 0o170000 == st.S_IFDIR else None
        self.store = self.xattrs = self.paged = None
        self.target = b""
        self.changed = False

    def __del__(self) -> None:
        if self.lower is not None:
            self.sb.inodes += 1  # was never charged: the image's own files do not count
        super().__del__()

    @property
    def blocks(self) -> int:
        """st_blocks."""
        if self.store is not None:
            return self.store.pages * 8
        return self.lower.host_blocks if self.lower is not None else 0

    # -- data
    def data(self) -> PageStore:
        """The pages, copied up now if they were not."""
        return self.store if self.store is not None else self.copy_up(self.size)

    def copy_up(self, size: int) -> PageStore:
        """Bring the first `size` bytes of the lower file into memory; ENOSPC, EIO."""
        lower = self.lower
        if lower is None or self.mode & 0o170000 != st.S_IFREG:
            raise Errno(errno.EINVAL)
        store = PageStore(self.sb.pool)
        pages = -(-size // PAGE)
        if pages > self.sb.pool.available() or store.ensure(0, pages, 0, size // PAGE) < pages:
            raise Errno(errno.ENOSPC)
        if size:
            file = lower.open(None, None, 0)  # type: ignore[arg-type]
            view, pos = self.sb.pool.view, 0
            for gpa, count in store.runs(0, pages):
                end = min(count * PAGE, size - pos)
                at = 0
                while at < end:
                    n = file.pread([view[gpa + at : gpa + end]], pos + at)
                    if n <= 0:
                        raise Errno(errno.EIO)  # shorter than it was: the lower tree changed, which it must not
                    at += n
                pos += end
        self.store = store
        return store

    def truncate(self, size: int) -> None:
        """truncate(2); what is cut off need not be copied up."""
        if self.store is None and self.mode & 0o170000 == st.S_IFREG:
            self.copy_up(min(size, self.size))
        super().truncate(size)

    # -- directories
    def names(self) -> dict[bytes, Any]:
        """The entries, for changing them."""
        if self.entries is None:
            raise Errno(errno.ENOTDIR)
        self.changed = True
        return self.entries

    def lookup(self, name: bytes) -> Inode:
        """The child; ENOENT, ENOTDIR."""
        entries = self.entries
        if entries is None:
            raise Errno(errno.ENOTDIR)
        inode = entries.get(name, _MISSING)
        if inode is _MISSING:
            if self.lower is None:
                raise Errno(errno.ENOENT)
            inode = entries[name] = self.sb.wrap(self.lower.lookup(name))  # type: ignore[arg-type]
        elif inode is None:
            raise Errno(errno.ENOENT)
        return inode

    def _changed(self, by: int) -> None:
        super()._changed(0)  # a directory's size says nothing here

    def _remove(self, name: bytes) -> None:
        names = self.names()
        lower = self.lower
        if lower is not None:
            try:
                lower.lookup(name)
            except Errno as error:
                if error.errno != errno.ENOENT:
                    raise
                names.pop(name, None)
            else:
                names[name] = None
        else:
            del names[name]
        self._changed(-1)

    def empty(self, inode: Inode) -> bool:
        """Has the directory `inode` no entry?"""
        return not any(True for _ in inode.readdir())

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """The lower names in their order, without those removed, then the new ones."""
        entries, lower = self.entries, self.lower
        if entries is None:
            raise Errno(errno.ENOTDIR)
        if lower is None:
            return [(name, inode.ino, inode.mode >> 12 & 15) for name, inode in entries.items() if inode is not None]
        below = lower.readdir()
        if not self.changed:
            return below
        merged = []
        rest = dict(entries)
        for entry in below:
            inode = rest.pop(entry[0], _MISSING)
            if inode is _MISSING:
                merged.append(entry)
            elif inode is not None:
                merged.append((entry[0], inode.ino, inode.mode >> 12 & 15))
        merged += [(name, inode.ino, inode.mode >> 12 & 15) for name, inode in rest.items() if inode is not None]
        return merged

    # -- the rest
    def readlink(self, task: Task | None = None) -> bytes:
        """The target."""
        if not self.target and self.lower is not None:
            self.target = self.lower.readlink(task)
        return super().readlink(task)

    def open(self, task: Task, path: Path, flags: int) -> Any:
        """An open file description."""
        if self.mode & 0o170000 == st.S_IFREG:
            return OverlayFile(self, path, flags)
        return Inode.open(self, task, path, flags)

    def attributes(self) -> dict[bytes, bytes]:
        """Extended attributes, for changing them."""
        if self.xattrs is None:
            lower = self.lower
            self.xattrs = {name: lower.getxattr(name) for name in lower.listxattr()} if lower is not None else {}
            self.sb.xattr_bytes += sum(len(name) + len(value) for name, value in self.xattrs.items())
        return self.xattrs

    def getxattr(self, name: bytes) -> bytes:
        """ENODATA."""
        if self.xattrs is None and self.lower is not None:
            return self.lower.getxattr(name)
        return super().getxattr(name)

    def listxattr(self) -> list[bytes]:
        """Names."""
        if self.xattrs is None and self.lower is not None:
            return self.lower.listxattr()
        return super().listxattr()


class OverlayFile(TmpFile):
    """An open regular file; `below` is the lower file while data is read from there."""

    __slots__ = ("below",)
    inode: OverlayInode

    def __init__(self, inode: OverlayInode, path: Path | None, flags: int) -> None:
        super().__init__(inode, path, flags)
        self.below: File | None = None

    def pread(self, views: list[memoryview], pos: int) -> int:
        """pread(2)."""
        inode = self.inode
        if inode.store is not None:
            return super().pread(views, pos)
        below = self.below
        if below is None:
            assert inode.lower is not None
            below = self.below = inode.lower.open(None, None, 0)  # type: ignore[arg-type]
        return below.pread(views, pos)

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2); a lower file counts as one piece of data."""
        if self.inode.store is None:
            return File.seek(self, offset, whence)
        return super().seek(offset, whence)

    def backing(self) -> Any:
        """What mmap(2) maps: the host's file as long as nobody here could write it, else memory."""
        inode = self.inode
        if inode.store is not None or self.writable:
            inode.data()
            return super().backing()
        self.accessed()
        backing = inode.lower_paged() if inode.lower_paged is not None else None
        if backing is None:
            assert inode.lower is not None
            backing = GoferBacking(
                inode.lower.file_map(), inode.sb.dev, inode.ino, label_of(inode.sb.kernel, self.path)
            )
            inode.lower_paged = weakref.ref(backing)
        return backing
