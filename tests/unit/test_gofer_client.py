"""A hostile or dying server against our client: every call ends in Errno or HostError, and no descriptor stays."""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmsentry.errors import Errno, HostError
from kvmsentry.gofer import p9
from kvmsentry.gofer.client import Client, Node

_ATTR = p9.Attr(0, 1, 0o100644, 0, 0, 1, 0, 5, 4096, 8, 1, 2, 3)
_DIR = _ATTR._replace(mode=0o40755)
Answer = Callable[[socket.socket, bytes], None]


@contextmanager
def served_by(answer: Answer, extended: bool = True) -> Iterator[Client]:
    """A client whose server says hello and is then `answer(sock, request)`; EOFError from that hangs up."""
    ours, theirs = socket.socketpair()
    version = p9.VERSION_EXTENDED if extended else p9.VERSION

    def run() -> None:
        with theirs:
            try:
                while True:
                    request = theirs.recv(1 << 20)
                    if not request:
                        return
                    if request[4] == p9.T.version.number:
                        theirs.sendall(p9.R.version.encode(p9.NOTAG, p9.MSIZE, version))
                    else:
                        answer(theirs, request)
            except (EOFError, OSError):
                pass

    thread = threading.Thread(target=run)
    thread.start()
    client = Client(ours, extensions=extended)
    try:
        yield client
    finally:
        client.close()
        thread.join(20)
        assert not thread.is_alive()


def _saying(reply: bytes) -> Answer:
    return lambda sock, request: sock.sendall(reply)


def _root(client: Client) -> Node:
    return Node(client, 0, _DIR, b"")


_CALLS: list[Callable[[Node], object]] = [
    lambda n: n.lookup(b"a"), lambda n: n.walk([b"a", b"b"]), lambda n: n.getattr(), lambda n: n.readlink(),
    lambda n: n.tree([b"a"], 4096, 2) if n.client.extended else n.readlink(),
    lambda n: n.setattr(mode=1), lambda n: n.statfs(), lambda n: n.readdir_attrs(), lambda n: n.open(0),
    lambda n: n.open_child(b"a", 0), lambda n: n.create(b"a", 2, 0o644), lambda n: n.read(0, 10),
    lambda n: n.write(0, b"abc"), lambda n: n.fsync(), lambda n: n.mkdir(b"a", 0o755), lambda n: n.symlink(b"a", b"b"),
    lambda n: n.mknod(b"a", 0o10644), lambda n: n.link(b"a", n), lambda n: n.rename(b"a", n, b"b"),
    lambda n: n.unlink(b"a"), lambda n: n.getxattr(b"user.a"), lambda n: n.listxattr(),
    lambda n: n.setxattr(b"user.a", b""), lambda n: n.removexattr(b"user.a"), lambda n: n.client.attach("x"),
]  # fmt: skip


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("number", range(len(_CALLS)))
def test_every_call_notices_a_dead_server(number: int, extended: bool) -> None:
    def hang_up(sock: socket.socket, request: bytes) -> None:
        raise EOFError

    with served_by(hang_up, extended) as client:
        root = _root(client)
        with pytest.raises(HostError, match="the gofer is gone"):
            _CALLS[number](root)
        with pytest.raises(HostError, match="the gofer is gone"):  # and stays gone
            root.getattr()
        root.clunk()
        client.flush()


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("number", range(len(_CALLS)))
def test_every_call_passes_errno_on(number: int, extended: bool) -> None:
    with served_by(_saying(p9.LERROR.encode(1, 5)), extended) as client:
        if client.extended and number == 1:
            pass
        try:
            result = _CALLS[number](_root(client))
        except Errno as problem:
            assert problem.errno == EIO
        else:
            assert not extended and result == ([], EIO)  # walk tells it as its second value
        assert not client._gone


def test_an_errno_that_is_none() -> None:
    for ecode in (0, 4096, 0xFFFFFFFF):
        with served_by(_saying(p9.LERROR.encode(1, ecode))) as client:
            with pytest.raises(Errno) as raised:
                _root(client).getattr()
            assert raised.value.errno == EIO


@pytest.mark.parametrize(
    "reply",
    [
        b"\0\0\0\0\0\0\0", b"\xff\xff\xff\xff\x00\x01\x00",  # impossible sizes
        p9.R.attr.encode(2, _ATTR),  # another tag
        p9.R.statfs.encode(1, *[0] * 9),  # an answer to something else
        p9.R.attr.encode(1, _ATTR) + b"more",  # two messages for one request
        struct.pack("<IBH", 87 + 4, 215, 1) + bytes(84),  # too long
        struct.pack("<IBH", 20, 215, 1) + bytes(13),  # too short
        struct.pack("<IBH", p9.MSIZE + 1, 215, 1) + bytes(100),  # over the agreed size
        struct.pack("<IBH", 9, 7, 1) + bytes(2),  # an Rlerror of two bytes
    ],
)  # fmt: skip
def test_answers_that_do_not_fit(reply: bytes) -> None:
    with served_by(_saying(reply)) as client:
        with pytest.raises(HostError, match="the gofer is gone"):
            _root(client).getattr()


def _entries(*names: bytes) -> bytes:
    return b"".join([p9.ENTRY.pack(*_ATTR, len(name)) + name for name in names])


@pytest.mark.parametrize(
    "data, following",
    [
        (_entries(b"a/b"), 0), (_entries(b".."), 0), (_entries(b""), 0), (_entries(b"a\0"), 0),
        (_entries(b"ok") + b"x", 0), (_entries(b"ok")[:-1], 0), (b"", 5), (_entries(b"ok"), 1 << 63),
    ],
)  # fmt: skip
def test_directories_that_lie(data: bytes, following: int) -> None:
    """The last one never ends: the same cookie comes back for ever."""
    with served_by(_saying(p9.R.readdirattr.encode(1, following, data))) as client:
        with pytest.raises(HostError, match="the gofer is gone"):
            _root(client).readdir_attrs()


def _listing(path: bytes, entries: bytes, problem: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<IIH", problem, len(entries) if length is None else length, len(path)) + path + entries


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x", _listing(b"other", b""), _listing(b"d", _entries(b"a/b")), _listing(b"d", _entries(b"ok"))[:-1],
        _listing(b"d", b"", length=1 << 31), _listing(b"d", b"") + b"xx",
    ],
)  # fmt: skip
def test_trees_that_lie(data: bytes) -> None:
    with served_by(_saying(p9.R.tree.encode(1, data))) as client:
        with pytest.raises(HostError, match="the gofer is gone"):
            _root(client).tree([b"d"], 1 << 16, 8)


def test_walks_that_find_what_was_not_asked_for() -> None:
    for error, link, attrs in (
        (0, b"", [_ATTR, _ATTR]), (0, b"", []), (2, b"", [_ATTR, _ATTR, _ATTR]), (0, b"x", []),
    ):  # fmt: skip
        with served_by(_saying(p9.R.walkattr.encode(1, error, link, attrs))) as client:
            with pytest.raises(HostError, match="the gofer is gone"):
                _root(client).lookup(b"a")
        with served_by(_saying(p9.R.walkattr.encode(1, error, link, attrs))) as client:
            if len(attrs) != 2:
                with pytest.raises(HostError, match="the gofer is gone"):
                    _root(client).walk([b"a", b"b"])


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _with_fds(reply: bytes, paths: list[str]) -> Answer:
    def answer(sock: socket.socket, request: bytes) -> None:
        fds = [os.open(path, os.O_RDONLY) for path in paths]
        sock.sendmsg([reply], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        for fd in fds:
            os.close(fd)

    return answer


def test_descriptors_nobody_asked_for(tmp_path: Path) -> None:
    """A directory's descriptor would let the Sentry walk the host; several would fill its table."""
    file = tmp_path / "file"
    file.touch()
    opened = p9.R.openfd.encode(1, _ATTR, b"")
    before = _fds()
    for reply, paths, good in (
        (opened, [str(file)], True), (opened, [str(tmp_path)], False), (opened, ["/dev/null"], False),
        (opened, [str(file)] * 2, False), (opened, [str(file)] * 50, False),
        (p9.LERROR.encode(1, 5), [str(file)], False), (b"junk" * 30, [str(file)], False),
    ):  # fmt: skip
        with served_by(_with_fds(reply, paths)) as client:
            if good:
                fd, _ = _root(client).open(0)
                assert fd is not None
                os.close(fd)
            else:
                with pytest.raises((HostError, Errno)):
                    _root(client).open(0)
        assert _fds() == before
    # With an answer that brings none, the host's kernel drops it.
    with served_by(_with_fds(p9.R.attr.encode(1, _ATTR), [str(file)])) as client:
        assert _root(client).getattr() == _ATTR
    assert _fds() == before


def test_more_data_than_asked_for() -> None:
    with served_by(_saying(p9.R.read.encode(1, b"x" * 11))) as client:
        with pytest.raises(HostError):
            _root(client).read(0, 10)
    with served_by(_saying(p9.R.write.encode(1, 11))) as client:
        with pytest.raises(HostError):
            _root(client).write(0, b"x" * 10)


@pytest.mark.parametrize(
    "reply",
    [p9.R.version.encode(p9.NOTAG, p9.MSIZE, b"unknown"), p9.R.version.encode(p9.NOTAG, p9.MSIZE + 1, p9.VERSION),
     p9.R.version.encode(p9.NOTAG, 100, p9.VERSION), p9.R.version.encode(p9.NOTAG, p9.MSIZE, b"9P2000"),
     p9.LERROR.encode(p9.NOTAG, 5), b"HTTP/1.1 400 Bad Request\r\n\r\n"],
)  # fmt: skip
def test_servers_that_speak_something_else(reply: bytes) -> None:
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            try:
                while theirs.recv(1000):
                    theirs.sendall(reply)
            except OSError:
                pass

    thread = threading.Thread(target=run)
    thread.start()
    with pytest.raises(HostError, match="the gofer is gone"):
        Client(ours)
    thread.join(20)
    assert not thread.is_alive() and ours.fileno() == -1


def test_answers_in_pieces() -> None:
    def drip(sock: socket.socket, request: bytes) -> None:
        for byte in p9.R.attr.encode(1, _ATTR):
            sock.sendall(bytes([byte]))

    with served_by(drip) as client:
        assert _root(client).getattr() == _ATTR


_REPLIES = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.integers(0, 255), st.binary(max_size=200)).map(
        lambda t: struct.pack("<IBH", 7 + len(t[1]), t[0], 1) + t[1]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(_CALLS) - 1), st.booleans(), _REPLIES)
def test_any_answer(number: int, extended: bool, reply: bytes) -> None:
    """Random answers, and random bodies for the answer that is expected: an exception of ours, or a result; no hang."""
    before = _fds()

    def answer(sock: socket.socket, request: bytes) -> None:
        body = reply
        if len(body) > 7:  # make it the answer to this request, so that the body is looked at
            body = struct.pack("<IBH", len(body), request[4] + 1, 1) + body[7:]
        sock.sendall(body or b"\0")
        sock.shutdown(socket.SHUT_WR)

    with served_by(answer, extended) as client:
        root = _root(client)
        try:
            _CALLS[number](root)
        except (Errno, HostError):
            pass
        root.fid = -1
    assert _fds() == before


def test_clunks_ride_with_the_next_request() -> None:
    heard: list[bytes] = []

    def answer(sock: socket.socket, request: bytes) -> None:
        heard.append(request)
        sock.sendall(p9.R.attr.encode(1, _ATTR))

    with served_by(answer) as client:
        root = _root(client)
        for fid in (7, 8):
            Node(client, fid, _ATTR, b"")  # dropped at once
        Node(client, 9, _ATTR, b"").clunk()
        root.getattr()
        assert heard == [p9.T.clunkbatch.encode(1, [7, 8, 9]) + p9.T.attr.encode(1, 0)]
        root.getattr()
        assert heard[1] == p9.T.attr.encode(1, 0)
        assert client.calls == 3  # version and two attributes
