"""Tracing: who traces whom, and the stops in which a tracee waits for its tracer (ptrace(2), kernel/ptrace.c).

    running --signal, call, event, group stop--> _stop --wait4 of the tracer, requests--> resume --> running

A stop is a sleep of the tracee's own coroutine: its registers lie in the context's private copy, and requests read and
write them there. After any stop the task passes `exit_to_user`, which loads all registers and arms a single step. The
processor steps by itself (TF, which programs do not see while it is ours); where the next instruction is a system call
TF stays clear, because what follows the instruction is not the application's code on every host, and the end of the
call reports the step. The requests themselves are in syscall/sys_ptrace.py.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap, signals
from kvmsentry.kernel.task import Process, SigInfo, Task
from kvmsentry.kernel.traps import WaitQueue, park
from kvmsentry.syscall.abi_signal import (
    ALL,
    CLD_CONTINUED,
    CLD_STOPPED,
    CLD_TRAPPED,
    EFLAGS_RF,
    EFLAGS_TF,
    KILL,
    SA_NOCLDSTOP,
    SI_KERNEL,
    SI_USER,
    SIG_IGN,
    SIGCHLD,
    SIGCONT,
    SIGKILL,
    SIGSTOP,
    SIGTRAP,
    TRAP_BRKPT,
    TRAP_HWBKPT,
    TRAP_TRACE,
    bit,
)
from kvmsentry.syscall.table import GONE, RELOAD
from kvmsentry.vcpu.layout import R8, R9, R10, RAX, RDI, RDX, RFLAGS, RIP, RSI, USER_TOP

if TYPE_CHECKING:
    from kvmsentry.kernel.exit import Found

# uapi/linux/ptrace.h
EVENT_FORK, EVENT_VFORK, EVENT_CLONE, EVENT_EXEC, EVENT_VFORK_DONE, EVENT_EXIT, EVENT_SECCOMP = range(1, 8)
EVENT_STOP = 128
O_TRACESYSGOOD, O_EXITKILL = 1, 1 << 20  # an event's option is 1 << event
MESSAGE_ENTRY, MESSAGE_EXIT = 1, 2
SYSCALL_TRAP = SIGTRAP | 0x80
NR_EXECVE, NR_EXECVEAT = 59, 322
CLONE_PTRACE, CLONE_VFORK, CLONE_UNTRACED = 0x2000, 0x4000, 0x800000  # uapi/linux/sched.h
WCONTINUED, WEXITED, WNOWAIT, WNOTHREAD = 8, 4, 0x01000000, 0x20000000  # uapi/linux/wait.h
DR6_FIXED, DR6_HITS, DR6_STEP = 0xFFFF0FF0, 0xF, 0x4000  # SDM vol. 3, 17.2.3
DR7_RESERVED = 0xFFFFFFFF0000FC00  # DR_CONTROL_RESERVED
_SYSCALL = b"\x0f\x05"
_PREFIXES = frozenset([0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3, *range(0x40, 0x50)])


class Tracee:
    """What is true of a task while it is traced (the ptrace and jobctl words of struct task_struct)."""

    __slots__ = ("code", "creds", "data", "debug", "emulate", "exit_status", "forced", "info", "listening", "message",
                 "options", "queue", "released", "report", "seized", "step", "syscalls", "tracer", "trap_notify",
                 "trap_stop")  # fmt: skip

    def __init__(self, tracer: Task, seized: bool, options: int) -> None:
        self.tracer, self.seized, self.options = tracer, seized, options
        self.creds = tracer.creds  # whose CAP_SYS_PTRACE counts at exec
        self.syscalls = self.step = self.emulate = False  # how it was last resumed
        self.forced = False  # TF in its flags is ours
        self.code: int | None = None  # the stop it is in: signal | event << 8
        self.report = 0  # the same until a wait took it
        self.info: SigInfo | None = None  # siginfo of the stop; None in a group stop of one that was not seized
        self.message = 0  # PTRACE_GETEVENTMSG
        self.data = 0  # the signal it was resumed with
        self.listening = False  # PTRACE_LISTEN
        self.trap_stop = self.trap_notify = False  # a PTRACE_EVENT_STOP is due
        self.released = False  # its tracer let it run on although the process is stopped
        self.exit_status: int | None = None  # a thread that is no leader has ended with it
        self.debug: list[int] | None = None  # DR0 to DR7 as the tracer wants and sees them
        self.queue = WaitQueue()  # it sleeps here while stopped

    def enabled(self, event: int) -> bool:
        """Did the tracer ask for this event?"""
        return bool(self.options >> event & 1)


# -- who traces whom --
def link(task: Task, tracer: Task, seized: bool, options: int) -> Tracee:
    """`tracer` traces `task` from now on."""
    trace = Tracee(tracer, seized, options)
    task.ptrace = trace
    task.set_slow()
    if tracer.tracees is None:
        tracer.tracees = {}
    tracer.tracees[task] = None
    return trace


def unlink(task: Task) -> None:
    """Nobody traces `task` any more; where it sleeps in a stop it goes on (__ptrace_unlink)."""
    trace = task.ptrace
    if trace is None:
        return
    if trace.tracer.tracees is not None:
        trace.tracer.tracees.pop(task, None)
    task.ptrace = None
    task.set_slow()
    if not task.dead:
        if trace.forced and not task.in_guest:
            _unstep(task, trace)
        trace.code = None
        trace.queue.wake()
        signals.recompute(task)
        if task.work and not task.in_guest and task.sleep is not None:
            task.sleep.interrupt()
        elif task.in_guest and (task.work or trace.forced):
            task.touched = task.work = True
            task.forced_flags = trace.forced
            task.kernel.interrupt(task)


def attach(tracer: Task, task: Task, seized: bool, options: int) -> Any:
    """PTRACE_ATTACH and PTRACE_SEIZE; the caller has checked permission. EPERM. Returns 0, or a coroutine that waits
    until one that was stopped already is in a stop of ours (JOBCTL_TRAPPING)."""
    if task.process is tracer.process or task.dead or task.ptrace is not None:
        raise Errno(errno.EPERM)
    trace = link(task, tracer, seized, options)
    if not seized:
        signals.send_task(task, SigInfo(SIGSTOP, SI_KERNEL, pid=0, uid=0), force=True)
    if task.process.stopped and task.stop_parked:
        trace.trap_stop = True
        task.process.cont_events.wake()  # from the group stop into a stop of ours
        return _trapped(tracer, task, trace)
    return 0


async def _trapped(tracer: Task, task: Task, trace: Tracee) -> int:
    while trace.code is None and task.ptrace is trace and not task.dead:
        await park(tracer, "ptrace_attach", tracer.process.child_events, restart=0)
    return 0


def traceme(task: Task) -> None:
    """PTRACE_TRACEME. EPERM: it is traced, or no parent could."""
    parent = task.process.parent
    if task.ptrace is not None or parent is None or parent.zombie:
        raise Errno(errno.EPERM)
    creator = task.process.creator
    tracer = creator if creator is not None and not creator.dead else next(iter(parent.threads.values()), None)
    if tracer is None or tracer.dead:
        raise Errno(errno.EPERM)
    link(task, tracer, False, 0)


def detach(task: Task, signo: int) -> None:
    """PTRACE_DETACH of a stopped tracee, which gets `signo`."""
    trace = task.ptrace
    trace.data = signo
    trace.step = trace.syscalls = trace.emulate = False
    unlink(task)


def tracer_exits(tracer: Task) -> None:
    """A tracing thread ends: its tracees run on, or die with it (exit_ptrace)."""
    from kvmsentry.kernel import exit as exit_

    tracees, tracer.tracees = tracer.tracees, None
    for task in tracees or ():
        trace = task.ptrace
        process = task.process
        if trace.options & O_EXITKILL:
            signals.send_process(process, SigInfo(SIGKILL, SI_KERNEL, pid=0, uid=0), force=True)
        unlink(task)
        if process.zombie and task is process.leader and process.kernel.processes.get(process.pid) is process:
            parent = process.parent
            if parent is None:
                exit_.reap(process)
            elif parent is not tracer.process:
                exit_.tell_parent(process, parent)


def unsafe(task: Task) -> bool:
    """Would a gain of privilege by exec be its tracer's, who lacks CAP_SYS_PTRACE (LSM_UNSAFE_PTRACE)?"""
    return task.ptrace is not None and not task.ptrace.creds.capable(cap.SYS_PTRACE)


# -- stops --
def _tell(task: Task, trace: Tracee, why: int, status: int) -> None:
    """SIGCHLD for the tracer, and wake whoever of its process waits (do_notify_parent_cldstop)."""
    process = trace.tracer.process
    action = trace.tracer.sighand.actions[SIGCHLD]
    if action.handler != SIG_IGN and not action.flags & SA_NOCLDSTOP:
        signals.send_process(process, SigInfo(SIGCHLD, why, pid=task.tid, uid=task.creds.uid, status=status))
    process.child_events.wake()


async def _stop(task: Task, code: int, why: int, info: SigInfo | None, message: int = 0) -> int:
    """Sleep until the tracer resumes the task, or death; returns the signal that the tracer gave (ptrace_stop)."""
    trace: Tracee | None = task.ptrace
    if trace is None or task.pending.mask & KILL:
        return code
    trace.trap_stop = False
    if info is not None and info.code >> 8 == EVENT_STOP:
        trace.trap_notify = False
    trace.code = trace.report = code
    trace.info, trace.message, trace.data, trace.listening = info, message, 0, False
    _tell(task, trace, why, code & 0x7F)
    while trace.code is not None:
        try:
            await park(task, "ptrace_stop", trace.queue, restart=0)
        except Errno:
            break  # killed
    trace.code, trace.report, trace.listening = None, 0, False
    task.touched = True
    return trace.data


def _notice(task: Task, signo: int, code: int) -> SigInfo:
    return SigInfo(signo, code, pid=task.tid, uid=task.creds.uid)


async def notify(task: Task, code: int, message: int = 0) -> int:
    """A stop of the kernel's own making: SIGTRAP, perhaps with an event (ptrace_notify)."""
    return await _stop(task, code, CLD_TRAPPED, _notice(task, code & 0x7F, code), message)


async def event(task: Task, number: int, message: int) -> None:
    """PTRACE_EVENT_*, if the tracer asked for it."""
    trace = task.ptrace
    if trace is not None and trace.enabled(number):
        await notify(task, SIGTRAP | number << 8, message)


async def exit_event(task: Task, status: int) -> None:
    """PTRACE_EVENT_EXIT: also of those whom a signal kills, but not once the sandbox ends: nobody waits then."""
    task.pending.mask &= ~KILL
    if task.kernel.exit_status is None:
        await event(task, EVENT_EXIT, status)


async def end(task: Task, status: int) -> Any:
    """exit(2) and the end of exit_group(2) of a tracee."""
    from kvmsentry.kernel import exit as exit_

    await exit_event(task, task.process.exit_code if task.process.exiting else status)
    exit_.do_exit(task, status)
    return GONE


async def group_stop(task: Task) -> None:
    """A traced thread's part in a group stop: a stop that the tracer sees and can end (do_jobctl_trap)."""
    trace, signo = task.ptrace, task.process.stopped
    trace.released = True
    task.stop_parked = True
    signals.stop_complete(task.process)
    if trace.seized:
        code = signo | EVENT_STOP << 8
        await _stop(task, code, CLD_STOPPED, _notice(task, signo, code))
    else:
        await _stop(task, signo, CLD_STOPPED, None)
    task.stop_parked = False


async def trap(task: Task) -> None:
    """PTRACE_EVENT_STOP that is due: PTRACE_INTERRUPT, a seized child's start, the end of a group stop."""
    signo = task.process.stopped or SIGTRAP
    trace = task.ptrace
    trace.released = True
    if not trace.seized:  # from a group stop that it was in when it was attached
        trace.trap_stop = trace.trap_notify = False
        if task.process.stopped:
            await group_stop(task)
        return
    code = signo | EVENT_STOP << 8
    await _stop(task, code, CLD_STOPPED, _notice(task, signo, code))


def stop_begins(task: Task) -> None:
    """The process of a tracee stops: it takes part again."""
    trace = task.ptrace
    trace.released = False
    if trace.listening:
        trace.code = None
        trace.queue.wake()


def trap_due(task: Task, notify_only: bool) -> None:
    """Make a PTRACE_EVENT_STOP due and the task come to it (ptrace_trap_notify, PTRACE_INTERRUPT)."""
    trace = task.ptrace
    if notify_only:
        trace.trap_notify = True
    else:
        trace.trap_stop = True
    if trace.listening:
        trace.code = None
        trace.queue.wake()
    elif trace.code is None:
        task.work = True
        task.kernel.interrupt(task)


async def signal(task: Task, info: SigInfo) -> SigInfo | None:
    """A signal was taken from the queue: the tracer decides what becomes of it (ptrace_signal). None: nothing."""
    trace = task.ptrace
    tracer = trace.tracer
    trace.info = info
    signo = await _stop(task, info.signo, CLD_TRAPPED, info)
    if not signo or task.pending.mask & KILL:
        return None
    info = trace.info  # PTRACE_SETSIGINFO may have changed it
    if signo != info.signo:
        info = SigInfo(signo, SI_USER, pid=tracer.process.pid, uid=tracer.creds.uid)
    if task.blocked >> (signo - 1) & 1:
        signals.send_task(task, info)
        return None
    return info


def resume(task: Task, *, syscalls: bool, step: bool, emulate: bool, signo: int) -> None:
    """PTRACE_CONT and its kin."""
    trace = task.ptrace
    trace.syscalls, trace.step, trace.emulate, trace.data = syscalls, step, emulate, signo
    trace.code, trace.report = None, 0
    trace.queue.wake()


# -- steps --
def _unstep(task: Task, trace: Tracee) -> None:
    if trace.forced:
        trace.forced = False
        task.ctx.regs[RFLAGS] &= ~EFLAGS_TF


def left_user(task: Task) -> None:
    """The task has come from application code: TF of ours is nobody's business."""
    if task.ptrace is not None:
        _unstep(task, task.ptrace)
    elif task.forced_flags:
        task.forced_flags = False
        task.ctx.regs[RFLAGS] &= ~EFLAGS_TF


def debug_code(task: Task) -> int:
    """si_code of a #DB: the end of a step, or a breakpoint of the processor's; DR6 for the tracer (exc_debug_user)."""
    trace = task.ptrace
    if trace is None or trace.debug is None:
        return TRAP_TRACE
    status = task.ctx.debug_status() & (DR6_HITS | DR6_STEP)
    trace.debug[6] = status ^ DR6_FIXED
    hits = status & DR6_HITS
    if any(hits >> n & 1 and not trace.debug[7] >> 16 + 4 * n & 3 for n in range(4)):
        task.ctx.regs[RFLAGS] |= EFLAGS_RF  # the instruction itself comes now
    return TRAP_HWBKPT if hits and not status & DR6_STEP else TRAP_TRACE


def set_debug(task: Task, number: int, value: int) -> None:
    """POKEUSER of u_debugreg (ptrace_set_debugreg). EIO, EINVAL; ENOSPC where the host gives no debug registers."""
    trace = task.ptrace
    registers = list(trace.debug or (0, 0, 0, 0, 0, 0, DR6_FIXED, 0))
    if number in (4, 5):
        raise Errno(errno.EIO)
    if number == 6:
        registers[6] = value & 0xFFFFFFFF
    elif number == 7:
        registers[7] = value & ~DR7_RESERVED
    elif value >= USER_TOP:
        raise Errno(errno.EINVAL)
    else:
        registers[number] = value
    for n in range(4):
        kind = registers[7] >> 16 + 4 * n
        if registers[7] >> 2 * n & 3:
            size = (1, 2, 8, 4)[kind >> 2 & 3]
            if kind & 3 == 2 or (kind & 3 == 0 and size != 1) or registers[n] & size - 1:
                raise Errno(errno.EINVAL)
    if number != 6 and (registers[7] & 0xFF or (trace.debug is not None and trace.debug[7] & 0xFF)):
        if not task.ctx.set_debug(registers):
            raise Errno(errno.ENOSPC)
    trace.debug = registers


def _at_syscall(task: Task) -> bool:
    """Is the next instruction a system call? It may have prefixes, which do nothing."""
    rip = task.ctx.regs[RIP]
    for length in (15, 2):  # the second time for the end of a mapping
        try:
            code = task.mm.read_force(rip, length)
        except Errno:
            continue
        at = 0
        while at < len(code) and code[at] in _PREFIXES:
            at += 1
        return bool(code[at : at + 2] == _SYSCALL)
    return False


def enter_user(task: Task) -> None:
    """The task is about to run application code: arm the step that its tracer wants."""
    trace = task.ptrace
    if trace is not None and trace.step and not _at_syscall(task):
        regs = task.ctx.regs
        if not regs[RFLAGS] & EFLAGS_TF:
            regs[RFLAGS] |= EFLAGS_TF
            trace.forced = True


# -- system calls --
def result_of(task: Task) -> int | None:
    """After a stop: what the interrupted call returns, None when the registers are as they shall be."""
    if task.orig_rax < 0:
        return None
    rax: int = task.ctx.regs[RAX]
    return rax - (1 << 64) if rax >> 63 else rax


def arguments(task: Task) -> tuple[int, ...]:
    """The six arguments of the call under way, as the tracer may have left them."""
    regs = task.ctx.regs
    return regs[RDI], regs[RSI], regs[RDX], regs[R10], regs[R8], regs[R9]


async def traced_call(task: Task, nr: int) -> Any:
    """A system call of a tracee: entry stop, the call, exit stop."""
    result = await _traced_call(task, nr)
    if task.touched and result is not GONE:
        task.work = True  # not sooner: to the call itself this says that a signal is there
    return result


async def _traced_call(task: Task, nr: int) -> Any:
    """syscall_trace_enter and syscall_exit_work in kernel/entry/common.c."""
    kernel, regs, trace = task.kernel, task.ctx.regs, task.ptrace
    _unstep(task, trace)
    regs[RAX] = -errno.ENOSYS & ALL
    skip = False
    if trace.syscalls or trace.emulate:
        skip = trace.emulate
        await _syscall_stop(task, trace, MESSAGE_ENTRY)
        if task.pending.mask & KILL:
            return -errno.EINTR
        nr = task.orig_rax & 0xFFFFFFFF
        skip = skip or nr == 0xFFFFFFFF
    old_tid = task.tid
    if skip:
        result: Any = result_of(task)
        if result is None:
            result = RELOAD
    else:
        result = kernel.slow_call(task, task.orig_rax & ALL, arguments(task))
        if result.__class__ is not int and result is not RELOAD and result is not GONE:
            try:
                result = await result
            except Errno as error:
                result = kernel.refused(task, error)
    if result is GONE:
        return GONE
    trace = task.ptrace
    if trace is None:
        return result
    if result is RELOAD and nr in (NR_EXECVE, NR_EXECVEAT):
        task.orig_rax = nr
        if trace.debug is not None:
            task.ctx.set_debug([0] * 8)
            trace.debug = None
        await _exec_event(task, trace, old_tid)
    if trace.step and not trace.emulate:
        signals.force(task, SigInfo(SIGTRAP, TRAP_BRKPT, addr=regs[RIP]))
    elif trace.syscalls:
        if result.__class__ is int:
            regs[RAX] = result & ALL
        await _syscall_stop(task, trace, MESSAGE_EXIT)
        if result.__class__ is int:
            result = result_of(task)
            if result is None:
                result = RELOAD
    return result


async def _syscall_stop(task: Task, trace: Tracee, message: int) -> None:
    code = SYSCALL_TRAP if trace.options & O_TRACESYSGOOD else SIGTRAP
    signo = await notify(task, code, message)
    if signo and not task.pending.mask & KILL:
        signals.send_task(task, SigInfo(signo, SI_KERNEL, pid=0, uid=0))


async def _exec_event(task: Task, trace: Tracee, old_tid: int) -> None:
    if trace.enabled(EVENT_EXEC):
        await event(task, EVENT_EXEC, old_tid)
    elif not trace.seized:
        signals.send_task(task, SigInfo(SIGTRAP, SI_USER, pid=task.process.pid, uid=task.creds.uid))


async def seccomp_event(task: Task, message: int) -> Any:
    """SECCOMP_RET_TRACE: the tracer may change or skip the call; then the filters are asked once more."""
    await event(task, EVENT_SECCOMP, message)
    if task.pending.mask & KILL:
        return -errno.EINTR
    nr = task.orig_rax & 0xFFFFFFFF
    if task.orig_rax < 0 or nr >> 31:
        result = task.ctx.regs[RAX]
        return result - (1 << 64) if result >> 63 else result
    result = task.kernel.slow_call(task, task.orig_rax & ALL, arguments(task), True)
    if result.__class__ is not int and result is not RELOAD and result is not GONE:
        result = await result
    return result


# -- children --
def forked(task: Task, child: Task, flags: int, exit_signal: int, done: WaitQueue | None) -> Any:
    """A tracee has made `child`: start it, traced if the tracer wants to know of it (kernel_clone). Returns what
    clone(2) does, or a coroutine."""
    kernel, trace = task.kernel, task.ptrace
    number = 0
    if not flags & CLONE_UNTRACED:
        number = EVENT_VFORK if flags & CLONE_VFORK else EVENT_CLONE if exit_signal != SIGCHLD else EVENT_FORK
        if not trace.enabled(number):
            number = 0
    if number or flags & CLONE_PTRACE:
        born = link(child, trace.tracer, trace.seized, trace.options)
        born.creds = trace.creds
        if trace.seized:
            born.trap_stop = True
        else:
            child.pending.mask |= bit(SIGSTOP)
        child.work = True
        kernel.deferred.append(lambda: kernel.finish(child, RELOAD))
    else:
        child.in_guest = True
        child.ctx.reload()
    seen = task.process.pid_ns.tid_of(child)
    if not number and done is None:
        return seen
    return _forked(task, child, number, done, seen)


async def _forked(task: Task, child: Task, number: int, done: WaitQueue | None, seen: int) -> int:
    tid = task.ptrace.tracer.process.pid_ns.tid_of(child)  # the message is the tracer's
    if number:
        await event(task, number, tid)
    if done is not None:
        if child.vfork_done is done:
            await park(task, "vfork", done, restart=0)
        await event(task, EVENT_VFORK_DONE, tid)
    return seen


# -- the end of tracees, and waiting for them --
def thread_exited(task: Task, status: int) -> None:
    """A traced thread that does not lead its process has ended: its tracer may wait for it."""
    process, trace = task.process, task.ptrace
    trace.exit_status = process.exit_code if process.exiting else status
    _tell_end(task, trace, SIGCHLD, trace.exit_status)


def leader_exited(process: Process) -> None:
    """A process whose leader is traced is a zombie now: its tracer hears of it first."""
    task = process.leader
    trace = task.ptrace
    _tell_end(task, trace, process.exit_signal if trace.tracer.process is process.parent else SIGCHLD,
              process.exit_code)  # fmt: skip


def _tell_end(task: Task, trace: Tracee, signo: int, status: int) -> None:
    from kvmsentry.kernel import exit as exit_

    tracer = trace.tracer
    code, value = exit_.describe(status)
    if signo and not (signo == SIGCHLD and tracer.sighand.actions[SIGCHLD].handler == SIG_IGN):
        signals.send_process(tracer.process, SigInfo(signo, code, pid=task.tid, uid=task.creds.uid, status=value))
    tracer.process.child_events.wake()


class _Thread:
    """A thread as the questions of wait4(2) and waitid(2) see it: its tid is its pid."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pid, self.numbers = task.tid, task.numbers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task.process, name)


def find(task: Task, match: Callable[[Any], bool] | None, options: int) -> tuple[Found | None, bool]:
    """The tracees' part of exit.find: (what was found, whether any matches)."""
    any_child = False
    for thread in (task,) if options & WNOTHREAD else list(task.process.threads.values()):
        for tracee in list(thread.tracees or ()):
            process = tracee.process
            who = process if tracee is process.leader else _Thread(tracee)
            if match is not None and not match(who):
                continue
            any_child = True
            found = _look(task, tracee, process, options)
            if found is not None:
                return found, True
    return None, any_child


def _look(task: Task, tracee: Task, process: Process, options: int) -> Found | None:
    from kvmsentry.kernel import exit as exit_

    trace = tracee.ptrace
    keep = options & WNOWAIT
    if tracee.dead:
        leader = tracee is process.leader
        if not options & WEXITED or (leader and not process.zombie):
            return None
        status = process.exit_code if leader else trace.exit_status
        code, value = exit_.describe(status)
        found = exit_.Found(process, code, value, status)
        found.pid = task.process.pid_ns.tid_of(tracee)
        if not keep:
            unlink(tracee)
            if leader:
                _reap_or_pass_on(task, process)
        return found
    if trace.report and not trace.listening:
        status = trace.report
        found = exit_.Found(process, CLD_TRAPPED, status, status << 8 | 0x7F)
        found.pid = task.process.pid_ns.tid_of(tracee)
        if not keep:
            trace.report = 0
        return found
    if options & WCONTINUED and tracee is process.leader and process.stop_report == signals.CONTINUED:
        if not keep:
            process.stop_report = 0
        return exit_.Found(process, CLD_CONTINUED, SIGCONT, signals.CONTINUED)
    return None


def _reap_or_pass_on(task: Task, process: Process) -> None:
    """The tracer has seen the end: its own child is gone, another's zombie is its parent's now (EXIT_TRACE)."""
    from kvmsentry.kernel import exit as exit_

    parent = process.parent
    if parent is None or parent is task.process:
        exit_.reap(process, waited=True)
    else:
        exit_.tell_parent(process, parent)


__all__ = ["Tracee", "attach", "detach", "event", "find", "forked", "link", "resume", "traceme", "unlink"]
