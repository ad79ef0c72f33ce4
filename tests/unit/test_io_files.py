"""read, write and descriptors over regular files; fcntl, locks, ioctl, splice and its kin."""

from __future__ import annotations

import errno
import struct

import pytest
from io_world import IoWorld

from kvmsentry.kernel.task import RLIM_INFINITY, Credentials

O_APPEND, O_NONBLOCK, O_CLOEXEC, O_PATH, O_WRONLY = 0o2000, 0o4000, 0o2000000, 0o10000000, 1
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2


@pytest.fixture
def io():
    return IoWorld()


def iov(io, task, *pieces, offset=16384):
    return io.store(task, b"".join(struct.pack("<QQ", base, length) for base, length in pieces), offset)


# -- data
def test_positions(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    assert io.write(t, fd, b"0123456789") == 10
    assert io.do(t, "lseek", fd, -4, 2) == 6
    assert io.read(t, fd, 100) == b"6789" and io.read(t, fd, 1) == b""
    assert io.do(t, "lseek", fd, 2, 0) == 2 and io.do(t, "lseek", fd, 1, 1) == 3
    assert io.do(t, "pread64", fd, io.at(t), 3, 7) == 3 and io.load(t, 3) == b"789"
    assert io.do(t, "pwrite64", fd, io.store(t, b"ab"), 2, 1) == 2
    assert io.read(t, fd, 2) == b"34"
    assert io.do(t, "lseek", fd, -1, 0) == -errno.EINVAL and io.do(t, "lseek", fd, 0, 9) == -errno.EINVAL
    assert io.do(t, "lseek", 50, 0, 9) == -errno.EBADF
    again = io.do(t, "dup", fd)
    assert io.do(t, "lseek", again, 0, 1) == 5


def test_append_and_pwrite(io):
    t = io.task
    fd = io.open(t, b"/tmp/x", 0o102 | O_APPEND)
    io.write(t, fd, b"abc")
    io.do(t, "lseek", fd, 0, 0)
    io.write(t, fd, b"def")
    assert io.do(t, "pwrite64", fd, io.store(t, b"g"), 1, 0) == 1  # Linux appends here too
    io.do(t, "lseek", fd, 0, 0)
    assert io.read(t, fd, 20) == b"abcdefg"


def test_vectors(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    io.store(t, b"hello world")
    assert io.do(t, "writev", fd, iov(io, t, (io.at(t), 5), (io.at(t), 0), (io.at(t, 5), 6)), 3) == 11
    assert io.do(t, "preadv", fd, iov(io, t, (io.at(t, 100), 4), (io.at(t, 200), 50)), 2, 2) == 9
    assert io.load(t, 4, 100) == b"llo " and io.load(t, 5, 200) == b"world"
    assert io.do(t, "preadv2", fd, iov(io, t, (io.at(t), 4)), 1, -1, 0, 0) == 0
    assert io.do(t, "pwritev2", fd, iov(io, t, (io.at(t, 100), 4)), 1, 0, 0, 16) == 4  # RWF_APPEND
    assert t.files.files[fd].inode.size == 15
    assert io.do(t, "preadv2", fd, iov(io, t, (io.at(t), 4)), 1, 0, 0, 0x1000) == -errno.EOPNOTSUPP
    assert io.do(t, "readv", fd, iov(io, t, (io.at(t), 4)), 1025) == -errno.EINVAL
    assert io.do(t, "readv", fd, iov(io, t, (io.at(t), 1 << 63)), 1) == -errno.EINVAL
    assert io.do(t, "readv", fd, iov(io, t, (1 << 47, 1)), 1) == -errno.EFAULT
    assert io.do(t, "readv", fd, 8, 1) == -errno.EFAULT
    assert io.do(t, "readv", fd, 8, 0) == 0 and io.do(t, "readv", 60, 8, 0) == -errno.EBADF
    assert io.do(t, "pwritev", fd, 8, 1, -1) == -errno.EINVAL


def test_a_bad_second_piece_makes_a_short_count(io):
    t = io.task
    r, w = io.pipe(t)
    assert io.do(t, "writev", w, iov(io, t, (io.at(t), 5), (8, 6)), 2) == 5
    assert io.do(t, "readv", r, iov(io, t, (io.at(t), 2), (8, 6)), 2) == 2
    edge = t.mm.mmap(0, 8192, 3, 0x22, None, 0)
    t.mm.munmap(edge + 4096, 4096)
    assert io.do(t, "write", w, edge + 4090, 100) == 6


def test_zero_and_huge(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    assert io.do(t, "read", fd, 8, 0) == 0 and io.do(t, "write", fd, 8, 0) == 0
    assert io.do(t, "write", fd, io.at(t), -1) == -errno.EFAULT
    big = t.mm.mmap(0, 3 << 20, 3, 0x22, None, 0)
    t.mm.write(big, b"x" * (3 << 20))
    assert io.do(t, "write", fd, big, 3 << 20) == 3 << 20
    io.do(t, "lseek", fd, 5, 0)
    assert io.do(t, "read", fd, big, 3 << 20) == (3 << 20) - 5
    assert io.do(t, "pread64", fd, big, 3 << 20, 1) == (3 << 20) - 1
    directory = io.open(t, b"/tmp", 0o200000)
    assert io.do(t, "read", directory, io.at(t), 0) == -errno.EISDIR
    path = io.open(t, b"/tmp/x", O_PATH)
    assert io.do(t, "read", path, io.at(t), 1) == -errno.EBADF
    assert io.do(t, "lseek", path, 0, 0) == -errno.EBADF


def test_file_size_limit(io):
    t = io.fork(io.task)
    fd = io.open(t, b"/tmp/x")
    t.process.rlimits[1] = (10, RLIM_INFINITY)
    assert io.write(t, fd, bytes(8)) == 8 and io.write(t, fd, bytes(8)) == 2
    t.sighand.actions[25].handler = 1
    assert io.write(t, fd, b"x") == -errno.EFBIG
    assert io.do(t, "ftruncate", fd, 11) == -errno.EFBIG and io.do(t, "ftruncate", fd, 10) == 0
    assert io.do(t, "fallocate", fd, 0, 5, 10) == -errno.EFBIG
    t.sighand.actions[25].handler = 0
    assert io.write(t, fd, b"x") is None and t.process.exit_code & 0x7F == 25


# -- descriptors
def test_dup_and_close(io):
    t = io.task
    r, w = io.pipe(t)
    assert io.do(t, "dup2", r, r) == r and io.do(t, "dup2", 70, 70) == -errno.EBADF
    assert io.do(t, "dup3", r, r, 0) == -errno.EINVAL and io.do(t, "dup3", r, 9, 1) == -errno.EINVAL
    assert io.do(t, "dup3", r, 9, O_CLOEXEC) == 9 and 9 in t.files.cloexec
    assert io.do(t, "dup2", w, 9) == 9 and 9 not in t.files.cloexec
    assert io.do(t, "fcntl", r, 0, 20) == 20 and io.do(t, "fcntl", r, 1030, 20) == 21 and 21 in t.files.cloexec
    t.process.rlimits[7] = (22, 100)
    assert io.do(t, "dup2", r, 22) == -errno.EBADF
    assert io.do(t, "fcntl", r, 0, 22) == -errno.EINVAL and io.do(t, "fcntl", r, 0, 20) == -errno.EMFILE
    assert io.do(t, "close", 15) == -errno.EBADF
    pipe = t.files.files[r].pipe
    assert io.do(t, "close_range", 9, 0xFFFFFFFF, 0) == 0
    assert set(t.files.files) == {r, w} and pipe.readers == 1
    assert io.do(t, "close_range", 0, 5, 4) == 0 and t.files.cloexec == {r, w}
    assert io.do(t, "close_range", 5, 1, 0) == -errno.EINVAL
    other = io.thread(t)
    assert io.do(other, "close_range", 0, 9, 2) == 0
    assert not other.files.files and set(t.files.files) == {r, w}
    io.do(t, "close", r), io.do(t, "close", w)
    assert pipe.readers == pipe.writers == 0


def test_flags(io):
    t = io.task
    fd = io.open(t, b"/tmp/x", 0o102 | O_APPEND | O_CLOEXEC)
    flags = io.do(t, "fcntl", fd, 3, 0)
    assert flags & 3 == 2 and flags & O_APPEND and not flags & O_CLOEXEC
    assert io.do(t, "fcntl", fd, 4, O_NONBLOCK | O_WRONLY) == 0
    assert io.do(t, "fcntl", fd, 3, 0) & (3 | O_APPEND | O_NONBLOCK) == 2 | O_NONBLOCK
    assert io.do(t, "fcntl", fd, 1, 0) == 1 and io.do(t, "fcntl", fd, 2, 0) == 0 and io.do(t, "fcntl", fd, 1, 0) == 0
    assert io.do(t, "ioctl", fd, 0x5451, 0) == 0 and io.do(t, "fcntl", fd, 1, 0) == 1
    assert io.do(t, "ioctl", fd, 0x5421, io.store(t, struct.pack("<i", 0))) == 0
    assert not io.do(t, "fcntl", fd, 3, 0) & O_NONBLOCK
    io.write(t, fd, b"abcdef")
    io.do(t, "lseek", fd, 2, 0)
    assert io.do(t, "ioctl", fd, 0x541B, io.at(t)) == 0 and io.load(t, 4) == struct.pack("<i", 4)
    assert io.do(t, "ioctl", fd, 0x5401, io.at(t)) == -errno.ENOTTY
    path = io.open(t, b"/tmp/x", O_PATH)
    assert io.do(t, "fcntl", path, 4, 0) == -errno.EBADF and io.do(t, "fcntl", path, 3, 0) & O_PATH
    assert io.do(t, "fcntl", fd, 999, 0) == -errno.EINVAL
    assert io.do(t, "fcntl", fd, 1024, 0) == -errno.EAGAIN and io.do(t, "fcntl", fd, 1024, 2) == -errno.EAGAIN
    r, w = io.pipe(t)
    assert io.do(t, "fcntl", r, 3, 0) == 0 and io.do(t, "fcntl", w, 3, 0) == 1


def test_async_notification(io):
    t = io.task
    r, w = io.pipe(t)
    assert io.do(t, "fcntl", r, 8, t.process.pid) == 0 and io.do(t, "fcntl", r, 9, 0) == t.process.pid
    assert io.do(t, "fcntl", r, 8, 4242) == -errno.ESRCH
    t.blocked = 1 << 28
    assert io.do(t, "fcntl", r, 4, 0o20000) == 0
    io.write(t, w, b"x")
    assert t.process.pending.mask & 1 << 28
    assert io.do(t, "fcntl", r, 4, 0) == 0 and not t.files.files[r].pipe.queue.waiters


# -- locks
def lock(io, task, fd, command, kind, start=0, length=0, whence=0, pid=0):
    at = io.store(task, struct.pack("<hhxxxxqqi4x", kind, whence, start, length, pid), 300)
    return io.do(task, "fcntl", fd, command, at)


def asked(io, task):
    return struct.unpack("<hhxxxxqqi4x", io.load(task, 32, 300))


def test_record_locks(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    child = io.fork(t)
    assert lock(io, t, fd, 6, F_WRLCK, 10, 10) == 0
    assert lock(io, child, fd, 6, F_RDLCK, 15, 1) == -errno.EAGAIN
    assert lock(io, child, fd, 6, F_RDLCK, 20, 1) == 0
    assert lock(io, child, fd, 5, F_RDLCK, 0, 0) == 0
    assert asked(io, child) == (F_WRLCK, 0, 10, 10, t.process.pid)
    assert lock(io, t, fd, 6, F_UNLCK, 12, 4) == 0  # a hole in the middle
    assert lock(io, child, fd, 6, F_WRLCK, 12, 4) == 0
    assert lock(io, child, fd, 6, F_WRLCK, 11, 2) == -errno.EAGAIN
    assert [(r.start, r.end) for r in t.files.files[fd].inode.locks.records] == [(10, 12), (12, 16), (16, 20), (20, 21)]
    assert lock(io, child, fd, 7, F_WRLCK, 16, 1) is None  # waits
    again = io.do(t, "dup", fd)
    assert io.do(t, "close", again) == 0  # closing any descriptor lets go
    assert io.later(child) == 0
    assert lock(io, t, fd, 6, F_WRLCK, -5, 1) == -errno.EINVAL
    assert lock(io, t, fd, 6, 7) == -errno.EINVAL and lock(io, t, fd, 6, F_WRLCK, 0, 0, 7) == -errno.EINVAL
    readonly = io.open(t, b"/tmp/x", 0)
    assert lock(io, t, readonly, 6, F_WRLCK) == -errno.EBADF


def test_deadlock_is_refused(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    child = io.fork(t)
    assert lock(io, t, fd, 6, F_WRLCK, 0, 1) == 0 and lock(io, child, fd, 6, F_WRLCK, 1, 1) == 0
    assert lock(io, child, fd, 7, F_WRLCK, 0, 1) is None
    assert lock(io, t, fd, 7, F_WRLCK, 1, 1) == -errno.EDEADLK
    assert lock(io, t, fd, 6, F_UNLCK, 0, 0) == 0
    assert io.later(child) == 0


def test_ofd_locks_belong_to_the_open_file(io):
    t = io.task
    one, two = io.open(t, b"/tmp/x"), io.open(t, b"/tmp/x")
    assert lock(io, t, one, 37, F_WRLCK, 0, 10) == 0
    assert lock(io, t, two, 37, F_WRLCK, 5, 1) == -errno.EAGAIN
    assert lock(io, t, two, 36, F_WRLCK, 5, 1) == 0 and asked(io, t)[4] == -1
    assert lock(io, t, two, 37, F_WRLCK, 0, 0, 0, 1) == -errno.EINVAL
    other = io.thread(t)
    assert lock(io, other, two, 38, F_WRLCK, 5, 1) is None
    again = io.do(t, "dup", one)
    io.do(t, "close", one)
    assert io.parked(other)
    io.do(t, "close", again)
    assert io.later(other) == 0


def test_flock(io):
    t = io.task
    one, two = io.open(t, b"/tmp/x"), io.open(t, b"/tmp/x")
    assert io.do(t, "flock", one, 1) == 0 and io.do(t, "flock", two, 1 | 4) == 0
    assert io.do(t, "flock", one, 2 | 4) == -errno.EWOULDBLOCK
    other = io.thread(t)
    assert io.do(other, "flock", one, 2) is None
    assert io.do(t, "flock", two, 8) == 0
    assert io.later(other) == 0
    assert io.do(t, "flock", two, 2 | 4) == -errno.EWOULDBLOCK
    io.do(t, "close", one)
    assert io.do(t, "flock", two, 2 | 4) == 0
    assert io.do(t, "flock", two, 0) == -errno.EINVAL and io.do(t, "flock", 66, 1) == -errno.EBADF


# -- size
def test_truncate_and_allocate(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    assert io.do(t, "ftruncate", fd, 100) == 0 and io.read(t, fd, 200) == bytes(100)
    assert io.do(t, "ftruncate", fd, -1) == -errno.EINVAL
    assert io.do(t, "fallocate", fd, 0, 0, 5000) == 0 and t.files.files[fd].inode.size == 5000
    assert io.do(t, "fallocate", fd, 0, 0, 0) == -errno.EINVAL
    assert io.do(t, "fallocate", fd, 2, 0, 5) == -errno.EOPNOTSUPP
    r, w = io.pipe(t)
    assert io.do(t, "fallocate", w, 0, 0, 5) == -errno.ESPIPE and io.do(t, "ftruncate", w, 5) == -errno.EINVAL
    assert io.do(t, "fadvise64", fd, 0, 0, 4) == 0 and io.do(t, "fadvise64", fd, 0, 0, 9) == -errno.EINVAL
    assert io.do(t, "fadvise64", r, 0, 0, 0) == -errno.ESPIPE
    assert io.do(t, "fsync", fd) == 0 and io.do(t, "fdatasync", 70) == -errno.EBADF
    assert io.do(t, "sync_file_range", fd, 0, 10, 8) == -errno.EINVAL
    assert io.do(t, "readahead", fd, 0, 10) == 0 and io.do(t, "readahead", r, 0, 10) == -errno.EINVAL


# -- moving data
def test_sendfile(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    data = bytes(range(256)) * 1200
    t.mm.write(io.at(t, 300_000), data)
    assert io.do(t, "write", fd, io.at(t, 300_000), len(data)) == len(data)
    other = io.thread(t)
    r, w = io.pipe(t)
    offset = io.store(other, struct.pack("<q", 100))
    assert io.do(other, "sendfile", w, fd, offset, 200_000) is None
    out = bytearray()
    while len(out) < 200_000:
        out += io.read(t, r, 30_000)
    assert io.later(other) == 200_000 and out == data[100:200_100]
    assert struct.unpack("<q", io.load(other, 8))[0] == 200_100
    copy = io.open(t, b"/tmp/copy")
    io.do(t, "lseek", fd, 10, 0)
    assert io.do(t, "sendfile", copy, fd, 0, 1 << 20) == len(data) - 10
    assert io.do(t, "lseek", fd, 0, 1) == len(data)
    assert io.do(t, "sendfile", copy, r, 0, 5) == -errno.EINVAL
    assert io.do(t, "sendfile", copy, fd, io.store(t, struct.pack("<q", -1)), 5) == -errno.EINVAL


def test_splice_and_tee(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    io.write(t, fd, b"0123456789")
    r, w = io.pipe(t)
    r2, w2 = io.pipe(t)
    offset = io.store(t, struct.pack("<q", 3))
    assert io.do(t, "splice", fd, offset, w, 0, 100, 0) == 7
    assert struct.unpack("<q", io.load(t, 8))[0] == 10
    assert io.do(t, "tee", r, w2, 4, 0) == 4
    assert io.do(t, "splice", r, 0, w2, 0, 2, 0) == 2
    assert io.read(t, r2, 100) == b"345634"
    assert io.do(t, "splice", r, 0, fd, io.store(t, struct.pack("<q", 0)), 100, 0) == 5
    io.do(t, "lseek", fd, 0, 0)
    assert io.read(t, fd, 100) == b"5678956789"
    assert io.do(t, "splice", r, 0, w2, 0, 1, 2) == -errno.EAGAIN
    assert io.do(t, "splice", fd, 0, fd, 0, 1, 0) == -errno.EINVAL
    assert io.do(t, "splice", r, 0, w, 0, 1, 0) == -errno.EINVAL
    assert io.do(t, "splice", r, offset, fd, 0, 1, 0) == -errno.ESPIPE
    assert io.do(t, "tee", r, fd, 1, 0) == -errno.EINVAL
    other = io.thread(t)
    assert io.do(other, "splice", r, 0, w2, 0, 10, 0) is None
    io.write(t, w, b"late")
    assert io.later(other) == 4 and io.read(t, r2, 10) == b"late"


def test_vmsplice(io):
    t = io.task
    r, w = io.pipe(t)
    io.store(t, b"abcdef")
    assert io.do(t, "vmsplice", w, iov(io, t, (io.at(t), 2), (io.at(t, 3), 3)), 2, 0) == 5
    assert io.do(t, "vmsplice", r, iov(io, t, (io.at(t, 50), 9)), 1, 0) == 5
    assert io.load(t, 5, 50) == b"abdef"
    assert io.do(t, "vmsplice", io.open(t, b"/tmp/x"), iov(io, t, (io.at(t), 2)), 1, 0) == -errno.EBADF


def test_copy_file_range(io):
    t = io.task
    one, two = io.open(t, b"/tmp/x"), io.open(t, b"/tmp/y")
    io.write(t, one, b"0123456789")
    offset = io.store(t, struct.pack("<q", 4))
    assert io.do(t, "copy_file_range", one, offset, two, 0, 100, 0) == 6
    assert struct.unpack("<q", io.load(t, 8))[0] == 10
    assert io.do(t, "copy_file_range", one, 0, two, 0, 100, 0) == 0  # at its end
    io.do(t, "lseek", two, 0, 0)
    assert io.read(t, two, 20) == b"456789"
    io.store(t, struct.pack("<qq", 0, 5))
    assert io.do(t, "copy_file_range", one, io.at(t), one, io.at(t, 8), 8, 0) == -errno.EINVAL
    assert io.do(t, "copy_file_range", one, io.at(t), one, io.at(t, 8), 5, 0) == 5
    assert io.do(t, "copy_file_range", one, 0, io.pipe(t)[1], 0, 5, 0) == -errno.EINVAL
    assert io.do(t, "copy_file_range", one, 0, two, 0, 5, 1) == -errno.EINVAL


def test_noatime_needs_ownership(io):
    t = io.task
    fd = io.open(t, b"/tmp/x")
    t.creds = Credentials(1000, 1000)
    assert io.do(t, "fcntl", fd, 4, 0o1000000) == -errno.EPERM
