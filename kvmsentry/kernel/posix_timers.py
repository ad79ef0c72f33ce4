"""Timers that send signals: setitimer(2) and timer_create(2), on wall clocks and on processor time.

A timer on processor time has no host timer to tell it: it looks at the clock again when the earliest moment has come
at which it could be due, which is `left` divided by the threads that can run at once.
"""

from __future__ import annotations

import abc
import time

from kvmsentry.kernel import cputime
from kvmsentry.kernel.task import RLIM_INFINITY, RLIMIT_CPU, Process, SigInfo, Task
from kvmsentry.kernel.traps import Timer
from kvmsentry.syscall.abi_signal import SIGKILL, SIGXCPU

SI_TIMER, SI_KERNEL = -2, 0x80  # uapi/asm-generic/siginfo.h
CLOCK_REALTIMES = (0, 5, 8, 11)
SECOND = 1_000_000_000  # ns
FOREVER = 1 << 32  # seconds: no limit is further off
JIFFY = SECOND // 250  # CONFIG_HZ
MIN_CPU_CHECK = 1_000_000  # ns: how often, at most, a processor-time timer looks


class SignalTimer(abc.ABC):
    """What both kinds share: an expiry on some clock, an interval, and `fire`."""

    def __init__(self, process: Process) -> None:
        self.process, self.kernel = process, process.kernel
        self.interval = 0
        self.expiry: int | None = None  # on this timer's clock
        self.timer: Timer | None = None

    @abc.abstractmethod
    def clock(self) -> int:
        """Now on this timer's clock, ns."""

    @abc.abstractmethod
    def fire(self, missed: int) -> None:
        """Send the signal; `missed` further periods have passed."""

    cpu = False

    def get(self) -> tuple[int, int]:
        """(interval, time left) in ns; time left 0 when disarmed."""
        if self.expiry is None:
            return self.interval, 0
        left = self.expiry - self.clock()
        if left <= 0 and self.interval:
            left = self.interval - -left % self.interval
        return self.interval, max(left, 1)

    def set(self, interval: int, value: int, absolute: bool = False) -> None:
        """Arm (value > 0) or disarm."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.interval = interval
        if not value:
            self.expiry = None
            return
        self.expiry = value if absolute else self.clock() + value
        self._arm()

    def delete(self) -> None:
        """Disarm for good."""
        self.set(0, 0)

    def _arm(self) -> None:
        assert self.expiry is not None
        left = self.expiry - self.clock()
        if self.cpu:
            left = max(left // max(1, min(len(self.process.threads), len(self.kernel.all_cpus))), MIN_CPU_CHECK)
        self.timer = self.kernel.timers.at(self.kernel.now() + max(left, 0), self._due)

    def _due(self) -> None:
        self.timer = None
        if self.expiry is None or self.process.zombie:
            return
        late = self.clock() - self.expiry
        if late < 0:
            self._arm()
            return
        missed = 0
        if self.interval:
            missed = late // self.interval
            self.expiry += (missed + 1) * self.interval
            self._arm()
        else:
            self.expiry = None
        self.fire(missed)


class IntervalTimer(SignalTimer):
    """setitimer(2): ITIMER_REAL 0, ITIMER_VIRTUAL 1, ITIMER_PROF 2."""

    def __init__(self, process: Process, which: int, signo: int) -> None:
        super().__init__(process)
        self.which, self.signo = which, signo
        self.cpu = which != 0

    def clock(self) -> int:
        return cputime.of_process(self.process) if self.cpu else self.kernel.now()

    def fire(self, missed: int) -> None:
        from kvmsentry.kernel import signals

        signals.send_process(self.process, SigInfo(self.signo, SI_KERNEL))


class CpuLimit(SignalTimer):
    """RLIMIT_CPU: SIGXCPU at the soft limit and every second then, SIGKILL at the hard one: check_process_timers."""

    cpu = True

    def clock(self) -> int:
        return cputime.of_process(self.process)

    def renew(self) -> None:
        """The limit is another."""
        soft = self.process.rlimits[RLIMIT_CPU][0]
        self.set(0, 0 if soft == RLIM_INFINITY else max(1, min(soft, FOREVER) * SECOND), absolute=True)

    def fire(self, missed: int) -> None:
        from kvmsentry.kernel import signals

        soft, hard = self.process.rlimits[RLIMIT_CPU]
        if hard != RLIM_INFINITY and self.clock() >= hard * SECOND:
            signals.send_process(self.process, SigInfo(SIGKILL, SI_KERNEL))
            return
        self.process.rlimits[RLIMIT_CPU] = soft + 1, hard
        self.renew()
        signals.send_process(self.process, SigInfo(SIGXCPU, SI_KERNEL))


def renew_cpu_limit(process: Process) -> None:
    """RLIMIT_CPU of `process` was set or inherited."""
    if process.cpu_limit is None:
        if process.rlimits[RLIMIT_CPU][0] == RLIM_INFINITY:
            return
        process.cpu_limit = CpuLimit(process)
    process.cpu_limit.renew()


class PosixTimer(SignalTimer):
    """timer_create(2). `signo` None: SIGEV_NONE."""

    def __init__(
        self,
        process: Process,
        number: int,
        clockid: int,
        signo: int | None,
        value: int,
        thread: Task | None,
        creator: Task,
    ) -> None:
        super().__init__(process)
        self.number, self.clockid, self.signo, self.value, self.thread = number, clockid, signo, value, thread
        self.creator = creator
        self.cpu = clockid in (2, 3) or clockid < 0
        self.queued: SigInfo | None = None  # sent and not yet taken: further expiries only count
        self.halted = False  # periodic, and waits for its signal to be taken (posixtimer_rearm in the Linux kernel)
        self.overrun = self.overrun_delivered = 0

    def clock(self) -> int:
        if self.clockid in CLOCK_REALTIMES:
            return time.time_ns()
        if self.cpu:
            return cputime.of_task(self.creator) if self.clockid == 3 else cputime.of_process(self.process)
        return self.kernel.now()

    def set(self, interval: int, value: int, absolute: bool = False) -> None:
        """As the others. A signal of the old setting that is still queued has no say in the new one."""
        self.halted = False
        super().set(interval, value, absolute)

    def get(self) -> tuple[int, int]:
        """As the others; one that sends nothing and has expired is at 0."""
        interval, left = super().get()
        if self.signo is None and not interval and self.expiry is not None and self.clock() >= self.expiry:
            left = 0
        return interval, left

    def _arm(self) -> None:
        if self.signo is not None:  # else nobody hears of it: only `get` is asked
            super()._arm()

    def _due(self) -> None:
        """A periodic timer stands still until its signal is taken: one with a period of 1 ns keeps nobody from running.
        How often it would have expired meanwhile is the overrun."""
        self.timer = None
        if self.expiry is None or self.process.zombie:
            return
        if self.clock() < self.expiry:
            self._arm()
            return
        if self.interval:
            self.halted = True
        else:
            self.expiry = None
        self.fire(0)

    def fire(self, missed: int) -> None:
        from kvmsentry.kernel import signals

        assert self.signo is not None
        if self.queued is not None:
            self.overrun += missed + 1
            return
        self.overrun = missed
        info = SigInfo(self.signo, SI_TIMER, timerid=self.number, overrun=missed, value=self.value)
        info.timer = self
        self.queued = info
        if self.thread is not None:
            signals.send_task(self.thread, info)
        else:
            signals.send_process(self.process, info)

    def delivered(self, info: SigInfo) -> None:
        """Signal delivery took our signal: its overrun count is final, the next expiry may queue again."""
        self.queued = None
        if self.halted and self.expiry is not None:
            self.halted = False
            missed = max(0, self.clock() - self.expiry) // self.interval
            self.overrun += missed
            self.expiry += (missed + 1) * self.interval
            self._arm()
        info.fields["overrun"] = self.overrun_delivered = min(self.overrun, 0x7FFFFFFF)
        self.overrun = 0

    def dropped(self) -> None:
        """Nobody takes our signal, it is ignored. A periodic timer goes on, but a jiffy later at the earliest, or one
        with a period of 1 ns would keep everybody from running (posix_timer_fn, kernel/time/posix-timers.c)."""
        self.queued = None
        if self.halted and self.expiry is not None:
            self.halted = False
            self.expiry += max(1, -(-(self.clock() + JIFFY - self.expiry) // self.interval)) * self.interval
            self._arm()
