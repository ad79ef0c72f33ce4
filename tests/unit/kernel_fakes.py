"""A kernel without processors: contexts whose guest is the test, over fake memory and a tmpfs root.

    world = KernelWorld(); init = world.init()
    world.call(init, SYS_getpid) == 1

`call` posts a system call of a task and lets the real loop run until there is nothing to do; None means that the task
parked, died, or had its registers reloaded (look at `ctx.log`).
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

from mm_fakes import World

from kvmsentry.errors import BrokenInvariant
from kvmsentry.fs.tmpfs import TmpSuper
from kvmsentry.fs.vfs import Dentry, Mount, Path
from kvmsentry.kernel import fork
from kvmsentry.kernel.kernel import Kernel
from kvmsentry.kernel.task import Credentials, Task
from kvmsentry.syscall import table
from kvmsentry.vcpu.common import HostSide
from kvmsentry.vcpu.layout import EV_EXCEPTION, EV_FAULT, EV_KICKED, EV_SYSCALL, R8, R9, R10, RAX, RDI, RDX, RIP, RSI

if table.rows[39] is None:
    table.load()

ROOT = Credentials()
BASE = 0x400000
SCRATCH = 0x500000  # a page of bss behind the program: where tests put arguments


class Idle(Exception):
    """There is nothing left to do."""


class FakeContext:
    """A processor whose application is the test. `log` tells what the Sentry answered."""

    def __init__(self, platform: FakeKernelPlatform, mmu: Any) -> None:
        self.platform, self.mmu = platform, mmu
        self.regs = memoryview(bytearray(160)).cast("Q")
        self.state = bytes(platform.xsave_size)
        self.event, self.nr, self.args = EV_SYSCALL, 0, (0,) * 6
        self.fault_address = self.error_code = self.vector = 0
        self.owner: Any = None
        self.where = "stopped"  # stopped, guest, parked, released
        self.log: list[Any] = []
        self.kicked = False

    def _answer(self, what: Any) -> None:
        if self.where not in ("stopped", "parked"):
            raise BrokenInvariant(f"answer {what} while {self.where}")
        self.where = "guest"
        self.log.append(what)

    def reply(self, result: int) -> None:
        self._answer(result)
        self.regs[RAX] = result & (1 << 64) - 1

    def reload(self) -> None:
        self._answer("reload")

    def park(self) -> None:
        if self.where not in ("stopped", "parked"):
            raise BrokenInvariant(f"park while {self.where}")
        self.where = "parked"

    def kick(self) -> None:
        if self.where == "guest" and not self.kicked:
            self.kicked = True
            self.platform.queue.append((self, EV_KICKED, ()))

    def xsave(self) -> bytes:
        assert self.where != "guest"
        return self.state

    def set_xsave(self, data: bytes | None) -> None:
        self.state = bytes(self.platform.xsave_size) if data is None else bytes(data)

    def switch(self, mmu: Any) -> None:
        self.mmu = mmu

    def release(self) -> None:
        assert self.where in ("stopped", "parked"), self.where
        self.where = "released"
        self.platform.contexts.discard(self)

    def cpu_ns(self) -> int:
        return 0


class FakeKernelPlatform:
    """The Platform: events come from the test."""

    xsave_size, xcr0 = 832, 7
    name, traits, counters = "fake", {}, {}
    server = HostSide.server

    def __init__(self, world: World) -> None:
        self.memory = world.memory
        self.mmu_factory = world.mmu
        self.queue: deque[Any] = deque()
        self.contexts: set[FakeContext] = set()
        self.fail_context: Exception | None = None

    def new_context(self, mmu: Any, regs: Any = None) -> FakeContext:
        if self.fail_context is not None:
            raise self.fail_context
        ctx = FakeContext(self, mmu)
        self.contexts.add(ctx)
        return ctx

    def wait(self, timeout: int) -> Any:
        while self.queue:
            ctx, event, args = self.queue.popleft()
            if event == EV_KICKED:
                if not ctx.kicked:
                    continue
                ctx.kicked = False
            if ctx.where != "guest":
                continue
            ctx.kicked = False
            ctx.event, ctx.where = event, "stopped"
            if event == EV_SYSCALL:
                ctx.nr, *rest = args
                ctx.regs[RAX] = ctx.nr
                ctx.args = tuple(a & (1 << 64) - 1 for a in [*rest, 0, 0, 0, 0, 0, 0][:6])
                for place, value in zip((RDI, RSI, RDX, R10, R8, R9), ctx.args, strict=True):
                    ctx.regs[place] = value
            elif event == EV_FAULT:
                ctx.fault_address, ctx.error_code = args
            elif event == EV_EXCEPTION:
                ctx.vector, ctx.error_code = args
            return ctx
        raise Idle


def tiny_elf(size: int = 64) -> bytes:
    """A static program: one page of code at BASE + 0x1000, one writable page at SCRATCH."""
    code = b"\x90" * size
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01" + bytes(9), 2, 62, 1, BASE + 0x1000, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    text = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, BASE + 0x1000, 0, len(code), len(code), 0x1000)
    data = struct.pack("<IIQQQQQQ", 1, 6, 0, SCRATCH, 0, 0, 0x4000, 0x1000)
    return (header + text + data).ljust(0x1000, b"\0") + code


class KernelWorld:
    """One kernel, its memory, and a root with /bin/a and /bin/b."""

    def __init__(self) -> None:
        self.world = World()
        self.platform = FakeKernelPlatform(self.world)
        self.kernel = Kernel(self.platform, self.world.frames)
        self.sb = TmpSuper(self.kernel, mode=0o755)
        dentry = Dentry(b"", None, self.sb.root)
        self.root = Path(Mount(self.sb, dentry), dentry)
        self.directory(b"bin")
        self.file(b"bin/a", tiny_elf())
        self.file(b"bin/b", tiny_elf(128))

    def _parent(self, name: bytes) -> tuple[Any, bytes]:
        inode: Any = self.sb.root
        *parents, last = name.split(b"/")
        for part in parents:
            inode = inode.lookup(part)
        return inode, last

    def directory(self, name: bytes, mode: int = 0o755) -> Any:
        parent, last = self._parent(name)
        return parent.mkdir(last, 0o040000 | mode, ROOT)

    def file(self, name: bytes, data: bytes, mode: int = 0o755) -> Any:
        parent, last = self._parent(name)
        inode = parent.create(last, 0o100000 | mode, ROOT)
        file = inode.open(None, self.root, 2)
        assert file.pwrite([memoryview(bytearray(data))], 0) == len(data)
        file.put()
        return inode

    def init(self, path: bytes = b"/bin/a", **more: Any) -> Task:
        return fork.create_init(self.kernel, path=path, argv=[path], envp=[b"A=1"], root=self.root, **more)

    def run(self) -> None:
        """Let the loop run until there is nothing to do."""
        try:
            self.kernel.run()
        except Idle:
            pass

    def post(self, task: Task, nr: int, *args: int) -> None:
        """A system call, served by the next `run`."""
        assert task.ctx.where == "guest", task.ctx.where
        task.ctx.regs[RIP] += 2
        self.platform.queue.append((task.ctx, EV_SYSCALL, (nr, *args)))

    def call(self, task: Task, nr: int, *args: int) -> int | None:
        """A system call and its result; None when it was not answered with one."""
        ctx = task.ctx
        before = len(ctx.log)
        self.post(task, nr, *args)
        self.run()
        answers = ctx.log[before:]
        return answers[0] if answers and isinstance(answers[0], int) else None

    def trap(self, task: Task, event: int, *args: int) -> None:
        self.platform.queue.append((task.ctx, event, args))
        self.run()

    def put(self, task: Task, data: bytes, at: int = SCRATCH) -> int:
        task.mm.write(at, data)
        return at

    def strings(self, task: Task, *strings: bytes, at: int = SCRATCH + 0x1000) -> int:
        """A NULL-terminated array of strings in the task's memory."""
        pointers = []
        end = at + 8 * (len(strings) + 1)
        for string in strings:
            task.mm.write(end, string + b"\0")
            pointers.append(end)
            end += len(string) + 1
        task.mm.write(at, struct.pack(f"<{len(pointers) + 1}Q", *pointers, 0))
        return at

    def children(self, task: Task) -> list[Task]:
        return [p.leader for p in task.process.children.values()]
