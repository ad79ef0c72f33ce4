"""PID namespaces (pid_namespaces(7)): every task has a number in its own namespace and in each one above.

    Task.tid      number in the first namespace: what the kernel itself uses
    Task.vtid     number in its own namespace: what gettid(2) returns
    Task.numbers  {namespace: number} for the namespaces below the first one, innermost last; empty in the first

`PidNamespace.tasks` and `.processes` answer for numbers that come in. Those of the first namespace are the kernel's own
tables, so a handler asks `task.process.pid_ns.tasks` and no more is to be done in either case.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import userns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Process, ProcessGroup, Session, SigInfo, Task

PID_MAX = 32768
RESERVED_PIDS = 300  # kernel/pid.c
MAX_LEVEL = 32  # MAX_PID_NS_LEVEL


class PidNamespace:
    """One namespace. `init` is its first process: it is killed by no signal from inside, and takes all with it."""

    kind = b"pid"

    def __init__(self, parent: PidNamespace | None, user_ns: userns.UserNamespace) -> None:
        self.parent, self.user_ns = parent, user_ns
        self.level: int = parent.level + 1 if parent is not None else 0
        self.tasks: dict[int, Task] = {}
        self.processes: dict[int, Process] = {}  # zombies too
        self.init: Process | None = None
        self.closed = False  # init is gone: nobody is born here any more
        self.last_pid = 0
        self.ns_ino = 0

    # -- numbers going out; 0 for what the namespace does not see
    def pid_of(self, process: Process | None) -> int:
        """The process's number here."""
        if process is None:
            return 0
        return process.numbers.get(self, 0) if self.level else process.pid

    def tid_of(self, task: Task) -> int:
        """The thread's number here."""
        return task.numbers.get(self, 0) if self.level else task.tid

    def pgid_of(self, group: ProcessGroup | None) -> int:
        """The process group's number here."""
        if group is None:
            return 0
        return group.numbers.get(self, 0) if self.level else group.pgid

    def sid_of(self, session: Session) -> int:
        """The session's number here."""
        return session.numbers.get(self, 0) if self.level else session.sid

    # -- numbers coming in
    def group(self, number: int) -> ProcessGroup | None:
        """The process group with that number here."""
        for process in self.processes.values():
            if self.pgid_of(process.group) == number:
                return process.group
        return None

    def sees(self, other: PidNamespace) -> bool:
        """Is `other` this namespace or below it?"""
        ns: PidNamespace | None = other
        while ns is not None and ns.level > self.level:
            ns = ns.parent
        return ns is self

    def _in_use(self, number: int) -> bool:
        if number in self.tasks or number in self.processes:
            return True
        return any(
            number in (process.group.numbers.get(self), process.group.session.numbers.get(self))
            for process in self.processes.values()
        )

    def next_number(self, wanted: int = 0) -> int:
        """A free number, or `wanted` if it is free: EEXIST, EAGAIN, ENOMEM when init is gone."""
        if self.closed:
            raise Errno(errno.ENOMEM)
        if wanted:
            if self._in_use(wanted):
                raise Errno(errno.EEXIST)
            return wanted
        number = self.last_pid
        for _ in range(PID_MAX):
            number += 1
            if number >= PID_MAX:
                number = RESERVED_PIDS if self.last_pid > RESERVED_PIDS else 1
            if not self._in_use(number):
                self.last_pid = number
                return number
        raise Errno(errno.EAGAIN)


def first(kernel: Kernel) -> PidNamespace:
    """The namespace that holds everything; its tables are the kernel's."""
    ns = PidNamespace(None, userns.ROOT)
    ns.tasks, ns.processes = kernel.tasks, kernel.processes
    ns.ns_ino = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
    return ns


def create(kernel: Any, parent: PidNamespace, user_ns: userns.UserNamespace) -> PidNamespace:
    """CLONE_NEWPID: EINVAL when the parent belongs to a user namespace that is not above, ENOSPC."""
    if not user_ns.below(parent.user_ns):
        raise Errno(errno.EINVAL)
    if parent.level >= MAX_LEVEL:
        raise Errno(errno.ENOSPC)
    ns = PidNamespace(parent, user_ns)
    userns.count(kernel, "pid", ns)
    return ns


def allocate(task: Task, ns: PidNamespace, set_tid: Sequence[int]) -> tuple[int, dict[PidNamespace, int]]:
    """(number in the first namespace, numbers below) for a task to be born in `ns`; `set_tid` (clone3(2)) asks for
    some, the innermost first. EPERM, EINVAL, EEXIST, EAGAIN, ENOMEM. Nothing is taken yet but the counters moved."""
    kernel = task.kernel
    if len(set_tid) > ns.level + 1:
        raise Errno(errno.EINVAL)
    chain = []
    space: PidNamespace | None = ns
    while space is not None:
        chain.append(space)
        space = space.parent
    wanted = dict(zip(chain, set_tid, strict=False))
    for space, number in wanted.items():
        if not 0 < number < PID_MAX or (number != 1 and space.init is None and space.level):
            raise Errno(errno.EINVAL)
        creds = task.creds
        from kvmsentry.kernel import cap

        if not (
            userns.capable(creds, space.user_ns, cap.CHECKPOINT_RESTORE)
            or userns.capable(creds, space.user_ns, cap.SYS_ADMIN)
        ):
            raise Errno(errno.EPERM)
    numbers = {}
    for space in reversed(chain[:-1]):
        numbers[space] = space.next_number(wanted.get(space, 0))
    root = wanted.get(chain[-1], 0)
    if not root:
        return kernel.new_pid(), numbers
    if root in kernel.tasks or root in kernel.processes or kernel._group_in_use(root):
        raise Errno(errno.EEXIST)
    return root, numbers


def enter_process(process: Process, ns: PidNamespace, numbers: dict[PidNamespace, int]) -> None:
    """A new process has these numbers."""
    process.pid_ns, process.numbers, process.vpid = ns, numbers, numbers[ns]
    for space, number in numbers.items():
        space.processes[number] = process
    if ns.init is None:
        ns.init = process
        process.unkillable = True


def enter_task(task: Task, numbers: dict[PidNamespace, int]) -> None:
    """A new thread has these numbers."""
    task.numbers = numbers
    for space, number in numbers.items():
        space.tasks[number] = task
        task.vtid = number


def leave_task(task: Task) -> None:
    """The thread is gone."""
    for space, number in task.numbers.items():
        if space.tasks.get(number) is task:
            del space.tasks[number]


def leave_process(process: Process) -> None:
    """The process was waited for."""
    for space, number in process.numbers.items():
        if space.processes.get(number) is process:
            del space.processes[number]


def become_leader(task: Task, process: Process) -> None:
    """exec(2) by another thread than the leader: it takes over the leader's numbers."""
    leave_task(task)
    enter_task(task, process.numbers)


def adapt(process: Process, info: SigInfo) -> tuple[SigInfo, bool]:
    """What a process below the first namespace is told of a signal's sender, and whether the signal comes from above:
    then SIGKILL and SIGSTOP reach even its init (send_signal_locked in kernel/signal.c)."""
    fields = info.fields
    if "pid" not in fields:
        return info, False  # what the application said word for word (sys_signal.py), or nothing about a sender
    number, ns, kernel = fields["pid"], process.pid_ns, process.kernel
    if number and number in kernel.processes:
        number = ns.pid_of(kernel.processes[number])
    elif number:  # a traced thread tells of itself
        number = ns.tid_of(kernel.tasks[number]) if number in kernel.tasks else 0
    uid = userns.shown_uid(process.leader.creds.user_ns, fields.get("uid", 0))
    changed = type(info)(info.signo, info.code, info.errno, **{**fields, "pid": number, "uid": uid})
    changed.timer = info.timer
    return changed, process.pid_ns.level > 0 and number == 0
