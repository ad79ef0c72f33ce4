"""Virtual memory areas: what the application asked for, sorted by address, with the search for free space."""

from __future__ import annotations

import errno
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, Protocol

from kvmsentry.errors import BrokenInvariant, Errno

PAGE = 4096
STACK_GUARD = 256 * PAGE  # mm/mmap.c stack_guard_gap: free space kept below a stack

# uapi/asm-generic/mman-common.h, mman.h, x86 mman.h
PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
PROT_GROWSDOWN, PROT_GROWSUP = 0x01000000, 0x02000000
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE = 1, 2, 3
MAP_FIXED, MAP_ANONYMOUS, MAP_32BIT = 0x10, 0x20, 0x40
MAP_GROWSDOWN, MAP_DENYWRITE, MAP_EXECUTABLE, MAP_LOCKED, MAP_NORESERVE = 0x100, 0x800, 0x1000, 0x2000, 0x4000
MAP_POPULATE, MAP_NONBLOCK, MAP_STACK, MAP_HUGETLB = 0x8000, 0x10000, 0x20000, 0x40000
MAP_SYNC, MAP_FIXED_NOREPLACE, MAP_UNINITIALIZED = 0x80000, 0x100000, 0x4000000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED = 0, 1, 2, 3, 4
MADV_FREE, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK = 8, 9, 10, 11
MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 12, 13, 14, 15
MADV_DONTDUMP, MADV_DODUMP, MADV_WIPEONFORK, MADV_KEEPONFORK = 16, 17, 18, 19
MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_DONTNEED_LOCKED, MADV_COLLAPSE = (
    20,
    21,
    22,
    23,
    24,
    25,
)

# Vma.flags: ours
VM_SHARED, VM_GROWSDOWN, VM_LOCKED, VM_NORESERVE, VM_DONTFORK, VM_WIPEONFORK = 1, 2, 4, 8, 16, 32
VM_HUGEPAGE, VM_NOHUGEPAGE, VM_STACK, VM_DONTDUMP, VM_LAZY = 64, 128, 256, 512, 1024


def random_below(n: int) -> int:
    """A random number in [0, n), for address-space layout. (`secrets` would cost every start 10 ms of imports.)"""
    return int.from_bytes(os.urandom(16), "little") % n


class Backing(Protocol):
    """What can be mapped: a file, shared memory. Implemented by fs (and by mm.shared for anonymous shared memory).

    Optional methods, used where they exist: hold() and drop() (a VMA began or ended to use it), warm(offset, length)
    (this part was filled in to be read or run), sync(offset, length) for msync, punch(offset, length) for MADV_REMOVE;
    optional attributes `ident` (hashable) for futex keys, `stable` (true: the object's bytes never change), `apart`
    (true: VMAs of it that were split stay so, because their number is told).
    """

    dev: int
    ino: int

    def map_pages(self, offset: int, length: int, writable_shared: bool) -> list[tuple[int, int]]:
        """(gpa, length) runs that are the object's pages from `offset` on. Shorter than asked: past the end (SIGBUS).
        The last length need not be whole pages: the object ends there, and private copies read as zero from there
        on."""
        ...

    def name(self) -> bytes:
        """The path for /proc/PID/maps."""
        ...


class Vma:
    """[start, end) with one protection and one backing. `offset` is the backing's for `start`, in bytes. Shown in
    /proc/PID/maps."""

    __slots__ = ("start", "end", "prot", "flags", "backing", "offset", "max_prot", "label")

    def __init__(
        self,
        start: int,
        end: int,
        prot: int,
        flags: int,
        backing: Any = None,
        offset: int = 0,
        max_prot: int = 7,
        label: bytes = b"",
    ) -> None:
        self.start, self.end, self.prot, self.flags = start, end, prot, flags
        self.backing, self.offset, self.max_prot, self.label = backing, offset, max_prot, label

    def __repr__(self) -> str:
        return (
            f"<Vma {self.start:x}-{self.end:x} prot={self.prot} flags={self.flags:#x} "
            f"offset={self.offset:#x} {self.name!r}>"
        )

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def shared(self) -> bool:
        return bool(self.flags & VM_SHARED)

    @property
    def name(self) -> bytes:
        """As in /proc/PID/maps: the file's path, or a label such as [heap]."""
        return self.label or (self.backing.name() if self.backing is not None else b"")

    @property
    def dev(self) -> int:
        return self.backing.dev if self.backing is not None else 0

    @property
    def ino(self) -> int:
        return self.backing.ino if self.backing is not None else 0

    def copy(self) -> Vma:
        return Vma(self.start, self.end, self.prot, self.flags, self.backing, self.offset, self.max_prot, self.label)

    def joins(self, other: Vma) -> bool:
        """Whether `other`, which begins where this one ends, says the same."""
        return (
            self.end == other.start
            and self.prot == other.prot
            and self.flags == other.flags
            and self.backing is other.backing
            and self.max_prot == other.max_prot
            and self.label == other.label
            and (
                self.backing is None
                or self.offset + self.end - self.start == other.offset
                and not getattr(self.backing, "apart", False)
            )
        )


class VmaTree:
    """VMAs of one address space; `starts` and `vmas` are parallel. Inserting moves pointers only: fine at the limit of
    65,530."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.vmas: list[Vma] = []
        # Top-down search begins at _search when no hole above it, up to the limit _search_top, is larger than _hole.
        self._search = self._search_top = self._hole = 0

    def __len__(self) -> int:
        return len(self.vmas)

    def __iter__(self) -> Iterator[Vma]:
        return iter(self.vmas)

    def find(self, va: int) -> Vma | None:
        """The VMA that holds `va`."""
        index = bisect_right(self.starts, va) - 1
        if index >= 0:
            vma = self.vmas[index]
            if va < vma.end:
                return vma
        return None

    def above(self, va: int) -> Vma | None:
        """The first VMA that ends above `va` (it may hold it)."""
        index = self.first(va)
        return self.vmas[index] if index < len(self.vmas) else None

    def below(self, va: int) -> Vma | None:
        """The last VMA that begins below `va`."""
        index = bisect_left(self.starts, va) - 1
        return self.vmas[index] if index >= 0 else None

    def first(self, va: int) -> int:
        """Index of the first VMA that ends above `va`."""
        index = bisect_right(self.starts, va)
        if index and self.vmas[index - 1].end > va:
            index -= 1
        return index

    def range(self, start: int, end: int) -> list[Vma]:
        """Every VMA that has a part in [start, end)."""
        # An empty range within a VMA would find that VMA, and cutting out nothing of it leaves a VMA without pages.
        return self.vmas[self.first(start) : bisect_left(self.starts, end)] if start < end else []

    def covered(self, start: int, end: int) -> bool:
        """Whether every page of [start, end) is in a VMA."""
        for vma in self.range(start, end):
            if vma.start > start:
                return False
            start = vma.end
        return start >= end

    def insert(self, vma: Vma) -> None:
        """Adds without merging. The range must be free."""
        index = bisect_left(self.starts, vma.start)
        if (index < len(self.vmas) and self.vmas[index].start < vma.end) or (
            index and self.vmas[index - 1].end > vma.start
        ):
            raise BrokenInvariant(f"{vma} overlaps")
        self.starts.insert(index, vma.start)
        self.vmas.insert(index, vma)

    def remove(self, vma: Vma) -> None:
        index = bisect_left(self.starts, vma.start)
        if index >= len(self.vmas) or self.vmas[index] is not vma:
            raise BrokenInvariant(f"{vma} is not in the tree")
        del self.starts[index]
        del self.vmas[index]
        self._freed(vma.end)

    def _freed(self, end: int) -> None:
        """A hole that ends at `end` (or above: it may have joined one) has come: the search must begin above it."""
        if end > self._search:
            index = bisect_left(self.starts, end)
            self._search = self._search_top
            if index < len(self.vmas):
                vma = self.vmas[index]
                edge = vma.start - STACK_GUARD if vma.flags & VM_GROWSDOWN else vma.start
                self._search = min(edge, self._search_top)

    def set_start(self, vma: Vma, start: int) -> None:
        """Moves the lower end, the order staying as it is; a backing's offset moves along."""
        index = bisect_left(self.starts, vma.start)
        if self.vmas[index] is not vma:
            raise BrokenInvariant(f"{vma} is not in the tree")
        freed = start > vma.start
        if vma.backing is not None:
            vma.offset += start - vma.start
        vma.start = self.starts[index] = start
        if freed:
            self._freed(start)

    def set_end(self, vma: Vma, end: int) -> None:
        old, vma.end = vma.end, end
        if end < old:
            self._freed(old)

    def split(self, vma: Vma, at: int) -> Vma:
        """Cuts `vma` at `at`; returns the upper part."""
        upper = vma.copy()
        upper.start = at
        if vma.backing is not None:
            upper.offset += at - vma.start
        vma.end = at
        index = bisect_left(self.starts, at)
        self.starts.insert(index, at)
        self.vmas.insert(index, upper)
        return upper

    def merge(self, start: int, end: int) -> list[Vma]:
        """Joins neighbours in and around [start, end) that say the same; returns the ones swallowed."""
        index = max(0, self.first(start) - 1)
        swallowed = []
        vmas = self.vmas
        while index + 1 < len(vmas) and vmas[index].start <= end:
            vma, following = vmas[index], vmas[index + 1]
            if vma.joins(following):
                vma.end = following.end
                swallowed.append(following)
                del self.starts[index + 1]
                del vmas[index + 1]
            else:
                index += 1
        return swallowed

    def gap_below(self, length: int, low: int, top: int, align: int = PAGE, congruent: int = 0) -> int:
        """Highest start of a free [start, start + length) in [low, top) with start = congruent mod align;
        Errno(ENOMEM)."""
        shortcut = self._search_top == top and length > self._hole
        try:
            return self._gap_below(length, low, top, align, congruent, shortcut)
        except Errno:
            if not shortcut:
                raise
        return self._gap_below(length, low, top, align, congruent, False)

    def _gap_below(self, length: int, low: int, top: int, align: int, congruent: int, shortcut: bool) -> int:
        high, hole = (self._search, self._hole) if shortcut else (top, 0)
        vmas = self.vmas
        index = bisect_left(self.starts, high) - 1
        while True:
            floor = vmas[index].end if index >= 0 else low
            if floor < low:
                floor = low
            if high > floor:
                start = high - length
                start -= (start - congruent) % align
                if start >= floor:
                    self._search, self._search_top, self._hole = start + length, top, max(hole, high - length - start)
                    return start
                if high - floor > hole:
                    hole = high - floor
            if index < 0 or floor <= low:
                raise Errno(errno.ENOMEM)
            vma = vmas[index]
            low_edge = vma.start - STACK_GUARD if vma.flags & VM_GROWSDOWN else vma.start
            if low_edge < high:
                high = low_edge
            index -= 1

    def gap_above(self, length: int, low: int, top: int, align: int = PAGE) -> int:
        """Lowest start of a free [start, start + length) in [low, top); Errno(ENOMEM)."""
        index = self.first(low)
        start = -(-low // align) * align
        while start + length <= top:
            if index >= len(self.vmas) or start + length <= self.vmas[index].start:
                return start
            start = max(start, -(-self.vmas[index].end // align) * align)
            index += 1
        raise Errno(errno.ENOMEM)

    def free(self, start: int, end: int) -> bool:
        """Whether nothing lies in [start, end)."""
        index = self.first(start)
        return index >= len(self.vmas) or self.vmas[index].start >= end
