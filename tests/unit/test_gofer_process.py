"""The Gofer as a process: where it sits, what it holds, when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from errno import ENODEV, ENOENT
from pathlib import Path

import pytest

from kvmsentry.errors import Errno, HostError
from kvmsentry.gofer.client import Client
from kvmsentry.gofer.process import KEPT_CAPABILITIES, Gofer, TreeSpec, start

ROOT = os.geteuid() == 0
root_only = pytest.mark.skipif(not ROOT, reason="NOT TESTED: namespaces without a user namespace need root")


def _end(gofer: Gofer) -> None:
    gofer.sock.close()
    assert os.waitpid(gofer.pid, 0)[1] == 0


def _status(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def test_it_ends_with_its_connection_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for namespaces in (False, None):
        gofer = start([TreeSpec("t", str(tmp_path))], namespaces)
        assert not os.get_inheritable(gofer.sock.fileno())
        _end(gofer)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_census_of_its_descriptors(tmp_path: Path) -> None:
    """stdio, the connection and one per tree; nothing of the parent's."""
    extra = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(extra, True)
    gofer = start([TreeSpec("a", str(tmp_path)), TreeSpec("b", str(tmp_path))], namespaces=False)
    client = Client(gofer.sock)
    node = client.attach("a")
    (tmp_path / "file").touch()
    for _ in range(9):  # what is given away is not kept
        found, fd = node.open_child(b"file", os.O_RDONLY)
        assert found is not None and fd is not None
        os.close(fd)
    node.getattr()
    assert len(os.listdir(f"/proc/{gofer.pid}/fd")) == 6
    os.close(extra)
    client.close()
    assert os.waitpid(gofer.pid, 0)[1] == 0


@root_only
def test_confinement(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("x")
    mounts = Path("/proc/self/mountinfo").read_text()
    gofer = start([TreeSpec("t", str(tree)), TreeSpec("ro", str(tree), read_only=True)], namespaces=True)
    assert gofer.namespaces == ("mount", "net", "ipc", "uts", "pid")
    assert Path("/proc/self/mountinfo").read_text() == mounts  # nothing is left behind in the host
    status = _status(gofer.pid)
    for which in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status[which], 16) & ~KEPT_CAPABILITIES == 0
    assert int(status["CapAmb"], 16) == int(status["CapInh"], 16) == 0
    assert status["NoNewPrivs"] == "1" and status["Name"] == "kvmsentry-gofer"
    for kind in ("mnt", "net", "ipc", "uts", "pid"):
        assert os.readlink(f"/proc/{gofer.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    assert os.readlink("/proc/self/ns/pid_for_children") == os.readlink("/proc/self/ns/pid")
    # Its root: an empty read-only tmpfs with the trees in it.
    assert sorted(os.listdir(f"/proc/{gofer.pid}/root")) == ["0", "1"]
    lines = Path(f"/proc/{gofer.pid}/mountinfo").read_text().splitlines()
    options = {line.split()[4]: set(line.split()[5].split(",")) for line in lines}
    assert sorted(options) == ["/", "/0", "/1"]
    assert {"nosuid", "nodev", "noexec"} <= options["/0"] and {"ro", "nodev"} <= options["/1"] and "ro" in options["/"]
    client = Client(gofer.sock)
    found = client.attach("t").lookup(b"file")
    assert found is not None and found.attr.size == 1
    assert client.attach("ro").statfs().bsize
    client.close()
    assert os.waitpid(gofer.pid, 0)[1] == 0
    os.rename(tree, tmp_path / "renamed")  # not busy
    assert Path("/proc/self/mountinfo").read_text() == mounts


@pytest.mark.parametrize("namespaces", [False, pytest.param(True, marks=root_only)])
def test_a_tree_of_one_file(tmp_path: Path, namespaces: bool) -> None:
    """A bind mount of a single file: served, without its neighbours."""
    (tmp_path / "hosts").write_text("127.0.0.1")
    (tmp_path / "neighbour").write_text("no")
    gofer = start([TreeSpec("hosts", str(tmp_path / "hosts"))], namespaces)
    client = Client(gofer.sock)
    node = client.attach("hosts")
    fd, _ = node.open(os.O_RDWR)
    assert fd is not None and os.pread(fd, 99, 0) == b"127.0.0.1"
    os.close(fd)
    assert node.setattr(size=3).size == 3 and (tmp_path / "hosts").read_text() == "127"
    for attempt in (lambda: node.lookup(b"neighbour"), lambda: node.lookup(b".."), lambda: node.readdir_attrs()):
        with pytest.raises(Errno):
            attempt()
    client.close()
    os.waitpid(gofer.pid, 0)


def test_a_path_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(HostError) as raised:
        start([TreeSpec("t", str(tmp_path / "nothing"))])
    assert raised.value.errno == ENOENT and "nothing" in str(raised.value)
    with pytest.raises(HostError) as raised:
        start([TreeSpec("t", "/dev/null")])
    assert raised.value.errno == ENODEV


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed, and another process still holds the connection: only the death signal can end it."""
    program = f"""
import os, sys, time
from kvmsentry.gofer.process import start, TreeSpec
gofer = start([TreeSpec("t", {str(tmp_path)!r})], namespaces={None if ROOT else False})
os.set_inheritable(gofer.sock.fileno(), True)
import subprocess
holder = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
print(gofer.pid, holder.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert parent.stdout is not None
    pid, holder = map(int, parent.stdout.readline().split())
    try:
        assert os.path.exists(f"/proc/{pid}")
        parent.kill()
        parent.wait()
        for _ in range(2000):
            if not os.path.exists(f"/proc/{pid}") or _status(pid)["State"].startswith("Z"):
                break
            time.sleep(0.005)
        else:
            raise AssertionError("the gofer outlived its parent")
    finally:
        os.kill(holder, signal.SIGKILL)
        parent.stdout.close()


def test_a_terminals_interrupt_is_not_for_it(tmp_path: Path) -> None:
    gofer = start([TreeSpec("t", str(tmp_path))], namespaces=False)
    assert os.getsid(gofer.pid) == gofer.pid
    _end(gofer)


@pytest.mark.skipif(not ROOT, reason="NOT TESTED: becoming another user needs root")
@pytest.mark.parametrize("namespaces", [False, True])
def test_as_an_ordinary_user(tmp_path: Path, namespaces: bool) -> None:
    """uid 65534, with a user namespace and without: its files are served, and are root's inside the namespace."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)
    os.chown(tree, 65534, 65534)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            gofer = start([TreeSpec("t", str(tree))], namespaces)
            client = Client(gofer.sock)
            node, fd = client.attach("t").create(b"new", os.O_RDWR, 0o600, gid=33, uid=33)
            assert fd is not None
            line = f"{node.attr.uid} {os.fstat(fd).st_uid} {','.join(gofer.namespaces)}"
            client.close()
            os.waitpid(gofer.pid, 0)
        except BaseException as problem:
            line = f"failed: {problem!r}"
        os.write(write_end, line.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        line = pipe.read()
    os.waitpid(pid, 0)
    if namespaces and "allow user namespaces" in line:
        pytest.skip(f"NOT TESTED: this host refuses user namespaces ({line})")
    assert line == ("0 65534 mount,net,ipc,uts,user" if namespaces else "65534 65534 ")
    assert os.stat(tree / "new").st_uid == 65534


def test_the_server_complains_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gofer = start([TreeSpec("t", str(tmp_path))], namespaces=False)
    gofer.sock.sendall(b"\xff" * 100)
    gofer.sock.settimeout(20)
    try:
        assert gofer.sock.recv(10) == b""
    except ConnectionResetError:
        pass
    _end(gofer)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvmsentry: gofer: closing the connection")


def test_many_gofers_at_once(tmp_path: Path) -> None:
    gofers = [start([TreeSpec("t", str(tmp_path))], namespaces=False) for _ in range(5)]
    for gofer in gofers:  # each socket has one owner: closing one ends one
        assert isinstance(gofer.sock, socket.socket)
        _end(gofer)
