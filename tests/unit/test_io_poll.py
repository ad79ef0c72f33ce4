"""poll, select and epoll: readiness, sleeping, time-outs, signals."""

from __future__ import annotations

import errno
import struct

import pytest
from io_world import MS, IoWorld

from kvmsentry.errors import Errno

O_NONBLOCK = 0o4000
POLLIN, POLLOUT, POLLERR, POLLHUP, POLLNVAL = 1, 4, 8, 16, 32
ADD, DEL, MOD = 1, 2, 3
EPOLLET, EPOLLONESHOT, EPOLLEXCLUSIVE = 1 << 31, 1 << 30, 1 << 28


@pytest.fixture
def io():
    return IoWorld()


def pollfds(io, task, *pairs):
    return io.store(task, b"".join(struct.pack("<ihh", fd, events, 0) for fd, events in pairs), 4096)


def revents(io, task, count):
    return [struct.unpack_from("<ihh", io.load(task, 8 * count, 4096), 8 * i)[2] for i in range(count)]


def ctl(io, task, ep, op, fd, events=0, data=0):
    return io.do(task, "epoll_ctl", ep, op, fd, io.store(task, struct.pack("<IQ", events, data), 8192))


def events_at(io, task, n):
    return [struct.unpack_from("<IQ", io.load(task, 12 * n, 8192), 12 * i) for i in range(n)]


def wait(io, task, ep, timeout=0, limit=16):
    n = io.do(task, "epoll_wait", ep, io.at(task, 8192), limit, timeout)
    return events_at(io, task, n) if n is not None and n >= 0 else n


# -- poll
def test_poll_tells_what_is_ready(io):
    t = io.task
    r, w = io.pipe(t)
    fds = pollfds(io, t, (r, POLLIN), (w, POLLOUT), (-1, POLLIN), (99, POLLIN))
    assert io.do(t, "poll", fds, 4, 0) == 2
    assert revents(io, t, 4) == [0, POLLOUT, 0, POLLNVAL]
    assert io.do(t, "poll", fds, 1, 0) == 0
    assert io.do(t, "poll", 8, 1, 0) == -errno.EFAULT
    assert io.do(t, "poll", fds, 1 << 30, 0) == -errno.EINVAL


def test_poll_sleeps_and_wakes(io):
    t = io.task
    io.jump = False
    r, w = io.pipe(t)
    other = io.thread(t)
    fds = pollfds(io, other, (r, POLLIN))
    assert io.do(other, "poll", fds, 1, -1) is None
    assert io.write(t, w, b"x") == 1
    assert io.later(other) == 1 and revents(io, other, 1) == [POLLIN]


def test_poll_times_out_to_the_nanosecond(io):
    t = io.task
    r, _ = io.pipe(t)
    began = io.clock
    assert io.do(t, "poll", pollfds(io, t, (r, POLLIN)), 1, 250) == 0
    assert io.clock - began == 250 * MS


def test_poll_wakes_for_hang_up_that_was_not_asked_for(io):
    t = io.task
    r, w = io.pipe(t)
    other = io.thread(t)
    assert io.do(other, "poll", pollfds(io, other, (r, 0)), 1, -1) is None
    io.do(t, "close", w)
    assert io.later(other) == 1 and revents(io, other, 1) == [POLLHUP]


def test_a_file_closed_meanwhile_is_still_polled(io):
    t = io.task
    r, w = io.pipe(t)
    other = io.thread(t)
    assert io.do(other, "poll", pollfds(io, other, (r, POLLIN)), 1, -1) is None
    file = t.files.files[r]
    io.do(t, "close", r)
    assert io.write(t, w, b"x") == 1
    assert io.later(other) == 1
    assert file.refs == 0 and not file.pipe.queue.waiters


def test_poll_is_restarted_with_what_is_left(io):
    t = io.task
    io.jump = False
    r, _ = io.pipe(t)
    other = io.thread(t)
    began = io.clock
    assert io.do(other, "poll", pollfds(io, other, (r, POLLIN)), 1, 100) is None
    io.clock += 40 * MS
    with pytest.raises(Errno):
        other.sleep.interrupt()
        coro, value = other.coro, other.sleep.value
        io.kernel.ready.remove(other)
        coro.throw(value)
    assert other.restart is not None
    io.jump = True
    other.coro = other.restart(other)
    other.sleep = None
    io.kernel.step(other)
    io.run()
    assert other.ctx.log[-1] == 0 and io.clock - began == 100 * MS


def test_ppoll_writes_back_the_rest_and_restores_the_mask(io):
    t = io.task
    r, w = io.pipe(t)
    other = io.thread(t)
    io.jump = False
    ts = io.store(other, struct.pack("<qq", 2, 0), 0)
    mask = io.store(other, struct.pack("<Q", 1 << 9), 64)
    assert io.do(other, "ppoll", pollfds(io, other, (r, POLLIN)), 1, ts, mask, 8) is None
    assert other.blocked == 1 << 9
    io.clock += 500 * MS
    io.write(t, w, b"x")
    assert io.later(other) == 1
    assert other.blocked == 0 and other.saved_blocked is None
    assert struct.unpack("<qq", io.load(other, 16)) == (1, 500 * MS)
    assert io.do(t, "ppoll", pollfds(io, t, (r, POLLIN)), 1, 0, mask, 4) == -errno.EINVAL


def test_ppoll_lets_a_signal_in_that_is_blocked_outside(io):
    t = io.task
    r, _ = io.pipe(t)
    other = io.thread(t)
    other.blocked = 1 << 9
    mask = io.store(other, struct.pack("<Q", 0), 64)
    assert io.do(other, "ppoll", pollfds(io, other, (r, POLLIN)), 1, 0, mask, 8) is None
    io.signal(other, 10)
    assert io.interrupted(other) == -errno.EINTR
    assert other.saved_blocked is None and other.blocked & 1 << 9


# -- select
def test_select(io):
    t = io.task
    r, w = io.pipe(t)
    sets = io.store(t, struct.pack("<QQQ", 1 << r, 1 << w, 1 << r), 4096)
    tv = io.store(t, struct.pack("<qq", 1, 0), 5000)
    assert io.do(t, "select", 8, sets, sets + 8, sets + 16, tv) == 1
    assert struct.unpack("<QQQ", io.load(t, 24, 4096)) == (0, 1 << w, 0)
    io.store(t, struct.pack("<Q", 1 << r), 4096)
    began = io.clock
    assert io.do(t, "select", 8, sets, 0, 0, tv) == 0
    assert io.clock - began == 1000 * MS
    assert struct.unpack("<qq", io.load(t, 16, 5000)) == (0, 0)
    io.store(t, struct.pack("<Q", 1 << 50), 4096)
    assert io.do(t, "select", 64, sets, 0, 0, 0) == -errno.EBADF
    assert io.do(t, "select", -1, 0, 0, 0, 0) == -errno.EINVAL
    io.store(t, struct.pack("<qq", -1, 0), 5000)
    assert io.do(t, "select", 0, 0, 0, 0, tv) == -errno.EINVAL


def test_pselect_wakes(io):
    t = io.task
    r, w = io.pipe(t)
    other = io.thread(t)
    io.jump = False
    sets = io.store(other, struct.pack("<Q", 1 << r), 4096)
    ts = io.store(other, struct.pack("<qq", 3, 0), 5000)
    assert io.do(other, "pselect6", 8, sets, 0, 0, ts, 0) is None
    io.clock += 1000 * MS
    io.do(t, "close", w)
    assert io.later(other) == 1
    assert struct.unpack("<Q", io.load(other, 8, 4096))[0] == 1 << r
    assert struct.unpack("<qq", io.load(other, 16, 5000)) == (2, 0)


# -- epoll
def test_level_triggered(io):
    t = io.task
    r, w = io.pipe(t)
    ep = io.do(t, "epoll_create1", 0)
    assert ctl(io, t, ep, ADD, r, POLLIN, 77) == 0
    assert wait(io, t, ep) == []
    io.write(t, w, b"xy")
    assert wait(io, t, ep) == [(POLLIN, 77)]
    assert wait(io, t, ep) == [(POLLIN, 77)]
    io.read(t, r, 9)
    assert wait(io, t, ep) == []


def test_edge_triggered(io):
    t = io.task
    r, w = io.pipe(t)
    ep = io.do(t, "epoll_create1", 0)
    io.write(t, w, b"x")
    assert ctl(io, t, ep, ADD, r, POLLIN | EPOLLET, 1) == 0
    assert wait(io, t, ep) == [(POLLIN, 1)]
    assert wait(io, t, ep) == []
    io.write(t, w, b"y")  # more data is a new edge
    assert wait(io, t, ep) == [(POLLIN, 1)]
    assert ctl(io, t, ep, MOD, r, POLLIN | EPOLLET, 2) == 0
    assert wait(io, t, ep) == [(POLLIN, 2)]


def test_one_shot(io):
    t = io.task
    r, w = io.pipe(t)
    ep = io.do(t, "epoll_create1", 0)
    ctl(io, t, ep, ADD, r, POLLIN | EPOLLONESHOT, 1)
    io.write(t, w, b"x")
    assert wait(io, t, ep) == [(POLLIN, 1)]
    io.write(t, w, b"x")
    assert wait(io, t, ep) == []
    ctl(io, t, ep, MOD, r, POLLIN | EPOLLONESHOT, 1)
    assert wait(io, t, ep) == [(POLLIN, 1)]


def test_sleepers_wake_one_at_a_time(io):
    t = io.task
    r, w = io.pipe(t)
    ep = io.do(t, "epoll_create1", 0)
    ctl(io, t, ep, ADD, r, POLLIN | EPOLLET, 1)
    a, b = io.thread(t), io.thread(t)
    assert wait(io, a, ep, -1) is None and wait(io, b, ep, -1) is None
    io.write(t, w, b"x")
    io.run()
    assert [io.parked(a), io.parked(b)] == [False, True]
    io.write(t, w, b"x")
    io.run()
    assert not io.parked(b)


def test_exclusive_items_share_the_events(io):
    t = io.task
    r, w = io.pipe(t)
    eps = [io.do(t, "epoll_create1", 0) for _ in range(2)]
    tasks = [io.thread(t) for _ in range(2)]
    for ep, task in zip(eps, tasks, strict=True):
        assert ctl(io, task, ep, ADD, r, POLLIN | EPOLLEXCLUSIVE, 1) == 0
        assert wait(io, task, ep, -1) is None
    io.write(t, w, b"x")
    io.run()
    assert sorted(io.parked(task) for task in tasks) == [False, True]
    assert ctl(io, t, eps[0], MOD, r, POLLIN) == -errno.EINVAL


def test_fairness_when_few_events_are_asked_for(io):
    t = io.task
    ep = io.do(t, "epoll_create1", 0)
    for n in range(4):
        fd = io.do(t, "eventfd2", 1, 0)
        ctl(io, t, ep, ADD, fd, POLLIN, n)
    assert [wait(io, t, ep, 0, 1)[0][1] for _ in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_time_out_and_signal(io):
    t = io.task
    ep = io.do(t, "epoll_create1", 0)
    began = io.clock
    assert wait(io, t, ep, 30) == []
    assert io.clock - began == 30 * MS
    ts = io.store(t, struct.pack("<qq", 0, 1500), 0)
    assert io.do(t, "epoll_pwait2", ep, io.at(t, 8192), 4, ts, 0, 8) == 0
    assert io.clock - began == 30 * MS + 1500
    other = io.thread(t)
    assert wait(io, other, ep, -1) is None
    io.signal(other, 10)
    assert io.interrupted(other) == -errno.EINTR


def test_closing_a_file_removes_it(io):
    t = io.task
    r, w = io.pipe(t)
    ep = io.do(t, "epoll_create1", 0)
    ctl(io, t, ep, ADD, w, POLLOUT, 5)
    again = io.do(t, "dup", w)
    io.do(t, "close", w)
    assert wait(io, t, ep) == [(POLLOUT, 5)]  # the description is still open
    pipe = t.files.files[again].pipe
    io.do(t, "close", again)
    assert wait(io, t, ep) == []
    assert not pipe.queue.waiters
    assert not t.files.files[ep].items


def test_nested(io):
    t = io.task
    r, w = io.pipe(t)
    inner, outer = io.do(t, "epoll_create1", 0), io.do(t, "epoll_create1", 0)
    assert ctl(io, t, outer, ADD, inner, POLLIN, 9) == 0
    assert ctl(io, t, inner, ADD, r, POLLIN, 1) == 0
    other = io.thread(t)
    assert wait(io, other, outer, -1) is None
    io.write(t, w, b"x")
    assert io.later(other) == 1
    io.read(t, r, 1)
    assert wait(io, t, outer) == []
    assert ctl(io, t, inner, ADD, outer, POLLIN) == -errno.ELOOP
    assert ctl(io, t, inner, ADD, inner, POLLIN) == -errno.EINVAL
    chain = outer
    for _ in range(3):
        top = io.do(t, "epoll_create1", 0)
        assert ctl(io, t, top, ADD, chain, POLLIN) == 0
        chain = top
    top = io.do(t, "epoll_create1", 0)
    assert ctl(io, t, top, ADD, chain, POLLIN) == -errno.ELOOP


def test_epoll_errors(io):
    t = io.task
    r, _ = io.pipe(t)
    ep = io.do(t, "epoll_create1", 0)
    fd = io.open(t, b"/tmp/x")
    assert ctl(io, t, ep, ADD, fd, POLLIN) == -errno.EPERM
    assert ctl(io, t, ep, ADD, 99, POLLIN) == -errno.EBADF
    assert ctl(io, t, r, ADD, r, POLLIN) == -errno.EINVAL
    assert ctl(io, t, ep, MOD, r, POLLIN) == -errno.ENOENT
    assert ctl(io, t, ep, DEL, r) == -errno.ENOENT
    assert ctl(io, t, ep, ADD, r, POLLIN) == 0
    assert ctl(io, t, ep, ADD, r, POLLIN) == -errno.EEXIST
    assert ctl(io, t, ep, 9, r, POLLIN) == -errno.EINVAL
    assert wait(io, t, ep, 0, 0) == -errno.EINVAL
    assert wait(io, t, r, 0, 1) == -errno.EINVAL
    assert io.do(t, "epoll_create", 0) == -errno.EINVAL
    assert io.do(t, "epoll_create1", 1) == -errno.EINVAL


def test_a_bad_buffer_loses_no_event(io):
    t = io.task
    fd = io.do(t, "eventfd2", 1, 0)
    ep = io.do(t, "epoll_create1", 0)
    ctl(io, t, ep, ADD, fd, POLLIN | EPOLLET | EPOLLONESHOT, 3)
    assert io.do(t, "epoll_wait", ep, 8, 4, 0) == -errno.EFAULT
    assert wait(io, t, ep) == [(POLLIN, 3)]
