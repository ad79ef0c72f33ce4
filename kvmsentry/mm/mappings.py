"""mmap, munmap, mprotect, mremap, brk: what the application asks for (mmap(2), mprotect(2), mremap(2), brk(2))."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.mm.access import UserAccess
from kvmsentry.mm.frames import FrameAllocator
from kvmsentry.mm.pagetables import GPA, HUGE, PAGE, PageTables
from kvmsentry.mm.shared import SharedMemory
from kvmsentry.mm.vma import (
    MAP_32BIT,
    MAP_ANONYMOUS,
    MAP_DENYWRITE,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_NONBLOCK,
    MAP_NORESERVE,
    MAP_POPULATE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_STACK,
    MAP_SYNC,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_GROWSDOWN,
    PROT_GROWSUP,
    PROT_WRITE,
    VM_GROWSDOWN,
    VM_LAZY,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_NORESERVE,
    VM_SHARED,
    VM_STACK,
    Vma,
    random_below,
)

MAX_MAP_COUNT = 65530  # vm.max_map_count
_STACK_TOP_FILL = 32 << 10  # of a thread's stack, filled before the thread runs
_MMAP_RND_PAGES = 1 << 28  # arch/x86/mm/mmap.c: mmap_rnd_bits
_GAP_MIN, _STACK_RND = 128 << 20, 16 << 30


class Mappings(UserAccess):
    """The VMA calls. Addresses and lengths in bytes as the application gave them; errnos as the man pages say."""

    def __init__(self, mmu_factory: Callable[[], PageTables], frames: FrameAllocator, user_top: int) -> None:
        super().__init__(mmu_factory, frames, user_top)
        self.start_brk = self.brk_end = 0
        self.lock_future = False
        self.mmap_base = 0
        self.set_layout(randomize=True)

    def set_layout(self, randomize: bool) -> None:
        """Where the top-down search begins: below the stack's room, at a random place (personality ADDR_NO_RANDOMIZE:
        not)."""
        gap = min(max(self.rlimit_stack, _GAP_MIN), self.user_top // 6 * 5)
        if randomize:
            gap += _STACK_RND + random_below(min(_MMAP_RND_PAGES, self.user_top // 8 >> 12)) * PAGE
        self.mmap_base = self.user_top - gap & -PAGE

    # -- mmap

    def mmap(
        self,
        addr: int,
        length: int,
        prot: int,
        flags: int,
        backing: Any = None,
        offset: int = 0,
        max_prot: int = 7,
        label: bytes = b"",
    ) -> int:
        """Maps and returns the address (mmap(2)). `backing` None: anonymous. `max_prot`: what mprotect may ever allow
        (a file opened read-only and mapped shared: 5). `label`: the name for /proc/PID/maps of a mapping without a
        file."""
        if length <= 0:
            raise Errno(errno.EINVAL)
        if length > self.user_top:
            raise Errno(errno.ENOMEM)
        length = length + PAGE - 1 & -PAGE
        kind = flags & 0xF
        if kind not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE) or offset & (PAGE - 1):
            raise Errno(errno.EINVAL)
        if kind == MAP_SHARED_VALIDATE and flags & MAP_SYNC:
            raise Errno(errno.EOPNOTSUPP)
        if backing is not None:
            if offset < 0 or offset + length >= 1 << 63:
                raise Errno(errno.EOVERFLOW)
            if prot & 7 & ~max_prot:
                raise Errno(errno.EACCES)
        if flags & MAP_HUGETLB:
            raise Errno(errno.ENOMEM)  # no pool of huge pages is configured, as on a fresh Linux
        if flags & MAP_GROWSDOWN and (kind != MAP_PRIVATE or backing is not None):
            raise Errno(errno.EINVAL)
        pages = length >> 12
        replaced = 0
        if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
            if addr & (PAGE - 1):
                raise Errno(errno.EINVAL)
            if addr < 0 or addr + length > self.user_top:
                raise Errno(errno.ENOMEM)
            if addr < self.mmap_min:
                raise Errno(errno.EPERM)
            if not self.tree.free(addr, addr + length):
                if flags & MAP_FIXED_NOREPLACE:
                    raise Errno(errno.EEXIST)
                replaced = sum(
                    min(vma.end, addr + length) - max(vma.start, addr) >> 12
                    for vma in self.tree.range(addr, addr + length)
                )
        else:
            addr = self._place(addr, length, flags, backing, offset)
        vm = VM_SHARED if kind != MAP_PRIVATE else 0
        vm |= (
            (VM_GROWSDOWN if flags & MAP_GROWSDOWN else 0)
            | (VM_NORESERVE if flags & MAP_NORESERVE else 0)
            | (VM_STACK | VM_NOHUGEPAGE if flags & (MAP_STACK | MAP_GROWSDOWN) else 0)
            | (VM_LOCKED if flags & MAP_LOCKED or self.lock_future else 0)
        )
        vma = Vma(addr, addr + length, prot & 7, vm, backing, offset if backing is not None else 0, max_prot, label)
        self._check_limits(vma, pages, replaced)
        if backing is None and vm & VM_SHARED:
            vma.backing = backing = SharedMemory(self.frames, length)
        lazy = None
        if replaced:
            lazy = self._replace(addr, addr + length, backing)
        self._hold(backing)
        self._add(vma)
        if replaced:
            self._flush()
            if lazy is not None:
                self._fill_lazy(lazy)
        try:
            self._populate_new(vma, flags)
        except Errno:  # the backing will not be mapped (ENODEV, EIO): nothing stays
            self._remove(addr, addr + length)
            self._flush()
            raise
        if len(self.tree) > 1:
            self._merge(addr, addr + length)
        return addr

    def _place(self, addr: int, length: int, flags: int, backing: Any, offset: int) -> int:
        """A free place for `length` bytes: the hint where it is free, else top-down from mmap_base, else bottom-up."""
        addr &= -PAGE
        if addr and self.mmap_min <= addr and addr + length <= self.user_top and self.tree.free(addr, addr + length):
            return addr
        if flags & MAP_32BIT:
            return self.tree.gap_above(length, 0x4000_0000, 0x8000_0000)  # arch/x86/kernel/sys_x86_64.c
        align, congruent = PAGE, 0
        if length >= HUGE:
            # 2 MiB entries need address and frame to agree mod 2 MiB; a file window agrees with the file's offset
            if backing is not None:
                align, congruent = HUGE, offset & HUGE - 1
            elif not length & HUGE - 1 and not flags & (MAP_STACK | MAP_GROWSDOWN):
                align = HUGE
        try:
            return self.tree.gap_below(length, self.mmap_min, self.mmap_base, align, congruent)
        except Errno:
            if align != PAGE:
                try:
                    return self.tree.gap_below(length, self.mmap_min, self.mmap_base)
                except Errno:
                    pass
        return self.tree.gap_above(length, self.mmap_min, self.user_top)

    def _check_limits(self, vma: Vma, pages: int, replaced: int) -> None:
        if len(self.tree) >= MAX_MAP_COUNT:
            raise Errno(errno.ENOMEM)
        if self.total_pages + pages - replaced > self.rlimit_as >> 12:
            raise Errno(errno.ENOMEM)
        if (
            vma.prot & PROT_WRITE
            and not vma.flags & (VM_SHARED | VM_GROWSDOWN)
            and self.data_pages + pages - replaced > self.rlimit_data >> 12
        ):
            raise Errno(errno.ENOMEM)
        if vma.flags & VM_LOCKED and self.locked_pages + pages > self.rlimit_memlock >> 12:
            raise Errno(errno.EAGAIN)

    def _add(self, vma: Vma) -> None:
        self.tree.insert(vma)
        self._account(vma, vma.length >> 12)

    def _merge(self, start: int, end: int) -> None:
        for swallowed in self.tree.merge(start, end):
            self._drop(swallowed.backing)
        if self._drops:
            self._flush()

    def _populate_new(self, vma: Vma, flags: int) -> None:
        """Fills a new mapping as far as that pays; what memory there is not for is left to the fault."""
        if not vma.prot:
            return
        length = vma.end - vma.start
        wanted = flags & MAP_POPULATE and not flags & MAP_NONBLOCK or vma.flags & VM_LOCKED
        try:
            if vma.backing is None:
                if length <= self.populate_bytes and not flags & MAP_NORESERVE or wanted:
                    self._fill(vma, vma.start, vma.end, True)
                elif vma.flags & VM_STACK and not vma.flags & VM_GROWSDOWN:
                    self._fill(vma, max(vma.start, vma.end - _STACK_TOP_FILL), vma.end, True)
            elif vma.flags & VM_SHARED:
                # Shared memory without a file makes its pages as they are asked for: not for a large reservation.
                if (
                    length <= self.populate_bytes
                    or wanted
                    or (length <= self.file_populate_bytes and not getattr(vma.backing, "on_demand", False))
                ):
                    self._fill(vma, vma.start, vma.end, True)
            elif vma.prot & PROT_WRITE and (length <= self.private_copy_bytes or wanted):
                self._copy_backing(vma, vma.start, vma.end)
            elif flags & MAP_DENYWRITE and not flags & MAP_FIXED and not wanted:
                vma.flags |= VM_LAZY  # a loader reserves the whole library, then lays its segments over it
            elif length <= self.file_populate_bytes or wanted:
                self._fill(vma, vma.start, vma.end, True)
        except Errno as error:
            if error.errno not in (errno.ENOMEM, errno.EFAULT):
                raise
        if wanted:
            self._asked_for(vma.start, vma.end)

    def _replace(self, start: int, end: int, backing: Any) -> Vma | None:
        """Clears [start, end) for MAP_FIXED; returns what is left below it of a loader's reservation of the same
        backing."""
        first = self.tree.find(start)
        self._remove(start, end)
        if (
            first is not None
            and backing is not None
            and first.backing is backing
            and first.flags & VM_LAZY
            and first.end == start
        ):
            return first
        return None

    def _fill_lazy(self, vma: Vma) -> None:
        vma.flags &= ~VM_LAZY
        if vma.length <= self.file_populate_bytes:
            try:
                self._fill(vma, vma.start, vma.end)
            except Errno as error:
                if error.errno != errno.ENOMEM:
                    raise

    # -- munmap

    def munmap(self, addr: int, length: int) -> None:
        """munmap(2): whole pages of [addr, addr + length) go, mapped or not."""
        if addr & (PAGE - 1) or length <= 0 or addr < 0 or addr + length > self.user_top:
            raise Errno(errno.EINVAL)
        end = addr + length + PAGE - 1 & -PAGE
        if len(self.tree) >= MAX_MAP_COUNT:
            vma = self.tree.find(addr)
            if vma is not None and vma.start < addr and end < vma.end:
                raise Errno(errno.ENOMEM)
        self._remove(addr, end)
        self._flush()

    def _remove(self, start: int, end: int) -> None:
        """Takes [start, end) out of VMAs and tables. The caller flushes."""
        tree = self.tree
        for vma in tree.range(start, end):
            low, high = max(vma.start, start), min(vma.end, end)
            self._account(vma, low - high >> 12)
            if vma.start < start:
                if vma.end > end:
                    tree.split(vma, end)
                    self._hold(vma.backing)
                tree.set_end(vma, start)
            elif vma.end > end:
                tree.set_start(vma, end)
            else:
                tree.remove(vma)
                self._drop(vma.backing)
            self._zap(low, high)

    # -- mprotect

    def _isolate(self, vma: Vma, start: int, end: int) -> Vma:
        """Splits so that one VMA is exactly [start, end) of `vma`; Errno(ENOMEM) when there are too many."""
        if len(self.tree) + (start > vma.start) + (end < vma.end) > MAX_MAP_COUNT:
            raise Errno(errno.ENOMEM)
        if start > vma.start:
            vma = self.tree.split(vma, start)
            self._hold(vma.backing)
        if end < vma.end:
            self._hold(self.tree.split(vma, end).backing)
        return vma

    def mprotect(self, addr: int, length: int, prot: int, implied: int = 0) -> None:
        """mprotect(2). Like Linux, what lies before a hole or a forbidden mapping is changed before the error is
        reported. `implied`: added to `prot` where a mapping may have it."""
        grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP)
        if addr & (PAGE - 1) or grows == PROT_GROWSDOWN | PROT_GROWSUP or prot & ~(7 | grows | 8):
            raise Errno(errno.EINVAL)
        if length == 0:
            return
        end = addr + length + PAGE - 1 & -PAGE
        if length < 0 or addr < 0 or end > self.user_top:
            raise Errno(errno.ENOMEM)
        if grows:
            below = self.tree.find(addr)
            if below is None or grows == PROT_GROWSUP or not below.flags & VM_GROWSDOWN:
                raise Errno(errno.EINVAL)
            addr = below.start
        prot &= 7
        at, error = addr, 0
        for vma in self.tree.range(addr, end):
            if vma.start > at:
                break
            stop = min(vma.end, end)
            error = self._protect(vma, at, stop, prot | implied & vma.max_prot)
            if error:
                break
            at = stop
        if not error and at < end:
            error = errno.ENOMEM
        if at > addr:
            self._merge(addr, at)
            self._flush()
        if error:
            raise Errno(error)

    def _protect(self, vma: Vma, start: int, end: int, prot: int) -> int:
        old = vma.prot
        if old == prot:
            return 0
        if prot & ~vma.max_prot:
            return errno.EACCES
        gains_write = prot & PROT_WRITE and not old & PROT_WRITE
        if (
            gains_write
            and not vma.flags & (VM_SHARED | VM_GROWSDOWN)
            and self.data_pages + (end - start >> 12) > self.rlimit_data >> 12
        ):
            return errno.ENOMEM
        if start > vma.start or end < vma.end:
            try:
                vma = self._isolate(vma, start, end)
            except Errno as error:
                return error.errno
        pages = end - start >> 12
        self._account(vma, -pages)
        vma.prot = prot
        self._account(vma, pages)
        if vma.flags & VM_SHARED and gains_write:
            self._zap(start, end)  # the backing must know that its pages are to be written
            self._flush()
        else:
            self.mmu.protect_raw(start, end - start, prot, not vma.flags & VM_SHARED)
            if old & ~prot:
                self._forget(start, end)
        if prot and (not old or gains_write):
            try:
                if vma.backing is None and end - start <= self.populate_bytes:
                    self._fill(vma, start, end)
                elif vma.backing is None and vma.flags & VM_STACK:
                    self._fill(vma, max(start, end - _STACK_TOP_FILL), end)
                elif vma.flags & VM_SHARED and end - start <= self.populate_bytes:
                    self._fill(vma, start, end)
            except Errno as error:
                if error.errno != errno.ENOMEM:
                    raise
        return 0

    # -- mremap

    def mremap(self, old: int, old_length: int, new_length: int, flags: int, new: int = 0) -> int:
        """mremap(2): resizes in place, or moves the pages; returns the address."""
        if (
            old & (PAGE - 1)
            or flags & ~7
            or new_length <= 0
            or old < 0
            or old_length < 0
            or flags & MREMAP_FIXED
            and not flags & MREMAP_MAYMOVE
            or flags & MREMAP_DONTUNMAP
            and (not flags & MREMAP_MAYMOVE or old_length != new_length)
        ):
            raise Errno(errno.EINVAL)
        if new_length > self.user_top or old_length > self.user_top:
            raise Errno(errno.EINVAL if flags & MREMAP_FIXED else errno.ENOMEM)
        old_length = old_length + PAGE - 1 & -PAGE
        new_length = new_length + PAGE - 1 & -PAGE
        vma = self.tree.find(old)
        if flags & MREMAP_FIXED:
            if (
                new & (PAGE - 1)
                or new < 0
                or new + new_length > self.user_top
                or new < old + old_length
                and old < new + new_length
            ):
                raise Errno(errno.EINVAL)
            if new < self.mmap_min:
                raise Errno(errno.EPERM)
        if vma is None:
            raise Errno(errno.EFAULT)
        if not old_length:
            if not vma.flags & VM_SHARED:
                raise Errno(errno.EINVAL)  # Linux duplicates only shared mappings this way
        elif old + old_length > vma.end:
            if new_length < old_length and not flags & MREMAP_FIXED and self.tree.covered(old, old + old_length):
                self.munmap(old + new_length, old_length - new_length)
                return old
            raise Errno(errno.EFAULT)
        if flags & MREMAP_DONTUNMAP and (vma.flags & VM_SHARED or vma.backing is not None):
            raise Errno(errno.EINVAL)
        if old_length and not flags & (MREMAP_FIXED | MREMAP_DONTUNMAP):
            if new_length <= old_length:
                if new_length < old_length:
                    self.munmap(old + new_length, old_length - new_length)
                return old
        grown = new_length - old_length >> 12
        added = (new_length >> 12) if flags & MREMAP_DONTUNMAP else max(grown, 0)
        self._check_limits(vma, added, 0)
        if len(self.tree) + 3 > MAX_MAP_COUNT:
            raise Errno(errno.ENOMEM)
        if not flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) and old_length and old + old_length == vma.end:
            end = old + new_length
            if end <= self.user_top and self.tree.free(vma.end, end):
                return self._extend(vma, end, old)
        if not flags & MREMAP_MAYMOVE:
            raise Errno(errno.ENOMEM)
        offset = vma.offset + old - vma.start
        if flags & MREMAP_FIXED:
            self._remove(new, new + new_length)
            self._flush()
            if new_length < old_length:
                self.munmap(old + new_length, old_length - new_length)
                old_length = new_length
            vma = self.tree.find(old)
            if vma is None:
                raise Errno(errno.EFAULT)
        else:
            new = self._place(new if flags & MREMAP_DONTUNMAP else 0, new_length, MAP_ANONYMOUS, vma.backing, offset)
        return self._move(vma, old, old_length, new, new_length, bool(flags & MREMAP_DONTUNMAP))

    def _extend(self, vma: Vma, end: int, old: int) -> int:
        start = vma.end
        self.tree.set_end(vma, end)
        self._account(vma, end - start >> 12)
        if (
            vma.prot
            and (end - start <= self.populate_bytes or vma.flags & VM_LOCKED)
            and not (vma.backing is not None and vma.prot & PROT_WRITE and not vma.flags & VM_SHARED)
        ):
            self._fill_quietly(vma, start, end)
        self._merge(start, end)
        return old

    def _fill_quietly(self, vma: Vma, start: int, end: int) -> None:
        try:
            self._fill(vma, start, end)
        except Errno as error:
            if error.errno != errno.ENOMEM:
                raise

    def _move(self, vma: Vma, old: int, old_length: int, new: int, new_length: int, keep: bool) -> int:
        """Moves the pages of [old, old + old_length) to `new`; old_length 0 duplicates a shared mapping; `keep` leaves
        an empty VMA."""
        target = vma.copy()
        target.start, target.end = new, new + new_length
        if vma.backing is not None:
            target.offset = vma.offset + old - vma.start
        target.flags &= ~(VM_GROWSDOWN | VM_LAZY)
        self._hold(target.backing)
        self._add(target)
        if old_length:
            moved = self.mmu.unmap_raw(old, old_length)
            self._forget(old, old + old_length)
            for va, entry, pages in moved:
                self.mmu.map_raw(new + va - old, entry & GPA, pages << 12, entry & ~GPA & ~0x80)
            if not keep:
                self._remove(old, old + old_length)
            self._flush()
        if (
            target.prot
            and new_length > old_length
            and (new_length - old_length <= self.populate_bytes or target.flags & VM_LOCKED)
        ):
            self._fill_quietly(target, new + old_length, new + new_length)
        self._merge(new, new + new_length)
        return new

    # -- brk

    def start_heap(self, start: int) -> None:
        """Begins the heap at `start` (exec)."""
        self.start_brk = self.brk_end = start

    def set_brk(self, addr: int) -> int:
        """brk(2) as the system call: the new end, or the old one when it cannot be."""
        old = self.brk_end
        if addr < self.start_brk or not self.start_brk or addr > self.user_top:
            return old
        low, high = old + PAGE - 1 & -PAGE, addr + PAGE - 1 & -PAGE
        if high < low:
            self._remove(high, low)
            self._flush()
        elif high > low:
            heap = Vma(low, high, 3, VM_LOCKED if self.lock_future else 0, label=b"[heap]")
            above = self.tree.above(low)
            room = self.user_top if above is None else above.start - (256 * PAGE if above.flags & VM_GROWSDOWN else 0)
            if high > room or high > self.user_top:
                return old
            try:
                self._check_limits(heap, high - low >> 12, 0)
            except Errno:
                return old
            last = self.tree.find(low - 1)
            if last is not None and last.end == low and last.joins(heap):
                self.tree.set_end(last, high)
                self._account(last, high - low >> 12)
                heap = last
            else:
                self._add(heap)
            if high - low <= self.populate_bytes or self.lock_future:
                self._fill_quietly(heap, low, high)
        self.brk_end = addr
        return addr

    brk = set_brk
