"""Mounting in steps (fsopen(2) and its kin), which mount(8) of util-linux 2.39 and later uses.

    fsopen -> context --fsconfig: options, CREATE--> super block --fsmount--> mount without a place --move_mount-->
    open_tree(OPEN_TREE_CLONE) -> a copy of a mount without a place                                 --move_mount-->

A mount without a place is in a namespace without a name; the descriptor that shows it ends it, unless it was moved
somewhere.
"""

from __future__ import annotations

import errno
import struct

from kvmsentry.errors import Errno
from kvmsentry.fs import mountops, mounts, mounttree, vfs
from kvmsentry.fs.anon import AnonFile
from kvmsentry.fs.mountops import may_mount
from kvmsentry.fs.vfs import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    O_CLOEXEC,
    O_PATH,
    O_RDWR,
    PATH_MAX,
    File,
    Mount,
    SuperBlock,
)
from kvmsentry.kernel import cap
from kvmsentry.kernel.task import Task
from kvmsentry.kernel.userns import capable
from kvmsentry.syscall.sys_io import install
from kvmsentry.syscall.sys_path import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_NOFOLLOW, place_at
from kvmsentry.syscall.table import DirFd, Fd, Int, Path, Size, UInt, UserPtr, syscall

AT_NO_AUTOMOUNT, AT_RECURSIVE = 0x800, 0x8000  # uapi/linux/fcntl.h
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = FSPICK_CLOEXEC = OPEN_TREE_CLONE = 1  # uapi/linux/mount.h
FSPICK_SYMLINK_NOFOLLOW, FSPICK_NO_AUTOMOUNT, FSPICK_EMPTY_PATH = 2, 4, 8
SET_FLAG, SET_STRING, SET_BINARY, SET_PATH, SET_PATH_EMPTY, SET_FD, CMD_CREATE, CMD_RECONFIGURE = range(8)
MOVE_MOUNT_F_SYMLINKS, MOVE_MOUNT_F_EMPTY_PATH = 1, 4
MOVE_MOUNT_T_SYMLINKS, MOVE_MOUNT_T_EMPTY_PATH = 0x10, 0x40
MOVE_MOUNT_SET_GROUP, MOVE_MOUNT_MASK = 0x100, 0x177
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC, ATTR_ATIME, ATTR_NOATIME = 1, 2, 4, 8, 0x70, 0x10
ATTR_STRICTATIME, ATTR_NODIRATIME, ATTR_IDMAP, ATTR_NOSYMFOLLOW = 0x20, 0x80, 0x100000, 0x200000
ATTR_ALL = 15 | ATTR_ATIME | ATTR_NODIRATIME | ATTR_NOSYMFOLLOW
_FLAGS = (
    (ATTR_RDONLY, MS_RDONLY), (ATTR_NOSUID, MS_NOSUID), (ATTR_NODEV, MS_NODEV), (ATTR_NOEXEC, MS_NOEXEC),
    (ATTR_NODIRATIME, vfs.MS_NODIRATIME), (ATTR_NOSYMFOLLOW, vfs.MS_NOSYMFOLLOW),
)  # fmt: skip
MOUNT_ATTR = struct.Struct("<4Q")  # struct mount_attr: set, clear, propagation, userns_fd
SUPER_FLAGS = {"ro", "rw", "sync", "async", "dirsync", "lazytime", "nolazytime", "mand", "nomand", "silent"}
OPTIONS = {
    "tmpfs": {"size", "nr_blocks", "nr_inodes", "mode", "uid", "gid", "huge", "mpol", "inode32", "inode64", "noswap"},
    "ramfs": {"mode"},
    "proc": {"gid", "hidepid", "subset"},
    "devpts": {"gid", "uid", "mode", "ptmxmode", "max", "newinstance"},
    "devtmpfs": {"mode", "size", "nr_inodes"},
    "cgroup2": {"nsdelegate", "favordynmods", "memory_localevents", "memory_recursiveprot"},
}


class ContextFile(AnonFile):
    """What fsopen(2) and fspick(2) give: a file system being made, or one (`mount`'s) being changed."""

    name = b"fscontext"
    seek = File.seek  # ESPIPE

    def __init__(self, fstype: str, mount: Mount | None = None) -> None:
        super().__init__(O_RDWR)
        self.fstype, self.mount = fstype, mount
        self.options: dict[str, str] = {}
        self.source = ""
        self.readonly: bool | None = None
        self.sb: SuperBlock | None = None
        self.mounted = False

    def read(self, views: list[memoryview]) -> int:
        """Messages about what was wrong; there are none (ENODATA)."""
        return -errno.ENODATA

    def set(self, key: str, value: str | None) -> None:
        """One option; EINVAL for one that the file system does not know."""
        if key == "source":
            if value is None or self.source:
                raise Errno(errno.EINVAL)
            self.source = value
        elif key in SUPER_FLAGS:  # with a value or without: Linux looks at the name alone (vfs_parse_sb_flag)
            if key in ("ro", "rw"):
                self.readonly = key == "ro"
        elif key in OPTIONS.get(self.fstype, ()):
            self.options[key] = value or ""
        else:
            raise Errno(errno.EINVAL)


class TreeFile(File):
    """A descriptor of a mount that has no place yet."""

    def __init__(self, mount: Mount) -> None:
        inode = mount.root.inode
        assert inode is not None
        super().__init__(inode, vfs.Path(mount, mount.root), O_PATH)
        self.mount, self.tree = mount, mount.namespace

    def release(self) -> None:
        """Nobody will put it anywhere any more (dissolve_on_fput)."""
        if self.mount.namespace is self.tree:
            mounttree.unmount_tree(self.mount, propagate=False, connected=True)


def _text(task: Task, pointer: int, limit: int) -> str:
    try:
        return str(task.mm.read_cstring(pointer, limit).decode(errors="surrogateescape"))
    except Errno as error:
        raise Errno(errno.EINVAL if error.errno == errno.ENAMETOOLONG else error.errno) from None


def _flags_of(attributes: int) -> int:
    """MS_* of MOUNT_ATTR_*; EINVAL for two kinds of access times."""
    atime = attributes & ATTR_ATIME
    if atime not in (0, ATTR_NOATIME, ATTR_STRICTATIME):
        raise Errno(errno.EINVAL)
    flags = {ATTR_NOATIME: vfs.MS_NOATIME, ATTR_STRICTATIME: vfs.MS_STRICTATIME}.get(atime, 0)
    for attribute, flag in _FLAGS:
        if attributes & attribute:
            flags |= flag
    return flags


@syscall(430, note="the file systems that mount(2) has")
def fsopen(task: Task, fsname: UserPtr, flags: UInt) -> int:
    """fsopen(2)."""
    may_mount(task)
    if flags & ~FSOPEN_CLOEXEC:
        return -errno.EINVAL
    fstype = _text(task, fsname, 4096)
    if fstype not in mounts.fstypes:
        return -errno.ENODEV
    return install(task, ContextFile(fstype), 0, bool(flags))


@syscall(433)
def fspick(task: Task, dirfd: DirFd, pathname: Path, flags: UInt) -> int:
    """fspick(2): a mounted file system, to be changed."""
    may_mount(task)
    if flags & ~(FSPICK_CLOEXEC | FSPICK_SYMLINK_NOFOLLOW | FSPICK_NO_AUTOMOUNT | FSPICK_EMPTY_PATH):
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX)
    place = place_at(task, dirfd, path, not flags & FSPICK_SYMLINK_NOFOLLOW, bool(flags & FSPICK_EMPTY_PATH))
    if place.dentry is not place.mount.root:
        return -errno.EINVAL
    return install(task, ContextFile(place.mount.sb.fstype, place.mount), 0, bool(flags & FSPICK_CLOEXEC))


def _check_parameter(command: int, key: int, value: int, aux: int) -> None:
    """What each command takes (fsconfig in fs/fsopen.c)."""
    bad = {
        SET_FLAG: not key or value or aux,
        SET_STRING: not key or not value or aux,
        SET_BINARY: not key or not value or not 0 < aux <= 1 << 20,
        SET_PATH: not key or not value or (aux != AT_FDCWD and aux < 0),
        SET_PATH_EMPTY: not key or not value or (aux != AT_FDCWD and aux < 0),
        SET_FD: not key or value or aux < 0,
        CMD_CREATE: key or value or aux,
        CMD_RECONFIGURE: key or value or aux,
    }.get(command)
    if bad is None:
        raise Errno(errno.EOPNOTSUPP)
    if bad:
        raise Errno(errno.EINVAL)


@syscall(431)
def fsconfig(task: Task, fd: Fd, command: UInt, key: UserPtr, value: UserPtr, aux: Int) -> int:
    """fsconfig(2): options as flags and strings; no file system here takes binary values, paths or descriptors."""
    if fd < 0:
        return -errno.EINVAL
    _check_parameter(command, key, value, aux)
    context = task.files.get_io(fd)
    if not isinstance(context, ContextFile):
        return -errno.EINVAL
    if command == CMD_CREATE:
        if context.mount is not None or context.sb is not None:
            return -errno.EBUSY
        may_mount(task)
        context.sb = mounts.new_super(task, context.fstype, context.options)
        if not context.sb.active:
            context.sb.source = context.source or "none"
            context.sb.readonly |= bool(context.readonly)
        return 0
    if command == CMD_RECONFIGURE:
        if context.mount is None:
            return -errno.EBUSY
        may_mount(task)
        sb = context.mount.sb
        if not capable(task.creds, sb.user_ns, cap.SYS_ADMIN):
            return -errno.EPERM
        if context.readonly is not None:
            mountops.remount_super(task, sb, context.readonly)
        if context.options and hasattr(sb, "configure"):
            sb.configure(mounts.own_options(task, sb.fstype, context.options))
        context.options, context.readonly = {}, None
        return 0
    name = _text(task, key, 256)
    if context.sb is not None:
        return -errno.EBUSY
    if command not in (SET_FLAG, SET_STRING):
        return -errno.EINVAL
    context.set(name, _text(task, value, 256) if command == SET_STRING else None)
    return 0


@syscall(432)
def fsmount(task: Task, fs_fd: Fd, flags: UInt, attributes: UInt) -> int:
    """fsmount(2): a mount without a place, as a descriptor."""
    may_mount(task)
    if flags & ~FSMOUNT_CLOEXEC or attributes & ~ATTR_ALL:
        return -errno.EINVAL
    kept = _flags_of(attributes)
    context = task.files.get_io(fs_fd)
    if not isinstance(context, ContextFile) or context.sb is None:
        return -errno.EINVAL
    if context.mounted:
        return -errno.EBUSY
    mount = mounttree.new_mount(context.sb, flags=kept)
    mount.locked = mountops.revealing(task, mount)
    context.mounted = True
    mountops.descriptor_tree(task, mount, None)
    return install(task, TreeFile(mount), 0, bool(flags & FSMOUNT_CLOEXEC))


@syscall(428)
def open_tree(task: Task, dirfd: DirFd, pathname: Path, flags: UInt) -> int:
    """open_tree(2): an O_PATH descriptor, or one of a copy of the mount (OPEN_TREE_CLONE)."""
    known = AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_RECURSIVE | AT_SYMLINK_NOFOLLOW | OPEN_TREE_CLONE | O_CLOEXEC
    if flags & ~known or flags & (AT_RECURSIVE | OPEN_TREE_CLONE) == AT_RECURSIVE:
        return -errno.EINVAL
    if flags & OPEN_TREE_CLONE:
        may_mount(task)
    path = task.mm.read_cstring(pathname, PATH_MAX)
    place = place_at(task, dirfd, path, not flags & AT_SYMLINK_NOFOLLOW, bool(flags & AT_EMPTY_PATH))
    if not flags & OPEN_TREE_CLONE:
        return install(task, File(place.inode, place, O_PATH), 0, bool(flags & O_CLOEXEC))
    mount = mountops.copy_of(task, place, bool(flags & AT_RECURSIVE))
    mountops.descriptor_tree(task, mount, place.mount.namespace)
    return install(task, TreeFile(mount), 0, bool(flags & O_CLOEXEC))


@syscall(429)
def move_mount(task: Task, from_fd: DirFd, from_path: Path, to_fd: DirFd, to_path: Path, flags: UInt) -> int:
    """move_mount(2)."""
    may_mount(task)
    if flags & ~MOVE_MOUNT_MASK:
        return -errno.EINVAL
    source = place_at(
        task, from_fd, task.mm.read_cstring(from_path, PATH_MAX), bool(flags & MOVE_MOUNT_F_SYMLINKS),
        bool(flags & MOVE_MOUNT_F_EMPTY_PATH),
    )  # fmt: skip
    target = place_at(
        task, to_fd, task.mm.read_cstring(to_path, PATH_MAX), bool(flags & MOVE_MOUNT_T_SYMLINKS),
        bool(flags & MOVE_MOUNT_T_EMPTY_PATH),
    )  # fmt: skip
    if flags & MOVE_MOUNT_SET_GROUP:
        mountops.set_group(task, source, target)
    else:
        mountops.move(task, target, source)
    return 0


@syscall(442, partial="no MOUNT_ATTR_IDMAP")
def mount_setattr(task: Task, dirfd: DirFd, pathname: Path, flags: UInt, uattr: UserPtr, size: Size) -> int:
    """mount_setattr(2)."""
    if flags & ~(AT_EMPTY_PATH | AT_RECURSIVE | AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT):
        return -errno.EINVAL
    if size > 4096:
        return -errno.E2BIG
    if size < MOUNT_ATTR.size:
        return -errno.EINVAL
    may_mount(task)
    raw = task.mm.read(uattr, size)
    if any(raw[MOUNT_ATTR.size :]):
        return -errno.E2BIG
    setting, clearing, propagation, _ = MOUNT_ATTR.unpack_from(raw)
    if not (setting or clearing or propagation):
        return 0
    if propagation & ~mountops.PROPAGATION or propagation & (propagation - 1):
        return -errno.EINVAL
    if (setting | clearing) & ~ATTR_ALL:  # ATTR_IDMAP too
        return -errno.EINVAL
    if clearing & ATTR_ATIME:
        if clearing & ATTR_ATIME != ATTR_ATIME:
            return -errno.EINVAL
    elif setting & ATTR_ATIME:
        return -errno.EINVAL
    add = _flags_of(setting)
    remove = _flags_of(clearing & ~ATTR_ATIME)
    if clearing & ATTR_ATIME:
        remove |= vfs.MS_NOATIME | vfs.MS_STRICTATIME
    path = task.mm.read_cstring(pathname, PATH_MAX)
    place = place_at(task, dirfd, path, not flags & AT_SYMLINK_NOFOLLOW, bool(flags & AT_EMPTY_PATH))
    mountops.change_flags(task, place, add, remove, propagation, bool(flags & AT_RECURSIVE))
    return 0
