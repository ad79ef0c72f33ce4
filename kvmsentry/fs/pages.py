"""The pages of a memory file: guest frames in extents, so that file data and mapped pages are the same memory.

    file page   0        16       32                  512
                |--gpa A--|        |------gpa B--------|        extents, sorted; what lies between is a hole and reads
                as zero

Frames come from the kernel's FrameAllocator and are charged to a `Pool` (the file system's size limit). Every byte of
a frame that is not file data is zero: a file may grow into its last page, and into pages kept in reserve behind it,
without clearing anything. Only a shared mapping can store behind the end, in the last page: whoever makes the file
longer then calls `clear_tail` first (`shared_tail`).
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from typing import Any

from kvmsentry.errors import Errno

PAGE = 4096
RUN = 512  # pages of the longest run asked for at once: one 2 MiB mapping


class Pool:
    """Where frames come from and how many a file system may have. `limit` in pages, 0 = as many as there are."""

    __slots__ = ("frames", "memory", "view", "limit", "used")

    def __init__(self, frames: Any, memory: Any, limit: int = 0) -> None:
        self.frames, self.memory, self.limit, self.used = frames, memory, limit, 0
        self.view: memoryview = memory.view

    def total(self) -> int:
        """Pages that may be used altogether (statfs(2))."""
        return self.limit or self.frames.limit_pages

    def available(self) -> int:
        """Pages that are left."""
        left: int = self.frames.limit_pages - self.frames.used_pages
        return max(0, min(left, self.limit - self.used) if self.limit else left)


class PageStore:
    """One file's pages. Frames go back when the last holder of the store is gone; those cut off (truncate, punched
    holes) while somebody maps the file stay until nobody does, so that no stale page-table entry ever shows another's
    memory."""

    __slots__ = ("pool", "starts", "gpas", "counts", "pages", "mapped", "cut", "shared_tail")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.starts: list[int] = []  # first file page of each extent
        self.gpas: list[int] = []  # its guest-physical address
        self.counts: list[int] = []  # its pages
        self.pages = 0
        self.mapped = 0  # VMAs that use it
        self.cut: list[tuple[int, int]] = []  # (gpa, pages) no longer the file's, not yet free
        self.shared_tail = False  # a partial last page was once mapped so that it may be stored to

    def __del__(self) -> None:
        pool = self.pool
        for gpa, count in zip(self.gpas, self.counts, strict=True):
            pool.frames.free(gpa, count)
        for gpa, count in self.cut:
            pool.frames.free(gpa, count)
        pool.used -= self.pages + sum(count for _, count in self.cut)

    # -- finding
    def next_data(self, page: int) -> int:
        """The first file page >= `page` that is not a hole, -1 when there is none."""
        index = bisect_right(self.starts, page) - 1
        if index >= 0 and page < self.starts[index] + self.counts[index]:
            return page
        return self.starts[index + 1] if index + 1 < len(self.starts) else -1

    def next_hole(self, page: int) -> int:
        """The first file page >= `page` that is a hole."""
        index = bisect_right(self.starts, page) - 1
        while (
            index >= 0
            and index < len(self.starts)
            and self.starts[index] <= page < self.starts[index] + self.counts[index]
        ):
            page = self.starts[index] + self.counts[index]
            index += 1
        return page

    def runs(self, first: int, end: int) -> list[tuple[int, int]]:
        """(gpa, pages) pieces of file pages [first, end); gpa -1 for holes."""
        out: list[tuple[int, int]] = []
        starts, gpas, counts = self.starts, self.gpas, self.counts
        index = bisect_right(starts, first) - 1
        if index < 0 or first >= starts[index] + counts[index]:
            index += 1
        while first < end:
            if index >= len(starts) or starts[index] >= end:
                out.append((-1, end - first))
                break
            start = starts[index]
            if start > first:
                out.append((-1, start - first))
                first = start
            count = min(end, start + counts[index]) - first
            out.append((gpas[index] + (first - start) * PAGE, count))
            first += count
            index += 1
        return out

    # -- growing
    def ensure(self, first: int, end: int, keep_from: int = -1, keep_to: int = -1) -> int:
        """Put frames under file pages [first, end). Pages in [keep_from, keep_to) are about to be overwritten whole
        and need not be zero. Returns the page up to which there are frames now (less than `end` when memory or the
        limit ran out)."""
        starts, counts = self.starts, self.counts
        index = bisect_right(starts, first) - 1
        while first < end:
            if index >= 0 and first < starts[index] + counts[index]:
                first = starts[index] + counts[index]
                index = bisect_right(starts, first) - 1
                continue
            stop = min(end, starts[index + 1]) if index + 1 < len(starts) else end
            # Runs end at 2 MiB file boundaries, so that whole ones are aligned in the file as they are in memory.
            stop = min(stop, (first // RUN + 1) * RUN)
            got = self._fill(index + 1, first, stop, keep_from, keep_to)
            first += got
            if got == 0:
                return first
            index = bisect_right(starts, first) - 1
        return first

    def _fill(self, index: int, first: int, stop: int, keep_from: int, keep_to: int) -> int:
        """Frames for the hole [first, stop) before extent `index`; returns how many pages were got."""
        pool = self.pool
        want = stop - first
        if pool.limit:
            want = min(want, pool.limit - pool.used)
            if want <= 0:
                return 0
        try:
            pieces = pool.frames.alloc_runs(want, False)
        except Errno:
            return 0
        pool.used += want
        self.pages += want
        zero = pool.memory.zero
        page = first
        for gpa, count in pieces:
            # [page, page + count) minus [keep_from, keep_to)
            if keep_from <= page and page + count <= keep_to:
                pass
            elif keep_to <= page or keep_from >= page + count:
                zero(gpa, count * PAGE)
            else:
                if keep_from > page:
                    zero(gpa, (keep_from - page) * PAGE)
                if keep_to < page + count:
                    zero(gpa + (keep_to - page) * PAGE, (page + count - keep_to) * PAGE)
            if (
                index
                and self.starts[index - 1] + self.counts[index - 1] == page
                and self.gpas[index - 1] + self.counts[index - 1] * PAGE == gpa
            ):
                self.counts[index - 1] += count
            else:
                self.starts.insert(index, page)
                self.gpas.insert(index, gpa)
                self.counts.insert(index, count)
                index += 1
            page += count
        return want

    # -- shrinking
    def drop(self, first: int, end: int) -> None:
        """Make file pages [first, end) a hole."""
        starts, gpas, counts = self.starts, self.gpas, self.counts
        index = max(0, bisect_right(starts, first) - 1)
        gone: list[tuple[int, int]] = []
        while index < len(starts) and starts[index] < end:
            start, gpa, count = starts[index], gpas[index], counts[index]
            stop = start + count
            if stop <= first:
                index += 1
                continue
            low, high = max(start, first), min(stop, end)
            gone.append((gpa + (low - start) * PAGE, high - low))
            pieces = []
            if low > start:
                pieces.append((start, gpa, low - start))
            if high < stop:
                pieces.append((high, gpa + (high - start) * PAGE, stop - high))
            starts[index : index + 1] = [p[0] for p in pieces]
            gpas[index : index + 1] = [p[1] for p in pieces]
            counts[index : index + 1] = [p[2] for p in pieces]
            index += len(pieces)
        if not gone:
            return
        pages = sum(count for _, count in gone)
        self.pages -= pages
        if self.mapped:
            self.cut += gone
            return
        for gpa, count in gone:
            self.pool.frames.free(gpa, count)
        self.pool.used -= pages

    def zero(self, start: int, end: int) -> None:
        """Clear bytes [start, end) where there are frames."""
        while start < end:
            page = start // PAGE
            index = bisect_right(self.starts, page) - 1
            if index >= 0 and page < self.starts[index] + self.counts[index]:
                stop = min(end, (self.starts[index] + self.counts[index]) * PAGE)
                self.pool.memory.zero(self.gpas[index] + start - self.starts[index] * PAGE, stop - start)
            elif index + 1 < len(self.starts):
                stop = min(end, self.starts[index + 1] * PAGE)
            else:
                return
            start = stop

    def clear_tail(self, size: int) -> None:
        """Clear what lies behind `size`, the file's end, in the last page."""
        self.zero(size, -(-size // PAGE) * PAGE)

    def unmap(self) -> None:
        """A VMA ended to use the file."""
        self.mapped -= 1
        if self.mapped == 0 and self.cut:
            self.free_cut()

    def free_cut(self) -> None:
        """No page-table entry shows the frames that were cut off any more."""
        for gpa, count in self.cut:
            self.pool.frames.free(gpa, count)
            self.pool.used -= count
        self.cut = []

    # -- data
    def read(self, views: list[memoryview], pos: int, size: int) -> int:
        """Copy bytes from `pos` on, not beyond `size`, into `views`; returns how many."""
        left = size - pos
        if left <= 0:
            return 0
        starts, gpas, counts, memory = self.starts, self.gpas, self.counts, self.pool.view
        index = bisect_right(starts, pos >> 12) - 1
        done = 0
        for view in views:
            length = len(view)
            if length > left:
                length = left
            at = 0
            while at < length:
                n = length - at
                if index >= 0 and pos < (stop := (starts[index] + counts[index]) << 12):
                    if n > stop - pos:
                        n = stop - pos
                    source = gpas[index] + pos - (starts[index] << 12)
                    view[at : at + n] = memory[source : source + n]
                elif index + 1 < len(starts) and pos >= starts[index + 1] << 12:
                    index += 1
                    continue
                else:
                    if index + 1 < len(starts):
                        n = min(n, (starts[index + 1] << 12) - pos)
                    _clear(view, at, n)
                at += n
                pos += n
            done += length
            left -= length
            if not left:
                break
        return done

    def write(self, views: list[memoryview], pos: int, total: int, size: int) -> int:
        """Copy `total` bytes of `views` to `pos`; `size` is the file's size before, by which reserve is chosen.
        Returns how many bytes were written; Errno(ENOSPC) when none."""
        first, end = pos >> 12, (pos + total + PAGE - 1) >> 12
        starts, gpas, counts, memory = self.starts, self.gpas, self.counts, self.pool.view
        index = bisect_right(starts, first) - 1
        if index < 0 or end > starts[index] + counts[index]:
            keep_from, keep_to = (pos + PAGE - 1) >> 12, (pos + total) >> 12
            reserve = end
            if pos == size and pos >= 16 * PAGE and (not starts or end > starts[-1] + counts[-1]):
                # Appending: double what there is, up to 2 MiB, so that long files come in long runs.
                reserve = min(first + max(end - first, self.pages), (end // RUN + 1) * RUN)
            reached = self.ensure(first, max(end, reserve), keep_from, keep_to)
            if reached < end:
                total = (reached << 12) - pos
                if total <= 0:
                    raise Errno(errno.ENOSPC)
            index = bisect_right(starts, first) - 1
        done = 0
        for view in views:
            length = len(view)
            if length > total - done:
                length = total - done
            at = 0
            while at < length:
                stop = (starts[index] + counts[index]) << 12
                if pos >= stop:
                    index += 1
                    continue
                n = length - at
                if n > stop - pos:
                    n = stop - pos
                target = gpas[index] + pos - (starts[index] << 12)
                memory[target : target + n] = view[at : at + n]
                at += n
                pos += n
            done += length
            if done == total:
                break
        return done


_ZEROS = bytes(1 << 16)


def _clear(view: memoryview, at: int, n: int) -> None:
    """Zero view[at:at + n]."""
    while n > 0:
        step = min(n, len(_ZEROS))
        view[at : at + step] = _ZEROS[:step]
        at += step
        n -= step
