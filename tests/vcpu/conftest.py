"""A machine, a page-table builder for tests only, and programs of real instructions."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsentry.mm.pagetables import WHOLE
from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import RIP, RSP
from kvmsentry.vcpu.machine import Context, Machine

CODE, DATA, STACK = 0x400000, 0x600000, 0x7FFF0000
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
HERE = Path(__file__).parent
SECOND = 1_000_000_000


def programs() -> tuple[bytes, dict[str, int]]:
    """programs.S assembled, kept under build/ so that a machine with no assembler (the nested one) finds it."""
    source = HERE / "programs.S"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    kept = HERE.parent.parent / "build" / "vcpu-tests" / digest
    if not (kept / "symbols.json").exists():
        kept.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-c", "-o", str(kept / "p.o"), str(source)], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(kept / "p.o"), str(kept / "p.bin")], check=True)
        listing = subprocess.run(["nm", str(kept / "p.o")], check=True, capture_output=True, text=True).stdout
        symbols = {name: int(value, 16) for value, kind, name in map(str.split, listing.splitlines()) if kind == "T"}
        (kept / "symbols.json").write_text(json.dumps(symbols))
    return (kept / "p.bin").read_bytes(), json.loads((kept / "symbols.json").read_text())


class Frames:
    """4 KiB frames of one grown memslot, never freed."""

    def __init__(self, machine: Machine) -> None:
        self.memory = machine.memory
        self.next, length = machine.memory.grow(32 << 20)
        self.end = self.next + length

    def take(self, pages: int = 1) -> int:
        gpa = self.next
        self.next += pages * 4096
        assert self.next <= self.end, "the test's memory is used up"
        return gpa


class TestMmu:
    """Four-level tables, written plainly; every entry that is taken away is listed for invalidate()."""

    __test__ = False

    def __init__(self, machine: Machine, frames: Frames) -> None:
        self.machine, self.frames, self.words = machine, frames, machine.memory.words
        self.cr3 = frames.take()
        self.narrowed: list[int] = []
        for index, entry in machine.kernel_pml4_entries().items():
            self.words[(self.cr3 >> 3) + index] = entry

    def entry(self, va: int) -> int:
        table = self.cr3
        for shift in (39, 30, 21):
            at = (table >> 3) + (va >> shift & 511)
            if not self.words[at] & 1:
                self.words[at] = self.frames.take() | 0x67
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

    def flush(self, whole: bool = False) -> None:
        """Names the entries, or with `whole` the tables they are in."""
        places = [(at & -4096) + WHOLE if whole else at for at in self.narrowed]
        self.machine.invalidate(self, list(dict.fromkeys(places)))
        self.narrowed.clear()


class Bench:
    """A machine with an address space that holds the programs, a data page and a stack."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.memory, self.frames = machine, machine.memory, Frames(machine)
        self.code, self.symbols = programs()
        self.code_gpa = self.frames.take(4)
        self.memory.view[self.code_gpa : self.code_gpa + len(self.code)] = self.code
        self.mmu, self.data = self.space()

    def space(self) -> tuple[TestMmu, int]:
        """Another address space; (mmu, GPA of its data page)."""
        mmu = TestMmu(self.machine, self.frames)
        data = self.frames.take()
        mmu.map(CODE, self.code_gpa, 4 * 4096, READ | EXEC)
        mmu.map(DATA, data, 4096, READ | WRITE)
        mmu.map(STACK, self.frames.take(4), 4 * 4096, READ | WRITE)
        return mmu, data

    def address(self, program: str) -> int:
        return CODE + self.symbols[program]

    def context(self, program: str, mmu: TestMmu | None = None, **registers: int) -> Context:
        """A context that will run program from its first instruction; registers by name (rbx=7)."""
        ctx = self.machine.new_context(mmu or self.mmu)
        ctx.regs[RIP] = self.address(program)
        ctx.regs[RSP] = STACK + 0x3000
        for name, value in registers.items():
            ctx.regs[getattr(layout, name.upper())] = value
        return ctx

    def wait(self, seconds: float = 20) -> Context:
        """The next context with an event; fails when none comes."""
        ctx = self.machine.wait(int(seconds * SECOND))
        assert ctx is not None, f"no event; {self.machine.counters}"
        return ctx

    def run(self, program: str, **registers: int) -> Context:
        """Starts program and gives its first event."""
        ctx = self.context(program, **registers)
        ctx.reload()
        assert self.wait() is ctx
        return ctx


@pytest.fixture
def machine() -> Iterator[Machine]:
    if not os.path.exists("/dev/kvm"):
        pytest.skip("NO /dev/kvm: nothing of the vCPU floor is tested")
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def bench(machine: Machine) -> Bench:
    return Bench(machine)
