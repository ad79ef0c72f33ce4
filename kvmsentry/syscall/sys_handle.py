"""name_to_handle_at(2), open_by_handle_at(2): names for files that survive without a descriptor.

A tmpfs has handles (shmem_encode_fh), sysfs and cgroup2 too (their 64-bit inode number, kernfs). The overlay that a
container's root is has none without nfs_export=on, and then says EOPNOTSUPP, as ours does.
"""

from __future__ import annotations

import errno
import stat as st
import struct
from typing import Any
from weakref import WeakValueDictionary

from kvmsentry.errors import Errno
from kvmsentry.fs import ops, vfs
from kvmsentry.fs.sysfs import CGROUP2_SUPER_MAGIC, SYSFS_MAGIC
from kvmsentry.fs.tmpfs import TMPFS_MAGIC
from kvmsentry.fs.vfs import O_CLOEXEC, O_PATH, PATH_MAX, Dentry, Mount
from kvmsentry.kernel import cap
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.sys_io import install
from kvmsentry.syscall.sys_path import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_FOLLOW, place_at
from kvmsentry.syscall.table import DirFd, Int, OpenFlags, Path, UserPtr, syscall

MAX_HANDLE_SZ = 128  # include/linux/exportfs.h
FILEID_INO32_GEN, FILEID_KERNFS, FILEID_INVALID = 1, 0xFE, 0xFF
_HEAD = struct.Struct("<Ii")  # struct file_handle: bytes, type
_SHMEM = struct.Struct("<III")  # generation, inode number low, high
_KERNFS = struct.Struct("<Q")


def _encode(inode: vfs.Inode) -> tuple[int, bytes]:
    """(type, handle) of a file; EOPNOTSUPP where its file system has none."""
    magic = inode.sb.magic
    if magic == TMPFS_MAGIC and inode.sb.fstype == "tmpfs":
        return FILEID_INO32_GEN, _SHMEM.pack(inode.sb.dev, inode.ino & 0xFFFFFFFF, inode.ino >> 32)
    if magic in (SYSFS_MAGIC, CGROUP2_SUPER_MAGIC):
        return FILEID_KERNFS, _KERNFS.pack(inode.ino)
    raise Errno(errno.EOPNOTSUPP)


def _known(sb: vfs.SuperBlock) -> WeakValueDictionary[bytes, Dentry]:
    """The places that handles were given out for. Only those can be opened: all others were made up."""
    found: WeakValueDictionary[bytes, Dentry] | None = sb.__dict__.get("handles")
    if found is None:
        found = sb.__dict__["handles"] = WeakValueDictionary()
    return found


@syscall(303, note="tmpfs, sysfs and cgroup2 have handles; the overlay has none, as on Linux")
def name_to_handle_at(task: Task, dirfd: DirFd, pathname: Path, handle: UserPtr, mount_id: UserPtr, flags: Int) -> int:
    """name_to_handle_at(2)."""
    if flags & ~(AT_SYMLINK_FOLLOW | AT_EMPTY_PATH):
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX)
    place = place_at(task, dirfd, path, bool(flags & AT_SYMLINK_FOLLOW), bool(flags & AT_EMPTY_PATH))
    kind, data = _encode(place.inode)
    room = task.mm.read_struct(_HEAD, handle)[0]
    if room > MAX_HANDLE_SZ:
        return -errno.EINVAL
    short = room < len(data)
    task.mm.write_u32(mount_id, place.mount.id)
    if short:
        task.mm.write_struct(_HEAD, handle, len(data), FILEID_INVALID)
        return -errno.EOVERFLOW
    _known(place.mount.sb)[data] = place.dentry
    task.mm.write(handle, _HEAD.pack(len(data), kind) + data)
    return 0


def _mount_of(task: Task, fd: int) -> Mount:
    if fd == AT_FDCWD:
        return task.fs.cwd.mount
    place = task.files.get(fd).path
    if place is None:
        raise Errno(errno.ESTALE)
    return place.mount


@syscall(304, note="as name_to_handle_at")
def open_by_handle_at(task: Task, mount_fd: DirFd, handle: UserPtr, flags: OpenFlags) -> Any:
    """open_by_handle_at(2)."""
    if not task.creds.capable(cap.DAC_READ_SEARCH):
        return -errno.EPERM
    mount = _mount_of(task, mount_fd)
    room, kind = task.mm.read_struct(_HEAD, handle)
    if not 0 < room <= MAX_HANDLE_SZ:
        return -errno.EINVAL
    data = task.mm.read(handle + _HEAD.size, room)
    dentry = _known(mount.sb).get(data)
    inode = dentry.inode if dentry is not None else None
    if dentry is None or inode is None or _encode(inode) != (kind, data):
        return -errno.ESTALE
    if dentry.unlinked and (not inode.nlink or inode.mode & st.S_IFMT(inode.mode) == st.S_IFDIR):
        return -errno.ESTALE
    place = vfs.Path(mount, dentry)
    if flags & O_PATH:
        return install(task, vfs.File(inode, place, flags), 0, bool(flags & O_CLOEXEC))
    file = ops.open_place(task, place, flags)
    if isinstance(file, vfs.File):
        return install(task, file, 0, bool(flags & O_CLOEXEC))
    return _later(task, file, flags)


async def _later(task: Task, opening: Any, flags: int) -> int:
    return install(task, await opening, 0, bool(flags & O_CLOEXEC))
