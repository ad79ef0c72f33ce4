"""The vDSO: an image mapped into every process that reads the clocks from the time-stamp counter, and the page of
parameters before it which this module keeps true (guest_stub/vdso.c has the layout and the arithmetic).

    ns(t) = base + (t - tsc) * multiplier >> 32,    believed while t - tsc <= valid

A time namespace (timens.py) has a page of its own, which differs in what its clocks are ahead.

There is no timer: who asks after `valid` has passed comes here by the system call, and finds new parameters the next
time. The first ones hold for 10 ms, because the multiplier comes from the counter's nominal rate; each later one from
the rate seen since the last, which is the steadier the longer that was. Time never goes back: where the old line has
run ahead of the host's clock, the new one begins where the old one ended and is a little flatter.
"""

from __future__ import annotations

import struct
import time
import weakref
from typing import TYPE_CHECKING, Any

from kvmsentry.mm.shared import SharedMemory
from kvmsentry.syscall.abi_time import CLOCK_BOOTTIME, CLOCK_MONOTONIC

if TYPE_CHECKING:
    from kvmsentry.kernel.timens import TimeNamespace

PAGE = 4096
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 2, 0x10, 0x20
VVAR = struct.Struct("<QQQQQQ")  # struct vvar from `tsc` on
SEQUENCE = struct.Struct("<II")
VALID_FIRST, VALID_MOST = 10_000_000, 1_000_000_000  # ns
MEASURED = 5_000_000  # ns
GROWTH = 8  # how much longer each set of parameters is believed than the last
STEEPEST = 1 << 22  # a slope may be off the rate seen by a 1,000th (of 2**32), to meet the clock again


class Parameters(SharedMemory):
    """A page of parameters."""


class Vdso:
    """One a sandbox; `ticks` reads the counter that the guest's RDTSC reads, `khz` is its nominal rate, 0 when nobody
    told: then applications come by the system call until MEASURED ns have shown it."""

    def __init__(self, kernel: Any, image: bytes, ticks: Any, khz: int) -> None:
        self.kernel, self.ticks = kernel, ticks
        self.size = (len(image) + PAGE - 1) & -PAGE
        self.vvar = Parameters(kernel.frames, PAGE, b"[vvar]")
        self.namespaces: weakref.WeakSet[TimeNamespace] = weakref.WeakSet()  # those with a page of their own
        self.image = SharedMemory(kernel.frames, self.size, b"[vdso]")
        view = kernel.memory.view
        for memory in (self.vvar, self.image):
            memory.hold()  # ours, for good
        at = 0
        for gpa, length in self.image.map_pages(0, self.size, False):
            part = image[at : at + length]
            view[gpa : gpa + len(part)] = part
            at += length
        gpa = self.vvar.map_pages(0, PAGE, True)[0][0]
        self.page = view[gpa : gpa + PAGE]
        self.sequence = self.wall = 0
        self.multiplier = self.slope = (1_000_000 << 32) // khz if khz else 0
        self.valid_ns = VALID_FIRST
        self.tsc, self.base = self._sample()
        self.seen = self.tsc, self.base  # the last true pair
        if khz:
            self._publish()

    def map(self, mm: Any, space: TimeNamespace) -> int:
        """Map the parameters of a time namespace and the image into an address space; returns AT_SYSINFO_EHDR.
        Errno(ENOMEM)."""
        address: int = mm.mmap(0, PAGE + self.size, 0, MAP_PRIVATE | MAP_ANONYMOUS)
        mm.mmap(address, PAGE, 1, MAP_PRIVATE | MAP_FIXED, self._parameters(space), 0, max_prot=1)
        mm.mmap(address + PAGE, self.size, 5, MAP_PRIVATE | MAP_FIXED, self.image, 0)
        return address + PAGE

    def join(self, mm: Any, space: TimeNamespace) -> None:
        """An address space has come into another time namespace (vdso_join_timens in arch/x86/entry/vdso/vma.c)."""
        mm.swap_backing(Parameters, self._parameters(space))

    def _parameters(self, space: TimeNamespace) -> Parameters:
        """The page of a namespace. Only VMAs hold it: it goes with the last, and fills itself when it is back."""
        if space is self.kernel.ns.time:
            return self.vvar
        if space.vvar is None:
            space.vvar = _Shifted(self, space)
            self.namespaces.add(space)
        page: Parameters = space.vvar
        return page

    def publish(self, space: TimeNamespace) -> None:
        """Bring the page of a namespace up to date, if it has one."""
        gpa = space.vvar.pages.get(0) if space.vvar is not None else None
        if gpa is None or not self.wall or not space.frozen:
            return
        monotonic, boottime = space.offsets[CLOCK_MONOTONIC], space.offsets[CLOCK_BOOTTIME]
        page = self.kernel.memory.view[gpa : gpa + PAGE]
        self._write(page, self.base + monotonic, self.wall, self.base + boottime)

    def stale(self) -> bool:
        """Do applications come by the system call because the parameters are too old?"""
        return not self.slope or (self.ticks() - self.tsc) * self.slope >> 32 > self.valid_ns

    def update(self) -> int:
        """New parameters; returns now, in ns of kernel.now(), not before anything that the old ones have said."""
        tsc, now = self._sample()
        elapsed = tsc - self.seen[0]
        if not self.slope:
            if now - self.seen[1] < MEASURED:
                return now
            self.tsc, self.base = tsc, now
        if elapsed > 0 and now > self.seen[1]:
            self.multiplier = ((now - self.seen[1]) << 32) // elapsed
        said = self.base + ((tsc - self.tsc) * self.slope >> 32)
        self.seen = tsc, now
        self.valid_ns = min(max(self.valid_ns * GROWTH, VALID_FIRST), VALID_MOST)
        ahead = max(said - now, 0)
        horizon = (self.valid_ns << 32) // self.multiplier
        self.slope = max(self.multiplier - (ahead << 32) // horizon, self.multiplier - STEEPEST)
        self.tsc, self.base = tsc, max(said, now)
        self._publish()
        return self.base

    def _sample(self) -> tuple[int, int]:
        """(counter, kernel.now()) of one moment: the tightest of a few readings."""
        ticks, now = self.ticks, self.kernel.now
        best = 1 << 62
        found = 0, 0
        for _ in range(5):
            before = ticks()
            ns = now()
            after = ticks()
            if after - before < best:
                best = after - before
                found = (before + after) // 2, ns
        return found

    def _publish(self) -> None:
        """Stores are seen in order on x86: odd, the parameters, even."""
        self.wall = self.base + time.time_ns() - self.kernel.now()
        self._write(self.page, self.base, self.wall, self.base)
        for space in self.namespaces:
            self.publish(space)

    def _write(self, page: memoryview, monotonic: int, wall: int, boottime: int) -> None:
        valid = (self.valid_ns << 32) // self.slope
        sequence = self.sequence = self.sequence + 2 & 0xFFFFFFFF
        SEQUENCE.pack_into(page, 0, sequence - 1 & 0xFFFFFFFF, 1)
        VVAR.pack_into(page, 8, self.tsc, valid, self.slope, monotonic, wall, boottime)
        SEQUENCE.pack_into(page, 0, sequence, 1)


class _Shifted(Parameters):
    """The page of a time namespace: zeros, which nobody believes, until it is published."""

    def __init__(self, vdso: Vdso, space: TimeNamespace) -> None:
        super().__init__(vdso.kernel.frames, PAGE, b"[vvar]")
        self.vdso, self.space = vdso, weakref.ref(space)

    def map_pages(self, offset: int, length: int, writable_shared: bool) -> list[tuple[int, int]]:
        """As SharedMemory's; a page that is made is filled."""
        made = not self.pages
        runs = super().map_pages(offset, length, writable_shared)
        space = self.space()
        if made and space is not None:
            self.vdso.publish(space)
        return runs


def counter_is_steady() -> bool:
    """Does the host itself keep time by the counter? Else its rate may change, and the vDSO must not be used."""
    try:
        with open("/sys/devices/system/clocksource/clocksource0/current_clocksource", encoding="ascii") as file:
            return file.read().strip() in ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page")
    except OSError:
        return False
