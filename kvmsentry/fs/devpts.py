"""Pseudo-terminals: /dev/ptmx, /dev/pts/N and what goes on between the two sides; pty(7), ptmx(4).

    MasterFile --write--> Pty.input (line discipline) --> TtyFile.read
    MasterFile <--read--- Pty.outgoing <-- output processing <-- TtyFile.write

The Pty lives from the open of /dev/ptmx until the master is closed; then the slave side is hung up and its node goes.
"""

from __future__ import annotations

import errno
import stat as st
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs import tty as ttys
from kvmsentry.fs.anon import gather, scatter
from kvmsentry.fs.tty import READABLE, WRITABLE, Tty, TtyFile
from kvmsentry.fs.ttydisc import EXTPROC, IXON, SIGINT, SIGQUIT, SIGTSTP, VSTART, VSTOP, Termios
from kvmsentry.fs.vfs import (
    DT_CHR,
    O_ACCMODE,
    O_CLOEXEC,
    O_NOCTTY,
    O_NONBLOCK,
    POLLHUP,
    POLLPRI,
    File,
    Inode,
    Path,
    SuperBlock,
    makedev,
)  # fmt: skip
from kvmsentry.kernel.traps import WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

DEVPTS_MAGIC = 0x1CD1  # uapi/linux/magic.h
PTMX = makedev(5, 2)
SLAVE_MAJOR = 136  # UNIX98_PTY_SLAVE_MAJOR, uapi/linux/major.h
PTY_MAX = 1024  # terminals at a time; /proc/sys/kernel/pty/max says it
OUTGOING_LIMIT = 65536  # bytes a program can write before the master reads
BACKLOG_LIMIT = 65536  # bytes the master can write before a program reads

# TIOCPKT status bits, uapi/asm-generic/ioctls.h
PKT_FLUSHREAD, PKT_FLUSHWRITE, PKT_STOP, PKT_START, PKT_NOSTOP, PKT_DOSTOP, PKT_IOCTL = 1, 2, 4, 8, 16, 32, 64

_s32 = struct.Struct("<i")
_u32 = struct.Struct("<I")


class Pty(Tty):
    """The slave side of a pair, and the bytes on the way to the master."""

    def __init__(self, kernel: Kernel, index: int) -> None:
        self.index = index
        self.outgoing = bytearray()
        self.master: MasterFile | None = None
        self.locked = True  # until unlockpt(3)
        self.abandoned = False  # was open and is not any more: the master reads EIO
        self.packet_status = 0
        super().__init__(kernel, makedev(SLAVE_MAJOR + (index >> 8), index & 0xFF))

    def open(self, task: Task, inode: Inode, path: Path | None, flags: int) -> TtyFile:
        """The slave side; EIO while it is locked or when the master is gone (pty_open)."""
        if self.locked:
            raise Errno(errno.EIO)
        file = super().open(task, inode, path, flags)
        self.abandoned = False
        return file

    # -- the wires ---------------------------------------------------------------------------------------------------
    def emit(self, data: bytes) -> None:
        """To the master's reader."""
        if self.master is not None:
            self.outgoing += data
            self._wake_master(READABLE)

    def write_room(self) -> int:
        """What the master's reader leaves room for."""
        return OUTGOING_LIMIT - len(self.outgoing)

    def pending_output(self) -> int:
        """Not yet read by the master."""
        return len(self.outgoing)

    def flush_output(self) -> None:
        """The master learns of it in packet mode; what is on its side already stays there."""
        self._status(PKT_FLUSHWRITE, 0)

    def flush_input(self) -> None:
        """Also told in packet mode (n_tty_packet_mode_flush)."""
        super().flush_input()
        self._status(PKT_FLUSHREAD, 0)

    def input_room(self) -> None:
        """The master may write again."""
        self._wake_master(WRITABLE)

    def stop(self) -> None:
        """Told in packet mode."""
        if not self.stopped:
            self._status(PKT_STOP, PKT_START)
        super().stop()

    def start(self) -> None:
        """Told in packet mode."""
        if self.stopped:
            self._status(PKT_START, PKT_STOP)
        super().start()

    def set_termios(self, new: Termios) -> None:
        """Packet mode tells whether the usual flow control keys hold (pty_set_termios)."""
        old = self.termios
        master = self.master
        if master is not None and master.packet:
            before = old.iflag & IXON and old.cc[VSTOP] == 19 and old.cc[VSTART] == 17
            after = new.iflag & IXON and new.cc[VSTOP] == 19 and new.cc[VSTART] == 17
            if bool(before) != bool(after):
                self._status(PKT_DOSTOP if after else PKT_NOSTOP, PKT_NOSTOP if after else PKT_DOSTOP)
            if (old.lflag | new.lflag) & EXTPROC:
                self._status(PKT_IOCTL, 0)
        super().set_termios(new)

    def _status(self, bits: int, instead_of: int) -> None:
        if self.master is not None and self.master.packet:
            self.packet_status = self.packet_status & ~instead_of | bits
            self._wake_master(READABLE | POLLPRI)

    def _wake_master(self, events: int) -> None:
        if self.master is not None and self.master.queue.waiters:
            self.master.queue.wake(events)

    def last_close(self) -> None:
        """The master reads what is left, then EIO."""
        self.abandoned = True
        self._wake_master(READABLE | POLLHUP)


class MasterFile(File):
    """The side that plays the terminal, as opened through /dev/ptmx."""

    queue: WaitQueue
    write_all = True

    def __init__(self, inode: Inode, path: Path | None, flags: int, pty: Pty, sb: DevptsSuper) -> None:
        super().__init__(inode, path, flags)
        self.pty, self.sb = pty, sb
        self.queue = WaitQueue()
        self.packet = False
        pty.master = self

    def release(self) -> None:
        """Closed: the node goes, the slave side is hung up."""
        pty = self.pty
        pty.master = None
        pty.gone = True
        self.sb.remove(pty)
        pty.hangup()
        pty.outgoing.clear()

    def read(self, views: list[memoryview]) -> int:
        """What programs have written; -EIO once they have all closed their side."""
        pty = self.pty
        count = sum(map(len, views))
        if not count:
            return 0
        if self.packet:
            if pty.packet_status:
                status, pty.packet_status = pty.packet_status, 0
                return scatter(views, bytes((status,)))
            count -= 1
        outgoing = pty.outgoing
        if not outgoing:
            return -errno.EIO if pty.abandoned else -errno.EAGAIN
        data = bytes(outgoing[:count])
        full = len(outgoing) >= OUTGOING_LIMIT
        del outgoing[:count]
        n = scatter(views, b"\0" + data if self.packet else data)
        if full and len(outgoing) < OUTGOING_LIMIT:
            pty.flush_echo()
            pty.wake_writers()
        return n

    def write(self, views: list[memoryview]) -> int:
        """What is typed; -EAGAIN when nobody reads what was typed before."""
        pty = self.pty
        room = BACKLOG_LIMIT - len(pty.backlog)
        if room <= 0:
            return -errno.EAGAIN if views else 0
        data = gather(views, room)
        if data:
            pty.input(data)
        return len(data)

    def poll(self) -> int:
        """Readiness; POLLHUP when the slave side was opened and closed."""
        pty = self.pty
        events = 0
        if pty.outgoing:
            events = READABLE
        if self.packet and pty.packet_status:
            events |= READABLE | POLLPRI
        if pty.abandoned:
            events |= POLLHUP
        if len(pty.backlog) < BACKLOG_LIMIT:
            events |= WRITABLE
        return events

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """The pair's own requests; the others are about the slave side (tty_pair_get_tty)."""
        pty, mm = self.pty, task.mm
        if request == ttys.TIOCGPTN:
            mm.write(argument, _u32.pack(pty.index))
        elif request == ttys.TIOCSPTLCK:
            pty.locked = mm.read(argument, 4) != bytes(4)
        elif request == ttys.TIOCGPTLCK:
            mm.write(argument, _s32.pack(pty.locked))
        elif request == ttys.TIOCPKT:
            on = mm.read(argument, 4) != bytes(4)
            if on and not self.packet:
                pty.packet_status = 0
            self.packet = on
        elif request == ttys.TIOCGPKT:
            mm.write(argument, _s32.pack(self.packet))
        elif request == ttys.TIOCSIG:
            if argument not in (SIGINT, SIGQUIT, SIGTSTP):
                raise Errno(errno.EINVAL)
            pty.signal_foreground(argument)
        elif request == ttys.TIOCGPTPEER:
            return self._peer(task, argument)
        elif request == ttys.TIOCSWINSZ:
            pty.set_winsize(mm.read(argument, 8))
        elif request == ttys.TCFLSH:
            self._flush(argument)
        else:
            return pty.ioctl(task, request, argument, self, master=True)
        return 0

    def _flush(self, what: int) -> None:
        if what not in (0, 1, 2):
            raise Errno(errno.EINVAL)
        pty = self.pty
        if what != 1:
            pty.outgoing.clear()
            pty.flush_echo()
            pty.wake_writers()
        if what != 0:
            pty.backlog.clear()

    def _peer(self, task: Task, flags: int) -> int:
        """TIOCGPTPEER: a descriptor for the slave side without walking a path."""
        if flags & ~(O_ACCMODE | O_NOCTTY | O_NONBLOCK | O_CLOEXEC):
            raise Errno(errno.EINVAL)
        path = self.sb.place(task, self.pty)
        file = (
            path.inode.open(task, path, flags)
            if path is not None
            else self.pty.open(task, self.sb.nodes[self.pty.index], None, flags)
        )
        try:
            return task.files.install(file, task.rlimit(7), 0, bool(flags & O_CLOEXEC))  # RLIMIT_NOFILE
        except Errno:
            file.put()
            raise


class PtsInode(Inode):
    """/dev/pts/N."""

    def __init__(self, sb: DevptsSuper, tty: Tty, uid: int, gid: int, mode: int) -> None:
        super().__init__(sb, st.S_IFCHR | mode, uid, gid, ino=3 + tty.rdev % 1000003)
        self.tty, self.rdev = tty, tty.rdev

    def open(self, task: Task, path: Path, flags: int) -> File:
        """The slave side."""
        return self.tty.open(task, self, path, flags)


class PtmxInode(Inode):
    """/dev/pts/ptmx."""

    def __init__(self, sb: DevptsSuper, mode: int) -> None:
        super().__init__(sb, st.S_IFCHR | mode, ino=2)
        self.pts, self.rdev = sb, PTMX

    def open(self, task: Task, path: Path, flags: int) -> File:
        """A new pair."""
        return self.pts.open_master(task, self, path, flags)


class PtsRoot(Inode):
    """The directory /dev/pts."""

    sb: DevptsSuper

    def lookup(self, name: bytes) -> Inode:
        """ptmx, or a pair that exists."""
        if name == b"ptmx":
            return self.sb.ptmx
        if name.isdigit() and len(name) < 6 and (name == b"0" or name[0] != 48):
            node = self.sb.nodes.get(int(name))
            if node is not None:
                return node
        raise Errno(errno.ENOENT)

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """ptmx first, then the pairs, newest last."""
        yield b"ptmx", self.sb.ptmx.ino, DT_CHR
        for index, node in list(self.sb.nodes.items()):
            yield str(index).encode(), node.ino, DT_CHR


class DevptsSuper(SuperBlock):
    """devpts. There is one for the whole sandbox, however often it is mounted."""

    caching = False
    magic = DEVPTS_MAGIC
    fstype = "devpts"

    def __init__(self, kernel: Kernel, gid: int = 5, mode: int = 0o620, ptmxmode: int = 0o666) -> None:
        super().__init__()
        self.kernel, self.gid, self.mode = kernel, gid, mode
        self.source = "devpts"
        self.options = f"gid={gid},mode={mode:o},ptmxmode={ptmxmode:o}"
        self.nodes: dict[int, PtsInode] = {}
        self.root = PtsRoot(self, st.S_IFDIR | 0o755, ino=1)
        self.ptmx = PtmxInode(self, ptmxmode)

    def free_index(self) -> int:
        """The lowest number that no terminal has; ENOSPC."""
        for index in range(PTY_MAX):
            if index not in self.nodes:
                return index
        raise Errno(errno.ENOSPC)

    def add(self, index: int, tty: Tty, uid: int = 0) -> PtsInode:
        """Show `tty` as node `index`."""
        node = self.nodes[index] = PtsInode(self, tty, uid, self.gid, self.mode)
        return node

    def remove(self, pty: Pty) -> None:
        """The pair is gone."""
        self.nodes.pop(pty.index, None)

    def open_master(self, task: Task, inode: Inode, path: Path | None, flags: int) -> MasterFile:
        """open(2) of /dev/ptmx; ENOSPC when there are too many."""
        index = self.free_index()
        pty = Pty(self.kernel, index)
        self.add(index, pty, task.creds.fsuid)
        return MasterFile(inode, path, flags, pty, self)

    def place(self, task: Task, pty: Pty) -> Path | None:
        """Where /dev/pts/N is seen by `task`, None when it is not there under that name."""
        from kvmsentry.fs.vfs import walk

        try:
            place = walk(task, b"/dev/pts/%d" % pty.index)
        except Errno:
            return None
        return place if place.inode is self.nodes.get(pty.index) else None
