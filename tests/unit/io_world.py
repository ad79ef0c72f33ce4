"""KernelWorld with virtual time, names for system calls and memory to put their arguments in.

    io = IoWorld(); t = io.task
    io.pipe(t) == (r, w);  io.do(t, "write", w, io.put(t, b"x"), 1) == 1

`do` returns the result, or None when the task has parked; `result(task)` is what it was answered later. When nothing
can happen any more, the clock jumps to the next timer if `io.jump` is set.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable
from typing import Any

from kernel_fakes import FakeKernelPlatform, Idle, KernelWorld

from kvmsentry.kernel import signals
from kvmsentry.kernel.task import SigInfo, Task
from kvmsentry.syscall import table

MS = 1_000_000
AREA = 1 << 20  # bytes of scratch memory of each task
EINTR = -4
ERESTARTSYS, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = -512, -514, -516


class IoPlatform(FakeKernelPlatform):
    """Watches host descriptors with a real epoll, and owns the clock."""

    def __init__(self, world: Any, io: IoWorld) -> None:
        super().__init__(world)
        self.io = io
        self.epoll = select.epoll()
        self.watched: dict[int, Callable[[int], None]] = {}

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        self.epoll.register(fd, events)
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        self.epoll.unregister(fd)
        del self.watched[fd]

    def wait(self, timeout: int) -> Any:
        if self.watched and (events := self.epoll.poll(0)):
            for fd, mask in events:
                self.watched[fd](mask)
            return None
        try:
            return super().wait(timeout)
        except Idle:
            if timeout > 0 and self.io.jump:
                self.io.clock += timeout
                return None
            raise


class IoWorld(KernelWorld):
    def __init__(self) -> None:
        super().__init__()
        self.clock = 1000 * MS
        self.jump = True
        self.platform = IoPlatform(self.world, self)
        self.kernel.platform = self.platform
        self.kernel.now = lambda: self.clock
        self.kernel.monotonic_to_real = lambda: 1_700_000_000_000 * MS
        self.directory(b"tmp", 0o777)
        self.numbers = {row.name: row.nr for row in table.rows if row is not None}
        self.task = self.init()
        self.run()
        self.areas: dict[Task, int] = {}
        self.area(self.task)

    def area(self, task: Task) -> int:
        """Scratch memory of `task`."""
        if task not in self.areas:
            self.areas[task] = task.mm.mmap(0, AREA, 3, 0x22, None, 0)
        return self.areas[task]

    def do(self, task: Task, name: str, *args: int) -> int | None:
        """A system call by name."""
        return self.call(task, self.numbers[name], *args)

    def later(self, task: Task) -> int | None:
        """Let the loop run, and tell what `task` was answered last; None when it is still parked."""
        self.run()
        return task.ctx.log[-1] if task.ctx.where == "guest" else None

    def parked(self, task: Task) -> bool:
        return task.ctx.where == "parked"

    def fork(self, task: Task) -> Task:
        pid = self.do(task, "fork")
        self.run()
        child = self.kernel.tasks[pid]
        self.areas[child] = self.area(task)
        return child

    def thread(self, task: Task) -> Task:
        """Another task in the same process and address space."""
        tid = self.do(task, "clone", 0x100 | 0x200 | 0x400 | 0x800 | 0x10000, 0)
        self.run()
        other = self.kernel.tasks[tid]
        self.areas[other] = self.area(task) + AREA // 2
        return other

    def at(self, task: Task, offset: int = 0) -> int:
        return self.area(task) + offset

    def store(self, task: Task, data: bytes, offset: int = 0) -> int:
        at = self.area(task) + offset
        task.mm.write(at, data)
        return at

    def load(self, task: Task, length: int, offset: int = 0) -> bytes:
        return task.mm.read(self.area(task) + offset, length)

    # -- what tests do most
    def pipe(self, task: Task, flags: int = 0) -> tuple[int, int]:
        assert self.do(task, "pipe2", self.at(task), flags) == 0
        return struct.unpack("<ii", self.load(task, 8))

    def write(self, task: Task, fd: int, data: bytes) -> int | None:
        return self.do(task, "write", fd, self.store(task, data, 65536), len(data))

    def read(self, task: Task, fd: int, length: int) -> bytes | int | None:
        n = self.do(task, "read", fd, self.at(task, 65536), length)
        return self.load(task, n, 65536) if n is not None and n >= 0 else n

    def got(self, task: Task) -> bytes | int | None:
        """What a parked `read` gave in the end."""
        n = self.later(task)
        return self.load(task, n, 65536) if n is not None and n >= 0 else n

    def open(self, task: Task, path: bytes, flags: int = 0o102, mode: int = 0o644) -> int | None:
        return self.do(task, "openat", -100, self.store(task, path + b"\0", 32768), flags, mode)

    def signal(self, task: Task, signo: int, handler: int = 0x401000) -> None:
        """Send a signal that has a handler."""
        task.sighand.actions[signo].handler = handler
        task.sighand.actions[signo].flags = 0x04000000
        task.sighand.actions[signo].restorer = 0x401000
        signals.send_task(task, SigInfo(signo, 0, pid=1, uid=0))
        self.run()

    def rax(self, task: Task) -> int:
        value = task.ctx.regs[0]
        return value - (1 << 64) if value >> 63 else value

    def interrupted(self, task: Task) -> int:
        """What the system call that a handler interrupts will return: RAX in the frame that delivery has built at
        RSP."""
        assert task.ctx.log[-1] == "reload"
        value = struct.unpack("<q", task.mm.read(task.ctx.regs[6] + 8 + 40 + 13 * 8, 8))[0]
        return int(value)
