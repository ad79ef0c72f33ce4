"""The pages of an address space: filling entries, copy-on-write, faults, and giving frames back after a flush.

Who owns a page is in its entry: OWNED is a frame of ours (one reference in the allocator), COW one that may have other
references, neither a page of the VMA's backing. Every removal goes through `_zap`, every frame through `_pending` until
`_flush`.
"""

from __future__ import annotations

import errno
import itertools
import signal
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.mm.frames import FrameAllocator
from kvmsentry.mm.pagetables import (
    ASKED,
    COW,
    FLAGS,
    GPA,
    HUGE,
    HUGE_MASK,
    OWNED,
    PAGE,
    PS,
    SOFT,
    P,
    PageTables,
    W,
    runs_of,
)
from kvmsentry.mm.vma import (
    PROT_EXEC,
    PROT_WRITE,
    STACK_GUARD,
    VM_GROWSDOWN,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_SHARED,
    VM_STACK,
    Vma,
    VmaTree,
)

SEGV_MAPERR, SEGV_ACCERR, BUS_ADRERR, SI_KERNEL = 1, 2, 2, 0x80  # uapi/asm-generic/siginfo.h
PF_PRESENT, PF_WRITE, PF_USER, PF_FETCH = 1, 2, 4, 16  # SDM vol. 3, 4.7
INFINITY = (1 << 64) - 1
_CACHE_DROP = 64  # pages up to which a narrowing is taken out of the access caches one by one
_ids = itertools.count(1)


class Pages:
    """State of an address space and everything that changes entries.

    `mmu_factory() -> PageTables`; `frames` the sandbox's allocator; `user_top` the first address no application may
    map. Attributes named `*_bytes` tune how much is filled, copied or broken at once.
    """

    populate_bytes = 1 << 20  # anonymous mappings up to this are filled when mapped
    file_populate_bytes = 64 << 20  # file mappings up to this get their entries when mapped
    fault_bytes = 64 << 10  # filled around a fault where a 2 MiB page does not fit (a power of two)
    file_fault_bytes = 1 << 20  # the same for a page of a backing
    private_copy_bytes = 256 << 10  # writable private mappings of a backing up to this are copied when mapped
    mmap_min = 65536  # vm.mmap_min_addr: nothing lies below, so that a null pointer is one
    cow_bytes = 64 << 10  # broken around a copy-on-write fault (a power of two)

    def __init__(self, mmu_factory: Callable[[], PageTables], frames: FrameAllocator, user_top: int) -> None:
        self.mmu_factory = mmu_factory
        self.mmu = mmu_factory()
        self.frames = frames
        self.memory = frames.memory
        self.user_top = user_top
        self.ident = next(_ids)
        self.tree = VmaTree()
        self.users = 1
        self.rss_pages = 0  # entries present
        self._most_pages = 0  # the most there were before the last time some went; see peak_pages
        self.total_pages = 0  # in VMAs
        self.data_pages = 0  # of them private and writable, not stack (RLIMIT_DATA)
        self.locked_pages = 0
        self.faults = 0
        self.rlimit_as = self.rlimit_data = INFINITY
        self.rlimit_stack = self.rlimit_memlock = 8 << 20
        self._view, self._words = self.memory.view, self.memory.words
        self._u32: memoryview = self._view.cast("I") if self._view.format == "B" else self._view.cast("B").cast("I")
        self._rd: dict[int, int] = {}  # va >> 12 -> GPA of a RAM page that may be read
        self._wr: dict[int, int] = {}  # the same, may be written
        self._ro: dict[int, bytes] = {}  # va >> 12 -> the page, of a file that nobody changes
        self._pending: list[tuple[int, int]] = []  # frames to free after the next flush
        self._drops: list[Any] = []  # backings to drop after the next flush
        self._spurious = -1  # page of the last fault that found nothing wrong

    @property
    def peak_pages(self) -> int:
        """The most pages that were ever resident (hiwater_rss): noted when some go, not when they come."""
        return max(self._most_pages, self.rss_pages)

    def forget_peak(self) -> None:
        """`peak_pages` begins anew with what is resident now."""
        self._most_pages = 0

    # -- removing

    def _zap(self, start: int, end: int) -> None:
        """Removes the entries of [start, end). The caller flushes."""
        removed = self.mmu.unmap_raw(start, end - start)
        if removed:
            pending = self._pending
            if self.rss_pages > self._most_pages:
                self._most_pages = self.rss_pages
            for _va, entry, pages in removed:
                self.rss_pages -= pages
                if entry & OWNED:
                    pending.append((entry & GPA, pages))
            self._forget(start, end)

    def _forget(self, start: int, end: int) -> None:
        """Drops cached translations of [start, end)."""
        first, last = start >> 12, end + PAGE - 1 >> 12
        rd, wr = self._rd, self._wr
        if self._ro:
            self._ro.clear()
        if not rd:  # what may be written may be read
            return
        if last - first > _CACHE_DROP:
            rd.clear()
            wr.clear()
        elif last - first < len(rd):
            for vpn in range(first, last):
                if rd.pop(vpn, None) is not None:
                    wr.pop(vpn, None)
        else:
            for vpn in [vpn for vpn in rd if first <= vpn < last]:
                del rd[vpn]
                wr.pop(vpn, None)

    def _flush(self) -> None:
        """Makes every removal and narrowing hold, then frees what they released."""
        if self.mmu.pending:
            self.mmu.flush()
        if self._pending:
            pending, self._pending = self._pending, []
            free = self.frames.free
            for gpa, pages in pending:
                free(gpa, pages)
        if self._drops:
            drops, self._drops = self._drops, []
            for backing in drops:
                backing.drop()

    def _hold(self, backing: Any) -> None:
        hold = getattr(backing, "hold", None)
        if hold is not None:
            hold()

    def _drop(self, backing: Any) -> None:
        if backing is not None and hasattr(backing, "drop"):
            self._drops.append(backing)

    # -- filling

    def _absent(self, start: int, end: int) -> list[tuple[int, int]]:
        """(va, end) of the parts of [start, end) without an entry."""
        parts = []
        at = start
        for va, _entry, pages in self.mmu.runs(start, end - start):
            if va > at:
                parts.append((at, va))
            at = va + (pages << 12)
        if at < end:
            parts.append((at, end))
        return parts

    def _fill(self, vma: Vma, start: int, end: int, fresh: bool = False) -> None:
        """Entries for the pages of [start, end) that have none; `fresh`: none has. Errno(ENOMEM) with some of them
        filled."""
        parts = [(start, end)] if fresh else self._absent(start, end)
        if vma.backing is None:
            for low, high in parts:
                self._fill_anonymous(vma, low, high)
        else:
            for low, high in parts:
                self._fill_backing(vma, low, high)

    def _asked_for(self, start: int, end: int) -> None:
        """The pages of [start, end) are there because the application said so, not because we filled ahead: mincore(2)
        counts them though nothing is in them. 2 MiB pages always count."""
        mmu = self.mmu
        for at in mmu._chunks(start, end):
            stop = min(end, (at | HUGE_MASK) + 1)
            table = mmu.table(at, stop)
            if table is not None and any(table):
                mmu.put_entries(at, [entry | ASKED if entry else 0 for entry in table], False)

    def _fill_anonymous(self, vma: Vma, va: int, end: int) -> None:
        flags = FLAGS[vma.prot & 7] | OWNED
        frames, map_raw = self.frames, self.mmu.map_raw
        huge = not vma.flags & VM_NOHUGEPAGE
        while va < end:
            if huge and not va & HUGE_MASK and end - va >= HUGE:
                count = 512
            else:
                count = min(end, (va | HUGE_MASK) + 1) - va >> 12
            while True:
                try:
                    gpa = frames.alloc(count)
                    break
                except Errno:
                    if count == 1:
                        raise
                    count = (count + 1) // 2
            map_raw(va, gpa, count << 12, flags)
            self.rss_pages += count
            va += count << 12

    def _fill_backing(self, vma: Vma, va: int, end: int) -> None:
        shared = vma.flags & VM_SHARED
        write = bool(shared and vma.prot & PROT_WRITE)
        flags = FLAGS[vma.prot & 7 if shared else vma.prot & 7 & ~PROT_WRITE]
        first = va
        for gpa, length in vma.backing.map_pages(vma.offset + va - vma.start, end - va, write):
            length = min(length + PAGE - 1 & -PAGE, end - va)
            if length <= 0:
                break
            self.mmu.map_raw(va, gpa, length, flags)
            self.rss_pages += length >> 12
            va += length
        if not shared:
            warm = getattr(vma.backing, "warm", None)
            if warm is not None:
                warm(vma.offset + first - vma.start, va - first)

    def _copy_backing(self, vma: Vma, va: int, end: int) -> None:
        """Fills fresh [va, end) of a private writable mapping with copies; past the object's end nothing."""
        flags = FLAGS[vma.prot & 7] | OWNED
        for source, length in vma.backing.map_pages(vma.offset + va - vma.start, end - va, False):
            length = min(length, end - va)
            while length > 0:
                count = min(length + PAGE - 1 >> 12, 512)
                while True:
                    try:
                        gpa = self.frames.alloc(count, zero=False)
                        break
                    except Errno:
                        if count == 1:
                            raise
                        count = (count + 1) // 2
                size = min(length, count << 12)
                try:
                    self._copy_page_data(gpa, source, size)
                except BaseException:
                    self.frames.free(gpa, count)
                    raise
                if size < count << 12:
                    self.memory.zero(gpa + size, (count << 12) - size)
                self.mmu.map_raw(va, gpa, count << 12, flags)
                self.rss_pages += count
                va += count << 12
                source += count << 12
                length -= size

    def _copy_page_data(self, target: int, source: int, length: int) -> None:
        """Copies to RAM from RAM or from a file window, whose file may shrink at any time (Errno(EFAULT) then)."""
        if self.frames.is_ram(source):
            self.memory.copy(target, source, length)
        else:
            self._view[target : target + length] = self.memory.safe_read(source, length)

    # -- copy-on-write

    def _break_cow(self, vma: Vma, va: int) -> int:
        """Makes the present page at `va` of a private writable VMA writable, and its neighbours while at it.

        0, or the signal number when the page's file has shrunk. Errno(ENOMEM).
        """
        mmu, frames = self.mmu, self.frames
        entry = mmu.entry(va)
        if entry & PS:
            low = va & ~HUGE_MASK
            whole = vma.start <= low and low + HUGE <= vma.end
            base = (entry & GPA) - (va & HUGE_MASK & ~0xFFF)
            if whole and entry & OWNED and frames.sole(base, 512):
                mmu.map_raw(low, base, HUGE, FLAGS[vma.prot & 7] | OWNED)
                return 0
        low = max(vma.start, va & -self.cow_bytes)
        high = min(vma.end, (va | self.cow_bytes - 1) + 1)
        if entry & PS:
            mmu._table(va, 1)
        table = mmu.table(low, high) or []
        flags = FLAGS[vma.prot & 7] | OWNED
        sole = frames.refs
        thin = [index for index, have in enumerate(table) if have & (P | W) == P]
        copy = [index for index in thin if not table[index] & OWNED or sole[table[index] >> 12 & 0xFF_FFFF_FFFF] != 1]
        for index in thin:
            table[index] = table[index] & GPA | flags if table[index] & OWNED else table[index]
        if copy:
            self._copy_pages(vma, va, low, table, copy, flags)
        mmu.put_entries(low, table, bool(copy))
        if copy:
            self._forget(low, high)
            self._flush()
        if not mmu.entry(va) & W:
            return signal.SIGBUS
        return 0

    def _copy_pages(self, vma: Vma, va: int, low: int, table: list[int], copy: list[int], flags: int) -> None:
        """Replaces the entries `copy` (indices) of `table` by fresh copies; only the page at `va` must succeed."""
        frames = self.frames
        original = self.mmu.table(low, low + (len(table) << 12)) or []
        wanted = va - low >> 12
        try:
            targets = [
                gpa + (number << 12)
                for gpa, pages in frames.alloc_runs(len(copy), zero=False)
                for number in range(pages)
            ]
        except Errno:
            for index in copy:  # memory is short: the faulting page alone
                if index != wanted:
                    table[index] = original[index]
            copy = [wanted] if wanted in copy else []
            targets = [frames.alloc(1, zero=False) for _ in copy]
        where = 0
        while where < len(copy):
            first = copy[where]
            source, target = original[first] & GPA, targets[where]
            count = 1
            while (
                where + count < len(copy)
                and copy[where + count] == first + count
                and targets[where + count] == target + (count << 12)
                and original[first + count] & GPA == source + (count << 12)
                and not (original[first] ^ original[first + count]) & OWNED
            ):
                count += 1
            owned = original[first] & OWNED
            try:
                self._copy_page_data(target, source, count << 12)
                good = True
            except Errno:
                good = False
            for number in range(count):
                index = first + number
                if good:
                    table[index] = target + (number << 12) | flags
                    if owned:
                        self._pending.append((source + (number << 12), 1))
                else:
                    table[index] = original[index]
                    frames.free(target + (number << 12))
            if good and not owned:
                self._clear_tail(vma, low + (first << 12), count, target)
            where += count

    def _own(self, vma: Vma, page: int) -> None:
        """Makes the page ours alone, its access bits staying as they are. The caller flushes."""
        entry = self.mmu.entry(page)
        if entry & OWNED and self.frames.refs[(entry & GPA) >> 12] == 1:
            return
        gpa = self.frames.alloc(1, zero=False)
        try:
            self._copy_page_data(gpa, entry & GPA, PAGE)
        except Errno:
            self.frames.free(gpa)
            raise
        if entry & OWNED:
            self._pending.append((entry & GPA, 1))
        else:
            self._clear_tail(vma, page, 1, gpa)
        if entry & PS:
            self.mmu._table(page, 1)
        flags = FLAGS[vma.prot & 7] | OWNED
        self.mmu.put_entries(page, [gpa | flags], True)
        self._forget(page, page + PAGE)

    def _clear_tail(self, vma: Vma, va: int, count: int, target: int) -> None:
        """A private copy reads as zero past the end of its object: Linux's page cache does, a backing's page may
        not."""
        last = va + (count - 1 << 12)
        have = sum(length for _gpa, length in vma.backing.map_pages(vma.offset + last - vma.start, PAGE, False))
        if 0 < have < PAGE:
            end = target + (count << 12)
            self.memory.zero(end - PAGE + have, PAGE - have)

    # -- faults

    def handle_fault(self, va: int, error_code: int) -> Any:
        """Mends the fault at `va` (CR2, with the SDM's error code): 0, or (signal number, si_code) for the application.

        SIGSEGV with SEGV_MAPERR or SEGV_ACCERR, SIGBUS with BUS_ADRERR (past the end of a file), SIGKILL when memory is
        out.
        """
        if not 0 <= va < self.user_top:
            return signal.SIGSEGV, SEGV_MAPERR
        self.faults += 1
        vma = self.tree.find(va)
        if vma is None:
            vma = self._grow_stack(va)
            if vma is None:
                return signal.SIGSEGV, SEGV_MAPERR
        prot = vma.prot
        if error_code & PF_WRITE:
            if not prot & PROT_WRITE:
                return signal.SIGSEGV, SEGV_ACCERR
        elif error_code & PF_FETCH:
            if not prot & PROT_EXEC:
                return signal.SIGSEGV, SEGV_ACCERR
        elif not prot & 7:
            return signal.SIGSEGV, SEGV_ACCERR
        page = va & -PAGE
        mmu = self.mmu
        entry = mmu.entry(page)
        try:
            if not entry & P:
                self._fill_around(vma, page)
                entry = mmu.entry(page)
                if not entry & P:
                    return signal.SIGBUS, BUS_ADRERR
            elif not error_code & PF_WRITE or entry & W:
                # Nothing wrong: another thread mended it, or a vCPU holds an old translation. Twice in a row means the
                # latter.
                if self._spurious == page:
                    mmu.mark(page)
                    self._flush()
                    self._spurious = -1
                else:
                    self._spurious = page
                return 0
            if error_code & PF_WRITE and not entry & W:
                if vma.flags & VM_SHARED:
                    self._zap(page, page + PAGE)
                    self._fill(vma, page, page + PAGE)
                    self._flush()
                elif self._break_cow(vma, page):
                    return signal.SIGBUS, BUS_ADRERR
        except Errno as error:
            self._flush()
            if error.errno != errno.ENOMEM:  # the backing cannot give the page (EIO, a file that shrank)
                return signal.SIGBUS, BUS_ADRERR
            return signal.SIGKILL, SI_KERNEL
        return 0

    def _fill_around(self, vma: Vma, page: int) -> None:
        """Fills the absent page and what lies around it: a 2 MiB page where the VMA covers one, a chunk else.
        Errno(ENOMEM) only when not even the page itself can be had."""
        if vma.backing is None:
            low = page & ~HUGE_MASK
            if (
                vma.start <= low
                and low + HUGE <= vma.end
                and not vma.flags & (VM_NOHUGEPAGE | VM_STACK)
                and not self.mmu.entry(page)
                and not any(self.mmu.table(low, low + HUGE) or ())
            ):
                chunk = HUGE
            else:
                chunk = self.fault_bytes
        else:
            chunk = self.file_fault_bytes
        low = max(vma.start, page & -chunk)
        high = min(vma.end, (page | chunk - 1) + 1)
        try:
            self._fill(vma, low, high)
        except Errno:
            if not self.mmu.entry(page) & P:
                self._fill(vma, page, page + PAGE)

    def _grow_stack(self, va: int) -> Vma | None:
        """Extends the MAP_GROWSDOWN VMA above `va` down to it; None when that is no stack, or too far, or too close to
        a neighbour."""
        vma = self.tree.above(va)
        if vma is None or not vma.flags & VM_GROWSDOWN:
            return None
        start = va & -PAGE
        if vma.end - start > self.rlimit_stack or start < self.mmap_min:
            return None
        below = self.tree.below(start)
        if below is not None and below.prot & 7 and below.end > start - STACK_GUARD and not below.flags & VM_GROWSDOWN:
            return None
        # A chunk at a time, as far as limit and neighbours allow: the next pages are wanted soon.
        low = max(
            start & -self.fault_bytes,
            vma.end - min(self.rlimit_stack, vma.end),
            below.end + STACK_GUARD if below else self.mmap_min,
        )
        low = min(start, low + PAGE - 1 & -PAGE)
        pages = vma.start - low >> 12
        if self.total_pages + pages > self.rlimit_as >> 12:
            return None
        if vma.flags & VM_LOCKED and self.locked_pages + pages > self.rlimit_memlock >> 12:
            return None
        self._account(vma, pages)
        self.tree.set_start(vma, low)
        return vma

    def _account(self, vma: Vma, pages: int) -> None:
        """Counts `pages` more (or less) of this kind of VMA."""
        self.total_pages += pages
        if vma.prot & PROT_WRITE and not vma.flags & (VM_SHARED | VM_GROWSDOWN):
            self.data_pages += pages
        if vma.flags & VM_LOCKED:
            self.locked_pages += pages


__all__ = [
    "BUS_ADRERR",
    "COW",
    "INFINITY",
    "PF_FETCH",
    "PF_PRESENT",
    "PF_USER",
    "PF_WRITE",
    "SEGV_ACCERR",
    "SEGV_MAPERR",
    "SOFT",
    "Pages",
    "runs_of",
]
