"""Frames of guest RAM: single frames from a hot stack, runs from per-block bitmaps, a reference count for each.

Guest RAM comes in blocks of 2 MiB. A block's free frames are one 512-bit integer, so that freeing coalesces by itself
and a run of n frames is found with log2(n) shifts. Single frames go through `_hot`, a stack in front of the bitmaps:
last freed, first used, because the host (and KVM's shadow) still has that page warm. Frames on the stack count as taken
from the bitmaps, not as used.
"""

from __future__ import annotations

import errno
from array import array
from typing import Any

from kvmsentry.errors import BrokenInvariant, Errno, HostError

PAGE = 4096
HUGE = 2 << 20
FRAMES = HUGE // PAGE  # frames in a block
FULL = (1 << FRAMES) - 1
_ZERO_PAGE = bytes(PAGE)
_NONE = array("I", [0]) * FRAMES
_ONES = array("I", [1]) * FRAMES
_TWOS = array("I", [2]) * FRAMES
_REFILL = 32  # frames moved from the bitmaps to the empty hot stack
_HOT_LIMIT = 1024
_TRIES = 8  # partly used blocks looked at before a whole block is broken


def find_run(mask: int, pages: int) -> int:
    """Index of the lowest run of `pages` set bits in `mask`, -1 when there is none."""
    have = 1
    while have < pages and mask:
        step = min(have, pages - have)
        mask &= mask >> step
        have += step
    return (mask & -mask).bit_length() - 1


class FrameAllocator:
    """Hands out frames of `memory` (a GuestMemory), at most `limit_pages` at a time.

    `grow_bytes` is the first step by which guest RAM grows; every later step doubles, up to 1 GiB (a memslot costs time
    in its size).
    """

    def __init__(self, memory: Any, limit_pages: int = 1 << 22, grow_bytes: int = 64 << 20) -> None:
        self.memory = memory
        self.limit_pages = limit_pages
        self.grow_bytes = max(grow_bytes, HUGE)
        self.total_pages = 0  # granted by the host
        self.refused: HostError | None = None  # why the host last refused to grow
        self.keep_blocks = 512  # free blocks that may stay resident on the host; see trim()
        self.table_pool: Any = None  # pagetables.TablePool, made on first use
        self.refs = array("I")  # by frame number (GPA >> 12)
        self.ram_end = 0  # RAM lies below this GPA, file windows above
        self._view = memory.view
        self._masks: list[int] = []  # by block number (GPA >> 21): set bit = free frame
        self._clean: list[int] = []  # by block number: set bit = reads as zero, never handed out since granted
        self._ram = bytearray()  # by block number: 1 = RAM that grow() gave
        self._whole: list[int] = []  # stack of wholly free blocks
        self._partial: dict[int, None] = {}  # blocks with some free frames; last freed last
        self._hot: list[int] = []
        self._taken = 0  # frames out of the bitmaps: used ones and those on the hot stack
        self._idle = 0  # wholly free blocks that may hold host memory
        self._fresh = False  # whether the run of the last _take() was clean

    @property
    def used_pages(self) -> int:
        """Frames with a reference."""
        return self._taken - len(self._hot)

    def is_ram(self, gpa: int) -> bool:
        """Whether `gpa` is guest RAM of ours (plain access is safe) and not a file window (it needs
        safe_read/safe_write)."""
        return gpa < self.ram_end and self._ram[gpa >> 21] == 1

    # -- taking

    def alloc(self, pages: int = 1, zero: bool = True) -> int:
        """GPA of a contiguous run of `pages` frames, reference count 1 each; 512 pages and more are 2 MiB aligned.

        Errno(ENOMEM) over the limit, when the host refuses to grow, or when no run is long enough.
        """
        if pages == 1:
            hot = self._hot
            if not hot:
                self._refill()
            gpa = hot.pop()
            self.refs[gpa >> 12] = 1
            if zero:
                self._view[gpa : gpa + PAGE] = _ZERO_PAGE
            return gpa
        if pages <= 0:
            raise BrokenInvariant(f"alloc of {pages} frames")
        self._reserve(pages)
        if pages > FRAMES:
            return self._alloc_blocks(pages, zero)
        gpa = self._take(pages)
        frame = gpa >> 12
        self.refs[frame : frame + pages] = _ONES[:pages]
        if zero and not self._fresh:
            self.memory.zero(gpa, pages * PAGE)
        return gpa

    def alloc_runs(self, pages: int, zero: bool = True) -> list[tuple[int, int]]:
        """`pages` frames as (gpa, pages) pieces, whole aligned 2 MiB blocks first. Errno(ENOMEM) as alloc; nothing is
        kept then."""
        self._reserve(pages)
        runs: list[tuple[int, int]] = []
        want = FRAMES
        try:
            while pages:
                want = min(want, pages)
                try:
                    gpa = self.alloc(want, zero)
                except Errno:
                    if want == 1:
                        raise
                    want = (want + 1) // 2
                    continue
                runs.append((gpa, want))
                pages -= want
        except Errno:
            for gpa, count in runs:
                self.free(gpa, count)
            raise
        return runs

    def _reserve(self, pages: int) -> None:
        if self._taken + pages > self.limit_pages:
            self._spill(len(self._hot))
            if self._taken + pages > self.limit_pages:
                raise Errno(errno.ENOMEM)

    def _refill(self) -> None:
        want = min(_REFILL, self.limit_pages - self._taken)
        if want <= 0:
            raise Errno(errno.ENOMEM)
        while True:
            try:
                gpa = self._take(want)
                break
            except Errno:
                if want == 1:
                    raise
                want //= 2
        self._hot.extend(range(gpa + (want - 1) * PAGE, gpa - PAGE, -PAGE))

    def _take(self, pages: int) -> int:
        """A run of up to 512 frames out of the bitmaps; the caller sets the reference counts."""
        whole = self._whole
        if pages < FRAMES:
            masks = self._masks
            tries = 0
            for block in reversed(self._partial):
                index = find_run(masks[block], pages)
                if index >= 0:
                    return self._cut(block, index, pages)
                tries += 1
                if tries == _TRIES and whole:
                    break
        if not whole:
            if self._hot and pages > 1:
                self._spill(len(self._hot))
                if pages < FRAMES:
                    for block in reversed(self._partial):
                        index = find_run(self._masks[block], pages)
                        if index >= 0:
                            return self._cut(block, index, pages)
            if not whole:
                self._grow(1)
        block = whole.pop()
        if self._clean[block] != FULL:
            self._idle -= 1
        self._partial[block] = None
        return self._cut(block, 0, pages)

    def _cut(self, block: int, index: int, pages: int) -> int:
        bits = ((1 << pages) - 1) << index
        left = self._masks[block] ^ bits
        self._masks[block] = left
        if not left:
            del self._partial[block]
        clean = self._clean[block]
        self._fresh = clean & bits == bits
        if clean:
            self._clean[block] = clean & ~bits
        self._taken += pages
        return (block << 21) + (index << 12)

    def _alloc_blocks(self, pages: int, zero: bool) -> int:
        """A contiguous run longer than a block: rare (a device, a test), so a search of the free blocks will do."""
        blocks = -(-pages // FRAMES)
        for attempt in (0, 1):
            start = previous = -2
            for block in sorted(self._whole):
                if block != previous + 1:
                    start = block
                previous = block
                if block - start + 1 == blocks:
                    break
            else:
                if attempt == 0:
                    self._grow(blocks)
                continue
            break
        else:
            raise Errno(errno.ENOMEM)
        for block in range(start, start + blocks):
            self._whole.remove(block)
            if self._clean[block] != FULL:
                self._idle -= 1
            self._partial[block] = None
            count = min(FRAMES, pages)
            gpa = self._cut(block, 0, count)
            frame = gpa >> 12
            self.refs[frame : frame + count] = _ONES[:count]
            if zero and not self._fresh:
                self.memory.zero(gpa, count * PAGE)
            pages -= count
        return start << 21

    def _grow(self, blocks: int) -> None:
        """Asks the host for at least `blocks` more; Errno(ENOMEM) when the limit leaves no room or the host refuses."""
        room = -(-(self.limit_pages - self.total_pages) // FRAMES)
        if room < blocks:
            # Frames are there but not as one run (fragmented): a quarter over the limit keeps 2 MiB entries possible.
            # What is used stays under the limit all the same: _reserve counts frames in use, not granted ones.
            room = blocks if self.total_pages < self.limit_pages + self.limit_pages // 4 else 0
        if room <= 0:
            raise Errno(errno.ENOMEM)
        want = max(blocks, min(self.grow_bytes // HUGE, room))
        while True:
            try:
                gpa, length = self.memory.grow(want * HUGE)
                break
            except HostError as error:
                self.refused = error
                if want == blocks:
                    raise Errno(errno.ENOMEM) from error
                want = max(blocks, want // 4)
        if gpa % HUGE or length % HUGE or length < blocks * HUGE:
            raise BrokenInvariant(f"guest RAM of {length:#x} bytes at {gpa:#x} is not whole 2 MiB blocks")
        self.grow_bytes = min(self.grow_bytes * 2, 1 << 30)
        self.add_ram(gpa, length)

    def add_ram(self, gpa: int, length: int) -> None:
        """Takes RAM [gpa, gpa + length) that the host granted and that reads as zero; whole 2 MiB blocks."""
        first, end = gpa >> 21, (gpa + length) >> 21
        self.ram_end = max(self.ram_end, gpa + length)
        more = end - len(self._masks)
        if more > 0:
            self._masks += [0] * more
            self._clean += [0] * more
            self._ram += bytes(more)
            self.refs.frombytes(bytes(more * FRAMES * self.refs.itemsize))
        for block in range(end - 1, first - 1, -1):
            self._masks[block] = self._clean[block] = FULL
            self._ram[block] = 1
            self._whole.append(block)
        self.total_pages += length // PAGE

    # -- giving back

    def ref(self, gpa: int, pages: int = 1) -> None:
        """One more reference to each frame of the run."""
        refs = self.refs
        frame = gpa >> 12
        if pages == 1:
            if not refs[frame]:
                raise BrokenInvariant(f"reference to free frame {gpa:#x}")
            refs[frame] += 1
            return
        for at in range(frame, frame + pages, FRAMES):
            count = min(FRAMES, frame + pages - at)
            now = refs[at : at + count]
            if now == _ONES[:count]:
                refs[at : at + count] = _TWOS[:count]
            else:
                if 0 in now:
                    raise BrokenInvariant(f"reference to a free frame in the run at {at << 12:#x}")
                refs[at : at + count] = array("I", [count + 1 for count in now])

    def free(self, gpa: int, pages: int = 1) -> None:
        """One reference less to each frame of the run; at zero the frame is free. The caller has flushed what pointed
        at it."""
        refs = self.refs
        frame = gpa >> 12
        if pages == 1:
            count = refs[frame]
            if count == 1:
                refs[frame] = 0
                hot = self._hot
                hot.append(gpa)
                if len(hot) > _HOT_LIMIT:
                    self._spill(_HOT_LIMIT // 2)
            elif count:
                refs[frame] = count - 1
            else:
                raise BrokenInvariant(f"frame {gpa:#x} is freed twice")
            return
        end = frame + pages
        while frame < end:
            count = min(end, (frame | (FRAMES - 1)) + 1) - frame
            now = refs[frame : frame + count]
            if now == _ONES[:count]:
                refs[frame : frame + count] = _NONE[:count]
                self._put(frame >> 9, ((1 << count) - 1) << (frame & (FRAMES - 1)), count)
            else:
                if 0 in now:
                    raise BrokenInvariant(f"a frame of the run at {frame << 12:#x} is freed twice")
                bits = freed = 0
                for index, have in enumerate(now):
                    if have == 1:
                        bits |= 1 << index
                        freed += 1
                refs[frame : frame + count] = array("I", [have - 1 for have in now])
                if bits:
                    self._put(frame >> 9, bits << (frame & (FRAMES - 1)), freed)
            frame += count

    def sole(self, gpa: int, pages: int) -> bool:
        """Whether every frame of the run has exactly one reference (nobody shares it)."""
        frame = gpa >> 12
        if pages == 1:
            return self.refs[frame] == 1
        return self.refs[frame : frame + pages] == array("I", [1]) * pages

    def _put(self, block: int, bits: int, count: int) -> None:
        mask = self._masks[block]
        if mask & bits:
            raise BrokenInvariant(f"free frames of block {block:#x} freed again")
        mask |= bits
        self._masks[block] = mask
        self._taken -= count
        partial = self._partial
        partial.pop(block, None)
        if mask == FULL:
            self._whole.append(block)
            if self._clean[block] != FULL:
                self._idle += 1
            if self._idle > self.keep_blocks:
                self.trim(self.keep_blocks // 2)
        else:
            partial[block] = None

    def _spill(self, count: int) -> None:
        """The `count` coldest frames of the hot stack go back to the bitmaps."""
        hot = self._hot
        cold = hot[:count]
        del hot[:count]
        by_block: dict[int, int] = {}
        for gpa in cold:
            block = gpa >> 21
            by_block[block] = by_block.get(block, 0) | 1 << (gpa >> 12 & (FRAMES - 1))
        for block, bits in by_block.items():
            self._put(block, bits, bits.bit_count())

    def trim(self, keep: int = 0) -> int:
        """Gives the host memory of wholly free blocks back, but for the `keep` warmest; returns the pages released."""
        released = 0
        for block in list(self._whole):
            if self._idle <= keep:
                break
            if self._clean[block] != FULL:
                self._idle -= 1
                self.memory.release(block << 21, HUGE)
                self._clean[block] = FULL
                released += FRAMES
        return released
