"""Message queues: who is served when, and what is accounted for."""

from __future__ import annotations

import errno
import struct

import pytest
from kernel_fakes import SCRATCH, KernelWorld

from kvmsentry.fs import mqueue

MQ_OPEN, MQ_UNLINK, MQ_SEND, MQ_RECEIVE, CLOSE = 240, 241, 242, 243, 3
O_RDWR, O_CREAT, O_NONBLOCK = 2, 0o100, 0o4000


@pytest.fixture
def world() -> KernelWorld:
    return KernelWorld()


def queue(world, task, count: int, size: int, flags: int = 0) -> int:
    task.mm.write(SCRATCH, b"name\0")
    task.mm.write(SCRATCH + 64, struct.pack("<8q", 0, count, size, 0, 0, 0, 0, 0))
    return world.call(task, MQ_OPEN, SCRATCH, O_RDWR | O_CREAT | flags, 0o600, SCRATCH + 64)


def send(world, task, fd: int, text: bytes, priority: int = 0):
    task.mm.write(SCRATCH + 256, text)
    return world.call(task, MQ_SEND, fd, SCRATCH + 256, len(text), priority, 0)


def receive(world, task, fd: int, size: int):
    n = world.call(task, MQ_RECEIVE, fd, SCRATCH + 512, size, 0, 0)
    return n if n is None or n < 0 else task.mm.read(SCRATCH + 512, n)


def test_messages_are_accounted_for_until_they_are_taken(world):
    init = world.init()
    fd = queue(world, init, 2, 100, O_NONBLOCK)
    space = mqueue.space_of(init)
    assert send(world, init, fd, b"abc") == 0 and send(world, init, fd, b"defg", 3) == 0
    assert space.held == 7
    assert send(world, init, fd, b"full") == -errno.EAGAIN and space.held == 7
    assert receive(world, init, fd, 100) == b"defg" and space.held == 3
    assert world.call(init, MQ_UNLINK, SCRATCH) == 0
    assert (space.count, space.held) == (1, 3)
    world.call(init, CLOSE, fd)
    assert (space.count, space.held, space.charged) == (0, 0, {})


def test_our_own_memory_is_bounded(world, monkeypatch):
    from kvmsentry.syscall import sys_mqueue

    monkeypatch.setattr(sys_mqueue, "HELD_MOST", 10)
    init = world.init()
    fd = queue(world, init, 5, 100)
    assert send(world, init, fd, b"12345678") == 0
    assert send(world, init, fd, b"123") == -errno.ENOMEM
    assert receive(world, init, fd, 100) == b"12345678"
    assert send(world, init, fd, b"123") == 0


def test_a_sleeping_sender_is_served_before_who_comes_later(world):
    init = world.init()
    fd = queue(world, init, 1, 100)
    inode = init.files.get(fd).inode
    assert send(world, init, fd, b"first") == 0
    inode.space.held += 6
    sleeper = inode.send_wait(init, 0, b"second", None)
    sleep = sleeper.send(None)
    assert inode.fetch() == (0, b"first") and inode.messages == 1  # its message has taken the room already
    with pytest.raises(StopIteration) as end:
        sleeper.throw(mqueue.Errno(sleep.restart))  # a signal that comes after that is no longer one for the call
    assert end.value.value == 0
    assert inode.fetch() == (0, b"second")


def test_a_sender_that_gives_up_leaves_nothing(world):
    init = world.init()
    fd = queue(world, init, 1, 100)
    inode = init.files.get(fd).inode
    assert send(world, init, fd, b"first") == 0
    inode.space.held += 6
    sleeper = inode.send_wait(init, 0, b"second", None)
    sleep = sleeper.send(None)
    with pytest.raises(mqueue.Errno):
        sleeper.throw(mqueue.Errno(sleep.restart))
    assert not inode.senders and inode.space.held == 5
