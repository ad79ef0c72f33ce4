"""What is asked of an open file besides its data: fcntl(2), ioctl(2), flock(2), its size and its way to the disk."""

from __future__ import annotations

import errno
import os
import stat as st
import struct
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs import dnotify, leases, locks
from kvmsentry.fs.inotify import modified
from kvmsentry.fs.memfd import F_SEAL_EXEC, is_memfd, mapped_writable
from kvmsentry.fs.ops import owner_or_capable
from kvmsentry.fs.pipe import PipeFile
from kvmsentry.fs.proc.sysctl import sysctl
from kvmsentry.fs.tmpfs import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    TmpFile,
    TmpInode,
)
from kvmsentry.fs.vfs import FASYNC, O_APPEND, O_DIRECT, O_NOATIME, O_NONBLOCK, O_PATH, TASK_IO, WATCHES, File
from kvmsentry.kernel.hostwork import on_host
from kvmsentry.kernel.pidns import PidNamespace
from kvmsentry.kernel.task import RLIM_INFINITY, RLIMIT_FSIZE, RLIMIT_NOFILE, SigInfo
from kvmsentry.kernel.traps import Pace
from kvmsentry.kernel.userns import inode_capable, shown_uid
from kvmsentry.syscall.sys_io import LONG, install, limit_size, writable
from kvmsentry.syscall.table import Fd, Int, Offset, Size, UInt, ULong, syscall

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

# uapi/asm-generic/fcntl.h and uapi/linux/fcntl.h
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW = range(8)
F_SETOWN, F_GETOWN, F_SETSIG, F_GETSIG = 8, 9, 10, 11
F_SETOWN_EX, F_GETOWN_EX, F_GETOWNER_UIDS = 15, 16, 17
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
F_SETLEASE, F_GETLEASE, F_NOTIFY, F_DUPFD_QUERY = 1024, 1025, 1026, 1027
F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ, F_ADD_SEALS, F_GET_SEALS = 1030, 1031, 1032, 1033, 1034
F_GET_RW_HINT, F_SET_RW_HINT = 1035, 1036  # a file description's own, 1037 and 1038, went with Linux 5.17
F_OWNER_TID, F_OWNER_PID, F_OWNER_PGRP = 0, 1, 2
SETFL_MASK = O_APPEND | O_NONBLOCK | O_DIRECT | O_NOATIME | FASYNC  # include/linux/fcntl.h
ON_PATHS = {F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_QUERY}  # what O_PATH descriptors allow

# uapi/asm-generic/ioctls.h, uapi/linux/fs.h
FIONBIO, FIONREAD, FIONCLEX, FIOCLEX, FIOASYNC, FIOQSIZE, FIGETBSZ = 0x5421, 0x541B, 0x5450, 0x5451, 0x5452, 0x5460, 2
FICLONE, FICLONERANGE, FS_IOC_FIEMAP = 0x40049409, 0x4020940D, 0xC020660B

SIGIO = 29
POLL_IN, POLL_OUT, POLL_MSG, POLL_ERR, POLL_PRI, POLL_HUP = 1, 2, 3, 4, 5, 6  # si_code of SIGIO, siginfo.h
POLL_MSG_BAND = 0x441  # band_table in fs/fcntl.c: POLLIN | POLLRDNORM | POLLMSG
# What happened (poll's bits), and the si_code and si_band that tell it (the same table).
_BANDS = ((16, POLL_HUP, 0x18), (8, POLL_ERR, 0x08), (2, POLL_PRI, 0x82), (1, POLL_IN, 0x41), (4, POLL_OUT, 0x304))

CAP_FOWNER, CAP_LEASE = 3, 28

_flock = struct.Struct("<hhxxxxqqi4x")  # struct flock: type, whence, start, len, pid
_short = struct.Struct("<h")
_int = struct.Struct("<i")
_two_ints = struct.Struct("<ii")
_long = struct.Struct("<q")


class Owner:
    """Who gets SIGIO for a file (struct fown_struct): a thread, a process or a group, on behalf of whom, and which
    signal."""

    __slots__ = ("kind", "id", "uid", "euid", "signo")

    def __init__(self) -> None:
        self.kind, self.id, self.uid, self.euid, self.signo = F_OWNER_PID, 0, 0, 0, 0


class AsyncNotice:
    """Stands in the wait queue of a file with O_ASYNC and turns what happens into signals (kill_fasync, send_sigio).
    They tell `fd`, the descriptor it was asked for on, for ever (fa_fd)."""

    __slots__ = ("file", "kernel", "fd")

    def __init__(self, file: File, kernel: Any, fd: int) -> None:
        self.file, self.kernel, self.fd = file, kernel, fd

    def notify(self, mask: int) -> bool:
        """Something happened to the file; never takes the event from others."""
        code, band = next(((code, band) for bit, code, band in _BANDS if mask & bit), (POLL_IN, 0x41))
        self.send(code, band)
        return False

    def send(self, code: int, band: int) -> None:
        """The signal to the file's owner (send_sigio)."""
        from kvmsentry.kernel import signals

        owner = self.file.owner
        if owner is None or not owner.id:
            return
        info = SigInfo(owner.signo or SIGIO, code if owner.signo else 0x80, band=band, fd=self.fd)
        kernel = self.kernel
        if owner.kind == F_OWNER_PGRP:
            for session in kernel.sessions.values():
                group = session.groups.get(owner.id)
                if group is not None:
                    signals.send_group(group, info)
        elif owner.kind == F_OWNER_TID:
            task = kernel.tasks.get(owner.id)
            if task is not None:
                signals.send_task(task, info)
        else:
            process = kernel.processes.get(owner.id)
            if process is not None and not process.zombie:
                signals.send_process(process, info)


def set_async(task: Task, file: File, fd: int, on: bool) -> None:
    """Switch O_ASYNC on or off through `fd`; without effect on files that never become ready."""
    if file.queue is None:
        return
    notice = file.__dict__.get("async_notice")
    if on and notice is None:
        notice = AsyncNotice(file, task.kernel, fd)
        file.__dict__["async_notice"] = notice
        file.queue.add(notice)
        if file.endings is None:
            file.endings = {}
        file.endings[_end_async] = None
    elif not on and notice is not None:
        file.queue.remove(notice)
        del file.__dict__["async_notice"]
    file.flags = file.flags | FASYNC if on else file.flags & ~FASYNC


def _end_async(file: File) -> None:
    notice = file.__dict__.pop("async_notice", None)
    if notice is not None and file.queue is not None:
        file.queue.remove(notice)


# -- fcntl -----------------------------------------------------------------------------------------------------
@syscall(72, partial="execve(2) breaks no lease, F_WRLCK overlooks mappings")
def fcntl(task: Task, fd: Fd, command: UInt, arg: ULong) -> Any:
    """fcntl(2)."""
    table = task.files
    file = table.get(fd)
    if file.flags & O_PATH and command not in ON_PATHS:
        raise Errno(errno.EBADF)
    if command == F_GETFL:
        return file.flags & ~TASK_IO
    if command == F_SETFL:
        return set_flags(task, file, fd, arg & 0xFFFFFFFF)
    if command == F_GETFD:
        return int(fd in table.cloexec)
    if command == F_SETFD:
        (table.cloexec.add if arg & 1 else table.cloexec.discard)(fd)
        return 0
    if command in (F_DUPFD, F_DUPFD_CLOEXEC):
        lowest = arg & 0xFFFFFFFF
        if lowest >= min(task.rlimit(RLIMIT_NOFILE), 1 << 31):
            raise Errno(errno.EINVAL)
        return install(task, file.get(), lowest, command == F_DUPFD_CLOEXEC)
    if command in (F_GETLK, F_SETLK, F_SETLKW, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW):
        return record_lock(task, file, command, arg)
    if command == F_SETPIPE_SZ or command == F_GETPIPE_SZ:
        if not isinstance(file, PipeFile):
            raise Errno(errno.EBADF)
        return file.pipe.resize(arg & 0xFFFFFFFF) if command == F_SETPIPE_SZ else file.pipe.capacity
    if command in (F_ADD_SEALS, F_GET_SEALS):
        return seals(task, file, command, arg & 0xFFFFFFFF)
    if F_SETOWN <= command <= F_GETSIG or F_SETOWN_EX <= command <= F_GETOWNER_UIDS:
        return ownership(task, file, fd, command, arg)
    if command == F_DUPFD_QUERY:
        return int(table.files.get(arg & 0xFFFFFFFF) is file)
    if command == F_NOTIFY:
        dnotify.notify(file, arg & 0xFFFFFFFF, lambda: AsyncNotice(file, task.kernel, fd).send(POLL_MSG, POLL_MSG_BAND))
        if file.owner is None or not file.owner.id:
            ownership(task, file, fd, F_SETOWN, task.process.vpid)
        return 0
    if command == F_GETLEASE:
        return leases.get(task, file)
    if command == F_SETLEASE:
        return set_lease(task, file, fd, arg & 0xFFFFFFFF)
    if command == F_GET_RW_HINT:
        task.mm.write(arg, _long.pack(file.inode.__dict__.get("write_hint", 0)))
        return 0
    if command == F_SET_RW_HINT:
        hint = _long.unpack(task.mm.read(arg, 8))[0]
        if hint not in range(6):
            raise Errno(errno.EINVAL)
        file.inode.__dict__["write_hint"] = hint
        return 0
    raise Errno(errno.EINVAL)


def set_flags(task: Task, file: File, fd: int, flags: int) -> int:
    """F_SETFL (setfl in fs/fcntl.c)."""
    creds = task.creds
    if flags & O_NOATIME & ~file.flags and not owner_or_capable(file.inode, creds):
        raise Errno(errno.EPERM)
    if (flags ^ file.flags) & FASYNC:
        set_async(task, file, fd, bool(flags & FASYNC))
    flags &= SETFL_MASK & ~FASYNC
    file.flags = (file.flags & ~(SETFL_MASK & ~FASYNC)) | flags
    if isinstance(file, PipeFile):
        file.flags_changed()
    return 0


def ownership(task: Task, file: File, fd: int, command: int, arg: int) -> int:
    """Who gets SIGIO: F_SETOWN and the like."""
    owner: Owner = file.owner or Owner()
    if command == F_GETOWN:
        number = _shown_owner(task, owner)
        return -number if owner.kind == F_OWNER_PGRP else number
    if command == F_GETSIG:
        return owner.signo
    if command == F_GETOWN_EX:
        task.mm.write(arg, _two_ints.pack(owner.kind, _shown_owner(task, owner)))
        return 0
    if command == F_GETOWNER_UIDS:
        task.mm.write(arg, struct.pack("<II", *(shown_uid(task.creds.user_ns, uid) for uid in (owner.uid, owner.euid))))
        return 0
    if command == F_SETSIG:
        if arg > 64:
            raise Errno(errno.EINVAL)
        owner.signo = arg
        file.owner = owner
        return 0
    if command == F_SETOWN_EX:
        kind, number = _two_ints.unpack(task.mm.read(arg, 8))
        if kind not in (F_OWNER_TID, F_OWNER_PID, F_OWNER_PGRP):
            raise Errno(errno.EINVAL)
    else:
        number = (arg & 0x7FFFFFFF) - (arg & 0x80000000)
        if number == -1 << 31:
            raise Errno(errno.EINVAL)
        kind = F_OWNER_PID if number >= 0 else F_OWNER_PGRP
        number = abs(number)
    space = task.process.pid_ns
    if number:
        number = _owner_id(space, kind, number)
        if not number:
            raise Errno(errno.ESRCH)
    owner.kind, owner.id = kind, number
    owner.uid, owner.euid = task.creds.uid, task.creds.euid
    file.owner = owner
    return 0


def _owner_id(space: PidNamespace, kind: int, number: int) -> int:
    """The kernel's number for the caller's; 0 for nobody."""
    if kind == F_OWNER_PGRP:
        group = space.group(number)
        return group.pgid if group is not None else 0
    if kind == F_OWNER_TID:
        thread = space.tasks.get(number)
        return thread.tid if thread is not None else 0
    process = space.processes.get(number)
    return process.pid if process is not None else 0


def _shown_owner(task: Task, owner: Owner) -> int:
    """The caller's number for the kernel's."""
    space, kernel = task.process.pid_ns, task.kernel
    if not space.level or not owner.id:
        return owner.id
    if owner.kind == F_OWNER_PGRP:
        return next((space.pgid_of(p.group) for p in space.processes.values() if p.group.pgid == owner.id), 0)
    if owner.kind == F_OWNER_TID:
        thread = kernel.tasks.get(owner.id)
        return space.tid_of(thread) if thread is not None else 0
    return space.pid_of(kernel.processes.get(owner.id))


def set_lease(task: Task, file: File, fd: int, kind: int) -> int:
    """F_SETLEASE: EINVAL, EACCES for another's file, EAGAIN."""
    if kind not in (locks.F_RDLCK, locks.F_WRLCK, locks.F_UNLCK):
        raise Errno(errno.EINVAL)
    if task.creds.fsuid != file.inode.uid and not inode_capable(task.creds, file.inode, CAP_LEASE):
        raise Errno(errno.EACCES)
    if not st.S_ISREG(file.inode.mode) or not sysctl(task.kernel).number("fs/leases-enable"):
        raise Errno(errno.EINVAL)
    if kind == locks.F_UNLCK:
        leases.release(task, file)
        return 0
    leases.take(task, file, kind, lambda: AsyncNotice(file, task.kernel, fd).send(POLL_MSG, POLL_MSG_BAND))
    if file.owner is None or not file.owner.id:
        ownership(task, file, fd, F_SETOWN, task.process.vpid)
    return 0


def record_lock(task: Task, file: File, command: int, arg: int) -> Any:
    """F_GETLK, F_SETLK, F_SETLKW and their OFD kin."""
    kind, whence, start, length, pid = _flock.unpack(task.mm.read(arg, _flock.size))
    ofd = command >= F_OFD_GETLK
    if ofd:
        if pid:
            raise Errno(errno.EINVAL)
        command -= F_OFD_GETLK - F_GETLK
    if kind not in (locks.F_RDLCK, locks.F_WRLCK, locks.F_UNLCK):
        raise Errno(errno.EINVAL)
    if whence == 1:
        start += file.pos
    elif whence == 2:
        file.inode.refresh()
        start += file.inode.size
    elif whence != 0:
        raise Errno(errno.EINVAL)
    if length < 0:
        start, length = start + length, -length
    if start < 0:
        raise Errno(errno.EINVAL)
    end = start + length if length else locks.END
    if start >= locks.END or end > locks.END:
        raise Errno(errno.EOVERFLOW)
    owner: Any = file if ofd else task.files
    if command == F_GETLK:
        if kind == locks.F_UNLCK:
            raise Errno(errno.EINVAL)
        held = file.inode.locks
        record = held.conflict(owner, kind, start, end) if held is not None else None
        if record is None:
            task.mm.write(arg, _short.pack(locks.F_UNLCK))  # the rest of the structure stays as it came
            return 0
        span = record.end - record.start if record.end != locks.END else 0
        holder = record.pid
        if task.process.numbers and holder > 0:
            holder = task.process.pid_ns.pid_of(task.kernel.processes.get(holder))
        task.mm.write(arg, _flock.pack(record.kind, 0, record.start, span, holder))
        return 0
    if (kind == locks.F_RDLCK and not file.readable) or (kind == locks.F_WRLCK and not file.writable):
        raise Errno(errno.EBADF)
    return locks.set_record(task, file, owner, kind, start, end, command == F_SETLKW)


def seals(task: Task, file: File, command: int, wanted: int) -> int:
    """F_GET_SEALS and F_ADD_SEALS: memfds only (EINVAL); EPERM once F_SEAL_SEAL is set or without write access; EBUSY
    for F_SEAL_WRITE while the file is mapped shared and writable."""
    inode = file.inode
    if type(inode) is not TmpInode or inode.store is None:
        raise Errno(errno.EINVAL)
    if not is_memfd(task.kernel, inode):  # any other file of a tmpfs is sealed against seals
        if command == F_GET_SEALS:
            return F_SEAL_SEAL
        raise Errno(errno.EPERM)
    if command == F_GET_SEALS:
        return inode.seals
    if not file.writable:
        raise Errno(errno.EPERM)
    if wanted & ~(F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE | F_SEAL_EXEC):
        raise Errno(errno.EINVAL)
    if inode.seals & F_SEAL_SEAL:
        raise Errno(errno.EPERM)
    if wanted & F_SEAL_WRITE and not inode.seals & F_SEAL_WRITE and mapped_writable(task.kernel, inode):
        raise Errno(errno.EBUSY)
    inode.seals |= wanted
    return 0


@syscall(73)
def flock(task: Task, fd: Fd, operation: UInt) -> Any:
    """flock(2)."""
    if operation & locks.LOCK_MAND:
        return 0  # nothing of it is left but that it succeeds
    kind = operation & ~locks.LOCK_NB
    if kind not in (locks.LOCK_SH, locks.LOCK_EX, locks.LOCK_UN):
        raise Errno(errno.EINVAL)
    return locks.flock(task, task.files.get_io(fd), kind, not operation & locks.LOCK_NB)


# -- ioctl -----------------------------------------------------------------------------------------------------
@syscall(16)
def ioctl(task: Task, fd: Fd, request: UInt, arg: ULong) -> Any:
    """ioctl(2): what holds for every file here, the rest is the file's."""
    file = task.files.files.get(fd)
    if file is None or file.flags & O_PATH:
        return -errno.EBADF
    if request == FIOCLEX:
        task.files.cloexec.add(fd)
        return 0
    if request == FIONCLEX:
        task.files.cloexec.discard(fd)
        return 0
    if request == FIONBIO:
        on = _int.unpack(task.mm.read(arg, 4))[0]
        file.flags = file.flags | O_NONBLOCK if on else file.flags & ~O_NONBLOCK
        return 0
    if request == FIOASYNC:
        on = _int.unpack(task.mm.read(arg, 4))[0]
        if bool(on) != bool(file.flags & FASYNC):
            if file.queue is None:
                raise Errno(errno.ENOTTY)
            set_async(task, file, fd, bool(on))
        return 0
    if request == FS_IOC_FIEMAP:
        raise Errno(errno.EOPNOTSUPP)  # as of a tmpfs: no file here has blocks on a disk
    kind = file.inode.mode & 0o170000
    if kind == st.S_IFREG:
        if request == FIONREAD:
            file.inode.refresh()
            task.mm.write(arg, _int.pack(max(-1 << 31, min(file.inode.size - file.pos, 0x7FFFFFFF))))
            return 0
        if request in (FICLONE, FICLONERANGE):
            raise Errno(errno.EOPNOTSUPP)
    if request == FIOQSIZE and kind in (st.S_IFREG, st.S_IFDIR, st.S_IFLNK):
        task.mm.write(arg, _long.pack(file.inode.size))
        return 0
    if request == FIGETBSZ and kind in (st.S_IFREG, st.S_IFDIR):
        task.mm.write(arg, _int.pack(4096))
        return 0
    return file.ioctl(task, request, arg)


# -- size and storage ------------------------------------------------------------------------------------------
@syscall(74)
def fsync(task: Task, fd: Fd) -> Any:
    """fsync(2)."""
    return _sync(task, task.files.get_io(fd), os.fsync)


def _sync(task: Task, file: File, flush: Callable[[int], None]) -> Any:
    """A file on the host is flushed on another thread: the disk takes its time."""
    host = file.sync_fd()
    if host < 0:
        if file.inode.mode & 0o170000 not in (st.S_IFREG, st.S_IFDIR, st.S_IFBLK):
            raise Errno(errno.EINVAL)  # neither devices nor pipes have anything to flush
        file.fsync()
        return 0
    try:
        own = os.dup(host)  # open until the flush is over, whatever becomes of the file
    except OSError as error:
        return -(error.errno or errno.EIO)

    def call() -> None:
        try:
            flush(own)
        finally:
            os.close(own)

    return on_host(task, "fsync", call)


@syscall(75)
def fdatasync(task: Task, fd: Fd) -> Any:
    """fdatasync(2)."""
    return _sync(task, task.files.get_io(fd), os.fdatasync)


@syscall(277)
def sync_file_range(task: Task, fd: Fd, offset: Offset, count: Offset, flags: UInt) -> int:
    """sync_file_range(2)."""
    file = task.files.get_io(fd)
    if flags & ~7 or offset < 0 or count < 0 or offset + count >= 1 << 63:
        raise Errno(errno.EINVAL)
    if file.inode.mode & 0o170000 not in (st.S_IFREG, st.S_IFBLK, st.S_IFDIR, st.S_IFLNK):
        raise Errno(errno.ESPIPE)
    return 0


@syscall(77)
def ftruncate(task: Task, fd: Fd, length: Offset) -> int:
    """ftruncate(2)."""
    if length < 0:
        raise Errno(errno.EINVAL)
    file = task.files.get_io(fd)
    if not st.S_ISREG(file.inode.mode) or not file.writable:
        raise Errno(errno.EINVAL)
    if task.process.rlimits[RLIMIT_FSIZE][0] != RLIM_INFINITY and length > file.inode.size:
        limit_size(task, file, length - 1, 1)
    file.inode.truncate(length)
    if WATCHES:
        modified(file)
    return 0


@syscall(285)
def fallocate(task: Task, fd: Fd, mode: UInt, offset: Offset, length: Offset) -> Any:
    """fallocate(2)."""
    file = task.files.get_io(fd)
    if offset < 0 or length <= 0:
        raise Errno(errno.EINVAL)
    keep, punch, collapse, zero, insert, unshare = 1, 2, 8, 16, 32, 64  # uapi/linux/falloc.h
    if mode & ~(keep | punch | collapse | zero | insert | unshare) or mode & (punch | zero) == punch | zero:
        raise Errno(errno.EOPNOTSUPP)
    if mode & punch and not mode & keep:
        raise Errno(errno.EOPNOTSUPP)
    if (mode & collapse and mode & ~collapse) or (mode & insert and mode & ~insert):
        raise Errno(errno.EINVAL)
    if mode & unshare and mode & ~(unshare | keep):
        raise Errno(errno.EINVAL)
    writable(file)
    kind = file.inode.mode & 0o170000
    if kind == st.S_IFIFO:
        raise Errno(errno.ESPIPE)
    if kind == st.S_IFDIR:
        raise Errno(errno.EISDIR)
    if kind not in (st.S_IFREG, st.S_IFBLK):
        raise Errno(errno.ENODEV)
    if offset + length >= 1 << 63:
        raise Errno(errno.EFBIG)
    if not mode & (keep | punch) and offset + length > file.inode.size:
        limit_size(task, file, offset + length - 1, 1)
    if length > LONG and isinstance(file, TmpFile):
        return _fallocate_long(task, file, file.fallocate_steps(mode, offset, length))
    file.fallocate(mode, offset, length)
    if WATCHES:
        modified(file)
    return 0


async def _fallocate_long(task: Task, file: TmpFile, steps: Generator[None, None, None]) -> int:
    """In pieces, between which others run and a signal ends it."""
    file.get()
    pace = Pace(task)
    try:
        for _ in steps:
            if pace.due():
                await pace.rest(errno.EINTR)
    finally:
        steps.close()
        file.put()
    if WATCHES:
        modified(file)
    return 0


@syscall(221)
def fadvise64(task: Task, fd: Fd, offset: Offset, length: Size, advice: Int) -> int:
    """posix_fadvise(2): checked, and then up to the host's page cache."""
    file = task.files.get_io(fd)
    if file.inode.mode & 0o170000 == st.S_IFIFO:
        raise Errno(errno.ESPIPE)
    if not 0 <= advice <= 5 or length >= 1 << 63:
        raise Errno(errno.EINVAL)
    return 0


@syscall(187)
def readahead(task: Task, fd: Fd, offset: Offset, count: Size) -> int:
    """readahead(2): checked, and then up to the host's page cache."""
    file = task.files.get_io(fd)
    if not file.readable:
        raise Errno(errno.EBADF)
    if file.inode.mode & 0o170000 not in (st.S_IFREG, st.S_IFBLK) or count >> 63:
        raise Errno(errno.EINVAL)
    return 0
