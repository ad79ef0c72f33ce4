"""The Sentry's one thread: takes events from the platform, runs handlers and coroutines, answers.

    serve() -> ctx --EV_SYSCALL--> table row --int--> ctx.reply
                                             --coroutine--> step ... park ... step --int--> ctx.reply
                   --EV_FAULT----> mm.handle_fault, else SIGSEGV
                   --EV_KICKED---> exit_to_user

Of system calls, `serve`, which is the platform's, makes and answers most by itself, in C where that is faster: those of
tasks that have no work pending and are not looked at by strace, a filter or a tracer, as long as a handler returns an
int. It says what is left: a call that was made, a call that is to be made, any other event.

Before a task with `work` pending goes back to application code it passes `exit_to_user`, a coroutine of
kernel/signals.py that delivers signals, stops, or dies. Exactly one of reply, reload, park and release answers each
event."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from kvmsentry import log
from kvmsentry.errors import BrokenInvariant, Errno, OutOfMemory
from kvmsentry.kernel import namespaces, pidns, ptrace, traps
from kvmsentry.kernel.task import Process, Session, SigInfo, Task, UtsNamespace
from kvmsentry.kernel.traps import Sleep, Timers
from kvmsentry.syscall import table
from kvmsentry.syscall.names import NAMES
from kvmsentry.syscall.table import GONE, RELOAD
from kvmsentry.vcpu.layout import EV_EXCEPTION, EV_FAULT, EV_HOST_ERROR, EV_KICKED, EV_SYSCALL, NEVER, RAX

PID_MAX = 32768
RESTARTS = (-traps.ERESTARTSYS, -traps.ERESTARTNOINTR, -traps.ERESTARTNOHAND, -traps.ERESTART_RESTARTBLOCK)


class Kernel:
    """Everything that is one per sandbox."""

    def __init__(self, platform: Any, frames: Any, hostname: str = "kvmsentry") -> None:
        self.boot_time = time.time_ns()
        self.boot_monotonic = time.monotonic_ns()
        self.platform, self.frames = platform, frames
        self.memory = platform.memory if platform is not None else None
        self.uts = UtsNamespace(hostname)
        self.uts.ns_ino = 0xEFFFFFFE  # PROC_UTS_INIT_INO, include/linux/proc_ns.h
        self.tasks: dict[int, Task] = {}  # by tid
        self.processes: dict[int, Process] = {}  # by pid, zombies too
        self.pid_ns = pidns.first(self)
        self.sessions: dict[int, Session] = {}
        self.ready: deque[Task] = deque()  # tasks whose sleep is over
        self.timers = Timers(self)
        self.messages: deque[tuple[int, int, str]] = deque(maxlen=512)  # dmesg after the boot: (level, µs, text)
        self.deferred: list[Callable[[], None]] = []  # to be called before the next wait: work that must not nest
        self.init: Process | None = None
        self.exit_status: int | None = None  # wait status of init once it is gone
        self.all_cpus = frozenset(range(len(os.sched_getaffinity(0))))
        self.vdso: Any = None  # kernel/vdso.py, where the platform's counter allows it
        self.strace: Any = None  # a kvmsentry.syscall.strace.Strace while calls are traced
        self.max_tasks = PID_MAX - 1
        self.task_events = 0  # how many events were handled
        self.devices: Any = None  # terminals and pseudo-terminals, fs/devfs.py
        self.sysctl: Any = None  # values of /proc/sys, fs/proc/sysctl.py
        self.ns = namespaces.first(self)

    def now(self) -> int:
        """CLOCK_MONOTONIC as the application sees it, in ns since this kernel booted; what deadlines are measured
        by."""
        return time.monotonic_ns() - self.boot_monotonic

    def say(self, level: int, text: str) -> None:
        """A line for dmesg and for the log; `level` as in syslog(2), 3 is an error."""
        self.messages.append((level, self.now() // 1000, text))
        log.log(text)

    def new_pid(self) -> int:
        """The next free id, for a task, process group and session alike; EAGAIN when there is none."""
        if len(self.tasks) >= self.max_tasks:
            raise Errno(errno.EAGAIN)
        space = self.pid_ns
        pid = space.last_pid
        for _ in range(PID_MAX):
            pid += 1
            if pid >= PID_MAX:
                pid = 300 if space.last_pid > 300 else 1  # as Linux does: low numbers once only (RESERVED_PIDS)
            if pid not in self.tasks and pid not in self.processes and not self._group_in_use(pid):
                space.last_pid = pid
                return pid
        raise Errno(errno.EAGAIN)

    def _group_in_use(self, pid: int) -> bool:
        return pid in self.sessions or any(pid in session.groups for session in self.sessions.values())

    # -- the loop ----------------------------------------------------------------------------------
    def run(self) -> int:
        """Serve until init is gone and every task with it; returns init's wait status (wait(2))."""
        ready, timers, deferred, calls = self.ready, self.timers, self.deferred, table.calls
        serve, step = self.platform.server(self, table.rows, Task), self.step
        while True:
            while ready:
                step(ready.popleft())
            if deferred:
                work = deferred[:]
                deferred.clear()
                for call in work:
                    call()
                continue
            if self.exit_status is not None and not self.tasks:
                return self.exit_status
            ctx = serve()
            if ctx is None:
                if timers.deadline != NEVER:
                    timers.run(self.now())
                continue
            if ctx.__class__ is tuple:
                self.made(*ctx)
                continue
            task: Task = ctx.owner
            if ctx.event != EV_SYSCALL:
                self.trap(task, ctx)
                continue
            task.in_guest = False
            if self.strace is not None or task.slow:
                self.slow_syscall(task, ctx)
                continue
            nr = task.orig_rax = ctx.nr
            call_row = calls[nr] if nr < 512 else None
            try:
                result = call_row(task, ctx.args) if call_row is not None else self.unknown_syscall(task, nr)
            except Errno as error:
                result = self.refused(task, error)
            self.finish(task, result)

    def made(self, task: Task, result: Any) -> None:
        """The platform has made a system call of `task`: what its handler returned, or the exception it raised."""
        if isinstance(result, BaseException):
            if not isinstance(result, Errno):
                raise result
            result = self.refused(task, result)
        self.finish(task, result)

    def refused(self, task: Task, error: Errno) -> int:
        """A handler raised `error`: the result. An access of user memory that finds none left ends the process."""
        if error.__class__ is OutOfMemory:
            from kvmsentry.kernel import signals

            self.say_killed(task)
            signals.force(task, SigInfo(9, 0x80))  # SIGKILL, SI_KERNEL
        return -error.errno

    def say_killed(self, task: Task) -> None:
        """The line of Linux's out-of-memory killer."""
        name = task.comm.decode(errors="replace")
        self.say(3, f"Out of memory: Killed process {task.process.pid} ({name})")

    def slow_syscall(self, task: Task, ctx: Any) -> None:
        """A call with strace, a seccomp filter or a tracer in the way."""
        nr = task.orig_rax = ctx.nr
        if task.ptrace is not None:
            self.finish(task, ptrace.traced_call(task, nr))
        else:
            self.finish(task, self.slow_call(task, nr, ctx.args))

    def slow_call(self, task: Task, nr: int, args: tuple[int, ...], traced: bool = False) -> Any:
        """Filters, strace and the call itself; what its handler returned. `traced`: a filter has asked the tracer."""
        nr &= 0xFFFFFFFF
        row = table.rows[nr] if nr < 512 else None
        try:
            verdict = task.seccomp.check(task, nr, args, traced) if task.seccomp is not None else None
            if verdict is not None:
                result: Any = verdict
            elif row is None:
                result = self.unknown_syscall(task, nr)
            else:
                if self.strace is not None:
                    self.strace(task, row, args, None)
                result = (table.calls[nr] or row.call)(task, args)
        except Errno as error:
            result = self.refused(task, error)
        if self.strace is not None and row is not None:
            if result.__class__ is int:
                self.strace(task, row, args, result)
            elif not isinstance(result, (int, table._Sentinel)):
                result = self._traced(task, row, args, result)
        return result

    async def _traced(self, task: Task, row: Any, args: tuple[int, ...], coro: Coroutine[Any, Any, Any]) -> Any:
        try:
            result = await coro
        except Errno as error:
            result = self.refused(task, error)
        if self.strace is not None:
            self.strace(task, row, args, result)
        return result

    def unknown_syscall(self, task: Task, nr: int) -> Any:
        """ENOSYS, with a line in the log the first time. The number is an int: RAX may have anything above it."""
        low = nr & 0xFFFFFFFF
        call = table.calls[low] if low != nr and low < 512 else None
        if call is not None:
            return call(task, task.ctx.args)
        name = NAMES.get(nr, "unknown")
        log.log_once(f"system call {nr} ({name}) is not supported; asked for by {task.comm.decode(errors='replace')!r}")
        return -errno.ENOSYS

    def finish(self, task: Task, result: Any) -> None:
        """A handler of `task` has returned `result`: answer, or begin what it returned."""
        while True:
            if result.__class__ is int:
                if task.work or result in RESTARTS:
                    result = self.exit_to_user(task, result)
                    continue
                task.in_guest = True
                task.ctx.reply(result)
            elif result is RELOAD:
                if task.work:
                    result = self.exit_to_user(task, None)
                    continue
                task.in_guest = True
                task.ctx.reload()
            elif result is GONE:
                pass
            else:
                task.coro = result
                task.sleep = None
                self.step(task)
            return

    def step(self, task: Task) -> None:
        """Run the coroutine of `task` until it parks or ends."""
        coro, sleep = task.coro, task.sleep
        if coro is None:
            raise BrokenInvariant(f"{task} is ready but has no coroutine")
        task.sleep = None
        try:
            if sleep is None:
                parked: Sleep = coro.send(None)
            elif sleep.value.__class__ is int:
                parked = coro.send(sleep.value)
            else:
                parked = coro.throw(sleep.value)  # type: ignore[arg-type]
        except StopIteration as end:
            task.coro = None
            self.finish(task, end.value)
            return
        except Errno as error:
            task.coro = None
            self.finish(task, self.refused(task, error))
            return
        if sleep is None:
            task.ctx.park()
        task.sleep = parked

    def exit_to_user(self, task: Task, result: int | None) -> Coroutine[Any, Any, Any]:
        """What stands between `task` and application code; `result` is None when RAX is not to be touched."""
        from kvmsentry.kernel import signals

        return signals.exit_to_user(task, result)

    # -- what is no system call --------------------------------------------------------------------
    def trap(self, task: Task, ctx: Any) -> None:
        """A fault, an exception or a kick."""
        from kvmsentry.kernel import signals

        task.in_guest = False
        task.orig_rax = -1
        event = ctx.event
        if event == EV_FAULT:
            refused = task.mm.handle_fault(ctx.fault_address, ctx.error_code)
            if refused:
                signo, code = refused
                if signo == 9:
                    self.say_killed(task)
                signals.fault(task, signo, code, ctx.fault_address, 14, ctx.error_code)
        elif event == EV_EXCEPTION:
            signals.exception(task, ctx.vector, ctx.error_code)
        elif event == EV_HOST_ERROR:
            signals.host_error(task, ctx.error_code)
        elif event != EV_KICKED:
            raise BrokenInvariant(f"unknown event {event} from {task}")
        self.finish(task, RELOAD)

    def interrupt(self, task: Task) -> None:
        """`task.work` has become true: bring the task to `exit_to_user` soon."""
        if task.in_guest:
            task.ctx.kick()
        elif task.sleep is not None:
            task.sleep.interrupt()

    def monotonic_to_real(self) -> int:
        """ns to add to `now()` for the time of day."""
        return time.time_ns() - self.now()

    # -- for people --------------------------------------------------------------------------------
    def dump(self) -> str:
        """All tasks, a line each: what the stuck machine says of itself."""
        lines = []
        for task in self.tasks.values():
            if task.dead:
                state = "dead"
            elif task.in_guest:
                state = "in guest"
            elif task.sleep is not None:
                state = f"parked: {task.sleep.reason}"
            else:
                state = "in kernel"
            row = table.rows[task.orig_rax] if 0 <= task.orig_rax < 512 else None
            call = row.name if row is not None else "-"
            lines.append(
                f"pid {task.process.pid} tid {task.tid} {task.comm.decode(errors='replace')!r} {state} in {call} "
                f"pending {task.pending.mask | task.process.pending.mask:x} blocked {task.blocked:x}"
            )
        return "\n".join(lines)

    def dump_to_stderr(self) -> None:
        """`dump`, for signal handlers and fatal errors."""
        sys.stderr.write(self.dump() + "\n")


__all__ = ["RAX", "Kernel"]
