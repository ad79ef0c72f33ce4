"""Clocks, sleeping and timers: clock_*, nanosleep, gettimeofday, itimers, POSIX timers, adjtimex."""

from __future__ import annotations

import errno
import struct
import time as host_time
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cputime
from kvmsentry.kernel.posix_timers import IntervalTimer, PosixTimer
from kvmsentry.kernel.task import Task
from kvmsentry.kernel.traps import ERESTART_RESTARTBLOCK, ERESTARTNOHAND, park
from kvmsentry.syscall.abi_time import (
    CLOCK_BOOTTIME,
    CLOCK_BOOTTIME_ALARM,
    CLOCK_MONOTONIC,
    CLOCK_MONOTONIC_COARSE,
    CLOCK_MONOTONIC_RAW,
    CLOCK_PROCESS_CPUTIME_ID,
    CLOCK_REALTIME,
    CLOCK_REALTIME_ALARM,
    CLOCK_REALTIME_COARSE,
    CLOCK_TAI,
    CLOCK_THREAD_CPUTIME_ID,
    ITIMERSPEC,
    KTIME_MAX,
    NS,
    TIMESPEC,
    read_timespec,
    write_timespec,
    write_timeval,
)
from kvmsentry.syscall.table import Int, UInt, UserPtr, syscall

TIMER_ABSTIME = 1  # uapi/linux/time.h
REALTIME = (CLOCK_REALTIME, CLOCK_REALTIME_COARSE, CLOCK_REALTIME_ALARM, CLOCK_TAI)
MONOTONIC = (CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE, CLOCK_BOOTTIME, CLOCK_BOOTTIME_ALARM)
SIGEVENT = struct.Struct("<qiii")  # sigev_value, sigev_signo, sigev_notify, sigev_notify_thread_id


def read_clock(task: Task, clock: int) -> int:
    """Now on `clock`, in ns; EINVAL for clocks that are not (clock_gettime(2))."""
    if clock in REALTIME or clock in MONOTONIC:
        kernel = task.kernel
        vdso = kernel.vdso
        if vdso is not None and vdso.stale():
            now: int = vdso.update()
            return now + (task.ns.time.offsets[clock] if clock in MONOTONIC else kernel.monotonic_to_real())
        return kernel.now() + task.ns.time.offsets[clock] if clock in MONOTONIC else host_time.time_ns()
    if clock == CLOCK_THREAD_CPUTIME_ID:
        return cputime.of_task(task)
    if clock == CLOCK_PROCESS_CPUTIME_ID:
        return cputime.of_process(task.process)
    if clock < 0:  # a process's or thread's clock: ~pid << 3 | per-thread 4 | which 2 (include/linux/posix-timers.h)
        which, target = clock & 7, ~(clock >> 3)
        if which & 3 == 3:
            raise Errno(errno.EINVAL)
        if which & 4:
            thread = task.process.pid_ns.tasks.get(target) if target else task
            if thread is None or thread.process is not task.process:
                raise Errno(errno.EINVAL)
            return cputime.of_task(thread)
        process = task.process.pid_ns.processes.get(target) if target else task.process
        if process is None:
            raise Errno(errno.EINVAL)
        return cputime.of_process(process)
    raise Errno(errno.EINVAL)


@syscall(228)
def clock_gettime(task: Task, clockid: Int, tp: UserPtr) -> int:
    now = read_clock(task, clockid)
    task.mm.write_struct(TIMESPEC, tp, now // NS, now % NS)
    return 0


@syscall(229)
def clock_getres(task: Task, clockid: Int, res: UserPtr) -> int:
    read_clock(task, clockid)
    if res:
        write_timespec(task.mm, res, 4_000_000 if clockid in (CLOCK_REALTIME_COARSE, CLOCK_MONOTONIC_COARSE) else 1)
    return 0


@syscall(227)
def clock_settime(task: Task, clockid: Int, tp: UserPtr) -> int:
    if clockid != CLOCK_REALTIME:
        return -errno.EINVAL
    read_timespec(task.mm, tp)
    return -errno.EPERM


@syscall(96)
def gettimeofday(task: Task, tv: UserPtr, tz: UserPtr) -> int:
    if tv:
        write_timeval(task.mm, tv, host_time.time_ns())
    if tz:
        task.mm.write(tz, bytes(8))
    return 0


@syscall(164)
def settimeofday(task: Task, tv: UserPtr, tz: UserPtr) -> int:
    if tv:
        _, micro = task.mm.read_struct(TIMESPEC, tv)
        if not 0 <= micro <= 1_000_000:
            return -errno.EINVAL
    if tz:
        task.mm.read_u64(tz)
    return -errno.EPERM


@syscall(201)
def sys_time(task: Task, tloc: UserPtr) -> int:
    now = host_time.time_ns() // NS
    if tloc:
        task.mm.write_u64(tloc, now)
    return now


TIMEX = struct.Struct("<I4xqqqqi4xqqqqqqqqi4xqqqqi44x")  # struct __kernel_timex, 208 bytes
STA_UNSYNC, TIME_ERROR = 0x40, 5


def _timex(task: Task, buf: UserPtr) -> int:
    if task.mm.read_u32(buf):
        return -errno.EPERM
    now = host_time.time_ns()
    task.mm.write(
        buf,
        TIMEX.pack(
            0,
            0,
            0,
            16_000_000,
            16_000_000,
            STA_UNSYNC,
            7,
            1,
            32_768_000,
            now // NS,
            now % NS // 1000,
            10_000,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ),
    )
    return TIME_ERROR


@syscall(159, note="the clock is not disciplined and cannot be set")
def adjtimex(task: Task, buf: UserPtr) -> int:
    return _timex(task, buf)


@syscall(305, note="the clock is not disciplined and cannot be set")
def clock_adjtime(task: Task, clockid: Int, buf: UserPtr) -> int:
    task.mm.read(buf, TIMEX.size)
    if clockid != CLOCK_REALTIME:
        return -errno.EOPNOTSUPP if clockid in MONOTONIC else -errno.EINVAL
    return _timex(task, buf)


# -- sleeping --------------------------------------------------------------------------------------
async def _sleep_until(task: Task, deadline: int, remaining: int) -> int:
    kernel = task.kernel
    try:
        while kernel.now() < deadline:
            await park(task, "nanosleep", deadline=deadline, restart=ERESTART_RESTARTBLOCK)
    except Errno:
        if remaining:
            write_timespec(task.mm, remaining, max(0, deadline - kernel.now()))
        task.restart = lambda t: _sleep_until(t, deadline, remaining)
        raise
    return 0


@syscall(35)
def nanosleep(task: Task, req: UserPtr, rem: UserPtr) -> Any:
    return _sleep_until(task, task.kernel.now() + read_timespec(task.mm, req), rem)


async def _sleep_absolute(task: Task, clock: int, until: int) -> int:
    # The time of day may be set on the host while we sleep: look again once a minute.
    while (left := until - read_clock(task, clock)) > 0:
        step = left if clock in MONOTONIC else min(left, 60 * NS)
        await park(task, "clock_nanosleep", deadline=task.kernel.now() + step, restart=ERESTARTNOHAND)
    return 0


async def _sleep_cpu(task: Task, clock: int, until: int, remaining: int) -> int:
    try:
        while (left := until - read_clock(task, clock)) > 0:
            deadline = task.kernel.now() + max(left // 4, 1_000_000)
            await park(task, "clock_nanosleep", deadline=deadline, restart=ERESTART_RESTARTBLOCK)
    except Errno:
        if remaining:
            write_timespec(task.mm, remaining, max(0, until - read_clock(task, clock)))
        task.restart = lambda t: _sleep_cpu(t, clock, until, remaining)
        raise
    return 0


@syscall(230)
def clock_nanosleep(task: Task, clockid: Int, flags: Int, req: UserPtr, rem: UserPtr) -> Any:
    if clockid in (CLOCK_THREAD_CPUTIME_ID, CLOCK_MONOTONIC_RAW, CLOCK_REALTIME_COARSE, CLOCK_MONOTONIC_COARSE):
        return -errno.EOPNOTSUPP
    duration = read_timespec(task.mm, req) if clockid < 0 else 0  # dynamic clocks are looked at late
    now = read_clock(task, clockid)
    if clockid >= 0:
        duration = read_timespec(task.mm, req)
    if flags & TIMER_ABSTIME:
        return _sleep_absolute(task, clockid, duration)
    if clockid in REALTIME or clockid in MONOTONIC:
        return _sleep_until(task, task.kernel.now() + duration, rem)
    return _sleep_cpu(task, clockid, now + duration, rem)


# -- interval timers -------------------------------------------------------------------------------
ITIMER_SIGNALS = (14, 26, 27)  # ITIMER_REAL SIGALRM, ITIMER_VIRTUAL SIGVTALRM, ITIMER_PROF SIGPROF


def _itimer(task: Task, which: int) -> IntervalTimer:
    timers = task.process.itimers
    if timers[which] is None:
        timers[which] = IntervalTimer(task.process, which, ITIMER_SIGNALS[which])
    timer: IntervalTimer = timers[which]
    return timer


def _write_itimerval(task: Task, address: int, interval: int, value: int) -> None:
    task.mm.write_struct(ITIMERSPEC, address, interval // NS, interval % NS // 1000, value // NS, value % NS // 1000)


@syscall(36)
def getitimer(task: Task, which: Int, curr_value: UserPtr) -> int:
    if not 0 <= which < 3:
        return -errno.EINVAL
    interval, value = _itimer(task, which).get()
    _write_itimerval(task, curr_value, interval, value)
    return 0


@syscall(38)
def setitimer(task: Task, which: Int, new_value: UserPtr, old_value: UserPtr) -> int:
    interval = value = 0
    if new_value:
        interval_s, interval_us, value_s, value_us = task.mm.read_struct(ITIMERSPEC, new_value)
        if not (0 <= interval_us < 1_000_000 and 0 <= value_us < 1_000_000) or interval_s < 0 or value_s < 0:
            return -errno.EINVAL
        interval, value = interval_s * NS + interval_us * 1000, value_s * NS + value_us * 1000
    if not 0 <= which < 3:
        return -errno.EINVAL
    timer = _itimer(task, which)
    old = timer.get()
    if old_value:
        _write_itimerval(task, old_value, *old)
    timer.set(interval, value)
    return 0


@syscall(37)
def alarm(task: Task, seconds: UInt) -> int:
    timer = _itimer(task, 0)
    _, left = timer.get()
    timer.set(0, seconds * NS)
    # Linux rounds to the nearest second, but never a running timer to 0 (alarm_setitimer).
    return max((left + NS // 2) // NS, 1) if left else 0


# -- POSIX timers ----------------------------------------------------------------------------------
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4  # uapi/asm-generic/siginfo.h
MAX_TIMERS = 4096


@syscall(222)
def timer_create(task: Task, clockid: Int, sevp: UserPtr, timerid: UserPtr) -> int:
    process = task.process
    event = task.mm.read_struct(SIGEVENT, sevp) if sevp else ()
    read_clock(task, clockid)
    if clockid in (CLOCK_MONOTONIC_RAW, CLOCK_REALTIME_COARSE, CLOCK_MONOTONIC_COARSE):
        return -errno.EOPNOTSUPP
    if len(process.timers) >= MAX_TIMERS:
        return -errno.EAGAIN
    number = 0
    while number in process.timers:
        number += 1
    value, signo, notify, target = number, 14, SIGEV_SIGNAL, 0
    if event:
        value, signo, notify, target = event
        if notify not in (SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID):
            return -errno.EINVAL
        if notify != SIGEV_NONE and not 1 <= signo <= 64:
            return -errno.EINVAL
        if notify == SIGEV_THREAD_ID and target not in process.threads:
            return -errno.EINVAL
    task.mm.write_u32(timerid, number)
    thread = process.threads.get(target) if notify == SIGEV_THREAD_ID else None
    process.timers[number] = PosixTimer(
        process, number, clockid, None if notify == SIGEV_NONE else signo, value, thread, task
    )
    return 0


def _timer(task: Task, timerid: int) -> PosixTimer:
    timer: PosixTimer | None = task.process.timers.get(timerid)
    if timer is None:
        raise Errno(errno.EINVAL)
    return timer


def _write_itimerspec(task: Task, address: int, interval: int, value: int) -> None:
    task.mm.write_struct(ITIMERSPEC, address, interval // NS, interval % NS, value // NS, value % NS)


@syscall(223)
def timer_settime(task: Task, timerid: Int, flags: Int, new_value: UserPtr, old_value: UserPtr) -> int:
    if not new_value:
        return -errno.EINVAL
    interval_s, interval_ns, value_s, value_ns = task.mm.read_struct(ITIMERSPEC, new_value)
    if not (0 <= interval_ns < NS and 0 <= value_ns < NS) or interval_s < 0 or value_s < 0:
        return -errno.EINVAL
    timer = _timer(task, timerid)
    old = timer.get()
    interval, value = min(interval_s * NS + interval_ns, KTIME_MAX), min(value_s * NS + value_ns, KTIME_MAX)
    if value and flags & TIMER_ABSTIME and timer.clockid in MONOTONIC:
        value = task.ns.time.to_kernel(timer.clockid, value) or 1
    timer.set(interval, value, absolute=bool(flags & TIMER_ABSTIME))
    if old_value:
        _write_itimerspec(task, old_value, *old)
    return 0


@syscall(224)
def timer_gettime(task: Task, timerid: Int, curr_value: UserPtr) -> int:
    _write_itimerspec(task, curr_value, *_timer(task, timerid).get())
    return 0


@syscall(225)
def timer_getoverrun(task: Task, timerid: Int) -> int:
    return min(_timer(task, timerid).overrun_delivered, 0x7FFFFFFF)


@syscall(226)
def timer_delete(task: Task, timerid: Int) -> int:
    timer = _timer(task, timerid)
    timer.delete()
    del task.process.timers[timerid]
    return 0
