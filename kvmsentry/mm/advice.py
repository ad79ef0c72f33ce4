"""madvise, mincore, msync, mlock: advice and bookkeeping about what is mapped already."""

from __future__ import annotations

import errno

from kvmsentry.errors import Errno
from kvmsentry.mm import vma as abi
from kvmsentry.mm.mappings import Mappings
from kvmsentry.mm.pagetables import ASKED, GPA, OWNED, PAGE, PS, P, W
from kvmsentry.mm.vma import VM_LOCKED, VM_SHARED, Vma

_ZERO_IN_PLACE = (
    64 << 10
)  # MADV_DONTNEED of so many bytes present zeroes them: cheaper than an invalidation and new faults
_ZERO_PAGE = bytes(PAGE)
_FREE_MIN = 2 << 20  # MADV_FREE of less keeps the pages, which the man page allows
_SET = {
    abi.MADV_DONTFORK: abi.VM_DONTFORK,
    abi.MADV_WIPEONFORK: abi.VM_WIPEONFORK,
    abi.MADV_HUGEPAGE: abi.VM_HUGEPAGE,
    abi.MADV_NOHUGEPAGE: abi.VM_NOHUGEPAGE,
    abi.MADV_DONTDUMP: abi.VM_DONTDUMP,
}
_CLEAR = {
    abi.MADV_DOFORK: abi.VM_DONTFORK,
    abi.MADV_KEEPONFORK: abi.VM_WIPEONFORK,
    abi.MADV_HUGEPAGE: abi.VM_NOHUGEPAGE,
    abi.MADV_NOHUGEPAGE: abi.VM_HUGEPAGE,
    abi.MADV_DODUMP: abi.VM_DONTDUMP,
}
_NOTHING = frozenset(
    {
        abi.MADV_NORMAL,
        abi.MADV_RANDOM,
        abi.MADV_SEQUENTIAL,
        abi.MADV_MERGEABLE,
        abi.MADV_UNMERGEABLE,
        abi.MADV_COLD,
        abi.MADV_PAGEOUT,
        abi.MADV_COLLAPSE,
    }
)
_KNOWN = frozenset(
    {
        *_SET,
        *_CLEAR,
        *_NOTHING,
        abi.MADV_WILLNEED,
        abi.MADV_DONTNEED,
        abi.MADV_FREE,
        abi.MADV_REMOVE,
        abi.MADV_POPULATE_READ,
        abi.MADV_POPULATE_WRITE,
        abi.MADV_DONTNEED_LOCKED,
    }
)


class Advice(Mappings):
    """The calls that change no address."""

    def madvise(self, addr: int, length: int, advice: int) -> None:
        """madvise(2). A hole in the range is ENOMEM, after the rest was done, as on Linux."""
        if addr & (PAGE - 1) or advice not in _KNOWN or length < 0:
            raise Errno(errno.EINVAL)
        end = addr + length + PAGE - 1 & -PAGE
        if addr < 0 or end > 1 << 63:
            raise Errno(errno.EINVAL)
        if end == addr or advice in _NOTHING and self.tree.covered(addr, end):
            return
        hole = not self.tree.covered(addr, end)
        for vma in self.tree.range(addr, end):
            self._advise(vma, max(addr, vma.start), min(end, vma.end), advice)
        if advice in _SET or advice in _CLEAR:
            self._merge(addr, end)
        self._flush()
        if hole:
            raise Errno(errno.ENOMEM)

    def _advise(self, vma: Vma, start: int, end: int, advice: int) -> None:
        if advice in (abi.MADV_DONTNEED, abi.MADV_FREE, abi.MADV_DONTNEED_LOCKED):
            if vma.flags & VM_LOCKED and advice != abi.MADV_DONTNEED_LOCKED:
                raise Errno(errno.EINVAL)
            if advice == abi.MADV_FREE:
                if vma.backing is not None or vma.flags & VM_SHARED:
                    raise Errno(errno.EINVAL)
                if end - start < _FREE_MIN:
                    return
            self._dont_need(vma, start, end)
        elif advice in _SET or advice in _CLEAR:
            if advice == abi.MADV_WIPEONFORK and (vma.backing is not None or vma.flags & VM_SHARED):
                raise Errno(errno.EINVAL)
            flags = vma.flags & ~_CLEAR.get(advice, 0) | _SET.get(advice, 0)
            if flags != vma.flags:
                self._isolate(vma, start, end).flags = flags
        elif advice == abi.MADV_WILLNEED:
            if vma.prot and vma.backing is not None and end - start <= self.file_populate_bytes:
                self._fill_quietly(vma, start, end)
        elif advice in (abi.MADV_POPULATE_READ, abi.MADV_POPULATE_WRITE):
            self._populate(vma, start, end, advice == abi.MADV_POPULATE_WRITE)
        elif advice == abi.MADV_REMOVE:
            if vma.flags & VM_LOCKED or vma.backing is None:
                raise Errno(errno.EINVAL)
            if not vma.flags & VM_SHARED or not vma.max_prot & abi.PROT_WRITE:
                raise Errno(errno.EACCES)
            punch = getattr(vma.backing, "punch", None)
            if punch is None:
                raise Errno(errno.EOPNOTSUPP)
            self._zap(start, end)
            self._flush()
            punch(vma.offset + start - vma.start, end - start)

    def _dont_need(self, vma: Vma, start: int, end: int) -> None:
        runs = list(self.mmu.runs(start, end - start))
        if not runs:
            return
        if vma.backing is None and sum(pages for _va, _entry, pages in runs) << 12 <= _ZERO_IN_PLACE:
            sole = self.frames.sole
            want = OWNED | P | W
            if all(entry & (want | ASKED) == want and sole(entry & GPA, pages) for _va, entry, pages in runs):
                for _va, entry, pages in runs:
                    self.memory.zero(entry & GPA, pages << 12)
                return
        self._zap(start, end)

    def _populate(self, vma: Vma, start: int, end: int, write: bool) -> None:
        """MADV_POPULATE_*: every page as if it had been touched; EFAULT past the end of a file, EINVAL/ENOMEM as the
        man page."""
        if not vma.prot & (abi.PROT_WRITE if write else 7):
            raise Errno(errno.EINVAL)
        self._fill(vma, start, end)
        need = P | W if write else P
        for page in range(start, end, PAGE):
            if self.mmu.entry(page) & need != need and not self._fault_in(page, write):
                raise Errno(errno.EFAULT)
        self._asked_for(start, end)

    def mincore(self, addr: int, length: int) -> bytes:
        """mincore(2): a byte a page, 1 where a page is present. Errno(EINVAL) unaligned, Errno(ENOMEM) on a hole.

        Memory without a file is filled before it is touched, and nothing tells which pages the processor has touched
        since: Accessed is preset in every entry, because setting it would cost a fault a page. What has something in it
        was touched; of the rest only what was asked for counts (ASKED), and pages that were but read, or written with
        zeros, pass for untouched."""
        if addr & (PAGE - 1):
            raise Errno(errno.EINVAL)
        end = addr + length + PAGE - 1 & -PAGE
        if addr < 0 or length < 0 or end > self.user_top or not self.tree.covered(addr, end):
            raise Errno(errno.ENOMEM)
        out = bytearray(end - addr >> 12)
        view, is_ram = self._view, self.frames.is_ram
        for vma in self.tree.range(addr, end):
            low, high = max(vma.start, addr), min(vma.end, end)
            ahead = vma.backing is None or vma.flags & VM_SHARED
            for va, entry, pages in self.mmu.runs(low, high - low):
                first, gpa = va - addr >> 12, entry & GPA
                if not ahead or entry & ASKED or (entry & PS and vma.backing is None) or not is_ram(gpa):
                    out[first : first + pages] = b"\x01" * pages
                    continue
                for number in range(pages):
                    if view[gpa + (number << 12) : gpa + (number + 1 << 12)].tobytes() != _ZERO_PAGE:
                        out[first + number] = 1
        return bytes(out)

    def msync(self, addr: int, length: int, flags: int) -> None:
        """msync(2): asks the backings of shared mappings to sync. Errno(EINVAL, EBUSY, ENOMEM)."""
        if (
            addr & (PAGE - 1)
            or flags & ~(abi.MS_ASYNC | abi.MS_SYNC | abi.MS_INVALIDATE)
            or flags & (abi.MS_ASYNC | abi.MS_SYNC) == abi.MS_ASYNC | abi.MS_SYNC
        ):
            raise Errno(errno.EINVAL)
        end = addr + length + PAGE - 1 & -PAGE
        if addr < 0 or length < 0 or end > self.user_top:
            raise Errno(errno.ENOMEM)
        for vma in self.tree.range(addr, end):
            if flags & abi.MS_INVALIDATE and vma.flags & VM_LOCKED:
                raise Errno(errno.EBUSY)
            if not flags & abi.MS_SYNC or not vma.flags & VM_SHARED:
                continue
            sync, written = getattr(vma.backing, "sync", None), getattr(vma.backing, "written", None)
            if sync is not None:
                low = max(addr, vma.start)
                sync(vma.offset + low - vma.start, min(end, vma.end) - low)
            elif written is not None and vma.prot & abi.PROT_WRITE:
                written()
        if not self.tree.covered(addr, end):
            raise Errno(errno.ENOMEM)

    def mlock(self, addr: int, length: int, on_fault: bool = False) -> None:
        """mlock2(2). Nothing is ever swapped, so this counts against RLIMIT_MEMLOCK and fills. Errno(ENOMEM, EPERM)."""
        start, end = addr & -PAGE, addr + length + PAGE - 1 & -PAGE
        if end < start or addr < 0:
            raise Errno(errno.EINVAL)
        if not self.rlimit_memlock:
            raise Errno(errno.EPERM)
        if end > self.user_top:
            raise Errno(errno.ENOMEM)
        new = sum(
            min(vma.end, end) - max(vma.start, start) >> 12
            for vma in self.tree.range(start, end)
            if not vma.flags & VM_LOCKED
        )
        if self.locked_pages + new > self.rlimit_memlock >> 12:
            raise Errno(errno.ENOMEM)
        self._set_lock(start, end, True, not on_fault)

    def munlock(self, addr: int, length: int) -> None:
        """munlock(2). Errno(ENOMEM) on a hole."""
        start, end = addr & -PAGE, addr + length + PAGE - 1 & -PAGE
        if end < start or addr < 0:
            raise Errno(errno.EINVAL)
        self._set_lock(start, end, False, False)

    def mlockall(self, flags: int) -> None:
        """mlockall(2), MCL_ bits. Errno(EINVAL, ENOMEM, EPERM)."""
        if not flags & 3 or flags & ~7:
            raise Errno(errno.EINVAL)
        if not self.rlimit_memlock:
            raise Errno(errno.EPERM)
        if flags & abi.MCL_CURRENT:
            if self.total_pages > self.rlimit_memlock >> 12:
                raise Errno(errno.ENOMEM)
            self._set_lock(0, self.user_top, True, not flags & abi.MCL_ONFAULT, holes=True)
        self.lock_future = bool(flags & abi.MCL_FUTURE)

    def munlockall(self) -> None:
        self.lock_future = False
        self._set_lock(0, self.user_top, False, False, holes=True)

    def _set_lock(self, start: int, end: int, lock: bool, fill: bool, holes: bool = False) -> None:
        hole = not holes and not self.tree.covered(start, end)
        for vma in self.tree.range(start, end):
            low, high = max(start, vma.start), min(end, vma.end)
            if bool(vma.flags & VM_LOCKED) != lock:
                vma = self._isolate(vma, low, high)
                self._account(vma, low - high >> 12)
                vma.flags ^= VM_LOCKED
                self._account(vma, high - low >> 12)
            if fill and vma.prot and not vma.flags & abi.VM_NORESERVE:
                self._fill_quietly(vma, low, high)
                self._asked_for(low, high)
        self._merge(start, end)
        if hole:
            raise Errno(errno.ENOMEM)
