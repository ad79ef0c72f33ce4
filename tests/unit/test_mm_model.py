"""Address spaces against a model: a dictionary of pages. The processor is played by a walk of the real tables with a
translation cache that keeps entries, as shadow paging does, until an invalidation names their table: a missing flush
shows as a wrong byte."""

from __future__ import annotations

import errno
import signal
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mm_fakes import HUGE, PAGE, FakeFile, World

from kvmsentry.errors import Errno
from kvmsentry.mm.pagetables import NX, PS, WHOLE, P, W
from kvmsentry.mm.space import AddressSpace
from kvmsentry.mm.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE

BASE = 0x10_0000_0000 - 24 * PAGE  # the arena straddles a 2 MiB and a 1 GiB border
SMALL = 48  # pages of the arena that operations like to meet in
HUGE_AT = BASE + 24 * PAGE + HUGE  # a second arena, of three 2 MiB units
HOT = [BASE + n * PAGE for n in (0, 1, 3, 24)] + [HUGE_AT + PAGE]  # met again and again
PROTS = st.sampled_from([0, 1, 3, 3, 3, 5, 7])


class Cell:
    """A page's first 8 bytes; shared between spaces for shared mappings. None: past the end of the file."""

    def __init__(self, data: bytes | None) -> None:
        self.data = data


class ModelPage:
    def __init__(self, cell: Cell, prot: int, shared: bool, origin: tuple[Any, int] | None) -> None:
        self.cell, self.prot, self.shared, self.origin = cell, prot, shared, origin


class Processor:
    """The application's accesses in one space."""

    def __init__(self, world: World, space: AddressSpace) -> None:
        self.world, self.space = world, space
        self.cache: dict[int, tuple[int, list[int]]] = {}  # page -> (entry, the places it was found through)

    def walk(self, va: int) -> tuple[int, list[int]]:
        table = self.space.mmu.cr3
        through = []
        for shift in (39, 30, 21, 12):
            slot = (table >> 3) + (va >> shift & 511)
            through += [slot << 3, table + WHOLE]
            entry = self.world.memory.words[slot]
            if not entry & P:
                return 0, []
            if shift == 12:
                return entry, through
            if entry & PS:
                return entry + (va & HUGE - 1 & ~0xFFF), through
            table = entry & 0xFFFFFFFFFF000
        raise AssertionError

    def access(self, va: int, write: bool, fetch: bool = False) -> int | tuple[int, int]:
        """GPA, or the signal."""
        need = P | W if write else P
        for _ in range(4):
            entry, _through = self.cache.get(va, (0, []))
            if entry & need != need or fetch and entry & NX:
                entry, through = self.walk(va)
                if entry:
                    self.cache[va] = entry, through
            if entry & need == need and not (fetch and entry & NX):
                return entry & 0xFFFFFFFFFF000
            code = 4 | (2 if write else 0) | (16 if fetch else 0) | (entry & P)
            result = self.space.handle_fault(va, code)
            if result != 0:
                return result
        raise AssertionError(f"the fault at {va:#x} comes again and again")


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(ram_limit=256 << 20)
        self.world.platform.invalidate = self.invalidate  # type: ignore[method-assign]
        self.spaces: list[tuple[AddressSpace, dict[int, ModelPage], Processor]] = []
        private, shared = bytes(range(256)) * 16 * 40, b"S" * PAGE * 6 + b"tail"
        self.private = FakeFile(self.world.memory, private[: 33 * PAGE + 100])
        self.private_data = private[: 33 * PAGE + 100]
        self.shared = FakeFile(self.world.memory, shared, self.world.frames)
        self.shared_cells = [Cell(shared[at : at + 8].ljust(8, b"\0")) for at in range(0, len(shared), PAGE)]
        self.start = self.world.census()
        self.serial = 0

    def invalidate(self, mmu: Any, places: list[int]) -> None:
        gone = set(places)
        for space, _pages, processor in self.spaces:
            if space.mmu is mmu:
                processor.cache = {va: have for va, have in processor.cache.items() if gone.isdisjoint(have[1])}

    def add(self, space: AddressSpace, pages: dict[int, ModelPage]) -> None:
        space.populate_bytes = 8 * PAGE
        space.private_copy_bytes = 4 * PAGE
        space.fault_bytes = space.cow_bytes = 4 * PAGE
        self.spaces.append((space, pages, Processor(self.world, space)))

    @initialize()
    def begin(self) -> None:
        self.add(self.world.space(), {})

    def pick(self, which: int) -> tuple[AddressSpace, dict[int, ModelPage], Processor]:
        return self.spaces[which % len(self.spaces)]

    @rule(
        which=st.integers(0, 3),
        page=st.one_of(st.sampled_from([0, 0, 20]), st.integers(0, SMALL - 1)),
        count=st.integers(1, 20),
        prot=PROTS,
        kind=st.sampled_from(["anon", "anon", "shm", "private", "shared"]),
        offset=st.integers(0, 36),
    )
    def mmap(self, which: int, page: int, count: int, prot: int, kind: str, offset: int) -> None:
        space, pages, _ = self.pick(which)
        va = BASE + page * PAGE
        length = count * PAGE - 5
        flags = MAP_FIXED | (MAP_SHARED if kind in ("shm", "shared") else MAP_PRIVATE)
        if kind in ("anon", "shm"):
            assert space.mmap(va, length, prot, flags | MAP_ANONYMOUS) == va
        else:
            offset = offset % 8 if kind == "shared" else offset
            assert space.mmap(va, length, prot, flags, getattr(self, kind), offset * PAGE) == va
        self.serial += 1
        for index in range(count):
            at = offset + index
            if kind == "anon":
                page_ = ModelPage(Cell(bytes(8)), prot, False, None)
            elif kind == "shm":
                page_ = ModelPage(Cell(bytes(8)), prot, True, (self.serial, index))
            elif kind == "shared":
                cell = self.shared_cells[at] if at < len(self.shared_cells) else Cell(None)
                page_ = ModelPage(cell, prot, True, ("shared", at))
            else:
                data = self.private_data[at * PAGE : at * PAGE + 8]
                page_ = ModelPage(
                    Cell(data if at * PAGE < len(self.private_data) else None), prot, False, ("private", at)
                )
            pages[va + index * PAGE] = page_

    @rule(which=st.integers(0, 3), unit=st.integers(0, 2), count=st.integers(1, 3), prot=PROTS)
    def mmap_huge(self, which: int, unit: int, count: int, prot: int) -> None:
        space, pages, _ = self.pick(which)
        va = HUGE_AT + unit * HUGE
        space.mmap(va, count * HUGE, prot, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS)
        for at in range(va, va + count * HUGE, PAGE):
            pages[at] = ModelPage(Cell(bytes(8)), prot, False, None)

    where = st.one_of(
        st.tuples(st.integers(0, SMALL + 19).map(lambda n: BASE + n * PAGE), st.integers(1, 24)),
        st.tuples(
            st.sampled_from([0, 1, 511, 512, 700, 1024]).map(lambda n: HUGE_AT + n * PAGE),
            st.sampled_from([1, 3, 512, 600, 1024]),
        ),
    )

    @rule(which=st.integers(0, 3), where=where)
    def munmap(self, which: int, where: tuple[int, int]) -> None:
        space, pages, _ = self.pick(which)
        va, count = where
        space.munmap(va, count * PAGE)
        for at in range(va, va + count * PAGE, PAGE):
            pages.pop(at, None)

    @rule(which=st.integers(0, 3), where=where, prot=PROTS)
    def mprotect(self, which: int, where: tuple[int, int], prot: int) -> None:
        space, pages, _ = self.pick(which)
        va, count = where
        for at in (va, va + (count - 1) * PAGE):
            self.write(which, at, False, self.fresh())
        hole = False
        try:
            space.mprotect(va, count * PAGE, prot)
        except Errno as error:
            assert error.errno == errno.ENOMEM
            hole = True
        for at in range(va, va + count * PAGE, PAGE):
            if at not in pages:
                assert hole
                return
            pages[at].prot = prot
        assert not hole
        for at in (va, va + (count - 1) * PAGE):
            self.execute(which, at)
            self.write(which, at, True, self.fresh())
            self.write(which, at, False, self.fresh())

    @rule(which=st.integers(0, 3), where=where)
    def dontneed(self, which: int, where: tuple[int, int]) -> None:
        space, pages, _ = self.pick(which)
        va, count = where
        span = range(va, va + count * PAGE, PAGE)
        try:
            space.madvise(va, count * PAGE, 4)
        except Errno as error:
            assert error.errno == errno.ENOMEM and any(at not in pages for at in span)
        for at in span:
            page = pages.get(at)
            if page is not None and not page.shared and page.cell.data is not None:
                if page.origin is None:
                    page.cell.data = bytes(8)
                else:
                    page.cell.data = self.private_data[page.origin[1] * PAGE : page.origin[1] * PAGE + 8]

    @rule(
        which=st.integers(0, 3),
        where=where,
        to_page=st.one_of(st.sampled_from([0, 0, 20]), st.integers(0, SMALL - 1)),
        grow=st.integers(-3, 6),
    )
    def mremap(self, which: int, where: tuple[int, int], to_page: int, grow: int) -> None:
        space, pages, _ = self.pick(which)
        va, count = where
        to = BASE + to_page * PAGE
        have = [pages.get(va + index * PAGE) for index in range(count)]
        first = have[0]
        if first is not None and first.origin is not None:
            grow = min(grow, 0)
        new_count = max(1, count + grow)
        same = first is not None and all(
            page is not None
            and page.prot == first.prot
            and page.shared == first.shared
            and (
                page.origin is None
                if first.origin is None
                else page.origin is not None and page.origin == (first.origin[0], first.origin[1] + index)
            )
            for index, page in enumerate(have)
        )
        overlap = to < va + count * PAGE and va < to + new_count * PAGE
        try:
            got = space.mremap(va, count * PAGE, new_count * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to)
        except Errno as error:
            assert error.errno == (errno.EINVAL if overlap else errno.EFAULT)
            assert overlap or not same
            return
        assert got == to and same and not overlap
        for index in range(new_count):
            pages.pop(to + index * PAGE, None)
        for index in range(count):
            page = pages.pop(va + index * PAGE)
            if index < new_count:
                pages[to + index * PAGE] = page
        assert first is not None
        for index in range(count, new_count):
            pages[to + index * PAGE] = ModelPage(Cell(bytes(8)), first.prot, False, None)

    @precondition(lambda self: len(self.spaces) < 4)
    @rule(which=st.integers(0, 3), budget=st.sampled_from([0, 0, 12, 600]), warm=st.booleans())
    def fork(self, which: int, budget: int, warm: bool) -> None:
        space, pages, _ = self.pick(which)
        space.fork_copy_bytes = budget * PAGE
        if warm:
            for at in HOT:
                self.write(which, at, False, self.fresh())
        child = {
            at: ModelPage(page.cell if page.shared else Cell(page.cell.data), page.prot, page.shared, page.origin)
            for at, page in pages.items()
        }
        self.add(space.fork(), child)
        if warm:
            for at in HOT:  # both processors now hold what copy-on-write is about to replace
                self.read(which, at, False)
                self.read(len(self.spaces) - 1, at, False)
            for at in HOT:
                self.write(len(self.spaces) - 1, at, budget == 0, self.fresh())
                self.write(which, at, False, self.fresh())

    def fresh(self) -> bytes:
        self.serial += 1
        return self.serial.to_bytes(8, "little")

    @precondition(lambda self: len(self.spaces) > 1)
    @rule(which=st.integers(0, 3))
    def exit(self, which: int) -> None:
        space = self.pick(which)[0]
        del self.spaces[which % len(self.spaces)]
        space.destroy()

    touch = st.one_of(
        st.sampled_from(HOT),
        st.integers(0, SMALL + 19).map(lambda n: BASE + n * PAGE),
        st.sampled_from([0, 1, 3, 511, 512, 700, 1023, 1024, 1535]).map(lambda n: HUGE_AT + n * PAGE),
    )

    @rule(which=st.integers(0, 3), at=touch, by_kernel=st.booleans(), value=st.binary(min_size=8, max_size=8))
    def write(self, which: int, at: int, by_kernel: bool, value: bytes) -> None:
        space, pages, processor = self.pick(which)
        page = pages.get(at)
        fine = page is not None and page.prot & 2 and page.cell.data is not None
        if by_kernel:
            try:
                space.write(at, value)
                assert fine
            except Errno as error:
                assert error.errno == errno.EFAULT and not fine
        else:
            result = processor.access(at, True)
            if isinstance(result, tuple):
                assert not fine
                self.check_signal(page, 2, result)
            else:
                assert fine
                self.world.memory.view[result : result + 8] = value
        if fine:
            assert page is not None
            page.cell.data = value
        # Whoever may hold an old translation of the page looks again: the kernel, the processor, the other spaces.
        for who in self.spaces:
            self.check(who, at, not by_kernel)
            self.check(who, at, by_kernel)

    def check_signal(self, page: ModelPage | None, need: int, result: tuple[int, int]) -> None:
        if page is None:
            assert result == (signal.SIGSEGV, 1)
        elif not page.prot & need:
            assert result == (signal.SIGSEGV, 2)
        else:
            assert result == (signal.SIGBUS, 2)

    @rule(which=st.integers(0, 3), at=touch)
    def execute(self, which: int, at: int) -> None:
        _space, pages, processor = self.pick(which)
        page = pages.get(at)
        result = processor.access(at, False, fetch=True)
        if isinstance(result, tuple):
            assert page is None or not page.prot & 4 or page.cell.data is None
            self.check_signal(page, 4, result)
        else:
            assert page is not None and page.prot & 4

    @rule(which=st.integers(0, 3), at=touch, by_kernel=st.booleans())
    def read(self, which: int, at: int, by_kernel: bool) -> None:
        self.check(self.pick(which), at, by_kernel)

    def check(self, who: tuple[AddressSpace, dict[int, ModelPage], Processor], at: int, by_kernel: bool) -> None:
        space, pages, processor = who
        page = pages.get(at)
        fine = page is not None and page.prot & 7 and page.cell.data is not None
        if by_kernel:
            try:
                data = space.read(at, 8)
            except Errno as error:
                assert error.errno == errno.EFAULT and not fine
                return
        else:
            result = processor.access(at, False)
            if isinstance(result, tuple):
                assert not fine
                self.check_signal(page, 7, result)
                return
            data = self.world.memory.view[result : result + 8].tobytes()
        assert fine and page is not None and data == page.cell.data, (hex(at), data, page and page.cell.data)

    @rule(which=st.integers(0, 3))
    def read_all(self, which: int) -> None:
        who = self.pick(which)
        for at in range(BASE, BASE + (SMALL + 20) * PAGE, PAGE):
            self.check(who, at, bool(at >> 12 & 1))

    @invariant()
    def books(self) -> None:
        for space, pages, _ in self.spaces:
            vmas = list(space.maps())
            assert sum(vma.length for vma in vmas) == len(pages) * PAGE == space.total_pages * PAGE
            for vma, following in zip(vmas, vmas[1:], strict=False):
                assert vma.end <= following.start
                assert not vma.joins(following), "neighbours that say the same are one"
            data = sum(vma.length for vma in vmas if vma.prot & 2 and not vma.shared)
            assert space.data_pages * PAGE == data
            assert space.rss_pages == sum(space.vma_rss(vma)[0] for vma in vmas)
            assert not space._pending and not space._drops

    def teardown(self) -> None:
        for space, _pages, _processor in self.spaces:
            space.destroy()
        if hasattr(self, "start"):
            assert self.world.census() == self.start, "frames leaked"
            assert self.private.holds == self.shared.holds == 0


Machine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = Machine.TestCase
