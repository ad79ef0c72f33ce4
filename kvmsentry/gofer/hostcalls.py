"""Host system calls that Python 3.11's os module lacks, through ctypes.

All raise OSError with the host's errno. Numbers are x86-64's (arch/x86/entry/syscalls/syscall_64.tbl), structures and
flags from include/uapi/linux.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
AT_RECURSIVE = 0x8000

SYS_SETNS, SYS_RENAMEAT2, SYS_OPEN_TREE, SYS_MOVE_MOUNT = 308, 316, 428, 429
SYS_CLOSE_RANGE, SYS_MOUNT_SETATTR, SYS_FCHMODAT2 = 436, 442, 452

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH = 2
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_CAPBSET_DROP = 1, 4, 15, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID = 0, 1, 2, 3, 4

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


def _failed() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _call(number: int, *args: int | bytes | None) -> int:
    """syscall(2); ints are passed as longs."""
    result: int = _syscall(
        ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in args]
    )
    if result < 0:
        raise _failed()
    return result


def fchmod_path(fd: int, mode: int) -> None:
    """chmod of what an O_PATH descriptor names: fchmodat2(2), Linux 6.6; OSError ENOSYS before."""
    _call(SYS_FCHMODAT2, fd, b"", mode, AT_EMPTY_PATH)


def fchown_path(fd: int, uid: int, gid: int) -> None:
    """chown of what an O_PATH descriptor names (a symlink itself included); 0xffffffff leaves an id alone."""
    if _libc.fchownat(fd, b"", ctypes.c_uint(uid), ctypes.c_uint(gid), AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW):
        raise _failed()


def utimens_path(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2) of what an O_PATH descriptor names; (seconds, nanoseconds), UTIME_NOW and UTIME_OMIT allowed."""
    times = struct.pack("=qqqq", *atime, *mtime)
    if _libc.utimensat(fd, b"", times, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW):
        raise _failed()


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _call(SYS_RENAMEAT2, old_dir, old, new_dir, new, flags)


def fstatfs(fd: int) -> tuple[int, ...]:
    """fstatfs(2): (type, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen)."""
    buf = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buf):
        raise _failed()
    kind, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen = struct.unpack_from("=qqQQQQQQq", buf)
    return kind, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen


def unshare(flags: int) -> None:
    """unshare(2)."""
    if _libc.unshare(ctypes.c_int(flags)):
        raise _failed()


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _call(SYS_SETNS, fd, kind)


def mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    """mount(2)."""
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), data):
        raise _failed()


def umount2(target: bytes, flags: int) -> None:
    """umount2(2)."""
    if _libc.umount2(target, flags):
        raise _failed()


def pivot_root(new: bytes, old: bytes) -> None:
    """pivot_root(2)."""
    _call(155, new, old)


def open_tree(path: bytes) -> int:
    """A detached, recursive copy of the mount at `path` (open_tree(2), Linux 5.2), as a descriptor."""
    return _call(SYS_OPEN_TREE, AT_FDCWD, path, OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE)


def move_mount(fd: int, target: bytes) -> None:
    """Attach a detached mount at `target` (move_mount(2))."""
    _call(SYS_MOVE_MOUNT, fd, b"", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH)


def mount_setattr(fd: int, attributes: int) -> None:
    """Set MOUNT_ATTR_* on a mount and all beneath it, and make them private (mount_setattr(2), Linux 5.12)."""
    attr = struct.pack("=QQQQ", attributes, 0, MS_PRIVATE, 0)
    _call(SYS_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH | AT_RECURSIVE, attr, len(attr))


def prctl(option: int, *args: int | bytes) -> None:
    """prctl(2)."""
    values = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_ulong(a) for a in args]
    values += [ctypes.c_ulong(0)] * (4 - len(values))
    if _libc.prctl(option, *values) < 0:
        raise _failed()


def effective_capabilities() -> int:
    """The calling thread's effective capabilities as a bit mask (capget(2))."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data):
        raise _failed()
    words = struct.unpack("=6I", data.raw[:24])
    return int(words[0] | words[3] << 32)


def keep_capabilities(keep: int) -> None:
    """Drop every capability outside the mask `keep` from the bounding, ambient, permitted and effective sets."""
    have = effective_capabilities()
    if have & 1 << 8:  # CAP_SETPCAP: without it there is nothing to drop from the bounding set either
        for cap in range(64):
            if not keep >> cap & 1:
                try:
                    prctl(PR_CAPBSET_DROP, cap)
                except OSError as problem:
                    if problem.errno == errno.EINVAL:
                        break  # past the last capability this host knows
                    raise
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    keep &= have
    low, high = keep & 0xFFFFFFFF, keep >> 32
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0))
    if _libc.capset(header, data):
        raise _failed()


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor of this process that is not in `keep`."""
    first = 0
    for fd in [*sorted(keep), 0xFFFFFFFF + 1]:
        if fd > first:
            _call(SYS_CLOSE_RANGE, first, fd - 1, 0)
        first = fd + 1
