"""System calls that take paths: Linux's errors in Linux's order."""

from __future__ import annotations

import errno as e
import os

import pytest
from fs_world import AT_FDCWD, FsWorld

from kvmsentry.fs.tmpfs import TmpSuper
from kvmsentry.kernel.task import Credentials

O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_APPEND = 1, 2, 0o100, 0o200, 0o1000, 0o2000
O_DIRECTORY, O_NOFOLLOW, O_NOATIME, O_PATH = 0o200000, 0o400000, 0o1000000, 0o10000000
AT_EMPTY_PATH = 0x1000


@pytest.fixture
def world():
    return FsWorld(ram_limit=64 << 20)


@pytest.fixture
def task(world):
    task = world.task(TmpSuper(world.kernel, mode=0o755))
    task.call(83, b"/d", 0o755)
    task.put(b"/d/f", b"data")
    task.call(88, b"d/f", b"/link")
    task.call(88, b"loop", b"/loop")
    task.call(88, b"gone", b"/dangling")
    return task


@pytest.mark.parametrize(
    ("path", "flags", "result"),
    [
        (b"", 0, -e.ENOENT),
        (b"/nothing", 0, -e.ENOENT),
        (b"/d/f/x", 0, -e.ENOTDIR),
        (b"/d/f/", 0, -e.ENOTDIR),
        (b"/d", O_WRONLY, -e.EISDIR),
        (b"/d", O_CREAT, -e.EISDIR),
        (b"/d/new/", O_CREAT, -e.EISDIR),
        (b"/d/f", O_DIRECTORY, -e.ENOTDIR),
        (b"/d/f", O_CREAT | O_EXCL, -e.EEXIST),
        (b"/link", O_CREAT | O_EXCL, -e.EEXIST),
        (b"/dangling", O_CREAT | O_EXCL, -e.EEXIST),
        (b"/link", O_NOFOLLOW, -e.ELOOP),
        (b"/loop", 0, -e.ELOOP),
        (b"/dangling", 0, -e.ENOENT),
        (b"/d/n", O_CREAT | O_DIRECTORY, -e.EINVAL),
        (b"/" + b"n" * 256, 0, -e.ENAMETOOLONG),
        (b"/" + b"n/" * 2100, 0, -e.ENAMETOOLONG),
        (b"/d/../d/./f", 0, 0),
        (b"//d//f", 0, 0),
        (b"/../d/f", 0, 0),
        (b"/link", O_PATH | O_NOFOLLOW, 0),
        (b"/dangling", O_CREAT | O_WRONLY, 0),
    ],
)
def test_open(task, path, flags, result):
    assert task.open(path, flags) == result


def test_open_of_a_dangling_link_creates_its_target(task):
    assert task.open(b"/dangling", O_CREAT | O_WRONLY) == 0
    assert task.stat(b"/gone")[3] == 0o100644


def test_descriptor_limit_is_asked_first(task):
    task.process.rlimits[7] = (2, 2)
    assert [task.open(b"/d/f"), task.open(b"/d/f"), task.open(b"/made", O_CREAT)] == [0, 1, -e.EMFILE]
    assert task.stat(b"/made") == -e.ENOENT
    task.close(0)
    assert task.open(b"/d/f") == 0


def test_umask_and_mode(task):
    assert task.call(95, 0o027) == 0o022
    task.open(b"/m", O_CREAT | O_WRONLY, 0o666)
    task.call(83, b"/md", 0o777)
    assert task.stat(b"/m")[3] == 0o100640 and task.stat(b"/md")[3] == 0o40750
    # the mode does not bind the one who creates
    assert task.open(b"/none", O_CREAT | O_RDWR, 0) >= 0


def test_permissions(task):
    task.call(90, b"/d/f", 0o640)
    task.call(92, b"/d/f", 5, 6)
    task.creds = Credentials(1000, 1000)
    assert task.open(b"/d/f") == -e.EACCES
    assert task.open(b"/new", O_CREAT) == -e.EACCES
    assert task.call(87, b"/d/f") == -e.EACCES
    assert task.call(90, b"/d/f", 0o777) == -e.EPERM
    assert task.call(92, b"/d/f", 1000, -1) == -e.EPERM
    task.creds = Credentials(1000, 6)
    assert task.open(b"/d/f") == 0
    assert task.open(b"/d/f", O_WRONLY) == -e.EACCES
    task.creds = Credentials(5, 5)
    assert task.open(b"/d/f", O_RDWR) == 1
    assert task.call(90, b"/d/f", 0o4755) == 0
    task.creds = Credentials(0, 0)
    assert task.call(92, b"/d/f", 0, 0) == 0
    assert task.stat(b"/d/f")[3] == 0o100755  # the set-user-id bit is gone


def test_access_is_by_real_ids(task):
    task.call(90, b"/d/f", 0o600)
    assert task.call(21, b"/d/f", 4) == 0
    assert task.call(21, b"/d/f", 1) == -e.EACCES  # not even root runs what nobody may
    task.creds = task.creds.replace(uid=1000, gid=1000)
    assert task.call(21, b"/d/f", 4) == -e.EACCES
    assert task.call(439, AT_FDCWD, b"/d/f", 4, 0x200) == 0  # AT_EACCESS
    assert task.open(b"/d/f") == 0
    assert task.call(21, b"/d/f", 8) == -e.EINVAL


def test_sticky_directory(task):
    task.call(83, b"/t", 0o777)
    task.call(90, b"/t", 0o1777)
    task.put(b"/t/mine", b"")
    task.creds = Credentials(1000, 1000)
    assert task.call(87, b"/t/mine") == -e.EPERM
    assert task.call(82, b"/t/mine", b"/t/yours") == -e.EPERM
    task.put(b"/t/own", b"")
    assert task.call(87, b"/t/own") == 0


def test_set_group_id_directory(task):
    task.call(83, b"/g", 0o777)
    task.call(92, b"/g", 0, 77)
    task.call(90, b"/g", 0o2777)
    task.creds = Credentials(1000, 1000)
    task.put(b"/g/f", b"")
    task.call(83, b"/g/d", 0o755)
    assert task.stat(b"/g/f")[5] == 77 and task.stat(b"/g/d")[3] == 0o42755


@pytest.mark.parametrize(
    ("nr", "args", "result"),
    [
        (83, (b"/", 0o755), -e.EEXIST),
        (83, (b"/d/.", 0o755), -e.EEXIST),
        (83, (b"/x/y", 0o755), -e.ENOENT),
        (83, (b"/dangling", 0o755), -e.EEXIST),
        (83, (b"/ok/", 0o755), 0),
        (84, (b"/d/.",), -e.EINVAL),
        (84, (b"/d/..",), -e.ENOTEMPTY),
        (84, (b"/",), -e.EBUSY),
        (84, (b"/d",), -e.ENOTEMPTY),
        (84, (b"/nothing",), -e.ENOENT),
        (87, (b"/d",), -e.EISDIR),
        (87, (b"/",), -e.EISDIR),
        (87, (b"/d/f/",), -e.ENOTDIR),
        (87, (b"/link",), 0),
        (88, (b"", b"/l"), -e.ENOENT),
        (88, (b"x", b"/l/"), -e.ENOENT),
        (88, (b"x", b"/d"), -e.EEXIST),
        (86, (b"/d", b"/l"), -e.EPERM),
        (86, (b"/nothing", b"/l"), -e.ENOENT),
        (86, (b"/d/f", b"/d"), -e.EEXIST),
        (82, (b"/nothing", b"/x"), -e.ENOENT),
        (82, (b"/d/f", b"/x/"), -e.ENOTDIR),
        (82, (b"/d", b"/x/"), 0),
        (82, (b"/d/.", b"/x"), -e.EBUSY),
        (76, (b"/d", 0), -e.EISDIR),
        (76, (b"/d/f", -1), -e.EINVAL),
        (133, (b"/n", 0o40000, 0), -e.EPERM),
        (133, (b"/n", 0o100644, 0), 0),
        (133, (b"/n", 0o010644, 0), 0),
        (133, (b"/n", 0o170000, 0), -e.EINVAL),
        (161, (b"/d/f",), -e.ENOTDIR),
        (80, (b"/d/f",), -e.ENOTDIR),
        (316, (AT_FDCWD, b"/d", AT_FDCWD, b"/e", 3), -e.EINVAL),
        (263, (AT_FDCWD, b"/d/f", 1), -e.EINVAL),
        (262, (AT_FDCWD, b"/d/f", 0, 1), -e.EINVAL),
    ],
)
def test_errors(task, nr, args, result):
    assert task.call(nr, *args) == result


def test_relative_to_a_descriptor(task):
    fd = task.open(b"/d", O_DIRECTORY)
    assert task.call(257, fd, b"f", 0, 0) == 1
    assert task.call(257, 1, b"x", 0, 0) == -e.ENOTDIR
    assert task.call(257, 99, b"x", 0, 0) == -e.EBADF
    assert task.call(257, 99, b"/d/f", 0, 0) == 2  # not looked at with an absolute path
    assert task.call(262, 1, b"", task.scratch, AT_EMPTY_PATH) == 0
    assert task.call(262, 1, b"", task.scratch, 0) == -e.ENOENT
    path_fd = task.open(b"/d/f", O_PATH)
    assert task.call(5, path_fd, task.scratch) == 0
    assert task.call(91, path_fd, 0o600) == -e.EBADF


def test_chroot_holds(task):
    task.call(83, b"/d/jail", 0o755)
    task.put(b"/d/jail/in", b"in")
    task.call(88, b"/../../in", b"/d/jail/up")
    assert task.call(161, b"/d") == 0 and task.call(80, b"/jail") == 0
    assert task.call(161, b"/jail") == 0
    assert task.slurp(b"/../../in") == b"in" and task.slurp(b"/up") == b"in"
    assert task.stat(b"../../d") == -e.ENOENT
    assert task.call(79, task.scratch, 100) == 2


def test_getcwd(task):
    task.call(80, b"/d")
    assert task.call(79, task.scratch, 3) == 3 and task.mm.read(task.scratch, 3) == b"/d\0"
    assert task.call(79, task.scratch, 2) == -e.ERANGE
    task.call(83, b"/d/sub", 0o755)
    task.call(80, b"sub")
    task.call(82, b"/d/sub", b"/moved")
    assert task.call(79, task.scratch, 100) == 7 and task.mm.read(task.scratch, 7) == b"/moved\0"
    task.call(84, b"/moved")
    assert task.call(79, task.scratch, 100) == -e.ENOENT
    assert task.open(b"x", O_CREAT) == -e.ENOENT
    assert task.stat(b"..")[1] == task.stat(b"/")[1]


def test_openat2(task):
    from kvmsentry.syscall.abi_fs import OPEN_HOW

    def openat2(path: bytes, resolve: int, dirfd: int = AT_FDCWD, flags: int = 0, size: int = 24) -> int:
        task.mm.write(task.scratch, OPEN_HOW.pack(flags, 0, resolve) + b"\1" * 8)
        return task.call(437, dirfd, path, task.scratch, size)

    fd = task.open(b"/d", O_DIRECTORY)
    task.call(88, b"/d/f", b"/d/absolute")
    assert openat2(b"f", 8, fd) >= 0  # RESOLVE_BENEATH
    assert openat2(b"../link", 8, fd) == -e.EXDEV
    assert openat2(b"/d/f", 8, fd) == -e.EXDEV
    assert openat2(b"absolute", 8, fd) == -e.EXDEV
    assert openat2(b"/link", 4) == -e.ELOOP  # RESOLVE_NO_SYMLINKS
    assert openat2(b"/f", 16, fd) >= 0  # RESOLVE_IN_ROOT
    assert openat2(b"../../f", 16, fd) >= 0
    assert openat2(b"/d/f", 64) == -e.EINVAL
    assert openat2(b"/d/f", 0, size=32) == -e.E2BIG
    assert openat2(b"/d/f", 0, size=8) == -e.EINVAL


def test_times(task):
    from kvmsentry.syscall.abi_fs import TIMESPEC2, UTIME_NOW, UTIME_OMIT

    def utimens(path: bytes, *values: int) -> int:
        task.mm.write(task.scratch, TIMESPEC2.pack(*values))
        return task.call(280, AT_FDCWD, path, task.scratch, 0)

    assert utimens(b"/d/f", 10, 20, 30, 40) == 0
    assert task.stat(b"/d/f")[10:14] == (10, 20, 30, 40)[:4]
    assert utimens(b"/d/f", 0, UTIME_OMIT, 50, 60) == 0
    assert task.stat(b"/d/f")[10:14] == (10, 20, 50, 60)
    assert utimens(b"/d/f", 0, 1_000_000_000, 0, 0) == -e.EINVAL
    assert utimens(b"/nothing", 0, UTIME_OMIT, 0, UTIME_OMIT) == 0
    task.creds = Credentials(1000, 1000)
    assert utimens(b"/d/f", 1, 2, 3, 4) == -e.EPERM
    assert utimens(b"/d/f", 0, UTIME_NOW, 0, UTIME_NOW) == -e.EACCES
    assert task.call(132, b"/d/f", 0) == -e.EACCES


def test_text_busy(task):
    from kvmsentry.fs import ops
    from kvmsentry.fs.vfs import walk

    inode = walk(task, b"/d/f").inode
    ops.deny_write(inode)
    assert task.open(b"/d/f", O_WRONLY) == -e.ETXTBSY
    assert task.call(76, b"/d/f", 0) == -e.ETXTBSY
    assert task.open(b"/d/f") == 0
    ops.allow_write(inode)
    fd = task.open(b"/d/f", O_RDWR)
    with pytest.raises(Exception) as caught:
        ops.deny_write(inode)
    assert caught.value.errno == e.ETXTBSY
    task.close(fd)
    ops.deny_write(inode)


def test_directory_positions(task):
    task.call(83, b"/many", 0o755)
    for number in range(50):
        task.put(b"/many/file%02d" % number, b"")
    fd = task.open(b"/many", O_DIRECTORY)
    seen, offsets = [], []
    while n := task.call(217, fd, task.scratch, 200):
        assert n > 0
        data, at = task.mm.read(task.scratch, n), 0
        while at < n:
            offsets.append(int.from_bytes(data[at + 8 : at + 16], "little"))
            size = int.from_bytes(data[at + 16 : at + 18], "little")
            assert size % 8 == 0
            seen.append(data[at + 19 : at + size].split(b"\0")[0])
            at += size
    assert len(seen) == 52 and seen[:2] == [b".", b".."] and len(set(seen)) == 52
    file = task.files.get(fd)
    file.seek(offsets[9], 0)
    n = task.call(217, fd, task.scratch, 40)
    assert task.mm.read(task.scratch + 19, len(seen[10])) == seen[10] and n > 0
    task.put(b"/many/late", b"")
    file.seek(0, 0)
    assert task.call(217, fd, task.scratch, 65536) > 0
    assert b"late" in task.mm.read(task.scratch, 4096)
    assert task.call(217, fd, task.scratch, 65536) == 0
    file.seek(0, 0)
    assert task.call(217, fd, task.scratch, 10) == -e.EINVAL
    assert task.call(217, task.open(b"/d/f"), task.scratch, 100) == -e.ENOTDIR
    file.seek(0, 0)
    n = task.call(78, fd, task.scratch, 4096)  # the old call: type in the last byte
    data = task.mm.read(task.scratch, n)
    assert data[int.from_bytes(data[16:18], "little") - 1] == 4


def test_xattrs(task):
    def put(name: bytes, value: bytes, flags: int = 0, path: bytes = b"/d/f") -> int:
        task.mm.write(task.scratch, value)
        return task.call(188, path, name, task.scratch, len(value), flags)

    def get(name: bytes, size: int = 100, path: bytes = b"/d/f"):
        n = task.call(191, path, name, task.scratch, size)
        return task.mm.read(task.scratch, n) if n >= 0 and size else n

    assert put(b"user.a", b"one") == 0 and get(b"user.a") == b"one"
    assert put(b"user.a", b"", 1) == -e.EEXIST and put(b"user.b", b"", 2) == -e.ENODATA
    assert get(b"user.a", 0) == 3 and get(b"user.a", 2) == -e.ERANGE and get(b"user.none") == -e.ENODATA
    assert put(b"trusted.t", b"x") == 0 and put(b"security.s", b"x") == 0
    assert put(b"system.posix_acl_access", b"x") == -e.EOPNOTSUPP and put(b"other", b"x") == -e.EOPNOTSUPP
    assert put(b"", b"x") == -e.ERANGE and put(b"user." + b"n" * 251, b"x") == -e.ERANGE
    assert put(b"user.big", b"x" * 65537) == -e.E2BIG and put(b"user.a", b"x", 8) == -e.EINVAL
    assert put(b"user.l", b"x", path=b"/link") == 0
    assert task.call(189, b"/link", b"user.l", task.scratch, 1, 0) == -e.EPERM
    n = task.call(194, b"/d/f", task.scratch, 100)
    assert set(task.mm.read(task.scratch, n).split(b"\0")) == {b"user.a", b"user.l", b"trusted.t", b"security.s", b""}
    task.creds = Credentials(1000, 1000)
    assert put(b"trusted.t", b"y") == -e.EPERM and get(b"trusted.t") == -e.ENODATA and get(b"security.s") == b"x"
    assert put(b"user.a", b"y") == -e.EACCES and get(b"user.a") == b"one"
    n = task.call(194, b"/d/f", task.scratch, 100)
    assert b"trusted" not in task.mm.read(task.scratch, n)
    task.creds = Credentials(0, 0)
    assert task.call(197, b"/d/f", b"user.a") == 0 and task.call(197, b"/d/f", b"user.a") == -e.ENODATA


def test_statx_and_statfs(task):
    from kvmsentry.syscall.abi_fs import STATFS, STATX

    assert task.call(332, AT_FDCWD, b"/d/f", 0, 0xFFF, task.scratch) == 0
    x, s = STATX.unpack(task.mm.read(task.scratch, 256)), task.stat(b"/d/f")
    assert x[3:7] == (1, 0, 0, 0o100644) and x[7] == s[1] and x[8] == 4
    assert os.makedev(x[-3], x[-2]) == s[0]
    assert task.call(332, AT_FDCWD, b"/d/f", 0x6000, 0, task.scratch) == -e.EINVAL
    assert task.call(137, b"/d/f", task.scratch) == 0
    assert STATFS.unpack(task.mm.read(task.scratch, 120))[0] == 0x01021994


def test_names_that_are_not_there_do_not_pile_up(task, monkeypatch):
    from kvmsentry.fs import vfs

    monkeypatch.setattr(vfs, "NEGATIVE_LIMIT", 100)
    held = task.open(b"/d/f")
    for number in range(1000):
        task.stat(b"/d/no%d" % number)
        task.stat(b"/no%d" % number)
        task.put(b"/d/t%d" % number, b"")
        task.call(87, b"/d/t%d" % number)
    places = [vfs.walk(task, path).dentry for path in (b"/", b"/d")]
    assert sum(len(dentry.children) for dentry in places) <= 110
    assert not task.files.get(held).path.dentry.unlinked and task.stat(b"/d/f")[7] == 4


def test_writing_takes_set_id_bits(task):
    task.put(b"/prog", b"x", 0o777)
    for act in (
        lambda fd: task.write(fd, b"y"),
        lambda fd: task.call(76, b"/prog", 0),
        lambda fd: task.open(b"/prog", O_WRONLY | O_TRUNC),
    ):
        task.creds = Credentials(0, 0)
        task.call(90, b"/prog", 0o6777)
        fd = task.open(b"/prog", O_WRONLY)
        act(fd)
        assert task.stat(b"/prog")[3] == 0o106777  # root may
        task.creds = Credentials(1000, 1000)
        act(task.open(b"/prog", O_WRONLY))
        assert task.stat(b"/prog")[3] == 0o100777


def test_names_are_charged(world):
    task = world.task(TmpSuper(world.kernel, inodes=5))
    task.put(b"/a", b"")
    for number in range(3):
        assert task.call(86, b"/a", b"/l%d" % number) == 0
    assert task.call(86, b"/a", b"/l9") == -e.ENOSPC and task.open(b"/b", 0o101) == -e.ENOSPC
    task.call(87, b"/a")
    assert task.open(b"/b", 0o101) >= 0
    for name in (b"/l0", b"/l1", b"/l2", b"/b"):
        assert task.call(87, name) == 0
    task.files.close_all()
    assert task.fs.root.mount.sb.inodes == 1
