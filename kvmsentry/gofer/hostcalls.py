"""Host system calls that Python 3.11's os module lacks.

All but `call` raise OSError with the host's errno. Numbers are x86-64's (arch/x86/entry/syscalls/syscall_64.tbl),
structures and flags from include/uapi/linux.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

from kvmsentry.gofer._host import ffi, lib

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
AT_RECURSIVE = 0x8000

SYS_CONNECT, SYS_CAPGET, SYS_CAPSET, SYS_FSTATFS, SYS_PIVOT_ROOT, SYS_PRCTL = 42, 125, 126, 138, 155, 157
SYS_MOUNT, SYS_UMOUNT2, SYS_FCHOWNAT, SYS_UNSHARE, SYS_UTIMENSAT = 165, 166, 260, 272, 280
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


def call(number: int, *arguments: int | bytes | bytearray | None) -> int:
    """syscall(2) with up to six arguments, its result or -errno. Buffers go by address (those of bytes end in a NUL),
    None is 0."""
    held: list[Any] = []  # what is pointed at lives until the call is over
    words = ffi.new("uint64_t[6]")
    for index, argument in enumerate(arguments):
        if isinstance(argument, int):
            words[index] = argument & 0xFFFF_FFFF_FFFF_FFFF
        elif argument is not None:
            held.append(ffi.from_buffer(argument))
            words[index] = int(ffi.cast("uintptr_t", held[-1]))
    result: int = lib.kg_syscall(number, words)
    return result


def _call(number: int, *arguments: int | bytes | bytearray | None) -> int:
    result = call(number, *arguments)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def fchmod_path(fd: int, mode: int) -> None:
    """chmod of what an O_PATH descriptor names: fchmodat2(2), Linux 6.6; OSError ENOSYS before."""
    _call(SYS_FCHMODAT2, fd, b"", mode, AT_EMPTY_PATH)


def fchown_path(fd: int, uid: int, gid: int) -> None:
    """chown of what an O_PATH descriptor names (a symlink itself included); 0xffffffff leaves an id alone."""
    _call(SYS_FCHOWNAT, fd, b"", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW)


def utimens_path(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2) of what an O_PATH descriptor names; (seconds, nanoseconds), UTIME_NOW and UTIME_OMIT allowed."""
    times = struct.pack("=qqqq", *atime, *mtime)
    _call(SYS_UTIMENSAT, fd, b"", times, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW)


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _call(SYS_RENAMEAT2, old_dir, old, new_dir, new, flags)


def fstatfs(fd: int) -> tuple[int, ...]:
    """fstatfs(2): (type, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen)."""
    buf = bytearray(256)
    _call(SYS_FSTATFS, fd, buf)
    kind, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen = struct.unpack_from("=qqQQQQQQq", buf)
    return kind, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen


def unshare(flags: int) -> None:
    """unshare(2)."""
    _call(SYS_UNSHARE, flags)


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _call(SYS_SETNS, fd, kind)


def mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    """mount(2)."""
    _call(SYS_MOUNT, source, target, kind, flags, data)


def umount2(target: bytes, flags: int) -> None:
    """umount2(2)."""
    _call(SYS_UMOUNT2, target, flags)


def pivot_root(new: bytes, old: bytes) -> None:
    """pivot_root(2)."""
    _call(SYS_PIVOT_ROOT, new, old)


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
    _call(SYS_PRCTL, option, *args)


def _capability_header() -> bytearray:
    return bytearray(struct.pack("=Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3, the calling thread


def effective_capabilities() -> int:
    """The calling thread's effective capabilities as a bit mask (capget(2))."""
    data = bytearray(24)
    _call(SYS_CAPGET, _capability_header(), data)
    words = struct.unpack("=6I", data)
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
    _call(SYS_CAPSET, _capability_header(), struct.pack("=6I", low, low, 0, high, high, 0))


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor of this process that is not in `keep`."""
    first = 0
    for fd in [*sorted(keep), 0xFFFFFFFF + 1]:
        if fd > first:
            _call(SYS_CLOSE_RANGE, first, fd - 1, 0)
        first = fd + 1
