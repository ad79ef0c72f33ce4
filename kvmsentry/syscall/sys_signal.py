"""Signals as calls: sigaction(2), sigprocmask(2), sigsuspend(2), sigwaitinfo(2), kill(2), sigaltstack(2), pidfds."""

from __future__ import annotations

import errno
from struct import Struct
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import O_NONBLOCK, File
from kvmsentry.kernel import cap, sigframe, signals, userns
from kvmsentry.kernel.pidfd import PidFile
from kvmsentry.kernel.task import RLIMIT_NOFILE, Process, SigAction, SigInfo, Task
from kvmsentry.kernel.traps import ERESTARTNOHAND, park
from kvmsentry.syscall.abi_signal import (
    IGNORED,
    NSIG_VALID,
    SA_KNOWN,
    SEGV_MAPERR,
    SI_TKILL,
    SI_USER,
    SIG_BLOCK,
    SIG_DFL,
    SIG_IGN,
    SIG_SETMASK,
    SIG_UNBLOCK,
    SIGACTION,
    SIGCONT,
    SIGINFO_SIZE,
    SIGSEGV,
    STACK_T,
    UNBLOCKABLE,
    pack_siginfo,
    unpack_siginfo,
)
from kvmsentry.syscall.sys_process import may_trace
from kvmsentry.syscall.table import RELOAD, Fd, Int, Pid, Signal, Size, UInt, UserPtr, syscall
from kvmsentry.vcpu.layout import RIP, RSP

TIMESPEC = Struct("<qq")
POLLIN = 1


# -- dispositions and masks --
@syscall(13)
def rt_sigaction(task: Task, signo: Signal, act: UserPtr, oldact: UserPtr, size: Size) -> int:
    if size != 8 or not 0 < signo <= NSIG_VALID or (act and UNBLOCKABLE >> (signo - 1) & 1):
        return -errno.EINVAL
    action = task.sighand.actions[signo]
    old = SIGACTION.pack(action.handler, action.flags, action.restorer, action.mask) if oldact else b""
    if act:
        handler, flags, restorer, mask = SIGACTION.unpack(task.mm.read(act, 32))
        task.sighand.actions[signo] = SigAction(handler, flags & SA_KNOWN, restorer, mask & ~UNBLOCKABLE)
        if handler == SIG_IGN or (handler == SIG_DFL and IGNORED >> (signo - 1) & 1):
            bit = 1 << (signo - 1)
            process = task.process
            if process.pending.mask & bit or any(t.pending.mask & bit for t in process.threads.values()):
                signals.flush_process(process, bit)  # POSIX: what is pending and now ignored is gone, blocked or not
    if oldact:
        task.mm.write(oldact, old)
    return 0


@syscall(14)
def rt_sigprocmask(task: Task, how: Int, set_: UserPtr, oldset: UserPtr, size: Size) -> int:
    if size != 8:
        return -errno.EINVAL
    old = task.blocked
    if set_:
        mask = task.mm.read_u64(set_)
        if how == SIG_BLOCK:
            mask |= old
        elif how == SIG_UNBLOCK:
            mask = old & ~mask
        elif how != SIG_SETMASK:
            return -errno.EINVAL
        if mask != old:
            signals.set_blocked(task, mask)
    if oldset:
        task.mm.write_u64(oldset, old)
    return 0


@syscall(127)
def rt_sigpending(task: Task, set_: UserPtr, size: Size) -> int:
    if size > 8:
        return -errno.EINVAL
    pending = (task.pending.mask | task.process.pending.mask) & task.blocked
    task.mm.write(set_, pending.to_bytes(8, "little")[:size])
    return 0


@syscall(131)
def sigaltstack(task: Task, stack: UserPtr, old: UserPtr) -> int:
    sp = task.ctx.regs[RSP]
    start, _, size = task.altstack
    shown = STACK_T.pack(start, sigframe.altstack_flags(task, sp), size)
    if stack:
        new_start, flags, new_size = STACK_T.unpack(task.mm.read(stack, STACK_T.size))
        sigframe.set_altstack(task, new_start, flags, new_size, sp=sp)
    if old:
        task.mm.write(old, shown)
    return 0


@syscall(15)
def rt_sigreturn(task: Task) -> Any:
    task.orig_rax = -1
    try:
        mask = sigframe.restore(task)
    except Errno:
        signals.force(task, SigInfo(SIGSEGV, 0x80, pid=0, uid=0))
        return RELOAD
    signals.set_blocked(task, mask)
    rip = task.ctx.regs[RIP]
    if rip >= sigframe.TASK_SIZE:  # nothing can be fetched there: the fault comes now, with all registers loaded
        if rip >> 47 == 0x1FFFF:
            signals.fault(task, SIGSEGV, SEGV_MAPERR, rip, 14, 0x15)
        else:
            signals.exception(task, 13, 0)
    return RELOAD


# -- waiting --
@syscall(34)
async def pause(task: Task) -> int:
    while True:
        await park(task, "pause", restart=ERESTARTNOHAND)


@syscall(130)
async def rt_sigsuspend(task: Task, set_: UserPtr, size: Size) -> int:
    if size != 8:
        return -errno.EINVAL
    signals.set_user_mask(task, task.mm.read_u64(set_))
    while True:
        await park(task, "sigsuspend", restart=ERESTARTNOHAND)


@syscall(128)
def rt_sigtimedwait(task: Task, set_: UserPtr, info: UserPtr, timeout: UserPtr, size: Size) -> Any:
    if size != 8:
        return -errno.EINVAL
    mask = task.mm.read_u64(set_) & ~UNBLOCKABLE
    deadline = None
    if timeout:
        seconds, nanoseconds = TIMESPEC.unpack(task.mm.read(timeout, 16))
        if seconds < 0 or not 0 <= nanoseconds < 10**9:
            return -errno.EINVAL
        deadline = seconds * 10**9 + nanoseconds
    taken = signals.dequeue(task, mask)
    if taken is not None:
        signals.recompute(task)
        return _taken(task, taken, info)
    if deadline == 0:
        return -errno.EAGAIN
    return _sigwait(task, mask, info, None if deadline is None else task.kernel.now() + deadline)


def _taken(task: Task, taken: SigInfo, info: int) -> int:
    if info:
        task.mm.write(info, pack_siginfo(taken))
    return taken.signo


async def _sigwait(task: Task, mask: int, info: int, deadline: int | None) -> int:
    queue = task.process.signal_events
    # Signals in `mask` that are not blocked end the sleep too, and must be taken here, not by a handler.
    real = task.blocked
    task.blocked = real | mask
    try:
        while True:
            try:
                events = await park(task, "sigwait", queue, deadline=deadline, restart=errno.EINTR)
            except Errno:
                taken = signals.dequeue(task, mask)
                if taken is None:
                    return -errno.EINTR
                return _taken(task, taken, info)
            taken = signals.dequeue(task, mask)
            if taken is not None:
                return _taken(task, taken, info)
            if not events:
                return -errno.EAGAIN
    finally:
        task.blocked = real
        signals.recompute(task)


# -- sending --
def may_signal(task: Task, process: Process, signo: int) -> bool:
    """kill(2): the sender's real or effective uid is the target's real or saved one, or CAP_KILL; SIGCONT in a
    session."""
    mine, theirs = task.creds, process.leader.creds
    if mine.euid in (theirs.suid, theirs.uid) or mine.uid in (theirs.suid, theirs.uid) or process is task.process:
        return True
    if signo == SIGCONT and process.session is task.process.session:
        return True
    return userns.capable(mine, theirs.user_ns, cap.KILL)


def _user_info(task: Task, signo: int, code: int) -> SigInfo:
    return SigInfo(signo, code, pid=task.process.pid, uid=task.creds.uid)


def _from_above(task: Task, process: Process, info: SigInfo) -> bool:
    """Does the sender live outside the target's PID namespace? Then nothing it says of its pid is true there."""
    space = process.pid_ns
    if not space.level or space.pid_of(task.process):
        return False
    if "q0" in info.fields:
        info.fields["q0"] &= ~0xFFFFFFFF  # si_pid
    return True


def _kill_process(task: Task, process: Process, info: SigInfo) -> None:
    if not 0 <= info.signo <= NSIG_VALID:
        raise Errno(errno.EINVAL)
    if not may_signal(task, process, info.signo):
        raise Errno(errno.EPERM)
    if info.signo and not process.zombie:
        signals.send_process(process, info, _from_above(task, process, info))


@syscall(62)
def kill(task: Task, pid: Pid, signo: Signal) -> int:
    space = task.process.pid_ns
    if pid > 0:
        process = space.processes.get(pid)
        if process is None:
            other = space.tasks.get(pid)  # any thread's id names its process
            if other is None:
                return -errno.ESRCH
            process = other.process
        _kill_process(task, process, _user_info(task, signo, SI_USER))
        return 0
    if pid == -(1 << 31):
        return -errno.ESRCH
    if pid == -1:
        targets = [p for p in space.processes.values() if p is not space.init and p is not task.process]
    else:
        group = space.group(-pid) if pid else task.process.group
        targets = [p for p in space.processes.values() if p.group is group]
    if not targets:
        return -errno.ESRCH
    failed, sent = 0, False
    for process in targets:
        try:
            _kill_process(task, process, _user_info(task, signo, SI_USER))
            sent = True
        except Errno as error:
            failed = error.errno
    return 0 if sent or (pid == -1 and failed == errno.EPERM) else -failed


def _kill_thread(task: Task, tgid: int, tid: int, info: SigInfo) -> int:
    space = task.process.pid_ns
    other = space.tasks.get(tid)
    if other is None or (tgid > 0 and space.pid_of(other.process) != tgid):
        return -errno.ESRCH
    if not 0 <= info.signo <= NSIG_VALID:
        return -errno.EINVAL
    if not may_signal(task, other.process, info.signo):
        return -errno.EPERM
    if info.signo:
        signals.send_task(other, info, _from_above(task, other.process, info))
    return 0


@syscall(200)
def tkill(task: Task, tid: Pid, signo: Signal) -> int:
    if tid <= 0:
        return -errno.EINVAL
    return _kill_thread(task, 0, tid, _user_info(task, signo, SI_TKILL))


@syscall(234)
def tgkill(task: Task, tgid: Pid, tid: Pid, signo: Signal) -> int:
    if tid <= 0 or tgid <= 0:
        return -errno.EINVAL
    return _kill_thread(task, tgid, tid, _user_info(task, signo, SI_TKILL))


def _queued_info(task: Task, signo: int, address: int) -> SigInfo:
    return unpack_siginfo(task.mm.read(address, SIGINFO_SIZE), signo)


@syscall(129)
def rt_sigqueueinfo(task: Task, pid: Pid, signo: Signal, info: UserPtr) -> int:
    data = _queued_info(task, signo, info)
    if (data.code >= 0 or data.code == SI_TKILL) and task.vtid != pid:
        return -errno.EPERM  # only the kernel and kill(2) say such things
    space = task.process.pid_ns
    process = space.processes.get(pid)
    if process is None:
        other = space.tasks.get(pid)  # any thread's id names its process
        if other is None:
            return -errno.ESRCH
        process = other.process
    _kill_process(task, process, data)
    return 0


@syscall(297)
def rt_tgsigqueueinfo(task: Task, tgid: Pid, tid: Pid, signo: Signal, info: UserPtr) -> int:
    data = _queued_info(task, signo, info)
    if tid <= 0 or tgid <= 0:
        return -errno.EINVAL
    if (data.code >= 0 or data.code == SI_TKILL) and task.vtid != tid:
        return -errno.EPERM
    return _kill_thread(task, tgid, tid, data)


@syscall(219)
def restart_syscall(task: Task) -> Any:
    again, task.restart = task.restart, None
    if again is None:
        return -errno.EINTR
    return again(task)


# -- pidfds --
@syscall(434, note="only thread group leaders: PIDFD_THREAD came with Linux 6.9")
def pidfd_open(task: Task, pid: Pid, flags: UInt) -> int:
    if flags & ~O_NONBLOCK or pid <= 0:
        return -errno.EINVAL
    space = task.process.pid_ns
    process = space.processes.get(pid)
    if process is None:
        return -errno.EINVAL if pid in space.tasks else -errno.ESRCH
    file = PidFile(process, flags)
    try:
        return task.files.install(file, task.rlimit(RLIMIT_NOFILE), cloexec=True)
    except Errno:
        file.put()
        raise


def _pid_file(task: Task, fd: int) -> PidFile:
    file = task.files.get(fd)
    if not isinstance(file, PidFile):
        raise Errno(errno.EBADF)
    return file


def _process_of(file: File) -> Process:
    """The process that a pidfd means, or a descriptor of /proc/PID (tgid_pidfd_to_pid). EBADF."""
    if isinstance(file, PidFile):
        return file.process
    from kvmsentry.fs.procfs import ProcessInode

    inode = file.inode
    if not isinstance(inode, ProcessInode) or inode.task is not None:
        raise Errno(errno.EBADF)
    return inode.process


@syscall(424)
def pidfd_send_signal(task: Task, fd: Fd, signo: Signal, info: UserPtr, flags: UInt) -> int:
    if flags:
        return -errno.EINVAL
    process = _process_of(task.files.get(fd))
    if not 0 <= signo <= NSIG_VALID:
        return -errno.EINVAL
    if info:
        data = task.mm.read(info, SIGINFO_SIZE)
        if int.from_bytes(data[:4], "little") != signo:
            return -errno.EINVAL
        sent = unpack_siginfo(data, signo)
        if (sent.code >= 0 or sent.code == SI_TKILL) and process is not task.process:
            return -errno.EPERM
    else:
        sent = _user_info(task, signo, SI_USER)
    if task.kernel.processes.get(process.pid) is not process:
        return -errno.ESRCH
    if not task.process.pid_ns.pid_of(process):
        return -errno.EINVAL  # access_pidfd_pidns: not in a namespace that the caller sees
    _kill_process(task, process, sent)
    return 0


@syscall(438)
def pidfd_getfd(task: Task, fd: Fd, target: Fd, flags: UInt) -> int:
    if flags:
        return -errno.EINVAL
    process = _pid_file(task, fd).process
    if process.zombie:
        return -errno.ESRCH
    other = process.leader if not process.leader.dead else next(iter(process.threads.values()))
    if not may_trace(task, other):
        return -errno.EPERM
    file = other.files.get(target)
    fd = task.files.install(file.get(), task.rlimit(RLIMIT_NOFILE), cloexec=True)
    return fd


__all__ = ["may_signal"]
