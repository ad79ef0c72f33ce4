"""AddressSpace: the calls' errnos and layout rules, faults, copy-on-write, user access. The model test covers their
mixture."""

from __future__ import annotations

import errno
import random
import signal
import struct
from collections.abc import Iterator

import pytest
from mm_fakes import HUGE, PAGE, FakeFile, World

from kvmsentry.errors import Errno
from kvmsentry.mm import vma as abi
from kvmsentry.mm.space import AddressSpace
from kvmsentry.mm.vma import VmaTree

PRIVATE, SHARED = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS, abi.MAP_SHARED | abi.MAP_ANONYMOUS
RW = 3


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def space(world: World) -> Iterator[AddressSpace]:
    space = world.space()
    yield space
    space.destroy()
    assert world.census() == 0


def fails(number: int, call, *args, **kwargs) -> None:
    with pytest.raises(Errno) as caught:
        call(*args, **kwargs)
    assert caught.value.errno == number


def shape(space: AddressSpace) -> list[tuple[int, int, int]]:
    return [(vma.start, vma.end, vma.prot) for vma in space.maps()]


# -- mmap and munmap


def test_mmap_errnos(world: World, space: AddressSpace) -> None:
    file = FakeFile(world.memory, b"x")
    fails(errno.EINVAL, space.mmap, 0, 0, RW, PRIVATE)
    fails(errno.EINVAL, space.mmap, 0, PAGE, RW, abi.MAP_ANONYMOUS)
    fails(errno.EINVAL, space.mmap, 0, PAGE, RW, abi.MAP_PRIVATE, file, 5)
    fails(errno.EOVERFLOW, space.mmap, 0, 2 * PAGE, RW, abi.MAP_PRIVATE, file, (1 << 63) - PAGE)
    fails(errno.EACCES, space.mmap, 0, PAGE, RW, abi.MAP_SHARED, file, 0, max_prot=5)
    fails(errno.ENOMEM, space.mmap, 0, 1 << 47, RW, PRIVATE)
    fails(errno.ENOMEM, space.mmap, space.user_top - PAGE, 2 * PAGE, RW, PRIVATE | abi.MAP_FIXED)
    fails(errno.EPERM, space.mmap, 0, PAGE, RW, PRIVATE | abi.MAP_FIXED)
    fails(errno.EINVAL, space.mmap, 0x10001, PAGE, RW, PRIVATE | abi.MAP_FIXED)
    space.mmap(0x10000, PAGE, RW, PRIVATE | abi.MAP_FIXED)
    fails(errno.EEXIST, space.mmap, 0xF000 + PAGE, 2 * PAGE, RW, PRIVATE | abi.MAP_FIXED_NOREPLACE)
    assert shape(space) == [(0x10000, 0x11000, RW)]


def test_hint_is_used_when_free_and_placement_goes_down(space: AddressSpace) -> None:
    assert space.mmap(0x5000_0123, PAGE, RW, PRIVATE) == 0x5000_0000
    first = space.mmap(0x5000_0000, PAGE, RW, PRIVATE)
    assert first == space.mmap_base - PAGE
    assert space.mmap(0, PAGE, RW, PRIVATE) == first - PAGE
    assert space.mmap(0, PAGE, RW, PRIVATE | abi.MAP_32BIT) == 0x4000_0000
    big = space.mmap(0, 4 * HUGE, RW, PRIVATE)
    assert big % HUGE == 0


def test_neighbours_merge_and_holes_split(space: AddressSpace) -> None:
    at = space.mmap(0x40_0000, 10 * PAGE, RW, PRIVATE | abi.MAP_FIXED)
    space.mmap(at + 10 * PAGE, 2 * PAGE, RW, PRIVATE | abi.MAP_FIXED)
    assert shape(space) == [(at, at + 12 * PAGE, RW)]
    space.munmap(at + 3 * PAGE, PAGE)
    assert shape(space) == [(at, at + 3 * PAGE, RW), (at + 4 * PAGE, at + 12 * PAGE, RW)]
    fails(errno.EINVAL, space.munmap, at + 1, PAGE)
    fails(errno.EINVAL, space.munmap, at, 0)
    space.munmap(at, 100 * PAGE)
    assert shape(space) == [] and space.total_pages == space.rss_pages == space.data_pages == 0


def test_removed_frames_are_free_only_after_the_flush(world: World, space: AddressSpace) -> None:
    at = space.mmap(0, 4 * PAGE, RW, PRIVATE)
    used = []
    world.platform.invalidate = lambda mmu, tables: used.append(world.census())  # type: ignore[method-assign]
    space.munmap(at, 4 * PAGE)
    assert used == [4] and world.census() == 0


def test_large_reservations_cost_nothing(world: World, space: AddressSpace) -> None:
    before = world.frames.used_pages
    space.mmap(0, 64 << 30, 0, PRIVATE | abi.MAP_NORESERVE)
    space.mmap(0, 64 << 30, RW, PRIVATE | abi.MAP_NORESERVE)
    assert world.frames.used_pages == before


def test_limits(space: AddressSpace) -> None:
    space.rlimit_as = 10 * PAGE
    at = space.mmap(0, 8 * PAGE, RW, PRIVATE)
    fails(errno.ENOMEM, space.mmap, 0, 3 * PAGE, 1, PRIVATE)
    space.mmap(at, 8 * PAGE, 1, PRIVATE | abi.MAP_FIXED)  # replaces: not more than before
    space.rlimit_as = 1 << 40
    space.rlimit_data = 2 * PAGE
    fails(errno.ENOMEM, space.mmap, 0, 3 * PAGE, RW, PRIVATE)
    fails(errno.ENOMEM, space.mprotect, at, 8 * PAGE, RW)
    space.rlimit_memlock = PAGE
    fails(errno.EAGAIN, space.mmap, 0, 2 * PAGE, 1, PRIVATE | abi.MAP_LOCKED)
    fails(errno.ENOMEM, space.mlock, at, 2 * PAGE)
    space.mlock(at, PAGE)
    assert space.locked_pages == 1
    space.munlock(at, PAGE)
    assert space.locked_pages == 0 and len(space.tree) == 1


def test_nothing_in_the_middle_of_a_mapping(space: AddressSpace) -> None:
    """Calls with a length of 0 inside a mapping change nothing, and leave no mapping without pages behind."""
    at = space.mmap(0, 3 * PAGE, RW, SHARED)
    before = shape(space)
    space.mlock(at + PAGE, 0)
    space.munlock(at + PAGE, 0)
    space.mprotect(at + PAGE, 0, 1)
    space.madvise(at + PAGE, 0, abi.MADV_DONTFORK)
    space.msync(at + PAGE, 0, abi.MS_SYNC)
    assert space.mincore(at + PAGE, 0) == b"" and shape(space) == before
    space.mlock(at + PAGE, PAGE)
    assert space.locked_pages == 1


def test_a_backing_that_refuses_leaves_nothing(world: World, space: AddressSpace) -> None:
    file = FakeFile(world.memory, b"x")

    def refuse(offset: int, length: int, writable_shared: bool) -> list[tuple[int, int]]:
        raise Errno(errno.ENODEV)

    file.map_pages = refuse  # type: ignore[method-assign]
    fails(errno.ENODEV, space.mmap, 0, PAGE, 1, abi.MAP_PRIVATE, file)
    assert shape(space) == [] and file.holds == 0


def test_memory_runs_out_in_a_mapping_and_the_rest_goes_on() -> None:
    world = World(limit_pages=40)
    space = world.space()
    at = space.mmap(0, 64 * PAGE, RW, PRIVATE)
    assert space.handle_fault(at + 63 * PAGE, 6)[0] == signal.SIGKILL
    fails(errno.ENOMEM, space.write, at + 63 * PAGE, b"x")
    space.munmap(at, 64 * PAGE)
    assert world.census() == 0
    space.destroy()


@pytest.mark.parametrize("seed", range(5))
def test_gap_search_finds_the_highest_gap(seed: int) -> None:
    """Against a scan of every page, with the shortcut in use all the time."""
    rng = random.Random(seed)
    tree, top, low = VmaTree(), 200 * PAGE, 10 * PAGE
    taken: dict[int, abi.Vma] = {}
    for _ in range(400):
        if taken and rng.random() < 0.45:
            vma = taken.pop(rng.choice(list(taken)))
            tree.remove(vma)
            continue
        length = rng.choice([1, 1, 1, 2, 3, 7]) * PAGE
        busy = {page for vma in taken.values() for page in range(vma.start, vma.end, PAGE)}
        starts = [at for at in range(low, top - length + 1, PAGE)
                  if not any(page in busy for page in range(at, at + length, PAGE))]  # fmt: skip
        try:
            got = tree.gap_below(length, low, top)
        except Errno:
            assert not starts
            continue
        assert got == max(starts)
        if rng.random() < 0.8:  # the rest is asked for, but not taken
            taken[got] = abi.Vma(got, got + length, 1, 0)
            tree.insert(taken[got])


# -- mprotect, mremap, brk


def test_mprotect(world: World, space: AddressSpace) -> None:
    at = space.mmap(0, 4 * PAGE, RW, PRIVATE)
    space.write(at, b"kept")
    fails(errno.EINVAL, space.mprotect, at + 1, PAGE, 1)
    fails(errno.ENOMEM, space.mprotect, at + 2 * PAGE, 4 * PAGE, 1)
    assert shape(space) == [(at, at + 2 * PAGE, RW), (at + 2 * PAGE, at + 4 * PAGE, 1)], "changed up to the hole"
    space.mprotect(at, PAGE, 0)
    fails(errno.EFAULT, space.read, at, 4)
    assert space.handle_fault(at, 4) == (signal.SIGSEGV, 2)
    space.mprotect(at, 4 * PAGE, RW)
    assert space.read(at, 4) == b"kept" and len(space.tree) == 1
    file = FakeFile(world.memory, b"x" * PAGE)
    shared = space.mmap(0, PAGE, 1, abi.MAP_SHARED, file, 0, max_prot=5)
    fails(errno.EACCES, space.mprotect, shared, PAGE, RW)
    space.munmap(shared, PAGE)


def test_mremap(space: AddressSpace) -> None:
    at = space.mmap(0x40_0000, 4 * PAGE, RW, PRIVATE | abi.MAP_FIXED)
    space.write(at, b"moved along")
    assert space.mremap(at, 4 * PAGE, 6 * PAGE, 0) == at
    assert space.mremap(at, 6 * PAGE, 2 * PAGE, 0) == at
    space.mmap(at + 2 * PAGE, PAGE, 1, PRIVATE | abi.MAP_FIXED)
    fails(errno.ENOMEM, space.mremap, at, 2 * PAGE, 3 * PAGE, 0)
    fails(errno.EINVAL, space.mremap, at, 2 * PAGE, 3 * PAGE, abi.MREMAP_FIXED, 0x80_0000)
    fails(errno.EFAULT, space.mremap, 0x70_0000, PAGE, 2 * PAGE, 1)
    fails(errno.EFAULT, space.mremap, at, 3 * PAGE, 4 * PAGE, 1)
    new = space.mremap(at, 2 * PAGE, 3 * PAGE, abi.MREMAP_MAYMOVE)
    assert new != at and space.read(new, 11) == b"moved along"
    fails(errno.EFAULT, space.read, at, 1)
    left = space.mremap(new, 3 * PAGE, 3 * PAGE, abi.MREMAP_MAYMOVE | abi.MREMAP_DONTUNMAP)
    assert space.read(left, 11) == b"moved along" and space.read(new, 11) == bytes(11)
    shared = space.mmap(0, PAGE, RW, SHARED)
    twin = space.mremap(shared, 0, PAGE, abi.MREMAP_MAYMOVE)
    space.write(twin, b"both")
    assert space.read(shared, 4) == b"both"


def test_brk(space: AddressSpace) -> None:
    space.start_heap(0x100_0800)
    assert space.set_brk(0) == 0x100_0800
    assert space.set_brk(0x100_3001) == 0x100_3001
    space.write(0x100_3000, b"z")
    assert [vma.name for vma in space.maps()] == [b"[heap]"]
    space.mmap(0x100_6000, PAGE, RW, PRIVATE | abi.MAP_FIXED)
    assert space.set_brk(0x100_7000) == 0x100_3001, "something is in the way"
    assert space.set_brk(0x100_2000) == 0x100_2000
    fails(errno.EFAULT, space.read, 0x100_3000, 1)
    assert space.set_brk(0x100_5000) == 0x100_5000
    assert space.read(0x100_3000, 1) == b"\0", "memory that comes back is zero"
    space.rlimit_data = PAGE
    assert space.set_brk(0x100_6000) == 0x100_5000


# -- faults


def test_lazy_memory_comes_in_two_mib_pages(space: AddressSpace) -> None:
    at = space.mmap(0, 4 * HUGE, RW, PRIVATE)
    assert space.rss_pages == 0
    assert space.handle_fault(at + HUGE + 5, 6) == 0
    assert space.rss_pages == 512 and space.mmu.entry(at + HUGE) & 0x80
    stack = space.mmap(0, 4 * HUGE, RW, PRIVATE | abi.MAP_STACK)
    before = space.rss_pages
    assert space.handle_fault(stack + HUGE, 6) == 0
    assert space.rss_pages - before == space.fault_bytes // PAGE


def test_stack_grows_to_its_limit_and_not_into_neighbours(space: AddressSpace) -> None:
    top = 0x7000_0000_0000
    space.rlimit_stack = 1 << 20
    flags = PRIVATE | abi.MAP_FIXED | abi.MAP_GROWSDOWN
    space.mmap(top - 4 * PAGE, 4 * PAGE, RW, flags)
    assert space.handle_fault(top - 5 * PAGE, 6) == 0
    assert space.handle_fault(top - (1 << 20), 6) == 0
    assert space.handle_fault(top - (1 << 20) - 1, 6) == (signal.SIGSEGV, 1)
    space.write(top - (1 << 20), b"x")
    other = 0x6000_0000_0000
    space.mmap(other - 4 * PAGE, 4 * PAGE, RW, flags)
    space.mmap(other - 200 * PAGE, PAGE, RW, PRIVATE | abi.MAP_FIXED)
    assert space.handle_fault(other - 5 * PAGE, 6) == (signal.SIGSEGV, 1), "the guard gap"


def test_fault_verdicts(world: World, space: AddressSpace) -> None:
    file = FakeFile(world.memory, b"f" * (PAGE + 7))
    at = space.mmap(0, 3 * PAGE, 1, abi.MAP_PRIVATE, file)
    assert space.read(at + PAGE, 8) == b"fffffff\0"
    assert space.handle_fault(at + 2 * PAGE, 4) == (signal.SIGBUS, 2)
    assert space.handle_fault(at, 7) == (signal.SIGSEGV, 2)
    assert space.handle_fault(at, 0x15) == (signal.SIGSEGV, 2)
    assert space.handle_fault(0x1000, 4) == (signal.SIGSEGV, 1)
    assert space.handle_fault(1 << 63, 4) == (signal.SIGSEGV, 1)
    calls = len(world.platform.calls)
    assert space.handle_fault(at, 5) == 0 and len(world.platform.calls) == calls
    assert space.handle_fault(at, 5) == 0 and len(world.platform.calls) == calls + 1, "again: an old translation"


def test_private_copies_of_a_file(world: World, space: AddressSpace) -> None:
    data = bytes(range(256)) * 16 * 200
    file = FakeFile(world.memory, data[:-100])
    world.memory.view[file.gpa + file.size : file.gpa + file.size + 100] = b"!" * 100  # a page cache that is not clean
    for limit in (1 << 20, 0):  # copied when mapped; copied on the first write
        space.private_copy_bytes = limit
        at = space.mmap(0, 200 * PAGE, RW, abi.MAP_PRIVATE, file)
        last = at + 199 * PAGE
        space.write(last, b"mine")
        assert space.read(last, PAGE) == (b"mine" + data[-PAGE + 4 : -100] + bytes(100))
        assert space.read(at, PAGE) == data[:PAGE]
        assert world.memory.view[file.gpa + 199 * PAGE] == 0, "the file is as it was"
        space.munmap(at, 200 * PAGE)
    assert file.holds == 0


def test_a_file_that_shrinks_is_the_applications_error(world: World, space: AddressSpace) -> None:
    file = FakeFile(world.memory, b"f" * 100 * PAGE)
    space.private_copy_bytes = 0
    at = space.mmap(0, 100 * PAGE, RW, abi.MAP_PRIVATE, file)
    world.memory.lost = {(file.gpa >> 12) + 50}
    fails(errno.EFAULT, space.read, at + 50 * PAGE, 1)
    assert space.handle_fault(at + 50 * PAGE, 7) == (signal.SIGBUS, 2)
    fails(errno.EFAULT, space.write, at + 50 * PAGE, b"x")
    assert len(b"".join(space.views(at + 49 * PAGE, 2 * PAGE, False))) == PAGE


def test_zap_backing_asks_again(world: World, space: AddressSpace) -> None:
    file = FakeFile(world.memory, b"f" * 4 * PAGE)
    at = space.mmap(0, 4 * PAGE, 1, abi.MAP_SHARED, file)
    file.size = PAGE
    space.zap_backing(file, PAGE, 1 << 40)
    assert space.read(at, 1) == b"f"
    assert space.handle_fault(at + PAGE, 4) == (signal.SIGBUS, 2)


# -- fork


@pytest.mark.parametrize("budget", [0, 8 << 20])
def test_fork_keeps_both_sides_apart(world: World, budget: int) -> None:
    parent = world.space()
    parent.fork_copy_bytes = budget
    private = parent.mmap(0, 20 * PAGE, RW, PRIVATE)
    huge = parent.mmap(0, 2 * HUGE, RW, PRIVATE)
    shared = parent.mmap(0, PAGE, RW, SHARED)
    gone = parent.mmap(0, PAGE, RW, PRIVATE)
    wiped = parent.mmap(0, PAGE, RW, PRIVATE)
    for at in (private, huge, shared, gone, wiped):
        parent.write(at, b"parent")
    parent.madvise(gone, PAGE, abi.MADV_DONTFORK)
    parent.madvise(wiped, PAGE, abi.MADV_WIPEONFORK)
    calls = len(world.platform.calls)
    child = parent.fork()
    assert len(world.platform.calls) == calls + (not budget), "one flush narrows the parent, none when all is copied"
    for at in (private, huge):
        child.write(at, b"child!")
        assert parent.read(at, 6) == b"parent"
        parent.write(at + 8, b"more")
        assert child.read(at, 12) == b"child!" + bytes(6)
    child.write(shared, b"common")
    assert parent.read(shared, 6) == b"common"
    fails(errno.EFAULT, child.read, gone, 1)
    assert child.read(wiped, 6) == bytes(6)
    parent.put()
    assert child.read(private + 19 * PAGE, 1) == b"\0"
    child.write(private + PAGE, b"alone")
    child.put()
    assert world.census() == 0


def test_fork_without_memory_leaves_the_parent_whole() -> None:
    world = World(limit_pages=60)
    space = world.space()
    at = space.mmap(0, 40 * PAGE, RW, PRIVATE)
    space.write(at, b"here")
    fails(errno.ENOMEM, space.fork)
    assert space.read(at, 4) == b"here" and world.census() == 40
    space.write(at, b"more")
    space.destroy()
    assert world.census() == 0


# -- advice


def test_madvise(world: World, space: AddressSpace) -> None:
    at = space.mmap(0, 8 * PAGE, RW, PRIVATE)
    space.write(at, b"data")
    calls = len(world.platform.calls)
    space.madvise(at, 8 * PAGE, abi.MADV_DONTNEED)
    assert space.read(at, 4) == bytes(4) and len(world.platform.calls) == calls, "little memory is zeroed in place"
    fails(errno.EINVAL, space.madvise, at + 1, PAGE, 4)
    fails(errno.EINVAL, space.madvise, at, PAGE, 77)
    fails(errno.ENOMEM, space.madvise, at, 9 * PAGE, 4)
    space.mlock(at, PAGE)
    fails(errno.EINVAL, space.madvise, at, PAGE, abi.MADV_DONTNEED)
    big = space.mmap(0, 2 * HUGE, RW, PRIVATE | abi.MAP_POPULATE)
    space.write(big, b"data")
    before = space.rss_pages
    space.madvise(big, 2 * HUGE, abi.MADV_DONTNEED)
    assert space.rss_pages == before - 1024 and space.read(big, 4) == bytes(4)
    shared = space.mmap(0, PAGE, RW, SHARED)
    fails(errno.EINVAL, space.madvise, shared, PAGE, abi.MADV_FREE)


def test_mincore_and_msync(space: AddressSpace) -> None:
    at = space.mmap(16 * HUGE, 2 * HUGE, RW, PRIVATE | abi.MAP_STACK | abi.MAP_FIXED)
    space.munmap(at + HUGE, HUGE)
    space.write(at, b"x")
    present = space.mincore(at, HUGE)
    assert present == b"\1" + bytes(511)  # what was filled around it was not touched
    fails(errno.ENOMEM, space.mincore, at, 2 * HUGE)
    fails(errno.EINVAL, space.mincore, at + 1, PAGE)
    fails(errno.ENOMEM, space.msync, at, 2 * HUGE, abi.MS_SYNC)
    fails(errno.EINVAL, space.msync, at, PAGE, abi.MS_SYNC | abi.MS_ASYNC)
    space.msync(at, HUGE, abi.MS_SYNC)


# -- user access


def test_access_across_pages_and_kinds(world: World, space: AddressSpace) -> None:
    at = space.mmap(0x40_0000, 2 * PAGE, RW, PRIVATE | abi.MAP_FIXED)
    data = bytes(range(200))
    space.write(at + PAGE - 100, bytearray(data))
    assert space.read(at + PAGE - 100, 200) == data
    space.write_u32(at, 0x1_2345_6789)
    assert space.read_u32(at) == 0x2345_6789
    space.write_u64(at + PAGE - 4, 1 << 64 | 0xAABB)
    assert space.read_u64(at + PAGE - 4) == 0xAABB
    layout = struct.Struct("<IQ")
    space.write_struct(layout, at + 3, 7, 9)
    assert space.read_struct(layout, at + 3) == (7, 9)
    assert space.cmpxchg_u32(at, 1, 2) != 1 or space.read_u32(at) == 2
    space.write_u32(at + 64, 5)
    assert space.cmpxchg_u32(at + 64, 5, 6) == 5 and space.read_u32(at + 64) == 6
    assert space.cmpxchg_u32(at + 64, 5, 7) == 6 and space.read_u32(at + 64) == 6
    for va in (0, at + 2 * PAGE, at + 2 * PAGE - 4, space.user_top, -8, 1 << 64, 0xFFFF_8000_0000_0000):
        fails(errno.EFAULT, space.read, va, 8)
        fails(errno.EFAULT, space.write, va, bytes(8))
        fails(errno.EFAULT, space.read_u64, va)
    assert space.read(0, 0) == b""


def test_read_cstring(space: AddressSpace) -> None:
    at = space.mmap(0x40_0000, 2 * PAGE, RW, PRIVATE | abi.MAP_FIXED)
    space.write(at + PAGE - 3, b"abcdef\0")
    assert space.read_cstring(at + PAGE - 3, 4096) == b"abcdef"
    assert space.read_cstring(at + PAGE - 3, 7) == b"abcdef"
    fails(errno.ENAMETOOLONG, space.read_cstring, at + PAGE - 3, 6)
    space.write(at, b"x" * 2 * PAGE)
    fails(errno.EFAULT, space.read_cstring, at + PAGE, 2 * PAGE)


def test_views(world: World, space: AddressSpace) -> None:
    at = space.mmap(0x40_0000, 20 * PAGE, RW, PRIVATE | abi.MAP_FIXED)
    views = space.views(at + 5, 10 * PAGE, True)
    assert sum(map(len, views)) == 10 * PAGE and len(views) == 1, "one run of frames is one view"
    views[0][:5] = b"hello"
    assert space.read(at + 5, 5) == b"hello"
    assert sum(map(len, space.views(at + 18 * PAGE, 9 * PAGE, True))) == 2 * PAGE
    fails(errno.EFAULT, space.views, at + 20 * PAGE, 1, False)
    assert space.views(0, 0, True) == []
    space.mprotect(at, PAGE, 1)
    fails(errno.EFAULT, space.views, at, 1, True)
    assert bytes(space.views(at + 5, 5, False)[0]) == b"hello"


def test_access_beyond_permission(world: World, space: AddressSpace) -> None:
    file = FakeFile(world.memory, b"text" * 1024)
    at = space.mmap(0, PAGE, 5, abi.MAP_PRIVATE, file)
    fails(errno.EFAULT, space.write, at, b"\xcc")
    space.write_force(at, b"\xcc")
    assert space.read(at, 4) == b"\xccext" and world.memory.view[file.gpa] == ord("t")
    space.mprotect(at, PAGE, 0)
    fails(errno.EFAULT, space.read, at, 1)
    assert space.read_force(at, 4) == b"\xccext"


def test_futex_keys(world: World, space: AddressSpace) -> None:
    private, shared = space.mmap(0, PAGE, RW, PRIVATE), space.mmap(0, 2 * PAGE, RW, SHARED)
    child = space.fork()
    assert space.futex_key(private, True) != child.futex_key(private, True)
    assert space.futex_key(private, False) != child.futex_key(private, False)
    assert space.futex_key(shared + 8, False) == child.futex_key(shared + 8, False)
    assert space.futex_key(shared, False) != space.futex_key(shared + PAGE, False)
    fails(errno.EFAULT, space.futex_key, 0, False)
    child.destroy()
