"""How tasks begin: clone(2) in all its forms, and init.

`clone` checks, gathers what the child shares or copies (everything that may fail), and only then makes the task; what
was gathered before a failure is given back. Forks are hot: an ordinary one costs little more than AddressSpace.fork.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs.fdtable import FdTable
from kvmsentry.fs.vfs import FsContext, Path
from kvmsentry.kernel import cap, namespaces, pidns, ptrace, signals, timens
from kvmsentry.kernel.posix_timers import renew_cpu_limit
from kvmsentry.kernel.task import (
    NO_NUMBERS,
    RLIM_INFINITY,
    RLIMIT_CORE,
    RLIMIT_MEMLOCK,
    RLIMIT_MSGQUEUE,
    RLIMIT_NICE,
    RLIMIT_NOFILE,
    RLIMIT_NPROC,
    RLIMIT_RTPRIO,
    RLIMIT_SIGPENDING,
    RLIMIT_STACK,
    SCHED_DEADLINE,
    SCHED_FIFO,
    SCHED_RESET_ON_FORK,
    SCHED_RR,
    Credentials,
    Process,
    ProcessGroup,
    Session,
    SigHand,
    Task,
)
from kvmsentry.kernel.traps import ERESTARTNOINTR, WaitQueue, park
from kvmsentry.syscall.abi_signal import NSIG_VALID, SIGCHLD
from kvmsentry.vcpu.layout import FS_BASE, RAX, RSP, USER_TOP

# uapi/linux/sched.h
CSIGNAL = 0xFF
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_PIDFD = 0x100, 0x200, 0x400, 0x800, 0x1000
CLONE_PTRACE, CLONE_VFORK, CLONE_PARENT, CLONE_THREAD, CLONE_NEWNS = 0x2000, 0x4000, 0x8000, 0x10000, 0x20000
CLONE_SYSVSEM, CLONE_SETTLS, CLONE_PARENT_SETTID, CLONE_CHILD_CLEARTID = 0x40000, 0x80000, 0x100000, 0x200000
CLONE_DETACHED, CLONE_UNTRACED, CLONE_CHILD_SETTID, CLONE_NEWCGROUP = 0x400000, 0x800000, 0x1000000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x4000000, 0x8000000, 0x10000000, 0x20000000
CLONE_NEWNET, CLONE_IO = 0x40000000, 0x80000000
CLONE_NEWTIME = 0x80
CLONE_CLEAR_SIGHAND, CLONE_INTO_CGROUP = 1 << 32, 1 << 33
NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP
    | CLONE_NEWTIME
)  # fmt: skip
HARMLESS = CLONE_VM | CLONE_VFORK | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID  # fork and vfork: never a bad combination
INVALID_PARENT_PIDFD = CLONE_PIDFD | CLONE_PARENT_SETTID

# What init starts with, as a container engine gives it.
DEFAULT_RLIMITS = {
    RLIMIT_STACK: (8 << 20, RLIM_INFINITY),
    RLIMIT_CORE: (0, RLIM_INFINITY),
    RLIMIT_NOFILE: (1024, 1 << 20),
    RLIMIT_MEMLOCK: (8 << 20, 8 << 20),
    RLIMIT_SIGPENDING: (127_000, 127_000),
    RLIMIT_MSGQUEUE: (819_200, 819_200),
    RLIMIT_NICE: (0, 0),
    RLIMIT_RTPRIO: (0, 0),
}


def check_flags(task: Task, flags: int) -> None:
    """The combinations that copy_process in kernel/fork.c refuses with EINVAL."""
    bad = (
        flags & (CLONE_NEWNS | CLONE_FS) == CLONE_NEWNS | CLONE_FS
        or flags & (CLONE_NEWUSER | CLONE_FS) == CLONE_NEWUSER | CLONE_FS
        or flags & (CLONE_THREAD | CLONE_SIGHAND) == CLONE_THREAD
        or flags & (CLONE_SIGHAND | CLONE_VM) == CLONE_SIGHAND
        or (flags & CLONE_PARENT and task.process.unkillable)
        or (flags & CLONE_THREAD and flags & (CLONE_NEWUSER | CLONE_NEWPID))
        or (flags & CLONE_PIDFD and flags & (CLONE_DETACHED | CLONE_THREAD))
        or flags & (CLONE_SIGHAND | CLONE_CLEAR_SIGHAND) == CLONE_SIGHAND | CLONE_CLEAR_SIGHAND
    )
    if bad:
        raise Errno(errno.EINVAL)


def _check_limits(task: Task) -> None:
    kernel = task.kernel
    if len(kernel.tasks) >= kernel.max_tasks:
        raise Errno(errno.EAGAIN)
    limit = task.process.rlimits[RLIMIT_NPROC][0]
    if limit != RLIM_INFINITY:
        creds = task.creds
        uid = creds.uid
        if uid and not creds.capable(cap.SYS_RESOURCE) and not creds.capable(cap.SYS_ADMIN):
            if sum(1 for other in kernel.tasks.values() if other.creds.uid == uid) >= limit:
                raise Errno(errno.EAGAIN)


def _copy_sighand(task: Task, flags: int) -> SigHand:
    sighand = task.sighand
    if flags & CLONE_SIGHAND:
        sighand.users += 1
        return sighand
    new = sighand.copy()
    if flags & CLONE_CLEAR_SIGHAND:
        new.reset()
    return new


def _inherit_schedule(task: Task, child: Task) -> None:
    """What a child has of its parent's place in the queue; sched_fork, kernel/sched/core.c."""
    child.affinity, child.nice, child.policy = task.affinity, task.nice, task.policy
    if task.policy[0] & SCHED_RESET_ON_FORK:
        policy = task.policy[0] & ~SCHED_RESET_ON_FORK
        child.nice = max(0, task.nice)
        if policy in (SCHED_FIFO, SCHED_RR, SCHED_DEADLINE):
            policy = child.nice = 0
        child.policy = (policy, 0)


def clone(
    task: Task,
    flags: int,
    exit_signal: int,
    stack: int = 0,
    tls: int = 0,
    parent_tid: int = 0,
    child_tid: int = 0,
    pidfd: int = 0,
    set_tid: Sequence[int] = (),
) -> Any:
    """clone(2): a new task that returns 0 from the same call. Returns its tid, or a coroutine with CLONE_VFORK.
    Errors: EINVAL (flags), EAGAIN (RLIMIT_NPROC, ids, vCPUs), ENOMEM, EPERM (namespaces), EFAULT (pidfd)."""
    if flags & ~HARMLESS:
        check_flags(task, flags)
    if task.work:
        return -ERESTARTNOINTR  # a signal first: the child must not begin with half of it
    kernel, process = task.kernel, task.process
    if exit_signal > NSIG_VALID:
        raise Errno(errno.EINVAL)
    if flags & CLONE_SETTLS and tls >= USER_TOP:
        raise Errno(errno.EPERM)
    _check_limits(task)
    if task.policy[0] == SCHED_DEADLINE:
        raise Errno(errno.EAGAIN)  # sched_fork: without SCHED_RESET_ON_FORK there would be twice the bandwidth
    mm, files, fs, uts, ns, creds = task.mm, task.files, task.fs, task.uts, task.ns, task.creds
    pid_ns = ns.pid_for_children
    if flags & CLONE_THREAD and pid_ns is not process.pid_ns:
        raise Errno(errno.EINVAL)
    if not flags & CLONE_FS:
        fs = fs.copy()
    if flags & NAMESPACES:
        creds, uts, ns = namespaces.for_child(task, fs, flags)
        pid_ns = ns.pid_for_children
    if pid_ns.level or set_tid:
        tid, numbers = pidns.allocate(task, pid_ns, set_tid)
    else:
        tid, numbers = kernel.new_pid(), NO_NUMBERS
    if not flags & CLONE_VM:
        mm = mm.fork()
    else:
        mm.users += 1
    ctx: Any = None
    fd = -1
    try:
        parent_ctx = task.ctx
        ctx = kernel.platform.new_context(mm.mmu)
        if flags & CLONE_PIDFD:
            fd = _install_pidfd(task, pidfd)
        regs = ctx.regs
        regs[:] = parent_ctx.regs
        regs[RAX] = 0
        if stack:
            regs[RSP] = stack
        if flags & CLONE_SETTLS:
            regs[FS_BASE] = tls
        ctx.set_xsave(parent_ctx.xsave())
    except BaseException:
        if ctx is not None:
            ctx.release()
        if not flags & CLONE_FS:
            fs.put()
        mm.users -= 1
        if not mm.users:
            mm.destroy()
        if fd >= 0:
            task.files.remove(fd).put()
        raise
    if flags & CLONE_FS:
        fs.users += 1
    if flags & CLONE_FILES:
        files.users += 1
    else:
        files = files.copy()
    sighand = _copy_sighand(task, flags)
    if flags & CLONE_THREAD:
        child_process = process
    else:
        child_process = _new_process(task, tid, flags, exit_signal)
        if numbers:
            pidns.enter_process(child_process, pid_ns, numbers)
    child = Task(kernel, tid, child_process, mm, files, fs, sighand, creds)
    if not flags & CLONE_THREAD:
        child_process.leader = child
        kernel.processes[tid] = child_process
    kernel.tasks[tid] = child
    child.ctx = ctx
    ctx.owner = child
    if ns.time is not ns.time_for_children and not flags & CLONE_VM:
        ns = ns.replace(time=ns.time_for_children)
        timens.join(ns.time, mm, kernel)
    child.uts, child.ns, child.comm, child.blocked = uts, ns, task.comm, task.blocked
    seen = tid  # the number that the parent gets
    if numbers:
        pidns.enter_task(child, numbers)
        seen = process.pid_ns.tid_of(child)
    child.timerslack = child.default_timerslack = task.timerslack
    _inherit_schedule(task, child)
    child.seccomp, child.ioprio = task.seccomp, task.ioprio
    child.session_keyring, child.reqkey, child.mempolicy = task.session_keyring, task.reqkey, task.mempolicy
    if not flags & CLONE_VM:
        child.rseq = task.rseq
        child.altstack = task.altstack
    elif flags & CLONE_VFORK:
        child.altstack = task.altstack
    if flags & CLONE_CHILD_CLEARTID:
        child.clear_child_tid = child_tid
    if flags & CLONE_CHILD_SETTID:
        _store(mm, child_tid, child.vtid)
    if flags & CLONE_PARENT_SETTID:
        _store(task.mm, parent_tid, seen)
    if fd >= 0:
        task.files.files[fd].attach(child_process)  # type: ignore[attr-defined]
    if task.ptrace is not None:
        if flags & CLONE_VFORK:
            child.vfork_done = WaitQueue()
        return ptrace.forked(task, child, flags, exit_signal, child.vfork_done)
    if not flags & CLONE_VFORK:
        child.in_guest = True
        ctx.reload()
        return seen
    child.vfork_done = done = WaitQueue()
    child.in_guest = True
    ctx.reload()
    return _vfork_wait(task, done, seen)


async def _vfork_wait(task: Task, done: WaitQueue, tid: int) -> int:
    """The parent in vfork(2) sleeps until the child has left its address space; only death ends it sooner."""
    await park(task, "vfork", done, restart=0)
    return tid


def _store(mm: Any, address: int, tid: int) -> None:
    """Linux does not look at whether these stores succeed."""
    try:
        mm.write_u32(address, tid)
    except Errno:
        pass


def _install_pidfd(task: Task, address: int) -> int:
    from kvmsentry.kernel.pidfd import PidFile

    file = PidFile(None)
    fd = task.files.install(file, task.rlimit(RLIMIT_NOFILE), cloexec=True)
    try:
        task.mm.write_u32(address, fd)
    except Errno:
        task.files.remove(fd).put()
        raise
    return fd


def _new_process(task: Task, pid: int, flags: int, exit_signal: int) -> Process:
    process = task.process
    if flags & CLONE_PARENT:
        parent, exit_signal, creator = process.parent, process.exit_signal, process.creator
    else:
        parent, creator = process, task
    child = Process(task.kernel, pid, parent, process.group)
    child.creator = creator
    if parent is not None:
        parent.children[pid] = child
    child.exit_signal = exit_signal
    child.rlimits = list(process.rlimits)
    if process.cpu_limit is not None:
        renew_cpu_limit(child)
    child.personality, child.oom_score_adj, child.exe = process.personality, process.oom_score_adj, process.exe
    child.dumpable, child.no_new_privs = process.dumpable, process.no_new_privs
    child.coredump_filter = process.coredump_filter
    if process.exe_inode is not None:
        process.exe_inode.writers -= 1
        child.exe_inode = process.exe_inode
    return child


def create_process(
    kernel: Any,
    *,
    path: bytes,
    argv: Sequence[bytes],
    envp: Sequence[bytes],
    root: Path,
    cwd: Path | None = None,
    creds: Credentials | None = None,
    files: FdTable | None = None,
    umask: int = 0o022,
    rlimits: dict[int, tuple[int, int]] | None = None,
    parent: Process | None = None,
    tty: Any = None,
    start: bool = True,
) -> Task:
    """A process that no other forked, in a session of its own: init (the first one), or what `kvmsentry exec` starts.
    `path` is looked up from `cwd` and must be the file itself (PATH was searched by the caller). `files` passes to the
    process; `tty` becomes the controlling terminal. It runs once it returns, unless `start` is False (then
    `start_process` does it). Raises Errno as execve(2) does, with nothing left behind (but `files`, which stay the
    caller's)."""
    from kvmsentry.kernel import exec as exec_
    from kvmsentry.kernel import exit as exit_

    pid = kernel.new_pid()
    session = Session(pid)
    kernel.sessions[pid] = session
    group = ProcessGroup(pid, session)
    process = Process(kernel, pid, parent, group)
    limits = DEFAULT_RLIMITS if rlimits is None else {**DEFAULT_RLIMITS, **rlimits}
    for resource, value in limits.items():
        process.rlimits[resource] = value
    renew_cpu_limit(process)
    files = files if files is not None else FdTable()
    fs = FsContext(root, cwd if cwd is not None else root, umask)
    task = Task(kernel, pid, process, None, files, fs, SigHand(), creds if creds is not None else Credentials())
    process.leader = task
    session.leader = process
    first = kernel.init is None
    try:
        exec_.exec_first(task, path, argv, envp)
    except BaseException:
        exit_.leave_group(process)
        raise
    kernel.tasks[pid] = task
    kernel.processes[pid] = process
    if parent is not None:
        parent.children[pid] = process
        process.creator = parent.leader
    process.exit_signal = SIGCHLD
    if first:
        kernel.init = kernel.pid_ns.init = process
        process.unkillable = True
    if tty is not None:
        tty.control(process)
    if start:
        start_process(task)
    return task


def create_init(kernel: Any, **arguments: Any) -> Task:
    """The first process of a sandbox, pid 1: see `create_process`."""
    if kernel.init is not None:
        raise Errno(errno.EEXIST)
    return create_process(kernel, **arguments)


def start_process(task: Task) -> None:
    """Let a task made with `start=False` run."""
    signals.recompute(task)
    task.in_guest = True
    task.ctx.reload()


__all__ = ["clone", "create_init", "create_process", "start_process"]
