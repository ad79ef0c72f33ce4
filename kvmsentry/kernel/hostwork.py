"""Host calls that take long (a disk's flush) on a thread of their own, so that the Sentry's goes on serving.

    await on_host(task, "fsync", call) -> the thread runs call() -> its eventfd wakes the Sentry -> the task goes on

One thread, one call at a time, started when first needed. It touches nothing of the kernel's but its own queues.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.kernel.traps import WaitQueue, park

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task


class Job:
    """One call; `error` is its errno, 0 when it went well, once `done`."""

    __slots__ = ("call", "waiters", "done", "error")

    def __init__(self, call: Callable[[], None]) -> None:
        self.call, self.waiters = call, WaitQueue()
        self.done, self.error = False, 0


class HostThread:
    """The thread and its two queues."""

    def __init__(self, kernel: Kernel) -> None:
        self.todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.finished: deque[Job] = deque()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        kernel.platform.watch(self.bell, select.EPOLLIN, self._collect)
        threading.Thread(target=self._work, name="host calls", daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self.todo.get()
            try:
                job.call()
            except OSError as error:
                job.error = error.errno or 5  # EIO
            self.finished.append(job)
            os.eventfd_write(self.bell, 1)

    def _collect(self, events: int) -> None:
        """On the Sentry's thread."""
        os.eventfd_read(self.bell)
        while self.finished:
            job = self.finished.popleft()
            job.done = True
            job.waiters.wake()


async def on_host(task: Task, reason: str, call: Callable[[], None]) -> int:
    """Run `call` and sleep meanwhile, whatever signals come (but the fatal ones); 0, or Errno with what the host
    said."""
    kernel = task.kernel
    thread: HostThread | None = kernel.__dict__.get("host_thread")
    if thread is None:
        thread = kernel.__dict__["host_thread"] = HostThread(kernel)
    job = Job(call)
    thread.todo.put(job)
    while not job.done:
        await park(task, reason, job.waiters, restart=0)
    if job.error:
        raise Errno(job.error)
    return 0
