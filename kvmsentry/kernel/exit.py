"""How tasks end, and how parents learn of it: exit(2), exit_group(2), zombies, wait4(2), waitid(2).

    do_exit (a thread) --last one--> zombie --SIGCHLD--> parent --wait--> reap
                                        \\--ignored by the parent--> reap at once
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cputime, futex, pidns, ptrace, signals, sysvipc, userns
from kvmsentry.kernel.task import Process, SigInfo, Task
from kvmsentry.kernel.traps import park
from kvmsentry.syscall.abi_signal import (
    CLD_CONTINUED,
    CLD_DUMPED,
    CLD_EXITED,
    CLD_KILLED,
    CLD_STOPPED,
    SA_NOCLDWAIT,
    SI_KERNEL,
    SI_USER,
    SIG_IGN,
    SIGCHLD,
    SIGCONT,
    SIGHUP,
    SIGKILL,
)

WNOHANG, WUNTRACED, WSTOPPED, WEXITED, WCONTINUED, WNOWAIT = 1, 2, 2, 4, 8, 0x01000000  # uapi/linux/wait.h
WNOTHREAD, WALL, WCLONE = 0x20000000, 0x40000000, 0x80000000
P_ALL, P_PID, P_PGID, P_PIDFD = 0, 1, 2, 3
ROBUST_LIST_LIMIT = 2048  # include/linux/futex.h
FUTEX_WAITERS, FUTEX_OWNER_DIED, FUTEX_TID_MASK = 0x80000000, 0x40000000, 0x3FFFFFFF
POLLIN, POLLHUP, POLLRDNORM = 1, 16, 64


# -- dying --
def exit_group(process: Process, status: int) -> None:
    """Make every thread of `process` die with `status` (a wait status); the caller's own does so in exit_to_user."""
    if process.zombie or process.exiting:
        if process.core is not None and status == SIGKILL:
            process.core.interrupted = True
        return
    process.exiting = True
    process.exit_code = status
    process.stopped = 0
    for task in list(process.threads.values()):
        signals.kill_task(task)


def do_exit(task: Task, status: int) -> None:
    """End one thread, now; the task is no more afterwards (its handler returns GONE). `status` is the wait status of
    the process if this was its last thread."""
    kernel, process = task.kernel, task.process
    if task.ctx is not None:
        cputime.account_exit(task)
        task.ctx.park()  # it leaves the guest meanwhile: release() need not wait
    release_mm(task)
    task.dead = True
    task.in_guest = False
    files = task.files
    files.users -= 1
    if not files.users:
        files.close_all()
    if task.ctx is not None:
        task.ctx.release()
        task.ctx.owner = None
        task.ctx = None
    drop_mm(task)
    task.fs.put()
    task.sighand.users -= 1
    if task.tracees:
        ptrace.tracer_exits(task)
    del process.threads[task.tid]
    kernel.tasks.pop(task.tid, None)
    if task.numbers:
        pidns.leave_task(task)
    signals.flush(task.pending, (1 << 64) - 1)
    _orphan_by_thread(task)
    if task.ptrace is not None and task is not process.leader:
        ptrace.thread_exited(task, status)
    if process.threads:
        signals.retarget(task)
        signals.thread_left(process)
        if process.exec_task is not None:
            process.exec_wait.wake()
        if process.core is not None:
            process.core.arrived.wake()
        return
    if not process.exiting:
        process.exiting = True
        process.exit_code = status
    _group_dead(process, task)


def release_mm(task: Task) -> None:
    """What an address space must be told when a thread leaves it, by exit or exec (mm_release in kernel/fork.c): robust
    futexes, the word at CLONE_CHILD_CLEARTID's address, and a parent in vfork(2)."""
    mm = task.mm
    if mm is not None:
        if mm.aio is not None and mm.users == 1:
            from kvmsentry.kernel import aio

            aio.end_space(mm)
        if task.robust_list:
            try:
                _walk_robust_list(task, mm)
            except Errno:
                pass  # the list is the application's: where it is broken, the walk ends, as on Linux
            task.robust_list = 0
        futex.owner_gone(task)
        address = task.clear_child_tid
        if address:
            task.clear_child_tid = 0
            if mm.users > 1:
                try:
                    mm.write_u32(address, 0)
                    futex.wake(mm, address, 1)
                except Errno:
                    pass  # a bad address was given to clone(2): nobody can wait there
    if task.vfork_done is not None:
        queue, task.vfork_done = task.vfork_done, None
        queue.wake()


def drop_mm(task: Task) -> None:
    """One user less of the address space; the last one destroys it."""
    mm, task.mm = task.mm, None
    if mm is not None:
        process = task.process
        process.peak_pages = max(process.peak_pages, mm.peak_pages)
        mm.users -= 1
        if not mm.users:
            mm.destroy()


def _walk_robust_list(task: Task, mm: Any) -> None:
    """Mark the futexes that a dying thread holds (exit_robust_list in kernel/futex/core.c)."""
    head = task.robust_list
    entry = mm.read_u64(head)
    offset = mm.read_u64(head + 8)
    if offset >= 1 << 63:
        offset -= 1 << 64
    pending = mm.read_u64(head + 16)
    for _ in range(ROBUST_LIST_LIMIT):
        if entry & ~1 == head:
            break
        following = mm.read_u64(entry & ~1)
        if entry & ~1 != pending & ~1:
            _owner_died(task, mm, (entry & ~1) + offset, bool(entry & 1), False)
        entry = following
    if pending & ~1:
        _owner_died(task, mm, (pending & ~1) + offset, bool(pending & 1), True)


def _owner_died(task: Task, mm: Any, address: int, pi: bool, pending: bool) -> None:
    """handle_futex_death in kernel/futex/core.c."""
    if address & 3:
        raise Errno(errno.EINVAL)
    while True:
        word = mm.read_u32(address)
        owner = word & FUTEX_TID_MASK
        if pending and not pi and not owner:
            futex.wake(mm, address, 1)
            return
        if owner != task.vtid:
            return
        if pi:
            futex.hand_over(task, mm, address, mm.futex_key(address, False), FUTEX_OWNER_DIED)
            return
        if mm.cmpxchg_u32(address, word, (word & FUTEX_WAITERS) | FUTEX_OWNER_DIED) == word:
            if word & FUTEX_WAITERS:
                futex.wake(mm, address, 1)
            return


def _orphan_by_thread(task: Task) -> None:
    """Children made by this thread lose it: PR_SET_PDEATHSIG, and who may wait with __WNOTHREAD."""
    process = task.process
    heir = next(iter(process.threads.values()), None)
    for child in process.children.values():
        if child.creator is task:
            child.creator = heir
            for thread in list(child.threads.values()):
                if thread.pdeath_signal:
                    signals.send_process(
                        child, SigInfo(thread.pdeath_signal, SI_USER, pid=process.pid, uid=task.creds.uid)
                    )


def _group_dead(process: Process, last: Task) -> None:
    """The last thread is gone: children get another parent, the process becomes a zombie, its parent is told."""
    for timer in process.timers.values():
        timer.delete()
    process.timers.clear()
    for timer in (*process.itimers, process.cpu_limit):
        if timer is not None:
            timer.delete()
    signals.flush(process.pending, (1 << 64) - 1)
    if process.exe_inode is not None:
        process.exe_inode.writers += 1
        process.exe_inode = None
    sysvipc.end_process(process)
    space = process.pid_ns
    if space.level and space.init is process:
        _close_namespace(process)
    else:
        _become_zombie(process)


def _close_namespace(process: Process) -> None:
    """The init of a PID namespace below the first one is gone: so is everybody in it, and it becomes a zombie only
    when they have been reaped (zap_pid_ns_processes in kernel/pid_namespace.c)."""
    space = process.pid_ns
    space.closed = True
    for other in list(space.processes.values()):
        if other is not process and not other.zombie:
            exit_group(other, SIGKILL)
    for child in list(process.children.values()):
        if child.zombie:
            reap(child)
    if len(space.processes) == 1 and not process.zombie:
        _become_zombie(process)


def _become_zombie(process: Process) -> None:
    kernel = process.kernel
    process.zombie = True
    _leave_session(process)
    _reparent_children(process)
    if process is kernel.init:
        _kill_everybody(kernel, process)
    parent = process.parent
    if parent is not None and parent.group is not process.group and parent.session is process.session:
        _hang_up_if_orphaned(process.group, process)
    process.exit_events.wake(POLLIN | POLLRDNORM | POLLHUP)
    if process.leader.ptrace is not None:
        ptrace.leader_exited(process)
    elif parent is None:
        reap(process)
    else:
        tell_parent(process, parent)


def _kill_everybody(kernel: Any, process: Process) -> None:
    """Init is gone, and with it the sandbox (zap_pid_ns_processes)."""
    kernel.exit_status = process.exit_code
    for other in list(kernel.processes.values()):
        if other is not process and not other.zombie:
            exit_group(other, SIGKILL)


def _leave_session(process: Process) -> None:
    """A session leader takes its terminal with it: SIGHUP and SIGCONT for the foreground (disassociate_ctty)."""
    session = process.session
    if session.leader is process:
        tty = session.tty
        if tty is not None:
            session.tty = None
            tty.session_ended(session)
        session.leader = None


def _reparent_children(process: Process) -> None:
    """Children go to the nearest living subreaper, else to their namespace's init (forget_original_parent)."""
    if not process.children:
        return
    space = process.pid_ns
    heir = process.parent
    if heir is not None and heir.pid_ns is not space:
        heir = None
    while heir is not None and heir is not space.init and (not heir.subreaper or heir.zombie or heir.exiting):
        heir = heir.parent
        if heir is not None and heir.pid_ns is not space:
            heir = None  # a subreaper reaps in its own namespace only
    if heir is None:
        heir = space.init
    if heir is process or (heir is not None and (heir.zombie or heir.pid_ns.closed)):
        heir = None
    children, process.children = process.children, {}
    for child in children.values():
        child.parent = heir
        if heir is None:
            if child.zombie and child.leader.ptrace is None:
                reap(child)
            continue
        heir.children[child.pid] = child
        child.creator = heir.leader
        child.exit_signal = SIGCHLD
        if child.zombie:
            if child.leader.ptrace is None:
                tell_parent(child, heir)
        elif child.group is not process.group and child.session is process.session:
            _hang_up_if_orphaned(child.group, None)


def _hang_up_if_orphaned(group: Any, leaving: Process | None) -> None:
    """A group that became orphaned and has stopped members gets SIGHUP and SIGCONT (kill_orphaned_pgrp)."""
    if not signals.is_orphaned(group, leaving):
        return
    if any(member.stopped for member in group.processes if member is not leaving):
        signals.send_group(group, SigInfo(SIGHUP, SI_KERNEL, pid=0, uid=0))
        signals.send_group(group, SigInfo(SIGCONT, SI_KERNEL, pid=0, uid=0))


def tell_parent(process: Process, parent: Process) -> None:
    """A zombie's parent gets its signal, or the zombie is reaped at once (do_notify_parent)."""
    signo = process.exit_signal
    action = parent.leader.sighand.actions[SIGCHLD]
    auto = parent.pid_ns.closed or signo == SIGCHLD and (action.handler == SIG_IGN or bool(action.flags & SA_NOCLDWAIT))
    if signo and not (auto and action.handler == SIG_IGN):
        code, status = describe(process.exit_code)
        signals.send_process(
            parent,
            SigInfo(signo, code, pid=process.pid, uid=process.leader.creds.uid, status=status,
                    utime=clock_ticks(cputime.of_process(process)), stime=0),
        )  # fmt: skip
    if auto:
        reap(process)
    if parent.child_events.waiters:
        parent.child_events.wake()


def describe(status: int) -> tuple[int, int]:
    """(si_code, si_status) of a wait status."""
    if status & 0x7F == 0:
        return CLD_EXITED, status >> 8 & 0xFF
    return (CLD_DUMPED if status & 0x80 else CLD_KILLED), status & 0x7F


def clock_ticks(ns: int) -> int:
    """ns in clock ticks of 1/100 s (times(2))."""
    return ns // 10_000_000


def reap(process: Process, waited: bool = False) -> None:
    """Forget a zombie: its pid may be used again. What it used is its parent's children's only if the parent `waited`
    for it."""
    kernel = process.kernel
    parent = process.parent
    if parent is not None:
        parent.children.pop(process.pid, None)
    if parent is not None and waited:
        parent.children_user += cputime.of_process(process) + process.children_user
        parent.children_system += process.children_system
        parent.children_peak_pages = max(parent.children_peak_pages, process.peak_pages, process.children_peak_pages)
    kernel.processes.pop(process.pid, None)
    if process.numbers:
        pidns.leave_process(process)
        for space in process.numbers:
            init = space.init
            if space.closed and init is not None and not init.zombie and len(space.processes) == 1:
                _become_zombie(init)
    leave_group(process)


def leave_group(process: Process) -> None:
    """Take a process out of its group; empty groups and sessions vanish."""
    group = process.group
    group.processes.discard(process)
    if not group.processes:
        session = group.session
        session.groups.pop(group.pgid, None)
        if not session.groups:
            process.kernel.sessions.pop(session.sid, None)


# -- waiting --
class Found:
    """What a wait found: of whom, si_code, si_status, the wait status, the child's own and its children's times, and
    the most pages any of them had."""

    __slots__ = ("pid", "uid", "code", "value", "status", "user", "system", "peak_pages")

    def __init__(self, child: Process, code: int, value: int, status: int) -> None:
        self.pid, self.uid = child.pid, child.leader.creds.uid
        parent = child.parent
        if child.numbers or (parent is not None and parent.leader.creds.user_ns is not userns.ROOT):
            self._tell(child, parent)
        self.code, self.value, self.status = code, value, status
        self.user = cputime.of_process(child) + child.children_user
        self.system = child.children_system
        self.peak_pages = max(child.peak_pages, child.children_peak_pages)
        if not child.zombie and child.leader.mm is not None:
            self.peak_pages = max(self.peak_pages, child.leader.mm.peak_pages)

    def _tell(self, child: Process, parent: Process | None) -> None:
        """Pid and uid as the parent knows them."""
        if parent is not None:
            self.pid = parent.pid_ns.pid_of(child)
            self.uid = userns.shown_uid(parent.leader.creds.user_ns, self.uid)


def _eligible(task: Task, child: Process, options: int) -> bool:
    if options & WNOTHREAD and child.creator is not task:
        return False
    if options & WALL:
        return True
    clone_child = child.exit_signal != SIGCHLD
    return clone_child == bool(options & WCLONE)


def find(task: Task, match: Callable[[Process], bool] | None, options: int) -> Found | None:
    """The first child that has something to report under `options` (WEXITED, WSTOPPED, WCONTINUED, ...), reaped or
    marked as reported unless WNOWAIT. ECHILD when no child matches at all."""
    any_child = False
    for child in task.process.children.values():
        if (match is not None and not match(child)) or not _eligible(task, child, options):
            continue
        any_child = True
        trace = child.leader.ptrace
        if trace is not None and (child.zombie or trace.tracer.process is task.process):
            continue  # the tracer's wait comes first, and ours if it is we
        if child.zombie:
            if options & WEXITED:
                code, value = describe(child.exit_code)
                found = Found(child, code, value, child.exit_code)
                if not options & WNOWAIT:
                    reap(child, waited=True)
                return found
            continue
        report = child.stop_report
        if not report:
            continue
        if report == signals.CONTINUED:
            if options & WCONTINUED:
                if not options & WNOWAIT:
                    child.stop_report = 0
                return Found(child, CLD_CONTINUED, SIGCONT, report)
        elif report > 0 and options & WSTOPPED and child.stopped:
            if not options & WNOWAIT:
                child.stop_report = -1  # told, still stopped
            return Found(child, CLD_STOPPED, report >> 8, report)
    traced, any_tracee = ptrace.find(task, match, options)
    if not any_child and not any_tracee:
        raise Errno(errno.ECHILD)
    return traced


async def wait_for(task: Task, match: Callable[[Process], bool] | None, options: int) -> Found:
    """`find` that sleeps until there is something."""
    while True:
        interrupted: Errno | None = None
        try:
            await park(task, "wait", task.process.child_events)
        except Errno as error:  # a signal, and often the child's own: what there is to report goes first (do_wait)
            interrupted = error
        found = find(task, match, options)
        if found is not None:
            return found
        if interrupted is not None:
            raise interrupted


__all__ = ["do_exit", "exit_group", "find", "reap", "wait_for"]
