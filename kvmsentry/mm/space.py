"""AddressSpace: a process's memory. fork, exec's teardown, and what /proc shows, on top of the calls in the modules
below.

Pages (pages.py) < UserAccess (access.py) < Mappings (mappings.py) < Advice (advice.py) < AddressSpace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvmsentry.mm.advice import Advice
from kvmsentry.mm.frames import FrameAllocator
from kvmsentry.mm.pagetables import COW, GPA, HUGE_MASK, OWNED, PAGE, PS, PageTables, W
from kvmsentry.mm.vma import VM_DONTFORK, VM_LOCKED, VM_SHARED, VM_WIPEONFORK, Vma

USER_TOP = 0x7FFF_FFFF_F000  # arch/x86: TASK_SIZE_MAX; the platform's layout may say less


class AddressSpace(Advice):
    """One process's memory; `users` tasks share it (CLONE_VM). Construct with no users but the caller's (users = 1).

    Not for two threads of the host: the Sentry runs all Python on one.
    """

    aio: Any = None  # kernel/aio.py: contexts by id
    fork_copy_bytes = 8 << 20  # written private memory up to this is copied at fork, the rest becomes copy-on-write

    def __init__(self, mmu_factory: Callable[[], PageTables], frames: FrameAllocator, user_top: int = USER_TOP) -> None:
        super().__init__(mmu_factory, frames, user_top)
        self.image: Any = None  # elf.Image of the program, for /proc and prctl(PR_SET_MM)

    def get(self) -> AddressSpace:
        """One more user (clone with CLONE_VM)."""
        self.users += 1
        return self

    def put(self) -> None:
        """One user less; the last one destroys it."""
        self.users -= 1
        if self.users == 0:
            self.destroy()

    @contextmanager
    def building(self) -> Iterator[None]:
        """While no vCPU can have loaded this address space (exec builds it): removals need no invalidation."""
        self.mmu.quiet = True
        try:
            yield
        finally:
            self.mmu.quiet = False

    def destroy(self) -> None:
        """Frees everything. No vCPU may run in it any more; so nothing is invalidated, the tables are touched before
        reuse."""
        mmu, free = self.mmu, self.frames.free
        owned = [
            (entry & GPA, pages)
            for vma in self.tree
            for _va, entry, pages in mmu.runs(vma.start, vma.end - vma.start)
            if entry & OWNED
        ]
        mmu.destroy()
        for gpa, pages in owned + self._pending:
            free(gpa, pages)
        self._pending = []
        for vma in self.tree:
            self._drop(vma.backing)
        drops, self._drops = self._drops, []
        for backing in drops:
            backing.drop()
        self.tree.starts.clear()
        self.tree.vmas.clear()
        self.rss_pages = self.total_pages = self.data_pages = self.locked_pages = 0
        self._rd.clear()
        self._wr.clear()
        self._ro.clear()

    # -- fork

    def fork(self) -> AddressSpace:
        """A copy for a child process. Errno(ENOMEM), and then this one is as it was (but for copy-on-write marks).

        Written private memory is copied in bulk up to fork_copy_bytes, smallest mappings first come; beyond that both
        sides become copy-on-write and one flush narrows the parent. Pages of backings are shared.
        """
        child = type(self)(self.mmu_factory, self.frames, self.user_top)
        try:
            with child.building():
                self._fork_into(child)
        except BaseException:
            self._flush()
            child.destroy()
            raise
        return child

    def _fork_into(self, child: AddressSpace) -> None:
        for name in (
            "mmap_min",
            "mmap_base",
            "start_brk",
            "brk_end",
            "rlimit_as",
            "rlimit_data",
            "rlimit_stack",
            "rlimit_memlock",
            "populate_bytes",
            "file_populate_bytes",
            "fault_bytes",
            "file_fault_bytes",
            "private_copy_bytes",
            "cow_bytes",
            "fork_copy_bytes",
        ):
            value = getattr(self, name)
            if getattr(child, name) != value:
                setattr(child, name, value)
        child.image = self.image
        budget = self.fork_copy_bytes >> 12
        for vma in self.tree:
            if vma.flags & VM_DONTFORK:
                continue
            copy = vma.copy()
            copy.flags &= ~VM_LOCKED  # mlock(2): locks are not inherited
            self._hold(copy.backing)
            child._add(copy)
            if vma.flags & VM_WIPEONFORK:
                continue
            if vma.flags & VM_SHARED:
                self._share(child, vma)
                continue
            runs = list(self.mmu.runs(vma.start, vma.end - vma.start))
            written = sum(pages for _va, entry, pages in runs if entry & OWNED)
            if written <= budget:
                budget -= written
                self._copy_runs(child, runs, written)
            else:
                self._copy_on_write(child, vma)
        if self.mmu.pending:
            self._wr.clear()
        self._flush()

    def _share(self, child: AddressSpace, vma: Vma) -> None:
        """The child's entries for pages of a backing: the same."""
        for va, entry, pages in self.mmu.runs(vma.start, vma.end - vma.start):
            child.mmu.map_raw(va, entry & GPA, pages << 12, entry & ~GPA & ~PS)
            child.rss_pages += pages

    def _copy_runs(self, child: AddressSpace, runs: list[tuple[int, int, int]], written: int) -> None:
        """Frames of the child's own for what is OWNED, copied a contiguous piece at a time."""
        frames = self.frames
        copy, map_raw, alloc = self.memory.copy, child.mmu.map_raw, frames.alloc
        pool: list[tuple[int, int]] = []
        begin = size = first = begin_flags = (
            0  # a run of the child's not yet mapped: pieces that follow one another join it
        )
        try:
            for va, entry, pages in runs:
                flags = entry & ~GPA & ~PS
                child.rss_pages += pages
                source = entry & GPA
                if not entry & OWNED:
                    map_raw(va, source, pages << 12, flags)
                    continue
                flags &= ~COW
                written -= pages
                huge = entry & PS and pages == 512 and not va & HUGE_MASK
                while pages:
                    if huge:
                        target, count = alloc(512, False), 512
                    else:
                        if not pool:
                            pool = frames.alloc_runs(min(512, written + pages), False)
                            pool.reverse()
                        target, count = pool.pop()
                        if count > pages:
                            pool.append((target + (pages << 12), count - pages))
                            count = pages
                    length = count << 12
                    if target == first + size and va == begin + size and flags == begin_flags:
                        size += length
                    else:
                        if size:
                            map_raw(begin, first, size, begin_flags)
                        begin, first, size, begin_flags = va, target, length, flags
                    copy(target, source, length)
                    va += length
                    source += length
                    pages -= count
        finally:  # what is mapped is freed with the child, also when memory ran out
            if size:
                map_raw(begin, first, size, begin_flags)
            for gpa, count in pool:
                frames.free(gpa, count)

    def _copy_on_write(self, child: AddressSpace, vma: Vma) -> None:
        """Both sides share the frames, without W; whoever writes first copies."""
        mmu, ref = self.mmu, self.frames.ref
        put = child.mmu.put_entries
        for at in mmu._chunks(vma.start, vma.end):
            stop = min(vma.end, (at | HUGE_MASK) + 1)
            table = mmu.table(at, stop)
            if table is None:
                entry = mmu.entry(at)
                if not entry:
                    continue
                pages = stop - at >> 12
                flags = entry & ~GPA & ~PS
                if entry & OWNED:
                    ref(entry & GPA, pages)
                    flags = flags & ~W | COW
                    mmu.map_raw(at, entry & GPA, pages << 12, flags)
                child.mmu.map_raw(at, entry & GPA, pages << 12, flags)
                child.rss_pages += pages
                continue
            if not any(table):
                continue
            count = 0
            for index, entry in enumerate(table):
                if entry:
                    count += 1
                    if entry & OWNED:
                        table[index] = entry & ~W | COW
                        ref(entry & GPA)
            mmu.put_entries(at, table, True)
            put(at, table, False)
            child.rss_pages += count

    # -- what others ask

    def zap_backing(self, backing: Any, offset: int, length: int) -> None:
        """Removes entries that show [offset, offset + length) of `backing` (truncate, hole punch); private copies go
        too when `length` reaches the end (unmap_mapping_range with even_cows). Later touches ask the backing again."""
        for vma in self.tree:
            if vma.backing is backing:
                low = max(vma.start, vma.start + offset - vma.offset)
                high = min(vma.end, vma.start + offset + length - vma.offset)
                if low < high:
                    self._zap(low & -PAGE, high + PAGE - 1 & -PAGE)
        self._flush()

    def swap_backing(self, kind: type, backing: Any) -> None:
        """Every VMA over a backing of type `kind` shows `backing` from now on (a time namespace's parameters). Cannot
        fail: the pages come with the next touch. No other thread may be running in here."""
        for vma in self.tree:
            if isinstance(vma.backing, kind) and vma.backing is not backing:
                self._zap(vma.start, vma.end)
                self._drop(vma.backing)
                self._hold(backing)
                vma.backing = backing
        self._flush()

    def maps(self) -> Iterator[Vma]:
        """VMAs in order of address, for /proc/PID/maps and smaps; see vma_rss for the pages present."""
        return iter(list(self.tree))

    def vma_rss(self, vma: Vma) -> tuple[int, int]:
        """(pages present, of them private ones of ours) in `vma`."""
        present = private = 0
        for _va, entry, pages in self.mmu.runs(vma.start, vma.end - vma.start):
            present += pages
            if entry & OWNED:
                private += pages
        return present, private


__all__ = ["USER_TOP", "AddressSpace"]
