"""FrameAllocator: runs, reference counts, the limit, zeroing, growing and giving back."""

from __future__ import annotations

import errno
import random

import pytest
from mm_fakes import HUGE, PAGE, FakeMemory

from kvmsentry.errors import BrokenInvariant, Errno
from kvmsentry.mm.frames import FrameAllocator, find_run


def make(limit: int = 1 << 16, ram: int = 256 << 20, grow: int = HUGE) -> tuple[FakeMemory, FrameAllocator]:
    memory = FakeMemory(ram)
    return memory, FrameAllocator(memory, limit, grow)


@pytest.mark.parametrize(
    "mask,pages,index", [(0, 1, -1), (0b1, 1, 0), (0b1011, 2, 0), (0b11101, 3, 2), (0b1101, 3, -1)]
)
def test_find_run(mask: int, pages: int, index: int) -> None:
    assert find_run(mask, pages) == index


def test_last_freed_is_first_used() -> None:
    _memory, frames = make()
    a, b = frames.alloc(), frames.alloc()
    assert a != b
    frames.free(a)
    frames.free(b)
    assert frames.alloc() == b
    assert frames.alloc() == a


def test_single_frames_and_runs_are_zeroed_and_distinct() -> None:
    memory, frames = make()
    rng = random.Random(1)
    live: dict[int, int] = {}
    for _ in range(600):
        if live and rng.random() < 0.45:
            gpa = rng.choice(list(live))
            frames.free(gpa, live.pop(gpa))
        else:
            pages = rng.choice([1, 1, 2, 3, 16, 100, 512, 700])
            gpa = frames.alloc(pages)
            assert memory.view[gpa : gpa + pages * PAGE].tobytes() == bytes(pages * PAGE)
            memory.view[gpa] = memory.view[gpa + pages * PAGE - 1] = 0xFF
            assert pages < 512 or gpa % HUGE == 0
            live[gpa] = pages
        assert frames.used_pages == sum(live.values())
        if sum(live.values()) > 20000:
            for gpa, pages in live.items():
                frames.free(gpa, pages)
            live.clear()
    taken = sorted((gpa, gpa + pages * PAGE) for gpa, pages in live.items())
    assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:], strict=False))
    for gpa, pages in live.items():
        frames.free(gpa, pages)
    assert frames.used_pages == 0


def test_freed_frames_coalesce_to_a_whole_block() -> None:
    memory, frames = make(limit=512)
    singles = [frames.alloc() for _ in range(512)]
    random.Random(2).shuffle(singles)
    for gpa in singles:
        frames.free(gpa)
    assert frames.alloc(512) % HUGE == 0
    assert memory.granted == 2 * HUGE, "one block was enough"


def test_limit_is_exact() -> None:
    _memory, frames = make(limit=40)
    held = [frames.alloc() for _ in range(40)]
    for pages in (1, 2):
        with pytest.raises(Errno) as caught:
            frames.alloc(pages)
        assert caught.value.errno == errno.ENOMEM
    frames.free(held.pop())
    frames.free(held.pop())
    with pytest.raises(Errno):
        frames.alloc_runs(3)
    assert frames.used_pages == 38
    assert sum(count for _gpa, count in frames.alloc_runs(2)) == 2


def test_runs_in_pieces_where_no_single_run_is_left() -> None:
    _memory, frames = make(limit=512, ram=2 * HUGE)
    singles = sorted(frames.alloc() for _ in range(512))
    for gpa in singles[::2]:
        frames.free(gpa)
    runs = frames.alloc_runs(256)
    assert sum(count for _gpa, count in runs) == 256
    assert sorted(gpa for gpa, _count in runs) == singles[::2]


def test_two_mib_pieces_come_first_and_aligned() -> None:
    _memory, frames = make()
    frames.alloc(3)
    runs = frames.alloc_runs(1200)
    assert [count for _gpa, count in runs[:2]] == [512, 512]
    assert all(gpa % HUGE == 0 for gpa, count in runs if count == 512)


def test_references() -> None:
    _memory, frames = make()
    run = frames.alloc(8)
    frames.ref(run, 8)
    frames.ref(run + PAGE, 1)
    assert not frames.sole(run, 1)
    frames.free(run, 8)
    assert frames.used_pages == 8
    frames.free(run, 8)
    assert frames.used_pages == 1, "one frame had a third reference"
    assert frames.sole(run + PAGE, 1)
    frames.free(run + PAGE)
    assert frames.used_pages == 0
    for pages in (1, 8):
        with pytest.raises(BrokenInvariant):
            frames.free(run, pages)
        with pytest.raises(BrokenInvariant):
            frames.ref(run, pages)


def test_host_that_refuses_is_out_of_memory_and_the_reason_is_kept() -> None:
    memory, frames = make()
    memory.refuse = True
    with pytest.raises(Errno) as caught:
        frames.alloc()
    assert caught.value.errno == errno.ENOMEM
    assert "grow guest RAM" in str(frames.refused)


def test_trim_gives_free_blocks_back_and_they_read_as_zero() -> None:
    memory, frames = make()
    run = frames.alloc(1024, zero=False)
    memory.view[run : run + 4] = b"left"
    frames.free(run, 1024)
    assert frames.trim() == 1024
    assert (run, HUGE) in memory.released
    again = frames.alloc(512)
    assert memory.view[again : again + 4].tobytes() == bytes(4)


def test_is_ram_knows_windows() -> None:
    memory, frames = make()
    gpa = frames.alloc()
    assert frames.is_ram(gpa)
    assert not frames.is_ram(0)
    assert not frames.is_ram(memory.map_bytes(b"x"))
