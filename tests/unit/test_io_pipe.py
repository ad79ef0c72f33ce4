"""Pipes, FIFOs, and read and write over them."""

from __future__ import annotations

import errno
import random
import struct

import pytest
from io_world import IoWorld

O_NONBLOCK, O_CLOEXEC, O_DIRECT, O_WRONLY = 0o4000, 0o2000000, 0o40000, 1
POLLIN, POLLOUT, POLLERR, POLLHUP = 1, 4, 8, 16


@pytest.fixture
def io():
    return IoWorld()


def poll(io, task, fd):
    at = io.store(task, struct.pack("<ihh", fd, POLLIN | POLLOUT, 0))
    assert io.do(task, "poll", at, 1, 0) >= 0
    return struct.unpack("<ihh", io.load(task, 8))[2]


def test_bytes_come_out_in_order(io):
    t = io.task
    r, w = io.pipe(t)
    assert (r, w) == (0, 1)
    assert io.write(t, w, b"hello") == 5
    assert io.write(t, w, b" world") == 6
    assert io.read(t, r, 3) == b"hel"
    assert io.read(t, r, 100) == b"lo world"


def test_a_model_of_the_ring(io):
    t = io.task
    r, w = io.pipe(t, O_NONBLOCK)
    rng, sent, received = random.Random(7), bytearray(), bytearray()
    for _ in range(400):
        if rng.random() < 0.5:
            data = rng.randbytes(rng.choice([1, 7, 100, 4096, 5000, 30000, 65536]))
            free = 65536 - (len(sent) - len(received))
            n = io.write(t, w, data)
            if len(data) <= free:
                assert n == len(data)
            elif len(data) <= 4096 or free < 4096:
                assert n == -errno.EAGAIN
            else:
                assert n == free
            sent += data[: max(n, 0)]
        else:
            want = rng.choice([1, 10, 4096, 20000, 100000])
            got = io.read(t, r, want)
            left = len(sent) - len(received)
            if not left:
                assert got == -errno.EAGAIN
            else:
                assert len(got) == min(want, left)
                received += got
        assert sent.startswith(received)
    assert len(received) > 100000


def test_a_reader_sleeps_until_there_is_something(io):
    t = io.task
    r, w = io.pipe(t)
    child = io.fork(t)
    assert io.read(child, r, 10) is None and io.parked(child)
    assert io.write(t, w, b"abc") == 3
    assert io.got(child) == b"abc"
    assert io.read(child, r, 10) is None
    io.do(t, "close", w)
    assert io.parked(child)  # its own write end keeps the pipe open


def test_end_of_file_and_hang_up(io):
    t = io.task
    r, w = io.pipe(t)
    other = io.thread(t)
    assert poll(io, t, r) == 0 and poll(io, t, w) == POLLOUT
    assert io.read(other, r, 10) is None
    assert io.do(t, "close", w) == 0
    assert io.got(other) == b""
    assert poll(io, t, r) == POLLHUP
    assert io.read(t, r, 0) == b""


def test_writing_without_a_reader(io):
    t = io.task
    r, w = io.pipe(t)
    t.sighand.actions[13].handler = 1  # ignored
    io.do(t, "close", r)
    assert io.write(t, w, b"x") == -errno.EPIPE
    assert poll(io, t, w) == POLLERR | POLLOUT


def test_sigpipe_is_sent(io):
    child = io.fork(io.task)
    r, w = io.pipe(child)
    io.do(child, "close", r)
    assert io.write(child, w, b"x") is None
    assert child.process.exit_code == 13


def test_a_long_write_goes_on_where_it_was(io):
    t = io.task
    r, w = io.pipe(t)
    other = io.thread(t)
    data = random.Random(1).randbytes(200_000)
    t.mm.write(io.at(other, 0), data)
    assert io.do(other, "write", w, io.at(other, 0), len(data)) is None
    out = bytearray()
    while len(out) < len(data):
        out += io.read(t, r, 10000)
    assert out == data
    assert io.later(other) == len(data)


def test_a_signal_after_part_of_a_write_returns_the_part(io):
    t = io.task
    r, w = io.pipe(t)
    other = io.thread(t)
    assert io.do(other, "write", w, io.at(other, 0), 100_000) is None
    io.signal(other, 10)
    assert io.interrupted(other) == 65536


def test_atomic_writes_wait_for_room(io):
    t = io.task
    r, w = io.pipe(t, O_NONBLOCK)
    assert io.write(t, w, bytes(65536 - 100)) == 65436
    assert io.write(t, w, bytes(101)) == -errno.EAGAIN
    assert io.write(t, w, bytes(100)) == 100
    assert poll(io, t, w) == 0
    assert len(io.read(t, r, 4095)) == 4095
    assert poll(io, t, w) == 0
    assert len(io.read(t, r, 1)) == 1
    assert poll(io, t, w) == POLLOUT


def test_packets(io):
    t = io.task
    r, w = io.pipe(t, O_DIRECT | O_NONBLOCK)
    for data in (b"one", b"second", b"third packet"):
        assert io.write(t, w, data) == len(data)
    assert io.read(t, r, 100) == b"one"
    assert io.read(t, r, 3) == b"sec"  # the rest of the packet is lost
    assert io.read(t, r, 100) == b"third packet"
    assert io.read(t, r, 100) == -errno.EAGAIN
    assert io.do(t, "fcntl", w, 4, O_NONBLOCK) == 0  # packet mode off
    assert io.write(t, w, b"a") == 1 and io.write(t, w, b"b") == 1
    assert io.read(t, r, 100) == b"ab"


def test_size(io):
    t = io.task
    r, w = io.pipe(t, O_NONBLOCK)
    assert io.do(t, "fcntl", w, 1032, 0) == 65536
    assert io.write(t, w, b"abc" * 3000) == 9000
    assert io.read(t, r, 5000) == (b"abc" * 3000)[:5000]
    assert io.do(t, "fcntl", w, 1031, 100) == 4096
    assert io.do(t, "fcntl", w, 1031, 5000) == 8192
    assert io.do(t, "fcntl", w, 1031, 1 << 17) == 1 << 17
    assert io.do(t, "fcntl", w, 1031, 1 << 21) == -errno.EPERM
    assert io.write(t, w, bytes(100_000)) == 100_000
    assert io.do(t, "fcntl", r, 1031, 4096) == -errno.EBUSY
    assert io.read(t, r, 4000) == (b"abc" * 3000)[5000:]
    assert io.do(t, "ioctl", r, 0x541B, io.at(t)) == 0
    assert struct.unpack("<i", io.load(t, 4))[0] == 100_000


def test_pipe_errors(io):
    t = io.task
    assert io.do(t, "pipe2", io.at(t), 1) == -errno.EINVAL
    assert io.do(t, "pipe", 8) == -errno.EFAULT
    assert not t.files.files
    r, w = io.pipe(t, O_CLOEXEC)
    assert t.files.cloexec == {r, w}
    assert io.do(t, "read", w, io.at(t), 1) == -errno.EBADF
    assert io.do(t, "write", r, io.at(t), 1) == -errno.EBADF
    assert io.do(t, "lseek", r, 0, 0) == -errno.ESPIPE
    assert io.do(t, "pread64", r, io.at(t), 1, 0) == -errno.ESPIPE
    assert io.do(t, "pread64", r, io.at(t), 1, -1) == -errno.EINVAL
    assert io.do(t, "read", r, 8, 1) == -errno.EFAULT
    assert io.do(t, "read", 77, 8, 1) == -errno.EBADF
    assert io.do(t, "read", r, io.at(t), -1) == -errno.EFAULT
    assert io.do(t, "fsync", r) == -errno.EINVAL


def test_fifo(io):
    t = io.task
    path = io.store(t, b"/tmp/fifo\0", 40000)
    assert io.do(t, "mknod", path, 0o010644, 0) == 0
    assert io.open(t, b"/tmp/fifo", O_WRONLY | O_NONBLOCK) == -errno.ENXIO
    r = io.open(t, b"/tmp/fifo", O_NONBLOCK)
    assert io.read(t, r, 1) == b"" and poll(io, t, r) == 0  # no writer yet: no hang-up
    w = io.open(t, b"/tmp/fifo", O_WRONLY)
    assert io.write(t, w, b"hi") == 2 and io.read(t, r, 9) == b"hi"
    io.do(t, "close", w)
    assert poll(io, t, r) == POLLHUP
    io.do(t, "close", r)
    child = io.fork(t)
    assert io.open(child, b"/tmp/fifo", 0) is None  # waits for a writer
    w = io.open(t, b"/tmp/fifo", O_WRONLY)
    assert w == 0 and io.later(child) == 0
    assert io.write(t, w, b"x") == 1
    assert io.read(child, 0, 9) == b"x"


def test_interrupted_fifo_open_leaves_nothing(io):
    t = io.task
    io.do(t, "mknod", io.store(t, b"/tmp/fifo\0", 40000), 0o010644, 0)
    child = io.fork(t)
    assert io.open(child, b"/tmp/fifo", 0) is None
    io.signal(child, 10)
    assert not io.parked(child) and not child.files.files
    assert io.open(t, b"/tmp/fifo", O_WRONLY | O_NONBLOCK) == -errno.ENXIO


def test_a_pipe_opened_again_waits_for_nobody(io):
    t = io.task
    r, w = io.pipe(t)
    io.write(t, w, b"left")
    inode = t.files.files[r].inode
    io.do(t, "close", w)
    again = inode.open(t, None, 0)
    assert again.label() == b"pipe:[%d]" % inode.ino
    io.do(t, "close", r)
    buffer = bytearray(9)
    assert again.read([memoryview(buffer)]) == 4 and buffer[:4] == b"left"
    assert again.read([memoryview(buffer)]) == 0
    again.put()
