"""Two System V calls about file systems: ustat(2), sysfs(2)."""

from __future__ import annotations

import errno
import struct

from kvmsentry.fs import mounts, mounttree
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.table import Int, UInt, ULong, UserPtr, syscall

_USTAT = struct.Struct("<i4xQ16x")  # struct ustat: f_tfree, f_tinode, two names that are empty


@syscall(136)
def ustat(task: Task, dev: UInt, ubuf: UserPtr) -> int:
    """ustat(2): free blocks and inodes of the mounted file system with that device number."""
    for mount in mounttree.all_mounts(task):
        if mount.sb.dev == dev:
            _, _, free, _, _, files = mount.sb.statfs()
            task.mm.write(ubuf, _USTAT.pack(free & 0x7FFFFFFF, files))
            return 0
    return -errno.EINVAL


@syscall(139)
def sysfs(task: Task, option: Int, arg1: ULong, arg2: ULong) -> int:
    """sysfs(2): 1, the number of a file system type; 2, the type of a number; 3, how many there are."""
    names = list(mounts.fstypes)
    if option == 1:
        name = task.mm.read_cstring(arg1, 4096).decode(errors="replace")
        return names.index(name) if name in names else -errno.EINVAL
    if option == 2:
        if arg1 >= len(names):
            return -errno.EINVAL
        task.mm.write(arg2, names[arg1].encode() + b"\0")
        return 0
    return len(names) if option == 3 else -errno.EINVAL
