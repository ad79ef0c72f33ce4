"""A tracer, an address space over mm's tables, and the vCPU tests' programs of real instructions."""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path
from typing import Any

from kvmsentry.mm.frames import FrameAllocator
from kvmsentry.mm.pagetables import PageTables
from kvmsentry.ptrace.space import StubTables
from kvmsentry.ptrace.tracer import Context, Tracer
from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import RIP, RSP

CODE, DATA, STACK = 0x400000, 0x600000, 0x7FFF0000
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
SECOND = 1_000_000_000


def _programs() -> tuple[bytes, dict[str, int]]:
    path = Path(__file__).parent.parent / "vcpu" / "conftest.py"
    spec = importlib.util.spec_from_file_location("vcpu_conftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.programs()  # type: ignore[no-any-return]


class Tables(StubTables, PageTables):
    """mm's tables, mirrored in a stub process."""


class Bench:
    """A tracer with an address space that holds the programs, a data page and a stack."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.memory = tracer, tracer.memory
        self.frames = FrameAllocator(tracer.memory)
        self.code, self.symbols = _programs()
        self.code_gpa = self.frames.alloc(4)
        self.memory.view[self.code_gpa : self.code_gpa + len(self.code)] = self.code
        self.mmu, self.data = self.space()

    def space(self) -> tuple[Any, int]:
        """Another address space; (mmu, GPA of its data page)."""
        mmu = Tables(self.tracer, self.frames)
        data = self.frames.alloc(1)
        mmu.map(CODE, self.code_gpa, 4 * 4096, READ | EXEC)
        mmu.map(DATA, data, 4096, READ | WRITE)
        mmu.map(STACK, self.frames.alloc(4), 4 * 4096, READ | WRITE)
        return mmu, data

    def address(self, program: str) -> int:
        return CODE + self.symbols[program]

    def context(self, program: str, mmu: Any = None, **registers: int) -> Context:
        """A context that will run program from its first instruction; registers by name (rbx=7)."""
        ctx = self.tracer.new_context(mmu or self.mmu)
        ctx.regs[RIP] = self.address(program)
        ctx.regs[RSP] = STACK + 0x3000
        for name, value in registers.items():
            ctx.regs[getattr(layout, name.upper())] = value
        return ctx

    def wait(self, seconds: float = 20) -> Context:
        """The next context with an event; fails when none comes. A None that is no timeout (a host descriptor, a
        mended fault) is waited over."""
        for _ in range(1000):
            ctx = self.tracer.wait(int(seconds * SECOND))
            if ctx is not None:
                return ctx
        raise AssertionError(f"no event; {self.tracer.counters}")

    def run(self, program: str, **registers: int) -> Context:
        """Starts program and gives its first event."""
        ctx = self.context(program, **registers)
        ctx.reload()
        assert self.wait() is ctx
        return ctx
