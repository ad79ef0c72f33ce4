"""Our client against our Gofer, with the extensions and without: every operation, every way out of the tree we know."""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from errno import (
    EACCES,
    EBADF,
    EEXIST,
    EINVAL,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENODATA,
    ENOENT,
    ENOTDIR,
    ENOTEMPTY,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    EROFS,
    ESTALE,
    EXDEV,
)
from pathlib import Path

import pytest

from kvmsentry.errors import Errno
from kvmsentry.gofer.client import NOW, Client, Node
from kvmsentry.gofer.process import TreeSpec, start

ROOT = os.geteuid() == 0
Connect = Callable[..., Node]


class Errnos:
    """`with Errnos(ENOENT):` - the block must raise Errno with that number."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, problem: object, trace: object) -> bool:
        assert isinstance(problem, Errno), f"expected {self.numbers}, got {problem!r}"
        assert problem.errno in self.numbers, f"expected {self.numbers}, got {problem.errno} {problem}"
        return True


@pytest.fixture(params=["extended", "plain", "confined"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """connect(path, read_only=False) -> root node; a Gofer each time, and each ends with its socket."""
    running: list[tuple[int, Client]] = []

    def connect(path: Path, read_only: bool = False) -> Node:
        if request.param == "confined" and not ROOT:
            pytest.skip("NOT TESTED: the Gofer's own namespaces need root here")
        gofer = start([TreeSpec("t", str(path), read_only)], namespaces=request.param == "confined")
        client = Client(gofer.sock, extensions=request.param != "plain")
        running.append((gofer.pid, client))
        assert client.extended == (request.param != "plain")
        return client.attach("t")

    yield connect
    for pid, client in running:
        client.close()
        assert os.waitpid(pid, 0)[1] == 0


def _find(root: Node, *names: bytes) -> Node:
    nodes, error = root.walk(list(names))
    assert error == 0 and len(nodes) == len(names)
    return nodes[-1]


def _read(node: Node, fd: int | None) -> bytes:
    if fd is None:
        return node.read(0, 1 << 20)
    try:
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


# --- looking ---


def test_attributes_are_the_hosts(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    for name in ("file", "dir", "short", "fifo", "socket"):
        host = os.lstat(tree / name)
        node = root.lookup(name.encode())
        assert node is not None
        attr = node.attr
        assert (attr.mode, attr.uid, attr.gid, attr.nlink, attr.size) == (
            host.st_mode, host.st_uid, host.st_gid, host.st_nlink, host.st_size)  # fmt: skip
        assert (attr.mtime_ns, attr.ctime_ns, attr.blocks) == (host.st_mtime_ns, host.st_ctime_ns, host.st_blocks)
        assert (attr.dev, attr.ino) == (0, host.st_ino)
        assert node.getattr()._replace(atime_ns=0) == attr._replace(atime_ns=0)  # readlink touches atime


def test_a_walk_stops_where_it_must(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    nodes, error = root.walk([b"dir", b"deep", b"leaf"])
    assert [stat.S_IFMT(n.attr.mode) for n in nodes] == [stat.S_IFDIR, stat.S_IFDIR, stat.S_IFREG] and error == 0
    nodes, error = root.walk([b"dir", b"nothing", b"leaf"])
    assert len(nodes) == 1 and error == ENOENT
    nodes, error = root.walk([b"file", b"x"])
    assert len(nodes) == 1 and error == ENOTDIR
    nodes, error = root.walk([b"short", b"leaf"])  # symlinks are the Sentry's to follow
    assert len(nodes) == 1 and error == ENOTDIR and nodes[0].target == b"dir/deep"
    assert nodes[0].readlink() == b"dir/deep"
    assert root.walk([]) == ([], 0)
    assert root.lookup(b"nothing") is None
    with Errnos(ENAMETOOLONG):
        root.lookup(b"x" * 256)
    with Errnos(EINVAL):
        _find(root, b"file").readlink()


def test_a_walk_longer_than_a_message(tree: Path, connect: Connect) -> None:
    deep = tree
    for _ in range(40):
        deep = deep / "d"
    deep.mkdir(parents=True)
    nodes, error = connect(tree).walk([b"d"] * 40)
    assert len(nodes) == 40 and error == 0 and nodes[-1].attr.ino == deep.stat().st_ino


def test_directories_come_with_attributes(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    entries = dict(root.readdir_attrs())
    assert sorted(entries) == sorted(os.fsencode(n) for n in os.listdir(tree))
    for name, attr in entries.items():
        assert attr.ino == os.lstat(tree / os.fsdecode(name)).st_ino
    assert sorted(dict(root.readdir_attrs())) == sorted(entries)  # and again
    with Errnos(ENOTDIR):
        _find(root, b"file").readdir_attrs()
    (tree / os.fsdecode(b"not \xff utf-8\n")).write_text("")
    assert b"not \xff utf-8\n" in dict(root.readdir_attrs())
    assert root.lookup(b"not \xff utf-8\n") is not None


def test_a_tree_comes_in_one_reply(tree: Path, connect: Connect) -> None:
    for name in ("dir/b", "dir/b/c", "dir/empty"):
        (tree / name).mkdir()
    (tree / "dir" / "out").symlink_to("../../outside")
    root = connect(tree)
    if not root.client.extended:
        assert root.tree([b"dir"], 1 << 20, 8) is None
        return
    found = root.tree([b"dir"], 1 << 20, 8)
    assert found is not None and found[0][0] == b"dir"
    shown = {path: {name: attr.ino for name, attr in entries or ()} for path, entries in found}
    for path, names in shown.items():  # depth first, and each as the host has it; nothing through the link
        assert names == {os.fsencode(e.name): e.inode() for e in os.scandir(tree / os.fsdecode(path))}
    assert set(shown) == {b"dir", b"dir/deep", b"dir/b", b"dir/b/c", b"dir/empty"}
    below = root.lookup(b"dir")
    assert below is not None and found[0][1] is not None
    by_python = {name: attr._replace(atime_ns=0) for name, attr in below.readdir_attrs()}  # reading moves atime
    assert {name: attr._replace(atime_ns=0) for name, attr in found[0][1]} == by_python
    level = root.tree([b"dir"], 1 << 20, 0)
    assert level is not None and [path for path, _ in level] == [b"dir"]
    (tree / "second").mkdir()
    (tree / "second" / "x").write_text("")
    both = root.tree([b"dir", b"missing", b"second"], 1 << 20, 0)
    assert both is not None and [path for path, _ in both] == [b"dir", b"second"]
    assert [name for name, _ in both[1][1] or ()] == [b"x"]
    with pytest.raises(Errno):
        root.tree([b"dir", b".."], 1 << 20, 0)
    little = root.tree([b"dir"], 500, 8)
    assert little is not None and 1 <= len(little) < 5
    assert root.tree([b"dir"], 100, 8) == [(b"dir", None)]  # too large for the reply: to be read by itself
    for name in (b"file", b"up", b"absolute", b"missing", b"fifo"):
        assert root.tree([name], 1 << 20, 8) == [(name, None)]
    for name in (b"..", b".", b"", b"dir/deep", b"/"):
        with pytest.raises(Errno):
            root.tree([name], 1 << 20, 8)


def test_a_directory_of_many_messages(tree: Path, connect: Connect) -> None:
    big = tree / "big"
    big.mkdir()
    for i in range(3500):
        (big / f"{i:05d}-{'x' * 60}").touch()
    node = _find(connect(tree), b"big")
    entries = node.readdir_attrs()
    assert len(entries) == len({name for name, _ in entries}) == 3500


# --- the way out ---


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../outside", b"dir/deep", b"/", b"/etc", b"a\0", b"up/secret"])
def test_only_single_names(tree: Path, connect: Connect, name: bytes) -> None:
    root = connect(tree)
    deep = _find(root, b"dir")
    for start_node in (root, deep):
        for attempt in (
            lambda n: n.lookup(name) or (_ for _ in ()).throw(Errno(ENOENT)),
            lambda n: n.open_child(name, os.O_RDONLY)[0] or (_ for _ in ()).throw(Errno(ENOENT)),
            lambda n: n.create(name, os.O_RDWR, 0o644),
            lambda n: n.mkdir(name, 0o755),
            lambda n: n.symlink(name, b"x"),
            lambda n: n.mknod(name, stat.S_IFIFO | 0o644),
            lambda n: n.link(name, _find(root, b"file")),
            lambda n: n.unlink(name),
            lambda n: n.unlink(name, directory=True),
            lambda n: n.rename(b"file", root, name),
            lambda n: n.rename(name, root, b"taken"),
        ):
            with Errnos(EINVAL, ENOENT):
                attempt(start_node)
    assert (tree.parent / "outside" / "secret").read_text() == "secret"
    assert sorted(os.listdir(tree.parent)) == ["outside", "tree"]


@pytest.mark.parametrize("name", [b"up", b"absolute", b"magic"])
def test_symlinks_are_never_followed(tree: Path, connect: Connect, name: bytes) -> None:
    root = connect(tree)
    link = _find(root, name)
    assert stat.S_ISLNK(link.attr.mode)
    nodes, error = root.walk([name, b"secret"])
    assert len(nodes) == 1 and error == ENOTDIR
    with Errnos(ENOTDIR, ELOOP):
        assert link.lookup(b"secret")
    with Errnos(ELOOP):
        link.open(os.O_RDONLY)
    with Errnos(ENOTDIR, ELOOP, EBADF):
        link.readdir_attrs()
    with Errnos(ENOTDIR, ELOOP):
        link.create(b"new", os.O_RDWR, 0o644)
    with Errnos(ELOOP, EEXIST, EISDIR):
        root.create(name, os.O_RDWR, 0o644)
    with Errnos(EOPNOTSUPP):
        link.setattr(mode=0o777)
    with Errnos(EINVAL):
        link.setattr(size=0)
    link.setattr(mtime_ns=5)
    assert os.lstat(tree / os.fsdecode(name)).st_mtime_ns == 5
    assert os.stat(tree.parent / "outside").st_mtime_ns != 5
    assert os.listdir(tree.parent / "outside") == ["secret"]


def test_a_name_that_becomes_a_symlink(tree: Path, connect: Connect) -> None:
    """The object behind a node changes: whoever holds the node gets ESTALE, never the new object."""
    root = connect(tree)
    directory, leaf, file = _find(root, b"dir"), _find(root, b"dir", b"deep", b"leaf"), _find(root, b"file")
    os.rename(tree / "dir", tree / "moved")
    os.symlink("../outside", tree / "dir")
    os.rename(tree / "file", tree / "file2")
    os.symlink("../outside/secret", tree / "file")
    for attempt in (
        lambda: file.open(os.O_RDONLY), lambda: file.getattr(), lambda: file.setattr(size=0),
        lambda: file.setattr(mode=0o777), lambda: file.getxattr(b"user.x"), lambda: root.link(b"l", file),
    ):  # fmt: skip
        with Errnos(ESTALE, ELOOP):
            attempt()
    # A directory whose descriptor is already open goes on being that directory; one that is not is ESTALE.
    for node in (directory, leaf):
        try:
            node.getattr()
            assert node.lookup(b"secret") is None
        except Errno as problem:
            assert problem.errno in (ESTALE, ENOTDIR)
    assert (tree.parent / "outside" / "secret").read_text() == "secret"


def test_a_symlink_to_the_very_same_object(tree: Path, connect: Connect) -> None:
    """Device and inode match behind the link: only O_NOFOLLOW tells the difference."""
    root = connect(tree)
    file, directory = _find(root, b"file"), _find(root, b"dir")
    for name in ("file", "dir"):
        os.rename(tree / name, tree / f"{name}2")
        os.symlink(f"{name}2", tree / name)
    with Errnos(ESTALE, ELOOP):
        file.open(os.O_RDONLY)
    with Errnos(ESTALE, ELOOP, ENOTDIR):
        directory.lookup(b"deep")
    with Errnos(ESTALE, ELOOP, ENOTDIR):
        directory.readdir_attrs()


def test_renames_racing_a_walk(tree: Path, connect: Connect) -> None:
    """A host process keeps swapping a directory for a symlink to the outside while names are walked through it."""
    root = connect(tree)
    (tree / "swap").mkdir()
    (tree / "swap" / "mine").write_text("mine")
    secret = os.stat(tree.parent / "outside" / "secret")
    os.symlink("../outside", tree / "evil")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(tree / "swap", tree / "real")
            os.rename(tree / "evil", tree / "swap")
            os.rename(tree / "swap", tree / "evil")
            os.rename(tree / "real", tree / "swap")

    swapper = threading.Thread(target=swap)
    swapper.start()
    found = 0
    try:
        for _ in range(600):
            try:
                nodes, _ = root.walk([b"swap", b"secret"])
                assert len(nodes) < 2, "walked out of the tree"
                nodes, _ = root.walk([b"swap", b"mine"])
                if len(nodes) == 2:
                    fd = nodes[1].open(os.O_RDONLY)[0]
                    assert _read(nodes[1], fd) == b"mine"
                    found += 1
                for name, attr in nodes[0].readdir_attrs() if nodes else []:
                    assert (attr.ino, name) != (secret.st_ino, b"secret")
            except Errno as problem:
                assert problem.errno in (ESTALE, ENOENT, ENOTDIR, ELOOP, EBADF)
    finally:
        stop.set()
        swapper.join()
    assert found


@pytest.mark.parametrize("name, refusal", [(b"fifo", EACCES), (b"socket", ENXIO)])
def test_only_files_and_directories_are_opened(tree: Path, connect: Connect, name: bytes, refusal: int) -> None:
    root = connect(tree)
    node = _find(root, name)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_NONBLOCK):
        with Errnos(refusal):
            node.open(flags)
    seen, fd = root.open_child(name, os.O_RDONLY)
    assert seen is not None and fd is None and seen.attr.ino == node.attr.ino


@pytest.mark.skipif(not ROOT, reason="NOT TESTED: making a device node needs root")
def test_devices_are_shown_and_not_opened(tree: Path, connect: Connect) -> None:
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    root = connect(tree)
    node = _find(root, b"null")
    assert stat.S_ISCHR(node.attr.mode) and node.attr.rdev == os.makedev(1, 3)
    with Errnos(EACCES):
        node.open(os.O_RDONLY)
    with Errnos(EPERM):
        root.mknod(b"new", stat.S_IFCHR | 0o666)
    assert not (tree / "new").exists()


def test_no_descriptor_of_a_directory_is_given(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    directory = _find(root, b"dir")
    assert directory.open(os.O_RDONLY | os.O_DIRECTORY)[0] is None
    assert root.open_child(b"dir", os.O_RDONLY)[1] is None
    with Errnos(EISDIR):
        directory.open(os.O_RDWR)
    with Errnos(EOPNOTSUPP):
        directory.open(os.O_RDWR | os.O_TMPFILE)


# --- files ---


def test_reading_and_writing(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    file = _find(root, b"file")
    fd, iounit = file.open(os.O_RDWR)
    assert iounit >= 4096
    assert (fd is None) == (not root.client.extended)
    data = random.Random(1).randbytes(3_000_000)
    if fd is not None:
        assert not os.get_inheritable(fd)
        assert os.pwrite(fd, data, 2) == len(data)
        os.close(fd)
    else:
        assert file.write(2, data) == len(data)
        assert file.read(2, len(data) + 9) == data
    file.fsync()
    file.fsync(datasync=True)
    assert (tree / "file").read_bytes() == b"he" + data
    assert file.getattr().size == len(data) + 2
    file.open(os.O_WRONLY | os.O_TRUNC)
    assert (tree / "file").read_bytes() == b""


def test_creating(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    node, fd = root.create(b"new", os.O_RDWR | os.O_EXCL, 0o4640)
    assert node.attr.mode == stat.S_IFREG | 0o4640
    if fd is None:
        node.write(0, b"abc")
    else:
        os.write(fd, b"abc")
        os.close(fd)
    assert (tree / "new").read_text() == "abc"
    with Errnos(EEXIST):
        root.create(b"new", os.O_RDWR | os.O_EXCL, 0o640)
    again, fd = root.create(b"new", os.O_RDWR, 0o600)
    assert _read(again, fd) == b"abc" and again.attr.ino == node.attr.ino
    with Errnos(EISDIR):
        root.create(b"dir", os.O_RDWR, 0o600)
    with Errnos(EACCES, ELOOP):
        root.create(b"fifo", os.O_RDWR, 0o600)
    found, fd = root.open_child(b"new", os.O_RDONLY)
    assert found is not None and _read(found, fd) == b"abc"
    assert root.open_child(b"nothing", os.O_RDONLY) == (None, None)


@pytest.mark.skipif(not ROOT, reason="NOT TESTED: giving files away needs root")
def test_owners(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    node, fd = root.create(b"new", os.O_RDWR, 0o6755, gid=7, uid=5)
    if fd is not None:
        os.close(fd)
        assert node.getattr().mode & 0o7777 == 0o6755
    assert (os.stat(tree / "new").st_uid, os.stat(tree / "new").st_gid) == (5, 7)
    made_here = (root.mkdir(b"d", 0o1755, 7, 5), root.symlink(b"l", b"nowhere", 7, 5), root.mknod(b"f", 0o010644, 7, 5))
    for made in made_here:
        assert (made.attr.uid, made.attr.gid) == (5, 7)
    assert os.stat(tree / "d").st_mode & 0o7777 == 0o1755
    link = _find(root, b"l")
    link.setattr(uid=9)
    assert (os.lstat(tree / "l").st_uid, os.lstat(tree / "l").st_gid) == (9, 7)


def test_attributes_can_be_set(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    file = _find(root, b"file")
    assert file.setattr(mode=0o600).mode & 0o7777 == 0o600
    assert file.setattr(size=3).size == 3 and (tree / "file").read_text() == "hel"
    assert file.setattr(size=9).size == 9 and (tree / "file").read_bytes() == b"hel\0\0\0\0\0\0"
    attr = file.setattr(atime_ns=1_000_000_007, mtime_ns=-5)
    assert (attr.atime_ns, attr.mtime_ns) == (1_000_000_007, -5)
    attr = file.setattr(mtime_ns=NOW)
    assert attr.atime_ns == 1_000_000_007 and attr.mtime_ns > 10**18
    assert _find(root, b"dir").setattr(mode=0o700).mode & 0o777 == 0o700
    assert _find(root, b"fifo").setattr(mode=0o600, mtime_ns=9).mtime_ns == 9
    with Errnos(EISDIR):
        _find(root, b"dir").setattr(size=0)
    with Errnos(EINVAL, 27):  # EFBIG
        file.setattr(size=1 << 63)
    assert root.setattr(mode=0o711).mode & 0o777 == 0o711
    figures = file.statfs()
    assert figures.bsize == os.statvfs(tree).f_bsize and figures.namelen == 255


def test_names_come_and_go(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    made = root.mkdir(b"new", 0o755)
    inner = made.mkdir(b"inner", 0o755)
    inner.symlink(b"l", b"../x")
    assert os.readlink(tree / "new" / "inner" / "l") == "../x"
    with Errnos(ENOTEMPTY):
        root.unlink(b"new", directory=True)
    with Errnos(EISDIR, EPERM):
        root.unlink(b"new")
    with Errnos(EEXIST):
        root.mkdir(b"new", 0o755)
    file = _find(root, b"file")
    assert inner.link(b"hard", file).nlink == 2
    with Errnos(EEXIST):
        inner.link(b"hard", file)
    with Errnos(EPERM):
        root.link(b"loop", made)
    # A renamed directory's nodes, and those beneath it, go with it.
    root.rename(b"new", _find(root, b"dir"), b"newer")
    assert inner.getattr().ino == os.stat(tree / "dir" / "newer" / "inner").st_ino
    hard = inner.lookup(b"hard")
    assert hard is not None and hard.attr.ino == file.attr.ino
    inner.unlink(b"hard")
    inner.unlink(b"l")
    made.unlink(b"inner", directory=True)
    assert os.listdir(tree / "dir" / "newer") == []
    with Errnos(ENOENT):
        root.unlink(b"nothing")
    with Errnos(ENOENT):
        root.rename(b"nothing", root, b"x")


def test_exchange_and_noreplace(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    if not root.client.extended:
        with Errnos(EINVAL):
            root.rename(b"file", root, b"dir", 1)
        return
    file, directory = _find(root, b"file"), _find(root, b"dir")
    with Errnos(EEXIST):
        root.rename(b"file", root, b"dir", 1)
    root.rename(b"file", root, b"dir", 2)
    assert (tree / "dir").read_text() == "hello"
    assert file.getattr().ino == os.stat(tree / "dir").st_ino
    assert directory.lookup(b"deep") is not None
    with Errnos(EINVAL):
        root.rename(b"file", root, b"dir", 3)
    with Errnos(EINVAL):
        root.rename(b"file", root, b"dir", 4)


def test_removed_files_live_on(tree: Path, connect: Connect) -> None:
    root = connect(tree)
    file, again = _find(root, b"file"), _find(root, b"file")
    fd, _ = file.open(os.O_RDWR)
    root.unlink(b"file")
    assert not (tree / "file").exists()
    if fd is not None:
        assert os.pread(fd, 9, 0) == b"hello" and os.fstat(fd).st_nlink == 0
        os.close(fd)
    else:
        assert file.read(0, 9) == b"hello"
    assert file.getattr().nlink == 0
    # The name may be taken by another file; the old nodes stay what they were.
    new, fd = root.create(b"file", os.O_RDWR, 0o644)
    assert new.attr.ino != file.getattr().ino or new.getattr().nlink == 1
    if fd is not None:
        os.close(fd)
        fd, _ = again.open(os.O_RDONLY)
        assert _read(again, fd) == b"hello"
        again.setattr(size=2, mode=0o600)
        assert again.getattr().size == 2 and (tree / "file").read_text() == ""
    # The same when a rename takes the name.
    victim = new
    (tree / "other").write_text("other")
    root.rename(b"other", root, b"file")
    assert victim.getattr().nlink == 0
    found = root.lookup(b"file")
    assert found is not None and found.getattr().size == 5
    # A failed removal changes nothing.
    directory = _find(root, b"dir")
    with Errnos(ENOTEMPTY):
        root.unlink(b"dir", directory=True)
    assert directory.getattr().nlink >= 2 and directory.lookup(b"deep") is not None


def test_extended_attributes(tree: Path, connect: Connect) -> None:
    try:
        os.setxattr(tree / "file", "user.probe", b"1")
    except OSError:
        pytest.skip("NOT TESTED: this file system has no user xattrs")
    root = connect(tree)
    file = _find(root, b"file")
    assert file.getxattr(b"user.probe") == b"1"
    file.setxattr(b"user.b", b"x" * 2000)
    assert os.getxattr(tree / "file", "user.b") == b"x" * 2000
    with Errnos(EEXIST):
        file.setxattr(b"user.b", b"", os.XATTR_CREATE)
    assert sorted(file.listxattr()) == [b"user.b", b"user.probe"]
    file.removexattr(b"user.b")
    with Errnos(ENODATA):
        file.getxattr(b"user.b")
    for name in (b"trusted.x", b"security.selinux", b"security.capability"):
        with Errnos(EOPNOTSUPP):
            file.setxattr(name, b"x")
    root.setxattr(b"user.root", b"r")
    assert os.getxattr(tree, "user.root") == b"r"
    assert _find(root, b"dir").listxattr() == []


# --- read-only ---


def test_a_read_only_tree(tree: Path, connect: Connect) -> None:
    root = connect(tree, read_only=True)
    file, directory = _find(root, b"file"), _find(root, b"dir")
    fd, _ = file.open(os.O_RDONLY)
    assert _read(file, fd) == b"hello"
    for attempt in (
        lambda: file.open(os.O_RDWR), lambda: file.open(os.O_WRONLY), lambda: file.open(os.O_RDONLY | os.O_TRUNC),
        lambda: root.create(b"new", os.O_RDWR, 0o644), lambda: root.create(b"new", os.O_RDONLY, 0o644),
        lambda: root.mkdir(b"new", 0o755), lambda: root.symlink(b"new", b"x"), lambda: root.mknod(b"new", 0o010644),
        lambda: root.link(b"new", file), lambda: root.unlink(b"file"), lambda: root.rename(b"file", root, b"new"),
        lambda: file.setattr(mode=0o600), lambda: file.setattr(size=0), lambda: file.setattr(mtime_ns=NOW),
        lambda: file.setxattr(b"user.x", b""), lambda: file.removexattr(b"user.x"),
        lambda: directory.unlink(b"deep", directory=True),
    ):  # fmt: skip
        with Errnos(EROFS):
            attempt()
    assert (tree / "file").read_text() == "hello" and not (tree / "new").exists()


# --- several trees ---


def test_links_between_trees(tree: Path, tmp_path: Path) -> None:
    """Several trees, found by name and index; nothing is renamed or linked from one into the other."""
    specs = [TreeSpec("a", str(tree)), TreeSpec("b", str(tmp_path / "outside"), read_only=True)]
    gofer = start(specs, namespaces=False)
    client = Client(gofer.sock)
    a, b, by_index = client.attach("a"), client.attach("b"), client.attach("1")
    assert b.attr == by_index.attr and client.attach().attr == a.attr
    with Errnos(ENOENT):
        client.attach("c")
    with Errnos(EROFS):
        a.rename(b"file", b, b"x")
    with Errnos(EROFS):
        a.link(b"x", _find(b, b"secret"))
    client.close()
    os.waitpid(gofer.pid, 0)
    gofer = start([TreeSpec("a", str(tree)), TreeSpec("b", str(tmp_path / "outside"))], namespaces=False)
    client = Client(gofer.sock)
    a, b = client.attach("a"), client.attach("b")
    with Errnos(EXDEV):
        a.rename(b"file", b, b"x")
    with Errnos(EXDEV):
        a.link(b"x", _find(b, b"secret"))
    client.close()
    os.waitpid(gofer.pid, 0)
