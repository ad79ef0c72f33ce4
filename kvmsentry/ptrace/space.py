"""An address space's tables and the stub process that mirrors them.

mm writes page tables (bookkeeping here: no processor walks them). StubTables, laid over mm's PageTables by whoever
builds the sandbox, notes which ranges changed; before a thread of the address space runs again, and at a flush while
others run, the changed ranges of the stub are made equal to the tables by mmap and munmap:

    changed ranges  -> operations() -> list of system calls -> one run of the executor in the stub

Nothing is mapped in a stub that the tables do not grant at the moment it runs.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tracer import Context, Stub

PAGE = 4096
P, W, NX = 1, 2, 1 << 63  # SDM vol. 3, 4.5.4
GPA = 0x000F_FFFF_FFFF_F000
SYS_MMAP, SYS_MUNMAP, SYS_RECVMSG, SYS_CLOSE = 9, 11, 47, 3
MAP_SHARED_FIXED = 0x11
MAP_POPULATE = 0x8000
PREFAULT = 16 * PAGE  # writable runs up to this are filled in at once: a fault costs the host more than the page
MAX_FDS = 253  # SCM_MAX_FD, include/net/scm.h


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (start, end) in order, overlapping and touching ones joined."""
    if len(ranges) == 1:
        return ranges
    out: list[tuple[int, int]] = []
    low, high = -1, -1
    for start, end in sorted(ranges):
        if start <= high and high >= 0:
            if end > high:
                high = end
        else:
            if high >= 0:
                out.append((low, high))
            low, high = start, end
    out.append((low, high))
    return out


class StubTables:
    """Put before PageTables in a class's bases: `class Tables(StubTables, PageTables)`. `platform` is the Tracer."""

    platform: Any
    frames: Any

    def __init__(self, platform: Any, frames: Any) -> None:
        self.stub: Stub | None = None
        self.contexts: set[Context] = set()
        self.changed: list[tuple[int, int]] = []  # ranges (start, end) where the stub may differ from the tables
        self.partial = False  # the stub has lost mappings that the tables grant: faults bring them back
        super().__init__(platform, frames)  # type: ignore[call-arg]

    # -- what mm calls

    def map_raw(self, va: int, gpa: int, length: int, flags: int) -> None:
        """PageTables.map_raw, noted."""
        super().map_raw(va, gpa, length, flags)  # type: ignore[misc]
        if self.stub is not None:
            changed = self.changed
            if changed and changed[-1][1] == va:
                changed[-1] = (changed[-1][0], va + length)
            else:
                changed.append((va, va + length))

    def put_entries(self, va: int, new: list[int], stale: bool) -> None:
        """PageTables.put_entries; entries that stay the same are not noted."""
        if self.stub is None:
            super().put_entries(va, new, stale)  # type: ignore[misc]
            return
        old = self.table(va, va + len(new) * PAGE) or [0] * len(new)  # type: ignore[attr-defined]
        super().put_entries(va, new, stale)  # type: ignore[misc]
        start = -1
        for index, entry in enumerate(new):
            if (entry ^ old[index]) & (GPA | NX | W | P):
                if start < 0:
                    start = index
            elif start >= 0:
                self.changed.append((va + start * PAGE, va + index * PAGE))
                start = -1
        if start >= 0:
            self.changed.append((va + start * PAGE, va + len(new) * PAGE))

    def unmap_raw(self, va: int, length: int) -> list[tuple[int, int, int]]:
        """PageTables.unmap_raw, noted."""
        removed: list[tuple[int, int, int]] = super().unmap_raw(va, length)  # type: ignore[misc]
        if removed and self.stub is not None:
            self.changed.append((removed[0][0], removed[-1][0] + removed[-1][2] * PAGE))
        return removed

    def protect_raw(self, va: int, length: int, prot: int, private: bool) -> None:
        """PageTables.protect_raw, noted."""
        super().protect_raw(va, length, prot, private)  # type: ignore[misc]
        if self.stub is not None:
            self.changed.append((va, va + length))

    def mark(self, va: int) -> None:
        """Something is wrong with the page: its mapping is made anew."""
        super().mark(va)  # type: ignore[misc]
        self.changed.append((va & -PAGE, (va & -PAGE) + PAGE))

    def destroy(self) -> None:
        """PageTables.destroy; the stub goes to the pool."""
        super().destroy()  # type: ignore[misc]
        self.platform.retire(self)

    # -- what the tracer calls

    def operations(self, everything: int = 0) -> tuple[list[int], list[int]]:
        """(system calls, seven words each; descriptors to lend, numbered from 2 in the stub) that make the changed
        ranges of the stub equal to the tables. `everything`: the end of user space, when the stub is empty."""
        ops: list[int] = []
        lent: list[int] = []
        numbers: dict[int, int] = {}
        memory = self.frames.memory
        file_base = memory.file_base

        def emit(va: int, end: int, gpa: int, prot: int) -> None:
            while va < end:
                size = end - va
                fd, offset = 0, gpa
                flags = MAP_SHARED_FIXED
                if gpa >= file_base:
                    window = memory.window(gpa)
                    size = min(size, window.end - gpa)
                    if prot & 4 and window.noexec:
                        if prot & W:  # stores into a copy would be lost: the process ends instead
                            raise OSError(errno.EACCES, "a shared file mapping that is written and executed")
                        memory.code(window, gpa, gpa + size)
                        ops.extend((SYS_MMAP, va, size, prot, flags, 0, gpa))
                        va += size
                        gpa += size
                        continue
                    offset = window.offset + gpa - window.gpa
                    number = numbers.get(window.fd)
                    if number is None:
                        lent.append(window.fd)
                        number = numbers[window.fd] = len(lent) + 1
                    fd = number
                elif prot & W and size <= PREFAULT:
                    flags |= MAP_POPULATE
                ops.extend((SYS_MMAP, va, size, prot, flags, fd, offset))
                va += size
                gpa += size

        for low, high in [(0, everything)] if everything else merged(self.changed):
            at = low
            start = end = first = access = 0
            for va, entry, pages in self.runs(low, high - low):  # type: ignore[attr-defined]
                if not entry & P:
                    continue
                gpa = entry & GPA
                prot = 1 | entry & W | (0 if entry & NX else 4)
                if va == end and prot == access and gpa == first + va - start:
                    end = va + pages * PAGE
                    continue
                if end:
                    emit(start, end, first, access)
                    at = end
                if va > at and not everything:
                    ops.extend((SYS_MUNMAP, at, va - at, 0, 0, 0, 0))
                start, end, first, access = va, va + pages * PAGE, gpa, prot
            if end:
                emit(start, end, first, access)
                at = end
            if at < high and not everything:
                ops.extend((SYS_MUNMAP, at, high - at, 0, 0, 0, 0))
        self.changed = []
        return ops, lent
