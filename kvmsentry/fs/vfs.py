"""The virtual file system: inodes, dentries, mounts and the walk from a path to them.

    Path(mount, dentry) --dentry.inode--> Inode (caches attributes) --inode.open()--> File (an open file description)

Names are bytes. Inodes carry their attributes as fields, so that permission checks and stat(2) cost no call; a file
system whose attributes change behind our back (a shared volume, /proc) overrides `refresh`. Dentries form the name
cache: a child that is there with `inode` None is a negative entry. `SuperBlock.caching` False (procfs) means that
nothing is believed from the cache. Everything raises `Errno` for what the application may ask and not get.
"""

from __future__ import annotations

import errno
import stat as st
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kvmsentry.errors import Errno
from kvmsentry.fs.mount import Mount
from kvmsentry.kernel.traps import WaitQueue
from kvmsentry.kernel.userns import ROOT, maps_inode

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Credentials, Task

NAME_MAX = 255  # include/uapi/linux/limits.h
PATH_MAX = 4096
MAXSYMLINKS = 40  # include/linux/namei.h

MAY_EXEC, MAY_WRITE, MAY_READ = 1, 2, 4  # include/linux/fs.h

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER = 1 << 1, 1 << 2, 1 << 3  # uapi/linux/capability.h

O_ACCMODE, O_RDONLY, O_WRONLY, O_RDWR = 3, 0, 1, 2  # uapi/asm-generic/fcntl.h
O_CREAT, O_EXCL, O_NOCTTY, O_TRUNC, O_APPEND, O_NONBLOCK = 0o100, 0o200, 0o400, 0o1000, 0o2000, 0o4000
O_DSYNC, FASYNC, O_DIRECT, O_LARGEFILE = 0o10000, 0o20000, 0o40000, 0o100000
O_DIRECTORY, O_NOFOLLOW = 0o200000, 0o400000
O_NOATIME, O_CLOEXEC, O_PATH, O_SYNC, O_TMPFILE = 0o1000000, 0o2000000, 0o10000000, 0o4010000, 0o20200000
# Ours, in File.flags only, never shown: call read_by/write_by(task, views) instead of read/write(views).
TASK_IO = 1 << 30

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # uapi/linux/mount.h
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME, MS_STRICTATIME = 256, 1024, 2048, 1 << 24

POLLIN, POLLPRI, POLLOUT, POLLERR, POLLHUP, POLLNVAL = 1, 2, 4, 8, 16, 32  # uapi/asm-generic/poll.h
POLLRDNORM, POLLRDBAND, POLLWRNORM, POLLWRBAND, POLLRDHUP = 64, 128, 256, 512, 0x2000

DT_UNKNOWN, DT_FIFO, DT_CHR, DT_DIR, DT_BLK, DT_REG, DT_LNK, DT_SOCK = 0, 1, 2, 4, 6, 8, 10, 12  # dirent(5): mode >> 12

_next_minor = 20


WATCHES: dict[
    Any, None
] = {}  # every inotify(7) mark there is (fs/inotify.py): empty, as it mostly is, costs callers one test


def anonymous_dev() -> int:
    """A device number for a file system without a device: major 0 (set_anon_super in fs/super.c)."""
    global _next_minor
    _next_minor += 1
    return _next_minor


def makedev(major: int, minor: int) -> int:
    """The user-visible encoding of a device number (new_encode_dev, include/linux/kdev_t.h)."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


class SuperBlock:
    """One mounted file system: its type's name, device number and root inode."""

    caching = True  # dentries may be believed
    magic = 0  # statfs(2) f_type
    fstype = "none"
    readonly = False  # nothing in it may change, through whatever mount
    hides = False  # some names are not for everybody: `look` and `visible` are asked, as procfs has them
    user_ns = ROOT  # whose root may change its options
    unchangeable = False  # `readonly` stays as it is
    active = 0  # mounts of it, in a tree or still in use
    top: Dentry | None = None  # that of `root`, which all mounts share
    negatives = 0  # names known not to be there, since they were last forgotten

    def __init__(self) -> None:
        self.dev = anonymous_dev()
        self.root: Inode
        self.source = self.fstype
        self.options = ""  # shown in /proc/mounts after rw/ro
        self._ino = 1

    def new_ino(self) -> int:
        """The next free inode number."""
        self._ino += 1
        return self._ino

    def statfs(self) -> tuple[int, int, int, int, int, int]:
        """(bsize, blocks, bfree, bavail, files, ffree), statfs(2)."""
        return (4096, 0, 0, 0, 0, 0)

    def sync(self) -> None:
        """Write back what is dirty."""

    def release(self) -> None:
        """The last mount is gone: let go of what is held. Files that are open keep themselves alive."""
        if self.top is not None:
            self.top.children.clear()  # they hold inodes in cycles; memory must not wait for the collector
            self.top = None

    def look(self, task: Task, directory: Inode, name: bytes) -> None:
        """Where `hides`: ENOENT or EPERM for a name that `task` may not look up."""

    def visible(self, task: Task, directory: Inode, entries: Iterable[tuple[bytes, int, int]]) -> Iterable[Any]:
        """Where `hides`: those of a directory's entries that `task` may see."""
        return entries


class Inode:
    """A file, directory or anything else that has attributes. Times are ns since the epoch."""

    __slots__ = (
        "sb", "ino", "mode", "uid", "gid", "nlink", "rdev", "size", "atime", "mtime", "ctime", "btime",
        "locks", "watches", "writers", "__dict__", "__weakref__",
    )  # fmt: skip

    def __init__(self, sb: SuperBlock, mode: int, uid: int = 0, gid: int = 0, ino: int = 0) -> None:
        now = time.time_ns()
        self.sb, self.mode, self.uid, self.gid = sb, mode, uid, gid
        self.ino = ino or sb.new_ino()
        self.nlink = 2 if mode & st.S_IFMT(mode) == st.S_IFDIR else 1
        self.rdev = self.size = 0
        self.atime = self.mtime = self.ctime = self.btime = now
        self.locks: Any = None  # flock(2) and fcntl(2) record locks, fs/locks.py
        self.watches: Any = None  # inotify(7) marks, fs/inotify.py
        self.writers = 0  # files open for writing; < 0: programs running from it, nobody may write (i_writecount)

    # -- attributes
    def refresh(self) -> None:
        """Bring the attribute fields up to date; called before they are shown. Nothing to do where we alone change
        them."""

    @property
    def blocks(self) -> int:
        """512-byte blocks in use (stat(2) st_blocks)."""
        return (self.size + 511) >> 9

    def setattr(self, *, mode: int | None = None, uid: int | None = None, gid: int | None = None,
                atime: int | None = None, mtime: int | None = None) -> None:  # fmt: skip
        """Change attributes (permission was checked by the caller); `mode` holds permission bits only."""
        if mode is not None:
            self.mode = (self.mode & ~0o7777) | (mode & 0o7777)
        if uid is not None:
            self.uid = uid
        if gid is not None:
            self.gid = gid
        if atime is not None:
            self.atime = atime
        if mtime is not None:
            self.mtime = mtime
        self.ctime = time.time_ns()

    def truncate(self, size: int) -> None:
        """Set the size of a regular file; what appears reads as zero (truncate(2))."""
        raise Errno(errno.EISDIR if st.S_ISDIR(self.mode) else errno.EINVAL)

    # -- directories
    def lookup(self, name: bytes) -> Inode:
        """The child of that name; ENOENT when there is none, ENOTDIR when this is no directory."""
        raise Errno(errno.ENOTDIR)

    def create(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """A new regular file; `mode` is the full mode after umask, the owner is `creds.fsuid:fsgid` (or the directory's
        group with S_ISGID). EEXIST was ruled out by the caller. The same holds for mkdir, mknod and symlink."""
        raise Errno(errno.EROFS)

    def mkdir(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """A new directory."""
        raise Errno(errno.EROFS)

    def mknod(self, name: bytes, mode: int, rdev: int, creds: Credentials) -> Inode:
        """A new FIFO, socket or device node."""
        raise Errno(errno.EROFS)

    def symlink(self, name: bytes, target: bytes, creds: Credentials) -> Inode:
        """A new symbolic link."""
        raise Errno(errno.EROFS)

    def temporary(self, mode: int, creds: Credentials) -> Inode:
        """A regular file without a name in this directory's file system (O_TMPFILE); EOPNOTSUPP."""
        raise Errno(errno.EOPNOTSUPP)

    def link(self, name: bytes, inode: Inode) -> Inode:
        """A new name for `inode` (same super block); returns the inode the name has now (an overlay may have copied it
        up)."""
        raise Errno(errno.EROFS)

    def unlink(self, name: bytes, inode: Inode) -> None:
        """Remove the name of a non-directory."""
        raise Errno(errno.EROFS)

    def rmdir(self, name: bytes, inode: Inode) -> None:
        """Remove an empty directory; ENOTEMPTY."""
        raise Errno(errno.EROFS)

    def rename(
        self, name: bytes, inode: Inode, target: Inode, new_name: bytes, replaced: Inode | None, flags: int
    ) -> None:
        """Move child `name` (which is `inode`) to `new_name` in directory `target` of the same super block, replacing
        `replaced`. Types and loops were checked by the caller. flags: RENAME_EXCHANGE (2) or 0."""
        raise Errno(errno.EROFS)

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """(name, inode number, DT_*) of every child, without `.` and `..`; the order is stable while nothing
        changes."""
        raise Errno(errno.ENOTDIR)

    # -- the rest
    def readlink(self, task: Task | None = None) -> bytes:
        """Where a symbolic link points."""
        raise Errno(errno.EINVAL)

    def follow(self, task: Task) -> Path | None:
        """For magic links (/proc/PID/fd/N): the place itself; None for ordinary links, whose text is walked."""
        return None

    def open(self, task: Task, path: Path, flags: int) -> Any:
        """A new open file description, or a coroutine that returns one (a FIFO waits for its other end). Permission,
        O_CREAT, O_EXCL, O_TRUNC, O_DIRECTORY were dealt with by the caller. Directories, FIFOs and device nodes are
        opened alike in every file system; one that has regular files overrides this."""
        kind = self.mode & 0o170000
        if kind == st.S_IFDIR:
            return Directory(self, path, flags)
        if kind == st.S_IFIFO:
            from kvmsentry.fs import pipe

            return pipe.open_fifo(task, self, path, flags)
        if kind in (st.S_IFCHR, st.S_IFBLK):
            if path.mount.flags & MS_NODEV:
                raise Errno(errno.EACCES)
            from kvmsentry.fs import devfs

            return devfs.open_device(task, self, path, flags)
        raise Errno(errno.ENXIO)

    def getxattr(self, name: bytes) -> bytes:
        """The value of an extended attribute; ENODATA, EOPNOTSUPP."""
        raise Errno(errno.EOPNOTSUPP)

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute; flags XATTR_CREATE 1, XATTR_REPLACE 2."""
        raise Errno(errno.EOPNOTSUPP)

    def listxattr(self) -> list[bytes]:
        """Names of all extended attributes."""
        return []

    def removexattr(self, name: bytes) -> None:
        """Remove an extended attribute."""
        raise Errno(errno.EOPNOTSUPP)


class Dentry:
    """A name in a directory. `inode` None: known not to be there."""

    __slots__ = ("name", "parent", "inode", "children", "mounted", "__weakref__")

    def __init__(self, name: bytes, parent: Dentry | None, inode: Inode | None) -> None:
        self.name, self.inode = name, inode
        self.parent: Dentry = parent if parent is not None else self
        # Where nothing is believed from the cache, nothing need be kept: a name lives as long as somebody is there.
        self.children: Any = {} if inode is None or inode.sb.caching else WeakValueDictionary()
        self.mounted = 0  # how many mounts, in any namespace, stand on it

    def add(self, name: bytes, inode: Inode | None) -> Dentry:
        """Remember a child (replaces what was remembered)."""
        child = Dentry(name, self, inode)
        self.children[name] = child
        return child

    def drop(self, name: bytes) -> None:
        """Forget a child: its name was removed."""
        self.children.pop(name, None)

    @property
    def unlinked(self) -> bool:
        """True when the name is gone (shown as ` (deleted)`)."""
        return self.parent is not self and self.parent.children.get(self.name) is not self


class Path:
    """A place in the tree: a dentry seen through a mount."""

    __slots__ = ("mount", "dentry")

    def __init__(self, mount: Mount, dentry: Dentry) -> None:
        self.mount, self.dentry = mount, dentry

    @property
    def inode(self) -> Inode:
        """The inode there; only for places that exist."""
        inode = self.dentry.inode
        assert inode is not None
        return inode

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and self.mount is other.mount and self.dentry is other.dentry

    def __hash__(self) -> int:
        return hash((id(self.mount), id(self.dentry)))


def without_set_id(mode: int) -> int:
    """`mode`'s permission bits without set-user-id, and without set-group-id where that means a program (not
    locking)."""
    mode &= 0o7777 & ~st.S_ISUID
    return mode & ~st.S_ISGID if mode & st.S_IXGRP else mode


class FsContext:
    """What a process's paths start from, and the namespace that they lead through; shared with CLONE_FS."""

    __slots__ = ("root", "cwd", "umask", "namespace", "users")

    def __init__(self, root: Path, cwd: Path, umask: int = 0o022, namespace: Any = None) -> None:
        self.root, self.cwd, self.umask = root, cwd, umask
        # fs/mounttree.py: MountNamespace. None only before there is one, and for unit tests.
        self.namespace = root.mount.namespace if namespace is None else namespace
        self.users = 1

    def put(self) -> None:
        """A task less; with the last one in a mount namespace below the first, its mounts go."""
        self.users -= 1
        if not self.users and self.namespace is not None:
            self.namespace.put()

    def copy(self) -> FsContext:
        """For fork without CLONE_FS."""
        if self.namespace is not None:
            self.namespace.users += 1
        return FsContext(self.root, self.cwd, self.umask, self.namespace)


def permission(inode: Inode, mask: int, creds: Credentials) -> None:
    """EACCES unless `creds` (its fsuid, fsgid, groups and capabilities) may do `mask` (MAY_*) on `inode`;
    path_resolution(7)."""
    mode = inode.mode
    if creds.fsuid == inode.uid:
        bits = mode >> 6
    elif inode.gid == creds.fsgid or inode.gid in creds.groups:
        bits = mode >> 3
    else:
        bits = mode
    if not mask & ~bits & 7:
        return
    effective = creds.effective
    if creds.user_ns is not ROOT and not maps_inode(creds.user_ns, inode):
        raise Errno(errno.EACCES)
    if effective & CAP_DAC_OVERRIDE and (not mask & MAY_EXEC or mode & 0o111 or st.S_ISDIR(mode)):
        return
    if effective & CAP_DAC_READ_SEARCH and (mask == MAY_READ or (st.S_ISDIR(mode) and not mask & MAY_WRITE)):
        return
    raise Errno(errno.EACCES)


# Flags of a walk (our own, except where openat2(2) names them).
FOLLOW = 1  # follow a symbolic link in the last component
NO_SYMLINKS = 2
NO_MAGICLINKS = 4
BENEATH = 8
IN_ROOT = 16
NO_XDEV = 32
CREATE = 64  # the last component need not be there, even if slashes follow it


def walk(task: Task, path: bytes, start: Path | None = None, flags: int = FOLLOW) -> Path:
    """The existing place that `path` names, from `start` (default: the working directory) unless absolute.
    Errors: ENOENT, ENOTDIR, EACCES, ELOOP, ENAMETOOLONG, EXDEV; path_resolution(7)."""
    place, name, _ = _walk(task, path, start, flags, parent=False)
    if place.dentry.inode is None:
        raise Errno(errno.ENOENT)
    return place


def place_or_hole(task: Task, path: bytes, start: Path | None, flags: int) -> Path:
    """Like `walk`, but the last component need not be there: then the place's dentry has no inode and its parent is the
    directory to create it in (open(2) with O_CREAT, which follows a dangling link). EISDIR when slashes follow the
    path."""
    place, _, trailing = _walk(task, path, start, flags | CREATE, parent=False)
    if trailing:
        raise Errno(errno.EISDIR)
    return place


def walk_parent(task: Task, path: bytes, start: Path | None = None, flags: int = 0) -> tuple[Path, bytes, bool]:
    """The directory in which the last component of `path` stands, that component (`.`, `..` or `` for the root as they
    are), and whether slashes follow it."""
    return _walk(task, path, start, flags, parent=True)


def lookup_child(task: Task, directory: Path, name: bytes) -> Dentry:
    """The dentry of `name` in `directory` (an ordinary name: not `.` or `..`), from the cache or the file system; its
    inode is None when there is no such file. Search permission was checked by the caller."""
    dentry = directory.dentry
    child = dentry.children.get(name)
    inode = dentry.inode
    if child is not None and (inode is None or inode.sb.caching):
        return child
    if len(name) > NAME_MAX:
        raise Errno(errno.ENAMETOOLONG)
    assert inode is not None
    if inode.sb.hides:
        inode.sb.look(task, inode, name)
    try:
        found: Inode | None = inode.lookup(name)
    except Errno as error:
        if error.errno != errno.ENOENT:
            raise
        found = None
    if child is not None and child.inode is found:
        return child
    if found is None:
        return absent(dentry, name)
    if child is not None and child.mounted:
        child.inode = found
        return child
    return dentry.add(name, found)


NEGATIVE_LIMIT = 1 << 16  # names known not to be there that a file system keeps


def absent(directory: Dentry, name: bytes) -> Dentry:
    """Remember that `name` is not in `directory`. When too many such names have gathered, all of them in that file
    system are forgotten: an application that asks for nonsense does not fill our memory."""
    assert directory.inode is not None
    sb = directory.inode.sb
    sb.negatives += 1
    if sb.negatives > NEGATIVE_LIMIT:
        sb.negatives = 0
        top = directory
        while top.parent is not top:
            top = top.parent
        _forget_negatives(top)
    return directory.add(name, None)


def _forget_negatives(top: Dentry) -> None:
    stack = [top]
    while stack:
        children = stack.pop().children
        if children.__class__ is dict:
            for name in [name for name, child in children.items() if child.inode is None and not child.mounted]:
                del children[name]
            stack += children.values()


def _walk(task: Task, path: bytes, start: Path | None, flags: int, parent: bool) -> tuple[Path, bytes, bool]:
    if not path:
        raise Errno(errno.ENOENT)
    if len(path) >= PATH_MAX:
        raise Errno(errno.ENAMETOOLONG)
    fs, creds = task.fs, task.creds
    root = fs.root
    if start is None:
        start = fs.cwd
    if flags & IN_ROOT:
        root = start
    beneath = start if flags & BENEATH else None
    if path[0] == 47:
        if beneath is not None:
            raise Errno(errno.EXDEV)
        mount, dentry = root.mount, root.dentry
    else:
        mount, dentry = start.mount, start.dentry
    names = [n for n in path.split(b"/") if n]
    trailing = path[-1] == 47
    names.reverse()
    links = 0
    must_be_directory = trailing
    while names:
        name = names.pop()
        last = not names
        inode = dentry.inode
        if inode is None:
            raise Errno(errno.ENOENT)
        mode = inode.mode
        if mode & 0o170000 != 0o040000:
            raise Errno(errno.ENOTDIR)
        if mode & 0o111 != 0o111:  # else search is allowed to everybody: the common case of permission()
            inode.refresh()
            permission(inode, MAY_EXEC, creds)
        if parent and last:
            return Path(mount, dentry), name, trailing
        if name == b".":
            continue
        if name == b"..":
            if beneath is not None and dentry is beneath.dentry and mount is beneath.mount:
                raise Errno(errno.EXDEV)
            mount, dentry = step_up(mount, dentry, root)
            continue
        child = dentry.children.get(name)
        if child is None or not inode.sb.caching:
            child = lookup_child(task, Path(mount, dentry), name)
        here = mount, dentry
        dentry = child
        while dentry.mounted and dentry in mount.children:
            if flags & NO_XDEV:
                raise Errno(errno.EXDEV)
            mount = mount.children[dentry]
            dentry = mount.root
        inode = dentry.inode
        if inode is None:
            if last and (not must_be_directory or flags & CREATE):
                break
            raise Errno(errno.ENOENT)
        if inode.mode & 0o170000 == 0o120000 and (not last or flags & FOLLOW or must_be_directory):
            links += 1
            if links > MAXSYMLINKS or flags & NO_SYMLINKS or mount.flags & MS_NOSYMFOLLOW:
                raise Errno(errno.ELOOP)
            place = inode.follow(task)
            if place is not None:
                if flags & (NO_MAGICLINKS | BENEATH | IN_ROOT):
                    raise Errno(errno.ELOOP if flags & NO_MAGICLINKS else errno.EXDEV)
                mount, dentry = place.mount, place.dentry
                continue
            target = inode.readlink(task)
            if not target:
                raise Errno(errno.ENOENT)
            if target[0] == 47:
                if beneath is not None:
                    raise Errno(errno.EXDEV)
                mount, dentry = root.mount, root.dentry
            else:
                mount, dentry = here
            if last and target[-1] == 47:
                must_be_directory = True
            more = [n for n in target.split(b"/") if n]
            more.reverse()
            names += more
    if parent:  # the path was all slashes
        return Path(mount, dentry), b"", trailing
    if must_be_directory and dentry.inode is not None and dentry.inode.mode & 0o170000 != 0o040000:
        raise Errno(errno.ENOTDIR)
    return Path(mount, dentry), b"", must_be_directory


def step_up(mount: Mount, dentry: Dentry, root: Path) -> tuple[Mount, Dentry]:
    """Where `..` leads from (mount, dentry), not above `root`."""
    if dentry is root.dentry and mount is root.mount:
        return mount, dentry
    here = mount, dentry
    while dentry is mount.root:
        parent, mountpoint = mount.parent, mount.mountpoint
        if parent is None or mountpoint is None:
            return here
        mount, dentry = parent, mountpoint
        if dentry is root.dentry and mount is root.mount:  # something is mounted on the root itself: no way out of it
            return here
    dentry = dentry.parent
    while dentry.mounted and dentry in mount.children:
        mount = mount.children[dentry]
        dentry = mount.root
    return mount, dentry


def path_of(place: Path, root: Path, mark: bool = True) -> bytes:
    """The absolute path of `place` as seen from `root` (getcwd(2)). When it is not below `root`, what is known of the
    path, with `(unreachable)` in front if `mark`. Says nothing of deleted files: see Dentry.unlinked."""
    names: list[bytes] = []
    mount, dentry = place.mount, place.dentry
    prefix = b"/"
    while not (dentry is root.dentry and mount is root.mount):
        if dentry is mount.root:
            parent, mountpoint = mount.parent, mount.mountpoint
            if parent is None or mountpoint is None:
                prefix = b"(unreachable)/" if mark else b"/"
                break
            mount, dentry = parent, mountpoint
            continue
        if dentry.parent is dentry:  # a bind mount's root was moved out of what it shows
            prefix = b"(unreachable)/" if mark else b"/"
            break
        names.append(dentry.name)
        dentry = dentry.parent
    names.reverse()
    return prefix + b"/".join(names)


class File:
    """An open file description (open(2)): what descriptors point at. `refs` counts descriptors and other holders.

    Data calls take `views`: writable memoryviews of guest memory, in order, as AddressSpace.views gives them. They
    never sleep: -EAGAIN means that `queue` tells when to try again, and the system call parks on it unless O_NONBLOCK
    is set.
    """

    __slots__ = ("inode", "path", "flags", "pos", "refs", "owner", "cursor", "endings", "__dict__", "__weakref__")
    queue: WaitQueue | None = None  # who waits for readiness; None for files that are always ready
    seekable = False
    endless = False  # reading never comes short for want of data: a huge read(2) is done in full
    splices = True  # splice(2) and sendfile(2) work on it: it has splice_read and splice_write
    write_all = False  # a blocking write(2) goes on until everything is written: pipes, terminals, stream sockets
    counted = False  # among `inode.writers`
    read_timeout = write_timeout = 0  # ns that read(2), write(2) sleep at most (SO_RCVTIMEO, SO_SNDTIMEO), 0: for ever
    flushes = False  # `flush(table)` is called whenever one of its descriptors is closed
    strips = False  # writing takes the set-id bits away (should_remove_suid, fs/inode.c)

    def __init__(self, inode: Inode, path: Path | None, flags: int) -> None:
        self.inode, self.path, self.flags = inode, path, flags & ~(O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC | O_CLOEXEC)
        self.pos = 0
        self.refs = 1
        self.owner: Any = None  # F_SETOWN
        self.cursor: Any = None  # position of getdents within a snapshot
        self.endings: dict[Any, None] | None = (
            None  # `ending(file)` is called when the last holder is gone: epoll, locks
        )

    def get(self) -> File:
        """One more holder."""
        self.refs += 1
        return self

    def put(self) -> None:
        """One holder less; the last one releases."""
        self.refs -= 1
        if self.refs == 0:
            if self.endings is not None:
                for ending in list(self.endings):
                    ending(self)
            if WATCHES:
                from kvmsentry.fs.inotify import closed

                closed(self)
            if self.counted:
                self.counted = False
                self.inode.writers -= 1
            self.release()

    def release(self) -> None:
        """The last holder is gone."""

    def flush(self, table: Any) -> None:
        """A descriptor of `table` was closed; only where `flushes`."""

    def read(self, views: list[memoryview]) -> int:
        """Read at the file position and move it; returns bytes, 0 at end, -EAGAIN when it would sleep."""
        n = self.pread(views, self.pos)
        if n > 0:
            self.pos += n
        return n

    def write(self, views: list[memoryview]) -> int:
        """Write at the file position (or the end with O_APPEND) and move it."""
        if self.flags & O_APPEND:
            self.pos = self.inode.size
        n = self.pwrite(views, self.pos)
        if n > 0:
            self.pos += n
        return n

    def read_by(self, task: Task, views: list[memoryview]) -> int:
        """`read` for files with TASK_IO, which want to know who asks; the same holds for the next three."""
        return self.read(views)

    def write_by(self, task: Task, views: list[memoryview]) -> int:
        """`write`, ditto."""
        return self.write(views)

    def poll_by(self, task: Task) -> int:
        """`poll`, ditto."""
        return self.poll()

    def queue_by(self, task: Task) -> WaitQueue | None:
        """`queue`, ditto."""
        return self.queue

    def pread(self, views: list[memoryview], pos: int) -> int:
        """Read at `pos` (pread(2)); ESPIPE where there are no positions."""
        raise Errno(errno.EINVAL if self.seekable else errno.ESPIPE)

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """Write at `pos` (pwrite(2))."""
        raise Errno(errno.EINVAL if self.seekable else errno.ESPIPE)

    def poll(self) -> int:
        """Readiness now: POLL* bits (poll(2)). Always ready by default, as regular files are."""
        return POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2): SEEK_SET 0, SEEK_CUR 1, SEEK_END 2, SEEK_DATA 3, SEEK_HOLE 4; returns the new position."""
        if not self.seekable:
            raise Errno(errno.ESPIPE)
        size = self.inode.size
        if whence == 1:
            offset += self.pos
        elif whence == 2:
            offset += size
        elif whence in (3, 4):
            if not 0 <= offset < size:
                raise Errno(errno.ENXIO)
            offset = offset if whence == 3 else size
        elif whence != 0:
            raise Errno(errno.EINVAL)
        if offset < 0 or offset >= 1 << 63:
            raise Errno(errno.EINVAL)
        self.pos = offset
        return offset

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """ioctl(2); ENOTTY for requests that this file does not know."""
        raise Errno(errno.ENOTTY)

    def backing(self) -> Any:
        """What mmap(2) maps (the Backing protocol of kvmsentry.mm); ENODEV where nothing can be mapped."""
        raise Errno(errno.ENODEV)

    def fsync(self) -> None:
        """fsync(2)."""

    def sync_fd(self) -> int:
        """A host descriptor whose fsync(2) is ours and may take long; -1: `fsync` does it at once."""
        return -1

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2); mode is FALLOC_FL_* bits. The arguments and the file's being writable were checked by the
        caller."""
        raise Errno(errno.EOPNOTSUPP)

    def fdinfo(self) -> str:
        """Lines of /proc/PID/fdinfo beyond pos, flags and mnt_id."""
        return ""

    @property
    def nonblocking(self) -> bool:
        """O_NONBLOCK is set."""
        return bool(self.flags & O_NONBLOCK)

    @property
    def readable(self) -> bool:
        """Open for reading."""
        return self.flags & (O_ACCMODE | O_PATH) in (O_RDONLY, O_RDWR)

    @property
    def writable(self) -> bool:
        """Open for writing."""
        return self.flags & (O_ACCMODE | O_PATH) in (O_WRONLY, O_RDWR)


class Directory(File):
    """An open directory. `cursor` is a snapshot of its entries; `pos` counts entries of it, `.` and `..` first."""

    __slots__ = ()
    seekable = True
    splices = False

    def pread(self, views: list[memoryview], pos: int) -> int:
        """EISDIR."""
        raise Errno(errno.EISDIR)

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """EBADF: a directory is never open for writing."""
        raise Errno(errno.EBADF)

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2): SEEK_SET and SEEK_CUR to a position that getdents gave; 0 reads the directory afresh."""
        if whence == 1:
            offset += self.pos
        elif whence == 2:
            offset = len(self.cursor) if self.cursor is not None else 0
        elif whence != 0:
            raise Errno(errno.EINVAL)
        if offset < 0:
            raise Errno(errno.EINVAL)
        if offset == 0:
            self.cursor = None
        self.pos = offset
        return offset
