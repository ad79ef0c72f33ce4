"""Calls that make a descriptor out of something else: events, timers, signals, memory."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.eventfd import EventFile
from kvmsentry.fs.memfd import new_memfd
from kvmsentry.fs.signalfd import SignalFile
from kvmsentry.fs.timerfd import TimerFile
from kvmsentry.fs.vfs import O_CLOEXEC, O_NONBLOCK, O_RDWR
from kvmsentry.syscall.abi_signal import UNBLOCKABLE
from kvmsentry.syscall.abi_time import (
    CLOCK_BOOTTIME,
    CLOCK_BOOTTIME_ALARM,
    CLOCK_MONOTONIC,
    CLOCK_REALTIME,
    CLOCK_REALTIME_ALARM,
    ITIMERSPEC,
    KTIME_MAX,
    NS,
)
from kvmsentry.syscall.sys_io import install
from kvmsentry.syscall.table import Fd, Int, Size, UInt, UserPtr, syscall

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

EFD_SEMAPHORE = 1
TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_HUGETLB, MFD_NOEXEC_SEAL, MFD_EXEC = 1, 2, 4, 8, 16  # uapi/linux/memfd.h
MFD_HUGE_SIZES = 0x3F << 26  # MFD_HUGE_MASK << MFD_HUGE_SHIFT
MEMFD_NAME_MAX = 249  # mm/memfd.c
CAP_WAKE_ALARM = 35

_mask = struct.Struct("<Q")


@syscall(284)
def eventfd(task: Task, count: UInt) -> int:
    """eventfd(2) without flags."""
    return install(task, EventFile(count, False, O_RDWR))


@syscall(290)
def eventfd2(task: Task, count: UInt, flags: UInt) -> int:
    """eventfd(2)."""
    if flags & ~(EFD_SEMAPHORE | O_CLOEXEC | O_NONBLOCK):
        raise Errno(errno.EINVAL)
    file = EventFile(count, bool(flags & EFD_SEMAPHORE), O_RDWR | (flags & O_NONBLOCK))
    return install(task, file, 0, bool(flags & O_CLOEXEC))


# -- timers ----------------------------------------------------------------------------------------------------
@syscall(283, note="TFD_TIMER_CANCEL_ON_SET never cancels: nobody can set the clock")
def timerfd_create(task: Task, clock: Int, flags: UInt) -> int:
    """timerfd_create(2)."""
    if flags & ~(O_CLOEXEC | O_NONBLOCK):
        raise Errno(errno.EINVAL)
    if clock not in (CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM):
        raise Errno(errno.EINVAL)
    if clock in (CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM) and not task.creds.capable(CAP_WAKE_ALARM):
        raise Errno(errno.EPERM)
    real = clock in (CLOCK_REALTIME, CLOCK_REALTIME_ALARM)
    file = TimerFile(task.kernel, clock, real, O_RDWR | (flags & O_NONBLOCK))
    return install(task, file, 0, bool(flags & O_CLOEXEC))


def _timer(task: Task, fd: int) -> TimerFile:
    file = task.files.get_io(fd)
    if not isinstance(file, TimerFile):
        raise Errno(errno.EINVAL)
    return file


def _store(task: Task, where: int, times: tuple[int, int]) -> None:
    interval, left = times
    task.mm.write(where, ITIMERSPEC.pack(interval // NS, interval % NS, left // NS, left % NS))


@syscall(286)
def timerfd_settime(task: Task, fd: Fd, flags: UInt, new: UserPtr, old: UserPtr) -> int:
    """timerfd_settime(2)."""
    seconds, nano, value_seconds, value_nano = ITIMERSPEC.unpack(task.mm.read(new, ITIMERSPEC.size))
    if flags & ~(TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET):
        raise Errno(errno.EINVAL)
    if min(seconds, value_seconds) < 0 or not (0 <= nano < NS and 0 <= value_nano < NS):
        raise Errno(errno.EINVAL)
    timer = _timer(task, fd)
    interval, value = min(seconds * NS + nano, KTIME_MAX), min(value_seconds * NS + value_nano, KTIME_MAX)
    if value and flags & TFD_TIMER_ABSTIME and not timer.real:
        value = task.ns.time.to_kernel(timer.clock, value) or 1
    before = timer.set(interval, value, bool(flags & TFD_TIMER_ABSTIME), flags)
    if old:
        _store(task, old, before)
    return 0


@syscall(287)
def timerfd_gettime(task: Task, fd: Fd, where: UserPtr) -> int:
    """timerfd_gettime(2)."""
    _store(task, where, _timer(task, fd).times())
    return 0


# -- signals ---------------------------------------------------------------------------------------------------
def _signalfd(task: Task, fd: int, mask: int, size: int, flags: int) -> int:
    if size != 8:
        raise Errno(errno.EINVAL)
    wanted = _mask.unpack(task.mm.read(mask, 8))[0] & ~UNBLOCKABLE
    if flags & ~(O_CLOEXEC | O_NONBLOCK):
        raise Errno(errno.EINVAL)
    if fd == -1:
        return install(task, SignalFile(task, wanted, O_RDWR | (flags & O_NONBLOCK)), 0, bool(flags & O_CLOEXEC))
    file = task.files.get_io(fd)
    if not isinstance(file, SignalFile):
        raise Errno(errno.EINVAL)
    file.mask = wanted
    file.changed()
    return fd


@syscall(282)
def signalfd(task: Task, fd: Fd, mask: UserPtr, size: Size) -> int:
    """signalfd(2) without flags."""
    return _signalfd(task, fd, mask, size, 0)


@syscall(289)
def signalfd4(task: Task, fd: Fd, mask: UserPtr, size: Size, flags: UInt) -> int:
    """signalfd(2)."""
    return _signalfd(task, fd, mask, size, flags)


# -- memory ----------------------------------------------------------------------------------------------------
@syscall(319, partial="no MFD_HUGETLB")
def memfd_create(task: Task, name: UserPtr, flags: UInt) -> int:
    """memfd_create(2)."""
    huge = MFD_HUGETLB | MFD_HUGE_SIZES if flags & MFD_HUGETLB else 0
    if flags & ~(MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL | MFD_EXEC | huge):
        raise Errno(errno.EINVAL)
    if huge:
        raise Errno(errno.ENOSYS)  # as a kernel without hugetlbfs
    if flags & MFD_EXEC and flags & MFD_NOEXEC_SEAL:
        raise Errno(errno.EINVAL)
    try:
        text = task.mm.read_cstring(name, MEMFD_NAME_MAX + 1)
    except Errno as error:
        raise Errno(errno.EINVAL if error.errno == errno.ENAMETOOLONG else error.errno) from None
    sealing = bool(flags & (MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL))
    return install(task, new_memfd(task, text, sealing, not flags & MFD_NOEXEC_SEAL), 0, bool(flags & MFD_CLOEXEC))
