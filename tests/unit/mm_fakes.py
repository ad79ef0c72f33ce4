"""Guest memory without a guest: GuestMemory over an anonymous mapping, a Platform that notes invalidations, a file to
map."""

from __future__ import annotations

import ctypes
import errno
import mmap

from kvmsentry.errors import Errno, HostError
from kvmsentry.mm.frames import FrameAllocator
from kvmsentry.mm.pagetables import PageTables
from kvmsentry.mm.space import AddressSpace

PAGE, HUGE = 4096, 2 << 20


class FakeMemory:
    """The interface of vcpu.memory.GuestMemory; RAM from `ram` on, file windows from `window` on (copies of what is
    mapped)."""

    def __init__(self, ram_limit: int = 512 << 20, window_bytes: int = 64 << 20) -> None:
        self.ram_limit = ram_limit
        self.window = ram_limit
        self.window_end = ram_limit + window_bytes
        self._map = mmap.mmap(-1, self.window_end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        self.view = memoryview(self._map)
        self.words = self.view.cast("Q")
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.granted = HUGE  # GPA 0 to 2 MiB stays ours, as on the real machine
        self.released: list[tuple[int, int]] = []
        self.lost: set[int] = set()  # window pages whose file has shrunk
        self.refuse = False
        self.copies = 0

    def grow(self, length: int) -> tuple[int, int]:
        assert length % HUGE == 0
        if self.refuse or self.granted + length > self.ram_limit:
            raise HostError("grow guest RAM", errno.ENOMEM)
        gpa = self.granted
        self.granted += length
        return gpa, length

    def map_bytes(self, data: bytes, offset: int = 0) -> int:
        """A file window that shows `data`; its GPA agrees with `offset` mod 2 MiB when it is large."""
        length = -(-len(data) // PAGE) * PAGE
        gpa = self.window
        if length >= HUGE:
            gpa += (offset - gpa) % HUGE
        self.window = gpa + length
        assert self.window <= self.window_end
        self.view[gpa : gpa + len(data)] = data
        return gpa

    def zero(self, gpa: int, length: int) -> None:
        ctypes.memset(self.base + gpa, 0, length)

    def copy(self, dst: int, src: int, length: int) -> None:
        assert max(dst, src) + length <= self.ram_limit, "plain copy of a file window"
        self.copies += 1
        ctypes.memmove(self.base + dst, self.base + src, length)

    def safe_read(self, gpa: int, length: int) -> bytes:
        if any(page in self.lost for page in range(gpa >> 12, (gpa + length - 1 >> 12) + 1)):
            raise Errno(errno.EFAULT)
        return bytes(self.view[gpa : gpa + length])

    def safe_write(self, gpa: int, data) -> None:
        if any(page in self.lost for page in range(gpa >> 12, (gpa + len(data) - 1 >> 12) + 1)):
            raise Errno(errno.EFAULT)
        self.view[gpa : gpa + len(data)] = data

    def release(self, gpa: int, length: int) -> None:
        self.released.append((gpa, length))
        self.zero(gpa, length)


class FakePlatform:
    """Notes invalidations; `kernel` is what every top-level table shares."""

    def __init__(self) -> None:
        self.kernel = {511: 0x1234003}
        self.calls: list[list[int]] = []

    def kernel_pml4_entries(self) -> dict[int, int]:
        return self.kernel

    def invalidate(self, mmu, places: list[int]) -> None:
        assert mmu.cr3 and places and len(set(places)) == len(places)
        self.calls.append(places)


class FakeFile:
    """A Backing whose pages are in a file window, or in RAM with `ram` (as tmpfs)."""

    dev, ino = 8, 42

    def __init__(self, memory: FakeMemory, data: bytes, frames: FrameAllocator | None = None) -> None:
        self.memory, self.size = memory, len(data)
        self.holds = 0
        if frames is None:
            self.gpa = memory.map_bytes(data)
        else:
            self.gpa = frames.alloc(-(-len(data) // PAGE))
            memory.view[self.gpa : self.gpa + len(data)] = data

    def map_pages(self, offset: int, length: int, writable_shared: bool) -> list[tuple[int, int]]:
        length = min(length, self.size - offset)
        return [(self.gpa + offset, length)] if length > 0 else []

    def name(self) -> bytes:
        return b"/bin/thing"

    def hold(self) -> None:
        self.holds += 1

    def drop(self) -> None:
        self.holds -= 1
        assert self.holds >= 0


class World:
    """Memory, frames, platform and a way to make address spaces; `census` is what must come back after destroy()."""

    def __init__(self, ram_limit: int = 512 << 20, limit_pages: int = 1 << 20, grow_bytes: int = 8 << 20) -> None:
        self.memory = FakeMemory(ram_limit)
        self.platform = FakePlatform()
        self.frames = FrameAllocator(self.memory, limit_pages, grow_bytes)

    def mmu(self) -> PageTables:
        return PageTables(self.platform, self.frames)

    def space(self) -> AddressSpace:
        return AddressSpace(self.mmu, self.frames)

    def census(self) -> int:
        """Frames in use, those for tables not counted (the pool keeps them)."""
        return (
            self.frames.used_pages - self.frames.table_pool.held if self.frames.table_pool else self.frames.used_pages
        )
