"""Device nodes, /sys numbers and the cgroup, through system calls."""

from __future__ import annotations

import errno
import stat as st

import pytest
from dev_world import BUFFER, CLOSE, LSEEK, MMAP, O_RDWR, READ, READLINK, DevWorld

from kvmsentry.fs import devfs
from kvmsentry.fs.proc.nodes import cpu_list, cpu_mask
from kvmsentry.kernel import identity
from kvmsentry.kernel.task import Credentials


@pytest.fixture
def world() -> DevWorld:
    return DevWorld()


@pytest.fixture
def init(world):
    return world.init()


def test_the_usual_nodes(world, init):
    for name, rdev, mode in (
        (b"null", 0x103, 0o666),
        (b"zero", 0x105, 0o666),
        (b"full", 0x107, 0o666),
        (b"random", 0x108, 0o666),
        (b"urandom", 0x109, 0o666),
        (b"tty", 0x500, 0o666),
    ):
        inode = world.place(init, b"/dev/" + name).inode
        assert (inode.rdev, inode.mode) == (rdev, st.S_IFCHR | mode)
    for name, target in ((b"fd", b"/proc/self/fd"), (b"stdin", b"/proc/self/fd/0"), (b"ptmx", b"pts/ptmx")):
        n = world.call(init, READLINK, world.put(init, b"/dev/" + name + b"\0"), BUFFER, 100)
        assert init.mm.read(BUFFER, n) == target
    assert world.place(init, b"/dev/shm").inode.mode == 0o041777
    assert b"core" not in [name for name, _, _ in world.place(init, b"/dev").inode.readdir()]
    assert world.open(init, b"/dev/console") == -errno.ENOENT


def test_null_and_full(world, init):
    null = world.open(init, b"/dev/null", O_RDWR)
    assert world.read(init, null) == b"" and world.write(init, null, b"gone") == 4
    assert world.call(init, LSEEK, null, 100, 0) == 0
    full = world.open(init, b"/dev/full", O_RDWR)
    assert world.write(init, full, b"x") == -errno.ENOSPC and world.read(init, full, 4) == bytes(4)


def test_zero_and_random_by_the_megabyte(world, init):
    length = 5 << 20
    va = world.call(init, MMAP, 0, length, 3, 0x22, (1 << 64) - 1, 0)
    zero, random = world.open(init, b"/dev/zero"), world.open(init, b"/dev/urandom")
    assert world.call(init, READ, random, va, 1 << 20) == 1 << 20
    data = bytes(init.mm.read(va, 1 << 20))
    assert len(set(data[i : i + 16] for i in range(0, 1 << 20, 4096))) == 256
    init.mm.write(va, b"\xff" * 8192)
    n = world.call(init, READ, zero, va, length)
    assert n in (length, 1 << 20)
    assert bytes(init.mm.read(va, 8192)) == bytes(8192)


def test_zero_is_mapped_as_anonymous_memory(world, init):
    zero = world.open(init, b"/dev/zero", O_RDWR)
    private = world.call(init, MMAP, 0, 8192, 3, 2, zero, 0)
    shared = world.call(init, MMAP, 0, 8192, 3, 1, zero, 0)
    assert private > 0 and shared > 0
    child = world.child(init)
    for va, seen in ((private, bytes(3)), (shared, b"abc")):
        init.mm.write(va, b"abc")
        assert child.mm.read(va, 3) == seen
    full = world.open(init, b"/dev/full", O_RDWR)
    assert world.call(init, MMAP, 0, 4096, 3, 2, full, 0) == -errno.ENODEV


def test_entropy_ioctls(world, init):
    fd = world.open(init, b"/dev/random")
    assert world.ioctl(init, fd, devfs.RNDGETENTCNT, bytes(4)) == (0, (256).to_bytes(4, "little"))
    assert world.ioctl(init, fd, 0x1234, 0) == -errno.EINVAL


def test_nodes_work_wherever_they_stand(world, init):
    creds = Credentials()
    root = world.sb.root
    root.mknod(b"mynull", st.S_IFCHR | 0o666, devfs.NULL, creds)
    root.mknod(b"nothing", st.S_IFCHR | 0o666, 0x6363, creds)
    root.mknod(b"disk", st.S_IFBLK | 0o666, 0x800, creds)
    root.mknod(b"pty0", st.S_IFCHR | 0o666, 136 << 8, creds)
    assert world.read(init, world.open(init, b"/mynull")) == b""
    for name in (b"/nothing", b"/disk", b"/pty0"):
        assert world.open(init, name) == -errno.ENXIO
    assert world.open(init, b"/dev/ptmx", O_RDWR) >= 0
    assert world.open(init, b"/pty0", O_RDWR) == -errno.EIO  # it is there, and locked


def test_things_can_be_made_in_dev(world, init):
    world.put(init, b"/dev/mine\0", BUFFER)
    assert world.call(init, 88, world.put(init, b"/proc/self/fd\0"), BUFFER) == 0  # symlink
    assert world.place(init, b"/dev/mine", 0).inode.readlink(init) == b"/proc/self/fd"


def test_kmsg_tells_the_boot_and_what_was_added(world, init):
    fd = world.open(init, b"/dev/kmsg", O_RDWR | 0o4000)
    first = world.read(init, fd)
    assert first.startswith(b"5,0,0,-;Linux version " + identity.RELEASE.encode())
    records = 1
    while isinstance(world.read(init, fd), bytes):
        records += 1
    assert records == len(identity.boot_lines(world.kernel))
    assert world.write(init, fd, b"<3>from the application\n") == 24
    line = world.read(init, fd)
    assert line.startswith(b"3,%d," % records) and line.endswith(b",-;from the application\n")
    assert world.read(init, fd) == -errno.EAGAIN


def test_dmesg_is_the_same_each_time_and_says_nothing_of_the_host(world):
    import os

    text = identity.dmesg(world.kernel)
    assert text == identity.dmesg(world.kernel)
    assert os.uname().release not in text


def test_sys_tells_processors_and_memory(world, init):
    cpus = world.kernel.all_cpus
    assert world.whole(init, b"/sys/devices/system/cpu/online") == cpu_list(cpus).encode() + b"\n"
    names = [name for name, _, _ in world.place(init, b"/sys/devices/system/cpu").inode.readdir()]
    assert sum(name[3:].isdigit() for name in names) == len(cpus)
    assert world.whole(init, b"/sys/devices/system/cpu/cpu0/topology/thread_siblings_list") == b"0\n"
    assert world.whole(init, b"/sys/bus/cpu/devices/cpu0/topology/core_id") == b"0\n"
    assert b"MemTotal: " in world.whole(init, b"/sys/devices/system/node/node0/meminfo")
    assert world.whole(init, b"/sys/class/net/lo/mtu") == b"65536\n"
    assert world.whole(init, b"/sys/kernel/mm/transparent_hugepage/enabled") == b"always [madvise] never\n"
    assert world.open(init, b"/sys/kernel/mm/ksm/run", 1) == -errno.EROFS


def test_cgroup(world, init):
    base = b"/sys/fs/cgroup/"
    assert world.whole(init, base + b"memory.max") == b"%d\n" % (world.kernel.frames.limit_pages * 4096)
    assert world.whole(init, base + b"cgroup.procs") == b"1\n"
    assert world.whole(init, base + b"cpu.max") == b"max 100000\n"
    assert b" - cgroup2 cgroup " in world.whole(init, b"/proc/self/mountinfo")


def test_descriptors_are_not_kept(world, init):
    before = len(init.files.files)
    for name in (b"null", b"zero", b"urandom", b"ptmx", b"kmsg"):
        fd = world.open(init, b"/dev/" + name)
        assert world.call(init, CLOSE, fd) == 0
    assert len(init.files.files) == before and not world.kernel.devices.pts.nodes


@pytest.mark.parametrize(
    ("cpus", "text", "mask"),
    [
        ({0}, "0", "1"),
        ({0, 1, 2, 3}, "0-3", "f"),
        ({0, 2, 3, 9}, "0,2-3,9", "20d"),
        (set(range(40)), "0-39", "ff,ffffffff"),
    ],
)
def test_cpu_sets(cpus, text, mask):
    assert (cpu_list(cpus), cpu_mask(cpus)) == (text, mask)
