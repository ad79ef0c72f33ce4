"""Time namespaces (time_namespaces(7)): what CLOCK_MONOTONIC and CLOCK_BOOTTIME are ahead of the sandbox's own clocks.

    Task.ns.time               the one the task lives in
    Task.ns.time_for_children  where it goes with its next address space: a child made without CLONE_VM, or exec

The offsets can be written until the first task is in, then they stand: the vDSO has them in a page of parameters of the
namespace's own (kernel/vdso.py), and so has every absolute time that was given to a timer.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap, userns
from kvmsentry.kernel.userns import UserNamespace
from kvmsentry.syscall.abi_time import (
    CLOCK_BOOTTIME,
    CLOCK_BOOTTIME_ALARM,
    CLOCK_MONOTONIC,
    CLOCK_MONOTONIC_COARSE,
    CLOCK_MONOTONIC_RAW,
    KTIME_MAX,
    NS,
)

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Credentials, Task

CLOCKS = 12
KTIME_SEC_MAX = KTIME_MAX // NS
PAGE = 4096
LINE = re.compile(rb"\s*(\S{1,9})\s*([-+]?\d+)\s*\+?(\d+)")  # sscanf("%9s %lld %lu")
SAME = {
    CLOCK_MONOTONIC: (CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE),
    CLOCK_BOOTTIME: (CLOCK_BOOTTIME, CLOCK_BOOTTIME_ALARM),
}  # clocks that go by one offset
NAMES = {b"monotonic": CLOCK_MONOTONIC, b"1": CLOCK_MONOTONIC, b"boottime": CLOCK_BOOTTIME, b"7": CLOCK_BOOTTIME}


class TimeNamespace:
    """`offsets`: ns that each clock is ahead here, by its number; replaced, never changed."""

    kind = b"time"

    def __init__(self, user_ns: UserNamespace, offsets: tuple[int, ...] = (0,) * CLOCKS, ino: int = 0) -> None:
        self.user_ns, self.ns_ino, self.offsets = user_ns, ino, offsets
        self.frozen = False  # a task is or was in it
        self.vvar: Any = None  # kernel/vdso.py's page of parameters

    def freeze(self, kernel: Kernel) -> None:
        """A task comes in: the offsets stand from now on."""
        if not self.frozen:
            self.frozen = True
            if kernel.vdso is not None:
                kernel.vdso.publish(self)

    def to_kernel(self, clock: int, value: int) -> int:
        """An absolute time on `clock` as the sandbox's own clock has it, ns; 0 for what lies before its beginning."""
        offset = self.offsets[clock]
        return min(max(value - offset, 0), KTIME_MAX) if offset else value


def first() -> TimeNamespace:
    """The one that the sandbox boots with."""
    space = TimeNamespace(userns.ROOT, ino=0xEFFFFFFA)  # PROC_TIME_INIT_INO in include/linux/proc_ns.h
    space.frozen = True
    return space


def create(kernel: Kernel, owner: UserNamespace, of: TimeNamespace) -> TimeNamespace:
    """A new one with the offsets of `of`. ENOSPC."""
    space = TimeNamespace(owner, of.offsets)
    userns.count(kernel, "time", space)
    return space


def join(space: TimeNamespace, mm: Any, kernel: Kernel) -> None:
    """A task with the address space `mm`, which nobody else has, lives in `space` from now on."""
    space.freeze(kernel)
    if kernel.vdso is not None:
        kernel.vdso.join(mm, space)


# -- /proc/PID/timens_offsets
def show(task: Task) -> str:
    """The offsets of the namespace for the children of `task`, a line each."""
    offsets = task.ns.time_for_children.offsets
    return "".join(
        f"{name:10} {offsets[clock] // NS:10d} {offsets[clock] % NS:9d}\n"
        for name, clock in (("monotonic", CLOCK_MONOTONIC), ("boottime", CLOCK_BOOTTIME))
    )


def write(task: Task, opener: Credentials, data: bytes) -> int:
    """Set them; returns how many bytes were taken (two lines at most). EINVAL, EPERM, ERANGE, EACCES once a task is in;
    proc_timens_set_offset in kernel/time/namespace.c."""
    found: list[tuple[int, int, int]] = []
    taken = 0
    for line in data.split(b"\0", 1)[0].split(b"\n"):
        if taken and (taken >= len(data) or len(found) == 2):
            break
        match = LINE.match(line)
        if match is None or match[1] not in NAMES or int(match[3]) >= NS:
            raise Errno(errno.EINVAL)
        found.append((NAMES[match[1]], int(match[2]), int(match[3])))
        taken += len(line) + 1
    space = task.ns.time_for_children
    if not userns.capable(opener, space.user_ns, cap.SYS_TIME):
        raise Errno(errno.EPERM)
    now = task.kernel.now()
    for _, seconds, nanoseconds in found:
        then = (now + seconds * NS + nanoseconds) // NS
        if abs(seconds) > KTIME_SEC_MAX or not 0 <= then <= KTIME_SEC_MAX // 2:
            raise Errno(errno.ERANGE)
    if space.frozen:
        raise Errno(errno.EACCES)
    offsets = list(space.offsets)
    for clock, seconds, nanoseconds in found:
        for same in SAME[clock]:
            offsets[same] = seconds * NS + nanoseconds
    space.offsets = tuple(offsets)
    return min(taken, len(data))
