"""Scheduling calls. The host schedules the vCPU threads: policies are remembered and shown, nice values and affinity
are taken as hints of the application about itself."""

from __future__ import annotations

import errno
import struct

from kvmsentry.errors import Errno
from kvmsentry.kernel import userns
from kvmsentry.kernel.task import (
    RLIMIT_NICE,
    RLIMIT_RTPRIO,
    SCHED_DEADLINE,
    SCHED_FIFO,
    SCHED_RESET_ON_FORK,
    SCHED_RR,
    Task,
)
from kvmsentry.syscall.abi_time import write_timespec
from kvmsentry.syscall.table import Int, Pid, UInt, UserPtr, syscall

SCHED_OTHER, SCHED_BATCH, SCHED_IDLE = 0, 3, 5  # uapi/linux/sched.h
CAP_SYS_NICE = 23
FAIR = (SCHED_OTHER, SCHED_BATCH)
PERIOD_MIN, PERIOD_MAX = 100_000, 4_194_304_000  # ns: sched_deadline_period_{min,max}_us
FLAG_RESET_ON_FORK, FLAG_RECLAIM, FLAG_OVERRUN, FLAG_KEEP_POLICY, FLAG_KEEP_PARAMS = 1, 2, 4, 8, 16
SCHED_ATTR = struct.Struct("<IIQiIQQQII")  # struct sched_attr, 56 bytes with utilisation clamps
SCHED_ATTR_SIZE_VER0 = 48


@syscall(24, note="the host's scheduler decides who runs")
def sched_yield(task: Task) -> int:
    return 0


def _target(task: Task, pid: int, negative: int = errno.EINVAL) -> Task:
    if pid < 0:
        raise Errno(negative)
    space = task.process.pid_ns
    target = space.tasks.get(pid) if pid else task
    if target is None:
        process = space.processes.get(pid)  # a zombie still has its policy
        if process is None:
            raise Errno(errno.ESRCH)
        target = process.leader
    return target


def _may_change(task: Task, target: Task) -> None:
    creds = task.creds
    if creds.euid not in (target.creds.uid, target.creds.euid) and not userns.capable(
        creds, target.creds.user_ns, CAP_SYS_NICE
    ):
        raise Errno(errno.EPERM)


@syscall(203, note="remembered, not enforced")
def sched_setaffinity(task: Task, pid: Pid, length: UInt, mask: UserPtr) -> int:
    wanted = int.from_bytes(task.mm.read(mask, min(length, 1024)), "little")
    target = _target(task, pid, errno.ESRCH)
    _may_change(task, target)
    cpus = frozenset(cpu for cpu in task.kernel.all_cpus if wanted >> cpu & 1)
    if not cpus:
        return -errno.EINVAL
    target.affinity = cpus
    return 0


@syscall(204)
def sched_getaffinity(task: Task, pid: Pid, length: UInt, mask: UserPtr) -> int:
    count = max(task.kernel.all_cpus) + 1
    if length * 8 < count or length & 7:
        return -errno.EINVAL
    bits = sum(1 << cpu for cpu in _target(task, pid, errno.ESRCH).affinity)
    size = min(length, (count + 63) // 64 * 8)
    task.mm.write(mask, bits.to_bytes(size, "little"))
    return size


def _nice_allowed(target: Task, nice: int) -> bool:
    """is_nice_reduction, kernel/sched/syscalls.c."""
    return 20 - nice <= target.rlimit(RLIMIT_NICE)


def _set_policy(task: Task, target: Task, policy: int, priority: int, nice: int | None = None,
                deadline: tuple[int, int, int] | None = None) -> None:  # fmt: skip
    """Check and remember a policy (with SCHED_RESET_ON_FORK in it), as __sched_setscheduler does. `deadline` is
    (runtime, deadline, period) in ns. EINVAL, EPERM."""
    kind = policy & ~SCHED_RESET_ON_FORK
    old, old_priority = target.policy
    was = old & ~SCHED_RESET_ON_FORK
    if kind not in (*FAIR, SCHED_FIFO, SCHED_RR, SCHED_IDLE, SCHED_DEADLINE):
        raise Errno(errno.EINVAL)
    if not (1 <= priority <= 99 if kind in (SCHED_FIFO, SCHED_RR) else priority == 0):
        raise Errno(errno.EINVAL)
    if kind == SCHED_DEADLINE:
        deadline = _checked_deadline(deadline)
    limit = target.rlimit(RLIMIT_RTPRIO)
    privileged = (
        kind in FAIR and nice is not None and nice < target.nice and not _nice_allowed(target, nice)
        or kind in (SCHED_FIFO, SCHED_RR) and (kind != was and not limit or priority > max(old_priority, limit))
        or kind == SCHED_DEADLINE
        or was == SCHED_IDLE != kind and not _nice_allowed(target, target.nice)
        or bool(old & SCHED_RESET_ON_FORK & ~policy)
    )  # fmt: skip
    if privileged and not task.creds.capable(CAP_SYS_NICE):
        raise Errno(errno.EPERM)
    _may_change(task, target)
    target.policy = (policy, priority)
    target.deadline = deadline if kind == SCHED_DEADLINE and deadline is not None else (0, 0, 0)
    if kind in FAIR and nice is not None:
        target.nice = nice


def _checked_deadline(wanted: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """The parameters, with a period of 0 made the deadline; EINVAL (__checkparam_dl)."""
    runtime, deadline, period = wanted or (0, 0, 0)
    period = period or deadline
    if not 1024 <= runtime <= deadline <= period < 1 << 63 or not PERIOD_MIN <= period <= PERIOD_MAX:
        raise Errno(errno.EINVAL)
    return runtime, deadline, period


@syscall(144, note="decides who is woken first on a futex, not who runs")
def sched_setscheduler(task: Task, pid: Pid, policy: Int, param: UserPtr) -> int:
    if policy < 0 or not param:
        return -errno.EINVAL
    priority = task.mm.read_u32(param)
    _set_policy(task, _target(task, pid), policy, priority - ((priority & 0x80000000) << 1))
    return 0


@syscall(145)
def sched_getscheduler(task: Task, pid: Pid) -> int:
    return _target(task, pid).policy[0]


@syscall(142, note="decides who is woken first on a futex, not who runs")
def sched_setparam(task: Task, pid: Pid, param: UserPtr) -> int:
    if not param:
        return -errno.EINVAL
    if pid < 0:
        return -errno.EINVAL
    priority = task.mm.read_u32(param)
    target = _target(task, pid)
    _set_policy(task, target, target.policy[0], priority - ((priority & 0x80000000) << 1))
    return 0


@syscall(143)
def sched_getparam(task: Task, pid: Pid, param: UserPtr) -> int:
    if not param:
        return -errno.EINVAL
    task.mm.write_u32(param, _target(task, pid).policy[1])
    return 0


@syscall(146)
def sched_get_priority_max(task: Task, policy: Int) -> int:
    if policy in (SCHED_FIFO, SCHED_RR):
        return 99
    return 0 if policy in (SCHED_OTHER, SCHED_BATCH, SCHED_IDLE, SCHED_DEADLINE) else -errno.EINVAL


@syscall(147)
def sched_get_priority_min(task: Task, policy: Int) -> int:
    if policy in (SCHED_FIFO, SCHED_RR):
        return 1
    return 0 if policy in (SCHED_OTHER, SCHED_BATCH, SCHED_IDLE, SCHED_DEADLINE) else -errno.EINVAL


@syscall(148)
def sched_rr_get_interval(task: Task, pid: Pid, tp: UserPtr) -> int:
    policy = _target(task, pid).policy[0] & ~SCHED_RESET_ON_FORK
    write_timespec(task.mm, tp, {SCHED_RR: 100_000_000, SCHED_FIFO: 0}.get(policy, 4_000_000))
    return 0


@syscall(314, partial="no utilisation clamps; remembered, not enforced: SCHED_DEADLINE is never EBUSY")
def sched_setattr(task: Task, pid: Pid, attr: UserPtr, flags: UInt) -> int:
    if not attr or flags:
        return -errno.EINVAL
    size = task.mm.read_u32(attr) or SCHED_ATTR_SIZE_VER0
    if size < SCHED_ATTR_SIZE_VER0 or size > 4096:
        task.mm.write_u32(attr, SCHED_ATTR.size)
        return -errno.E2BIG
    raw = task.mm.read(attr, size)
    if any(raw[SCHED_ATTR.size :]):
        task.mm.write_u32(attr, SCHED_ATTR.size)
        return -errno.E2BIG
    _, policy, attr_flags, nice, priority, runtime, deadline, period, *_ = SCHED_ATTR.unpack(
        raw[: SCHED_ATTR.size].ljust(SCHED_ATTR.size, b"\0")
    )
    if policy & 0x80000000 or attr_flags & ~31:
        return -errno.EINVAL
    target = _target(task, pid)
    reset = SCHED_RESET_ON_FORK if attr_flags & FLAG_RESET_ON_FORK else 0
    if attr_flags & FLAG_KEEP_POLICY:
        policy, reset = target.policy[0] & ~SCHED_RESET_ON_FORK, target.policy[0] & SCHED_RESET_ON_FORK
    elif policy & SCHED_RESET_ON_FORK:
        return -errno.EINVAL
    if attr_flags & FLAG_KEEP_PARAMS:
        nice, priority, (runtime, deadline, period) = target.nice, target.policy[1], target.deadline
    _set_policy(task, target, policy | reset, priority, max(-20, min(19, nice)), (runtime, deadline, period))
    return 0


@syscall(315)
def sched_getattr(task: Task, pid: Pid, attr: UserPtr, size: UInt, flags: UInt) -> int:
    if not attr or flags or not SCHED_ATTR_SIZE_VER0 <= size <= 4096:
        return -errno.EINVAL
    target = _target(task, pid)
    policy, priority = target.policy
    reset, policy = int(bool(policy & SCHED_RESET_ON_FORK)), policy & ~SCHED_RESET_ON_FORK
    nice = 0 if policy in (SCHED_FIFO, SCHED_RR, SCHED_DEADLINE) else target.nice
    length = min(size, SCHED_ATTR.size)
    packed = SCHED_ATTR.pack(length, policy, reset, nice, priority, *target.deadline, 0, 1024)
    task.mm.write(attr, packed[:length])
    return 0


@syscall(309, note="a processor of the affinity mask, the same for the thread's life: the host moves vCPUs unseen")
def getcpu(task: Task, cpu: UserPtr, node: UserPtr, unused: UserPtr) -> int:
    if cpu:
        task.mm.write_u32(cpu, task.cpu)
    if node:
        task.mm.write_u32(node, 0)
    return 0
