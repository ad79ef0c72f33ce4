"""Anonymous shared memory: what mmap(MAP_SHARED | MAP_ANONYMOUS) maps, and a base for tmpfs files and SysV segments."""

from __future__ import annotations

import itertools
from typing import Any

PAGE = 4096
_inos = itertools.count(1024)


class SharedMemory:
    """Pages of an object without a file, made as they are asked for. `size` in bytes; may change (resize).

    The object lives as long as VMAs hold it, plus one hold for each other owner; with the last drop() the frames are
    freed.
    """

    on_demand = True
    dev = 1

    def __init__(self, frames: Any, size: int, label: bytes = b"/dev/zero (deleted)") -> None:
        self.frames = frames
        self.size = size
        self.label = label
        self.ino = next(_inos)
        self.ident = ("shm", self.ino)
        self.holds = 0
        self.pages: dict[int, int] = {}  # page number -> GPA

    def name(self) -> bytes:
        return self.label

    def hold(self) -> None:
        self.holds += 1

    def drop(self) -> None:
        self.holds -= 1
        if self.holds <= 0:
            self.clear(0, (self.size + PAGE - 1) // PAGE)

    def clear(self, first: int, count: int) -> None:
        """Frees the frames of these pages. No entry may point at them any more (AddressSpace.zap_backing)."""
        pages = self.pages
        free = self.frames.free
        for number in (
            [number for number in pages if first <= number < first + count]
            if count > 64
            else range(first, first + count)
        ):
            gpa = pages.pop(number, None)
            if gpa is not None:
                free(gpa)

    def present(self, offset: int, length: int) -> int:
        """Pages of the range that exist."""
        return sum(number in self.pages for number in range(offset // PAGE, (offset + length + PAGE - 1) // PAGE))

    def map_pages(self, offset: int, length: int, writable_shared: bool) -> list[tuple[int, int]]:
        """The pages from `offset` on, made (zeroed) where they are missing; Errno(ENOMEM)."""
        end = min(offset + length, self.size)
        if end <= offset:
            return []
        first, last = offset // PAGE, (end + PAGE - 1) // PAGE
        pages = self.pages
        missing = [number for number in range(first, last) if number not in pages]
        if missing:
            where = 0
            for gpa, count in self.frames.alloc_runs(len(missing)):
                for number in range(count):
                    pages[missing[where]] = gpa + number * PAGE
                    where += 1
        runs: list[tuple[int, int]] = []
        start = want = pages[first]
        for number in range(first, last):
            gpa = pages[number]
            if gpa != want:
                runs.append((start, want - start))
                start = gpa
            want = gpa + PAGE
        runs.append((start, want - start - (-end % PAGE)))
        return runs
