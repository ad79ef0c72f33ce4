"""The only place where kernel code yields: wait queues, `park`, and the timer heap.

A system call that may sleep is a coroutine; the one thing it can await is `park` (or something built on it here).
Every sleep names its reason (shown by the task dump and /proc/PID/wchan), the queues that may wake it, and how it is
aborted: a signal makes an interruptible sleep raise `Errno(restart)`, where `restart` is one of the kernel's private
ERESTART* numbers that signal delivery turns into EINTR or a restarted call, as Linux does (include/linux/errno.h).

States of a task's coroutine:

    running --park--> parked --notify / timer / interrupt--> ready (kernel.ready) --step--> running
"""

from __future__ import annotations

import heapq
import types
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.vcpu.layout import NEVER

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

# include/linux/errno.h: never seen by the application.
ERESTARTSYS = 512  # restart if SA_RESTART, else EINTR
ERESTARTNOINTR = 513  # always restart
ERESTARTNOHAND = 514  # restart if no handler runs, else EINTR
ERESTART_RESTARTBLOCK = 516  # restart through restart_syscall(2) if no handler runs, else EINTR

RESTART_CODES = (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK)

ALL_EVENTS = 0xFFFFFFFF


class WaitQueue:
    """Those who want to hear of something. A waiter is any object with `notify(mask)`; order of arrival is kept."""

    __slots__ = ("waiters",)

    def __init__(self) -> None:
        self.waiters: dict[Any, None] = {}

    def add(self, waiter: Any) -> None:
        """Register `waiter`; the same one twice counts once."""
        self.waiters[waiter] = None

    def remove(self, waiter: Any) -> None:
        """Forget `waiter`; no error when it is not there."""
        self.waiters.pop(waiter, None)

    def wake(self, mask: int = ALL_EVENTS, count: int = 0) -> int:
        """Tell the waiters that the events in `mask` (poll(2) bits, or ALL_EVENTS) have come; `count` > 0 stops after
        that many took it. Returns how many took it. A waiter's `notify` returns True when it took the event."""
        if not self.waiters:
            return 0
        taken = 0
        for waiter in list(self.waiters):
            if waiter.notify(mask):
                taken += 1
                if taken == count:
                    break
        return taken

    def __bool__(self) -> bool:
        return bool(self.waiters)


class Sleep:
    """One parked task: what it waits for and how it is woken. Made by `park` only."""

    __slots__ = ("task", "reason", "queues", "mask", "deadline", "restart", "woken", "value", "timer")

    def __init__(
        self,
        task: Task,
        reason: str,
        queues: tuple[WaitQueue, ...],
        mask: int,
        deadline: int | None,
        restart: int,
    ) -> None:
        self.task, self.reason, self.queues, self.mask = task, reason, queues, mask
        self.deadline, self.restart = deadline, restart
        self.woken = False
        self.value: int | Errno = 0
        self.timer: Timer | None = None

    def notify(self, mask: int) -> bool:
        """Called by a WaitQueue: wakes the task with the events it asked for."""
        mask &= self.mask
        if self.woken or not mask:
            return False
        self._wake(mask)
        return True

    def expire(self) -> None:
        """Called by the timer: wakes the task with 0."""
        if not self.woken:
            self._wake(0)

    def interrupt(self) -> bool:
        """Called by signal delivery: aborts the sleep. False when it is already over or can't be interrupted."""
        if self.woken or not self.restart:
            return False
        self._wake(Errno(self.restart))
        return True

    def kill(self) -> None:
        """Called when the task must die now, even from an uninterruptible sleep."""
        if not self.woken:
            self._wake(Errno(self.restart or ERESTARTNOINTR))

    def _wake(self, value: int | Errno) -> None:
        self.woken, self.value = True, value
        for queue in self.queues:
            queue.waiters.pop(self, None)
        if self.timer is not None:
            self.timer.cancel()
        self.task.kernel.ready.append(self.task)


@types.coroutine
def _yield(sleep: Sleep) -> Generator[Sleep, int, int]:
    return (yield sleep)


async def park(
    task: Task,
    reason: str,
    *queues: WaitQueue,
    mask: int = ALL_EVENTS,
    deadline: int | None = None,
    restart: int = ERESTARTSYS,
) -> int:
    """Sleep until one of `queues` is woken with an event in `mask`; returns those events, or 0 when `deadline` (ns of
    `kernel.now()`) has passed. A signal raises Errno(restart); restart=0 makes the sleep uninterruptible (only a fatal
    signal ends it). Check the condition before and after: wake-ups may be spurious."""
    sleep = Sleep(task, reason, queues, mask, deadline, restart)
    if restart and task.signal_pending():
        raise Errno(restart)
    for queue in queues:
        queue.waiters[sleep] = None
    if deadline is not None:
        sleep.timer = task.kernel.timers.at(deadline, sleep.expire)
    return await _yield(sleep)


class Pace:
    """For calls that keep the Sentry busy long on an application's word: they work in pieces and, when their turn is
    over, sleep a little, so that the other tasks' calls are answered meanwhile.

        pace = Pace(task)
        for piece in ...:
            if pace.due():
                await pace.rest()
    """

    __slots__ = ("task", "began")
    TURN = 3_000_000  # ns

    def __init__(self, task: Task) -> None:
        self.task, self.began = task, task.kernel.now()

    def due(self) -> bool:
        """Is the turn over?"""
        return self.task.kernel.now() - self.began > self.TURN

    async def rest(self, restart: int = ERESTARTSYS) -> None:
        """The others' turn; a signal raises Errno(restart)."""
        now = self.task.kernel.now()
        await park(self.task, "busy", deadline=now + (now - self.began) // 4, restart=restart)
        self.began = self.task.kernel.now()


class Timer:
    """A callback due at a time; `cancel` may be called any time, also from the callback."""

    __slots__ = ("deadline", "callback")

    def __init__(self, deadline: int, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """The callback will not be called any more."""
        self.callback = None


class Timers:
    """All timers of the kernel, on its monotonic clock in ns. Cancelled ones stay in the heap until due or until they
    outnumber the live ones."""

    __slots__ = ("heap", "deadline", "_sequence", "_kernel")

    def __init__(self, kernel: Kernel) -> None:
        self.heap: list[tuple[int, int, Timer]] = []
        self.deadline = NEVER  # of the earliest, live or cancelled; read from C too (vcpu/dispatch.c)
        self._sequence = 0
        self._kernel = kernel

    def at(self, deadline: int, callback: Callable[[], None]) -> Timer:
        """Call `callback()` on the Sentry thread once `kernel.now()` has reached `deadline` (ns)."""
        timer = Timer(deadline, callback)
        heap = self.heap
        self._sequence += 1
        if len(heap) > 4096 and self._sequence % 4096 == 0:
            heap[:] = [entry for entry in heap if entry[2].callback is not None]
            heapq.heapify(heap)
        self._drop_cancelled()
        heapq.heappush(heap, (deadline, self._sequence, timer))
        self.deadline = heap[0][0]
        return timer

    def _drop_cancelled(self) -> None:
        heap = self.heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)

    def run(self, now: int) -> None:
        """Call what is due."""
        heap = self.heap
        while heap and heap[0][0] <= now:
            timer = heapq.heappop(heap)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        self._drop_cancelled()
        self.deadline = heap[0][0] if heap else NEVER
