"""mount(2), umount2(2), pivot_root(2)."""

from __future__ import annotations

import errno

from kvmsentry.errors import Errno
from kvmsentry.fs import mounts
from kvmsentry.fs.vfs import FOLLOW, MS_BIND, MS_REMOUNT, PATH_MAX, walk
from kvmsentry.kernel.task import Task
from kvmsentry.kernel.userns import capable
from kvmsentry.syscall.table import Int, Path, ULong, UserPtr, syscall

CAP_SYS_ADMIN = 21  # uapi/linux/capability.h
MS_MGC_VAL, MS_MGC_MSK = 0xC0ED0000, 0xFFFF0000  # uapi/linux/mount.h


def _may_mount(task: Task) -> None:
    if not capable(task.creds, mounts.namespace_of(task).user_ns, CAP_SYS_ADMIN):
        raise Errno(errno.EPERM)


def _data(task: Task, pointer: int) -> bytes:
    """Mount options: text, or a page of a type's own structure, of which none of our types has any."""
    if not pointer:
        return b""
    try:
        return task.mm.read_cstring(pointer, 4096)
    except Errno as error:
        if error.errno == errno.ENAMETOOLONG:
            raise Errno(errno.EINVAL) from None
        raise


@syscall(
    165, partial="tmpfs, ramfs, proc, sysfs, devtmpfs, devpts, bind mounts, moves and remounts; all mounts are private"
)
def mount(task: Task, source: Path, target: Path, filesystemtype: UserPtr, mountflags: ULong, data: UserPtr) -> int:
    fstype = task.mm.read_cstring(filesystemtype, 4096) if filesystemtype else b""
    name = task.mm.read_cstring(source, PATH_MAX) if source else b""
    options = _data(task, data)
    place = walk(task, task.mm.read_cstring(target, PATH_MAX))
    _may_mount(task)
    flags = mountflags
    if flags & MS_MGC_MSK == MS_MGC_VAL:
        flags &= ~MS_MGC_MSK
    if flags & MS_REMOUNT:
        mounts.remount(task, place, flags, options)
    elif flags & MS_BIND:
        if not name:
            return -errno.EINVAL
        mounts.mount_bind(task, place, walk(task, name), flags)
    elif flags & mounts.PROPAGATION:
        if place.dentry is not place.mount.root:
            return -errno.EINVAL
    elif flags & mounts.MS_MOVE:
        if not name:
            return -errno.EINVAL
        mounts.move(task, place, walk(task, name))
    else:
        if not fstype:
            return -errno.EINVAL
        mounts.mount_new(task, place, name, fstype.decode(errors="replace"), flags, options)
    return 0


@syscall(166)
def umount2(task: Task, target: Path, flags: Int) -> int:
    if flags & ~(mounts.MNT_FORCE | mounts.MNT_DETACH | mounts.MNT_EXPIRE | mounts.UMOUNT_NOFOLLOW):
        return -errno.EINVAL
    path = task.mm.read_cstring(target, PATH_MAX)
    place = walk(task, path, None, 0 if flags & mounts.UMOUNT_NOFOLLOW else FOLLOW)
    _may_mount(task)
    mounts.unmount(task, place, flags)
    return 0


@syscall(155)
def pivot_root(task: Task, new_root: Path, put_old: Path) -> int:
    _may_mount(task)
    new = walk(task, task.mm.read_cstring(new_root, PATH_MAX))
    old = walk(task, task.mm.read_cstring(put_old, PATH_MAX))
    mounts.pivot_root(task, new, old)
    return 0
