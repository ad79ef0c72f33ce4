"""eventfd, timerfd, signalfd, memfd, inotify."""

from __future__ import annotations

import errno
import struct

import pytest
from io_world import MS, IoWorld

from kvmsentry.fs import inotify, vfs
from kvmsentry.kernel import signals
from kvmsentry.kernel.task import SigInfo

O_NONBLOCK, O_CLOEXEC = 0o4000, 0o2000000
POLLIN, POLLOUT, POLLERR = 1, 4, 8
FULL = (1 << 64) - 1


@pytest.fixture
def io():
    return IoWorld()


def poll(io, task, fd, events=POLLIN | POLLOUT):
    at = io.store(task, struct.pack("<ihh", fd, events, 0))
    assert io.do(task, "poll", at, 1, 0) >= 0
    return struct.unpack("<ihh", io.load(task, 8))[2]


def u64(value):
    return struct.pack("<Q", value)


# -- eventfd
def test_eventfd_counts(io):
    t = io.task
    fd = io.do(t, "eventfd2", 3, O_NONBLOCK | O_CLOEXEC)
    assert t.files.cloexec == {fd}
    assert io.read(t, fd, 8) == u64(3)
    assert io.read(t, fd, 8) == -errno.EAGAIN
    assert poll(io, t, fd) == POLLOUT
    assert io.write(t, fd, u64(5)) == 8 and io.write(t, fd, u64(6)) == 8
    assert poll(io, t, fd) == POLLIN | POLLOUT
    assert io.read(t, fd, 100) == u64(11)
    assert io.read(t, fd, 7) == -errno.EINVAL and io.write(t, fd, b"1234567") == -errno.EINVAL
    assert io.write(t, fd, u64(FULL)) == -errno.EINVAL
    assert io.write(t, fd, u64(FULL - 1)) == 8
    assert poll(io, t, fd) == POLLIN
    assert io.write(t, fd, u64(1)) == -errno.EAGAIN
    assert io.do(t, "eventfd2", 0, 2) == -errno.EINVAL


def test_eventfd_blocks_both_ways(io):
    t = io.task
    fd = io.do(t, "eventfd2", 0, 1)  # semaphore
    other = io.thread(t)
    assert io.read(other, fd, 8) is None
    assert io.write(t, fd, u64(2)) == 8
    assert io.got(other) == u64(1)
    assert io.read(t, fd, 8) == u64(1)
    assert io.write(t, fd, u64(FULL - 1)) == 8
    assert io.write(other, fd, u64(1)) is None
    assert io.read(t, fd, 8) == u64(1)
    assert io.later(other) == 8


# -- timerfd
def settime(io, task, fd, value, interval=0, flags=0, old=0):
    spec = struct.pack("<qqqq", interval // 10**9, interval % 10**9, value // 10**9, value % 10**9)
    return io.do(task, "timerfd_settime", fd, flags, io.store(task, spec), old)


def gettime(io, task, fd):
    assert io.do(task, "timerfd_gettime", fd, io.at(task)) == 0
    interval, inano, value, nano = struct.unpack("<qqqq", io.load(task, 32))
    return interval * 10**9 + inano, value * 10**9 + nano


def test_a_timer_expires_once(io):
    t = io.task
    fd = io.do(t, "timerfd_create", 1, 0)
    io.jump = False
    assert settime(io, t, fd, 50 * MS) == 0
    assert gettime(io, t, fd) == (0, 50 * MS)
    began = io.clock
    assert io.read(t, fd, 8) is None
    io.jump = True
    assert io.got(t) == u64(1) and io.clock == began + 50 * MS
    assert gettime(io, t, fd) == (0, 0) and poll(io, t, fd) == 0


def test_periods_missed_are_counted(io):
    t = io.task
    io.jump = False
    fd = io.do(t, "timerfd_create", 1, O_NONBLOCK)
    settime(io, t, fd, 10 * MS, 10 * MS)
    assert io.read(t, fd, 8) == -errno.EAGAIN
    io.clock += 35 * MS
    assert poll(io, t, fd) == POLLIN
    assert gettime(io, t, fd) == (10 * MS, 5 * MS)
    assert io.read(t, fd, 8) == u64(3)
    assert io.read(t, fd, 8) == -errno.EAGAIN
    io.clock += 5 * MS
    assert io.read(t, fd, 8) == u64(1)
    io.clock += 1000 * MS
    assert settime(io, t, fd, 0, 0, 0, io.at(t, 64)) == 0  # disarmed: nothing left to read
    assert io.read(t, fd, 8) == -errno.EAGAIN


def test_a_tiny_period_does_not_flood(io):
    t = io.task
    fd = io.do(t, "timerfd_create", 1, 0)
    io.jump = False
    settime(io, t, fd, 1, 1)
    io.clock += 10**9
    io.run()
    assert len(io.kernel.timers.heap) <= 1
    assert struct.unpack("<Q", io.read(t, fd, 8))[0] == 10**9


def test_absolute_and_realtime(io):
    t = io.task
    fd = io.do(t, "timerfd_create", 0, O_NONBLOCK)
    io.jump = False
    real = io.clock + io.kernel.monotonic_to_real()
    settime(io, t, fd, real + 7 * MS, 0, 1)
    assert gettime(io, t, fd) == (0, 7 * MS)
    settime(io, t, fd, real - 7 * MS, 0, 1)
    assert io.read(t, fd, 8) == u64(1)
    assert io.do(t, "timerfd_create", 4, 0) == -errno.EINVAL
    assert settime(io, t, fd, 1, 0, 8) == -errno.EINVAL
    io.store(t, struct.pack("<qqqq", 0, 0, 0, 10**9))
    assert io.do(t, "timerfd_settime", fd, 0, io.at(t), 0) == -errno.EINVAL
    assert settime(io, t, io.pipe(t)[0], 1) == -errno.EINVAL


# -- signalfd
def test_signalfd(io):
    t = io.task
    signals.set_blocked(t, 1 << 9 | 1 << 11)
    mask = io.store(t, u64(1 << 9 | 1 << 8), 128)
    fd = io.do(t, "signalfd4", -1, mask, 8, O_NONBLOCK)
    assert io.read(t, fd, 128) == -errno.EAGAIN and poll(io, t, fd) == 0
    signals.send_process(t.process, SigInfo(12, 0, pid=5, uid=6))
    assert poll(io, t, fd) == 0  # not in the mask
    signals.send_process(t.process, SigInfo(10, -1, pid=5, uid=6, value=0x1_0000_0007))
    assert poll(io, t, fd) == POLLIN
    data = io.read(t, fd, 1000)
    assert len(data) == 128
    signo, err, code, pid, uid = struct.unpack_from("<IiiII", data)
    assert (signo, code, pid, uid) == (10, -1, 5, 6)
    assert struct.unpack_from("<iQ", data, 44) == (7, 0x1_0000_0007)
    assert not t.process.pending.mask & 1 << 9
    assert io.read(t, fd, 127) == -errno.EINVAL
    assert io.do(t, "signalfd4", fd, io.store(t, u64(1 << 11), 128), 8, 0) == fd
    assert struct.unpack_from("<I", io.read(t, fd, 128))[0] == 12
    assert io.do(t, "signalfd4", -1, mask, 4, 0) == -errno.EINVAL


def test_signalfd_sleeps_and_reads_the_readers_signals(io):
    t = io.task
    fd = io.do(t, "signalfd4", -1, io.store(t, u64(1 << 9), 128), 8, 0)
    child = io.fork(t)
    signals.set_blocked(t, 1 << 9)
    signals.set_blocked(child, 1 << 9)
    assert io.read(child, fd, 128) is None
    signals.send_process(t.process, SigInfo(10, 0, pid=1, uid=0))
    assert io.got(child) is None  # the parent's signal is not the child's
    signals.send_process(child.process, SigInfo(10, 0, pid=2, uid=0))
    assert struct.unpack_from("<I", io.got(child))[0] == 10


# -- memfd
def test_memfd_and_seals(io):
    t = io.task
    name = io.store(t, b"thing\0", 300)
    fd = io.do(t, "memfd_create", name, 3)
    assert t.files.cloexec == {fd}
    assert t.files.files[fd].label() == b"/memfd:thing (deleted)"
    assert io.write(t, fd, b"hello") == 5
    assert io.do(t, "fcntl", fd, 1034, 0) == 0
    assert io.do(t, "fcntl", fd, 1033, 2 | 4) == 0  # shrink, grow
    assert io.do(t, "ftruncate", fd, 4) == -errno.EPERM and io.do(t, "ftruncate", fd, 6) == -errno.EPERM
    assert io.write(t, fd, b"x") == -errno.EPERM
    at = io.do(t, "mmap", 0, 4096, 3, 1, fd, 0)
    assert at > 0
    assert io.do(t, "fcntl", fd, 1033, 8) == -errno.EBUSY
    assert io.do(t, "munmap", at, 4096) == 0
    assert io.do(t, "fcntl", fd, 1033, 8 | 1) == 0
    assert io.do(t, "pwrite64", fd, name, 1, 0) == -errno.EPERM
    assert io.do(t, "fcntl", fd, 1034, 0) == 15
    assert io.do(t, "mmap", 0, 4096, 3, 1, fd, 0) == -errno.EPERM
    at = io.do(t, "mmap", 0, 4096, 1, 1, fd, 0)
    assert io.do(t, "mprotect", at, 4096, 3) == -errno.EACCES
    assert io.do(t, "mmap", 0, 4096, 3, 2, fd, 0) > 0
    assert io.do(t, "fcntl", fd, 1033, 2) == -errno.EPERM
    plain = io.do(t, "memfd_create", name, 0)
    assert io.do(t, "fcntl", plain, 1034, 0) == 1
    assert io.do(t, "fcntl", plain, 1033, 2) == -errno.EPERM
    assert io.do(t, "memfd_create", name, 4) == -errno.ENOSYS
    assert io.do(t, "memfd_create", name, 0x100) == -errno.EINVAL
    assert io.do(t, "memfd_create", io.store(t, b"n" * 250 + b"\0", 300), 0) == -errno.EINVAL
    assert io.do(t, "fcntl", io.pipe(t)[0], 1034, 0) == -errno.EINVAL


# -- inotify
def parse(data):
    events, at = [], 0
    while at < len(data):
        wd, mask, cookie, length = struct.unpack_from("<iIII", data, at)
        events.append((wd, mask, cookie, data[at + 16 : at + 16 + length].rstrip(b"\0")))
        at += 16 + length
    return events


def test_inotify_reads_and_writes(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    ino = io.do(t, "inotify_init1", O_NONBLOCK)
    directory = io.do(t, "inotify_add_watch", ino, io.store(t, b"/tmp\0"), 0xFFF)
    itself = io.do(t, "inotify_add_watch", ino, io.store(t, b"/tmp/x\0"), inotify.IN_MODIFY)
    assert (directory, itself) == (1, 2)
    assert io.read(t, ino, 100) == -errno.EAGAIN
    io.write(t, fd, b"abc")
    assert io.do(t, "pread64", fd, io.at(t), 3, 0) == 3
    assert poll(io, t, ino) == POLLIN
    assert parse(io.read(t, ino, 1000)) == [
        (1, inotify.IN_MODIFY, 0, b"x"),
        (2, inotify.IN_MODIFY, 0, b""),
        (1, inotify.IN_ACCESS, 0, b"x"),
    ]
    io.do(t, "close", fd)
    assert parse(io.read(t, ino, 1000)) == [(1, inotify.IN_CLOSE_WRITE, 0, b"x")]
    assert io.do(t, "inotify_rm_watch", ino, 2) == 0
    assert parse(io.read(t, ino, 1000)) == [(2, inotify.IN_IGNORED, 0, b"")]
    assert io.do(t, "inotify_rm_watch", ino, 2) == -errno.EINVAL
    io.do(t, "close", ino)
    assert not vfs.WATCHES


def test_inotify_queue(io):
    t = io.task
    ino = io.do(t, "inotify_init1", O_NONBLOCK)
    file = t.files.files[ino]
    inode = io.sb.root.lookup(b"tmp")
    wd = file.add_watch(inode, inotify.IN_CREATE | inotify.IN_MOVED_FROM | inotify.IN_MOVED_TO)
    for _ in range(3):
        inotify.notify(inode, inotify.IN_CREATE, b"same")
    cookie = inotify.new_cookie()
    inotify.notify(inode, inotify.IN_MOVED_FROM, b"a", cookie)
    inotify.notify(inode, inotify.IN_MOVED_TO | inotify.IN_ISDIR, b"b" * 16, cookie)
    assert io.read(t, ino, 20) == -errno.EINVAL
    assert io.do(t, "ioctl", ino, 0x541B, io.at(t)) == 0
    assert struct.unpack("<i", io.load(t, 4))[0] == 32 + 32 + 48
    assert parse(io.read(t, ino, 70)) == [
        (wd, inotify.IN_CREATE, 0, b"same"),
        (wd, inotify.IN_MOVED_FROM, cookie, b"a"),
    ]
    assert parse(io.read(t, ino, 70)) == [(wd, inotify.IN_MOVED_TO | inotify.IN_ISDIR, cookie, b"b" * 16)]
    for n in range(inotify.MAX_QUEUED + 10):
        inotify.notify(inode, inotify.IN_CREATE, b"%d" % n)
    assert len(file.events) == inotify.MAX_QUEUED + 1
    assert file.events[-1][:2] == (-1, inotify.IN_Q_OVERFLOW)
    file.events.clear()
    assert file.add_watch(inode, inotify.IN_DELETE | inotify.IN_MASK_ADD) == wd
    inotify.notify(inode, inotify.IN_DELETE_SELF)
    assert [e[1] for e in file.events] == [inotify.IN_IGNORED]
    assert not vfs.WATCHES and inode.watches is None


def test_inotify_errors(io):
    t = io.task
    ino = io.do(t, "inotify_init1", 0)
    path = io.store(t, b"/tmp\0")
    assert io.do(t, "inotify_add_watch", ino, path, 0) == -errno.EINVAL
    assert io.do(t, "inotify_add_watch", ino, io.store(t, b"/none\0", 64), 1) == -errno.ENOENT
    assert io.do(t, "inotify_add_watch", io.pipe(t)[0], path, 1) == -errno.EINVAL
    io.open(t, b"/tmp/x")
    bad = io.store(t, b"/tmp/x\0", 64)
    assert io.do(t, "inotify_add_watch", ino, bad, 1 | inotify.IN_ONLYDIR) == -errno.ENOTDIR
    wd = io.do(t, "inotify_add_watch", ino, io.store(t, b"/tmp\0"), 1)
    assert io.do(t, "inotify_add_watch", ino, io.store(t, b"/tmp\0"), 1 | inotify.IN_MASK_CREATE) == -errno.EEXIST
    assert wd == 1
    assert io.do(t, "inotify_init1", 1) == -errno.EINVAL
