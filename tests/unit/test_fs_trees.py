"""Host trees: what is asked of the Gofer and what is not, descriptors, mappings, the overlay's finer points, mounts."""

from __future__ import annotations

import errno as e
import gc
import os

import pytest
from fs_world import AT_FDCWD, FsWorld, gofer

from kvmsentry.errors import Errno, UserError
from kvmsentry.fs import filemap, goferfs, mountops, mounts
from kvmsentry.fs.proc import mounttable
from kvmsentry.fs.tmpfs import TmpSuper
from kvmsentry.fs.vfs import FsContext, walk
from kvmsentry.kernel.task import Credentials

PAGE = 4096
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1, 32, 4096, 8192, 16384, 1 << 18


@pytest.fixture
def world():
    world = FsWorld(ram_limit=64 << 20)
    yield world
    for client in world.clients:
        client.close()


@pytest.fixture
def image(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/conf").write_bytes(b"conf" * 3000)
    (tmp_path / "etc/other").write_bytes(b"other")
    (tmp_path / "bin").mkdir()
    for number in range(10):
        (tmp_path / f"bin/tool{number}").write_bytes(b"#!" * number)
    (tmp_path / "lib").symlink_to("etc")
    return tmp_path


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# -- private trees
def test_a_known_directory_is_not_asked_for_again(world, image):
    task = world.task(world.overlay(str(image)))
    client = world.clients[0]
    task.listing(b"/bin")
    calls = client.calls
    for number in range(10):
        assert task.stat(b"/bin/tool%d" % number)[7] == 2 * number
        assert task.stat(b"/bin/none%d" % number) == -e.ENOENT
    assert client.calls == calls
    assert task.slurp(b"/bin/tool9") == b"#!" * 9
    assert client.calls == calls + 1  # walked and opened in one round trip
    task.slurp(b"/bin/tool9")
    assert client.calls == calls + 1  # its descriptor was kept


def test_looking_around_reads_the_directory(world, image):
    task = world.task(world.overlay(str(image)))
    for number in range(4):
        task.stat(b"/bin/absent%d" % number)
    calls = world.clients[0].calls
    for number in range(100):
        assert task.stat(b"/bin/missing%d" % number) == -e.ENOENT
    assert world.clients[0].calls == calls


def test_descriptors_are_few(world, image, monkeypatch):
    monkeypatch.setattr(goferfs, "IDLE_FDS", 3)
    task = world.task(world.overlay(str(image)))
    before = open_fds()
    for number in range(10):
        task.slurp(b"/bin/tool%d" % number)
    # Ours are three; the Gofer, a thread of this process here, may pin some of its own.
    assert len(world.kernel.tasks[1].fs.root.mount.sb.lower.idle_fds) == 3
    held = task.open(b"/bin/tool1")
    assert task.read(held, 2) == b"#!"
    for number in range(2, 10):
        task.slurp(b"/bin/tool%d" % number)
    assert task.read(held, 2) == b""  # evicted from the cache, but open
    assert open_fds() < before + 40


def test_mapping_is_shared_and_kept(world, image, monkeypatch):
    task = world.task(world.overlay(str(image)))
    fd = task.open(b"/etc/conf")
    one = task.mm.mmap(0, 3 * PAGE, 1, 2, task.files.get(fd).backing(), 0)
    fd2 = task.open(b"/lib/conf")
    two = task.mm.mmap(0, PAGE, 1, 2, task.files.get(fd2).backing(), PAGE)
    assert task.mm.read(one + PAGE, 100) == task.mm.read(two, 100) == (b"conf" * 3000)[PAGE : PAGE + 100]
    assert len(world.memory.mapped) == 1
    task.mm.munmap(one, 3 * PAGE)
    task.mm.munmap(two, PAGE)
    assert len(world.memory.mapped) == 1  # for the next program
    monkeypatch.setattr(filemap, "IDLE_MAPS", 0)
    three = task.mm.mmap(0, PAGE, 1, 2, task.files.get(fd).backing(), 0)
    task.mm.munmap(three, PAGE)
    assert world.memory.mapped == []


def test_what_is_mapped_again_is_warmed_once(world, image, monkeypatch):
    (image / "large").write_bytes(b"L" * (filemap.WARM_AT_ONCE + 3 * PAGE))
    task = world.task(world.overlay(str(image)))
    large = task.files.get(task.open(b"/large")).backing()
    small = task.files.get(task.open(b"/etc/conf")).backing()
    warmed = world.memory.warmed
    for _ in range(3):
        at = task.mm.mmap(0, 3 * PAGE, 5, 2, small, 0)
        task.mm.munmap(at, 3 * PAGE)
    assert [length for _, length in warmed] == [3 * PAGE], "small parts at once, and once only"
    size = filemap.WARM_AT_ONCE + 2 * PAGE
    for uses in range(3):
        task.mm.munmap(task.mm.mmap(0, size, 5, 2, large, 0), size)
        assert len(warmed) == (2 if uses else 1), "large parts when they are mapped again"
    task.mm.munmap(task.mm.mmap(0, size, 3, 2, large, 0), size)
    task.mm.munmap(task.mm.mmap(0, PAGE, 1, 1, large, 0), PAGE)
    assert len(warmed) == 2, "neither what is copied anyway nor what is shared"
    windows = large.map.inode.sb.windows
    assert windows.warm == size + 3 * PAGE
    monkeypatch.setattr(filemap, "WARM_MAX", windows.warm)
    task.mm.munmap(task.mm.mmap(0, PAGE, 5, 2, large, 0), PAGE)
    assert len(warmed) == 2, "up to a limit"
    large.map.unmap()
    assert windows.warm == 3 * PAGE


def test_map_beyond_the_end(world, image):
    task = world.task(world.overlay(str(image)))
    backing = task.files.get(task.open(b"/etc/other")).backing()
    assert [length for _, length in backing.map_pages(0, 2 * PAGE, False)] == [5]
    assert backing.map_pages(PAGE, PAGE, False) == []


# -- the overlay
def test_copy_up_keeps_number_and_open_files(world, image):
    task = world.task(world.overlay(str(image)))
    before = task.stat(b"/etc/conf")
    reader = task.open(b"/etc/conf")
    assert task.read(reader, 4) == b"conf"
    writer = task.open(b"/etc/conf", 1)
    task.write(writer, b"CONF")
    assert task.files.get(reader).pread([memoryview(buf := bytearray(8))], 0) == 8 and buf == b"CONFconf"
    after = task.stat(b"/etc/conf")
    assert after[:2] == before[:2] and after[7] == before[7]
    assert task.listing(b"/etc")[b"conf"][0] == before[1]
    assert (image / "etc/conf").read_bytes() == b"conf" * 3000


def test_attributes_change_without_data(world, image):
    task = world.task(world.overlay(str(image)))
    used = world.frames.used_pages
    assert task.call(90, b"/etc/conf", 0o600) == 0 and task.call(92, b"/etc/conf", 7, 8) == 0
    task.mm.write(task.scratch, b"v")
    assert task.call(188, b"/etc/conf", b"user.k", task.scratch, 1, 0) == 0
    assert task.stat(b"/etc/conf")[3:6] == (0o100600, 7, 8)
    assert world.frames.used_pages == used
    assert (image / "etc/conf").stat().st_mode & 0o777 == 0o644


def test_hard_links_stay_together(world, image):
    os.link(image / "etc/conf", image / "bin/linked")
    task = world.task(world.overlay(str(image)))
    assert task.stat(b"/etc/conf")[1:3] == task.stat(b"/bin/linked")[1:3]
    fd = task.open(b"/bin/linked", 1)
    task.write(fd, b"both")
    assert task.slurp(b"/etc/conf")[:8] == b"bothconf"
    task.call(87, b"/bin/linked")
    assert task.stat(b"/etc/conf")[2] == 1


def test_lower_directory_is_renamed(world, image):
    task = world.task(world.overlay(str(image)))
    assert task.call(82, b"/etc", b"/bin/etc2") == 0
    assert task.slurp(b"/bin/etc2/other") == b"other" and task.stat(b"/etc") == -e.ENOENT
    assert task.call(83, b"/etc", 0o755) == 0
    assert task.listing(b"/etc").keys() == {b".", b".."}  # nothing shines through
    assert b"bin" in task.listing(b"/") and b"etc" in task.listing(b"/")


def test_temporary_names_leave_nothing(world, image):
    sb = world.overlay(str(image))
    task = world.task(sb)
    for number in range(50):
        task.put(b"/etc/tmp%d" % number, b"")
        assert task.call(87, b"/etc/tmp%d" % number) == 0
    assert task.call(87, b"/etc/other") == 0
    entries = walk(task, b"/etc").inode.entries
    assert [name for name, inode in entries.items() if inode is None] == [b"other"]


def test_overlay_limit(world, image):
    task = world.task(world.overlay(str(image), size=8 << 10))
    fd = task.open(b"/etc/conf", 1)
    with pytest.raises(Errno) as caught:
        task.write(fd, b"x")  # 12 KB would have to come up
    assert caught.value.errno == e.ENOSPC
    assert task.slurp(b"/etc/conf") == b"conf" * 3000
    assert task.open(b"/etc/conf", 0o1001) >= 0  # truncated first, nothing comes up


# -- volumes
def test_volume_is_revalidated(world, tmp_path):
    task = world.task(world.gofer_super(str(tmp_path), private=False))
    assert task.stat(b"/f") == -e.ENOENT
    (tmp_path / "f").write_bytes(b"one")
    assert task.slurp(b"/f") == b"one"
    fd = task.open(b"/f")
    (tmp_path / "f").write_bytes(b"longer")
    assert task.stat(b"/f")[7] == 6 and task.read(fd, 10) == b"longer"
    (tmp_path / "f").unlink()
    assert task.stat(b"/f") == -e.ENOENT and b"f" not in task.listing(b"/")
    (tmp_path / "f").mkdir()
    assert task.stat(b"/f")[3] & 0o170000 == 0o040000


def test_volume_append_and_owner(world, tmp_path):
    task = world.task(world.gofer_super(str(tmp_path), private=False), 0)
    task.creds = Credentials(1234, 1234)
    os.chmod(tmp_path, 0o777)
    fd = task.open(b"/log", 0o2101, 0o640)
    task.write(fd, b"a")
    with open(tmp_path / "log", "ab") as other:
        other.write(b"b")
    task.write(fd, b"c")
    assert (tmp_path / "log").read_bytes() == b"abc"
    assert (tmp_path / "log").stat().st_uid == 1234 and (tmp_path / "log").stat().st_mode & 0o777 == 0o640
    assert task.files.get(fd).seek(0, 2) == 3


def test_unlinked_but_open_on_a_volume(world, tmp_path):
    task = world.task(world.gofer_super(str(tmp_path), private=False))
    fd = task.open(b"/f", 0o102)
    task.write(fd, b"still")
    task.call(87, b"/f")
    assert task.call(5, fd, task.scratch) == 0
    file = task.files.get(fd)
    file.pos = 0
    assert task.read(fd, 9) == b"still" and file.inode.nlink == 0


def test_read_only_tree(world, image):
    task = world.task(world.gofer_super(str(image), private=True, readonly=True))
    assert task.open(b"/etc/conf", 1) == -e.EROFS and task.open(b"/new", 0o101) == -e.EROFS
    assert task.call(83, b"/x", 0o755) == -e.EROFS and task.call(83, b"/etc", 0o755) == -e.EEXIST
    assert task.call(87, b"/etc/conf") == -e.EROFS and task.call(90, b"/etc/conf", 0) == -e.EROFS
    assert task.call(21, b"/etc/conf", 2) == -e.EROFS
    assert task.slurp(b"/etc/other") == b"other"


# -- mounts
@pytest.fixture
def task(world):
    task = world.task(TmpSuper(world.kernel))
    for name in (b"/a", b"/b", b"/a/in"):
        task.call(83, name, 0o755)
    task.put(b"/file", b"file")
    return task


def mount(task, source: bytes, target: bytes, fstype: bytes, flags: int = 0, data: bytes = b"") -> int:
    return task.call(165, source, target, fstype, flags, data)


def test_mount_and_umount(task):
    assert mount(task, b"none", b"/a", b"tmpfs", 2, b"size=64k,mode=700") == 0
    assert task.stat(b"/a")[3] == 0o40700 and task.stat(b"/a/in") == -e.ENOENT
    assert task.stat(b"/a/..")[1] == task.stat(b"/")[1]
    task.put(b"/a/x", b"x")
    assert task.call(82, b"/a/x", b"/x") == -e.EXDEV and task.call(86, b"/a/x", b"/x") == -e.EXDEV
    assert task.call(84, b"/a") == -e.EBUSY and task.call(82, b"/a", b"/c") == -e.EBUSY
    assert b" /a tmpfs rw,nosuid,relatime,size=64k,mode=700 0 0\n" in mounttable.mounts_text(task)
    assert b" /a rw,nosuid,relatime - tmpfs none rw,size=64k,mode=700\n" in mounttable.mountinfo_text(task)
    fd = task.open(b"/a/x")
    assert task.call(166, b"/a", 0) == -e.EBUSY
    assert task.call(166, b"/a", 2) == 0  # MNT_DETACH
    assert task.read(fd, 1) == b"x" and task.stat(b"/a/in")[3] & 0o40000
    assert task.call(166, b"/a", 0) == -e.EINVAL
    assert mount(task, b"none", b"/a", b"nonsense") == -e.ENODEV
    assert mount(task, b"none", b"/a", b"tmpfs", 0, b"size=lots") == -e.EINVAL
    assert mount(task, b"none", b"/file", b"tmpfs") == -e.ENOTDIR
    task.creds = Credentials(1000)
    assert mount(task, b"none", b"/a", b"tmpfs") == -e.EPERM


def test_unmounted_memory_comes_back(world, task):
    gc.collect()
    before = world.census()
    mount(task, b"none", b"/a", b"tmpfs")
    task.put(b"/a/big", b"x" * 1_000_000)
    assert world.census() > before
    assert task.call(166, b"/a", 0) == 0
    gc.collect()
    assert world.census() == before


def test_bind_mounts(task):
    assert mount(task, b"/a", b"/b", b"", MS_BIND) == 0
    task.put(b"/b/in/f", b"seen")
    assert task.slurp(b"/a/in/f") == b"seen"
    assert mount(task, b"", b"/b", b"", MS_REMOUNT | MS_BIND | MS_RDONLY) == 0
    assert task.open(b"/b/in/f", 1) == -e.EROFS and task.open(b"/a/in/f", 1) >= 0
    assert task.call(84, b"/b/in") == -e.EROFS
    task.put(b"/target", b"")
    assert mount(task, b"/file", b"/target", b"", MS_BIND) == 0 and task.slurp(b"/target") == b"file"
    assert task.call(87, b"/target") == -e.EBUSY
    assert mount(task, b"/file", b"/a", b"", MS_BIND) == -e.ENOTDIR
    assert b" /a /b ro,relatime - " in mounttable.mountinfo_text(task)


def test_recursive_bind_and_move(task):
    mount(task, b"none", b"/a/in", b"tmpfs")
    task.put(b"/a/in/f", b"deep")
    assert mount(task, b"/a", b"/b", b"", MS_BIND | MS_REC) == 0 and task.slurp(b"/b/in/f") == b"deep"
    task.call(83, b"/c", 0o755)
    assert mount(task, b"/b/in", b"/c", b"", MS_MOVE) == 0
    assert task.slurp(b"/c/f") == b"deep" and task.stat(b"/b/in/f") == -e.ENOENT
    assert mount(task, b"/a", b"/c", b"", MS_MOVE) == -e.EINVAL
    assert mount(task, b"", b"/", b"", MS_REC | MS_PRIVATE) == 0


def test_namespace_copy_and_pivot(task):
    mount(task, b"none", b"/b", b"tmpfs")
    task.call(83, b"/b/old", 0o755)
    old_root = task.fs.root
    old_root.mount.namespace.users += 1  # somebody else is there too
    mountops.copy_namespace(task.fs)
    assert task.fs.root.mount is not old_root.mount
    assert task.call(155, b"/b", b"/b/old") == 0
    assert task.slurp(b"/old/file") == b"file" and task.stat(b"/file") == -e.ENOENT
    assert task.call(80, b"/") == 0 and task.call(166, b"/old", 2) == 0
    assert task.listing(b"/").keys() == {b".", b"..", b"old"}
    task.fs.root = task.fs.cwd = old_root
    assert task.stat(b"/b/old")[3] & 0o40000  # the first namespace knows nothing of it


def test_build(world, image, tmp_path_factory, monkeypatch):
    data = tmp_path_factory.mktemp("volume")
    (data / "v").write_bytes(b"from the host")
    for name in ("proc", "sysfs", "cgroup2", "devpts", "devtmpfs"):
        monkeypatch.setitem(mounts.fstypes, name, mounts.fstypes["ramfs"])
    client = gofer(("root", str(image), True), ("volume0", str(data), False))
    world.clients.append(client)
    namespace = mounts.build(world.kernel, client, volumes=[("volume0", b"/srv/deep/data", False)])
    task = world.task(TmpSuper(world.kernel))
    task.fs = FsContext(namespace.top(), namespace.top())
    assert task.slurp(b"/srv/deep/data/v") == b"from the host"
    task.put(b"/srv/deep/data/new", b"to the host")
    assert (data / "new").read_bytes() == b"to the host"
    task.put(b"/etc/conf", b"ours")
    assert not (image / "srv").exists() and not (image / "proc").exists()
    assert task.call(83, b"/dev/shm/x", 0o755) == 0
    text = mounttable.mounts_text(task).decode()
    assert [line.split()[1] for line in text.splitlines()][:2] == ["/", "/proc"]
    with pytest.raises(UserError):
        mounts.build(world.kernel, client, volumes=[("nothing", b"/x", False)])


def test_read_only_root(world, image, monkeypatch):
    for name in ("proc", "sysfs", "cgroup2", "devpts", "devtmpfs"):
        monkeypatch.setitem(mounts.fstypes, name, mounts.fstypes["ramfs"])
    client = gofer(("root", str(image), True))
    world.clients.append(client)
    namespace = mounts.build(world.kernel, client, readonly_root=True)
    task = world.task(TmpSuper(world.kernel))
    task.fs = FsContext(namespace.top(), namespace.top())
    assert task.open(b"/etc/conf", 1) == -e.EROFS
    assert task.open(b"/dev/shm/x", 0o101) >= 0
    assert task.call(280, AT_FDCWD, b"/etc/conf", 0, 0) == -e.EROFS
