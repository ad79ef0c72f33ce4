"""pidfds: descriptors that mean a process (pidfd_open(2)). Readable once the process has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmsentry.fs.anon import AnonFile
from kvmsentry.fs.vfs import O_RDWR, POLLHUP, POLLIN, POLLRDNORM, File
from kvmsentry.kernel.traps import WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Process


class PidFile(AnonFile):
    """An open pidfd. `process` None: clone(2) has not made it yet."""

    name = b"pidfd"
    seek = File.seek  # ESPIPE

    def __init__(self, process: Process | None, flags: int = 0) -> None:
        super().__init__(O_RDWR | flags)
        self.process: Any = None
        self.queue: WaitQueue | None = None
        if process is not None:
            self.attach(process)

    def attach(self, process: Process) -> None:
        """The process that this descriptor means."""
        self.process, self.queue = process, process.exit_events

    def poll(self) -> int:
        """POLLIN when the process has ended, POLLHUP too when it was waited for."""
        process = self.process
        if not process.zombie:
            return 0
        gone = process.kernel.processes.get(process.pid) is not process
        return POLLIN | POLLRDNORM | (POLLHUP if gone else 0)

    def fdinfo(self) -> str:
        """The lines of /proc/PID/fdinfo: -1 once the process was waited for."""
        process = self.process
        if process.kernel.processes.get(process.pid) is not process:
            return "Pid:\t-1\nNSpid:\t-1\n"
        inner = "".join(f"\t{number}" for number in process.numbers.values())
        return f"Pid:\t{process.pid}\nNSpid:\t{process.pid}{inner}\n"
