"""tmpfs: pages, holes, limits, mappings, and that every frame comes back."""

from __future__ import annotations

import errno
import gc
import os

import pytest
from fs_world import AT_FDCWD, FsWorld
from hypothesis import given, settings
from hypothesis import strategies as hs

from kvmsentry.errors import Errno
from kvmsentry.fs.pages import PAGE, PageStore, Pool
from kvmsentry.fs.tmpfs import TmpSuper, memory_file

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
KEEP, PUNCH, ZERO = 1, 2, 16


@pytest.fixture
def world():
    return FsWorld(ram_limit=64 << 20)


@pytest.fixture
def task(world):
    return world.task(TmpSuper(world.kernel))


def frames_of(world) -> int:
    gc.collect()
    return world.census()


@settings(max_examples=100, deadline=None)
@given(hs.lists(hs.tuples(hs.sampled_from("wwwtpz"), hs.integers(0, 40_000), hs.integers(1, 20_000)), max_size=20))
def test_a_store_is_a_bytearray(steps):
    """Writes, truncations, holes and zeroing against a plain bytearray; frames counted to the last."""
    world = FsWorld(ram_limit=64 << 20)
    task = world.task(TmpSuper(world.kernel))
    before = world.census()
    fd = task.open(b"/f", 0o102)
    file = task.files.get(fd)
    model = bytearray()
    for number, (kind, at, length) in enumerate(steps):
        if kind == "w":
            data = bytes([number + 1]) * length
            assert (
                file.pwrite(
                    [memoryview(bytearray(data[: length // 2])), memoryview(bytearray(data[length // 2 :]))], at
                )
                == length
            )
            model.extend(bytes(max(0, at + length - len(model))))
            model[at : at + length] = data
        elif kind == "t":
            file.inode.truncate(at)
            model[at:] = b""
            model.extend(bytes(at - len(model)))
        else:
            file.fallocate(PUNCH | KEEP if kind == "p" else ZERO | KEEP, at, length)
            end = min(len(model), at + length)
            if at < end:
                model[at:end] = bytes(end - at)
        assert file.inode.size == len(model)
    buf = bytearray(len(model) + 100)
    assert file.pread([memoryview(buf)[:77], memoryview(buf)[77:]], 0) == len(model)
    assert buf[: len(model)] == model
    store = file.inode.store
    assert store.pages == sum(store.counts)
    assert store.starts == sorted(store.starts)
    task.close(fd)
    assert task.call(87, b"/f") == 0
    del file, store
    assert world.census() == before


def test_frames_come_back_with_the_last_holder(world, task):
    before = frames_of(world)
    task.put(b"/f", b"x" * 100_000)
    fd = task.open(b"/f")
    assert frames_of(world) > before
    task.call(87, b"/f")
    assert task.read(fd, 5) == b"xxxxx"
    assert frames_of(world) > before
    task.close(fd)
    assert frames_of(world) == before


def test_reserve_is_given_back_at_close(world, task):
    fd = task.open(b"/f", 0o101)
    for _ in range(40):
        task.write(fd, b"y" * 65536)
    task.write(fd, b"z")
    inode = task.files.get(fd).inode
    task.close(fd)
    assert inode.store.pages == 40 * 16 + 1
    assert inode.blocks == inode.store.pages * 8


def test_shared_mapping_is_the_file(world, task):
    before = frames_of(world)
    task.put(b"/f", b"a" * 10_000)
    fd = task.open(b"/f", 2)
    file = task.files.get(fd)
    va = task.mm.mmap(0, 3 * PAGE, 3, 1, file.backing(), 0)
    task.mm.write(va + 9_990, b"mapped")
    file.pos = 9_990
    assert task.read(fd, 100) == b"mapped" + b"a" * 4
    file.pwrite([memoryview(bytearray(b"written"))], 4096)
    assert task.mm.read(va + 4096, 7) == b"written"
    task.call(76, b"/f", 100)
    with pytest.raises(Errno):
        task.mm.read(va + 4096, 1)
    assert task.mm.read(va + 99, 2) == b"a\0"
    task.call(76, b"/f", 8192)
    assert task.mm.read(va + 4096, 8) == bytes(8)
    task.mm.write(va + 5000, b"again")
    file.fallocate(PUNCH | KEEP, 4096, 4096)
    assert task.mm.read(va + 5000, 5) == bytes(5)
    task.mm.write(va + 5000, b"third")
    assert file.pread([memoryview(buf := bytearray(5))], 5000) == 5 and buf == b"third"
    task.call(87, b"/f")
    task.close(fd)
    del file
    assert task.mm.read(va + 5000, 5) == b"third"
    assert frames_of(world) > before
    task.mm.munmap(va, 3 * PAGE)
    assert frames_of(world) == before


@pytest.mark.parametrize("grow", ["truncate", "write", "fallocate"])
def test_what_a_mapping_stored_behind_the_end_is_not_the_files(task, grow):
    task.put(b"/f", b"i" * 1000)
    file = task.files.get(task.open(b"/f", 2))
    va = task.mm.mmap(0, PAGE, 3, 1, file.backing(), 0)
    task.mm.write(va + 999, b"in")
    if grow == "truncate":
        task.call(76, b"/f", 2000)
    elif grow == "write":
        file.pwrite([memoryview(b"x")], 2000)
    else:
        file.fallocate(0, 0, 2000)
    assert task.mm.read(va + 999, 3) == b"i\0\0"


def test_private_mapping_does_not_write_through(task):
    task.put(b"/f", b"a" * 5000)
    fd = task.open(b"/f", 2)
    va = task.mm.mmap(0, 2 * PAGE, 3, 2, task.files.get(fd).backing(), 0)
    task.mm.write(va, b"private")
    assert task.read(fd, 7) == b"aaaaaaa"
    assert task.mm.read(va + 5000, 10) == bytes(10)


def test_size_limit(world):
    task = world.task(TmpSuper(world.kernel, size=64 << 10))
    fd = task.open(b"/f", 0o101)
    assert task.write(fd, b"x" * (60 << 10)) == 60 << 10
    assert task.write(fd, b"x" * (60 << 10)) == 4 << 10  # short: up to the limit
    with pytest.raises(Errno) as caught:
        task.write(fd, b"x")
    assert caught.value.errno == errno.ENOSPC
    assert task.stat(b"/f")[7] == 64 << 10
    file = task.files.get(fd)
    with pytest.raises(Errno) as caught:
        file.fallocate(0, 0, 128 << 10)
    assert caught.value.errno == errno.ENOSPC
    assert file.inode.size == 64 << 10
    file.inode.truncate(0)
    file.fallocate(0, 0, 64 << 10)
    assert file.inode.size == 64 << 10


def test_inode_limit(world):
    sb = TmpSuper(world.kernel, inodes=3)
    task = world.task(sb)
    task.put(b"/a", b"")
    assert task.call(83, b"/b", 0o755) == 0
    assert task.open(b"/c", 0o101) == -errno.ENOSPC
    assert task.call(87, b"/a") == 0
    gc.collect()
    assert task.open(b"/c", 0o101) >= 0


def test_seek_data_and_hole(task):
    fd = task.open(b"/f", 0o102)
    file = task.files.get(fd)
    file.pwrite([memoryview(bytearray(b"x"))], 10 * PAGE)
    file.pwrite([memoryview(bytearray(b"y"))], 20 * PAGE)
    assert file.seek(0, 3) == 10 * PAGE
    assert file.seek(10 * PAGE + 5, 3) == 10 * PAGE + 5
    assert file.seek(10 * PAGE, 4) == 11 * PAGE
    assert file.seek(11 * PAGE, 3) == 20 * PAGE
    assert file.seek(20 * PAGE, 4) == 20 * PAGE + 1
    with pytest.raises(Errno) as caught:
        file.seek(20 * PAGE + 1, 3)
    assert caught.value.errno == errno.ENXIO


def test_keep_size_and_unsupported_modes(task):
    fd = task.open(b"/f", 0o102)
    file = task.files.get(fd)
    file.fallocate(KEEP, 0, 10 * PAGE)
    assert file.inode.size == 0 and file.inode.blocks == 80
    with pytest.raises(Errno) as caught:
        file.fallocate(8, 0, PAGE)
    assert caught.value.errno == errno.EOPNOTSUPP
    inode = file.inode
    task.close(fd)
    assert inode.blocks == 80


def test_rename_flags_and_counts(task):
    for name in (b"/d", b"/e"):
        task.call(83, name, 0o755)
    task.put(b"/d/f", b"f")
    assert task.stat(b"/")[2] == 4
    assert task.call(316, AT_FDCWD, b"/d", AT_FDCWD, b"/e", RENAME_NOREPLACE) == -errno.EEXIST
    assert task.call(316, AT_FDCWD, b"/d/f", AT_FDCWD, b"/e", RENAME_EXCHANGE) == 0
    assert task.stat(b"/d/f")[3] == 0o40755 and task.slurp(b"/e") == b"f"
    assert task.stat(b"/")[2] == 3 and task.stat(b"/d")[2] == 3
    assert task.call(82, b"/d", b"/d/f/g") == -errno.EINVAL
    assert task.call(82, b"/d/f", b"/d") == -errno.ENOTEMPTY
    assert task.call(82, b"/e", b"/d") == -errno.EISDIR
    assert task.call(82, b"/d", b"/e") == -errno.ENOTDIR
    assert task.call(84, b"/d") == -errno.ENOTEMPTY
    assert task.call(84, b"/e") == -errno.ENOTDIR


def test_o_tmpfile(world, task):
    before = frames_of(world)
    task.call(83, b"/d", 0o755)
    fd = task.open(b"/d", 0o20200002, 0o600)
    assert fd >= 0 and task.listing(b"/d").keys() == {b".", b".."}
    task.write(fd, b"secret")
    assert task.open(b"/d", 0o20200000) == -errno.EINVAL
    assert task.call(265, fd, b"", AT_FDCWD, b"/d/named", 0x1000) == 0
    assert task.slurp(b"/d/named") == b"secret" and task.stat(b"/d/named")[2] == 1
    task.close(fd)
    fd = task.open(b"/d", 0o20200202, 0o600)  # O_EXCL: never to be named
    assert task.call(265, fd, b"", AT_FDCWD, b"/d/other", 0x1000) == -errno.ENOENT
    task.close(fd)
    task.call(87, b"/d/named")
    assert frames_of(world) == before


def test_memory_file(world):
    before = frames_of(world)
    inode = memory_file(world.kernel, b"/memfd:x")
    inode.open(None, None, 2).pwrite([memoryview(bytearray(b"x" * 9000))], 0)
    assert inode.nlink == 0 and frames_of(world) > before
    backing = inode.open(None, None, 2).backing()
    assert backing.name() == b"/memfd:x" and backing is inode.open(None, None, 2).backing()
    del inode, backing
    assert frames_of(world) == before


def test_runs_are_long(world):
    pool = Pool(world.frames, world.memory)
    store = PageStore(pool)
    piece = memoryview(bytearray(os.urandom(65536)))
    for number in range(256):
        store.write([piece], number * 65536, 65536, number * 65536)
    assert len(store.starts) <= 16  # 16 MiB in runs of 2 MiB, most of them neighbours
    assert store.pages <= 4096 + 512
