"""Process groups and sessions (setpgid(2), setsid(2), credentials(7)), limits, priorities, times(2)."""

from __future__ import annotations

import errno
from struct import Struct

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.sysctl import sysctl
from kvmsentry.kernel import cap, cputime, exit, userns
from kvmsentry.kernel.exec import set_limits
from kvmsentry.kernel.posix_timers import renew_cpu_limit
from kvmsentry.kernel.task import (
    RLIM_NLIMITS,
    RLIMIT_CPU,
    RLIMIT_NICE,
    RLIMIT_NOFILE,
    Process,
    ProcessGroup,
    Session,
    Task,
)
from kvmsentry.syscall.table import Int, Pid, UInt, UserPtr, syscall

RLIMIT = Struct("<QQ")
TMS = Struct("<4q")
PRIO_PROCESS, PRIO_PGRP, PRIO_USER = 0, 1, 2  # uapi/linux/resource.h
IOPRIO_WHO_PROCESS, IOPRIO_WHO_PGRP, IOPRIO_WHO_USER = 1, 2, 3  # uapi/linux/ioprio.h
IOPRIO_CLASS_NONE, IOPRIO_CLASS_RT, IOPRIO_CLASS_BE, IOPRIO_CLASS_IDLE = 0, 1, 2, 3


def _process(task: Task, pid: int) -> Process:
    """The process `pid`, the caller's for 0; ESRCH."""
    if not pid:
        return task.process
    space = task.process.pid_ns
    process = space.processes.get(pid)
    if process is None:
        thread = space.tasks.get(pid)
        if thread is None:
            raise Errno(errno.ESRCH)
        return thread.process
    return process


# -- groups and sessions --
@syscall(109)
def setpgid(task: Task, pid: Pid, pgid: Pid) -> int:
    process = task.process
    if pgid < 0:
        return -errno.EINVAL
    space = process.pid_ns
    target = space.processes.get(pid) if pid else process
    if target is None:
        return -errno.EINVAL if pid in space.tasks else -errno.ESRCH
    if target.parent is process:
        if target.session is not process.session:
            return -errno.EPERM
        if target.execed:
            return -errno.EACCES
    elif target is not process:
        return -errno.ESRCH
    if target.session.leader is target:
        return -errno.EPERM
    session = process.session
    if pgid in (0, space.pid_of(target)):
        group = session.groups.get(target.pid)
        if group is None:
            group = ProcessGroup(target.pid, session, target.numbers)
    else:
        group = session.groups.get(pgid) if not space.level else space.group(pgid)
        if group is None or group.session is not session:
            return -errno.EPERM
    if group is not target.group:
        exit.leave_group(target)
        target.group = group
        group.processes.add(target)
    return 0


@syscall(121)
def getpgid(task: Task, pid: Pid) -> int:
    return task.process.pid_ns.pgid_of(_process(task, pid).group)


@syscall(111)
def getpgrp(task: Task) -> int:
    process = task.process
    return process.pid_ns.pgid_of(process.group)


@syscall(112)
def setsid(task: Task) -> int:
    process, kernel = task.process, task.kernel
    pid = process.pid
    if process.session.leader is process or any(pid in session.groups for session in kernel.sessions.values()):
        return -errno.EPERM
    session = Session(pid, process.numbers)
    kernel.sessions[pid] = session
    session.leader = process
    group = ProcessGroup(pid, session, process.numbers)
    exit.leave_group(process)
    process.group = group
    group.processes.add(process)
    return process.vpid


@syscall(124)
def getsid(task: Task, pid: Pid) -> int:
    return task.process.pid_ns.sid_of(_process(task, pid).session)


# -- limits --
def _check_limit(task: Task, process: Process, resource: int, soft: int, hard: int) -> None:
    if soft > hard:
        raise Errno(errno.EINVAL)
    if resource == RLIMIT_NOFILE and hard > sysctl(task.kernel).number("fs/nr_open"):
        raise Errno(errno.EPERM)
    if hard > process.rlimits[resource][1] and not task.creds.capable(cap.SYS_RESOURCE):
        raise Errno(errno.EPERM)


def _set_limit(task: Task, process: Process, resource: int, soft: int, hard: int) -> None:
    _check_limit(task, process, resource, soft, hard)
    process.rlimits[resource] = soft, hard
    if resource == RLIMIT_CPU:
        renew_cpu_limit(process)
    for thread in process.threads.values():
        if thread.mm is not None:
            set_limits(thread.mm, process.rlimits)
        break


@syscall(97)
def getrlimit(task: Task, resource: UInt, limit: UserPtr) -> int:
    if resource >= RLIM_NLIMITS:
        return -errno.EINVAL
    task.mm.write(limit, RLIMIT.pack(*task.process.rlimits[resource]))
    return 0


@syscall(160, partial="RLIMIT_RTTIME is kept but limits nothing")
def setrlimit(task: Task, resource: UInt, limit: UserPtr) -> int:
    soft, hard = RLIMIT.unpack(task.mm.read(limit, 16))
    if resource >= RLIM_NLIMITS:
        return -errno.EINVAL
    _set_limit(task, task.process, resource, soft, hard)
    return 0


@syscall(302, partial="as setrlimit")
def prlimit64(task: Task, pid: Pid, resource: UInt, new: UserPtr, old: UserPtr) -> int:
    wanted = RLIMIT.unpack(task.mm.read(new, 16)) if new else None
    process = _process(task, pid)
    if process is not task.process and not userns.capable(
        task.creds, process.leader.creds.user_ns, cap.SYS_RESOURCE
    ):
        mine, theirs = task.creds, process.leader.creds
        if not (
            mine.uid == theirs.uid == theirs.euid == theirs.suid
            and mine.gid == theirs.gid == theirs.egid == theirs.sgid
        ):
            return -errno.EPERM
    if resource >= RLIM_NLIMITS:
        return -errno.EINVAL
    before = process.rlimits[resource]
    if wanted is not None:
        _set_limit(task, process, resource, *wanted)
    if old:
        task.mm.write(old, RLIMIT.pack(*before))
    return 0


# -- times and priorities --
@syscall(100)
def times(task: Task, buf: UserPtr) -> int:
    process = task.process
    ticks = exit.clock_ticks
    if buf:
        task.mm.write(
            buf,
            TMS.pack(
                ticks(cputime.of_process(process)), 0, ticks(process.children_user), ticks(process.children_system)
            ),
        )
    return ticks(task.kernel.now()) & 0x7FFF_FFFF_FFFF_FFFF


def _targets(task: Task, which: int, who: int, kinds: tuple[int, int, int]) -> list[Task]:
    """The threads that getpriority(2) and ioprio_get(2) are about; EINVAL, ESRCH."""
    space = task.process.pid_ns
    tasks = space.tasks
    if which == kinds[0]:
        found = [tasks[who]] if who in tasks else [] if who else [task]
    elif which == kinds[1]:
        group = space.group(who) if who else task.process.group
        found = [t for t in tasks.values() if t.process.group is group]
    elif which == kinds[2]:
        uid = userns.kuid(task.creds, who & 0xFFFFFFFF) if who else task.creds.uid
        found = [t for t in tasks.values() if t.creds.uid == uid]
    else:
        raise Errno(errno.EINVAL)
    if not found:
        raise Errno(errno.ESRCH)
    return found


_PRIO = (PRIO_PROCESS, PRIO_PGRP, PRIO_USER)
_IOPRIO = (IOPRIO_WHO_PROCESS, IOPRIO_WHO_PGRP, IOPRIO_WHO_USER)


@syscall(140)
def getpriority(task: Task, which: Int, who: Int) -> int:
    return 20 - min(other.nice for other in _targets(task, which, who, _PRIO))


@syscall(141, note="kept and shown; vCPU threads run alike")
def setpriority(task: Task, which: Int, who: Int, nice: Int) -> int:
    nice = min(max(nice, -20), 19)
    creds = task.creds
    failed = 0
    for other in _targets(task, which, who, _PRIO):
        if creds.euid not in (other.creds.uid, other.creds.euid) and not userns.capable(
            creds, other.creds.user_ns, cap.SYS_NICE
        ):
            failed = errno.EPERM
        elif nice < other.nice and 20 - nice > other.rlimit(RLIMIT_NICE) and not creds.capable(cap.SYS_NICE):
            failed = errno.EACCES
        else:
            other.nice = nice
    return -failed


@syscall(252)
def ioprio_get(task: Task, which: Int, who: Int) -> int:
    return max(other.ioprio for other in _targets(task, which, who, _IOPRIO))


@syscall(251, note="kept and shown; changes nothing")
def ioprio_set(task: Task, which: Int, who: Int, value: Int) -> int:
    kind, level = value >> 13 & 7, value & 7
    if kind == IOPRIO_CLASS_RT:
        if not task.creds.capable(cap.SYS_ADMIN) and not task.creds.capable(cap.SYS_NICE):
            return -errno.EPERM
    elif kind == IOPRIO_CLASS_NONE:
        if level:
            return -errno.EINVAL
    elif kind not in (IOPRIO_CLASS_BE, IOPRIO_CLASS_IDLE):
        return -errno.EINVAL
    for other in _targets(task, which, who, _IOPRIO):
        if task.creds.uid not in (other.creds.uid, other.creds.euid) and not userns.capable(
            task.creds, other.creds.user_ns, cap.SYS_NICE
        ):
            return -errno.EPERM
        other.ioprio = value & 0xFFFF
    return 0
