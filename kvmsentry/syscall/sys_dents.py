"""getdents(2): a directory is read once into a snapshot, and handed out from it by position."""

from __future__ import annotations

import errno
import time

from kvmsentry.errors import Errno
from kvmsentry.fs.inotify import accessed
from kvmsentry.fs.vfs import MS_NOATIME, MS_NODIRATIME, MS_STRICTATIME, O_NOATIME, WATCHES, File
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.abi_fs import DIRENT, DIRENT64
from kvmsentry.syscall.table import Fd, UInt, UserPtr, syscall

_pack64 = DIRENT64.pack
_pack = DIRENT.pack
_PADDING = [bytes(n) for n in range(9)]
_MOST = 1 << 20  # bytes handed out by one call


def _snapshot(task: Task, file: File) -> list[tuple[bytes, int, int]]:
    """The entries of an open directory; `.` and `..` first. ENOTDIR."""
    inode = file.inode
    if inode.mode & 0o170000 != 0o040000:
        raise NotADirectoryError
    place = file.path
    parent = inode
    if place is not None and place.dentry is not place.mount.root:
        parent = place.dentry.parent.inode or inode
    entries = [(b".", inode.ino, 4), (b"..", parent.ino, 4)]
    names = inode.readdir()
    entries += inode.sb.visible(task, inode, names) if inode.sb.hides else names
    how = place.mount.flags if place is not None else 0
    if (inode.atime <= inode.mtime or how & MS_STRICTATIME) and not (
        file.flags & O_NOATIME or how & (MS_NOATIME | MS_NODIRATIME) or inode.sb.readonly or not inode.sb.caching
    ):
        inode.atime = time.time_ns()  # in memory only
    return entries


def _entries(task: Task, fd: int) -> tuple[File, list[tuple[bytes, int, int]]]:
    file = task.files.get_io(fd)
    if not file.inode.nlink and file.inode.mode & 0o170000 == 0o040000:
        raise Errno(errno.ENOENT)  # removed (IS_DEADDIR)
    entries = file.cursor
    if entries is None or file.pos == 0:
        entries = file.cursor = _snapshot(task, file)
    return file, entries


def _put(task: Task, file: File, dirp: int, out: bytes | bytearray, start: int, pos: int) -> int:
    """Hand out the entries `start` to `pos`, which `out` holds; those that fit where the memory ends early. EFAULT when
    not even the first does."""
    if WATCHES:
        accessed(file)
    try:
        task.mm.write(dirp, out)
        file.pos = pos
        return len(out)
    except Errno:
        used = 0
        for position in range(start, pos):
            end = used + int.from_bytes(out[used + 16 : used + 18], "little")  # d_reclen
            try:
                task.mm.write(dirp + used, out[used:end])
            except Errno:
                if not used:
                    raise
                break
            used = end
            file.pos = position + 1
        return used


@syscall(217)
def getdents64(task: Task, fd: Fd, dirp: UserPtr, count: UInt) -> int:
    try:
        file, entries = _entries(task, fd)
    except NotADirectoryError:
        return -errno.ENOTDIR
    count = min(count, _MOST) if count <= 0x7FFFFFFF else 0  # an int in Linux: too small
    pos = start = file.pos
    parts = []
    used = 0
    padding = _PADDING
    for name, ino, kind in entries[pos:] if pos else entries:
        length = len(name)
        size = (length + 27) & ~7  # 19 bytes before the name, a NUL after it
        used += size
        if used > count:
            used -= size
            break
        pos += 1
        parts.append(_pack64(ino, pos, size, kind))
        parts.append(name)
        parts.append(padding[size - 19 - length])
    if pos == start:
        return -errno.EINVAL if start < len(entries) else 0
    return _put(task, file, dirp, b"".join(parts), start, pos)


@syscall(78)
def getdents(task: Task, fd: Fd, dirp: UserPtr, count: UInt) -> int:
    try:
        file, entries = _entries(task, fd)
    except NotADirectoryError:
        return -errno.ENOTDIR
    count = min(count, _MOST) if count <= 0x7FFFFFFF else 0  # an int in Linux: too small
    pos = start = file.pos
    out = bytearray()
    for name, ino, kind in entries[pos:]:
        size = (18 + len(name) + 2 + 7) & ~7  # header, name, NUL, type
        if len(out) + size > count:
            break
        pos += 1
        out += _pack(ino, pos, size) + name
        out += bytes(size - 18 - len(name) - 1)
        out.append(kind)
    if pos == start:
        return -errno.EINVAL if start < len(entries) else 0
    return _put(task, file, dirp, out, start, pos)
