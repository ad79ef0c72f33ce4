"""Guest-physical memory: one host reservation, so that host address = base + GPA and `view[gpa]` is guest memory.

    0 .. MACHINE_SIZE            the machine's own (layout.py)
    MACHINE_SIZE .. file_base    RAM, a memslot for every grow()
    file_base .. GPA limit       file windows, memslots of WINDOW_STEP made as they are needed

Nothing is accessible until it is granted by grow() or map_file(): the reservation is PROT_NONE.
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import BrokenInvariant, Errno, HostError

from . import layout
from ._kvm import ffi, lib

PAGE = 4096
HUGE = 2 << 20
WINDOW_STEP = 256 << 20

# How much RAM, from its start, is backed by small pages. One block in any case: tables and single pages lie there, and
# a small program needs a tenth of a huge page.
SMALL = HUGE
# In a virtual machine: free huge pages are what a guest gives back to its host (free page reporting), so that the first
# touch of one is 512 faults of the outer host, 5 ms, where small free pages are still there and cost 0.6 ms as many.
SMALL_IN_VM = 192 << 20


class Ranges:
    """Free ranges of an address space, first fit, merged when given back. Offsets and lengths in bytes."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, length: int) -> None:
        """Gives start..start+length back; BrokenInvariant if part of it is free already."""
        end = start + length
        at = bisect.bisect_left(self._starts, start)
        if (at < len(self._starts) and self._starts[at] < end) or (at and self._ends[at - 1] > start):
            raise BrokenInvariant(f"range {start:#x}+{length:#x} is free already")
        if at and self._ends[at - 1] == start:
            at -= 1
            start = self._starts[at]
            del self._starts[at], self._ends[at]
        if at < len(self._starts) and self._starts[at] == end:
            end = self._ends[at]
            del self._starts[at], self._ends[at]
        self._starts.insert(at, start)
        self._ends.insert(at, end)

    def take(self, length: int, align: int, phase: int) -> int | None:
        """A start congruent to phase modulo align with length bytes free behind it, now taken; or None."""
        for at, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            candidate = start + (phase - start) % align
            if candidate + length > end:
                continue
            del self._starts[at], self._ends[at]
            if candidate + length < end:
                self._starts.insert(at, candidate + length)
                self._ends.insert(at, end)
            if start < candidate:
                self._starts.insert(at, start)
                self._ends.insert(at, candidate)
            return candidate
        return None


class GuestMemory:
    """Guest-physical memory of a KVM machine; see the module. `set_slot(slot, gpa, length, file)` makes a memslot
    and raises HostError when KVM refuses. `in_vm`: this host is a virtual machine itself, see SMALL_IN_VM."""

    def __init__(self, phys_bits: int = layout.GPA_BITS, in_vm: bool = False) -> None:
        self._small_end = layout.MACHINE_SIZE + (SMALL_IN_VM if in_vm else SMALL)
        bits = min(phys_bits, layout.GPA_BITS)
        base = ffi.NULL
        while bits >= 33:  # a limit on address space (ulimit -v) leaves room for less
            self.limit = 1 << bits
            base = lib.ks_reserve(self.limit)
            if base != ffi.NULL:
                break
            bits -= 1
        if base == ffi.NULL:
            raise HostError("reserving address space for the guest", errno.ENOMEM, "lift 'ulimit -v'")
        self._base = ffi.cast("char *", base)
        self.base = int(ffi.cast("uintptr_t", base))
        self.view = memoryview(ffi.buffer(self._base, self.limit)).cast("B")
        self.words = self.view.cast("Q")
        self.file_base = self.limit // 2
        self._ram_end = layout.MACHINE_SIZE
        self._file_end = self.file_base
        self._files = Ranges()
        self._slots = 1
        self._set_slot: Callable[[int, int, int, bool], None] | None = None
        rc = lib.ks_map_ram(self._base, layout.MACHINE_SIZE, 0)
        if rc < 0:
            raise HostError("mmap of guest memory", -rc)

    def attach(self, set_slot: Callable[[int, int, int, bool], None]) -> None:
        """The machine is there: memslots can be made."""
        self._set_slot = set_slot

    def _slot(self, gpa: int, length: int, file: bool) -> None:
        if self._set_slot is None:
            raise BrokenInvariant("memory grows before there is a machine")
        self._set_slot(self._slots, gpa, length, file)
        self._slots += 1

    def at(self, gpa: int) -> Any:
        """cffi pointer to a GPA, for calls of the extension."""
        return self._base + gpa

    def grow(self, length: int) -> tuple[int, int]:
        """Another RAM memslot of `length` bytes (rounded up to 2 MiB) that reads as zero; (gpa, length), both multiples
        of 2 MiB. HostError when the host or the room for RAM is at its end."""
        length = (length + HUGE - 1) & ~(HUGE - 1)
        gpa = self._ram_end
        if length <= 0 or gpa + length > self.file_base:
            raise HostError("growing guest memory", errno.ENOMEM, "the guest's RAM is at its limit")
        small = min(length, max(0, self._small_end - gpa))
        rc = lib.ks_map_ram(self._base + gpa, small, 0) if small else 0
        if rc == 0 and small < length:
            rc = lib.ks_map_ram(self._base + gpa + small, length - small, 1)
        if rc < 0:
            raise HostError("mmap of guest memory", -rc)
        self._slot(gpa, length, False)
        self._ram_end = gpa + length
        return gpa, length

    def map_file(self, fd: int, offset: int, length: int, writable: bool) -> int:
        """A window on fd's bytes offset..offset+length; returns the GPA, congruent to offset modulo 2 MiB when length
        is 2 MiB or more. Errno as mmap(2) gives it (ENODEV, EACCES, ...); ENOMEM when windows or slots are used up."""
        length = (length + PAGE - 1) & ~(PAGE - 1)
        if offset % PAGE or length <= 0:
            raise Errno(errno.EINVAL)
        align, phase = (HUGE, offset % HUGE) if length >= HUGE else (PAGE, 0)
        gpa = self._files.take(length, align, phase)
        while gpa is None:
            step = (length + HUGE + WINDOW_STEP - 1) // WINDOW_STEP * WINDOW_STEP
            if self._file_end + step > self.limit:
                raise Errno(errno.ENOMEM)
            try:
                # Slots of WINDOW_STEP: small ones keep KVM's bookkeeping small, and neighbours serve one large file.
                for at in range(self._file_end, self._file_end + step, WINDOW_STEP):
                    self._slot(at, WINDOW_STEP, True)
                    self._file_end = at + WINDOW_STEP
                    self._files.add(at, WINDOW_STEP)
            except HostError:
                raise Errno(errno.ENOMEM) from None
            gpa = self._files.take(length, align, phase)
        rc = lib.ks_map_file(self._base + gpa, length, fd, offset, writable)
        if rc < 0:
            self._files.add(gpa, length)
            raise Errno(-rc)
        return gpa

    def warm(self, gpa: int, length: int) -> bool:
        """Makes pages of a window that is not writable cheap to fault on: copies of ours that KVM maps eight at a time.
        False when the host would not (a kernel before 5.14, no memory): nothing is lost then."""
        return lib.ks_warm(self._base + gpa, length) == 0

    def unmap_file(self, gpa: int, length: int) -> None:
        """Takes a map_file() range, or part of it, away: the GPA is inaccessible until it is used again."""
        length = (length + PAGE - 1) & ~(PAGE - 1)
        rc = lib.ks_unmap(self._base + gpa, length)
        if rc < 0:
            raise HostError("taking a file window away", -rc)
        self._files.add(gpa, length)

    def zero(self, gpa: int, length: int) -> None:
        """Zeroes granted memory."""
        lib.ks_zero(self._base + gpa, length)

    def copy(self, dst: int, src: int, length: int) -> None:
        """Copies granted memory, GPA to GPA; the ranges may overlap."""
        lib.ks_copy(self._base + dst, self._base + src, length)

    def cmpxchg_u32(self, gpa: int, old: int, new: int) -> int:
        """If the word at `gpa` (aligned, granted) is `old`, store `new`; returns what it was. Atomic towards guests."""
        found: int = lib.ks_cmpxchg32(self._base + gpa, old, new)
        return found

    def safe_read(self, gpa: int, length: int) -> bytes:
        """Bytes of a file window; Errno(EFAULT) when the file has been truncated under it."""
        data = bytearray(length)
        n = lib.ks_safe_read(self._base + gpa, ffi.from_buffer(data), length)
        if n < 0 and n != -errno.EFAULT:
            raise HostError("process_vm_readv", -n)
        if n != length:
            raise Errno(errno.EFAULT)
        return bytes(data)

    def safe_write(self, gpa: int, data: Any) -> None:
        """Stores into a writable file window; Errno(EFAULT) when the file has been truncated under it."""
        buffer = ffi.from_buffer(data)
        length = len(buffer)
        n = lib.ks_safe_write(self._base + gpa, buffer, length)
        if n < 0 and n != -errno.EFAULT:
            raise HostError("process_vm_writev", -n)
        if n != length:
            raise Errno(errno.EFAULT)

    def release(self, gpa: int, length: int) -> None:
        """Gives the host's memory behind RAM back; it reads as zero afterwards."""
        rc = lib.ks_give_back(self._base + gpa, length)
        if rc < 0:
            raise HostError("madvise of guest memory", -rc)

    def close(self) -> None:
        """Ends the reservation. No view of it may be used any more; the machine is gone already."""
        self.words.release()
        self.view.release()
        lib.ks_unreserve(self._base, self.limit)
