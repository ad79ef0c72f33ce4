"""Pseudo-terminals and job control through real system calls; signals go through kernel/signals.py to fake
processors."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from dev_world import BUFFER, CLOSE, IOCTL, O_NOCTTY, O_NONBLOCK, O_RDWR, SETPGID, SETSID, DevWorld

from kvmsentry.fs import tty as ttys
from kvmsentry.fs.ttydisc import ECHO, ICANON, ISIG, TOSTOP, VMIN, VTIME
from kvmsentry.fs.vfs import POLLERR, POLLHUP, POLLIN, POLLOUT

TIOCGPTN, TIOCSPTLCK, TIOCPKT = 0x80045430, 0x40045431, 0x5420
EIO, EAGAIN, ENOTTY, EPERM, ENXIO = -errno.EIO, -errno.EAGAIN, -errno.ENOTTY, -errno.EPERM, -errno.ENXIO


@pytest.fixture
def world() -> DevWorld:
    return DevWorld()


@pytest.fixture
def init(world):
    return world.init()


@pytest.fixture
def sent(monkeypatch):
    """(signal, group) of every signal to a group, which still arrives."""
    seen: list[tuple[int, int]] = []
    real = ttys.send_group

    def note(group, signo):
        seen.append((signo, group.pgid))
        real(group, signo)

    monkeypatch.setattr(ttys, "send_group", note)
    return seen


def pair(world, task, flags=O_RDWR | O_NOCTTY):
    """(master, slave) descriptors of a new pty, both non-blocking; the slave is not made the controlling terminal."""
    master = world.open(task, b"/dev/ptmx", O_RDWR | O_NONBLOCK)
    assert master >= 0
    assert world.ioctl(task, master, TIOCSPTLCK, bytes(4))[0] == 0
    number = struct.unpack("<I", world.ioctl(task, master, TIOCGPTN, bytes(4))[1])[0]
    slave = world.open(task, b"/dev/pts/%d" % number, flags | O_NONBLOCK)
    assert slave >= 0
    return master, slave


def set_modes(world, task, fd, **changes) -> None:
    """Set fields of termios; cc= maps index to byte."""
    _, data = world.ioctl(task, fd, ttys.TCGETS, bytes(36))
    iflag, oflag, cflag, lflag, line, cc = struct.unpack("<4IB19s", data)
    cc = bytearray(cc)
    for index, value in changes.pop("cc", {}).items():
        cc[index] = value
    modes = {"iflag": iflag, "oflag": oflag, "cflag": cflag, "lflag": lflag, **changes}
    data = struct.pack("<4IB19s", *(modes[n] for n in ("iflag", "oflag", "cflag", "lflag")), line, bytes(cc))
    assert world.ioctl(task, fd, ttys.TCSETS, data)[0] == 0


class Shell:
    """A session: a leader with a terminal, and a child in a group of its own."""

    def __init__(self, world, init) -> None:
        self.world = world
        self.master, self.slave0 = pair(world, init)
        self.leader = world.child(init)
        assert world.call(self.leader, SETSID) == self.leader.tid
        self.fd = self.slave0
        assert world.ioctl(self.leader, self.fd, ttys.TIOCSCTTY, 0) == 0
        self.job = world.child(self.leader)
        assert world.call(self.job, SETPGID, 0, 0) == 0
        self.tty = self.leader.process.session.tty

    def blocking(self, task) -> None:
        """Descriptors were made non-blocking by `pair`: fcntl(F_SETFL)."""
        assert self.world.call(task, 72, self.fd, 4, O_RDWR) == 0


def test_bytes_go_both_ways(world, init):
    master, slave = pair(world, init)
    assert world.read(init, slave) == EAGAIN
    assert world.write(init, master, b"hello\r") == 6
    assert world.read(init, master) == b"hello\r\n"
    assert world.read(init, slave) == b"hello\n"
    assert world.write(init, slave, b"out\n") == 4
    assert world.read(init, master) == b"out\r\n"
    assert world.poll(init, master) == POLLOUT and world.poll(init, slave) == POLLOUT


def test_a_sleeping_reader_is_woken(world, init):
    master, slave = pair(world, init)
    child = world.child(init)
    assert world.call(init, 72, slave, 4, O_RDWR) == 0
    assert world.read(child, slave) is None
    world.write(init, master, b"half")
    assert child.sleep is not None
    world.write(init, master, b"\n")
    assert child.ctx.log[-1] == 5 and child.mm.read(BUFFER, 5) == b"half\n"


def test_locked_and_gone(world, init):
    master = world.open(init, b"/dev/pts/ptmx", O_RDWR)
    number = struct.unpack("<I", world.ioctl(init, master, TIOCGPTN, bytes(4))[1])[0]
    name = b"/dev/pts/%d" % number
    assert world.open(init, name, O_RDWR) == EIO
    world.ioctl(init, master, TIOCSPTLCK, bytes(4))
    slave = world.open(init, name, O_RDWR | O_NOCTTY)
    inode = world.place(init, name).inode
    assert inode.mode == 0o020620 and inode.gid == 5 and inode.rdev == 136 << 8 | number
    world.call(init, CLOSE, master)
    assert world.open(init, name, O_RDWR) == -errno.ENOENT
    assert world.read(init, slave) == b"" and world.write(init, slave, b"x") == EIO
    assert world.poll(init, slave) == POLLIN | POLLOUT | POLLHUP | POLLERR
    assert world.ioctl(init, slave, ttys.TCGETS, bytes(36))[0] == EIO


def test_slave_closed_gives_the_rest_then_eio(world, init):
    master, slave = pair(world, init)
    world.write(init, slave, b"rest")
    world.call(init, CLOSE, slave)
    assert world.poll(init, master) & POLLHUP
    assert world.read(init, master) == b"rest"
    assert world.read(init, master) == EIO
    assert world.write(init, master, b"typed\n") == 6  # kept for who opens it next
    again = world.open(init, b"/dev/pts/0", O_RDWR | O_NOCTTY | O_NONBLOCK)
    assert world.read(init, again) == b"typed\n" and not world.poll(init, master) & POLLHUP


def test_numbers_are_used_again(world, init):
    first, second = pair(world, init), pair(world, init)
    names = [name for name, _, _ in world.place(init, b"/dev/pts").inode.readdir()]
    assert names == [b"ptmx", b"0", b"1"]
    for fd in first:
        world.call(init, CLOSE, fd)
    third = pair(world, init)
    assert struct.unpack("<I", world.ioctl(init, third[0], TIOCGPTN, bytes(4))[1])[0] == 0
    assert second != third


def test_peer(world, init):
    master, _ = pair(world, init)
    fd = world.ioctl(init, master, 0x5441, O_RDWR | O_NOCTTY)
    assert fd > 0
    world.write(init, fd, b"x")
    assert world.read(init, master) == b"x"
    assert world.place(init, b"/proc/self/fd/%d" % fd, 0).inode.readlink(init) == b"/dev/pts/0"


def test_packet_mode(world, init):
    master, slave = pair(world, init)
    world.ioctl(init, master, TIOCPKT, struct.pack("<i", 1))
    world.write(init, slave, b"data")
    assert world.read(init, master) == b"\0data"
    world.write(init, master, b"\x13")
    assert world.read(init, master) == b"\x04"  # TIOCPKT_STOP
    world.write(init, master, b"\x11")
    assert world.read(init, master) == b"\x08"
    set_modes(world, init, slave, iflag=0)
    assert world.read(init, master) == b"\x10"  # TIOCPKT_NOSTOP


def test_a_slow_master_holds_writers_back(world, init):
    master, slave = pair(world, init)
    total = 0
    while (n := world.write(init, slave, b"x" * 4000)) > 0:
        total += n
    assert n == EAGAIN and total >= 4096 and not world.poll(init, slave) & POLLOUT
    got = 0
    while isinstance(data := world.read(init, master), bytes):
        got += len(data)
    assert got == total and world.poll(init, slave) & POLLOUT


def test_a_slow_program_holds_the_typist_back(world, init):
    master, slave = pair(world, init)
    set_modes(world, init, slave, lflag=0, iflag=0)
    data = bytes(range(256)) * 16
    total = 0
    while (n := world.write(init, master, data)) > 0:
        total += n
    assert n == EAGAIN and not world.poll(init, master) & POLLOUT
    out = b""
    while isinstance(part := world.read(init, slave), bytes):
        out += part
    assert out == (data * (total // len(data) + 1))[:total]


def test_vmin_and_vtime(world, init):
    master, slave = pair(world, init)
    world.call(init, 72, slave, 4, O_RDWR)
    clock = [world.kernel.now()]
    world.kernel.now = lambda: clock[0]

    def read_later(cc, typed, advance_ms):
        """What a sleeping read gives after `typed` chunks, each followed by its time."""
        set_modes(world, init, slave, lflag=0, iflag=0, cc=cc)
        reader = world.child(init)
        answer = world.read(reader, slave, 10)
        for chunk, ms in zip(typed, advance_ms, strict=True):
            if answer is not None:
                break
            if chunk:
                world.write(init, master, chunk)
            clock[0] += ms * 1_000_000
            world.kernel.timers.run(clock[0])
            world.run()
            if reader.sleep is None:
                answer = reader.mm.read(BUFFER, reader.ctx.log[-1])
        world.call(init, 72, slave, 4, O_RDWR | O_NONBLOCK)
        left = world.read(init, slave)
        world.call(init, 72, slave, 4, O_RDWR)
        return answer if answer is None else bytes(answer), left

    assert read_later({VMIN: 0, VTIME: 0}, [], []) == (b"", b"")
    assert read_later({VMIN: 3, VTIME: 0}, [b"a", b"b", b"c"], [900, 900, 0]) == (b"abc", EAGAIN)
    assert read_later({VMIN: 0, VTIME: 2}, [b"", b""], [100, 101]) == (b"", EAGAIN)
    assert read_later({VMIN: 0, VTIME: 2}, [b"", b"x"], [100, 0]) == (b"x", EAGAIN)
    assert read_later({VMIN: 5, VTIME: 1}, [b"", b"ab", b"c", b""], [5000, 90, 90, 20]) == (b"abc", EAGAIN)


def test_controlling_terminal_by_open(world, init):
    leader = world.child(init)
    assert world.open(leader, b"/dev/tty", O_RDWR) == ENXIO
    master, _ = pair(world, init)
    leader = world.child(init)
    world.call(leader, SETSID)
    assert world.open(leader, b"/dev/pts/0", O_RDWR | O_NOCTTY) > 0
    assert leader.process.session.tty is None
    assert world.open(leader, b"/dev/pts/0", 1) > 0  # write-only does not take it either
    assert leader.process.session.tty is None
    fd = world.open(leader, b"/dev/pts/0", O_RDWR)
    tty = leader.process.session.tty
    assert tty is not None and tty.foreground is leader.process.group
    assert world.ioctl(leader, fd, ttys.TIOCGSID, bytes(4)) == (0, struct.pack("<i", leader.tid))
    assert world.ioctl(leader, fd, ttys.TIOCGPGRP, bytes(4)) == (0, struct.pack("<i", leader.tid))
    assert world.ioctl(init, master, ttys.TIOCGPGRP, bytes(4)) == (0, struct.pack("<i", leader.tid))
    again = world.open(leader, b"/dev/tty", O_RDWR)
    world.write(leader, again, b"via tty")
    assert world.read(init, master) == b"via tty"
    stat = world.whole(leader, b"/proc/self/stat").rsplit(b") ", 1)[1].split()
    assert stat[4] == b"%d" % (136 << 8) and stat[5] == b"%d" % leader.tid
    other = world.child(init)
    world.call(other, SETSID)
    assert world.ioctl(other, world.open(other, b"/dev/pts/0", O_RDWR), ttys.TIOCSCTTY, 0) == EPERM


def test_keys_signal_the_foreground_group(world, init, sent):
    shell = Shell(world, init)
    world.ioctl(shell.leader, shell.fd, ttys.TIOCSPGRP, struct.pack("<i", shell.job.tid))
    world.write(init, shell.master, b"\x03")
    assert sent == [(2, shell.job.tid)]
    world.run()
    assert shell.job.process.zombie and shell.job.process.exit_code == 2
    assert not shell.leader.process.zombie
    assert world.read(init, shell.master) == b"^C"


def test_background_read_stops_the_group(world, init, sent):
    shell = Shell(world, init)
    shell.blocking(shell.leader)
    assert world.read(shell.job, shell.fd) is None
    assert sent == [(21, shell.job.tid)] and shell.job.process.stopped == 21
    # in the foreground and continued, the read goes on
    world.ioctl(shell.leader, shell.fd, ttys.TIOCSPGRP, struct.pack("<i", shell.job.tid))
    world.call(shell.leader, 62, shell.job.tid, 18)
    world.run()
    assert not shell.job.process.stopped


def test_background_read_that_ignores_sigttin_gets_eio(world, init, sent):
    shell = Shell(world, init)
    shell.job.blocked |= 1 << 20
    assert world.read(shell.job, shell.fd) == EIO and sent == []


def test_background_write_needs_tostop_to_stop(world, init, sent):
    shell = Shell(world, init)
    assert world.write(shell.job, shell.fd, b"noise") == 5
    set_modes(world, shell.leader, shell.fd, lflag=ICANON | ECHO | ISIG | TOSTOP)
    assert world.write(shell.job, shell.fd, b"more") is None
    assert sent == [(22, shell.job.tid)] and shell.job.process.stopped == 22


def test_background_tcsetattr_stops_too(world, init, sent):
    shell = Shell(world, init)
    assert world.ioctl(shell.job, shell.fd, ttys.TCSETS, bytes(36))[0] is None
    assert sent == [(22, shell.job.tid)]


def test_orphaned_background_gets_eio(world, init, sent):
    shell = Shell(world, init)
    world.call(shell.leader, 62, shell.leader.tid, 0)
    grandchild = world.child(shell.job)
    world.call(grandchild, SETPGID, 0, 0)
    world.call(shell.job, 60, 0)  # its parent is init now, in another session
    assert world.read(grandchild, shell.fd) == EIO
    assert world.ioctl(grandchild, shell.fd, ttys.TIOCSPGRP, struct.pack("<i", grandchild.tid))[0] == ENOTTY


def test_spgrp_rules(world, init):
    shell = Shell(world, init)
    for pgid, error in ((init.process.group.pgid, EPERM), (4000, -errno.ESRCH), (-1, -errno.EINVAL)):
        assert world.ioctl(shell.leader, shell.fd, ttys.TIOCSPGRP, struct.pack("<i", pgid))[0] == error
    assert world.ioctl(init, shell.slave0, ttys.TIOCSPGRP, struct.pack("<i", 1))[0] == ENOTTY
    assert world.ioctl(init, shell.slave0, ttys.TIOCGPGRP, bytes(4))[0] == ENOTTY


def test_closing_the_master_hangs_the_session_up(world, init):
    shell = Shell(world, init)
    world.call(init, CLOSE, shell.master)
    for task in (shell.leader, shell.job):  # they inherited the master
        if not task.process.zombie:
            world.call(task, CLOSE, shell.master)
    world.run()
    assert shell.leader.process.zombie and shell.leader.process.exit_code == 1  # SIGHUP
    assert shell.tty.session is None


def test_the_leader_takes_the_terminal_with_it(world, init, sent):
    shell = Shell(world, init)
    world.ioctl(shell.leader, shell.fd, ttys.TIOCSPGRP, struct.pack("<i", shell.job.tid))
    world.call(shell.leader, 60, 0)
    assert (1, shell.job.tid) in sent and shell.tty.session is None
    other = world.child(init)
    world.call(other, SETSID)
    assert world.ioctl(other, shell.slave0, ttys.TIOCSCTTY, 0) == 0


def test_notty(world, init, sent):
    shell = Shell(world, init)
    shell.leader.blocked |= 1  # SIGHUP, which it sends itself
    assert world.ioctl(shell.leader, shell.fd, ttys.TIOCNOTTY, 0) == 0
    assert shell.leader.process.session.tty is None and (1, shell.leader.process.group.pgid) in sent


def test_window_size(world, init, sent):
    shell = Shell(world, init)
    size = struct.pack("<4H", 30, 100, 0, 0)
    for _ in range(2):
        assert world.ioctl(init, shell.master, ttys.TIOCSWINSZ, size)[0] == 0
    assert sent == [(28, shell.leader.tid)]  # once: the second time nothing changed
    assert world.ioctl(shell.leader, shell.fd, ttys.TIOCGWINSZ, bytes(8)) == (0, size)


def test_modes_are_kept_and_speed_follows_cflag(world, init):
    master, slave = pair(world, init)
    _, data = world.ioctl(init, slave, 0x802C542A, bytes(44))
    assert struct.unpack("<2I", data[36:]) == (38400, 38400)
    set_modes(world, init, slave, cflag=0x80 | 13, lflag=ECHO)
    _, data = world.ioctl(init, master, 0x802C542A, bytes(44))  # the master speaks of the slave side
    assert struct.unpack("<2I", data[36:]) == (9600, 9600)
    assert struct.unpack_from("<I", data, 8)[0] & 0x30 == 0x30 and struct.unpack_from("<I", data, 12)[0] == ECHO
    assert world.ioctl(init, slave, 0x12345, 0) == ENOTTY


def test_exclusive_and_sti(world, init):
    _, slave = pair(world, init)
    child = world.child(init)
    world.call(child, 105, 1000)
    assert world.ioctl(init, slave, ttys.TIOCEXCL, 0) == 0
    assert world.ioctl(child, slave, ttys.TIOCSTI, b"x")[0] == EIO
    assert world.ioctl(init, slave, ttys.TIOCSTI, b"\n")[0] == 0
    assert world.read(init, slave) == b"\n"
    world.place(init, b"/dev/pts/0").inode.mode = 0o020666
    assert world.open(child, b"/dev/pts/0", O_RDWR) == -errno.EBUSY
    assert world.ioctl(init, slave, ttys.TIOCNXCL, 0) == 0


def test_bad_pointers_are_efault(world, init):
    master, slave = pair(world, init)
    for fd in (master, slave):
        for request in (ttys.TCGETS, ttys.TCSETS, ttys.TIOCGWINSZ, ttys.TIOCSWINSZ, ttys.FIONREAD):
            assert world.call(init, IOCTL, fd, request, 0x10) == -errno.EFAULT


# -- the host's terminal
# ---------------------------------------------------------------------------------------------------
@pytest.fixture
def host_pty():
    try:
        master, slave = os.openpty()
    except OSError as error:
        pytest.skip(f"no pty on this host: {error}")
    import tty

    tty.setraw(slave)
    os.set_blocking(master, False)
    yield master, slave
    for fd in (master, slave):
        try:
            os.close(fd)
        except OSError:
            pass


def test_host_terminal(world, host_pty):
    screen, fd = host_pty
    task, terminal = world.terminal(fd, fd)
    n = world.call(task, 89, world.put(task, b"/proc/self/fd/0\0"), BUFFER, 100)
    assert task.mm.read(BUFFER, n) == b"/dev/pts/0"
    assert world.place(task, b"/dev/pts/0").inode.rdev == 136 << 8
    assert world.write(task, 1, b"hi\n") == 3
    assert os.read(screen, 100) == b"hi\r\n"
    assert world.read(task, 0) is None
    os.write(screen, b"ls\r")
    world.spin()
    assert task.ctx.log[-1] == 3 and task.mm.read(BUFFER, 3) == b"ls\n"
    assert os.read(screen, 100) == b"ls\r\n"
    terminal.resize(50, 132)
    assert world.ioctl(task, 0, ttys.TIOCGWINSZ, bytes(8)) == (0, struct.pack("<4H", 50, 132, 0, 0))
    console = world.open(task, b"/dev/console", O_RDWR)
    world.write(task, console, b"console")
    assert os.read(screen, 100) == b"console"


def test_a_slow_host_screen_loses_nothing(world, host_pty):
    screen, fd = host_pty
    task, _terminal = world.terminal(fd, fd)
    data = b"".join(b"line %06d\n" % i for i in range(600))
    writer = world.child(task)
    writes = 0
    while writer.sleep is None and writes < 100:
        n = world.write(writer, 1, data)
        writes += 1
        assert n in (len(data), None)
    assert writes > 5 and not world.poll(task, 1) & POLLOUT
    shown = b""
    while True:
        world.spin()
        try:
            shown += os.read(screen, 65536)
        except BlockingIOError:
            break
    assert shown == (data * writes).replace(b"\n", b"\r\n")
    assert writer.ctx.log[-1] == len(data)


def test_the_host_terminal_goes_away(world, host_pty):
    screen, fd = host_pty
    task, terminal = world.terminal(fd, fd)
    child = world.child(task)
    assert world.read(child, 0) is None
    os.close(screen)
    world.spin()
    assert terminal.gone
    assert child.ctx.log[-1] in (0, EIO)


def test_no_keyboard(world, host_pty):
    """-t without -i: standard input is /dev/null on the host, which is no hangup."""
    _screen, fd = host_pty
    null = os.open("/dev/null", os.O_RDONLY)

    def refuse(number, events, callback):
        if os.readlink(f"/proc/self/fd/{number}") == "/dev/null":
            raise PermissionError(errno.EPERM, "epoll")
        world.watched[number] = events, callback

    world.platform.watch = refuse
    task, terminal = world.terminal(null, fd)
    assert not terminal.gone and terminal.in_fd == -1
    assert world.read(task, 0) is None
    os.close(null)


def test_suspending_a_job_tells_the_shell(world, init):
    """^Z while the job sleeps and the shell waits for it, as in every interactive session."""
    shell = Shell(world, init)
    world.ioctl(shell.leader, shell.fd, ttys.TIOCSPGRP, struct.pack("<i", shell.job.tid))
    world.put(shell.job, struct.pack("<qq", 100, 0), BUFFER)
    assert world.call(shell.job, 35, BUFFER, 0) is None  # nanosleep
    assert world.call(shell.leader, 61, (1 << 64) - 1, BUFFER, 2, 0) is None  # wait4(-1, &status, WUNTRACED)
    world.write(init, shell.master, b"\x1a")
    assert shell.job.process.stopped == 20
    assert shell.leader.ctx.log[-1] == shell.job.tid
    assert shell.leader.mm.read_u32(BUFFER) == 20 << 8 | 0x7F


def test_a_shell_that_is_init_can_suspend_its_jobs(world, host_pty):
    """`run -it image bash`: the shell is pid 1 and its jobs are no orphans."""
    screen, fd = host_pty
    shell, _terminal = world.terminal(fd, fd)
    job = world.child(shell)
    assert world.call(job, SETPGID, 0, 0) == 0
    assert world.ioctl(shell, 0, ttys.TIOCSPGRP, struct.pack("<i", job.tid))[0] == 0
    world.put(job, struct.pack("<qq", 100, 0), BUFFER)
    assert world.call(job, 35, BUFFER, 0) is None
    assert world.call(shell, 61, (1 << 64) - 1, BUFFER, 2, 0) is None
    os.write(screen, b"\x1a")
    world.spin()
    assert job.process.stopped == 20 and shell.ctx.log[-1] == job.tid
