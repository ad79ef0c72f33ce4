"""System calls that take paths: opening, looking, making, removing, renaming, changing (path_resolution(7))."""

from __future__ import annotations

import errno
import time
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs import ops, vfs
from kvmsentry.fs.stat import pack_stat, pack_statfs, pack_statx
from kvmsentry.fs.vfs import (
    FOLLOW,
    MAY_EXEC,
    O_CLOEXEC,
    O_CREAT,
    O_LARGEFILE,
    O_PATH,
    O_TMPFILE,
    O_TRUNC,
    O_WRONLY,
    PATH_MAX,
    File,
    Inode,
    path_of,
    permission,
    walk,
)  # fmt: skip
from kvmsentry.kernel.task import RLIMIT_FSIZE, RLIMIT_NOFILE, Credentials, Task
from kvmsentry.syscall.abi_fs import (
    AT_EACCESS,
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_NO_AUTOMOUNT,
    AT_REMOVEDIR,
    AT_STATX_RESERVED,
    AT_STATX_SYNC_TYPE,
    AT_SYMLINK_FOLLOW,
    AT_SYMLINK_NOFOLLOW,
    OPEN_HOW,
    RESOLVE_BENEATH,
    RESOLVE_CACHED,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    TIMESPEC2,
    UTIMBUF,
    UTIME_NOW,
    UTIME_OMIT,
)  # fmt: skip
from kvmsentry.syscall.table import (
    DirFd,
    Fd,
    Int,
    Mode,
    Offset,
    OpenFlags,
    Path,
    Size,
    UInt,
    UserPtr,
    syscall,
)  # fmt: skip

CAP_DAC_READ_SEARCH, CAP_SYS_CHROOT = 2, 18  # uapi/linux/capability.h
S_IFMT, S_IFDIR, S_IFLNK = 0o170000, 0o040000, 0o120000
_SECOND = 1_000_000_000
_FCNTL_FLAGS = 0o37777703  # VALID_OPEN_FLAGS, include/linux/fcntl.h: what open(2) knows


def start_of(task: Task, dirfd: int, path: bytes) -> vfs.Path | None:
    """Where a relative `path` begins: None for the working directory. EBADF, ENOTDIR."""
    if dirfd == AT_FDCWD or path[:1] == b"/" or not path:
        return None
    place = task.files.get(dirfd).path
    if place is None:
        raise Errno(errno.ENOTDIR)
    return place


def place_at(task: Task, dirfd: int, path: bytes, follow: bool, empty: bool = False) -> vfs.Path:
    """The existing place of (dirfd, path); an empty path is dirfd itself if `empty` (AT_EMPTY_PATH)."""
    if not path and empty:
        if dirfd == AT_FDCWD:
            return task.fs.cwd
        file = task.files.get(dirfd)
        if file.path is None:
            from kvmsentry.fs.anon import place_of

            return place_of(file)
        return file.path
    return walk(task, path, start_of(task, dirfd, path), FOLLOW if follow else 0)


def inode_at(task: Task, dirfd: int, pathname: int, flags: int) -> tuple[Inode, vfs.Path | None]:
    """For calls that look: the inode, and its place where it has one."""
    if flags & AT_EMPTY_PATH and (not pathname or task.mm.read(pathname, 1) == b"\0"):  # fstat(2) of most libraries
        if dirfd == AT_FDCWD:
            return task.fs.cwd.inode, task.fs.cwd
        file = task.files.get(dirfd)
        return file.inode, file.path
    path = task.mm.read_cstring(pathname, PATH_MAX)
    place = walk(task, path, start_of(task, dirfd, path), 0 if flags & AT_SYMLINK_NOFOLLOW else FOLLOW)
    return place.inode, place


# -- opening
def _open(task: Task, dirfd: int, path: bytes, flags: int, mode: int, resolve: int = 0) -> Any:
    files = task.files
    limit = task.rlimit(RLIMIT_NOFILE)
    if len(files.files) >= limit:
        files.check_room(limit)
    file = ops.open_at(task, None if dirfd == AT_FDCWD else start_of(task, dirfd, path), path, flags, mode, resolve)
    if isinstance(file, File):
        return files.install(file, limit, 0, bool(flags & O_CLOEXEC))
    return _install_later(task, file, flags)


async def _install_later(task: Task, opening: Any, flags: int) -> int:
    file = await opening
    try:
        return task.files.install(file, task.rlimit(RLIMIT_NOFILE), 0, bool(flags & O_CLOEXEC))
    except Errno:
        file.put()
        raise


@syscall(2)
def sys_open(task: Task, pathname: Path, flags: OpenFlags, mode: Mode) -> Any:
    return _open(task, AT_FDCWD, task.mm.read_cstring(pathname, PATH_MAX), flags | O_LARGEFILE, mode)


@syscall(85)
def creat(task: Task, pathname: Path, mode: Mode) -> Any:
    flags = O_CREAT | O_WRONLY | O_TRUNC | O_LARGEFILE
    return _open(task, AT_FDCWD, task.mm.read_cstring(pathname, PATH_MAX), flags, mode)


@syscall(257)
def openat(task: Task, dirfd: DirFd, pathname: Path, flags: OpenFlags, mode: Mode) -> Any:
    return _open(task, dirfd, task.mm.read_cstring(pathname, PATH_MAX), flags | O_LARGEFILE, mode)


@syscall(437, partial="RESOLVE_CACHED is EAGAIN")
def openat2(task: Task, dirfd: DirFd, pathname: Path, how: UserPtr, size: Size) -> Any:
    if size < OPEN_HOW.size:
        return -errno.EINVAL
    if size > 4096:
        return -errno.E2BIG
    flags, mode, resolve = task.mm.read_struct(OPEN_HOW, how)
    if size > OPEN_HOW.size and any(task.mm.read(how + OPEN_HOW.size, size - OPEN_HOW.size)):
        return -errno.E2BIG
    if flags & ~_FCNTL_FLAGS or resolve & ~0x3F or mode & ~0o7777:
        return -errno.EINVAL
    if mode and not flags & (O_CREAT | O_TMPFILE & ~vfs.O_DIRECTORY):
        return -errno.EINVAL
    if flags & O_PATH and flags & ~(O_PATH | vfs.O_DIRECTORY | vfs.O_NOFOLLOW | O_CLOEXEC):
        return -errno.EINVAL
    if resolve & RESOLVE_BENEATH and resolve & RESOLVE_IN_ROOT:
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX)
    if resolve & RESOLVE_CACHED:
        return -errno.EAGAIN
    walk_flags = 0
    for bit, flag in ((RESOLVE_NO_XDEV, vfs.NO_XDEV), (RESOLVE_NO_MAGICLINKS, vfs.NO_MAGICLINKS),
                      (RESOLVE_NO_SYMLINKS, vfs.NO_SYMLINKS), (RESOLVE_BENEATH, vfs.BENEATH),
                      (RESOLVE_IN_ROOT, vfs.IN_ROOT)):  # fmt: skip
        if resolve & bit:
            walk_flags |= flag
    if walk_flags & vfs.IN_ROOT and dirfd != AT_FDCWD:  # an absolute path begins at dirfd too
        start = task.files.get(dirfd).path
        if start is None:
            return -errno.ENOTDIR
        limit = task.rlimit(RLIMIT_NOFILE)
        file = ops.open_at(task, start, path, flags, mode, walk_flags)
        if not isinstance(file, File):
            return _install_later(task, file, flags)
        try:
            return task.files.install(file, limit, 0, bool(flags & O_CLOEXEC))
        except Errno:
            file.put()
            raise
    return _open(task, dirfd, path, flags, mode, walk_flags)


# -- looking
@syscall(4)
def stat(task: Task, pathname: Path, statbuf: UserPtr) -> int:
    mm = task.mm
    mm.write(statbuf, pack_stat(walk(task, mm.read_cstring(pathname, PATH_MAX)).inode, task.creds.user_ns))
    return 0


@syscall(6)
def lstat(task: Task, pathname: Path, statbuf: UserPtr) -> int:
    mm = task.mm
    mm.write(statbuf, pack_stat(walk(task, mm.read_cstring(pathname, PATH_MAX), None, 0).inode, task.creds.user_ns))
    return 0


@syscall(5)
def fstat(task: Task, fd: Fd, statbuf: UserPtr) -> int:
    task.mm.write(statbuf, pack_stat(task.files.get(fd).inode, task.creds.user_ns))
    return 0


@syscall(262)
def newfstatat(task: Task, dirfd: DirFd, pathname: Path, statbuf: UserPtr, flags: Int) -> int:
    if flags & ~(AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_EMPTY_PATH):
        return -errno.EINVAL
    inode, _ = inode_at(task, dirfd, pathname, flags)
    task.mm.write(statbuf, pack_stat(inode, task.creds.user_ns))
    return 0


@syscall(332)
def statx(task: Task, dirfd: DirFd, pathname: Path, flags: UInt, mask: UInt, buf: UserPtr) -> int:
    if mask & AT_STATX_RESERVED or flags & AT_STATX_SYNC_TYPE == AT_STATX_SYNC_TYPE:
        return -errno.EINVAL
    if flags & ~(AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_EMPTY_PATH | AT_STATX_SYNC_TYPE):
        return -errno.EINVAL
    inode, place = inode_at(task, dirfd, pathname, flags)
    task.mm.write(buf, pack_statx(inode, place, task.creds.user_ns))
    return 0


def _real_credentials(creds: Credentials) -> Credentials:
    """access(2) asks for the real ids (access_override_creds, fs/open.c)."""
    capabilities = creds.permitted if creds.uid == 0 else 0
    if creds.fsuid == creds.uid and creds.fsgid == creds.gid and creds.effective == capabilities:
        return creds
    return creds.replace(fsuid=creds.uid, fsgid=creds.gid, effective=capabilities)


def _access(task: Task, dirfd: int, pathname: int, mode: int, flags: int) -> int:
    if mode & ~7 or flags & ~(AT_EACCESS | AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH):
        return -errno.EINVAL
    path = b"" if flags & AT_EMPTY_PATH and not pathname else task.mm.read_cstring(pathname, PATH_MAX)
    old = task.creds
    creds = old if flags & AT_EACCESS else _real_credentials(old)
    task.creds = creds  # the walk asks as the same person
    try:
        place = place_at(task, dirfd, path, not flags & AT_SYMLINK_NOFOLLOW, bool(flags & AT_EMPTY_PATH))
        ops.access(task, place, mode, creds)
    finally:
        task.creds = old
    return 0


@syscall(21)
def access(task: Task, pathname: Path, mode: Int) -> int:
    return _access(task, AT_FDCWD, pathname, mode, 0)


@syscall(269)
def faccessat(task: Task, dirfd: DirFd, pathname: Path, mode: Int) -> int:
    return _access(task, dirfd, pathname, mode, 0)


@syscall(439)
def faccessat2(task: Task, dirfd: DirFd, pathname: Path, mode: Int, flags: Int) -> int:
    return _access(task, dirfd, pathname, mode, flags)


def _readlink(task: Task, dirfd: int, pathname: int, buf: int, size: int) -> int:
    if size <= 0:
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX)
    if not path and dirfd != AT_FDCWD:
        inode = task.files.get(dirfd).inode
        if inode.mode & S_IFMT != S_IFLNK:
            return -errno.ENOENT
    else:
        inode = walk(task, path, start_of(task, dirfd, path), 0).inode
    target = inode.readlink(task)[:size]
    task.mm.write(buf, target)
    return len(target)


@syscall(89)
def readlink(task: Task, pathname: Path, buf: UserPtr, bufsiz: Int) -> int:
    return _readlink(task, AT_FDCWD, pathname, buf, bufsiz)


@syscall(267)
def readlinkat(task: Task, dirfd: DirFd, pathname: Path, buf: UserPtr, bufsiz: Int) -> int:
    return _readlink(task, dirfd, pathname, buf, bufsiz)


@syscall(137)
def statfs(task: Task, pathname: Path, buf: UserPtr) -> int:
    place = walk(task, task.mm.read_cstring(pathname, PATH_MAX))
    task.mm.write(buf, pack_statfs(place.inode, place.mount))
    return 0


@syscall(138)
def fstatfs(task: Task, fd: Fd, buf: UserPtr) -> int:
    file = task.files.get(fd)
    task.mm.write(buf, pack_statfs(file.inode, file.path.mount if file.path is not None else None))
    return 0


# -- making and removing
def _mkdir(task: Task, dirfd: int, pathname: int, mode: int) -> int:
    path = task.mm.read_cstring(pathname, PATH_MAX)
    ops.mkdir_at(task, start_of(task, dirfd, path), path, mode)
    return 0


@syscall(83)
def mkdir(task: Task, pathname: Path, mode: Mode) -> int:
    return _mkdir(task, AT_FDCWD, pathname, mode)


@syscall(258)
def mkdirat(task: Task, dirfd: DirFd, pathname: Path, mode: Mode) -> int:
    return _mkdir(task, dirfd, pathname, mode)


def _mknod(task: Task, dirfd: int, pathname: int, mode: int, dev: int) -> int:
    ops.check_kind(mode)
    path = task.mm.read_cstring(pathname, PATH_MAX)
    ops.mknod_at(task, start_of(task, dirfd, path), path, mode & 0xFFFF, dev)
    return 0


@syscall(133)
def mknod(task: Task, pathname: Path, mode: Mode, dev: UInt) -> int:
    return _mknod(task, AT_FDCWD, pathname, mode, dev)


@syscall(259)
def mknodat(task: Task, dirfd: DirFd, pathname: Path, mode: Mode, dev: UInt) -> int:
    return _mknod(task, dirfd, pathname, mode, dev)


@syscall(84)
def rmdir(task: Task, pathname: Path) -> int:
    ops.rmdir_at(task, None, task.mm.read_cstring(pathname, PATH_MAX))
    return 0


@syscall(87)
def unlink(task: Task, pathname: Path) -> int:
    ops.unlink_at(task, None, task.mm.read_cstring(pathname, PATH_MAX))
    return 0


@syscall(263)
def unlinkat(task: Task, dirfd: DirFd, pathname: Path, flags: Int) -> int:
    if flags & ~AT_REMOVEDIR:
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX)
    (ops.rmdir_at if flags & AT_REMOVEDIR else ops.unlink_at)(task, start_of(task, dirfd, path), path)
    return 0


def _symlink(task: Task, target: int, dirfd: int, linkpath: int) -> int:
    text = task.mm.read_cstring(target, PATH_MAX)
    path = task.mm.read_cstring(linkpath, PATH_MAX)
    ops.symlink_at(task, text, start_of(task, dirfd, path), path)
    return 0


@syscall(88)
def symlink(task: Task, target: Path, linkpath: Path) -> int:
    return _symlink(task, target, AT_FDCWD, linkpath)


@syscall(266)
def symlinkat(task: Task, target: Path, newdirfd: DirFd, linkpath: Path) -> int:
    return _symlink(task, target, newdirfd, linkpath)


def _link(task: Task, olddirfd: int, oldpath: int, newdirfd: int, newpath: int, flags: int) -> int:
    if flags & ~(AT_SYMLINK_FOLLOW | AT_EMPTY_PATH):
        return -errno.EINVAL
    old = task.mm.read_cstring(oldpath, PATH_MAX)
    if flags & AT_EMPTY_PATH and not old and not task.creds.capable(CAP_DAC_READ_SEARCH):
        return -errno.ENOENT
    place = place_at(task, olddirfd, old, bool(flags & AT_SYMLINK_FOLLOW), bool(flags & AT_EMPTY_PATH))
    new = task.mm.read_cstring(newpath, PATH_MAX)
    ops.link_at(task, place, start_of(task, newdirfd, new), new)
    return 0


@syscall(86)
def link(task: Task, oldpath: Path, newpath: Path) -> int:
    return _link(task, AT_FDCWD, oldpath, AT_FDCWD, newpath, 0)


@syscall(265)
def linkat(task: Task, olddirfd: DirFd, oldpath: Path, newdirfd: DirFd, newpath: Path, flags: Int) -> int:
    return _link(task, olddirfd, oldpath, newdirfd, newpath, flags)


def _rename(task: Task, olddirfd: int, oldpath: int, newdirfd: int, newpath: int, flags: int) -> int:
    ops.check_rename_flags(flags)
    old = task.mm.read_cstring(oldpath, PATH_MAX)
    try:
        new = task.mm.read_cstring(newpath, PATH_MAX)
    except Errno:
        vfs.walk_parent(task, old, start_of(task, olddirfd, old))  # what is wrong with it comes first (do_renameat2)
        raise
    ops.rename_at(task, start_of(task, olddirfd, old), old, start_of(task, newdirfd, new), new, flags)
    return 0


@syscall(82)
def rename(task: Task, oldpath: Path, newpath: Path) -> int:
    return _rename(task, AT_FDCWD, oldpath, AT_FDCWD, newpath, 0)


@syscall(264)
def renameat(task: Task, olddirfd: DirFd, oldpath: Path, newdirfd: DirFd, newpath: Path) -> int:
    return _rename(task, olddirfd, oldpath, newdirfd, newpath, 0)


@syscall(316, partial="RENAME_WHITEOUT is EINVAL")
def renameat2(task: Task, olddirfd: DirFd, oldpath: Path, newdirfd: DirFd, newpath: Path, flags: UInt) -> int:
    return _rename(task, olddirfd, oldpath, newdirfd, newpath, flags)


# -- changing
def _chmod(task: Task, dirfd: int, pathname: int, mode: int, flags: int) -> int:
    if flags & ~(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH):
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX)
    place = place_at(task, dirfd, path, not flags & AT_SYMLINK_NOFOLLOW, bool(flags & AT_EMPTY_PATH))
    ops.chmod(task, place, place.inode, mode)
    return 0


@syscall(90)
def chmod(task: Task, pathname: Path, mode: Mode) -> int:
    return _chmod(task, AT_FDCWD, pathname, mode, 0)


@syscall(268)
def fchmodat(task: Task, dirfd: DirFd, pathname: Path, mode: Mode) -> int:
    return _chmod(task, dirfd, pathname, mode, 0)


@syscall(452)
def fchmodat2(task: Task, dirfd: DirFd, pathname: Path, mode: Mode, flags: UInt) -> int:
    return _chmod(task, dirfd, pathname, mode, flags)


@syscall(91)
def fchmod(task: Task, fd: Fd, mode: Mode) -> int:
    file = task.files.get_io(fd)
    ops.chmod(task, file.path, file.inode, mode)
    return 0


def _chown(task: Task, dirfd: int, pathname: int, owner: int, group: int, flags: int) -> int:
    if flags & ~(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH):
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX)
    place = place_at(task, dirfd, path, not flags & AT_SYMLINK_NOFOLLOW, bool(flags & AT_EMPTY_PATH))
    ops.chown(task, place, place.inode, owner, group)
    return 0


@syscall(92)
def chown(task: Task, pathname: Path, owner: UInt, group: UInt) -> int:
    return _chown(task, AT_FDCWD, pathname, owner, group, 0)


@syscall(94)
def lchown(task: Task, pathname: Path, owner: UInt, group: UInt) -> int:
    return _chown(task, AT_FDCWD, pathname, owner, group, AT_SYMLINK_NOFOLLOW)


@syscall(260)
def fchownat(task: Task, dirfd: DirFd, pathname: Path, owner: UInt, group: UInt, flags: Int) -> int:
    return _chown(task, dirfd, pathname, owner, group, flags)


@syscall(93)
def fchown(task: Task, fd: Fd, owner: UInt, group: UInt) -> int:
    file = task.files.get_io(fd)
    ops.chown(task, file.path, file.inode, owner, group)
    return 0


def _timespec(seconds: int, nanoseconds: int, now: int) -> int | None:
    if nanoseconds == UTIME_NOW:
        return now
    if nanoseconds == UTIME_OMIT:
        return None
    if not 0 <= nanoseconds < _SECOND:
        raise Errno(errno.EINVAL)
    return _clamp(seconds) * _SECOND + nanoseconds


def _clamp(seconds: int) -> int:
    """Times beyond what nanoseconds in 64 bits hold are cut, as timestamp_truncate does by the file system's range."""
    return max(-(1 << 33), min(seconds, 1 << 33))


def _set_times(
    task: Task, dirfd: int, path: bytes | None, times: tuple[int | None, int | None] | None, flags: int
) -> int:
    if path is None:
        file = task.files.get_io(dirfd)
        ops.set_times(task, file.path, file.inode, times)
        return 0
    place = place_at(task, dirfd, path, not flags & AT_SYMLINK_NOFOLLOW, bool(flags & AT_EMPTY_PATH))
    ops.set_times(task, place, place.inode, times)
    return 0


@syscall(280)
def utimensat(task: Task, dirfd: DirFd, pathname: Path, times: UserPtr, flags: Int) -> int:
    values = task.mm.read_struct(TIMESPEC2, times) if times else ()
    if flags & ~(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH):
        return -errno.EINVAL
    both: tuple[int | None, int | None] | None = None
    if values:
        if values[1] == UTIME_OMIT and values[3] == UTIME_OMIT:
            return 0
        if values[1] != UTIME_NOW or values[3] != UTIME_NOW:
            now = time.time_ns()
            both = _timespec(values[0], values[1], now), _timespec(values[2], values[3], now)
    if not pathname and dirfd == AT_FDCWD:
        return -errno.EFAULT
    if not pathname and flags:
        return -errno.EINVAL
    path = task.mm.read_cstring(pathname, PATH_MAX) if pathname else None
    return _set_times(task, dirfd, path, both, flags)


def _timevals(task: Task, times: int) -> tuple[int | None, int | None] | None:
    if not times:
        return None
    a, a_us, m, m_us = task.mm.read_struct(TIMESPEC2, times)
    if not (0 <= a_us < 1_000_000 and 0 <= m_us < 1_000_000):
        raise Errno(errno.EINVAL)
    return _clamp(a) * _SECOND + a_us * 1000, _clamp(m) * _SECOND + m_us * 1000


@syscall(235)
def utimes(task: Task, filename: Path, times: UserPtr) -> int:
    both = _timevals(task, times)
    return _set_times(task, AT_FDCWD, task.mm.read_cstring(filename, PATH_MAX), both, 0)


@syscall(261)
def futimesat(task: Task, dirfd: DirFd, pathname: Path, times: UserPtr) -> int:
    both = _timevals(task, times)
    return _set_times(task, dirfd, task.mm.read_cstring(pathname, PATH_MAX) if pathname else None, both, 0)


@syscall(132)
def utime(task: Task, filename: Path, times: UserPtr) -> int:
    both: tuple[int | None, int | None] | None = None
    if times:
        actime, modtime = task.mm.read_struct(UTIMBUF, times)
        both = _clamp(actime) * _SECOND, _clamp(modtime) * _SECOND
    return _set_times(task, AT_FDCWD, task.mm.read_cstring(filename, PATH_MAX), both, 0)


@syscall(76)
def truncate(task: Task, pathname: Path, length: Offset) -> Any:
    if length < 0:
        return -errno.EINVAL
    if length > task.rlimit(RLIMIT_FSIZE):
        return _file_size_signal(task)
    return ops.truncate_at(task, task.mm.read_cstring(pathname, PATH_MAX), length)


def _file_size_signal(task: Task) -> int:
    from kvmsentry.kernel import signals
    from kvmsentry.kernel.task import SigInfo

    signals.send_task(task, SigInfo(25))  # SIGXFSZ
    return -errno.EFBIG


# -- where a process is
def _directory(task: Task, place: vfs.Path) -> vfs.Path:
    inode = place.inode
    if inode.mode & S_IFMT != S_IFDIR:
        raise Errno(errno.ENOTDIR)
    permission(inode, MAY_EXEC, task.creds)
    return place


@syscall(80)
def chdir(task: Task, pathname: Path) -> int:
    task.fs.cwd = _directory(task, walk(task, task.mm.read_cstring(pathname, PATH_MAX)))
    return 0


@syscall(81)
def fchdir(task: Task, fd: Fd) -> int:
    place = task.files.get(fd).path
    if place is None:
        return -errno.ENOTDIR
    task.fs.cwd = _directory(task, place)
    return 0


@syscall(161)
def chroot(task: Task, pathname: Path) -> int:
    place = _directory(task, walk(task, task.mm.read_cstring(pathname, PATH_MAX)))
    if not task.creds.holds(CAP_SYS_CHROOT):
        return -errno.EPERM
    task.fs.root = place
    return 0


@syscall(79)
def getcwd(task: Task, buf: UserPtr, size: Size) -> int:
    fs = task.fs
    if fs.cwd.dentry.unlinked:
        return -errno.ENOENT
    path = path_of(fs.cwd, fs.root) + b"\0"
    if len(path) > size:
        return -errno.ERANGE
    if len(path) > PATH_MAX:
        return -errno.ENAMETOOLONG
    task.mm.write(buf, path)
    return len(path)


@syscall(95)
def umask(task: Task, mask: Mode) -> int:
    old = task.fs.umask
    task.fs.umask = mask & 0o777
    return old


# -- file systems as a whole
@syscall(162)
def sync(task: Task) -> int:
    from kvmsentry.fs.mounttree import all_mounts

    for sb in {mount.sb for mount in all_mounts(task)}:
        sb.sync()
    return 0


@syscall(306)
def syncfs(task: Task, fd: Fd) -> int:
    task.files.get_io(fd).inode.sb.sync()
    return 0
