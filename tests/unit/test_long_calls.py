"""Calls that work in pieces: others run in between, a signal ends them, and what was begun is undone."""

from __future__ import annotations

import errno

import pytest
from kernel_fakes import SCRATCH, KernelWorld

from kvmsentry.errors import Errno
from kvmsentry.kernel import traps
from kvmsentry.syscall import sys_fcntl, sys_io

MEMFD_CREATE = 319
MB = 1 << 20


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> KernelWorld:
    monkeypatch.setattr(traps.Pace, "TURN", -1)  # every piece ends a turn
    return KernelWorld()


def memfd(world, task) -> int:
    task.mm.write(SCRATCH, b"x\0")
    return world.call(task, MEMFD_CREATE, SCRATCH, 0)


def test_fallocate_that_a_signal_ends_leaves_nothing(world):
    init = world.init()
    fd = memfd(world, init)
    inode = init.files.get(fd).inode
    steps = init.files.get(fd).fallocate_steps(0, 0, 32 * MB)
    next(steps)
    next(steps)
    assert inode.store.pages == 2048
    steps.close()
    assert inode.store.pages == 0 and inode.size == 0


def test_fallocate_that_is_ended_keeps_what_somebody_wrote_meanwhile(world):
    init = world.init()
    fd = memfd(world, init)
    file = init.files.get(fd)
    steps = file.fallocate_steps(0, 0, 32 * MB)
    next(steps)
    file.pwrite([memoryview(bytearray(b"kept"))], 0)
    steps.close()
    data = bytearray(4)
    assert file.pread([memoryview(data)], 0) == 4 and data == b"kept"


def test_a_signal_ends_a_long_fallocate_with_eintr(world):
    init = world.init()
    file = init.files.get(memfd(world, init))
    work = sys_fcntl._fallocate_long(init, file, file.fallocate_steps(0, 0, 64 * MB))
    sleep = work.send(None)
    assert sleep.reason == "busy" and file.inode.store.pages > 0
    with pytest.raises(Errno) as error:
        work.throw(Errno(sleep.restart))
    assert error.value.errno == errno.EINTR
    assert file.inode.store.pages == 0 and file.refs == 1


def test_a_signal_ends_a_long_write_where_it_is(world):
    init = world.init()
    file = init.files.get(memfd(world, init))
    work = sys_io._in_pieces(init, file, 64 * MB, lambda done, n: file.write([memoryview(bytearray(n))]))
    sleep = work.send(None)
    with pytest.raises(StopIteration) as end:
        work.throw(Errno(sleep.restart))
    assert end.value.value == file.pos == file.inode.size == sys_io.LONG
