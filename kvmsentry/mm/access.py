"""User memory as the kernel reads and writes it: memoryviews of guest RAM behind a walk of VMAs and tables.

A bad pointer is Errno(EFAULT), never an exception of Python's. Pages that are not there yet are brought in as the
processor would (lazy fill, copy-on-write, stack growth). Two dictionaries keep translations of RAM pages; whatever
narrows an entry drops them. Pages of a file window may lose their file at any time: they are never cached and go
through memory.safe_read and safe_write.
"""

from __future__ import annotations

import errno
import signal
import struct
from collections.abc import Hashable
from typing import Any

from kvmsentry.errors import Errno, OutOfMemory
from kvmsentry.mm.pages import PF_PRESENT, PF_USER, PF_WRITE, Pages
from kvmsentry.mm.pagetables import GPA, HUGE_MASK, PAGE, P, W
from kvmsentry.mm.vma import VM_SHARED

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_CACHE_LIMIT = 65536
_FILE_PAGES = 64  # pages of files that are kept
_SMALL = 64 << 10  # buffers up to this are looked up page by page in what is remembered


class UserAccess(Pages):
    """Reading and writing an address space from the kernel. `va` is whatever the application gave: any integer."""

    def _fault_in(self, va: int, write: bool) -> bool:
        refused = self.handle_fault(va, PF_USER | (PF_WRITE | PF_PRESENT if write else 0))
        if refused == 0:
            entry = self.mmu.entry(va)
            return bool(entry & P and (entry & W or not write))
        if refused[0] == signal.SIGKILL:
            raise OutOfMemory
        return False

    def _walk(self, va: int, n: int, write: bool) -> tuple[list[tuple[int, int]], int]:
        """((gpa, length) runs, bytes covered) from `va` on, ending early at the first byte that cannot be had."""
        if va < 0 or n <= 0:
            return [], 0
        end = min(va + n, self.user_top)
        need = P | W if write else P
        mmu = self.mmu
        runs: list[tuple[int, int]] = []
        start = want = 0  # the run being built, whole pages: [start, want)
        at = va & -PAGE
        tried = -1
        while at < end:
            table = mmu.table(at, end + PAGE - 1 & -PAGE)
            good = 0  # pages that can be had
            if table is None:
                entry = mmu.entry(at)
                if entry & need == need:
                    good = min(end + PAGE - 1 & -PAGE, (at | HUGE_MASK) + 1) - at >> 12
                    gpa = entry & GPA
                    if gpa != want:
                        if want != start:
                            runs.append((start, want - start))
                        start = want = gpa
                    want += good << 12
                bad = not good
            else:
                first = table[0]
                count = len(table)
                if count > 8 and first & need == need and table == list(range(first, first + (count << 12), PAGE)):
                    gpa = first & GPA
                    if gpa != want:
                        if want != start:
                            runs.append((start, want - start))
                        start = want = gpa
                    want += count << 12
                    good = count
                else:
                    for entry in table:
                        if entry & need != need:
                            break
                        gpa = entry & GPA
                        if gpa != want:
                            if want != start:
                                runs.append((start, want - start))
                            start = gpa
                            want = gpa + PAGE
                        else:
                            want += PAGE
                        good += 1
                bad = good < count
            at += good << 12
            if bad:
                # What was walked before stays as it is: a fault replaces only entries that are absent or, for a write,
                # without W.
                if at == tried or not self._fault_in(at, write):
                    break
                tried = at
        if want != start:
            runs.append((start, want - start))
        if not runs:
            return [], 0
        # From whole pages to the bytes asked for.
        if at > end:
            gpa, length = runs[-1]
            runs[-1] = gpa, length - (at - end)
            at = end
        offset = va & 0xFFF
        if offset:
            gpa, length = runs[0]
            runs[0] = gpa + offset, length - offset
        return runs, at - va

    def _walk_all(self, va: int, n: int, write: bool) -> list[tuple[int, int]]:
        runs, got = self._walk(va, n, write)
        if got != n:
            raise Errno(errno.EFAULT)
        if n and (va & 0xFFF) + n <= PAGE:
            self._remember(va >> 12, runs, write)
        return runs

    def _remember(self, page: int, runs: list[tuple[int, int]], write: bool) -> None:
        """The pages of `runs`, the first being `page`, may be accessed without a walk until _forget(); RAM only."""
        rd, wr, is_ram = self._rd, self._wr, self.frames.is_ram
        if len(rd) > _CACHE_LIMIT:
            rd.clear()
            wr.clear()
        for gpa, length in runs:
            for at in range(gpa & -PAGE, gpa + length, PAGE):
                if is_ram(at):
                    rd[page] = at
                    if write:
                        wr[page] = at
                page += 1

    def read(self, va: int, n: int) -> bytes:
        """`n` bytes at `va`. Errno(EFAULT) when any cannot be read. The caller has bounded `n`."""
        offset = va & 0xFFF
        if offset + n <= 4096:
            gpa = self._rd.get(va >> 12)
            if gpa is not None:
                gpa += offset
                return self._view[gpa : gpa + n].tobytes()
            page = self._ro.get(va >> 12)
            if page is not None:
                return page[offset : offset + n]
        runs = self._walk_all(va, n, False)
        view, is_ram = self._view, self.frames.is_ram
        if len(runs) == 1 and offset + n <= 4096 and not is_ram(runs[0][0]):
            page = self._keep_page(va, runs[0][0])
            return page[offset : offset + n]
        parts = [
            view[gpa : gpa + length] if is_ram(gpa) else self.memory.safe_read(gpa, length)
            for gpa, length in self._by_kind(runs)
        ]
        return b"".join(parts)

    def _keep_page(self, va: int, gpa: int) -> bytes:
        """The page of a file window around `va`, `gpa` being its address there; kept for the next time when nobody
        changes the file: constants of programs are read again and again, and each safe_read() is a call to the host."""
        page = self.memory.safe_read(gpa & -PAGE, PAGE)
        vma = self.tree.find(va)
        if vma is not None and not vma.flags & VM_SHARED and getattr(vma.backing, "stable", False):
            if len(self._ro) >= _FILE_PAGES:
                self._ro.clear()
            self._ro[va >> 12] = page
        return page

    def write(self, va: int, data: Any) -> None:
        """Stores `data` (bytes-like, contiguous) at `va`. Errno(EFAULT) when any byte cannot be stored; nothing is
        stored then."""
        n = len(data)
        offset = va & 0xFFF
        if offset + n <= 4096 and type(data) is bytes:
            gpa = self._wr.get(va >> 12)
            if gpa is not None:
                gpa += offset
                self._view[gpa : gpa + n] = data
                return
        source = memoryview(data).cast("B")
        runs = self._walk_all(va, source.nbytes, True)
        view, is_ram = self._view, self.frames.is_ram
        at = 0
        for gpa, length in self._by_kind(runs):
            if is_ram(gpa):
                view[gpa : gpa + length] = source[at : at + length]
            else:
                self.memory.safe_write(gpa, source[at : at + length])
            at += length

    def _by_kind(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Runs cut where RAM ends and a file window begins, if one should ever span both."""
        end = self.frames.ram_end
        for gpa, length in runs:
            if gpa < end < gpa + length:
                break
        else:
            return runs
        out = []
        for gpa, length in runs:
            if gpa < end < gpa + length:
                out.append((gpa, end - gpa))
                gpa, length = end, gpa + length - end
            out.append((gpa, length))
        return out

    def zero(self, va: int, n: int) -> None:
        """Stores `n` zero bytes at `va` (clear_user). Errno(EFAULT)."""
        for gpa, length in self._by_kind(self._walk_all(va, n, True)):
            if self.frames.is_ram(gpa):
                self.memory.zero(gpa, length)
            else:
                self.memory.safe_write(gpa, bytes(length))

    def read_u32(self, va: int) -> int:
        """Little-endian unsigned 32 bits; one load when aligned (futex words). Errno(EFAULT)."""
        if not va & 3:
            gpa = self._rd.get(va >> 12)
            if gpa is not None:
                return self._u32[gpa + (va & 0xFFF) >> 2]
        value: int = _U32.unpack(self.read(va, 4))[0]
        return value

    def read_u64(self, va: int) -> int:
        """Little-endian unsigned 64 bits. Errno(EFAULT)."""
        if not va & 7:
            gpa = self._rd.get(va >> 12)
            if gpa is not None:
                return self._words[gpa + (va & 0xFFF) >> 3]
        value: int = _U64.unpack(self.read(va, 8))[0]
        return value

    def write_u32(self, va: int, value: int) -> None:
        """Stores `value` mod 2**32; one store when aligned. Errno(EFAULT)."""
        if not va & 3:
            gpa = self._wr.get(va >> 12)
            if gpa is not None:
                self._u32[gpa + (va & 0xFFF) >> 2] = value & 0xFFFF_FFFF
                return
        self.write(va, _U32.pack(value & 0xFFFF_FFFF))

    def write_u64(self, va: int, value: int) -> None:
        """Stores `value` mod 2**64. Errno(EFAULT)."""
        if not va & 7:
            gpa = self._wr.get(va >> 12)
            if gpa is not None:
                self._words[gpa + (va & 0xFFF) >> 3] = value & 0xFFFF_FFFF_FFFF_FFFF
                return
        self.write(va, _U64.pack(value & 0xFFFF_FFFF_FFFF_FFFF))

    def read_struct(self, layout: struct.Struct, va: int) -> tuple[Any, ...]:
        """`layout` (a compiled struct.Struct) unpacked from `va`. Errno(EFAULT)."""
        offset = va & 0xFFF
        if offset + layout.size <= 4096:
            gpa = self._rd.get(va >> 12)
            if gpa is not None:
                return layout.unpack_from(self._view, gpa + offset)
        return layout.unpack(self.read(va, layout.size))

    def write_struct(self, layout: struct.Struct, va: int, *values: Any) -> None:
        """`values` packed to `va`. Errno(EFAULT)."""
        offset = va & 0xFFF
        if offset + layout.size <= 4096:
            gpa = self._wr.get(va >> 12)
            if gpa is not None:
                layout.pack_into(self._view, gpa + offset, *values)
                return
        self.write(va, layout.pack(*values))

    def read_cstring(self, va: int, limit: int) -> bytes:
        """The bytes before the first NUL; Errno(ENAMETOOLONG) when the string with its NUL is longer than `limit`,
        Errno(EFAULT)."""
        parts: list = []
        left = limit
        first = 256
        while left > 0:
            n = min(left, PAGE - (va & 0xFFF), first)
            first = PAGE
            part = self.read(va, n)
            end = part.find(0)
            if end >= 0:
                if not parts:
                    return part[:end]
                parts.append(part[:end])
                return b"".join(parts)
            parts.append(part)
            va += n
            left -= n
        raise Errno(errno.ENAMETOOLONG)

    def views(self, va: int, n: int, write: bool) -> list[memoryview]:
        """Views of user memory in order, contiguous ones merged; shorter in sum than `n` when a later page is bad.

        `write`: the kernel will store into them (copy-on-write is broken). Errno(EFAULT) when the first byte is bad; []
        for n = 0. They are good until this address space changes: use at once, never keep across a sleep. Pages of a
        file window: for reading they are copies; for writing (a shared file mapping) the pages are probed and then
        given as they are, so a file that another host process truncates between the probe and the store is the one case
        that is not caught.
        """
        offset = va & 0xFFF
        view = self._view
        known = self._wr if write else self._rd
        page = va >> 12
        gpa = known.get(page)
        if gpa is not None:
            start = gpa + offset
            if offset + n <= 4096:
                return [view[start : start + n]]
            if n <= _SMALL:
                out = []
                want = gpa + PAGE
                end = va + n
                for following in range(page + 1, end + 0xFFF >> 12):
                    gpa = known.get(following)
                    if gpa != want:
                        if gpa is None:
                            break
                        out.append(view[start:want])
                        start = want = gpa
                    want += PAGE
                else:
                    out.append(view[start : want - (-end & 0xFFF)])
                    return out
        elif not write and offset + n <= 4096:
            kept = self._ro.get(page)
            if kept is not None:
                return [memoryview(kept)[offset : offset + n]]
        if n == 0:
            return []
        runs, got = self._walk(va, n, write)
        if not got:
            raise Errno(errno.EFAULT)
        out = []
        ram_end = self.frames.ram_end
        if got <= _SMALL:
            self._remember(va >> 12, runs, write)
            if not write and got == n and offset + n <= 4096 and runs[0][0] >= ram_end:
                return [memoryview(self._keep_page(va, runs[0][0]))[offset : offset + n]]
        for gpa, length in self._by_kind(runs):
            if gpa < ram_end:
                out.append(view[gpa : gpa + length])
                continue
            stop = gpa + length
            try:
                if not write:
                    out.append(memoryview(self.memory.safe_read(gpa, length)))
                    continue
            except Errno:
                pass  # some page of it is lost: give what lies before
            lost = False
            while gpa < stop and not lost:
                n = min(stop, (gpa | 0xFFF) + 1) - gpa
                try:
                    data = self.memory.safe_read(gpa, 1 if write else n)
                    out.append(view[gpa : gpa + n] if write else memoryview(data))
                    gpa += n
                except Errno:
                    if not out:
                        raise
                    lost = True
            if lost:
                break
        return out

    def cmpxchg_u32(self, va: int, old: int, new: int) -> int:
        """Atomically: if the aligned word is `old`, store `new`; returns what was there. Errno(EFAULT), Errno(EINVAL)
        unaligned.

        Atomic towards guest threads when the memory offers cmpxchg_u32 (the C runner does); towards other tasks always.
        """
        if va & 3:
            raise Errno(errno.EINVAL)
        runs = self._walk_all(va, 4, True)
        gpa = runs[0][0]
        if not self.frames.is_ram(gpa):
            self.memory.safe_read(gpa, 4)
        atomic = getattr(self.memory, "cmpxchg_u32", None)
        if atomic is not None:
            found: int = atomic(gpa, old, new)
            return found
        now = self._u32[gpa >> 2]
        if now == old:
            self._u32[gpa >> 2] = new
        return now

    def futex_key(self, va: int, private: bool) -> Hashable:
        """What identifies the futex word at `va`: (space, va), or (backing, offset) in shared mappings. Errno(EFAULT)
        unmapped, and where a shared mapping has no page: behind the end of its file."""
        if private:
            if not 0 <= va < self.user_top:
                raise Errno(errno.EFAULT)
            return self.ident, va
        vma = self.tree.find(va)
        if vma is None or not vma.prot & 7:
            raise Errno(errno.EFAULT)
        if vma.flags & VM_SHARED and vma.backing is not None:
            self.read(va, 1)
            return getattr(vma.backing, "ident", None) or id(vma.backing), vma.offset + va - vma.start
        return self.ident, va

    # -- the kernel's own hand, whatever the protection says (ptrace, /proc/PID/mem)

    def read_force(self, va: int, n: int) -> bytes:
        """As read, but also where the application has no permission (FOLL_FORCE). Errno(EFAULT) where nothing is
        mapped."""
        out = []
        end = va + n
        while va < end:
            stop = min(end, (va | 0xFFF) + 1)
            gpa = self._force(va, False)
            if self.frames.is_ram(gpa):
                out.append(self._view[gpa : gpa + stop - va].tobytes())
            else:
                out.append(self.memory.safe_read(gpa, stop - va))
            va = stop
        return b"".join(out)

    def write_force(self, va: int, data: bytes) -> None:
        """As write, but also into read-only private mappings (breakpoints), which get a copy. Errno(EFAULT)."""
        at = 0
        while at < len(data):
            stop = min(at + len(data) - at, at + PAGE - (va + at & 0xFFF))
            gpa = self._force(va + at, True)
            if self.frames.is_ram(gpa):
                self._view[gpa : gpa + stop - at] = data[at:stop]
            else:
                self.memory.safe_write(gpa, data[at:stop])
            at = stop
        self._flush()

    def _force(self, va: int, write: bool) -> int:
        """GPA of `va`, whose page is brought in; for `write` into a private mapping it is ours alone."""
        vma = self.tree.find(va)
        if vma is None or not 0 <= va < self.user_top:
            raise Errno(errno.EFAULT)
        page = va & -PAGE
        if not self.mmu.entry(page):
            self._fill_around(vma, page)
        if not self.mmu.entry(page):
            raise Errno(errno.EFAULT)
        if write:
            if vma.flags & VM_SHARED:
                if not vma.prot & 2:  # no copy of its own could be made
                    raise Errno(errno.EFAULT)
            else:
                self._own(vma, page)
        entry = self.mmu.entry(page)
        return entry & GPA | va & 0xFFF
