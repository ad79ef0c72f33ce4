"""What tests of a platform stand on: a machine or a tracer, an address space, programs of real instructions.

`kvm()` and `ptrace()` make one each, or skip loudly. tests/platforms runs the same tests on both; tests/vcpu and
tests/ptrace have what is special to one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsentry.errors import HostError
from kvmsentry.mm.frames import FrameAllocator
from kvmsentry.mm.pagetables import WHOLE, PageTables
from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import RIP, RSP

CODE, DATA, STACK = 0x400000, 0x600000, 0x7FFF0000
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
NAMES = ("rbx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r12", "r13", "r14", "r15")  # what a call leaves alone
SECOND = 1_000_000_000
HERE = Path(__file__).parent


def spin(us: int) -> None:
    """Lets so many microseconds go by without leaving the processor."""
    due = time.perf_counter_ns() + us * 1000
    while time.perf_counter_ns() < due:
        pass


def programs() -> tuple[bytes, dict[str, int]]:
    """platform_programs.S assembled, kept under build/ so that a machine with no assembler (the nested one) finds
    it; {name: offset}."""
    source = HERE / "platform_programs.S"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    kept = HERE.parent / "build" / "vcpu-tests" / digest
    if not (kept / "symbols.json").exists():
        kept.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-c", "-o", str(kept / "p.o"), str(source)], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(kept / "p.o"), str(kept / "p.bin")], check=True)
        listing = subprocess.run(["nm", str(kept / "p.o")], check=True, capture_output=True, text=True).stdout
        symbols = {name: int(value, 16) for value, kind, name in map(str.split, listing.splitlines()) if kind == "T"}
        (kept / "symbols.json").write_text(json.dumps(symbols))
    return (kept / "p.bin").read_bytes(), json.loads((kept / "symbols.json").read_text())


class Bench(ABC):
    """A platform with an address space that holds the programs, a data page and a stack."""

    def __init__(self, platform: Any) -> None:
        self.platform, self.memory = platform, platform.memory
        self.prepare()
        self.code, self.symbols = programs()
        self.code_gpa = self.take(4)
        self.memory.view[self.code_gpa : self.code_gpa + len(self.code)] = self.code
        self.mmu, self.data = self.space()

    @abstractmethod
    def prepare(self) -> None:
        """Before the first frame is taken."""

    @abstractmethod
    def take(self, pages: int = 1) -> int:
        """GPA of a run of frames, all zero."""

    @abstractmethod
    def tables(self) -> Any:
        """An Mmu with nothing in it."""

    def space(self) -> tuple[Any, int]:
        """Another address space; (mmu, GPA of its data page)."""
        mmu = self.tables()
        data = self.take()
        mmu.map(CODE, self.code_gpa, 4 * 4096, READ | EXEC)
        mmu.map(DATA, data, 4096, READ | WRITE)
        mmu.map(STACK, self.take(4), 4 * 4096, READ | WRITE)
        return mmu, data

    def address(self, program: str) -> int:
        """Where it is in every address space of space()."""
        return CODE + self.symbols[program]

    def context(self, program: str, mmu: Any = None, **registers: int) -> Any:
        """A context that will run program from its first instruction; registers by name (rbx=7)."""
        ctx = self.platform.new_context(mmu or self.mmu)
        ctx.regs[RIP] = self.address(program)
        ctx.regs[RSP] = STACK + 0x3000
        for name, value in registers.items():
            ctx.regs[getattr(layout, name.upper())] = value
        return ctx

    def wait(self, seconds: float = 20) -> Any:
        """The next context with an event; fails when none comes. A None that is no timeout (a host descriptor, a
        fault that was mended) is waited over."""
        deadline = time.monotonic() + seconds
        while True:
            ctx = self.platform.wait(int(seconds * SECOND))
            if ctx is not None:
                return ctx
            assert time.monotonic() < deadline, f"no event; {self.platform.counters}"

    def run(self, program: str, **registers: int) -> Any:
        """Starts program and gives its first event."""
        ctx = self.context(program, **registers)
        ctx.reload()
        assert self.wait() is ctx
        return ctx


class PlainTables:
    """Four-level tables, written plainly for tests only; every entry that is taken away is listed for invalidate()."""

    def __init__(self, bench: KvmBench) -> None:
        self.bench, self.words = bench, bench.memory.words
        self.cr3 = bench.take()
        self.narrowed: list[int] = []
        for index, entry in bench.platform.kernel_pml4_entries().items():
            self.words[(self.cr3 >> 3) + index] = entry

    def entry(self, va: int) -> int:
        """Index in `words` of the entry of a page; the tables above are made."""
        table = self.cr3
        for shift in (39, 30, 21):
            at = (table >> 3) + (va >> shift & 511)
            if not self.words[at] & 1:
                self.words[at] = self.bench.take() | 0x67
            table = self.words[at] & 0x000FFFFFFFFFF000
        return (table >> 3) + (va >> 12 & 511)

    def map(self, va: int, gpa: int, length: int, prot: int) -> None:
        for offset in range(0, length, 4096):
            at = self.entry(va + offset)
            if self.words[at] & 1:
                self.narrowed.append(at << 3)
            self.words[at] = gpa + offset | 0x65 | (prot & WRITE) | (0 if prot & EXEC else 1 << 63)

    def unmap(self, va: int, length: int) -> None:
        for offset in range(0, length, 4096):
            at = self.entry(va + offset)
            self.words[at] = 0
            self.narrowed.append(at << 3)

    def protect(self, va: int, length: int, prot: int) -> None:
        for offset in range(0, length, 4096):
            self.map(va + offset, self.words[self.entry(va + offset)] & 0x000FFFFFFFFFF000, 4096, prot)

    def flush(self, whole: bool = False) -> None:
        """Names the entries, or with `whole` the tables they are in."""
        places = [(at & -4096) + WHOLE if whole else at for at in self.narrowed]
        self.bench.platform.invalidate(self, list(dict.fromkeys(places)))
        self.narrowed.clear()


class KvmBench(Bench):
    """A KVM machine; 32 MiB of frames that are never freed."""

    def prepare(self) -> None:
        self.next, length = self.memory.grow(32 << 20)
        self.end = self.next + length

    def take(self, pages: int = 1) -> int:
        gpa = self.next
        self.next += pages * 4096
        assert self.next <= self.end, "the test's memory is used up"
        return gpa

    def tables(self) -> PlainTables:
        return PlainTables(self)


class PtraceBench(Bench):
    """A tracer; address spaces are mm's tables, mirrored in stub processes."""

    def prepare(self) -> None:
        self.frames = FrameAllocator(self.memory)

    def take(self, pages: int = 1) -> int:
        return self.frames.alloc(pages)

    def tables(self) -> Any:
        from kvmsentry.ptrace.space import StubTables

        return type("Tables", (StubTables, PageTables), {})(self.platform, self.frames)


def kvm() -> Iterator[KvmBench]:
    """For a fixture: a machine of its own."""
    if not os.path.exists("/dev/kvm"):
        pytest.skip("NO /dev/kvm: nothing of the vCPU floor is tested")
    from kvmsentry.vcpu.machine import Machine

    machine = Machine()
    yield KvmBench(machine)
    machine.close()


def ptrace() -> Iterator[PtraceBench]:
    """For a fixture: a tracer of its own, whose first stub runs."""
    from kvmsentry.ptrace.tracer import Tracer

    tracer = Tracer()
    try:
        tracer._start()
    except HostError as error:
        tracer.close()
        pytest.skip(f"NO PTRACE: nothing of this platform is tested ({error})")
    yield PtraceBench(tracer)
    tracer.close()


MAKERS = {"kvm": kvm, "ptrace": ptrace}
