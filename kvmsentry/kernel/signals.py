"""Signals: sending, choosing a thread, and `exit_to_user`, which takes them on the way to application code.

    send_* -> PendingSignals --recompute--> task.work --kernel.interrupt--> exit_to_user -> frame | stop | death

Whatever changes a mask, a disposition or what is pending ends in `recompute`, so that `task.work` says exactly whether
the task has something to do before it may run application code. Frames and rt_sigreturn(2) are in sigframe.py.
"""

from __future__ import annotations

import errno
from struct import unpack_from
from typing import Any

from kvmsentry import log
from kvmsentry.errors import Errno
from kvmsentry.kernel import ptrace
from kvmsentry.kernel.pidns import adapt
from kvmsentry.kernel.task import (
    RLIMIT_SIGPENDING,
    PendingSignals,
    Process,
    ProcessGroup,
    SigAction,
    SigInfo,
    Task,
)
from kvmsentry.kernel.traps import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    ERESTARTNOINTR,
    ERESTARTSYS,
    park,
)
from kvmsentry.kernel.userns import ROOT
from kvmsentry.syscall.abi_signal import (
    ALL,
    BUS_ADRALN,
    CLD_CONTINUED,
    CLD_STOPPED,
    CORES,
    FPE_FLTDIV,
    FPE_FLTINV,
    FPE_FLTOVF,
    FPE_FLTRES,
    FPE_FLTUND,
    FPE_INTDIV,
    IGNORED,
    ILL_ILLOPN,
    KILL,
    SA_NOCLDSTOP,
    SA_NODEFER,
    SA_RESETHAND,
    SA_RESTART,
    SI_KERNEL,
    SI_USER,
    SIG_DFL,
    SIG_IGN,
    SIGBUS,
    SIGCHLD,
    SIGCONT,
    SIGFPE,
    SIGILL,
    SIGKILL,
    SIGRTMIN,
    SIGSEGV,
    SIGSTOP,
    SIGTRAP,
    STOPS,
    SYNCHRONOUS,
    TRAP_TRACE,
    UNBLOCKABLE,
    bit,
)
from kvmsentry.syscall.table import GONE, RELOAD
from kvmsentry.vcpu.layout import RAX, RIP

POLLIN = 1
CONT = bit(SIGCONT)
NR_RESTART_SYSCALL = 219
CONTINUED = 0xFFFF  # wait status of WIFCONTINUED


# -- the state of a task --
def recompute(task: Task) -> None:
    """Bring `task.work` up to date; call after any change of masks, pending signals, stops or exits of `task`."""
    process = task.process
    task.work = bool((task.pending.mask | process.pending.mask) & ~task.blocked or process.stopped or process.exiting)
    if task.ptrace is not None:
        _recompute_traced(task)


def _recompute_traced(task: Task) -> None:
    trace, process = task.ptrace, task.process
    task.work = bool(
        (task.pending.mask | process.pending.mask) & ~task.blocked or process.exiting or trace.trap_stop
        or trace.trap_notify or (process.stopped and not trace.released)
    )  # fmt: skip


def recompute_all(process: Process) -> None:
    """`recompute` for every thread."""
    for task in process.threads.values():
        recompute(task)


def set_blocked(task: Task, mask: int) -> None:
    """Set the signal mask (SIGKILL and SIGSTOP never get in)."""
    mask &= ~UNBLOCKABLE
    old = task.blocked
    if mask != old:
        task.blocked = mask
        if mask & ~old & task.process.pending.mask:
            retarget(task)
        recompute(task)


def retarget(task: Task) -> None:
    """`task` will not take the process's pending signals that it now blocks (or it dies): wake threads that would."""
    process = task.process
    mask = process.pending.mask & (ALL if task.dead else task.blocked)
    if mask:
        for other in process.threads.values():
            if other is not task and mask & ~other.blocked and not other.work:
                _wake(other)


def set_user_mask(task: Task, mask: int) -> None:
    """ppoll(2), pselect(2), epoll_pwait(2), sigsuspend(2): another mask until the call returns. A call that ends
    without a signal calls `restore_mask`; otherwise delivery does it."""
    saved = task.blocked
    task.blocked = mask & ~UNBLOCKABLE
    recompute(task)
    task.saved_blocked = saved


def restore_mask(task: Task) -> None:
    """The other half of `set_user_mask`."""
    saved = task.saved_blocked
    if saved is not None:
        task.saved_blocked = None
        task.blocked = saved
        recompute(task)


def _wake(task: Task) -> None:
    """`task` got something to do: make it come to exit_to_user."""
    task.work = True
    task.kernel.interrupt(task)


def kill_task(task: Task) -> None:
    """Make one thread die, whatever it sleeps in (exec's de-threading, exit_group)."""
    task.pending.mask |= KILL
    task.work = True
    if task.in_guest or task.sleep is None:
        task.kernel.interrupt(task)
    else:
        task.sleep.kill()


# -- sending --
def is_ignored(process: Process, task: Task, signo: int) -> bool:
    """Would `signo` be thrown away (sig_ignored in kernel/signal.c)? Blocked ones never are: the disposition may
    change."""
    if task.blocked >> (signo - 1) & 1 or (task.ptrace is not None and signo != SIGKILL):
        return False
    handler = task.sighand.actions[signo].handler
    if handler == SIG_DFL:
        return bool(IGNORED >> (signo - 1) & 1) or process.unkillable
    return handler == SIG_IGN


def _forget(info: SigInfo) -> None:
    if info.timer is not None:
        info.timer.dropped()


def flush(pending: PendingSignals, mask: int) -> None:
    """Take the signals in `mask` out of a queue."""
    if pending.mask & mask:
        pending.mask &= ~mask
        keep = []
        for info in pending.queue:
            if mask >> (info.signo - 1) & 1:
                _forget(info)
            else:
                keep.append(info)
        pending.queue = keep


def flush_process(process: Process, mask: int) -> None:
    """Take the signals in `mask` out of the process's queue and all its threads'."""
    flush(process.pending, mask)
    for task in process.threads.values():
        flush(task.pending, mask)
    recompute_all(process)


def _prepare(process: Process, task: Task, signo: int, force: bool) -> bool:
    """What sending does whatever becomes of the signal: stops and continues clear each other. False: drop it."""
    if process.exiting or process.zombie:
        return signo == SIGKILL and not process.zombie
    if STOPS >> (signo - 1) & 1:
        if process.pending.mask & CONT or any(t.pending.mask & CONT for t in process.threads.values()):
            flush_process(process, CONT)
    elif signo == SIGCONT:
        flush_process(process, STOPS)
        for thread in process.threads.values():
            if thread.ptrace is not None and thread.ptrace.seized:
                ptrace.trap_due(thread, True)
        if process.stopped:
            process.stopped = 0
            process.stop_report = CONTINUED
            recompute_all(process)
            process.cont_events.wake()
            notify_parent(process, CLD_CONTINUED, SIGCONT)
    if process.unkillable and force and signo in (SIGKILL, SIGSTOP):
        return True
    return not is_ignored(process, task, signo)


def _queue(process: Process, pending: PendingSignals, info: SigInfo) -> bool:
    """Add to a queue; False when it was there already. A timer has its own place there (send_sigqueue)."""
    signo = info.signo
    signal_bit = 1 << (signo - 1)
    if pending.mask & signal_bit and signo < SIGRTMIN and info.timer is None:
        return False
    if signo >= SIGRTMIN and len(pending.queue) >= process.rlimits[RLIMIT_SIGPENDING][0] and info.code != SI_USER:
        raise Errno(errno.EAGAIN)
    pending.mask |= signal_bit
    pending.queue.append(info)
    return True


def send_task(task: Task, info: SigInfo, force: bool = False) -> None:
    """Direct a signal at one thread. `force`: it comes from outside, so SIGKILL and SIGSTOP reach init too.
    EAGAIN: RLIMIT_SIGPENDING."""
    process = task.process
    if process.numbers or task.creds.user_ns is not ROOT:
        info, above = adapt(process, info)
        force = force or above
    if task.dead or not _prepare(process, task, info.signo, force):
        _forget(info)
        return
    if info.signo == SIGKILL:
        _kill_group(process)
        return
    if _queue(process, task.pending, info):
        if not task.blocked >> (info.signo - 1) & 1:
            _wake(task)
        if process.signal_events.waiters:
            process.signal_events.wake(POLLIN)


def send_process(process: Process, info: SigInfo, force: bool = False) -> None:
    """Direct a signal at a process: some thread that does not block it takes it. As `send_task`."""
    leader = process.leader
    if process.numbers or leader.creds.user_ns is not ROOT:
        info, above = adapt(process, info)
        force = force or above
    if not _prepare(process, leader, info.signo, force):
        _forget(info)
        return
    signo = info.signo
    if signo == SIGKILL:
        _kill_group(process)
        return
    if not _queue(process, process.pending, info):
        return
    signal_bit = 1 << (signo - 1)
    chosen = None
    if not leader.dead and not leader.blocked & signal_bit:
        chosen = leader
    else:
        for task in process.threads.values():
            if not task.blocked & signal_bit and not task.dead and (chosen is None or chosen.work):
                chosen = task
    if chosen is not None:
        _wake(chosen)
    if process.signal_events.waiters:
        process.signal_events.wake(POLLIN)


def send_group(group: ProcessGroup, info: SigInfo, force: bool = False) -> None:
    """Direct a signal at every process of a group (terminals)."""
    for process in sorted(group.processes, key=lambda p: p.pid):
        if not process.zombie:
            send_process(process, SigInfo(info.signo, info.code, info.errno, **info.fields), force)


def _kill_group(process: Process) -> None:
    """SIGKILL came: nothing of the process runs any more."""
    from kvmsentry.kernel import exit as exit_

    if process.exiting:  # a thread may be stopped on its way out
        for task in list(process.threads.values()):
            if task.ptrace is not None and task.ptrace.code is not None:
                kill_task(task)
    exit_.exit_group(process, SIGKILL)


# -- taking --
def dequeue(task: Task, mask: int) -> SigInfo | None:
    """Take the next pending signal in `mask`, the thread's own first (dequeue_signal in kernel/signal.c)."""
    for pending in (task.pending, task.process.pending):
        ready = pending.mask & mask
        if not ready:
            continue
        if ready & SYNCHRONOUS:
            ready &= SYNCHRONOUS
        signo = (ready & -ready).bit_length()
        found = None
        more = False
        queue = pending.queue
        for index, info in enumerate(queue):
            if info.signo == signo:
                if found is not None:
                    more = True
                    break
                found = index
        if not more:
            pending.mask &= ~(1 << (signo - 1))
        if found is None:
            return SigInfo(signo, SI_USER, pid=0, uid=0)
        info = queue.pop(found)
        if info.timer is not None:
            info.timer.delivered(info)
        return info
    return None


def force(task: Task, info: SigInfo) -> None:
    """A signal that the thread brought upon itself and cannot escape: if it is blocked or ignored, it kills
    (force_sig_info_to_task in kernel/signal.c)."""
    signo = info.signo
    actions = task.sighand.actions
    blocked = task.blocked >> (signo - 1) & 1
    if blocked or actions[signo].handler == SIG_IGN:
        actions[signo] = SigAction()
        task.blocked &= ~(1 << (signo - 1))
    if actions[signo].handler == SIG_DFL and task.ptrace is None:
        task.process.unkillable = False
    flush(task.pending, 1 << (signo - 1))  # ours goes first and tells why
    task.pending.mask |= 1 << (signo - 1)
    task.pending.queue.insert(0, info)
    task.work = True


def fault(task: Task, signo: int, code: int, addr: int, trapno: int, error_code: int) -> None:
    """A memory access of the application failed: SIGSEGV or SIGBUS at `addr`."""
    task.trap = trapno, error_code, addr
    force(task, SigInfo(signo, code, addr=addr))


# SDM vol. 3, table 6-1; arch/x86/kernel/traps.c: vector -> (signal, si_code or SI_KERNEL, is si_addr the instruction?)
_VECTORS = {
    0: (SIGFPE, FPE_INTDIV, True),
    1: (SIGTRAP, TRAP_TRACE, True),
    3: (SIGTRAP, SI_KERNEL, False),
    4: (SIGSEGV, SI_KERNEL, False),
    5: (SIGSEGV, SI_KERNEL, False),
    6: (SIGILL, ILL_ILLOPN, True),
    9: (SIGFPE, SI_KERNEL, False),
    10: (SIGSEGV, SI_KERNEL, False),
    11: (SIGBUS, SI_KERNEL, False),
    12: (SIGBUS, SI_KERNEL, False),
    13: (SIGSEGV, SI_KERNEL, False),
    16: (SIGFPE, FPE_FLTINV, True),
    17: (SIGBUS, BUS_ADRALN, False),
    19: (SIGFPE, FPE_FLTINV, True),
}
_FP_CODES = ((0x01, FPE_FLTINV), (0x04, FPE_FLTDIV), (0x08, FPE_FLTOVF), (0x12, FPE_FLTUND), (0x20, FPE_FLTRES))


def exception(task: Task, vector: int, error_code: int) -> None:
    """The processor raised `vector` in application code."""
    if vector == 1 and task.forced_flags:
        return  # the end of a step that nobody waits for any more
    rip = task.ctx.regs[RIP]
    task.trap = vector, error_code, task.trap[2]
    signo, code, at_instruction = _VECTORS.get(vector, (SIGSEGV, SI_KERNEL, False))
    if vector == 1:
        code = ptrace.debug_code(task)
    if vector in (16, 19):
        code = _fp_code(task.ctx.xsave(), vector)
    if vector == 17:
        force(task, SigInfo(signo, code, addr=0))
    elif at_instruction:
        force(task, SigInfo(signo, code, addr=rip))
    else:
        force(task, SigInfo(signo, code, addr=0))


def _fp_code(state: bytes, vector: int) -> int:
    """si_code of a floating point exception: the first that is raised and not masked (fpu__exception_code)."""
    if vector == 16:
        control, status = unpack_from("<HH", state, 0)
        raised = status & ~control & 0x3F
    else:
        (mxcsr,) = unpack_from("<I", state, 24)
        raised = mxcsr & ~(mxcsr >> 7) & 0x3F
    for mask, code in _FP_CODES:
        if raised & mask:
            return code
    return 0


def host_error(task: Task, host_errno: int) -> None:
    """The host could not run the task any further: it dies, and the log says why."""
    log.complain(f"the host cannot run {task!r}: errno {host_errno}")
    from kvmsentry.kernel import exit as exit_

    exit_.exit_group(task.process, SIGKILL)


# -- stops --
def notify_parent(process: Process, why: int, status: int) -> None:
    """SIGCHLD for a stop or a continue (do_notify_parent_cldstop), and wake who waits."""
    parent = process.parent
    if parent is None:
        return
    action = parent.leader.sighand.actions[SIGCHLD]
    if action.handler != SIG_IGN and not action.flags & SA_NOCLDSTOP:
        send_process(parent, SigInfo(SIGCHLD, why, pid=process.pid, uid=process.leader.creds.uid, status=status))
    parent.child_events.wake()


def is_orphaned(group: ProcessGroup, leaving: Process | None = None) -> bool:
    """No member has a parent in another group of the same session (credentials(7)); `leaving` counts as gone. Our init
    counts as a parent: it is a container's, not the host's (is_global_init), and often the shell itself."""
    for process in group.processes:
        parent = process.parent
        if process is leaving or process.zombie or parent is None:
            continue
        if parent.group is not group and parent.group.session is group.session:
            return False
    return True


def begin_stop(process: Process, signo: int) -> None:
    """Stop the whole process: every thread parks in exit_to_user."""
    process.stopped = signo
    process.stop_report = 0
    for task in process.threads.values():
        task.stop_parked = False
        if task.ptrace is not None:
            ptrace.stop_begins(task)
        _wake(task)


async def _stop(task: Task) -> None:
    process = task.process
    task.stop_parked = True
    stop_complete(process)
    while process.stopped and not process.exiting and not task.pending.mask & KILL and task.ptrace is None:
        try:
            await park(task, "stopped", process.cont_events, restart=0)
        except Errno:
            break  # killed
    task.stop_parked = False


def stop_complete(process: Process) -> None:
    """Tell the parent once all threads have stopped."""
    signo = process.stopped
    if signo and not process.stop_report and all(task.stop_parked for task in process.threads.values()):
        process.stop_report = signo << 8 | 0x7F
        trace = process.leader.ptrace
        if trace is None or trace.tracer.process is not process.parent:  # else the leader's own stop tells
            notify_parent(process, CLD_STOPPED, signo)


def thread_left(process: Process) -> None:
    """A thread of a process that may be stopping has died."""
    if process.stopped and process.threads:
        stop_complete(process)


# -- on the way to application code --
async def exit_to_user(task: Task, result: int | None) -> Any:
    """Do what `task.work` stands for. `result`: what RAX is to become, None when the registers are as they shall be.
    Returns an int (reply), RELOAD or GONE; `task.work` is False then unless it is GONE."""
    from kvmsentry.kernel import exit as exit_
    from kvmsentry.kernel import sigframe

    process = task.process
    reload = result is None or task.touched
    shown = False  # `result` is in RAX, where a tracer sees it
    if task.ptrace is not None or task.forced_flags:
        ptrace.left_user(task)
    while True:
        if shown:
            result = ptrace.result_of(task)
        elif reload or task.ptrace is not None:
            if result is not None:
                task.ctx.regs[RAX] = result & ALL
            shown = reload = True
        if process.exiting or task.pending.mask & KILL:
            if not process.exiting and process.exec_task is None:  # forced on this thread: memory is out
                exit_.exit_group(process, SIGKILL)
            if process.core is not None:
                await _to_core(task, None, None if shown else result)
            if task.ptrace is not None:
                await ptrace.exit_event(task, process.exit_code)
            exit_.do_exit(task, process.exit_code)
            return GONE
        trace = task.ptrace
        if trace is None:
            if process.stopped:
                await _stop(task)
                continue
        elif process.stopped and not trace.released:
            await ptrace.group_stop(task)
            continue
        elif trace.trap_stop or trace.trap_notify:
            await ptrace.trap(task)
            continue
        info = dequeue(task, ~task.blocked) if (task.pending.mask | process.pending.mask) & ~task.blocked else None
        if info is None:
            if result is not None and -ERESTART_RESTARTBLOCK <= result <= -ERESTARTSYS and result != -515:
                _restart(task, result)
                result, reload = None, True
            if task.saved_blocked is not None:
                restore_mask(task)
                continue
            reload = reload or task.touched
            task.touched = False
            recompute(task)
            if task.work:
                continue
            if task.ptrace is not None:
                ptrace.enter_user(task)
            return RELOAD if reload else result
        if trace is not None:
            info = await ptrace.signal(task, info)
            if info is None:
                continue
            result = ptrace.result_of(task)
        signo = info.signo
        action = task.sighand.actions[signo]
        handler = action.handler
        if handler == SIG_IGN:
            continue
        if handler == SIG_DFL:
            if IGNORED >> (signo - 1) & 1 or (process.unkillable and signo != SIGSTOP):
                continue
            if STOPS >> (signo - 1) & 1:
                if signo == SIGSTOP or not is_orphaned(process.group):
                    begin_stop(process, signo)
                continue
            if CORES >> (signo - 1) & 1:
                await _to_core(task, info, None if shown else result)
            else:
                exit_.exit_group(process, signo)
            continue
        if result is not None:
            _answer_handler(task, result, action.flags)
            result, reload = None, True
        saved = task.saved_blocked if task.saved_blocked is not None else task.blocked
        task.saved_blocked = None
        flags, mask = action.flags, action.mask
        if flags & SA_RESETHAND:
            task.sighand.actions[signo] = SigAction(SIG_DFL, flags, action.restorer, mask)
        try:
            sigframe.deliver(task, info, handler, flags, action.restorer, saved)
        except Errno:
            if signo == SIGSEGV:
                task.sighand.actions[signo] = SigAction()
            force(task, SigInfo(SIGSEGV, SI_KERNEL, pid=0, uid=0))
            continue
        reload = True
        task.orig_rax = -1
        task.blocked |= mask | (0 if flags & SA_NODEFER else 1 << (signo - 1))
        task.blocked &= ~UNBLOCKABLE
        retarget(task)
        if task.ptrace is not None and task.ptrace.step:
            await ptrace.notify(task, SIGTRAP)


async def _to_core(task: Task, info: SigInfo | None, result: int | None) -> None:
    """The process ends of `info` with a core dump, or (None) one is under way. `result` belongs in RAX, where the dump
    shows it."""
    from kvmsentry.kernel import coredump

    if result is not None:
        task.ctx.regs[RAX] = result & ALL
    if info is not None:
        await coredump.dump(task, info)
    elif task.process.core is not None:
        await coredump.hold(task, task.process.core)


def _restart(task: Task, result: int) -> None:
    """No handler runs: the call is made again (arch_do_signal_or_restart)."""
    regs = task.ctx.regs
    regs[RAX] = NR_RESTART_SYSCALL if result == -ERESTART_RESTARTBLOCK else task.orig_rax
    regs[RIP] -= 2  # the length of `syscall`
    task.orig_rax = -1


def _answer_handler(task: Task, result: int, flags: int) -> None:
    """A handler runs first: put in RAX what the interrupted call returns after it, or wind back to it
    (handle_signal)."""
    regs = task.ctx.regs
    if result in (-ERESTARTNOHAND, -ERESTART_RESTARTBLOCK) or (result == -ERESTARTSYS and not flags & SA_RESTART):
        regs[RAX] = -errno.EINTR & ALL
    elif result in (-ERESTARTSYS, -ERESTARTNOINTR):
        regs[RAX] = task.orig_rax & ALL
        regs[RIP] -= 2
    else:
        regs[RAX] = result & ALL


__all__ = [
    "CONTINUED",
    "begin_stop",
    "dequeue",
    "exit_to_user",
    "fault",
    "flush",
    "force",
    "send_group",
    "send_process",
    "send_task",
]
