"""PageTables: entries as the SDM has them, what is recorded for invalidation, and when a table page may be used
again."""

from __future__ import annotations

import pytest
from mm_fakes import HUGE, PAGE, World

from kvmsentry.mm.pagetables import NX, PS, WHOLE, A, D, P, PageTables, U, W, runs_of


@pytest.fixture
def world() -> World:
    return World()


def walk(world: World, mmu: PageTables, va: int) -> int:
    """What the processor finds: the leaf entry by the four levels (SDM vol. 3, 4.5), 0 when one is not present."""
    table = mmu.cr3
    for shift in (39, 30, 21, 12):
        entry = world.memory.words[(table >> 3) + (va >> shift & 511)]
        if not entry & P:
            return 0
        if shift == 12 or entry & PS:
            return entry
        assert entry & (W | U) == W | U
        table = entry & 0xFFFFFFFFFF000
    raise AssertionError


def test_kernel_half_is_shared(world: World) -> None:
    mmu = world.mmu()
    assert world.memory.words[(mmu.cr3 >> 3) + 511] == 0x1234003


def test_entries_carry_accessed_and_dirty(world: World) -> None:
    mmu = world.mmu()
    mmu.map(0x400000 - PAGE, 0x7000, PAGE, 3)
    assert walk(world, mmu, 0x400000 - PAGE) == 0x7000 | P | W | U | A | D | NX
    mmu.map(0x5000, 0x8000, PAGE, 5)
    assert walk(world, mmu, 0x5000) == 0x8000 | P | U | A | D
    mmu.flush()
    assert world.platform.calls == [], "entries that appear need no invalidation"


def test_runs_across_tables_and_huge_entries(world: World) -> None:
    mmu = world.mmu()
    va, gpa = 0x7F00_0000_0000 - 5 * PAGE, 6 * HUGE - 5 * PAGE
    mmu.map(va, gpa, HUGE + 12 * PAGE, 3)
    for offset in range(0, HUGE + 12 * PAGE, PAGE):
        entry = walk(world, mmu, va + offset)
        base = entry & 0xFFFFFFFFFF000
        if entry & PS:
            assert base == 6 * HUGE
            base += va + offset & HUGE - 1
        assert base == gpa + offset
        assert mmu.lookup(va + offset) & 0xFFFFFFFFFF000 == gpa + offset
    assert walk(world, mmu, va + 5 * PAGE) & PS
    assert walk(world, mmu, va + HUGE + 12 * PAGE) == 0
    assert walk(world, mmu, va - PAGE) == 0


def test_removals_are_recorded_by_place_and_flushed_once(world: World) -> None:
    mmu = world.mmu()
    mmu.map(0x10000, 0x100000, 4 * PAGE, 3)
    mmu.map(8 * HUGE, 4 * HUGE, HUGE, 3)
    mmu.unmap(0x11000, PAGE)
    mmu.unmap(0x12000, PAGE)
    mmu.unmap(8 * HUGE, HUGE)
    assert walk(world, mmu, 0x11000) == 0
    pml4 = world.memory.words
    pdpt = pml4[mmu.cr3 >> 3] & ~0xFFF
    pd = pml4[pdpt >> 3] & ~0xFFF
    pt = pml4[pd >> 3] & ~0xFFF
    mmu.flush()
    assert [sorted(call) for call in world.platform.calls] == [sorted([pd + 8 * 8, pt + 0x11 * 8, pt + 0x12 * 8])]
    mmu.flush()
    assert len(world.platform.calls) == 1


def test_many_removals_in_one_table_name_it_as_a_whole(world: World) -> None:
    mmu = world.mmu()
    mmu.map(0x10000, 0x100000, 64 * PAGE, 3)
    pt = mmu._pts[0] << 3
    mmu.unmap(0x10000, 40 * PAGE)
    mmu.flush()
    for page in range(40, 62, 2):
        mmu.unmap(0x10000 + page * PAGE, PAGE)
        mmu.protect(0x11000 + page * PAGE, PAGE, 1)
    mmu.flush()
    mmu.map(0x10000, 0x100000, PAGE, 0)
    mmu.unmap(0x10000, PAGE)
    assert not mmu.pending, "PROT_NONE was never seen by a processor"
    assert world.platform.calls == [[pt + WHOLE], [pt + WHOLE]]


def test_widening_is_not_recorded_narrowing_is(world: World) -> None:
    mmu = world.mmu()
    mmu.map(0x10000, 0x100000, 4 * PAGE, 1)
    mmu.protect(0x10000, 4 * PAGE, 7)
    assert not mmu.pending
    mmu.protect(0x11000, PAGE, 5)
    assert mmu.pending
    mmu.flush()
    mmu.protect(0x10000, PAGE, 0)
    assert mmu.pending
    assert walk(world, mmu, 0x10000) == 0
    assert mmu.lookup(0x10000) & 0xFFFFFFFFFF000 == 0x100000, "the page is still ours under PROT_NONE"
    mmu.protect(0x10000, PAGE, 1)
    assert walk(world, mmu, 0x10000) == 0x100000 | P | U | A | D | NX


def test_splitting_a_huge_entry(world: World) -> None:
    mmu = world.mmu()
    mmu.map(2 * HUGE, 8 * HUGE, HUGE, 3)
    mmu.unmap(2 * HUGE + 7 * PAGE, PAGE)
    assert walk(world, mmu, 2 * HUGE + 6 * PAGE) == 8 * HUGE + 6 * PAGE | P | W | U | A | D | NX
    assert walk(world, mmu, 2 * HUGE + 7 * PAGE) == 0
    pdpt = world.memory.words[mmu.cr3 >> 3] & ~0xFFF
    pd = world.memory.words[pdpt >> 3] & ~0xFFF
    mmu.flush()
    assert pd + 2 * 8 in world.platform.calls[0], "the 2 MiB entry was in the directory"


def test_huge_entry_over_an_old_table(world: World) -> None:
    mmu = world.mmu()
    mmu.map(2 * HUGE, 0x5000, PAGE, 3)
    mmu.unmap(2 * HUGE, PAGE)
    mmu.map(2 * HUGE, 8 * HUGE, HUGE, 3)
    assert walk(world, mmu, 2 * HUGE) & PS
    assert mmu.pending
    mmu.flush()
    assert len(world.frames.table_pool.dirty) == 1


def test_a_table_page_is_touched_before_it_is_a_table_again(world: World) -> None:
    untouched: set[int] = set()  # freed as tables, not in an invalidation since
    seen = 0
    alive = world.mmu()
    for _ in range(400):
        mmu = world.mmu()
        mmu.map(0x10000, 0x100000, PAGE, 3)
        for call in world.platform.calls[seen:]:
            untouched -= {place - WHOLE for place in call}
        seen = len(world.platform.calls)
        used = {mmu.cr3} | {at << 3 for books in (mmu._pts, mmu._pds, mmu._pdpts) for at in books.values()}
        assert not used & untouched
        mmu.destroy()
        untouched |= used
    assert len(world.platform.calls) >= 20
    assert world.frames.used_pages == world.frames.table_pool.held < 150, "dirty tables are reused, not piled up"
    alive.destroy()
    last = world.mmu()
    world.frames.table_pool.drain(last)
    assert world.frames.used_pages == 1


def test_sparse_ranges_cost_only_what_is_there(world: World) -> None:
    mmu = world.mmu()
    mmu.map(100 << 30, 0x5000, PAGE, 1)
    mmu.map((300 << 30) + 17 * HUGE, 4 * HUGE, HUGE, 1)
    assert [(va, pages) for va, _entry, pages in mmu.runs(0, 1 << 46)] == [
        (100 << 30, 1),
        ((300 << 30) + 17 * HUGE, 512),
    ]
    removed = mmu.unmap_raw(0, 1 << 46)
    assert [(va, pages) for va, _entry, pages in removed] == [(100 << 30, 1), ((300 << 30) + 17 * HUGE, 512)]
    assert list(mmu.runs(0, 1 << 46)) == []


@pytest.mark.parametrize(
    "table,runs",
    [
        ([0, 0], []),
        ([0x1007, 0x2007, 0x3007], [(0, 0x1007, 3)]),
        ([0x1007, 0, 0x2007], [(0, 0x1007, 1), (2, 0x2007, 1)]),
        ([0, 0x1007, 0x2005, 0x3005], [(1, 0x1007, 1), (2, 0x2005, 2)]),
    ],
)
def test_runs_of(table: list[int], runs: list[tuple[int, int, int]]) -> None:
    assert runs_of(table) == runs
