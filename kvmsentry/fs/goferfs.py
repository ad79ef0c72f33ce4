"""Host trees through the Gofer, as a file system: the container's root (below an overlay) and volumes.

A `private` tree is changed by nobody: attributes and names are believed once they were seen, a directory is read whole
(one round trip brings names and attributes) as soon as it is listed or looked into a few times, and its children need
no fid until they are opened. A shared one (a volume) is asked again each time.

Data never passes through 9P: an opened file is a descriptor of the host's file; we read and write it straight into
guest memory, and map it by giving it to GuestMemory.map_file. Descriptors and mappings are shared by all who use the
same inode and kept for the next one, in two least-recently-used lists.
"""

from __future__ import annotations

import errno
import os
import stat as st
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.filemap import FileMap, refused, windows_of
from kvmsentry.fs.vfs import O_ACCMODE, O_APPEND, File, Inode, Path, SuperBlock
from kvmsentry.gofer.p9 import WALK_MOST

if TYPE_CHECKING:
    from kvmsentry.gofer.client import Node
    from kvmsentry.gofer.p9 import Attr
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Credentials, Task

V9FS_MAGIC = 0x01021997  # uapi/linux/magic.h
IDLE_FDS = 256  # descriptors kept open though no file uses them
LISTING_LIMIT = 50_000  # entries of a directory that are kept in memory
LOOKUPS_BEFORE_LISTING = 3
READ_AHEAD = 240 << 10  # bytes of directories that come with one reply, at most
WALK_PAUSE = 50_000_000  # ns; directories read closer together than this are a walk
FRESH_NS = 100_000  # attributes this young were fetched by the same system call
IOV_MAX = 1024  # uapi/linux/uio.h UIO_MAXIOV
_NOTHING: dict[bytes, bytes] = {}
_XATTRS = (b"user.", b"security.capability")  # what the Gofer serves


class HostFd:
    """A descriptor of a host file; closed when nobody refers to it any more."""

    __slots__ = ("fd", "flags", "__weakref__")

    def __init__(self, fd: int, flags: int) -> None:
        self.fd, self.flags = fd, flags

    def __del__(self) -> None:
        os.close(self.fd)


class GoferSuper(SuperBlock):
    """One attached tree. `private`: nobody else changes it. `owners` (image store's sidecar map) says what the host's
    files cannot: called with the path from the root, it gives (mode, uid, gid) or None."""

    fstype = "9p"
    magic = V9FS_MAGIC

    def __init__(self, kernel: Kernel, node: Node, private: bool, readonly: bool = False, owners: Any = None) -> None:
        super().__init__()
        self.kernel, self.private, self.caching = kernel, private, private
        self.readonly = self.unchangeable = readonly
        self.owners = owners
        # Attributes that the host's file system refused to the image, by path.
        self.kept: dict[bytes, dict[bytes, bytes]] = getattr(owners, "xattrs", None) or {}
        self.walked = self.walked_at = 0  # directories read without a pause; when the last one was
        self.idle_fds: OrderedDict[GoferInode, None] = OrderedDict()
        self.windows = windows_of(kernel)
        self.known: weakref.WeakValueDictionary[tuple[int, int], GoferInode] = weakref.WeakValueDictionary()
        self.root: GoferInode = GoferInode(self, node.attr, None, b"")
        self.root.node = node
        self.known[(node.attr.dev, node.attr.ino)] = self.root

    def statfs(self) -> tuple[int, int, int, int, int, int]:
        """statfs(2) of the host's file system."""
        s = self.root.fid().statfs()
        return s.bsize, s.blocks, s.bfree, s.bavail, s.files, s.ffree

    def keep_fd(self, inode: GoferInode) -> None:
        """`inode.reader` was used: it is the last to be closed."""
        idle = self.idle_fds
        if inode in idle:
            idle.move_to_end(inode)
            return
        idle[inode] = None
        if len(idle) > IDLE_FDS:
            old, _ = idle.popitem(last=False)
            old.reader = None

    def release(self) -> None:
        """The last mount is gone."""
        super().release()
        for inode in self.idle_fds:
            inode.reader = None
        self.idle_fds.clear()


class GoferInode(Inode):
    """A file of a tree. `node` is its fid, got when it is first needed; until then (parent, name) lead to it."""

    __slots__ = ("node", "parent", "name", "listing", "order", "at", "lookups", "target", "reader", "writer", "map",
                 "seen", "host_blocks", "xattrs")  # fmt: skip

    sb: GoferSuper

    def __init__(
        self, sb: GoferSuper, attr: Attr, parent: GoferInode | None, name: bytes
    ) -> None:  # no super(): a listing makes many
        self.sb, self.parent, self.name = sb, parent, name
        self.node: Node | None = None
        self.listing: dict[bytes, Any] | None = None  # name to Attr, or to GoferInode once it was looked up
        self.order: list[bytes] | None = None  # names in `listing`, for a walk, which has come to index `at`
        self.lookups = self.at = 0
        self.target = b""
        self.reader: HostFd | None = None
        self.writer: weakref.ref[HostFd] | None = None
        self.map: FileMap | None = None
        self.xattrs: dict[bytes, bytes | None] | None = None
        self.locks = self.watches = None
        self.writers = 0
        self.take(attr)
        self.btime = self.ctime

    def take(self, attr: Attr) -> None:
        """Believe `attr`."""
        (dev, ino, self.mode, self.uid, self.gid, self.nlink, self.rdev, self.size, _, self.host_blocks,
         self.atime, self.mtime, self.ctime) = attr  # fmt: skip
        self.ino = ino ^ (dev << 48)
        if self.sb.owners is not None:
            entry = self.sb.owners(self.path())
            if entry is not None:
                mode, self.uid, self.gid = entry
                if mode is not None:
                    self.mode = self.mode & 0o170000 | mode & 0o7777
        self.seen = 0 if self.sb.private else time.monotonic_ns()

    def path(self) -> bytes:
        """The names from the tree's root."""
        names: list[bytes] = []
        inode = self
        while inode.parent is not None:
            names.append(inode.name)
            inode = inode.parent
        names.reverse()
        return b"/".join(names)

    def fid(self) -> Node:
        """The node; walked to when there is none yet, from the nearest ancestor that has one. ENOENT when it is
        gone."""
        node = self.node
        if node is not None:
            return node
        way: list[GoferInode] = []
        inode: GoferInode | None = self
        while inode is not None and inode.node is None:
            way.append(inode)
            inode = inode.parent
        assert inode is not None and inode.node is not None
        way.reverse()
        if len(way) == 1:
            node = inode.node.lookup(self.name)
            if node is None:
                raise Errno(errno.ENOENT)
            self._adopt(node)
            return node
        nodes, error = inode.node.walk([step.name for step in way])
        for step, found in zip(way, nodes, strict=False):
            step._adopt(found)
        if self.node is None:
            raise Errno(error or errno.ENOENT)
        return self.node

    def _adopt(self, node: Node) -> None:
        self.node = node
        if node.target:
            self.target = node.target

    # -- attributes
    @property
    def blocks(self) -> int:
        """st_blocks."""
        return self.host_blocks

    def refresh(self) -> None:
        """Ask again, where somebody else may have changed the file."""
        if self.seen and time.monotonic_ns() - self.seen > FRESH_NS:
            self.take(self.fid().getattr())

    def setattr(self, *, mode: int | None = None, uid: int | None = None, gid: int | None = None,
                atime: int | None = None, mtime: int | None = None) -> None:  # fmt: skip
        """Change attributes on the host."""
        if atime is not None and atime == mtime and abs(time.time_ns() - atime) < 1_000_000_000:
            atime = mtime = -1  # "now" is by the host's clock, and allowed to more
        self.take(self.fid().setattr(mode=mode, uid=uid, gid=gid, atime_ns=atime, mtime_ns=mtime))

    def truncate(self, size: int) -> None:
        """truncate(2)."""
        if self.mode & 0o170000 != st.S_IFREG:
            raise Errno(errno.EISDIR if st.S_ISDIR(self.mode) else errno.EINVAL)
        shrinks = size < self.size
        self.take(self.fid().setattr(size=size))
        if shrinks and self.map is not None:
            self.map.shrink(size)

    # -- directories
    def _child(self, name: bytes, attr: Attr) -> GoferInode:
        if attr.nlink > 1 and not st.S_ISDIR(attr.mode) or not self.sb.private:
            key = attr.dev, attr.ino
            inode = self.sb.known.get(key)
            if inode is not None and inode.mode & 0o170000 == attr.mode & 0o170000:
                inode.parent, inode.name = self, name
                inode.take(attr)
                return inode
            inode = GoferInode(self.sb, attr, self, name)
            self.sb.known[key] = inode
            return inode
        return GoferInode(self.sb, attr, self, name)

    def load(self) -> dict[bytes, Any] | None:
        """All names of a private directory; None when there are too many to keep."""
        listing = self.listing
        if listing is None and self.lookups >= 0:
            entries = self._read_ahead()
            if self.listing is not None:
                return self.listing
            if entries is None:
                entries = self.fid().readdir_attrs()
            if len(entries) > LISTING_LIMIT:
                self.lookups = -1
                return None
            listing = self.listing = dict(entries)
        return listing

    def _read_ahead(self) -> list[tuple[bytes, Attr]] | None:
        """The entries of this directory, asked for by the parent's fid so that it needs none of its own; with them come
        those of directories below and behind, the more of them the longer somebody has been walking the tree: he goes
        on to those next. None: it must be read by itself."""
        parent, sb = self.parent, self.sb
        if parent is None or parent.listing is None or parent.listing.get(self.name) is not self:
            return None
        now = time.monotonic_ns()
        sb.walked = sb.walked + 1 if now - sb.walked_at < WALK_PAUSE else 0
        sb.walked_at = now
        if sb.walked < 2:
            found = parent.fid().tree([self.name], READ_AHEAD, 0)
        else:
            names = [self.name, *parent.next_directories(self.name)]
            found = parent.fid().tree(names, min(4096 << sb.walked, READ_AHEAD), 8)
        if found is None:
            return None
        for path, entries in found[1:]:
            inode: Any = parent
            for name in path.split(b"/"):
                listing = inode.listing
                below = listing.get(name) if listing is not None else None
                if below is not None and below.__class__ is not GoferInode:
                    below = listing[name] = inode._child(name, below)
                if below is self and self.listing is None and found[0][1] is not None:
                    self.listing = dict(found[0][1])
                inode = below
                if inode is None:
                    break
            if inode is not None and entries is not None and inode.listing is None and inode.lookups >= 0:
                if len(entries) <= LISTING_LIMIT and inode.mode & 0o170000 == st.S_IFDIR:
                    inode.listing = dict(entries)
        return found[0][1]

    def next_directories(self, name: bytes) -> list[bytes]:
        """Up to WALK_MOST - 1 directories behind `name` in the listing that have none of their own yet: a walk comes to
        them next."""
        names: list[bytes] = []
        listing = self.listing
        if listing is None:
            return names
        order = self.order
        if order is None:
            order = self.order = list(listing)
            self.at = 0
        try:
            at = self.at = order.index(name, self.at)  # a walk goes on from where it was
        except ValueError:
            return names
        for other in islice(order, at + 1, None):
            entry = listing[other]
            if entry.__class__ is GoferInode:
                wanted = entry.listing is None and entry.lookups >= 0 and entry.mode & 0o170000 == st.S_IFDIR
            else:
                wanted = entry[2] & 0o170000 == st.S_IFDIR
            if wanted:
                names.append(other)
                if len(names) == WALK_MOST - 1:
                    break
        return names

    def lookup(self, name: bytes) -> Inode:
        """The child; ENOENT, ENOTDIR."""
        if self.mode & 0o170000 != st.S_IFDIR:
            raise Errno(errno.ENOTDIR)
        if not self.sb.private:
            node = self.fid().lookup(name)
            if node is None:
                raise Errno(errno.ENOENT)
            inode = self._child(name, node.attr)
            inode._adopt(node)
            return inode
        listing = self.listing
        if listing is None and self.lookups >= 0:
            self.lookups += 1
            if self.lookups > LOOKUPS_BEFORE_LISTING:
                listing = self.load()
        if listing is not None:
            found = listing.get(name)
            if found is None:
                raise Errno(errno.ENOENT)
            if found.__class__ is not GoferInode:
                found = listing[name] = self._child(name, found)
            return found
        node = self.fid().lookup(name)
        if node is None:
            raise Errno(errno.ENOENT)
        inode = self._child(name, node.attr)
        inode._adopt(node)
        return inode

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """(name, inode number, DT_*)."""
        if self.mode & 0o170000 != st.S_IFDIR:
            raise Errno(errno.ENOTDIR)
        if self.sb.private:
            listing = self.load()
            if listing is not None:
                return [
                    (name, e.ino, e.mode >> 12 & 15)
                    if e.__class__ is GoferInode
                    else (name, e[1] ^ e[0] << 48, e[2] >> 12 & 15)
                    for name, e in listing.items()
                ]
        return [(name, e[1] ^ e[0] << 48, e[2] >> 12 & 15) for name, e in self.fid().readdir_attrs()]

    def _changed(self) -> None:
        """An entry was made or removed: what is kept of this directory is no longer true."""
        self.listing = self.order = None
        self.lookups = 0
        self.seen = 1  # very old
        if self.sb.private:
            self.take(self.fid().getattr())

    def _made(self, name: bytes, node: Node) -> GoferInode:
        inode = self._child(name, node.attr)
        inode._adopt(node)
        self._changed()
        return inode

    def _gid(self, creds: Credentials) -> int:
        return self.gid if self.mode & st.S_ISGID else creds.fsgid

    def create(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """A new regular file; its descriptor is kept for the open that follows."""
        node, fd = self.fid().create(name, os.O_RDWR | os.O_EXCL, mode & 0o7777, self._gid(creds), creds.fsuid)
        inode = self._made(name, node)
        if fd is not None:
            handle = HostFd(fd, os.O_RDWR)
            inode.writer = weakref.ref(handle)
            inode.reader = handle  # holds it until the open that follows, and on as an idle one
            self.sb.keep_fd(inode)
        return inode

    def mkdir(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """A new directory."""
        if self.mode & st.S_ISGID:
            mode |= st.S_ISGID
        return self._made(name, self.fid().mkdir(name, mode & 0o7777, self._gid(creds), creds.fsuid))

    def mknod(self, name: bytes, mode: int, rdev: int, creds: Credentials) -> Inode:
        """A new FIFO or socket; EPERM for device nodes."""
        if mode & 0o170000 in (st.S_IFCHR, st.S_IFBLK):
            raise Errno(errno.EPERM)
        return self._made(name, self.fid().mknod(name, mode, self._gid(creds), creds.fsuid))

    def symlink(self, name: bytes, target: bytes, creds: Credentials) -> Inode:
        """A new symbolic link."""
        return self._made(name, self.fid().symlink(name, target, self._gid(creds), creds.fsuid))

    def link(self, name: bytes, inode: Inode) -> Inode:
        """A new name for `inode`."""
        assert isinstance(inode, GoferInode)
        inode.take(self.fid().link(name, inode.fid()))
        self._changed()
        return inode

    def unlink(self, name: bytes, inode: Inode) -> None:
        """Remove the name; the fid of a file that somebody has open is got first, so that it can still be asked."""
        assert isinstance(inode, GoferInode)
        node = inode.fid()
        self.fid().unlink(name)
        inode.nlink -= 1
        inode.seen = 0
        if inode.nlink > 0:
            inode.take(node.getattr())
        self._changed()

    def rmdir(self, name: bytes, inode: Inode) -> None:
        """Remove an empty directory; ENOTEMPTY."""
        assert isinstance(inode, GoferInode)
        self.fid().unlink(name, directory=True)
        inode.nlink = 0
        inode.seen = 0
        self._changed()

    def rename(
        self, name: bytes, inode: Inode, target: Inode, new_name: bytes, replaced: Inode | None, flags: int
    ) -> None:
        """renameat2(2)."""
        assert isinstance(inode, GoferInode) and isinstance(target, GoferInode)
        inode.fid()
        if isinstance(replaced, GoferInode):
            replaced.fid()
        self.fid().rename(name, target.fid(), new_name, flags)
        inode.parent, inode.name = target, new_name
        if isinstance(replaced, GoferInode):
            if flags & 2:
                replaced.parent, replaced.name = self, name
            else:
                replaced.nlink = 0 if st.S_ISDIR(replaced.mode) else replaced.nlink - 1
                replaced.seen = 0
        self._changed()
        if target is not self:
            target._changed()

    # -- the rest
    def readlink(self, task: Task | None = None) -> bytes:
        """The target."""
        if self.mode & 0o170000 != st.S_IFLNK:
            raise Errno(errno.EINVAL)
        if not self.target:
            node = self.fid()
            self.target = node.target or node.readlink()
        return self.target

    def getxattr(self, name: bytes) -> bytes:
        """ENODATA; namespaces that the Gofer does not serve are EOPNOTSUPP there."""
        if not name.startswith(_XATTRS):
            raise Errno(errno.ENODATA)
        kept = self.xattrs
        if self.sb.kept and name in (extra := self.sb.kept.get(self.path(), _NOTHING)):
            return extra[name]
        if kept is not None and name in kept:
            value = kept[name]
        else:
            try:
                value = self.fid().getxattr(name)
            except Errno as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
                value = None
            if self.sb.private:
                if kept is None:
                    kept = self.xattrs = {}
                if len(kept) < 64:
                    kept[name] = value
        if value is None:
            raise Errno(errno.ENODATA)
        return value

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """EOPNOTSUPP, ENOSPC, EEXIST, ENODATA by the host."""
        self.fid().setxattr(name, value, flags)
        self.xattrs = None

    def listxattr(self) -> list[bytes]:
        """Names."""
        try:
            names = [name for name in self.fid().listxattr() if name.startswith(_XATTRS)]
        except Errno as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            names = []
        if self.sb.kept:
            names += [name for name in self.sb.kept.get(self.path(), _NOTHING) if name not in names]
        return names

    def removexattr(self, name: bytes) -> None:
        """ENODATA."""
        self.fid().removexattr(name)
        self.xattrs = None

    # -- data
    def handle(self, write: bool) -> HostFd | None:
        """A descriptor of the file, for reading only or also for writing; None from a server that passes none."""
        if self.mode & 0o170000 != st.S_IFREG:
            raise Errno(errno.EINVAL)
        if write:
            handle = self.writer() if self.writer is not None else None
            if handle is None:
                fd, _ = self._open(os.O_RDWR)
                if fd is None:
                    return None
                handle = HostFd(fd, os.O_RDWR)
                self.writer = weakref.ref(handle)
            return handle
        handle = self.reader
        if handle is None:
            fd, _ = self._open(os.O_RDONLY)
            if fd is None:
                return None
            handle = self.reader = HostFd(fd, os.O_RDONLY)
        self.sb.keep_fd(self)
        return handle

    def _open(self, flags: int) -> tuple[int | None, int]:
        parent = self.parent
        if self.node is None and parent is not None and self.nlink:
            node, fd = parent.fid().open_child(self.name, flags)  # walk and open in one round trip
            if node is None:
                raise Errno(errno.ENOENT)
            self._adopt(node)
            return fd, 0
        return self.fid().open(flags)

    def open(self, task: Task, path: Path, flags: int) -> Any:
        """An open file description."""
        if self.mode & 0o170000 != st.S_IFREG:
            return super().open(task, path, flags)
        handle = self.handle(flags & O_ACCMODE != os.O_RDONLY)
        if handle is None:
            return RemoteFile(self, path, flags)
        return GoferFile(self, path, flags, handle)

    def file_map(self) -> FileMap:
        """What maps this file, for all of its VMAs."""
        if self.map is None:
            self.map = FileMap(self)
        return self.map


class GoferFile(File):
    """An open regular file: a descriptor of the host's file, possibly shared with others who opened it."""

    __slots__ = ("handle",)
    seekable = True
    inode: GoferInode

    def __init__(self, inode: GoferInode, path: Path | None, flags: int, handle: HostFd) -> None:
        super().__init__(inode, path, flags)
        self.handle = handle

    def pread(self, views: list[memoryview], pos: int) -> int:
        """pread(2), straight into guest memory."""
        try:
            return os.preadv(self.handle.fd, views if len(views) <= IOV_MAX else views[:IOV_MAX], pos)
        except OSError as error:
            raise refused(error) from None

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """pwrite(2), straight from guest memory."""
        try:
            n = os.pwritev(self.handle.fd, views if len(views) <= IOV_MAX else views[:IOV_MAX], pos)
        except OSError as error:
            raise refused(error) from None
        inode = self.inode
        if pos + n > inode.size:
            inode.size = pos + n
        inode.seen = 1
        return n

    def write(self, views: list[memoryview]) -> int:
        """write(2); with O_APPEND the host finds the end, so that other writers of a volume are not overwritten."""
        if not self.flags & O_APPEND:
            return super().write(views)
        try:
            n = os.pwritev(self.handle.fd, views if len(views) <= IOV_MAX else views[:IOV_MAX], 0, os.RWF_APPEND)
            self.pos = self.inode.size = os.fstat(self.handle.fd).st_size
        except OSError as error:
            raise refused(error) from None
        self.inode.seen = 1
        return n

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2); the end, data and holes are where the host has them."""
        if whence == 2 and self.inode.seen:
            self.inode.size = os.fstat(self.handle.fd).st_size
        elif whence in (3, 4):
            try:
                self.pos = os.lseek(self.handle.fd, offset, os.SEEK_DATA if whence == 3 else os.SEEK_HOLE)
            except OSError as error:
                raise Errno(errno.ENXIO if error.errno == errno.ENXIO else errno.EINVAL) from None
            return self.pos
        return super().seek(offset, whence)

    def fsync(self) -> None:
        """fsync(2); nothing to do for a file that nobody writes."""
        if self.flags & O_ACCMODE:
            try:
                os.fsync(self.handle.fd)
            except OSError as error:
                raise refused(error) from None

    def sync_fd(self) -> int:
        """The Gofer's descriptor of a file that is written."""
        return self.handle.fd if self.flags & O_ACCMODE else -1

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2) of the plain kind; the host's file system may do more, we do not."""
        if mode:
            raise Errno(errno.EOPNOTSUPP)
        try:
            os.posix_fallocate(self.handle.fd, offset, length)
        except OSError as error:
            raise Errno(error.errno if error.errno in (errno.ENOSPC, errno.EFBIG) else errno.EOPNOTSUPP) from None
        self.inode.size = max(self.inode.size, offset + length)
        self.inode.seen = 1

    def backing(self) -> Any:
        """What mmap(2) maps."""
        return self.inode.file_map().backing(self)


class RemoteFile(File):
    """A file of a server that passes no descriptors: every read and write is a message. It cannot be mapped."""

    __slots__ = ("node",)
    seekable = True
    inode: GoferInode

    def __init__(self, inode: GoferInode, path: Path | None, flags: int) -> None:
        super().__init__(inode, path, flags)
        self.node = inode.fid()

    def pread(self, views: list[memoryview], pos: int) -> int:
        """pread(2)."""
        done = 0
        for view in views:
            data = self.node.read(pos + done, len(view))
            view[: len(data)] = data
            done += len(data)
            if len(data) < len(view):
                break
        return done

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """pwrite(2)."""
        done = 0
        for view in views:
            n = self.node.write(pos + done, bytes(view))
            done += n
            if n < len(view):
                break
        self.inode.size = max(self.inode.size, pos + done)
        self.inode.seen = 1
        return done

    def write(self, views: list[memoryview]) -> int:
        """write(2)."""
        if self.flags & O_APPEND:
            self.inode.take(self.node.getattr())
        return super().write(views)

    def fsync(self) -> None:
        """fsync(2)."""
        self.node.fsync()
