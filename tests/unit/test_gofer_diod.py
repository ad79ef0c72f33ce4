"""Interoperation with diod: our client against its server, its tools against our server.

9P2000.L as somebody else understood it. Needs Debian's package `diod`; without it, nothing here is tested.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from errno import EEXIST, ENODATA, ENOTEMPTY
from pathlib import Path

import pytest

from kvmsentry.errors import Errno
from kvmsentry.gofer import p9
from kvmsentry.gofer.client import NOW, Client, Node
from kvmsentry.gofer.nodes import Tree
from kvmsentry.gofer.server import Server

_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
DIOD, DIODLS, DIODCAT = (shutil.which(tool, path=_PATH) for tool in ("diod", "diodls", "diodcat"))
if not DIOD:
    print("NOT TESTED: interoperation with diod (apt-get install diod)", file=sys.stderr)
pytestmark = pytest.mark.skipif(not DIOD, reason="NOT TESTED: interoperation; apt-get install diod")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("hello")
    (tree / "dir").mkdir()
    os.symlink("file", tree / "link")
    return tree


@pytest.fixture(params=["unix", "descriptor"])
def theirs(request: pytest.FixtureRequest, tree: Path) -> Iterator[Node]:
    """diod's server, on a UNIX socket or a socket pair, attached to by our client."""
    assert DIOD
    ours, far = socket.socketpair()
    address = f"/tmp/kvmsentry-diod-{os.getpid()}"
    where = ["-l", address] if request.param == "unix" else ["-r", str(far.fileno()), "-w", str(far.fileno())]
    command = [DIOD, "-f", "-n", "-N", "-c", "/dev/null", "-e", str(tree), "-L", "stderr", *where]
    server = subprocess.Popen(command, pass_fds=[far.fileno()], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    far.close()
    if request.param == "unix":
        ours = socket.socket(socket.AF_UNIX)
        for _ in range(1000):
            try:
                ours.connect(address)
                break
            except OSError:
                time.sleep(0.01)
        else:
            server.kill()
            raise AssertionError(f"diod did not start: {server.communicate()[1]!r}")
    try:
        client = Client(ours)
        assert not client.extended
        yield client.attach(str(tree), os.geteuid())
        client.flush()
        client.close()
    finally:
        server.kill()
        server.communicate()
        if os.path.exists(address):
            os.unlink(address)


def test_our_client_with_their_server(theirs: Node, tree: Path) -> None:
    root = theirs
    file = root.lookup(b"file")
    assert file is not None and file.attr.size == 5 and file.attr.ino == os.stat(tree / "file").st_ino
    assert root.lookup(b"nothing") is None
    link = root.lookup(b"link")
    assert link is not None and link.target == b"file"
    assert sorted(name for name, _ in root.readdir_attrs()) == [b"dir", b"file", b"link"]

    assert file.open(os.O_RDWR)[0] is None
    data = bytes(range(256)) * 2000
    assert file.write(3, data) == len(data) and file.read(0, 1 << 20) == b"hel" + data
    file.fsync()
    assert (tree / "file").read_bytes() == b"hel" + data
    assert file.lock(p9.LOCK_WRLCK, 0, 0) and file.lock(p9.LOCK_UNLCK, 0, 0)

    attr = file.setattr(mode=0o600, size=4, mtime_ns=1_500_000_000)
    assert (attr.mode & 0o7777, attr.size, attr.mtime_ns) == (0o600, 4, 1_500_000_000)
    assert file.setattr(mtime_ns=NOW).mtime_ns > 10**18
    assert file.statfs().namelen == 255

    made, fd = root.create(b"new", os.O_RDWR | os.O_EXCL, 0o640, os.getegid())
    assert fd is None and made.write(0, b"abc") == 3 and made.read(0, 9) == b"abc"
    with pytest.raises(Errno) as raised:
        root.create(b"new", os.O_RDWR | os.O_EXCL, 0o640)
    assert raised.value.errno == EEXIST

    directory = root.mkdir(b"d", 0o755, os.getegid())
    directory.symlink(b"l", b"../new", os.getegid())
    assert os.readlink(tree / "d" / "l") == "../new"
    fifo = directory.mknod(b"p", stat.S_IFIFO | 0o644, os.getegid())
    assert stat.S_ISFIFO(fifo.attr.mode)
    assert directory.link(b"hard", made).nlink == 2
    directory.rename(b"hard", root, b"moved")
    assert os.path.exists(tree / "moved")
    with pytest.raises(Errno) as raised:
        root.unlink(b"d", directory=True)
    assert raised.value.errno == ENOTEMPTY
    for name in (b"l", b"p"):
        directory.unlink(name)
    root.unlink(b"d", directory=True)
    root.unlink(b"moved")
    assert sorted(os.listdir(tree)) == ["dir", "file", "link", "new"]


def test_their_big_directory(theirs: Node, tree: Path) -> None:
    for i in range(3000):
        (tree / "dir" / f"{i:04d}{'x' * 40}").touch()
    directory = theirs.lookup(b"dir")
    assert directory is not None
    names = [name for name, _ in directory.readdir_attrs()]
    assert len(names) == len(set(names)) == 3000
    assert len(theirs.client._free) < 100  # fids were given back and taken again


def test_their_extended_attributes(theirs: Node, tree: Path) -> None:
    try:
        os.setxattr(tree / "file", "user.probe", b"1")
    except OSError:
        pytest.skip("NOT TESTED: this file system has no user xattrs")
    file = theirs.lookup(b"file")
    assert file is not None
    try:
        assert file.getxattr(b"user.probe") == b"1"
    except Errno as problem:
        pytest.skip(f"NOT TESTED: this diod serves no xattrs here: {problem}")
    file.setxattr(b"user.b", b"value")
    assert os.getxattr(tree / "file", "user.b") == b"value"
    assert sorted(file.listxattr()) == [b"user.b", b"user.probe"]
    file.removexattr(b"user.b")
    with pytest.raises(Errno) as raised:
        file.getxattr(b"user.b")
    assert raised.value.errno == ENODATA


@pytest.fixture
def ours(tree: Path) -> Iterator[tuple[str, list[str]]]:
    """Our server on loopback TCP: its address, and a trace of what was said."""
    listener = socket.create_server(("127.0.0.1", 0))
    trace: list[str] = []
    here = os.getcwd()

    def run() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            fd = os.open(tree, os.O_PATH | os.O_DIRECTORY)
            Server([Tree(b"t", fd, False)], trace=trace.append).serve(sock)
            os.close(fd)

    thread = threading.Thread(target=run)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}", trace
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(20)
    os.chdir(here)
    assert not thread.is_alive()


def _tool(*command: str | None) -> subprocess.CompletedProcess[str]:
    assert command[0]
    return subprocess.run([c for c in command if c], capture_output=True, text=True, timeout=20)


@pytest.mark.skipif(not DIODCAT or not DIODLS, reason="NOT TESTED: this diod package has no diodcat and diodls")
def test_their_tools_with_our_server(ours: tuple[str, list[str]], tree: Path) -> None:
    address, trace = ours
    big = os.urandom(300_000).hex()
    (tree / "big").write_text(big)
    assert _tool(DIODCAT, "-s", address, "-a", "t", "file").stdout == "hello"
    assert _tool(DIODCAT, "-s", address, "-a", "t", "big").stdout == big
    assert sorted(_tool(DIODLS, "-s", address, "-a", "t").stdout.split()) == ["big", "dir", "file", "link"]
    long = _tool(DIODLS, "-l", "-s", address, "-a", "t")
    assert "-rw-r--r--" in long.stdout and "file" in long.stdout
    assert long.stderr.count("npc_walk") == 2  # "." and "..", which we refuse
    missing = _tool(DIODCAT, "-s", address, "-a", "t", "nothing")
    assert "No such file" in missing.stderr
    assert any(line.startswith("Tattach") for line in trace) and not any("Malformed" in line for line in trace)
