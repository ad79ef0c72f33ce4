"""inotify(7)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.inotify import (
    IN_ALL_EVENTS,
    IN_DONT_FOLLOW,
    IN_EXCL_UNLINK,
    IN_ISDIR,
    IN_MASK_ADD,
    IN_MASK_CREATE,
    IN_ONESHOT,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    IN_UNMOUNT,
    InotifyFile,
)
from kvmsentry.fs.vfs import FOLLOW, MAY_READ, O_CLOEXEC, O_NONBLOCK, O_RDONLY, PATH_MAX, permission, walk
from kvmsentry.syscall.sys_io import install
from kvmsentry.syscall.table import Fd, Int, Path, UInt, syscall

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

ALL_BITS = (
    IN_ALL_EVENTS
    | IN_UNMOUNT
    | IN_Q_OVERFLOW
    | 0x8000  # IN_IGNORED
    | IN_ONLYDIR
    | IN_DONT_FOLLOW
    | IN_EXCL_UNLINK
    | IN_MASK_CREATE
    | IN_MASK_ADD
    | IN_ISDIR
    | IN_ONESHOT
)


@syscall(253)
def inotify_init(task: Task) -> int:
    """inotify_init(2)."""
    return install(task, InotifyFile(O_RDONLY))


@syscall(294)
def inotify_init1(task: Task, flags: UInt) -> int:
    """inotify_init1(2)."""
    if flags & ~(O_CLOEXEC | O_NONBLOCK):
        raise Errno(errno.EINVAL)
    return install(task, InotifyFile(O_RDONLY | (flags & O_NONBLOCK)), 0, bool(flags & O_CLOEXEC))


@syscall(254)
def inotify_add_watch(task: Task, fd: Fd, path: Path, mask: UInt) -> int:
    """inotify_add_watch(2)."""
    if not mask & ALL_BITS or (mask & IN_MASK_ADD and mask & IN_MASK_CREATE):
        raise Errno(errno.EINVAL)
    file = task.files.get_io(fd)
    if not isinstance(file, InotifyFile):
        raise Errno(errno.EINVAL)
    name = task.mm.read_cstring(path, PATH_MAX)
    place = walk(task, name, None, 0 if mask & IN_DONT_FOLLOW else FOLLOW)
    inode = place.inode
    if mask & IN_ONLYDIR and inode.mode & 0o170000 != 0o040000:
        raise Errno(errno.ENOTDIR)
    permission(inode, MAY_READ, task.creds)
    return file.add_watch(inode, mask & ALL_BITS)


@syscall(255)
def inotify_rm_watch(task: Task, fd: Fd, wd: Int) -> int:
    """inotify_rm_watch(2)."""
    file = task.files.get_io(fd)
    if not isinstance(file, InotifyFile):
        raise Errno(errno.EINVAL)
    file.remove_watch(wd)
    return 0
