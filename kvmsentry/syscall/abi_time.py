"""struct timespec, timeval, itimerspec and clock numbers (uapi/linux/time.h, time_types.h)."""

from __future__ import annotations

import errno
import struct
from typing import Any

from kvmsentry.errors import Errno

TIMESPEC = struct.Struct("<qq")  # also struct timeval
ITIMERSPEC = struct.Struct("<qqqq")  # it_interval, it_value; also struct itimerval
NS = 1_000_000_000
KTIME_MAX = (1 << 63) - 1  # include/vdso/ktime.h

(
    CLOCK_REALTIME,
    CLOCK_MONOTONIC,
    CLOCK_PROCESS_CPUTIME_ID,
    CLOCK_THREAD_CPUTIME_ID,
    CLOCK_MONOTONIC_RAW,
    CLOCK_REALTIME_COARSE,
    CLOCK_MONOTONIC_COARSE,
    CLOCK_BOOTTIME,
    CLOCK_REALTIME_ALARM,
    CLOCK_BOOTTIME_ALARM,
) = range(10)
CLOCK_TAI = 11


def read_timespec(mm: Any, address: int) -> int:
    """A struct timespec as ns; EINVAL for negative or denormal ones, EFAULT. Saturates at KTIME_MAX as Linux does."""
    seconds, nanoseconds = mm.read_struct(TIMESPEC, address)
    if seconds < 0 or not 0 <= nanoseconds < NS:
        raise Errno(errno.EINVAL)
    return min(seconds * NS + nanoseconds, KTIME_MAX)


def read_timeval(mm: Any, address: int) -> int:
    """A struct timeval as ns; EINVAL for negative or denormal ones, EFAULT."""
    seconds, microseconds = mm.read_struct(TIMESPEC, address)
    if seconds < 0 or not 0 <= microseconds < 1_000_000:
        raise Errno(errno.EINVAL)
    return min(seconds * NS + microseconds * 1000, KTIME_MAX)


def write_timespec(mm: Any, address: int, ns: int) -> None:
    """Store ns as a struct timespec."""
    mm.write_struct(TIMESPEC, address, ns // NS, ns % NS)


def write_timeval(mm: Any, address: int, ns: int) -> None:
    """Store ns as a struct timeval, rounded down to µs."""
    mm.write_struct(TIMESPEC, address, ns // NS, ns % NS // 1000)
