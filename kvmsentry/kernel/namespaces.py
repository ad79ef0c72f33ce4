"""Namespaces of a task together (namespaces(7)): making them (clone(2), unshare(2)) and entering them (setns(2)).

    Task.creds.user_ns   userns.py      Task.uts          task.py        Task.process.pid_ns   pidns.py
    Task.fs.namespace                   fs/mounttree.py   Task.ns        the others, below

Who asks needs CAP_SYS_ADMIN towards the user namespace that will own the new ones: the one that the same call makes, if
it makes one.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap, pidns, timens, userns
from kvmsentry.kernel.timens import TimeNamespace
from kvmsentry.kernel.userns import ROOT, UserNamespace

if TYPE_CHECKING:
    from kvmsentry.fs.vfs import FsContext
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Credentials, Process, Task, UtsNamespace

# uapi/linux/sched.h
CLONE_NEWTIME, CLONE_FS, CLONE_NEWNS, CLONE_NEWCGROUP = 0x80, 0x200, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x4000000, 0x8000000, 0x10000000, 0x20000000
CLONE_NEWNET = 0x40000000
OWNED = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP | CLONE_NEWTIME
FLAGS = {b"mnt": CLONE_NEWNS, b"uts": CLONE_NEWUTS, b"ipc": CLONE_NEWIPC, b"user": CLONE_NEWUSER, b"pid": CLONE_NEWPID,
         b"net": CLONE_NEWNET, b"cgroup": CLONE_NEWCGROUP, b"time": CLONE_NEWTIME}  # fmt: skip
_numbers = itertools.count(0xF0000010)


class Simple:
    """A namespace that holds nothing here: cgroup (there is one cgroup) and the first net."""

    def __init__(self, kind: bytes, user_ns: UserNamespace, ino: int = 0) -> None:
        self.kind, self.user_ns, self.ns_ino = kind, user_ns, ino


class NsProxy:
    """The namespaces that a task rarely changes, shared by all tasks that have the same; replaced, never changed.
    `ipc`: a sysvipc.IpcNamespace, None for the first one."""

    __slots__ = ("ipc", "net", "cgroup", "time", "time_for_children", "pid_for_children")

    def __init__(
        self, ipc: Any, net: Any, cgroup: Simple, time: TimeNamespace, time_for_children: TimeNamespace,
        pid_for_children: pidns.PidNamespace,
    ) -> None:  # fmt: skip
        self.ipc, self.net, self.cgroup, self.time = ipc, net, cgroup, time
        self.time_for_children, self.pid_for_children = time_for_children, pid_for_children

    def replace(self, **changes: Any) -> NsProxy:
        """A copy with some of them changed."""
        return NsProxy(**{name: changes[name] if name in changes else getattr(self, name) for name in self.__slots__})


def first(kernel: Kernel) -> NsProxy:
    """What the sandbox boots with; inode numbers as in include/linux/proc_ns.h (the net namespace's is any)."""
    time = timens.first()
    return NsProxy(
        None, Simple(b"net", ROOT, 0xF0000000), Simple(b"cgroup", ROOT, 0xEFFFFFFB), time, time, kernel.pid_ns
    )


def inode_number(namespace: Any) -> int:
    """The inode number that tells namespaces apart."""
    number: int = namespace.ns_ino
    if not number:
        number = namespace.ns_ino = next(_numbers)
    return number


# -- making
def _made(
    task: Task, creds: Credentials, fs: FsContext, flags: int, pid_base: pidns.PidNamespace
) -> tuple[UtsNamespace, NsProxy]:
    """New namespaces for `flags`, owned by the user namespace of `creds`, for a task whose paths start from `fs` (its
    own copy). EPERM, EINVAL, ENOSPC."""
    from kvmsentry.kernel.sysvipc import IpcNamespace
    from kvmsentry.kernel.task import UtsNamespace

    kernel, owner, uts = task.kernel, creds.user_ns, task.uts
    if flags & OWNED and not userns.capable(creds, owner, cap.SYS_ADMIN):
        raise Errno(errno.EPERM)
    changes: dict[str, Any] = {}
    if flags & CLONE_NEWNET:
        from kvmsentry.net.lone import NetNamespace

        changes["net"] = net = NetNamespace(kernel, owner)
        userns.count(kernel, "net", net)
    if flags & CLONE_NEWPID:
        if pid_base is not task.process.pid_ns:
            raise Errno(errno.EINVAL)  # copy_pid_ns: another was made for the children already
        changes["pid_for_children"] = pidns.create(kernel, pid_base, owner)
    if flags & CLONE_NEWIPC:
        changes["ipc"] = ipc = IpcNamespace(owner)
        userns.count(kernel, "ipc", ipc)
    if flags & CLONE_NEWCGROUP:
        changes["cgroup"] = cgroup = Simple(b"cgroup", owner)
        userns.count(kernel, "cgroup", cgroup)
    if flags & CLONE_NEWTIME:
        changes["time_for_children"] = timens.create(kernel, owner, task.ns.time_for_children)
    if flags & CLONE_NEWUTS:
        uts = UtsNamespace(uts.nodename, uts.domainname, owner)
        userns.count(kernel, "uts", uts)
    if flags & CLONE_NEWNS:
        from kvmsentry.fs import mountops

        mountops.copy_namespace(fs, owner)
    return uts, task.ns.replace(**changes) if changes else task.ns


def for_child(task: Task, fs: FsContext, flags: int) -> tuple[Credentials, UtsNamespace, NsProxy]:
    """What a child made with CLONE_NEW* starts with; `fs` is its own. EPERM, EINVAL, ENOSPC."""
    try:
        creds = userns.create(task) if flags & CLONE_NEWUSER else task.creds
        uts, ns = _made(task, creds, fs, flags, task.ns.pid_for_children)
    except Errno:
        if fs is not task.fs:
            fs.put()
        raise
    return creds, uts, ns


def unshare(task: Task, flags: int) -> None:
    """unshare(2) of namespaces (the caller has looked at threads). EPERM, EINVAL, ENOSPC."""
    creds = task.creds
    if flags & CLONE_NEWUSER:
        creds = userns.create(task)
    fs = task.fs.copy() if flags & (CLONE_NEWNS | CLONE_NEWUSER | CLONE_FS) and task.fs.users > 1 else task.fs
    uts, ns = _made(task, creds, fs, flags, task.ns.pid_for_children)
    if fs is not task.fs:
        task.fs.put()
        task.fs = fs
    if flags & CLONE_NEWIPC:
        from kvmsentry.kernel import sysvipc

        sysvipc.end_process(task.process)  # exit_sem, exit_shm
    task.creds, task.uts, task.ns = creds, uts, ns


# -- what a task is in
def of_task(task: Task, name: bytes) -> Any:
    """The namespace behind /proc/PID/ns/NAME. ENOENT where there is none (pid_for_children before its init)."""
    if name == b"user":
        return task.creds.user_ns
    if name == b"pid":
        return task.process.pid_ns
    if name == b"pid_for_children":
        space = task.ns.pid_for_children
        if space.init is None and space.level:
            raise Errno(errno.ENOENT)
        return space
    if name == b"uts":
        return task.uts
    if name == b"mnt":
        return task.fs.namespace
    if name == b"ipc":
        from kvmsentry.kernel import sysvipc

        return sysvipc.namespace(task)
    return getattr(task.ns, name.decode())


# -- entering
def enter(task: Task, wanted: list[Any]) -> int:
    """setns(2): all of `wanted` or none. EPERM, EINVAL."""
    creds = task.creds
    changes: dict[str, Any] = {}
    uts = task.uts
    mnt: Any = None
    order = sorted(wanted, key=lambda namespace: namespace.kind != b"user")  # validate_nsset: the user namespace first
    for namespace in order:
        kind, owner = namespace.kind, namespace.user_ns
        if kind == b"user":
            creds = _enter_user(task, namespace)
            continue
        if kind == b"time" and (len(task.process.threads) > 1 or task.mm.users > 1):
            raise Errno(errno.EUSERS)
        if not userns.capable(creds, owner, cap.SYS_ADMIN):
            raise Errno(errno.EPERM)
        if kind == b"mnt":
            if not creds.holds(cap.SYS_CHROOT) or not creds.holds(cap.SYS_ADMIN):
                raise Errno(errno.EPERM)
            if task.fs.users != 1:
                raise Errno(errno.EINVAL)
            mnt = namespace
            continue
        if not creds.holds(cap.SYS_ADMIN):
            raise Errno(errno.EPERM)
        if kind == b"pid":
            if not task.process.pid_ns.sees(namespace):
                raise Errno(errno.EINVAL)  # only down: what the task itself has a number in stays above
            changes["pid_for_children"] = namespace
        elif kind == b"uts":
            uts = namespace
        elif kind == b"ipc":
            changes["ipc"] = namespace
        elif kind == b"time":
            changes["time"] = changes["time_for_children"] = namespace
        else:
            changes[kind.decode()] = namespace
    if mnt is not None:
        old, task.fs.namespace = task.fs.namespace, mnt
        mnt.users += 1
        task.fs.root = task.fs.cwd = mnt.top()
        old.put()
    if "ipc" in changes:
        from kvmsentry.kernel import sysvipc

        sysvipc.end_undo(task.process)  # exit_sem: undo of semaphores that stay behind
    task.creds, task.uts = creds, uts
    if changes:
        task.ns = task.ns.replace(**changes)
    if "time" in changes:
        timens.join(task.ns.time, task.mm, task.kernel)
    return 0


def _enter_user(task: Task, namespace: UserNamespace) -> Credentials:
    """userns_install in kernel/user_namespace.c."""
    creds = task.creds
    if namespace is creds.user_ns:
        raise Errno(errno.EINVAL)
    if len(task.process.threads) > 1 or task.fs.users != 1:
        raise Errno(errno.EINVAL)
    if not userns.capable(creds, namespace, cap.SYS_ADMIN):
        raise Errno(errno.EPERM)
    return userns.entered(creds, namespace)


def of_process(task: Task, process: Process, flags: int) -> list[Any]:
    """What setns(2) with a pidfd asks for: the namespaces of `process` in `flags`. EINVAL, ESRCH, EPERM."""
    from kvmsentry.syscall.sys_process import may_trace

    if not flags or flags & ~(OWNED | CLONE_NEWUSER | CLONE_NEWTIME):
        raise Errno(errno.EINVAL)
    leader = process.leader
    if process.zombie or leader.dead:
        raise Errno(errno.ESRCH)
    if not may_trace(task, leader):
        raise Errno(errno.EPERM)
    return [of_task(leader, name) for name, flag in FLAGS.items() if flags & flag]
