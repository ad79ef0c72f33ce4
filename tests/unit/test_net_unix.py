"""Unix sockets through system calls, without a guest."""

from __future__ import annotations

import errno
import gc
import struct
import weakref

import pytest
from io_world import EINTR, ERESTARTSYS, MS, IoWorld

from kvmsentry.net import scm
from kvmsentry.syscall import abi_net as abi

STREAM, DGRAM, SEQPACKET, NONBLOCK = 1, 2, 5, 0o4000
MSG = 4096  # offsets in the scratch area
DATA, CONTROL, IOV, NAME = 8192, 16384, 24576, 28672


class NetWorld(IoWorld):
    def pair(self, kind: int = STREAM, flags: int = 0) -> tuple[int, int]:
        assert self.do(self.task, "socketpair", 1, kind | flags, 0, self.at(self.task)) == 0
        return struct.unpack("<ii", self.load(self.task, 8))

    def header(self, length: int, control: int) -> int:
        t = self.task
        self.store(t, struct.pack("<QQ", self.at(t, DATA), length), IOV)
        control_at = self.at(t, CONTROL) if control else 0
        return self.store(t, abi.MSGHDR.pack(0, 0, self.at(t, IOV), 1, control_at, control, 0), MSG)

    def send_files(self, sock: int, data: bytes, *fds: int) -> int | None:
        control = abi.CMSG.pack(16 + 4 * len(fds), 1, 1) + struct.pack(f"<{len(fds)}i", *fds)
        self.store(self.task, data, DATA)
        self.store(self.task, control, CONTROL)
        return self.do(self.task, "sendmsg", sock, self.header(len(data), len(control)), 0)

    def recv_files(self, sock: int, length: int = 64, room: int = 128, flags: int = 0) -> tuple[object, list[int], int]:
        n = self.do(self.task, "recvmsg", sock, self.header(length, room), flags | abi.MSG_DONTWAIT)
        if n is None or n < 0:
            return n, [], 0
        _, _, _, _, _, used, out = abi.MSGHDR.unpack(self.load(self.task, 56, MSG))
        fds: list[int] = []
        if used:
            size = abi.CMSG.unpack(self.load(self.task, 16, CONTROL))[0]
            fds = list(struct.unpack(f"<{(size - 16) // 4}i", self.load(self.task, size - 16, CONTROL + 16)))
        return self.load(self.task, n, DATA), fds, out

    def name(self, text: bytes) -> tuple[int, int]:
        return self.store(self.task, b"\1\0" + text, NAME), 2 + len(text)

    def close(self, fd: int) -> None:
        assert self.do(self.task, "close", fd) == 0


@pytest.fixture
def net() -> NetWorld:
    world = NetWorld()
    yield world
    world.task.files.close_all()
    world.run()
    assert not scm.in_flight and scm.total == 0


def test_reader_sleeps_until_bytes_come(net: NetWorld) -> None:
    one, other = net.pair()
    child = net.fork(net.task)
    assert net.read(child, one, 10) is None and net.parked(child)
    assert net.write(net.task, other, b"hello") == 5
    assert net.got(child) == b"hello"


def test_writer_sleeps_until_a_quarter_is_left(net: NetWorld) -> None:
    one, other = net.pair(flags=NONBLOCK)
    total = 0
    while (n := net.write(net.task, one, bytes(65536))) > 0:
        total += n
    assert n == -errno.EAGAIN and total == 212992
    poll = lambda: net.do(net.task, "poll", net.store(net.task, struct.pack("<ihh", one, 4, 0)), 1, 0)  # noqa: E731
    assert poll() == 0
    read = 0
    while read < total * 3 // 4:
        read += len(net.read(net.task, other, 8192))
    assert poll() == 1


def test_timeouts_are_not_restarted(net: NetWorld) -> None:
    one, _ = net.pair()
    t = net.task
    assert net.do(t, "setsockopt", one, 1, 20, net.store(t, struct.pack("<qq", 0, 50_000)), 16) == 0
    before = net.clock
    net.read(t, one, 10)
    assert net.later(t) == -errno.EAGAIN and net.clock - before == 50 * MS
    net.jump = False
    assert net.read(t, one, 10) is None
    net.signal(t, 10)
    assert net.interrupted(t) == EINTR
    assert ERESTARTSYS == -512


def test_files_travel_and_come_out_once(net: NetWorld) -> None:
    one, other = net.pair()
    reader, writer = net.pipe(net.task)
    assert net.send_files(one, b"take", writer) == 4
    net.close(writer)
    file = net.task.files.files[reader].pipe
    assert file.writers == 1
    data, fds, out = net.recv_files(other)
    assert (data, len(fds), out) == (b"take", 1, 0)
    net.close(fds[0])
    assert file.writers == 0


@pytest.mark.parametrize("kind", [STREAM, DGRAM, SEQPACKET])
def test_files_without_room_are_closed(net: NetWorld, kind: int) -> None:
    one, other = net.pair(kind)
    reader, writer = net.pipe(net.task)
    pipe = net.task.files.files[reader].pipe
    assert net.send_files(one, b"x", writer, writer, writer) == 1
    net.close(writer)
    data, fds, out = net.recv_files(other, room=20)
    assert (data, len(fds), out) == (b"x", 1, abi.MSG_CTRUNC)
    assert pipe.writers == 1
    assert net.task.files.files[fds[0]].refs == 1


def test_a_failed_send_gives_references_back(net: NetWorld) -> None:
    one, other = net.pair(flags=NONBLOCK)
    reader, writer = net.pipe(net.task)
    file = net.task.files.files[writer]
    assert net.send_files(one, b"x", writer, 99) == -errno.EBADF
    net.close(other)
    assert net.send_files(one, b"x", writer) in (-errno.EPIPE, None)
    assert file.refs == 1


def test_cycles_are_collected(net: NetWorld) -> None:
    one, other = net.pair()
    third, fourth = net.pair(DGRAM)
    gone = [weakref.ref(net.task.files.files[fd]) for fd in (other, fourth)]
    assert net.send_files(one, b"x", fourth) == 1
    assert net.send_files(third, b"x", other) == 1
    for fd in (one, other, third, fourth):
        net.close(fd)
    net.run()
    gc.collect()
    assert not scm.in_flight and all(ref() is None for ref in gone)


def test_what_is_held_outside_is_no_garbage(net: NetWorld) -> None:
    one, other = net.pair()
    third, fourth = net.pair()
    assert net.send_files(one, b"x", third) == 1  # lies in `other`, which stays open
    net.close(third)
    net.run()
    _, fds, _ = net.recv_files(other)
    assert net.write(net.task, fds[0], b"alive") == 5 and net.read(net.task, fourth, 9) == b"alive"


def test_paths_and_abstract_names(net: NetWorld) -> None:
    t = net.task
    listener = net.do(t, "socket", 1, STREAM, 0)
    assert net.do(t, "bind", listener, *net.name(b"/tmp/s")) == 0
    assert net.do(t, "bind", listener, *net.name(b"/tmp/t")) == -errno.EINVAL
    assert net.do(t, "unlink", net.store(t, b"/tmp/t\0")) == -errno.ENOENT
    client = net.do(t, "socket", 1, STREAM, 0)
    assert net.do(t, "connect", client, *net.name(b"/tmp/s")) == -errno.ECONNREFUSED
    assert net.do(t, "listen", listener, 0) == 0
    assert net.do(t, "connect", client, *net.name(b"/tmp/s")) == 0
    server = net.do(t, "accept", listener, 0, 0)
    assert net.write(t, client, b"q") == 1 and net.read(t, server, 4) == b"q"
    other = net.do(t, "socket", 1, DGRAM, 0)
    assert net.do(t, "connect", other, *net.name(b"/tmp/s")) == -errno.EPROTOTYPE
    assert net.do(t, "bind", other, *net.name(b"\0name")) == 0
    again = net.do(t, "socket", 1, DGRAM, 0)
    assert net.do(t, "bind", again, *net.name(b"\0name")) == -errno.EADDRINUSE
    net.close(other)
    assert net.do(t, "bind", again, *net.name(b"\0name")) == 0


def test_accept_sleeps_and_so_does_connect_to_a_full_backlog(net: NetWorld) -> None:
    t = net.task
    listener = net.do(t, "socket", 1, STREAM, 0)
    net.do(t, "bind", listener, *net.name(b"\0full"))
    net.do(t, "listen", listener, 0)
    child = net.fork(t)
    first, second = net.do(t, "socket", 1, STREAM, 0), net.do(child, "socket", 1, STREAM, 0)
    assert net.do(t, "connect", first, *net.name(b"\0full")) == 0
    assert net.do(child, "connect", second, *net.name(b"\0full")) is None and net.parked(child)
    assert net.do(t, "accept", listener, 0, 0) >= 0
    assert net.later(child) == 0


def test_hostile_lengths(net: NetWorld) -> None:
    t = net.task
    sock = net.do(t, "socket", 1, DGRAM, 0)
    at = net.at(t)
    assert net.do(t, "bind", sock, at, -1) == -errno.EINVAL
    assert net.do(t, "bind", sock, at, 4096) == -errno.EINVAL
    assert net.do(t, "bind", sock, at, 0) == -errno.EINVAL
    assert net.do(t, "bind", sock, 0x10, 8) == -errno.EFAULT
    assert net.do(t, "setsockopt", sock, 1, 20, at, -5) == -errno.EINVAL
    assert net.do(t, "sendmsg", sock, 0x10, 0) == -errno.EFAULT
    header = abi.MSGHDR.pack(0, 0, at, 1 << 40, 0, 0, 0)
    assert net.do(t, "sendmsg", sock, net.store(t, header, MSG), 0) == -errno.EMSGSIZE
    header = abi.MSGHDR.pack(0, 0, at, 0, at, 1 << 40, 0)
    assert net.do(t, "sendmsg", sock, net.store(t, header, MSG), 0) == -errno.ENOBUFS
    net.store(t, struct.pack("<Qii", 1 << 60, 1, 1), CONTROL)
    assert net.do(t, "sendmsg", sock, net.header(0, 16), 0) == -errno.EINVAL
