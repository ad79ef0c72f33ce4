"""Processor time of tasks and processes (times(2), clock_gettime(2) CPU clocks, /proc/PID/stat).

Application time is the time its vCPU's runner thread has used; the platform tells it. The Sentry's own work for a task
is charged to nobody: it runs on another thread, as a hypervisor's would.
"""

from __future__ import annotations

from kvmsentry.kernel.task import Process, Task


def of_task(task: Task) -> int:
    """ns of processor time that `task` has used."""
    ctx = task.ctx
    return task.user_time + task.system_time + (ctx.cpu_ns() if ctx is not None else 0)


def of_process(process: Process) -> int:
    """ns of processor time of a process: its living threads and those that have ended."""
    ended = getattr(process, "ended_time", 0)
    return ended + sum(of_task(task) for task in process.threads.values())


def account_exit(task: Task) -> None:
    """`task` is about to lose its context: keep what it used. Call once, before ctx.release()."""
    total = of_task(task)
    task.user_time, task.system_time = total, 0
    process = task.process
    process.ended_time = getattr(process, "ended_time", 0) + total  # type: ignore[attr-defined]
