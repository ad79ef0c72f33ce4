"""tmpfs: files in guest RAM (tmpfs(5)). Also what memfds, /dev/shm and an overlay's upper layer are made of.

A regular file's data is a `PageStore`: read and write copy between guest RAM and guest RAM, mmap shows the very frames.
A directory is a dict of name to inode. Nothing here checks permission: fs/ops.py has done that.
"""

from __future__ import annotations

import errno
import stat as st
import time
import weakref
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.pages import PAGE, PageStore, Pool
from kvmsentry.fs.vfs import (
    MS_NOATIME,
    MS_STRICTATIME,
    O_NOATIME,
    File,
    Inode,
    Path,
    SuperBlock,
    path_of,
    without_set_id,
)

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Credentials, Task

TMPFS_MAGIC = 0x01021994  # uapi/linux/magic.h
MAX_FILE = (1 << 63) - 1  # MAX_LFS_FILESIZE

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_NO_HIDE_STALE = 1, 2, 4  # uapi/linux/falloc.h
FALLOC_COLLAPSE_RANGE, FALLOC_ZERO_RANGE, FALLOC_INSERT_RANGE, FALLOC_UNSHARE_RANGE = 8, 16, 32, 64

F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 1, 2, 4, 8, 16  # uapi/linux/fcntl.h

STEP = 1024  # pages that fallocate(2) fills before it asks whether somebody else should run

XATTR_CREATE, XATTR_REPLACE = 1, 2  # uapi/linux/xattr.h
XATTR_BYTES_SUPER = 16 << 20  # the same for a whole file system
XATTR_BYTES_LIMIT = 1 << 16  # names and values of one inode: what ext4 would hold at most, and a bound on our memory

_now = time.time_ns


class TmpSuper(SuperBlock):
    """A tmpfs. `size` (bytes) and `inodes` limit it, 0 = no limit beyond guest RAM."""

    fstype = "tmpfs"
    magic = TMPFS_MAGIC
    xattr_bytes = 0
    dates_mappings = False  # Linux's tmpfs does not know who stored through a mapping

    def __init__(
        self, kernel: Kernel, size: int = 0, inodes: int = 0, mode: int = 0o1777, uid: int = 0, gid: int = 0
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.pool = Pool(kernel.frames, kernel.memory, -(-size // PAGE))
        self.inode_limit, self.inodes = inodes, 0
        self._ino = 0
        self.root = self.new_inode(st.S_IFDIR | mode, uid, gid)

    def new_inode(self, mode: int, uid: int = 0, gid: int = 0) -> TmpInode:
        """An inode of this file system; ENOSPC over the limit."""
        self.charge()
        return TmpInode(self, mode, uid, gid)

    def charge(self) -> None:
        """One inode more; ENOSPC over the limit."""
        if self.inode_limit and self.inodes >= self.inode_limit:
            raise Errno(errno.ENOSPC)
        self.inodes += 1

    def statfs(self) -> tuple[int, int, int, int, int, int]:
        """statfs(2), in pages."""
        total, free = self.pool.total(), self.pool.available()
        files = self.inode_limit or total
        return PAGE, total, free, free, files, max(0, files - self.inodes)

    def release(self) -> None:
        """The last mount is gone: let go of the tree; files that are open keep themselves alive."""
        super().release()
        root = self.root
        if isinstance(root, TmpInode) and root.entries is not None:
            root.entries = {}

    def configure(self, options: dict[str, str]) -> None:
        """Take mount options of tmpfs(5): size, nr_blocks, nr_inodes, mode, uid, gid; EINVAL."""
        root = self.root
        for name, value in options.items():
            try:
                if name == "size":
                    self.pool.limit = -(-_bytes(value, self.kernel.frames.limit_pages * PAGE) // PAGE)
                elif name == "nr_blocks":
                    self.pool.limit = _bytes(value, 0)
                elif name == "nr_inodes":
                    self.inode_limit = _bytes(value, 0)
                elif name == "mode":
                    root.mode = st.S_IFDIR | (int(value, 8) & 0o7777)
                elif name == "uid":
                    root.uid = int(value)
                elif name == "gid":
                    root.gid = int(value)
                elif name not in ("huge", "mpol", "inode32", "inode64", "noswap"):
                    raise Errno(errno.EINVAL)
            except ValueError:
                raise Errno(errno.EINVAL) from None
        self.options = ",".join(f"{name}={value}" if value else name for name, value in options.items())


def default_inodes(kernel: Kernel) -> int:
    """tmpfs(5) nr_inodes: half the number of RAM pages, since names and inodes take our own memory."""
    return max(kernel.frames.limit_pages // 2, 4096)


def _bytes(text: str, whole: int) -> int:
    """memparse: a number with k, m, g, or % of `whole`."""
    text = text.strip().lower()
    unit = {"k": 10, "m": 20, "g": 30, "t": 40}.get(text[-1:])
    if text.endswith("%"):
        return whole * int(text[:-1]) // 100
    return int(text[:-1]) << unit if unit else int(text)


class TmpInode(Inode):
    """Any file in memory: `entries` of a directory, `store` of a regular file, `target` of a symbolic link
    (of a memfd: the name that is shown)."""

    __slots__ = ("entries", "store", "target", "xattrs", "seals", "paged", "links")

    sb: TmpSuper

    def __init__(self, sb: TmpSuper, mode: int, uid: int = 0, gid: int = 0, ino: int = 0) -> None:
        super().__init__(sb, mode, uid, gid, ino)
        self.links = 0
        self.entries: dict[bytes, Any] | None = None
        self.store: PageStore | None = None
        self.target = b""
        self.xattrs: dict[bytes, bytes] | None = None
        self.seals = 0
        self.paged: weakref.ref[TmpBacking] | None = None  # weak: a backing holds its inode
        kind = mode & 0o170000
        if kind == st.S_IFREG:
            self.store = PageStore(sb.pool)
        elif kind == st.S_IFDIR:
            self.entries = {}
            self.size = 40

    def __del__(self) -> None:
        self.sb.inodes -= 1 + self.links
        if self.xattrs:
            self.sb.xattr_bytes -= sum(len(name) + len(value) for name, value in self.xattrs.items())

    @property
    def blocks(self) -> int:
        """st_blocks."""
        return self.store.pages * 8 if self.store is not None else 0

    # -- data
    def data(self) -> PageStore:
        """The pages of a regular file, for changing them (an overlay copies up first)."""
        assert self.store is not None
        return self.store

    def truncate(self, size: int) -> None:
        """truncate(2); EPERM when sealed, EFBIG."""
        if self.mode & 0o170000 != st.S_IFREG:
            raise Errno(errno.EISDIR if st.S_ISDIR(self.mode) else errno.EINVAL)
        if size > MAX_FILE:
            raise Errno(errno.EFBIG)
        old = self.size
        if self.seals and ((size < old and self.seals & F_SEAL_SHRINK) or (size > old and self.seals & F_SEAL_GROW)):
            raise Errno(errno.EPERM)
        if size < old or self.store is None:
            self.shrink(size)
        elif old & PAGE - 1 and self.store.shared_tail:
            self.store.clear_tail(old)
        self.size = size
        self.mtime = self.ctime = _now()

    def shrink(self, size: int) -> None:
        """Give up the pages beyond `size` and clear what is left of the last one."""
        store = self.data()
        first = -(-size // PAGE)
        store.drop(first, 1 << 52)
        if store.mapped:
            self.zap(first * PAGE, 1 << 62)
        if size % PAGE:
            store.zero(size, -(-size // PAGE) * PAGE)

    def zap(self, offset: int, length: int) -> None:
        """Frames were cut out of a file that is mapped: nobody sees them from now on, and they are free."""
        backing = self.paged() if self.paged is not None else None
        if backing is not None:
            zap(self.sb.kernel, backing, offset, length)
        self.data().free_cut()

    # -- directories
    def names(self) -> dict[bytes, Any]:
        """The entries of a directory, for changing them; ENOTDIR."""
        if self.entries is None:
            raise Errno(errno.ENOTDIR)
        return self.entries

    def lookup(self, name: bytes) -> Inode:
        """The child; ENOENT, ENOTDIR."""
        entries = self.entries
        if entries is None:
            raise Errno(errno.ENOTDIR)
        inode = entries.get(name)
        if inode is None:
            raise Errno(errno.ENOENT)
        return inode

    def _new(self, name: bytes, mode: int, creds: Credentials) -> TmpInode:
        names = self.names()
        if self.nlink == 0:
            raise Errno(errno.ENOENT)
        gid = creds.fsgid
        if self.mode & st.S_ISGID:  # inode_init_owner, fs/inode.c
            gid = self.gid
            if mode & 0o170000 == st.S_IFDIR:
                mode |= st.S_ISGID
        inode = self.sb.new_inode(mode, creds.fsuid, gid)
        names[name] = inode
        self._changed(1)
        return inode

    def _changed(self, by: int) -> None:
        self.size += 20 * by  # BOGO_DIRENT_SIZE, mm/shmem.c
        self.mtime = self.ctime = _now()

    def create(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """A new regular file."""
        return self._new(name, st.S_IFREG | (mode & 0o7777), creds)

    def mkdir(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """A new directory."""
        inode = self._new(name, st.S_IFDIR | (mode & 0o7777), creds)
        self.nlink += 1
        return inode

    def mknod(self, name: bytes, mode: int, rdev: int, creds: Credentials) -> Inode:
        """A new FIFO, socket or device node."""
        inode = self._new(name, mode, creds)
        inode.rdev = rdev
        return inode

    def symlink(self, name: bytes, target: bytes, creds: Credentials) -> Inode:
        """A new symbolic link."""
        inode = self._new(name, st.S_IFLNK | 0o777, creds)
        inode.target = target
        inode.size = len(target)
        return inode

    def temporary(self, mode: int, creds: Credentials) -> Inode:
        """O_TMPFILE: a regular file without a name, that linkat(2) may give one."""
        inode = self.sb.new_inode(
            st.S_IFREG | (mode & 0o7777), creds.fsuid, self.gid if self.mode & st.S_ISGID else creds.fsgid
        )
        inode.nlink = 0
        return inode

    def link(self, name: bytes, inode: Inode) -> Inode:
        """A new name for `inode`."""
        names = self.names()
        if self.nlink == 0:
            raise Errno(errno.ENOENT)
        assert isinstance(inode, TmpInode)
        if inode.nlink:  # a further name costs us what an inode does; O_TMPFILE's first one is paid for (shmem_link)
            self.sb.charge()
            inode.links += 1
        names[name] = inode
        inode.nlink += 1
        inode.ctime = _now()
        self._changed(1)
        return inode

    def unlink(self, name: bytes, inode: Inode) -> None:
        """Remove the name."""
        self._remove(name)
        inode.nlink -= 1
        inode.ctime = self.mtime
        assert isinstance(inode, TmpInode)
        if inode.links:
            inode.links -= 1
            self.sb.inodes -= 1

    def rmdir(self, name: bytes, inode: Inode) -> None:
        """Remove an empty directory; ENOTEMPTY."""
        if not self.empty(inode):
            raise Errno(errno.ENOTEMPTY)
        self._remove(name)
        self.nlink -= 1
        inode.nlink = 0
        inode.ctime = self.mtime

    def empty(self, inode: Inode) -> bool:
        """Has the directory `inode` no entry?"""
        return not inode.entries  # type: ignore[attr-defined]

    def _remove(self, name: bytes) -> None:
        del self.names()[name]
        self._changed(-1)

    def rename(
        self, name: bytes, inode: Inode, target: Inode, new_name: bytes, replaced: Inode | None, flags: int
    ) -> None:
        """rename(2) within this file system; flags 2 = RENAME_EXCHANGE."""
        assert isinstance(target, TmpInode)
        is_dir = inode.mode & 0o170000 == st.S_IFDIR
        if flags & 2:
            assert replaced is not None
            self.names()[name], target.names()[new_name] = replaced, inode
            if self is not target:
                other = replaced.mode & 0o170000 == st.S_IFDIR
                self.nlink += other - is_dir
                target.nlink += is_dir - other
            self._changed(0)
            target._changed(0)
            replaced.ctime = inode.ctime = target.mtime
            return
        if target.nlink == 0:
            raise Errno(errno.ENOENT)
        if replaced is not None:
            if is_dir:
                target.rmdir(new_name, replaced)
            else:
                target.unlink(new_name, replaced)
        target.names()[new_name] = inode
        self._remove(name)
        target._changed(1)
        if is_dir:
            self.nlink -= 1
            target.nlink += 1
        inode.ctime = target.mtime

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """(name, inode number, DT_*)."""
        return [(name, inode.ino, inode.mode >> 12 & 15) for name, inode in self.names().items()]

    # -- the rest
    def readlink(self, task: Task | None = None) -> bytes:
        """The target; EINVAL."""
        if self.mode & 0o170000 != st.S_IFLNK:
            raise Errno(errno.EINVAL)
        return self.target

    def open(self, task: Task, path: Path, flags: int) -> Any:
        """An open file description."""
        if self.mode & 0o170000 == st.S_IFREG:
            if path is not None and path.mount.flags & MS_STRICTATIME and not flags & O_NOATIME:  # memory_file has none
                return StrictFile(self, path, flags)
            return TmpFile(self, path, flags)
        return super().open(task, path, flags)

    def attributes(self) -> dict[bytes, bytes]:
        """Extended attributes, for changing them."""
        if self.xattrs is None:
            self.xattrs = {}
        return self.xattrs

    def getxattr(self, name: bytes) -> bytes:
        """ENODATA."""
        value = self.xattrs.get(name) if self.xattrs is not None else None
        if value is None:
            raise Errno(errno.ENODATA)
        return value

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """EEXIST, ENODATA, ENOSPC; EOPNOTSUPP for the ACL attributes."""
        if name.startswith(b"system."):
            raise Errno(errno.EOPNOTSUPP)
        xattrs = self.attributes()
        if flags & XATTR_CREATE and name in xattrs:
            raise Errno(errno.EEXIST)
        if flags & XATTR_REPLACE and name not in xattrs:
            raise Errno(errno.ENODATA)
        have = sum(len(n) + len(v) for n, v in xattrs.items())
        more = len(name) + len(value) - (len(name) + len(xattrs[name]) if name in xattrs else 0)
        if have + more > XATTR_BYTES_LIMIT or self.sb.xattr_bytes + more > XATTR_BYTES_SUPER:
            raise Errno(errno.ENOSPC)
        self.sb.xattr_bytes += more
        xattrs[name] = value
        self.ctime = _now()

    def listxattr(self) -> list[bytes]:
        """Names."""
        return list(self.xattrs or ())

    def removexattr(self, name: bytes) -> None:
        """ENODATA."""
        value = self.attributes().pop(name, None)
        if value is None:
            raise Errno(errno.ENODATA)
        self.sb.xattr_bytes -= len(name) + len(value)
        self.ctime = _now()


class TmpBacking:
    """The Backing protocol of kvmsentry.mm for a memory file; one an inode, so that neighbouring VMAs merge."""

    __slots__ = ("inode", "dev", "ino", "label", "ident", "__weakref__")

    def __init__(self, inode: TmpInode, label: bytes) -> None:
        self.inode, self.dev, self.ino, self.label = inode, inode.sb.dev, inode.ino, label
        self.ident = (inode.sb.dev, inode.ino)

    @property
    def on_demand(self) -> bool:
        """A file with holes: a large mapping of it is filled when it is touched."""
        return self.inode.data().pages * PAGE < self.inode.size

    def map_pages(self, offset: int, length: int, writable_shared: bool) -> list[tuple[int, int]]:
        """The frames themselves; holes are filled. Ends at the end of the file, the last run not at a page's end."""
        inode = self.inode
        length = min(length, inode.size - offset)
        if length <= 0:
            return []
        store = inode.data()
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        if writable_shared and offset + length & PAGE - 1:
            store.shared_tail = True
        end = store.ensure(first, end)
        runs = [(gpa, count * PAGE) for gpa, count in store.runs(first, end)]
        if runs and not writable_shared and end * PAGE > offset + length:
            gpa, size = runs[-1]
            runs[-1] = gpa, size - (end * PAGE - offset - length)
        return runs

    def hold(self) -> None:
        """A VMA began to use it."""
        self.inode.data().mapped += 1

    def drop(self) -> None:
        """A VMA ended to use it."""
        self.inode.data().unmap()

    def written(self) -> None:
        """msync(2) of a mapping that may be stored to. What lies beyond the file's end in its last page is lost."""
        inode = self.inode
        if inode.sb.dates_mappings:
            store = inode.data()
            if store.shared_tail:
                store.clear_tail(inode.size)
            inode.mtime = inode.ctime = _now()

    def punch(self, offset: int, length: int) -> None:
        """MADV_REMOVE: [offset, offset + length) becomes a hole."""
        punch_hole(self.inode, offset, length)

    def name(self) -> bytes:
        """The path for /proc/PID/maps."""
        return self.label


def punch_hole(inode: TmpInode, offset: int, length: int) -> None:
    """FALLOC_FL_PUNCH_HOLE: bytes read as zero afterwards, whole pages are given up. EPERM when sealed."""
    if inode.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
        raise Errno(errno.EPERM)
    store = inode.data()
    end = min(offset + length, -(-inode.size // PAGE) * PAGE)
    first, last = -(-offset // PAGE), end // PAGE
    if first < last:
        store.drop(first, last)
        if store.mapped:
            inode.zap(first * PAGE, (last - first) * PAGE)
    if end > offset:
        store.zero(offset, min(end, first * PAGE))
        store.zero(max(offset, last * PAGE), end)
    inode.mtime = inode.ctime = _now()


class TmpFile(File):
    """An open regular file in memory. Its `inode` holds the data."""

    __slots__ = ()
    seekable = True
    inode: TmpInode

    def pread(self, views: list[memoryview], pos: int) -> int:
        """pread(2)."""
        inode = self.inode
        store = inode.store
        assert store is not None
        if inode.atime <= inode.mtime and not self.flags & O_NOATIME:  # relatime
            place = self.path
            if place is None or not place.mount.flags & MS_NOATIME:
                inode.atime = _now()
        return store.read(views, pos, inode.size)

    def accessed(self) -> None:
        """file_accessed, with relatime."""
        inode = self.inode
        if inode.atime <= inode.mtime and not self.flags & O_NOATIME:
            inode.atime = _now()

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """pwrite(2); ENOSPC, EFBIG, EPERM when sealed."""
        inode = self.inode
        total = len(views[0]) if len(views) == 1 else sum(map(len, views))
        if not total:
            return 0
        if pos + total > MAX_FILE:
            total = MAX_FILE - pos
            if total <= 0:
                raise Errno(errno.EFBIG)
        size = inode.size
        if inode.seals:
            if inode.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
                raise Errno(errno.EPERM)
            if inode.seals & F_SEAL_GROW and pos + total > size:
                raise Errno(errno.EPERM)
        store = inode.store or inode.data()
        if store.shared_tail and pos > size:
            store.clear_tail(size)
        n = store.write(views, pos, total, size)
        if pos + n > size:
            inode.size = pos + n
        inode.mtime = inode.ctime = _now()
        if self.strips:
            strip(inode)
            self.strips = False
        return n

    def release(self) -> None:
        """Gives back the reserve behind the end that appending made."""
        inode = self.inode
        store = inode.store
        if (
            store is not None
            and self.flags & 3
            and store.pages << 12 > inode.size + PAGE
            and "kept" not in inode.__dict__
        ):
            store.drop(-(-inode.size // PAGE), 1 << 52)

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA and SEEK_HOLE by pages."""
        if whence in (3, 4):
            inode = self.inode
            if not 0 <= offset < inode.size:
                raise Errno(errno.ENXIO)
            store = inode.data()
            page = offset // PAGE
            if whence == 3:
                found = store.next_data(page)
                if found < 0 or found * PAGE >= inode.size:
                    raise Errno(errno.ENXIO)
                self.pos = max(offset, found * PAGE)
            else:
                self.pos = min(inode.size, max(offset, store.next_hole(page) * PAGE))
            return self.pos
        return super().seek(offset, whence)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2): plain, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, UNSHARE_RANGE; ENOSPC, EFBIG, EPERM, EOPNOTSUPP."""
        for _ in self.fallocate_steps(mode, offset, length):
            pass

    def fallocate_steps(self, mode: int, offset: int, length: int) -> Generator[None, None, None]:
        """`fallocate`, a piece at a time. Closed before its end, it undoes what it did, as shmem_fallocate does, unless
        somebody else has changed the file meanwhile."""
        inode = self.inode
        if mode & ~(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE | FALLOC_UNSHARE_RANGE):
            raise Errno(errno.EOPNOTSUPP)
        if mode & FALLOC_PUNCH_HOLE:
            punch_hole(inode, offset, length)
            return
        end = offset + length
        if end > MAX_FILE:
            raise Errno(errno.EFBIG)
        if inode.seals & F_SEAL_GROW and end > inode.size and not mode & FALLOC_KEEP_SIZE:
            raise Errno(errno.EPERM)
        if mode & FALLOC_ZERO_RANGE and inode.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            raise Errno(errno.EPERM)
        store = inode.data()
        first, last = offset // PAGE, -(-end // PAGE)
        if last - first > inode.sb.pool.available() + store.pages:
            raise Errno(errno.ENOSPC)
        holes = [(count, page) for page, gpa, count in _placed(store.runs(first, last), first) if gpa < 0]
        changed = inode.mtime
        done = False
        try:
            for page in range(first, last, STEP):
                stop = min(page + STEP, last)
                if store.ensure(page, stop) < stop:
                    raise Errno(errno.ENOSPC)
                yield
            if mode & FALLOC_ZERO_RANGE:
                for at in range(offset, end, STEP * PAGE):
                    store.zero(at, min(at + STEP * PAGE, end))
                    yield
            done = True
        finally:
            if not done and inode.mtime == changed and not store.mapped:
                for count, page in holes:
                    store.drop(page, page + count)
        if end > inode.size:
            if mode & FALLOC_KEEP_SIZE:
                inode.__dict__["kept"] = True
            else:
                if store.shared_tail:
                    store.clear_tail(inode.size)
                inode.size = end
        inode.mtime = inode.ctime = _now()

    def backing(self) -> Any:
        """What mmap(2) maps."""
        inode = self.inode
        self.accessed()
        backing = inode.paged() if inode.paged is not None else None
        if backing is None:
            label = inode.target or label_of(inode.sb.kernel, self.path)
            backing = TmpBacking(inode, label)
            inode.paged = weakref.ref(backing)
        return backing


class StrictFile(TmpFile):
    """A file opened through a mount with MS_STRICTATIME: each read is a new access time."""

    __slots__ = ()

    def pread(self, views: list[memoryview], pos: int) -> int:
        """pread(2)."""
        self.inode.atime = _now()
        return super().pread(views, pos)


def _placed(runs: list[tuple[int, int]], page: int) -> Iterable[tuple[int, int, int]]:
    """(first page, gpa, pages) of PageStore.runs from `page` on."""
    for gpa, count in runs:
        yield page, gpa, count
        page += count


def strip(inode: TmpInode) -> None:
    """A write takes the set-id bits and the capabilities away."""
    if inode.mode & 0o6000:
        inode.setattr(mode=without_set_id(inode.mode))
    xattrs = inode.attributes()
    if b"security.capability" in xattrs:
        inode.removexattr(b"security.capability")


def zap(kernel: Kernel, backing: Any, offset: int, length: int) -> None:
    """Take [offset, offset + length) of `backing` out of every address space; what touches it again asks the
    backing."""
    seen = set()
    for task in kernel.tasks.values():
        space = task.mm
        if space is not None and id(space) not in seen:
            seen.add(id(space))
            space.zap_backing(backing, offset, length)


def label_of(kernel: Kernel, path: Path | None) -> bytes:
    """What /proc/PID/maps shows for a file opened at `path`: its path as init sees it."""
    if path is None:
        return b""
    init = kernel.init
    root = init.leader.fs.root if init is not None else Path(path.mount, path.mount.root)
    label = path_of(path, root, mark=False)
    return label + b" (deleted)" if path.dentry.unlinked else label


def memory_file(kernel: Kernel, name: bytes, mode: int = 0o777, creds: Credentials | None = None) -> TmpInode:
    """A regular file without a name on the kernel's internal tmpfs (shm_mnt): for memfd_create(2), SysV shared memory
    and the like. `name` is what /proc/PID/maps shows. nlink is 0, all frames go back with the last holder."""
    sb: TmpSuper | None = kernel.__dict__.get("shm_super")
    if sb is None:
        sb = kernel.__dict__["shm_super"] = TmpSuper(kernel)
    inode = sb.new_inode(st.S_IFREG | mode, creds.fsuid if creds else 0, creds.fsgid if creds else 0)
    inode.nlink = 0
    inode.target = name
    return inode
