"""mount(2), umount2(2), pivot_root(2)."""

from __future__ import annotations

import errno

from kvmsentry.errors import Errno
from kvmsentry.fs import mountops
from kvmsentry.fs.mountops import may_mount
from kvmsentry.fs.mounttree import summit
from kvmsentry.fs.vfs import FOLLOW, MS_BIND, MS_REMOUNT, PATH_MAX, walk
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.table import Int, Path, ULong, UserPtr, syscall

MS_MGC_VAL, MS_MGC_MSK, MS_NOUSER = 0xC0ED0000, 0xFFFF0000, 1 << 31  # uapi/linux/mount.h, include/linux/fs.h


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
    165,
    partial="types: tmpfs, ramfs, proc, sysfs, devtmpfs, devpts, mqueue, cgroup2. MS_STRICTATIME counts on a tmpfs "
    "only; MS_SYNCHRONOUS, MS_DIRSYNC, MS_LAZYTIME change nothing",
)
def mount(task: Task, source: Path, target: Path, filesystemtype: UserPtr, mountflags: ULong, data: UserPtr) -> int:
    fstype = task.mm.read_cstring(filesystemtype, 4096) if filesystemtype else b""
    name = task.mm.read_cstring(source, PATH_MAX) if source else b""
    options = _data(task, data)
    place = walk(task, task.mm.read_cstring(target, PATH_MAX))
    flags = mountflags
    if flags & MS_MGC_MSK == MS_MGC_VAL:
        flags &= ~MS_MGC_MSK
    if flags & MS_NOUSER:
        return -errno.EINVAL
    may_mount(task)
    if flags & MS_REMOUNT:
        mountops.remount(task, place, flags, options)
    elif flags & MS_BIND:
        if not name:
            return -errno.EINVAL
        mountops.mount_bind(task, place, walk(task, name), flags)
    elif flags & mountops.PROPAGATION:
        mountops.set_type(task, place, flags)
    elif flags & mountops.MS_MOVE:
        if not name:
            return -errno.EINVAL
        mountops.move(task, place, walk(task, name))
    else:
        if not fstype:
            return -errno.EINVAL
        mountops.mount_new(task, place, name, fstype.decode(errors="replace"), flags, options)
    return 0


@syscall(166)
def umount2(task: Task, target: Path, flags: Int) -> int:
    if flags & ~(mountops.MNT_FORCE | mountops.MNT_DETACH | mountops.MNT_EXPIRE | mountops.UMOUNT_NOFOLLOW):
        return -errno.EINVAL
    path = task.mm.read_cstring(target, PATH_MAX)
    marked = mountops.marks(task) if flags & mountops.MNT_EXPIRE else set()
    place = walk(task, path, None, 0 if flags & mountops.UMOUNT_NOFOLLOW else FOLLOW)
    may_mount(task)
    mountops.unmount(task, summit(place), flags, marked)  # "." may be covered (LOOKUP_MOUNTPOINT)
    return 0


@syscall(155)
def pivot_root(task: Task, new_root: Path, put_old: Path) -> int:
    may_mount(task)
    new = walk(task, task.mm.read_cstring(new_root, PATH_MAX))
    old = walk(task, task.mm.read_cstring(put_old, PATH_MAX))
    mountops.pivot_root(task, new, old)
    return 0
