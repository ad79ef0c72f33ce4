"""Four-level page tables in guest RAM (SDM vol. 3, 4.5), written from Python through memoryviews.

What must hold (see README.md, "Making a change hold"):
- Accessed and Dirty are always preset, else the processor (or KVM in its place) writes the tables itself.
- An entry that appears needs nothing. One that disappears or narrows is recorded by its place in a table (a page table
  for 4 KiB entries, a page directory for 2 MiB entries) and holds after `flush()`. KVM forgets what it shadows of the
  places named and no more: were the whole table named, every page it shows would fault once more.
- A page that was a table is a table again only after an invalidation touched it: KVM keeps its shadow of a table page
  until then.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterator
from typing import Any

from kvmsentry.errors import BrokenInvariant

PAGE = 4096
HUGE = 2 << 20
HUGE_MASK = HUGE - 1

P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
# software bits: a frame counted in the allocator; one that a fork may share; a page that was to be there (mlock(2))
OWNED, COW, ASKED = 1 << 9, 1 << 10, 1 << 11
SOFT = OWNED | COW | ASKED
GPA = 0x000F_FFFF_FFFF_F000
TABLE = P | W | U | A  # an entry that points at a table; the leaf decides
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
_LEAF = U | A | D
# by prot & 7; PROT_NONE keeps the address but not P, so the page stays ours and the processor faults
FLAGS = tuple(
    _LEAF | (P if prot else 0) | (W if prot & PROT_WRITE else 0) | (0 if prot & PROT_EXEC else NX) for prot in range(8)
)
_ZERO_PAGE = bytes(PAGE)
_TABLE_BATCH = 64  # freed tables that are touched by one invalidation
_PLACES = 3  # more entries of one table than that are not named one by one: each may interrupt a processor
WHOLE = 4  # added to a table's GPA: all of it, as a place to invalidate (see platform.invalidate)
_TABLE_RUN = 16  # frames taken for tables at a time: tables lie together, away from 2 MiB runs

_blocks: dict[int, memoryview] = {}  # (2 MiB of GPA | flags) -> its 512 entries; the same frames come back hot


def entries(first: int, count: int) -> Any:
    """`count` (<= 512) entries of a contiguous run, the first being `first`, as something assignable to a slice of
    words."""
    if count <= 8:
        return array("Q", range(first, first + count * PAGE, PAGE))
    key = first & ~0x1FF000
    block = _blocks.get(key)
    if block is None:
        if len(_blocks) >= 2048:
            _blocks.clear()
        block = _blocks[key] = memoryview(array("Q", range(key, key + HUGE, PAGE)))
    index = first >> 12 & 511
    if index + count <= 512:
        return block[index : index + count]
    return array("Q", range(first, first + count * PAGE, PAGE))


def runs_of(table: list[int]) -> list[tuple[int, int, int]]:
    """(index, first entry, count) of each run of non-zero entries with consecutive addresses and equal flags."""
    first = table[0]
    count = len(table)
    if first and table[-1] == first + (count - 1) * PAGE and table == list(range(first, first + count * PAGE, PAGE)):
        return [(0, first, count)]
    runs = []
    start = want = 0
    for index, entry in enumerate(table):
        if entry != want:
            if want:
                runs.append((start, table[start], index - start))
            start = index
        want = entry + PAGE if entry else 0
    if want:
        runs.append((start, table[start], count - start))
    return runs


class TablePool:
    """Pages for tables, shared by every Mmu of a sandbox. A page that was a table stays dirty until an invalidation
    touched it."""

    def __init__(self, platform: Any, frames: Any) -> None:
        self.platform, self.frames = platform, frames
        self.clean: list[int] = []
        self.dirty: list[int] = []
        self.live: weakref.WeakSet[PageTables] = weakref.WeakSet()  # not destroyed: their CR3 works
        self.held = 0  # frames that the pool took from the allocator and keeps

    @staticmethod
    def of(platform: Any, frames: Any) -> TablePool:
        """The pool of this allocator, made on first use."""
        if frames.table_pool is None:
            frames.table_pool = TablePool(platform, frames)
        pool: TablePool = frames.table_pool
        return pool

    def alloc(self, mmu: PageTables | None) -> int:
        """GPA of an empty table. `mmu` is an address space whose CR3 works, for the touching (None: take fresh frames
        instead)."""
        if not self.clean:
            if mmu is None:
                mmu = next(iter(self.live), None)
            if len(self.dirty) >= _TABLE_BATCH and mmu is not None:
                self.touch(mmu)
            else:
                self.frames.limit_pages += _TABLE_RUN  # tables are not charged: an unmap must not fail for want of one
                for gpa, count in self.frames.alloc_runs(_TABLE_RUN, zero=False):
                    self.held += count
                    self.clean.extend(range(gpa + (count - 1) * PAGE, gpa - PAGE, -PAGE))
        gpa = self.clean.pop()
        self.frames.memory.view[gpa : gpa + PAGE] = _ZERO_PAGE
        return gpa

    def touch(self, mmu: PageTables) -> None:
        """Makes every dirty page a clean one."""
        batch, self.dirty = self.dirty, []
        if batch:
            self.platform.invalidate(mmu, [gpa + WHOLE for gpa in batch])
            self.clean += batch

    def free(self, gpa: int) -> None:
        self.dirty.append(gpa)

    def drain(self, mmu: PageTables) -> None:
        """Gives the pages that no Mmu uses back to the allocator (for a census, and when memory is short)."""
        self.touch(mmu)
        for gpa in self.clean:
            self.frames.free(gpa)
        self.held -= len(self.clean)
        self.frames.limit_pages -= len(self.clean)
        self.clean = []


class PageTables:
    """The Mmu of the KVM platform: one address space's tables.

    `platform` gives `kernel_pml4_entries() -> {index: entry}` for the part that all address spaces share, and
    `invalidate(mmu, places)`: GPAs of entries, or of tables plus WHOLE. Addresses and lengths in bytes, page aligned;
    `prot` in PROT_ bits.
    """

    def __init__(self, platform: Any, frames: Any) -> None:
        self.platform, self.frames = platform, frames
        self.pool = TablePool.of(platform, frames)
        memory = frames.memory
        self._words, self._view = memory.words, memory.view
        # Where tables are, as an index into words (GPA >> 3): by va >> 21 the page tables, >> 30 the directories, >> 39
        # the directory pointer tables. So a walk is one dictionary lookup.
        self._pts: dict[int, int] = {}
        self._pds: dict[int, int] = {}
        self._pdpts: dict[int, int] = {}
        self._stale: set[int] = set()  # GPAs of entries that went or narrowed, or of tables plus WHOLE
        self._gone: list[int] = []  # tables that are free once the flush is done
        self.quiet = False  # True while no vCPU can have loaded cr3 (exec, fork): nothing to invalidate
        self._kernel: list[int] = []
        self.cr3 = self.pool.alloc(None)
        try:
            for index, entry in dict(platform.kernel_pml4_entries()).items():
                self._words[(self.cr3 >> 3) + index] = entry
                self._kernel.append(index)
        except BaseException:
            self.pool.free(self.cr3)
            raise
        self.pool.live.add(self)

    # -- tables

    def _table(self, va: int, level: int) -> int:
        """Index in words of the table that holds the entries of `level` (1 PT, 2 PD, 3 PDPT) for `va`; made if need
        be."""
        shift = 12 + 9 * level
        books = (self._pts, self._pds, self._pdpts)[level - 1]
        at = books.get(va >> shift)
        if at is None:
            above = self._table(va, level + 1) if level < 3 else self.cr3 >> 3
            slot = above + (va >> shift & 511)
            old = self._words[slot]
            gpa = self.pool.alloc(self)
            at = gpa >> 3
            if old:
                if level != 1 or not old & PS:
                    raise BrokenInvariant(f"entry {old:#x} where no table is, va {va:#x} level {level}")
                self._words[at : at + 512] = entries(old & ~PS, 512)  # a 2 MiB entry is split
                self._stale.add(slot << 3)
            self._words[slot] = gpa | TABLE
            books[va >> shift] = at
        return at

    def _drop_table(self, va: int) -> None:
        """Takes the page table of the 2 MiB at `va` out; the caller has dealt with what it held."""
        at = self._pts.pop(va >> 21, None)
        if at is not None:
            slot = self._pds[va >> 30] + (va >> 21 & 511)
            self._words[slot] = 0
            self._stale.add(slot << 3)
            self._gone.append(at << 3)

    def _note(self, slot: int, count: int) -> None:
        """Records `count` entries of one table from index `slot` of words on."""
        if count > _PLACES:
            self._stale.add((slot & ~511) << 3 | WHOLE)
        else:
            self._stale.update(range(slot << 3, slot + count << 3, 8))

    # -- raw entries, for AddressSpace

    def map_raw(self, va: int, gpa: int, length: int, flags: int) -> None:
        """Entries for the run [gpa, gpa + length) at `va` with these flag bits; 2 MiB ones where va, gpa and length
        allow."""
        end = va + length
        words = self._words
        while va < end:
            if not (va | gpa) & HUGE_MASK and end - va >= HUGE:
                at = self._pds.get(va >> 30) or self._table(va, 2)
                slot = at + (va >> 21 & 511)
                if words[slot]:
                    self._stale.add(slot << 3)
                    self._drop_table(va)
                words[slot] = gpa | flags | PS
                va += HUGE
                gpa += HUGE
                continue
            pt = self._pts.get(va >> 21) or self._table(va, 1)
            index = va >> 12 & 511
            count = min(end - va >> 12, 512 - index)
            slot = pt + index
            if count == 1:
                new = gpa | flags
                old = words[slot]
                if old & P and (old ^ new) & ~(W | SOFT | NX) or old & ~new & (P | W) or new & ~old & NX and old:
                    self._stale.add(slot << 3)
                words[slot] = new
            else:
                if words[slot : slot + count].tobytes() != _ZERO_PAGE[: count << 3]:
                    for where, entry, pages in runs_of(words[slot : slot + count].tolist()):
                        if entry & P:
                            self._note(slot + where, pages)
                words[slot : slot + count] = entries(gpa | flags, count)
            va += count << 12
            gpa += count << 12

    def put_entries(self, va: int, new: list[int], stale: bool) -> None:
        """Writes raw 4 KiB entries at `va`, all within one page table; `stale`: some of them replace or narrow present
        ones."""
        pt = self._pts.get(va >> 21) or self._table(va, 1)
        slot = pt + (va >> 12 & 511)
        words = self._words
        if stale:
            for index, old in enumerate(words[slot : slot + len(new)].tolist()):
                if old & P and old != new[index]:
                    self._stale.add(slot + index << 3)
        words[slot : slot + len(new)] = array("Q", new)

    def entry(self, va: int) -> int:
        """The leaf entry for `va` as a 4 KiB entry (a 2 MiB one is shown as the part that holds `va`, PS set); 0 when
        there is none."""
        pt = self._pts.get(va >> 21)
        if pt is not None:
            return self._words[pt + (va >> 12 & 511)]
        pd = self._pds.get(va >> 30)
        if pd is not None:
            entry = self._words[pd + (va >> 21 & 511)]
            if entry:
                return entry + (va & HUGE_MASK & ~0xFFF)
        return 0

    lookup = entry

    def table(self, va: int, end: int) -> list[int] | None:
        """The entries from `va` up to `end` or the end of its 2 MiB, 4 KiB ones; None when there is no page table
        there."""
        pt = self._pts.get(va >> 21)
        if pt is None:
            return None
        index = va >> 12 & 511
        return self._words[pt + index : pt + min(512, index + (end - (va & -PAGE) >> 12))].tolist()

    def _chunks(self, va: int, end: int) -> Iterator[int]:
        """Starts of the parts of [va, end), cut at 2 MiB, that may hold entries: holes of whole directories cost
        nothing."""
        if end - va <= HUGE * 64:
            while va < end:
                yield va
                va = (va | HUGE_MASK) + 1
            return
        words = self._words
        for gib in sorted(key for key in self._pds if va >> 30 <= key <= end - 1 >> 30):
            low = max(va, gib << 30)
            high = min(end, (gib + 1) << 30)
            first = low >> 21 & 511
            at = self._pds[gib] + first
            for index, entry in enumerate(words[at : at + (high - 1 >> 21) - (low >> 21) + 1].tolist()):
                if entry:
                    yield max(low, (low >> 21) + index << 21)

    def runs(self, va: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(va, entry, pages) of each run of entries within; PS set and pages as far as they lie within for 2 MiB
        ones."""
        end = va + length
        words = self._words
        for at in self._chunks(va, end):
            pt = self._pts.get(at >> 21)
            stop = min(end, (at | HUGE_MASK) + 1)
            if pt is None:
                entry = self.entry(at)
                if entry:
                    yield at, entry, stop - at >> 12
                continue
            index = at >> 12 & 511
            table = words[pt + index : pt + index + (stop - at >> 12)].tolist()
            if any(table):
                for where, entry, count in runs_of(table):
                    yield at + (where << 12), entry, count

    def unmap_raw(self, va: int, length: int) -> list[tuple[int, int, int]]:
        """Removes entries; returns (va, entry, pages) of what was there. Records the tables; tables left with nothing
        go too."""
        end = va + length
        words = self._words
        removed: list[tuple[int, int, int]] = []
        for at in self._chunks(va, end):
            stop = min(end, (at | HUGE_MASK) + 1)
            pt = self._pts.get(at >> 21)
            if pt is None:
                pd = self._pds.get(at >> 30)
                if pd is None:
                    continue
                slot = pd + (at >> 21 & 511)
                entry = words[slot]
                if not entry:
                    continue
                if stop - at == HUGE:
                    words[slot] = 0
                    self._stale.add(slot << 3)
                    removed.append((at, entry, 512))
                    continue
                pt = self._table(at, 1)
            index = at >> 12 & 511
            count = stop - at >> 12
            if count == 1:
                entry = words[pt + index]
                if entry:
                    words[pt + index] = 0
                    if entry & P:
                        self._stale.add(pt + index << 3)
                    removed.append((at, entry, 1))
                continue
            table = words[pt + index : pt + index + count].tolist()
            if any(table):
                for where, entry, pages in runs_of(table):
                    removed.append((at + (where << 12), entry, pages))
                    if entry & P and count < 512:
                        self._note(pt + index + where, pages)
                if count < 512:
                    words[pt + index : pt + index + count] = memoryview(_ZERO_PAGE[: count << 3]).cast("Q")
            if count == 512:
                self._drop_table(at)
        return removed

    def protect_raw(self, va: int, length: int, prot: int, private: bool) -> None:
        """New access bits for what is there. `private`: only OWNED entries without COW may get W, the rest break on a
        write fault."""
        end = va + length
        words = self._words
        wide = FLAGS[prot & 7]
        thin = wide & ~W
        for at in self._chunks(va, end):
            stop = min(end, (at | HUGE_MASK) + 1)
            pt = self._pts.get(at >> 21)
            if pt is None:
                pd = self._pds.get(at >> 30)
                if pd is None:
                    continue
                slot = pd + (at >> 21 & 511)
                entry = words[slot]
                if not entry:
                    continue
                if stop - at == HUGE:
                    flags = thin if private and entry & (OWNED | COW) != OWNED else wide
                    new = entry & (GPA | SOFT) | flags | PS
                    if entry & ~new & (P | W) or new & ~entry & NX:
                        self._stale.add(slot << 3)
                    words[slot] = new
                    continue
                pt = self._table(at, 1)
            index = at >> 12 & 511
            table = words[pt + index : pt + index + (stop - at >> 12)].tolist()
            if not any(table):
                continue
            for where, entry, count in runs_of(table):
                flags = thin if private and entry & (OWNED | COW) != OWNED else wide
                new = entry & (GPA | SOFT) | flags
                slot = pt + index + where
                if entry & P and (entry & ~new & (P | W) or new & ~entry & NX):
                    self._note(slot, count)
                if count == 1:
                    words[slot] = new
                else:
                    words[slot : slot + count] = entries(new, count)

    def mark(self, va: int) -> None:
        """Records the table that holds the entry of `va`, whatever happened to it."""
        pt = self._pts.get(va >> 21)
        if pt is None:
            pt = self._pds.get(va >> 30)
        if pt is not None:
            self._stale.add(pt << 3 | WHOLE)

    # -- the Mmu interface

    def map(self, va: int, gpa: int, length: int, prot: int) -> None:
        """Maps a contiguous run; nobody's count of frames changes. Entries that are replaced are recorded."""
        self.map_raw(va, gpa, length, FLAGS[prot & 7])

    def unmap(self, va: int, length: int) -> None:
        self.unmap_raw(va, length)

    def protect(self, va: int, length: int, prot: int) -> None:
        self.protect_raw(va, length, prot, False)

    @property
    def pending(self) -> bool:
        """Whether a flush would do anything."""
        return bool(self._stale or self._gone)

    def flush(self) -> None:
        """Makes recorded removals and narrowings hold on every vCPU. Free frames only after it."""
        if self._stale:
            stale = self._stale
            self._stale = set()
            places = [] if self.quiet else self._places(stale)
            if places:
                self.platform.invalidate(self, places)
        if self._gone:
            self.pool.dirty += self._gone
            self._gone = []

    def _places(self, stale: set[int]) -> list[int]:
        """What is to be named of `stale`: a table as a whole, or its entries where they are few."""
        tables: dict[int, list[int]] = {}
        for place in stale:
            tables.setdefault(place & -PAGE, []).append(place)
        for gpa in self._gone:  # unlinked: nothing walks them any more; touched before reuse
            tables.pop(gpa, None)
        places: list[int] = []
        for gpa, named in tables.items():
            if len(named) > _PLACES or gpa + WHOLE in named:
                places.append(gpa + WHOLE)
            else:
                places += named
        return places

    def destroy(self) -> None:
        """Frees the tables, not the leaf frames. No vCPU may run in this address space any more."""
        self.pool.live.discard(self)
        for books in (self._pts, self._pds, self._pdpts):
            for at in books.values():
                self.pool.free(at << 3)
            books.clear()
        self.pool.dirty += self._gone
        self._gone = []
        self._stale.clear()
        if self.cr3:
            self.pool.free(self.cr3)
            self.cr3 = 0
