"""Tasks begin, run another program, end and are waited for: fork(2), clone(2), execve(2), exit(2), wait4(2), ids,
rusage."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from struct import Struct
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import PATH_MAX
from kvmsentry.kernel import cap, cputime, exec, exit, fork, ptrace, sysvipc, userns
from kvmsentry.kernel.exit import (
    P_ALL,
    P_PGID,
    P_PID,
    P_PIDFD,
    WALL,
    WCLONE,
    WCONTINUED,
    WEXITED,
    WNOHANG,
    WNOTHREAD,
    WNOWAIT,
    WSTOPPED,
    WUNTRACED,
    Found,
)
from kvmsentry.kernel.fork import CLONE_VFORK, CLONE_VM, CSIGNAL
from kvmsentry.kernel.task import Process, Task
from kvmsentry.kernel.traps import Pace
from kvmsentry.syscall.abi_signal import SIGCHLD
from kvmsentry.syscall.sys_io import LONG
from kvmsentry.syscall.table import (
    GONE,
    DirFd,
    Int,
    Path,
    Pid,
    Size,
    ULong,
    UserPtr,
    syscall,
)
from kvmsentry.vcpu.layout import USER_TOP

RUSAGE = Struct("<16q")  # struct rusage: ru_utime, ru_stime, ru_maxrss, ...
SIGINFO_WAIT = Struct("<iii4xiIi100x")  # si_signo si_errno si_code si_pid si_uid si_status
NO_CHILD = bytes(28)
CLONE_ARGS = Struct("<11Q")  # struct clone_args, uapi/linux/sched.h
CLONE_ARGS_VER0 = 64
ROBUST_LIST_HEAD = 24
RUSAGE_SELF, RUSAGE_CHILDREN, RUSAGE_THREAD = 0, -1, 1


# -- who am I --
@syscall(39)
def getpid(task: Task) -> int:
    return task.process.vpid


@syscall(186)
def gettid(task: Task) -> int:
    return task.vtid


@syscall(110)
def getppid(task: Task) -> int:
    process = task.process
    return process.pid_ns.pid_of(process.parent)


@syscall(218)
def set_tid_address(task: Task, address: UserPtr) -> int:
    task.clear_child_tid = address
    return task.vtid


@syscall(273)
def set_robust_list(task: Task, head: UserPtr, length: Size) -> int:
    if length != ROBUST_LIST_HEAD:
        return -errno.EINVAL
    task.robust_list = head
    return 0


@syscall(274)
def get_robust_list(task: Task, pid: Pid, head: UserPtr, length: UserPtr) -> int:
    other = task
    if pid:
        found = task.process.pid_ns.tasks.get(pid)
        if found is None:
            return -errno.ESRCH
        other = found
        if not may_trace(task, other):
            return -errno.EPERM
    task.mm.write_u64(length, ROBUST_LIST_HEAD)
    task.mm.write_u64(head, other.robust_list)
    return 0


def may_trace(task: Task, other: Task) -> bool:
    """ptrace_may_access in kernel/ptrace.c, with PTRACE_MODE_REALCREDS."""
    if task.process is other.process:
        return True
    mine, theirs = task.creds, other.creds
    if userns.capable(mine, theirs.user_ns, cap.SYS_PTRACE):
        return True
    same = mine.uid == theirs.uid == theirs.euid == theirs.suid and mine.gid == theirs.gid == theirs.egid == theirs.sgid
    return (
        same and other.process.dumpable == 1 and theirs.user_ns is mine.user_ns
        and not theirs.permitted & ~mine.permitted
    )  # fmt: skip


# -- beginning --
@syscall(57)
def sys_fork(task: Task) -> Any:
    return fork.clone(task, 0, SIGCHLD)


@syscall(58)
def vfork(task: Task) -> Any:
    return fork.clone(task, CLONE_VFORK | CLONE_VM, SIGCHLD)


@syscall(
    56,
    partial="CLONE_NEWNET gives a loopback device and no more; "
    "CLONE_IO and CLONE_SYSVSEM change nothing",
)
def clone(task: Task, flags: ULong, stack: UserPtr, parent_tid: UserPtr, child_tid: UserPtr, tls: ULong) -> Any:
    flags &= 0xFFFFFFFF
    if flags & fork.INVALID_PARENT_PIDFD == fork.INVALID_PARENT_PIDFD:
        return -errno.EINVAL
    pidfd = parent_tid if flags & fork.CLONE_PIDFD else 0
    return fork.clone(task, flags & ~CSIGNAL, flags & CSIGNAL, stack, tls, parent_tid, child_tid, pidfd)


@syscall(435, partial="as clone; CLONE_INTO_CGROUP is EINVAL")
def clone3(task: Task, args: UserPtr, size: Size) -> Any:
    if size > 4096:
        return -errno.E2BIG
    if size < CLONE_ARGS_VER0:
        return -errno.EINVAL
    data = task.mm.read(args, size)
    if any(data[CLONE_ARGS.size :]):
        return -errno.E2BIG
    (flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, _cgroup) = (
        CLONE_ARGS.unpack(data[: CLONE_ARGS.size].ljust(CLONE_ARGS.size, b"\0"))
    )
    if set_tid_size > 32 or bool(set_tid) != bool(set_tid_size) or exit_signal & ~CSIGNAL:
        return -errno.EINVAL
    if flags & ~(0xFFFFFFFF & ~CSIGNAL & ~fork.CLONE_DETACHED | fork.CLONE_NEWTIME | fork.CLONE_CLEAR_SIGHAND):
        return -errno.EINVAL
    if flags & (fork.CLONE_THREAD | fork.CLONE_PARENT) and exit_signal:
        return -errno.EINVAL
    if bool(stack) != bool(stack_size) or stack + stack_size > 1 << 47:
        return -errno.EINVAL
    wanted = [task.mm.read_u32(set_tid + 4 * index) for index in range(set_tid_size)]
    return fork.clone(task, flags, exit_signal, stack + stack_size, tls, parent_tid, child_tid, pidfd, wanted)


@syscall(59)
def execve(task: Task, path: Path, argv: UserPtr, envp: UserPtr) -> Any:
    return exec.execve(task, exec.AT_FDCWD, task.mm.read_cstring(path, PATH_MAX), argv, envp, 0)


@syscall(322)
def execveat(task: Task, dirfd: DirFd, path: Path, argv: UserPtr, envp: UserPtr, flags: Int) -> Any:
    return exec.execve(task, dirfd, task.mm.read_cstring(path, PATH_MAX), argv, envp, flags)


# -- ending --
@syscall(60)
def sys_exit(task: Task, status: Int) -> Any:
    if task.ptrace is not None:
        return ptrace.end(task, (status & 0xFF) << 8)
    exit.do_exit(task, (status & 0xFF) << 8)
    return GONE


@syscall(231)
def exit_group(task: Task, status: Int) -> Any:
    process = task.process
    exit.exit_group(process, (status & 0xFF) << 8)
    if task.ptrace is not None:
        return ptrace.end(task, process.exit_code)
    exit.do_exit(task, process.exit_code)
    return GONE


# -- waiting --
def _by_pid(task: Task, pid: int) -> Callable[[Process], bool] | None:
    """wait4's first argument as a question to a child."""
    if pid == -1:
        return None
    ns = task.process.pid_ns
    if pid > 0:
        return lambda child: ns.pid_of(child) == pid
    pgid = -pid if pid else ns.pgid_of(task.process.group)
    return lambda child: ns.pgid_of(child.group) == pgid


@syscall(61)
def wait4(task: Task, pid: Pid, status: UserPtr, options: Int, usage: UserPtr) -> Any:
    options &= 0xFFFFFFFF
    if options & ~(WNOHANG | WUNTRACED | WCONTINUED | WNOTHREAD | WALL | WCLONE):
        return -errno.EINVAL
    if pid == -(1 << 31):
        return -errno.ESRCH
    match = _by_pid(task, pid)
    found = exit.find(task, match, options | WEXITED)
    if found is not None:
        return _wait4_answer(task, found, status, usage)
    if options & WNOHANG:
        return 0
    return _wait4_sleep(task, match, options | WEXITED, status, usage)


async def _wait4_sleep(task: Task, match: Any, options: int, status: int, usage: int) -> int:
    return _wait4_answer(task, await exit.wait_for(task, match, options), status, usage)


def _wait4_answer(task: Task, found: Found, status: int, usage: int) -> int:
    if status:
        task.mm.write_u32(status, found.status)
    if usage:
        task.mm.write(usage, _rusage(found.user, found.system, found.peak_pages))
    return found.pid


@syscall(247)
def waitid(task: Task, which: Int, ident: Pid, info: UserPtr, options: Int, usage: UserPtr) -> Any:
    try:
        result = _waitid(task, which, ident, info, options & 0xFFFFFFFF, usage)
    except Errno as error:
        result = -error.errno
    if result.__class__ is int and result < 0 and info:
        task.mm.write(info, NO_CHILD)  # that there is nothing, whatever went wrong
    return result


def _waitid(task: Task, which: int, ident: int, info: int, options: int, usage: int) -> Any:
    if options & ~(WNOHANG | WNOWAIT | WEXITED | WSTOPPED | WCONTINUED | WNOTHREAD | WALL | WCLONE):
        return -errno.EINVAL
    if not options & (WEXITED | WSTOPPED | WCONTINUED):
        return -errno.EINVAL
    match: Callable[[Process], bool] | None
    if which == P_ALL:
        match = None
    elif which == P_PID:
        if ident <= 0:
            return -errno.EINVAL
        match = _by_pid(task, ident)
    elif which == P_PGID:
        if ident < 0:
            return -errno.EINVAL
        match = _by_pid(task, -ident)
    elif which == P_PIDFD:
        if ident < 0:
            return -errno.EINVAL
        from kvmsentry.kernel.pidfd import PidFile

        file = task.files.get(ident)
        if not isinstance(file, PidFile):
            return -errno.EBADF
        if file.nonblocking and not options & WNOHANG:
            found = exit.find(task, lambda child: child is file.process, options)
            return -errno.EAGAIN if found is None else _waitid_answer(task, found, info, usage)
        match = lambda child: child is file.process  # noqa: E731
    else:
        return -errno.EINVAL
    found = exit.find(task, match, options)
    if found is not None or options & WNOHANG:
        return _waitid_answer(task, found, info, usage)
    return _waitid_sleep(task, match, options, info, usage)


async def _waitid_sleep(task: Task, match: Any, options: int, info: int, usage: int) -> int:
    return _waitid_answer(task, await exit.wait_for(task, match, options), info, usage)


def _waitid_answer(task: Task, found: Found | None, info: int, usage: int) -> int:
    if found is not None and usage:
        task.mm.write(usage, _rusage(found.user, found.system, found.peak_pages))
    if info:
        if found is None:
            data = NO_CHILD
        else:
            data = SIGINFO_WAIT.pack(SIGCHLD, 0, found.code, found.pid, found.uid, found.value)[:28]
        task.mm.write(info, data)
    return 0


# -- times --
def _rusage(user: int, system: int, peak_pages: int) -> bytes:
    seconds, system_seconds, peak = user // 10**9, system // 10**9, peak_pages * 4
    return RUSAGE.pack(
        seconds, user // 1000 % 10**6, system_seconds, system // 1000 % 10**6, peak, *(0 for _ in range(11))
    )


@syscall(98, partial="times and the largest resident size; counts of faults and switches are 0")
def getrusage(task: Task, who: Int, usage: UserPtr) -> int:
    process = task.process
    if who == RUSAGE_SELF:
        data = _rusage(cputime.of_process(process), 0, max(process.peak_pages, task.mm.peak_pages))
    elif who == RUSAGE_CHILDREN:
        data = _rusage(process.children_user, process.children_system, process.children_peak_pages)
    elif who == RUSAGE_THREAD:
        data = _rusage(cputime.of_task(task), 0, max(process.peak_pages, task.mm.peak_pages))
    else:
        return -errno.EINVAL
    task.mm.write(usage, data)
    return 0


# -- other processes' memory and files --
def _other(task: Task, pid: int) -> Task:
    other = task.process.pid_ns.tasks.get(pid)
    if other is None:
        raise Errno(errno.ESRCH)
    if not may_trace(task, other):
        raise Errno(errno.EPERM)
    return other


def _iovecs(task: Task, address: int, count: int) -> list[tuple[int, int]]:
    if count > 1024:
        raise Errno(errno.EINVAL)
    words = memoryview(task.mm.read(address, 16 * count)).cast("Q") if count else []
    vectors = [(words[2 * i], words[2 * i + 1]) for i in range(count)]
    for base, length in vectors:
        if length >= 1 << 63:
            raise Errno(errno.EINVAL)
        if base + length > USER_TOP:
            raise Errno(errno.EFAULT)
    return vectors


def _transfer(
    task: Task, pid: int, local: int, local_count: int, remote: int, remote_count: int, flags: int, write: bool
) -> Any:
    if flags:
        return -errno.EINVAL
    here = _iovecs(task, local, local_count)
    there = _iovecs(task, remote, remote_count)
    if not here or not there:
        return 0
    mm, other = task.mm, _other(task, pid).mm
    if other is None:
        return -errno.ESRCH
    steps = _copy(mm, other, here, there, write)
    done = 0
    for done in steps:
        if done > LONG:
            return _copy_on(task, steps, done)
    return done


def _copy(mm: Any, other: Any, here: list[tuple[int, int]], there: list[tuple[int, int]], write: bool) -> Iterator[int]:
    """Copies, a MiB at a time; gives how many bytes are done."""
    done = 0
    here.reverse()
    address, room = here.pop()
    for start, length in there:
        while length:
            while not room:
                if not here:
                    return
                address, room = here.pop()
            n = min(length, room, 1 << 20)
            try:
                if write:
                    other.write(start, mm.read(address, n))
                else:
                    mm.write(address, other.read(start, n))
            except Errno:
                if done:
                    return
                raise
            done += n
            start += n
            address += n
            length -= n
            room -= n
            yield done


async def _copy_on(task: Task, steps: Iterator[int], done: int) -> int:
    """The rest of a long copy; a signal ends it where it is."""
    pace = Pace(task)
    for copied in steps:
        done = copied
        if pace.due():
            try:
                await pace.rest()
            except Errno:
                break
    return done


@syscall(310)
def process_vm_readv(
    task: Task, pid: Pid, local: UserPtr, local_count: ULong, remote: UserPtr, remote_count: ULong, flags: ULong
) -> Any:
    return _transfer(task, pid, local, local_count, remote, remote_count, flags, False)


@syscall(311)
def process_vm_writev(
    task: Task, pid: Pid, local: UserPtr, local_count: ULong, remote: UserPtr, remote_count: ULong, flags: ULong
) -> Any:
    return _transfer(task, pid, local, local_count, remote, remote_count, flags, True)


KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO, KCMP_SYSVSEM = range(7)  # uapi/linux/kcmp.h


@syscall(312, partial="KCMP_EPOLL_TFD is EINVAL")
def kcmp(task: Task, pid1: Pid, pid2: Pid, kind: Int, index1: ULong, index2: ULong) -> int:
    first, second = _other(task, pid1), _other(task, pid2)
    pair: tuple[Any, Any]
    if kind == KCMP_FILE:
        pair = first.files.get(index1 & 0xFFFFFFFF), second.files.get(index2 & 0xFFFFFFFF)
    elif kind == KCMP_VM:
        pair = first.mm, second.mm
    elif kind == KCMP_FILES:
        pair = first.files, second.files
    elif kind == KCMP_FS:
        pair = first.fs, second.fs
    elif kind == KCMP_SIGHAND:
        pair = first.sighand, second.sighand
    elif kind == KCMP_SYSVSEM:  # who has nothing to undo has no list, and that is the same
        pair = tuple(t.process if sysvipc.has_undo(t.process) else None for t in (first, second))  # type: ignore[assignment]
    elif kind == KCMP_IO:  # as on disks that keep nothing by process
        pair = None, None
    else:
        return -errno.EINVAL
    if pair[0] is pair[1]:
        return 0
    return 1 if id(pair[0]) < id(pair[1]) else 2  # kcmp(2): any total order
