"""Extended attributes: the twelve calls of xattr(7), over Inode.getxattr and its kin."""

from __future__ import annotations

import errno

from kvmsentry.errors import Errno
from kvmsentry.fs import vfs
from kvmsentry.fs.ops import IN_ATTRIB, changed, owner_or_capable, want_write
from kvmsentry.fs.vfs import FOLLOW, MAY_READ, MAY_WRITE, PATH_MAX, Inode, permission, walk
from kvmsentry.kernel import filecaps
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.table import Fd, Int, Path, Size, UserPtr, syscall

XATTR_NAME_MAX, XATTR_SIZE_MAX, XATTR_LIST_MAX = 255, 65536, 65536  # uapi/linux/limits.h
CAP_FOWNER, CAP_SYS_ADMIN, CAP_SETFCAP = 3, 21, 31  # uapi/linux/capability.h


def _at(task: Task, pathname: int, flags: int) -> tuple[Inode, vfs.Path | None]:
    place = walk(task, task.mm.read_cstring(pathname, PATH_MAX), None, flags)
    return place.inode, place


def _of(task: Task, fd: int) -> tuple[Inode, vfs.Path | None]:
    file = task.files.get_io(fd)
    return file.inode, file.path


def _name(task: Task, pointer: int) -> bytes:
    """ERANGE for a name that is empty or too long."""
    try:
        name = task.mm.read_cstring(pointer, XATTR_NAME_MAX + 1)
    except Errno as error:
        raise Errno(errno.ERANGE if error.errno == errno.ENAMETOOLONG else error.errno) from None
    if not name or len(name) > XATTR_NAME_MAX:
        raise Errno(errno.ERANGE)
    return name


def _allowed(task: Task, inode: Inode, name: bytes, mask: int) -> None:
    """xattr_permission, fs/xattr.c, and what the handlers of the namespaces add."""
    creds = task.creds
    writes = mask == MAY_WRITE
    if name.startswith(b"trusted."):
        if not creds.capable(CAP_SYS_ADMIN):
            raise Errno(errno.EPERM if writes else errno.ENODATA)
        return
    if name.startswith(b"security."):
        if writes and not creds.capable(CAP_SETFCAP if name == b"security.capability" else CAP_SYS_ADMIN):
            raise Errno(errno.EPERM)
        return
    if not name.startswith(b"user.") or len(name) == 5:
        raise Errno(errno.EINVAL if name == b"user." else errno.EOPNOTSUPP)
    kind = inode.mode & 0o170000
    if kind not in (0o100000, 0o040000):
        raise Errno(errno.EPERM if writes else errno.ENODATA)
    if (
        kind == 0o040000
        and inode.mode & 0o1000
        and writes
        and not owner_or_capable(inode, creds)
    ):
        raise Errno(errno.EPERM)
    permission(inode, mask, creds)


def _set(task: Task, target: tuple[Inode, vfs.Path | None], name: int, value: int, size: int, flags: int) -> int:
    inode, place = target
    if flags & ~3:
        return -errno.EINVAL
    key = _name(task, name)
    if size > XATTR_SIZE_MAX:
        return -errno.E2BIG
    data = task.mm.read(value, size) if size else b""
    if place is not None:
        want_write(place.mount)
    _allowed(task, inode, key, MAY_WRITE)
    if key == filecaps.XATTR:
        filecaps.check(data)
    inode.setxattr(key, data, flags)
    if vfs.WATCHES:
        changed(place, inode, IN_ATTRIB)
    return 0


def _get(task: Task, target: tuple[Inode, vfs.Path | None], name: int, value: int, size: int) -> int:
    inode, _ = target
    key = _name(task, name)
    _allowed(task, inode, key, MAY_READ)
    data = inode.getxattr(key)
    if size:
        if len(data) > size:
            return -errno.ERANGE
        task.mm.write(value, data)
    return len(data)


def _list(task: Task, target: tuple[Inode, vfs.Path | None], buf: int, size: int) -> int:
    inode, _ = target
    names = inode.listxattr()
    if not task.creds.capable(CAP_SYS_ADMIN):
        names = [name for name in names if not name.startswith(b"trusted.")]
    data = b"".join([name + b"\0" for name in names])
    if len(data) > XATTR_LIST_MAX:
        return -errno.E2BIG
    if size:
        if len(data) > size:
            return -errno.ERANGE
        task.mm.write(buf, data)
    return len(data)


def _remove(task: Task, target: tuple[Inode, vfs.Path | None], name: int) -> int:
    inode, place = target
    key = _name(task, name)
    if place is not None:
        want_write(place.mount)
    _allowed(task, inode, key, MAY_WRITE)
    inode.removexattr(key)
    if vfs.WATCHES:
        changed(place, inode, IN_ATTRIB)
    return 0


@syscall(188)
def setxattr(task: Task, pathname: Path, name: UserPtr, value: UserPtr, size: Size, flags: Int) -> int:
    return _set(task, _at(task, pathname, FOLLOW), name, value, size, flags)


@syscall(189)
def lsetxattr(task: Task, pathname: Path, name: UserPtr, value: UserPtr, size: Size, flags: Int) -> int:
    return _set(task, _at(task, pathname, 0), name, value, size, flags)


@syscall(190)
def fsetxattr(task: Task, fd: Fd, name: UserPtr, value: UserPtr, size: Size, flags: Int) -> int:
    return _set(task, _of(task, fd), name, value, size, flags)


@syscall(191)
def getxattr(task: Task, pathname: Path, name: UserPtr, value: UserPtr, size: Size) -> int:
    return _get(task, _at(task, pathname, FOLLOW), name, value, size)


@syscall(192)
def lgetxattr(task: Task, pathname: Path, name: UserPtr, value: UserPtr, size: Size) -> int:
    return _get(task, _at(task, pathname, 0), name, value, size)


@syscall(193)
def fgetxattr(task: Task, fd: Fd, name: UserPtr, value: UserPtr, size: Size) -> int:
    return _get(task, _of(task, fd), name, value, size)


@syscall(194)
def listxattr(task: Task, pathname: Path, buf: UserPtr, size: Size) -> int:
    return _list(task, _at(task, pathname, FOLLOW), buf, size)


@syscall(195)
def llistxattr(task: Task, pathname: Path, buf: UserPtr, size: Size) -> int:
    return _list(task, _at(task, pathname, 0), buf, size)


@syscall(196)
def flistxattr(task: Task, fd: Fd, buf: UserPtr, size: Size) -> int:
    return _list(task, _of(task, fd), buf, size)


@syscall(197)
def removexattr(task: Task, pathname: Path, name: UserPtr) -> int:
    return _remove(task, _at(task, pathname, FOLLOW), name)


@syscall(198)
def lremovexattr(task: Task, pathname: Path, name: UserPtr) -> int:
    return _remove(task, _at(task, pathname, 0), name)


@syscall(199)
def fremovexattr(task: Task, fd: Fd, name: UserPtr) -> int:
    return _remove(task, _of(task, fd), name)
