"""The Gofer's server in this process, without a client: garbage and hostile requests in, descriptors counted."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from errno import EBADF, EBUSY, EINVAL, ENOSYS, ENOTEMPTY, EOPNOTSUPP, EROFS
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmsentry.gofer import hostcalls, p9, session
from kvmsentry.gofer.nodes import Tree
from kvmsentry.gofer.server import Server


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def alone(tree: Path) -> Iterator[Server]:
    """A Server in this process, spoken to with handle(); it may change the working directory."""
    here = os.getcwd()
    fd = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    yield Server([Tree(b"t", fd, False)])
    os.close(fd)
    os.chdir(here)


_NAMES = st.sampled_from(
    [b"file", b"dir", b"deep", b"leaf", b"up", b"absolute", b"magic", b"fifo", b"socket", b"new", b"n2", b"..", b".",
     b"", b"/", b"../outside", b"a\0b", b"x" * 256, b"user.x", b"security.capability"]
)  # fmt: skip
_FIDS = st.integers(0, 6)
_NUMBERS = st.sampled_from(
    [0, 1, 2, 0o644, 0o40755, 0o120777, 0o10644, 0o101, 0o100001, 0o2000000, 4096, 1 << 31, 2**32 - 1]
)


def _fuzz_field(name: str, kind: str) -> st.SearchStrategy[object]:
    if "fid" in name and kind == "4":
        return _FIDS
    return {
        "1": st.integers(0, 3), "2": st.integers(0, 65535), "4": _NUMBERS,
        "8": st.sampled_from([0, 1, 5, 1 << 20, 2**63 - 1, 2**63, 2**64 - 1]),
        "s": _NAMES, "d": st.binary(max_size=64), "S": st.lists(_NAMES, max_size=4),
        "w": st.lists(st.tuples(_FIDS, _NAMES), max_size=4), "f": st.lists(_FIDS, max_size=3),
    }[kind.rstrip("?")]  # fmt: skip


_REQUESTS = st.sampled_from(
    [row for row in p9.MESSAGES.values() if row.name[0] == "T" and row.name not in ("Tversion", "Tauth")]
).flatmap(
    lambda row: st.tuples(*[_fuzz_field(name, kind) for name, kind in row.fields]).map(lambda v: row.encode(1, *v))
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_REQUESTS, max_size=30))
def test_any_well_formed_requests(alone: Server, tree: Path, requests: list[bytes]) -> None:
    """Hostile but well-formed requests: each is answered, nothing leaves the tree, no descriptor stays."""
    before = _fds()
    alone.handle(p9.T.version.encode(0xFFFF, p9.MSIZE, p9.VERSION_EXTENDED), 0, 33 + 0)
    alone.handle(p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0), 0, 23)
    for request in requests:
        reply = alone.handle(request, 0, len(request))
        assert (reply is None) == (request[4] == p9.T.clunkbatch.number)
        if reply is not None:
            assert reply[4] in (7, request[4] + 1)
            p9.MESSAGES[reply[4]].decode(reply, 7, len(reply))
        if alone.give >= 0:
            assert stat.S_ISREG(os.fstat(alone.give).st_mode)
            os.close(alone.give)
            alone.give = -1
    alone.reset()
    for node in list(alone.nodes._kept):
        raise AssertionError(f"{node.name!r} kept its descriptor with no fid left")
    assert alone.nodes.pins == 0 and alone.trees[0].root.refs == 1 and not alone.trees[0].root.children
    assert _fds() == before
    assert (tree.parent / "outside" / "secret").read_text() == "secret"
    assert os.listdir(tree.parent / "outside") == ["secret"] and sorted(os.listdir(tree.parent)) == ["outside", "tree"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 255), st.binary(max_size=120))
def test_any_bytes(alone: Server, number: int, body: bytes) -> None:
    alone.extended = True
    message = struct.pack("<IBH", 7 + len(body), number, 1) + body
    try:
        reply = alone.handle(message, 0, len(message))
    except p9.Malformed:
        return
    assert reply is None or reply[4] in (7, number + 1)
    if alone.give >= 0:
        os.close(alone.give)
        alone.give = -1


@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 64, b"\xff" * 64, b"\x06\0\0\0abc", b"GET / HTTP/1.0\r\n\r\n", struct.pack("<IBH", 7, 255, 1),
     struct.pack("<IBH", 8, p9.T.walk.number, 1) + b"x", struct.pack("<IBHIIH", 17, p9.T.walk.number, 1, 0, 1, 9999),
     struct.pack("<IBH", 11, p9.T.attr.number, 1) + b"abcd"],
)  # fmt: skip
def test_garbage_ends_the_connection_in_one_line(
    tree: Path, garbage: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = socket.socketpair()
    fd = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    thread = threading.Thread(target=Server([Tree(b"t", fd, False)]).serve, args=(theirs,))
    thread.start()
    ours.sendall(garbage)
    ours.settimeout(20)
    assert ours.recv(100) == b""
    thread.join(20)
    assert not thread.is_alive()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "closing the connection" in lines[0]
    os.close(fd)
    ours.close()


def test_requests_in_pieces_and_in_heaps(alone: Server) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=alone.serve, args=(theirs,))
    thread.start()
    hello = p9.T.version.encode(0xFFFF, p9.MSIZE, p9.VERSION)
    attach = p9.T.attach.encode(1, 0, p9.NOFID, b"", b"t", 0)
    for byte in hello + attach:
        ours.sendall(bytes([byte]))
    ours.sendall(p9.T.getattr.encode(2, 0, 0) * 50)
    expected = 13 + 6 + len(p9.VERSION) - 6 + 20 + 50 * 160
    got = b""
    ours.settimeout(20)
    while len(got) < expected:
        got += ours.recv(65536)
    at, count = 0, 0
    while at < len(got):
        at += int.from_bytes(got[at : at + 4], "little")
        count += 1
    assert count == 52 and at == len(got) == expected
    ours.close()
    thread.join(20)
    assert not thread.is_alive()


def test_many_fids_need_few_descriptors(alone: Server, tree: Path) -> None:
    for i in range(700):
        (tree / f"d{i}").mkdir()
        (tree / f"d{i}" / "f").touch()
    before = _fds()
    alone.extended = True
    alone.handle(p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0), 0, 23)
    for i in range(700):
        request = p9.T.walkattr.encode(1, 0, [(2 * i + 1, b"d%d" % i), (2 * i + 2, b"f")])
        reply = alone.handle(request, 0, len(request))
        assert reply is not None and reply[4] == 201 and reply[7] == 0
    assert len(alone.fids) == 1401
    assert _fds() - before <= 512
    for i in range(700):  # all of them still work
        request = p9.T.attr.encode(1, 2 * i + 2)
        reply = alone.handle(request, 0, len(request))
        assert reply is not None and reply[4] == 215
    assert _fds() - before <= 512
    alone.reset()
    assert _fds() == before


def test_an_abandoned_directory_is_read_again_and_closed(alone: Server, tree: Path) -> None:
    before = _fds()
    alone.extended = True
    names = set()
    for request in (
        p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0),
        p9.T.readdirattr.encode(1, 0, 0, 200),  # two entries, and more to come
        p9.T.readdirattr.encode(1, 0, 0, 1 << 20),  # from the start
        p9.T.readdirattr.encode(1, 0, 3, 200),  # from the middle, without having read the start
        p9.T.readdirattr.encode(1, 0, 3, 1 << 20),
        p9.T.readdirattr.encode(1, 0, 1 << 60, 1 << 20),  # past the end
    ):
        reply = alone.handle(request, 0, len(request))
        assert reply is not None and reply[4] == request[4] + 1
        if request[4] == p9.T.readdirattr.number:
            following, data = p9.R.readdirattr.decode(reply, 7, len(reply))
            names.add((following, len(data) > 0))
    assert names == {(2, True), (0, True), (5, True), (0, False)}
    request = p9.T.readdirattr.encode(1, 0, 0, 50)  # not even one entry fits
    reply = alone.handle(request, 0, len(request))
    assert reply is not None and reply[4] == 7
    alone.reset()
    assert _fds() == before


def test_limits_on_fids(alone: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FIDS_MOST", 3)
    monkeypatch.setattr(session, "OPENS_MOST", 1)
    alone.extended = True
    answers = []
    for request in (
        p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0),
        p9.T.walkattr.encode(1, 0, [(1, b"dir"), (2, b"deep")]),
        p9.T.walkattr.encode(1, 0, [(3, b"dir")]),  # too many
        p9.T.walk.encode(1, 0, 1, []),  # taken
        p9.T.lopen.encode(1, 1, 0),
        p9.T.lopen.encode(1, 2, 0),  # too many
        p9.T.clunk.encode(1, 9),  # unknown
    ):
        reply = alone.handle(request, 0, len(request))
        assert reply is not None
        answers.append(int.from_bytes(reply[7:11], "little") if reply[4] == 7 else 0)
    assert answers == [0, 0, 24, EBADF, 0, 24, EBADF]
    alone.reset()


def _errno(alone: Server, request: bytes) -> int:
    reply = alone.handle(request, 0, len(request))
    assert reply is not None and reply[4] in (7, request[4] + 1)
    return int.from_bytes(reply[7:11], "little") if reply[4] == 7 else 0


def test_messages_only_other_peers_send(alone: Server, tree: Path) -> None:
    """rename, remove and the locks, which our client has no use for."""
    assert not _errno(alone, p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0))
    assert not _errno(alone, p9.T.walk.encode(1, 0, 1, [b"dir", b"deep"]))
    assert not _errno(alone, p9.T.walk.encode(1, 1, 2, [b"leaf"]))
    assert not _errno(alone, p9.T.rename.encode(1, 1, 0, b"high"))
    assert (tree / "high" / "leaf").exists()
    assert not _errno(alone, p9.T.rename.encode(1, 2, 1, b"leaf2"))
    assert _errno(alone, p9.T.rename.encode(1, 0, 1, b"root")) == EBUSY
    assert _errno(alone, p9.T.remove.encode(1, 1)) == ENOTEMPTY
    assert _errno(alone, p9.T.remove.encode(1, 1)) == EBADF  # gone all the same
    assert not _errno(alone, p9.T.remove.encode(1, 2))
    assert os.listdir(tree / "high") == []
    assert _errno(alone, p9.T.remove.encode(1, 0)) == EBUSY

    assert not _errno(alone, p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0))
    for fid in (1, 2):  # two owners
        assert not _errno(alone, p9.T.walk.encode(1, 0, fid, [b"file"]))
        assert not _errno(alone, p9.T.lopen.encode(1, fid, os.O_RDWR))

    def lock(fid: int, kind: int) -> int:
        request = p9.T.lock.encode(1, fid, kind, 0, 0, 10, 77, b"node")
        return (alone.handle(request, 0, len(request)) or b"")[7]

    assert lock(1, p9.LOCK_WRLCK) == p9.LOCK_SUCCESS
    assert lock(2, p9.LOCK_RDLCK) == p9.LOCK_BLOCKED
    request = p9.T.getlock.encode(1, 2, p9.LOCK_RDLCK, 5, 1, 77, b"node")
    reply = alone.handle(request, 0, len(request))
    assert reply and p9.R.getlock.decode(reply, 7, len(reply)) == (p9.LOCK_WRLCK, 0, 10, 77, b"node")
    assert lock(1, p9.LOCK_UNLCK) == p9.LOCK_SUCCESS
    assert lock(2, p9.LOCK_RDLCK) == p9.LOCK_SUCCESS
    assert _errno(alone, p9.T.lock.encode(1, 2, 3, 0, 0, 10, 77, b"")) == EINVAL
    assert not _errno(alone, p9.T.flush.encode(1, 1))
    alone.trees[0].read_only = True
    create = p9.T.lcreate.encode(1, 0, b"x", 2, 1, 0)
    for request in (p9.T.remove.encode(1, 1), p9.T.rename.encode(1, 2, 0, b"x"), create):
        assert _errno(alone, request) == EROFS
    alone.reset()


def test_an_xattr_of_another_length_than_was_said(alone: Server, tree: Path) -> None:
    assert not _errno(alone, p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0))
    assert not _errno(alone, p9.T.walk.encode(1, 0, 1, [b"file"]))
    assert _errno(alone, p9.T.xattrcreate.encode(1, 1, b"user.x", 1 << 40, 0)) == EINVAL
    assert not _errno(alone, p9.T.xattrcreate.encode(1, 1, b"user.x", 5, 0))
    assert _errno(alone, p9.T.write.encode(1, 1, 0, b"longer")) == EINVAL
    assert _errno(alone, p9.T.write.encode(1, 1, 3, b"x")) == EINVAL
    assert not _errno(alone, p9.T.write.encode(1, 1, 0, b"abc"))
    assert _errno(alone, p9.T.clunk.encode(1, 1)) == EINVAL
    assert os.listxattr(tree / "file") == []
    alone.reset()


def test_chmod_before_linux_6_6(alone: Server, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(fd: int, mode: int) -> None:
        raise OSError(ENOSYS, "Function not implemented")

    monkeypatch.setattr(hostcalls, "fchmod_path", missing)
    assert not _errno(alone, p9.T.attach.encode(1, 0, p9.NOFID, b"", b"", 0))
    for fid, name, answer in ((1, b"file", 0), (2, b"dir", 0), (3, b"fifo", EOPNOTSUPP)):
        assert not _errno(alone, p9.T.walk.encode(1, 0, fid, [name]))
        assert _errno(alone, p9.T.setattr.encode(1, fid, 1, 0o700, 0, 0, 0, 0, 0, 0, 0)) == answer
    assert os.stat(tree / "file").st_mode & 0o777 == os.stat(tree / "dir").st_mode & 0o777 == 0o700
    alone.reset()
