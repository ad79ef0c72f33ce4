"""Host descriptors as standard files: pipes, sockets, regular files, terminals."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import socket
import struct

import pytest
from io_world import IoWorld

from kvmsentry.errors import HostError
from kvmsentry.fs import hostfile

POLLIN, POLLOUT, POLLHUP, POLLERR = 1, 4, 16, 8
EPOLLET = 1 << 31


@pytest.fixture
def io():
    return IoWorld()


def give(io, fd, polled=False):
    """Install host descriptor `fd`; `polled`: as if it could not be opened again."""
    file = hostfile.open_host(io.kernel, fd)
    host = file.host
    if polled and host.private:
        os.close(host.fd)
        host.fd, host.private, host.limit = fd, False, hostfile.PIPE_BUF
    return io.task.files.install(file, 100)


def poll(io, fd):
    at = io.store(io.task, struct.pack("<ihh", fd, POLLIN | POLLOUT, 0))
    assert io.do(io.task, "poll", at, 1, 0) >= 0
    return struct.unpack("<ihh", io.load(io.task, 8))[2]


@pytest.mark.parametrize("polled", [False, True])
def test_reading_a_pipe(io, polled):
    t = io.task
    r, w = os.pipe()
    fd = give(io, r, polled)
    assert not fcntl.fcntl(r, fcntl.F_GETFL) & os.O_NONBLOCK
    assert poll(io, fd) == 0
    assert io.read(t, fd, 10) is None
    os.write(w, b"typed")
    assert io.got(t) == b"typed"
    assert io.do(t, "fcntl", fd, 4, 0o4000) == 0
    assert io.read(t, fd, 10) == -errno.EAGAIN
    os.write(w, b"xy")
    assert poll(io, fd) == POLLIN
    assert io.do(t, "ioctl", fd, 0x541B, io.at(t)) == 0 and io.load(t, 4) == b"\2\0\0\0"
    os.close(w)
    assert io.read(t, fd, 10) == b"xy" and io.read(t, fd, 10) == b""
    assert poll(io, fd) & POLLHUP
    assert not fcntl.fcntl(r, fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize("polled", [False, True])
def test_writing_a_pipe_that_is_full(io, polled):
    t = io.task
    r, w = os.pipe()
    fd = give(io, w, polled)
    data = os.urandom(200_000)
    t.mm.write(io.at(t, 300_000), data)
    assert io.do(t, "write", fd, io.at(t, 300_000), len(data)) is None
    out = bytearray()
    while len(out) < len(data):
        out += os.read(r, 50_000)
        io.run()
    assert out == data and io.later(t) == len(data)
    os.close(r)
    t.sighand.actions[13].handler = 1
    assert io.write(t, fd, b"x") == -errno.EPIPE
    assert poll(io, fd) & POLLERR


def test_an_edge_triggered_epoll_hears_of_every_arrival(io):
    t = io.task
    r, w = os.pipe()
    fd = give(io, r)
    ep = io.do(t, "epoll_create1", 0)
    assert io.do(t, "epoll_ctl", ep, 1, fd, io.store(t, struct.pack("<IQ", POLLIN | EPOLLET, 1))) == 0
    for _ in range(3):
        assert io.do(t, "epoll_wait", ep, io.at(t), 4, 0) == 0
        os.write(w, b"x")
        io.run()
        assert io.do(t, "epoll_wait", ep, io.at(t), 4, 0) == 1


def test_a_socket(io):
    t = io.task
    ours, theirs = socket.socketpair()
    fd = give(io, ours.detach())
    assert io.read(t, fd, 5) is None
    theirs.send(b"abc")
    assert io.got(t) == b"abc"
    assert io.write(t, fd, b"def") == 3 and theirs.recv(9) == b"def"
    theirs.close()
    t.sighand.actions[13].handler = 1
    assert io.read(t, fd, 5) == b"" and io.write(t, fd, b"x") == -errno.EPIPE


def test_a_regular_file_shares_its_position(io, tmp_path):
    t = io.task
    host = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    fd = give(io, host)
    assert io.write(t, fd, b"one") == 3
    os.write(host, b"two")
    assert io.write(t, fd, b"three") == 5
    assert (tmp_path / "out").read_bytes() == b"onetwothree"
    assert io.do(t, "lseek", fd, 3, 0) == 3 and io.read(t, fd, 3) == b"two"
    assert io.do(t, "pread64", fd, io.at(t), 3, 0) == 3 and io.load(t, 3) == b"one"
    assert poll(io, fd) == POLLIN | POLLOUT
    assert io.do(t, "ftruncate", fd, 4) == 0 and (tmp_path / "out").read_bytes() == b"onet"
    assert not io.platform.watched


def test_dev_null(io):
    t = io.task
    fd = give(io, os.open("/dev/null", os.O_RDWR))
    assert io.write(t, fd, b"gone") == 4 and io.read(t, fd, 9) == b""
    inode = t.files.files[fd].inode
    assert inode.mode & 0o170000 == 0o020000 and inode.rdev == 0x103


def test_a_terminal_without_a_terminal_of_ours(io):
    t = io.task
    master, slave = pty.openpty()
    fd = give(io, slave)
    assert io.do(t, "ioctl", fd, 0x5401, io.at(t)) == 0
    modes = bytearray(io.load(t, 36))
    assert io.do(t, "ioctl", fd, 0x5413, io.at(t, 100)) == 0
    modes[12] &= ~8 & 0xFF  # no ECHO
    assert io.do(t, "ioctl", fd, 0x5402, io.store(t, bytes(modes))) == 0
    assert io.do(t, "ioctl", fd, 0x5412, io.at(t)) == -errno.ENOTTY  # TIOCSTI never reaches the host
    assert io.read(t, fd, 20) is None
    os.write(master, b"line\n")
    select.select([slave], [], [], 10)  # the host's terminal takes its time
    assert io.got(t) == b"line\n"
    assert io.write(t, fd, b"out") == 3 and os.read(master, 9) == b"out"
    hostfile.restore_terminal(t.files.files[fd])
    import termios

    assert termios.tcgetattr(master)[3] & termios.ECHO


def test_the_end_of_output_is_seen_when_the_application_closes_it(io):
    t = io.task
    r, w = os.pipe()
    fd = give(io, w)
    again = io.do(t, "dup", fd)
    io.do(t, "close", fd)
    assert io.write(t, again, b"x") == 1
    io.do(t, "close", again)
    assert os.read(r, 9) == b"x" and os.read(r, 9) == b""


def test_opening_again(io):
    t = io.task
    r, w = os.pipe()
    inode = t.files.files[give(io, w)].inode
    other = inode.open(t, None, 1)
    assert other.write([memoryview(bytearray(b"again"))]) == 5 and os.read(r, 9) == b"again"
    with pytest.raises(Exception, match="Permission"):
        inode.open(t, None, 0)


def test_a_closed_descriptor(io):
    with pytest.raises(HostError, match="descriptor 999"):
        hostfile.open_host(io.kernel, 999)


def test_a_regular_file_opened_again_has_its_own_position(io, tmp_path):
    t = io.task
    fd = give(io, os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT))
    assert io.write(t, fd, b"first") == 5
    again = t.files.install(t.files.files[fd].inode.open(t, None, 2), 100)
    assert io.write(t, again, b"AB") == 2 and io.write(t, fd, b"!") == 1
    assert (tmp_path / "out").read_bytes() == b"ABrst!"
    assert io.do(t, "lseek", again, 0, 2) == 6
    assert io.do(t, "fcntl", again, 4, 0o2000) == 0 and io.do(t, "lseek", again, 0, 0) == 0
    assert io.write(t, again, b"end") == 3
    assert (tmp_path / "out").read_bytes() == b"ABrst!end"
