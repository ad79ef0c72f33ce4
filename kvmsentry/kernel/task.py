"""Tasks and what they share: the objects behind clone(2)'s flags.

    Task (a thread)  --CLONE_THREAD-->  Process (a thread group)  --> ProcessGroup --> Session
      .mm       AddressSpace   CLONE_VM        .files  FdTable     CLONE_FILES
      .fs       FsContext      CLONE_FS        .sighand SigHand    CLONE_SIGHAND

All of it is touched by the Sentry thread only. The behaviour lives beside it: fork.py, exec.py, exit.py, signals.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmsentry.kernel.traps import Sleep, WaitQueue
from kvmsentry.kernel.userns import ROOT, UserNamespace

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from kvmsentry.fs.fdtable import FdTable
    from kvmsentry.fs.vfs import FsContext, Path
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.namespaces import NsProxy
    from kvmsentry.kernel.pidns import PidNamespace

NSIG = 64  # signals are 1..64; signal n is bit n-1 of a mask (arch/x86/include/uapi/asm/signal.h)
CAP_LAST = 40
ALL_CAPABILITIES = (1 << (CAP_LAST + 1)) - 1
RLIM_INFINITY = (1 << 64) - 1
SCHED_FIFO, SCHED_RR, SCHED_DEADLINE, SCHED_RESET_ON_FORK = 1, 2, 6, 0x40000000  # uapi/linux/sched.h
RLIM_NLIMITS = 16  # uapi/asm-generic/resource.h
(RLIMIT_CPU, RLIMIT_FSIZE, RLIMIT_DATA, RLIMIT_STACK, RLIMIT_CORE, RLIMIT_RSS, RLIMIT_NPROC, RLIMIT_NOFILE,
 RLIMIT_MEMLOCK, RLIMIT_AS, RLIMIT_LOCKS, RLIMIT_SIGPENDING, RLIMIT_MSGQUEUE, RLIMIT_NICE, RLIMIT_RTPRIO,
 RLIMIT_RTTIME) = range(16)  # fmt: skip


class Credentials:
    """Who a task is (credentials(7), capabilities(7)). Never changed in place: a change makes a `replace`d copy."""

    __slots__ = ("uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid", "groups", "effective", "permitted",
                 "inheritable", "bounding", "ambient", "securebits", "user_ns")  # fmt: skip

    def __init__(
        self, uid: int = 0, gid: int = 0, groups: frozenset[int] = frozenset(), capabilities: int | None = None
    ) -> None:
        self.uid = self.euid = self.suid = self.fsuid = uid
        self.gid = self.egid = self.sgid = self.fsgid = gid
        self.groups = groups
        bounding = ALL_CAPABILITIES if capabilities is None else capabilities
        self.bounding = bounding
        self.effective = self.permitted = bounding if uid == 0 else 0
        self.inheritable = self.ambient = 0
        self.securebits = 0
        self.user_ns: UserNamespace = ROOT

    def replace(self, **changes: Any) -> Credentials:
        """A copy with some fields changed."""
        new = Credentials.__new__(Credentials)
        for name in Credentials.__slots__:
            setattr(new, name, changes[name] if name in changes else getattr(self, name))
        return new

    def capable(self, capability: int) -> bool:
        """Has it CAP number `capability` towards what the first user namespace owns (capable in kernel/capability.c)?
        Towards other namespaces: userns.capable."""
        return bool(self.effective >> capability & 1) and self.user_ns is ROOT

    def holds(self, capability: int) -> bool:
        """Is CAP number `capability` in the effective set? It counts in the own user namespace (ns_capable with
        current_user_ns)."""
        return bool(self.effective >> capability & 1)


class SigAction:
    """struct sigaction as the kernel has it. `handler`: SIG_DFL 0, SIG_IGN 1 or an address. Never changed in place:
    copies of a SigHand share them."""

    __slots__ = ("handler", "flags", "restorer", "mask")

    def __init__(self, handler: int = 0, flags: int = 0, restorer: int = 0, mask: int = 0) -> None:
        self.handler, self.flags, self.restorer, self.mask = handler, flags, restorer, mask


class SigHand:
    """Dispositions of all signals; index is the signal number."""

    __slots__ = ("actions", "users")

    def __init__(self) -> None:
        self.actions = [SigAction() for _ in range(NSIG + 1)]
        self.users = 1

    def copy(self) -> SigHand:
        """For fork without CLONE_SIGHAND."""
        new = SigHand.__new__(SigHand)
        new.actions, new.users = self.actions.copy(), 1
        return new

    def reset(self) -> None:
        """execve(2), CLONE_CLEAR_SIGHAND: handlers become SIG_DFL, SIG_IGN stays (flush_signal_handlers)."""
        actions = self.actions
        for signo, action in enumerate(actions):
            if action.handler or action.flags or action.mask:
                actions[signo] = SigAction(1 if action.handler == 1 else 0)


class SigInfo:
    """siginfo_t before it is laid out: `fields` holds what `code` calls for (pid, uid, status, addr, value, ...)."""

    __slots__ = ("signo", "code", "errno", "fields", "timer")

    def __init__(self, signo: int, code: int = 0, errno: int = 0, **fields: int) -> None:
        self.signo, self.code, self.errno, self.fields = signo, code, errno, fields
        self.timer: Any = None  # the POSIX timer that sent it


class PendingSignals:
    """Signals sent and not yet taken: a mask for questions, a list for order and siginfo."""

    __slots__ = ("mask", "queue")

    def __init__(self) -> None:
        self.mask = 0
        self.queue: list[SigInfo] = []


class UtsNamespace:
    """uts_namespaces(7)."""

    kind = b"uts"

    def __init__(self, nodename: str, domainname: str = "(none)", user_ns: UserNamespace = ROOT) -> None:
        self.nodename, self.domainname, self.user_ns = nodename, domainname, user_ns
        self.ns_ino = 0


NO_NUMBERS: dict[PidNamespace, int] = {}  # of whoever lives in the first PID namespace


class Session:
    """setsid(2): process groups that share a controlling terminal. `numbers`: see pidns.py."""

    def __init__(self, sid: int, numbers: dict[PidNamespace, int] = NO_NUMBERS) -> None:
        self.sid, self.numbers = sid, numbers
        self.groups: dict[int, ProcessGroup] = {}
        self.leader: Process | None = None
        self.tty: Any = None  # the controlling terminal, fs/tty.py


class ProcessGroup:
    """setpgid(2)."""

    def __init__(self, pgid: int, session: Session, numbers: dict[PidNamespace, int] = NO_NUMBERS) -> None:
        self.pgid, self.session, self.numbers = pgid, session, numbers
        self.processes: set[Process] = set()
        session.groups[pgid] = self


class Process:
    """A thread group: what has a pid, a parent and an exit status."""

    def __init__(self, kernel: Kernel, pid: int, parent: Process | None, group: ProcessGroup) -> None:
        self.kernel, self.pid, self.parent, self.group = kernel, pid, parent, group
        self.pid_ns, self.vpid, self.numbers = kernel.pid_ns, pid, NO_NUMBERS  # pidns.py: vpid is what getpid(2) says
        self.leader: Task
        self.threads: dict[int, Task] = {}
        self.children: dict[int, Process] = {}
        self.exit_signal = 17  # SIGCHLD; what the parent gets
        self.pending = PendingSignals()
        self.rlimits: list[tuple[int, int]] = [(RLIM_INFINITY, RLIM_INFINITY)] * RLIM_NLIMITS  # (soft, hard)
        self.child_events = WaitQueue()  # wait4(2) of this process
        self.exit_events = WaitQueue()  # pidfds and other watchers of this process's end
        self.signal_events = WaitQueue()  # signalfd(2), sigtimedwait(2)
        self.zombie = False
        self.exiting = False  # exit_group or a fatal signal is under way
        self.exit_code = 0  # wait status (wait(2)) once exiting
        self.stopped = 0  # the signal that stopped it, 0 when running
        self.stop_report = 0  # wait status not yet reported to the parent (WUNTRACED, WCONTINUED)
        self.cont_events = WaitQueue()  # stopped tasks sleep here
        self.execed = False
        self.exe: Path | None = None  # what /proc/PID/exe shows
        self.exe_inode: Any = None  # the running program, not to be written to (ETXTBSY)
        self.subreaper = False
        self.dumpable = 1
        self.no_new_privs = False
        self.start_time = kernel.now()  # ns, monotonic
        self.children_user = self.children_system = 0  # ns, of waited-for children (times(2))
        self.peak_pages = self.children_peak_pages = 0  # most ever resident: of former programs; of waited-for children
        self.timers: dict[int, Any] = {}  # POSIX timers by id
        self.itimers: list[Any] = [None, None, None]
        self.cpu_limit: Any = None  # posix_timers.CpuLimit, when RLIMIT_CPU was ever set
        self.core: Any = None  # coredump.Core, while it dumps
        self.coredump_filter = 0x33  # what a core file has in it, core(5)
        self.personality = 0
        self.oom_score_adj = 0
        self.creator: Task | None = None  # the thread that forked it: __WNOTHREAD, PR_SET_PDEATHSIG
        self.unkillable = False  # the init of a PID namespace: signals without a handler do not reach it
        self.exec_task: Task | None = None  # the thread in execve(2) that waits for the others to die
        self.keyring: Any = None  # the process keyring, kernel/keys.py
        self.exec_wait = WaitQueue()  # it waits here
        group.processes.add(self)

    @property
    def session(self) -> Session:
        """The session of the process's group."""
        return self.group.session

    def __repr__(self) -> str:
        return f"<Process {self.pid}>"


class Task:
    """A thread: something with registers. `ctx` is the platform's context while it has one. vcpu/dispatch.c
    reads and writes some of the attributes, too."""

    __slots__ = (
        "_seccomp", "affinity", "altstack", "blocked", "clear_child_tid", "comm", "coro", "creds", "ctx", "dead",
        "deadline", "default_timerslack", "files", "forced_flags", "fs", "in_guest", "ioprio", "kernel", "mempolicy",
        "mm", "nice", "nr", "ns", "numbers", "orig_rax", "pdeath_signal", "pending", "policy", "process", "ptrace",
        "reqkey", "restart", "robust_list", "rseq", "saved_blocked", "session_keyring", "sighand", "sleep", "slow",
        "start_time", "stop_parked", "system_time", "thread_keyring", "tid", "timerslack", "touched", "tracees",
        "trap", "user_time", "uts", "vfork_done", "vtid", "work",
    )  # fmt: skip

    def __init__(self, kernel: Kernel, tid: int, process: Process, mm: Any, files: FdTable, fs: FsContext,
                 sighand: SigHand, creds: Credentials) -> None:  # fmt: skip
        self.kernel, self.tid, self.process = kernel, tid, process
        self.vtid, self.numbers = tid, NO_NUMBERS  # pidns.py
        self.mm, self.files, self.fs, self.sighand, self.creds = mm, files, fs, sighand, creds
        self.uts: UtsNamespace = kernel.uts
        self.ns: NsProxy = kernel.ns  # the other namespaces, namespaces.py
        self.ctx: Any = None
        self.comm = b""  # 15 bytes at most
        self.blocked = 0  # signal mask
        self.saved_blocked: int | None = None  # mask to restore after sigsuspend and friends, once a handler was set up
        self.pending = PendingSignals()
        self.work = False  # something waits to be done before the task returns to user code: signals, stops, death
        self.coro: Coroutine[Any, Any, Any] | None = None
        self.sleep: Sleep | None = None
        self.in_guest = False  # running application code: to be kicked if it must come here
        self.dead = False
        self.altstack = (0, 2, 0)  # ss_sp, ss_flags (SS_DISABLE), ss_size
        self.clear_child_tid = 0
        self.robust_list = 0
        self.rseq: tuple[int, int, int] | None = None  # address, length, signature
        self.restart: Any = None  # a function (task) -> result for restart_syscall(2)
        self.vfork_done: WaitQueue | None = None  # the parent sleeps here until we exec or exit
        self.nr = -1  # the system call under way
        self.orig_rax = -1  # its RAX at entry; -1 outside system calls (decides about restarts)
        self.start_time = kernel.now()
        self.user_time = self.system_time = 0  # ns
        self.timerslack = self.default_timerslack = 50_000
        self.pdeath_signal = 0
        self.affinity = kernel.all_cpus
        self.nice = 0
        self.policy = (0, 0)  # scheduling policy (with SCHED_RESET_ON_FORK) and priority, sched(7)
        self.deadline = (0, 0, 0)  # ns of SCHED_DEADLINE: runtime, deadline, period
        self._seccomp: Any = None
        self.slow = False  # its system calls take kernel.slow_syscall: a filter or a tracer looks at them
        self.ptrace: Any = None  # kernel/ptrace.py: what it is as a tracee
        self.tracees: dict[Task, None] | None = None  # those it traces
        self.touched = False  # its registers may have been written while it was stopped: all must be loaded
        self.forced_flags = False  # a step was armed by a tracer that is gone
        self.stop_parked = False  # sleeps in a group stop
        self.trap = (0, 0, 0)  # trapno, err and cr2 of the last fault: shown in struct sigcontext
        self.ioprio = 0
        self.session_keyring: Any = None  # kernel/keys.py
        self.thread_keyring: Any = None
        self.mempolicy = (0, 0)  # set_mempolicy(2): mode and nodes
        self.reqkey = 0  # KEYCTL_SET_REQKEY_KEYRING
        process.threads[tid] = self

    @property
    def seccomp(self) -> Any:
        """What stands before its system calls, kernel/seccomp.py."""
        return self._seccomp

    @seccomp.setter
    def seccomp(self, state: Any) -> None:
        self._seccomp = state
        self.set_slow()

    def set_slow(self) -> None:
        """Bring `slow` up to date."""
        self.slow = self._seccomp is not None or self.ptrace is not None

    @property
    def cpu(self) -> int:
        """The processor that it is told it runs on: one that it may use, the same one as long as it may. Which of the
        host's its vCPU's thread really has is the host's affair; neighbours get different ones, as they would."""
        allowed = sorted(self.affinity)
        return allowed[self.tid % len(allowed)] if allowed else 0

    def signal_pending(self) -> bool:
        """Would an interruptible sleep end at once?"""
        return self.work

    @property
    def is_leader(self) -> bool:
        """Is this the thread whose tid is the pid?"""
        return self.process.leader is self

    def rlimit(self, resource: int) -> int:
        """The soft limit."""
        return self.process.rlimits[resource][0]

    def __repr__(self) -> str:
        return f"<Task {self.tid} {self.comm.decode(errors='replace')}>"


