"""The overlay against a real directory: the same random operations on both, then the same names, contents and
attributes."""

from __future__ import annotations

import errno
import os
import shutil
import stat as st
import tempfile

from fs_world import AT_FDCWD, FsTask, FsWorld
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

NAMES = [b"a", b"b", b"dir", b"dir/x", b"dir/y", b"dir/sub", b"dir/sub/z", b"new", b"new/n", b"link", b"big", b"hard1",
b"hard2",
         b"dir/loop"]  # fmt: skip
names = hs.sampled_from(NAMES)
OPERATIONS = hs.one_of(
    hs.tuples(hs.just("write"), names, hs.integers(0, 9000), hs.binary(max_size=40)),
    hs.tuples(hs.just("create"), names, hs.sampled_from([0o101, 0o301, 0o1101, 0o2102]), hs.binary(max_size=20)),
    hs.tuples(hs.just("mkdir"), names),
    hs.tuples(hs.just("unlink"), names),
    hs.tuples(hs.just("rmdir"), names),
    hs.tuples(hs.just("rename"), names, names, hs.sampled_from([0, 0, 0, 1, 2])),
    hs.tuples(hs.just("link"), names, names),
    hs.tuples(hs.just("symlink"), hs.sampled_from([b"a", b"dir", b"./a", b"gone", b"dir/"]), names),
    hs.tuples(hs.just("truncate"), names, hs.integers(0, 20000)),
    hs.tuples(hs.just("chmod"), names, hs.integers(0, 0o777).map(lambda mode: mode | 0o700)),
    hs.tuples(hs.just("open"), names),
    hs.tuples(hs.just("held_write"), hs.integers(0, 3), hs.integers(0, 9000), hs.binary(min_size=1, max_size=20)),
)


def populate(root: bytes) -> None:
    """The image both sides start from."""
    os.makedirs(root + b"/dir/sub")
    for name, data in ((b"a", b"alpha"), (b"dir/x", b"x" * 5000), (b"dir/sub/z", b"z"), (b"big", bytes(range(256)) *
    50),
                       (b"hard1", b"linked")):  # fmt: skip
        with open(root + b"/" + name, "wb") as file:
            file.write(data)
    os.link(root + b"/hard1", root + b"/hard2")
    os.symlink(b"dir/x", root + b"/link")
    os.symlink(b"loop", root + b"/dir/loop")


class Host:
    """The operations by the host's kernel."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.held: list[int] = []

    def path(self, name: bytes) -> bytes:
        return self.root + b"/" + name

    def run(self, operation) -> int:
        try:
            return getattr(self, operation[0])(*operation[1:]) or 0
        except OSError as error:
            return -(error.errno or 0)

    def write(self, name, offset, data):
        fd = os.open(self.path(name), os.O_WRONLY)
        try:
            return os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def create(self, name, flags, data):
        fd = os.open(self.path(name), flags, 0o644)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)

    def mkdir(self, name):
        os.mkdir(self.path(name), 0o755)

    def unlink(self, name):
        os.unlink(self.path(name))

    def rmdir(self, name):
        os.rmdir(self.path(name))

    def rename(self, old, new, flags):
        from kvmsentry.gofer import hostcalls

        hostcalls.renameat2(-100, self.path(old), -100, self.path(new), flags)

    def link(self, old, new):
        os.link(self.path(old), self.path(new), follow_symlinks=False)

    def symlink(self, target, name):
        os.symlink(target, self.path(name))

    def truncate(self, name, size):
        os.truncate(self.path(name), size)

    def chmod(self, name, mode):
        os.chmod(self.path(name), mode)

    def open(self, name):
        fd = os.open(self.path(name), os.O_RDWR)
        self.held.append(fd)

    def held_write(self, index, offset, data):
        if index >= len(self.held):
            return 0
        return os.pwrite(self.held[index], data, offset)

    def snapshot(self) -> dict[bytes, tuple]:
        out = {}
        inodes: dict[int, int] = {}

        def look(name: bytes) -> None:
            path = self.root + name
            s = os.lstat(path)
            number = inodes.setdefault(s.st_ino, len(inodes))
            kind = st.S_IFMT(s.st_mode)
            entry: tuple = (number, oct(s.st_mode), s.st_nlink)
            if kind == st.S_IFREG:
                with open(path, "rb") as file:
                    entry += (file.read(),)
            elif kind == st.S_IFLNK:
                entry += (os.readlink(path),)
            out[name] = entry
            if kind == st.S_IFDIR:
                for child in sorted(os.listdir(path)):
                    look(name + b"/" + child)

        look(b"")
        return out


class Guest:
    """The same by our system calls."""

    def __init__(self, task: FsTask) -> None:
        self.task = task
        self.held: list[int] = []

    def run(self, operation) -> int:
        return getattr(self, operation[0])(*operation[1:]) or 0

    def _with(self, name, flags, use) -> int:
        fd = self.task.open(b"/" + name, flags)
        if fd < 0:
            return fd
        try:
            return use(fd)
        finally:
            self.task.close(fd)

    def _pwrite(self, fd, offset, data) -> int:
        return self.task.files.get_io(fd).pwrite([memoryview(bytearray(data))], offset)

    def write(self, name, offset, data):
        return self._with(name, 1, lambda fd: self._pwrite(fd, offset, data))

    def create(self, name, flags, data):
        return self._with(name, flags, lambda fd: self.task.write(fd, data) if data else 0)

    def mkdir(self, name):
        return self.task.call(83, b"/" + name, 0o755)

    def unlink(self, name):
        return self.task.call(87, b"/" + name)

    def rmdir(self, name):
        return self.task.call(84, b"/" + name)

    def rename(self, old, new, flags):
        return self.task.call(316, AT_FDCWD, b"/" + old, AT_FDCWD, b"/" + new, flags)

    def link(self, old, new):
        return self.task.call(86, b"/" + old, b"/" + new)

    def symlink(self, target, name):
        return self.task.call(88, target, b"/" + name)

    def truncate(self, name, size):
        return self.task.call(76, b"/" + name, size)

    def chmod(self, name, mode):
        return self.task.call(90, b"/" + name, mode)

    def open(self, name):
        fd = self.task.open(b"/" + name, 2)
        if fd < 0:
            return fd
        self.held.append(fd)
        return 0

    def held_write(self, index, offset, data):
        if index >= len(self.held):
            return 0
        return self._pwrite(self.held[index], offset, data)

    def snapshot(self) -> dict[bytes, tuple]:
        out = {}
        inodes: dict[int, int] = {}

        def look(name: bytes) -> None:
            s = self.task.stat(name or b"/", follow=False)
            number = inodes.setdefault(s[1], len(inodes))
            kind = st.S_IFMT(s[3])
            entry: tuple = (number, oct(s[3]), s[2])
            if kind == st.S_IFREG:
                data = self.task.slurp(name)
                assert len(data) == s[7]
                entry += (data,)
            elif kind == st.S_IFLNK:
                n = self.task.call(89, name, self.task.scratch, 4096)
                entry += (self.task.mm.read(self.task.scratch, n),)
            out[name] = entry
            if kind == st.S_IFDIR:
                listing = self.task.listing(name or b"/")
                for child in sorted(set(listing) - {b".", b".."}):
                    path = name + b"/" + child
                    seen = self.task.stat(path, follow=False)
                    assert listing[child] == (seen[1], seen[3] >> 12)
                    look(path)

        look(b"")
        return out


def same(ours: int, theirs: int, operation) -> bool:
    """Is our result the host's, or one of the two that Linux may give?"""
    if operation[0] == "rename" and ours < 0 and theirs < 0:
        return True  # which of two faults is named first depends on the host's file system
    if theirs == -errno.EXDEV:
        return True
    return ours == theirs


def check(operations, root_of) -> None:
    base = os.fsencode(tempfile.mkdtemp(prefix="kvmsentry-model-"))
    try:
        image, real = base + b"/image", base + b"/real"
        populate(image)
        before = Host(image).snapshot()
        populate(real)
        host = Host(real)
        world = FsWorld(ram_limit=64 << 20)
        task = world.task(root_of(world, os.fsdecode(image)), 0)
        task.fs.umask = os.umask(0o022)
        os.umask(task.fs.umask)
        guest = Guest(task)
        for operation in operations:
            ours, theirs = guest.run(operation), host.run(operation)
            assert same(ours, theirs, operation), (operation, ours, theirs)
        assert guest.snapshot() == host.snapshot()
        for fd in host.held:
            os.close(fd)
        assert root_of is volume or Host(image).snapshot() == before, "the lower tree was written"
        for client in world.clients:
            client.close()
    finally:
        shutil.rmtree(base)


def overlay(world: FsWorld, image: str):
    return world.overlay(image)


def volume(world: FsWorld, image: str):
    return world.gofer_super(image, private=False)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hs.lists(OPERATIONS, max_size=25))
def test_overlay_is_a_directory_tree(operations):
    check(operations, overlay)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hs.lists(OPERATIONS, max_size=20))
def test_volume_is_a_directory_tree(operations):
    check(operations, volume)
