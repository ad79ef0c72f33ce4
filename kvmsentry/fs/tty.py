"""Terminals: tty_struct with its session, its foreground group and its ioctls; tty_ioctl(2), credentials(7).

    TtyFile (open file description) --> Tty (LineDiscipline + job control) --> wires: devpts.Pty, hostterm.HostTerminal

A tty knows the session it controls and that session knows the tty; `foreground` is the process group that may read.
Files carry TASK_IO, so that read_by and write_by are told who is asking. Everything here runs on the Sentry thread.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs import ttydisc
from kvmsentry.fs.anon import gather, scatter
from kvmsentry.fs.ttydisc import (
    CBAUD,
    CREAD,
    CS8,
    CSIZE,
    ICANON,
    NCCS,
    PARENB,
    SIGCONT,
    SIGHUP,
    SIGTTIN,
    SIGTTOU,
    SIGWINCH,
    TOSTOP,
    VMIN,
    VSTART,
    VSTOP,
    VTIME,
    Termios,
)  # fmt: skip
from kvmsentry.fs.vfs import (
    O_NOCTTY,
    O_NONBLOCK,
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLOUT,
    POLLRDNORM,
    POLLWRNORM,
    TASK_IO,
    File,
    Inode,
    Path,
)  # fmt: skip
from kvmsentry.kernel.task import SigInfo
from kvmsentry.kernel.traps import ERESTARTSYS, Timer, WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Process, ProcessGroup, Session, Task

# uapi/asm-generic/ioctls.h
TCGETS, TCSETS, TCSETSW, TCSETSF, TCGETA, TCSETA, TCSETAW, TCSETAF = range(0x5401, 0x5409)
TCSBRK, TCXONC, TCFLSH, TIOCEXCL, TIOCNXCL, TIOCSCTTY, TIOCGPGRP, TIOCSPGRP, TIOCOUTQ, TIOCSTI = range(0x5409, 0x5413)
TIOCGWINSZ, TIOCSWINSZ, FIONREAD, TIOCCONS, TIOCPKT, TIOCNOTTY = 0x5413, 0x5414, 0x541B, 0x541D, 0x5420, 0x5422
TIOCSETD, TIOCGETD, TCSBRKP, TIOCSBRK, TIOCCBRK, TIOCGSID = 0x5423, 0x5424, 0x5425, 0x5427, 0x5428, 0x5429
TCGETS2, TCSETS2, TCSETSW2, TCSETSF2 = 0x802C542A, 0x402C542B, 0x402C542C, 0x402C542D
TIOCGPTN, TIOCSPTLCK, TIOCGDEV, TIOCSIG, TIOCVHANGUP = 0x80045430, 0x40045431, 0x80045432, 0x40045436, 0x5437
TIOCGPKT, TIOCGPTLCK, TIOCGEXCL, TIOCGPTPEER = 0x80045438, 0x80045439, 0x80045440, 0x5441
TIOCGLCKTRMIOS, TIOCSLCKTRMIOS = 0x5456, 0x5457

CAP_SYS_ADMIN = 21  # uapi/linux/capability.h
SI_KERNEL = 0x80  # uapi/asm-generic/siginfo.h
SIG_IGN = 1

READABLE = POLLIN | POLLRDNORM
WRITABLE = POLLOUT | POLLWRNORM
WRITE_CHUNK = 65536  # bytes of one write(2) that are copied out of guest memory at a time

_u32 = struct.Struct("<I")
_s32 = struct.Struct("<i")
_termios = struct.Struct("<4IB19s")  # struct termios, uapi/asm-generic/termbits.h
_termios2 = struct.Struct("<4IB19s2I")
_termio = struct.Struct("<4HB8s")
_BAUD = {0: 0, 1: 50, 2: 75, 3: 110, 4: 134, 5: 150, 6: 200, 7: 300, 8: 600, 9: 1200, 10: 1800, 11: 2400, 12: 4800,
13: 9600,
         14: 19200, 15: 38400, 0x1001: 57600, 0x1002: 115200, 0x1003: 230400, 0x1004: 460800, 0x1005: 500000,
         0x1006: 576000,
         0x1007: 921600, 0x1008: 1000000, 0x1009: 1152000, 0x100A: 1500000, 0x100B: 2000000, 0x100C: 2500000,
         0x100D: 3000000, 0x100E: 3500000, 0x100F: 4000000}  # fmt: skip
_BOTHER = 0x1000


def send_group(group: ProcessGroup, signo: int) -> None:
    """A signal from the kernel to every process of `group`."""
    from kvmsentry.kernel import signals

    signals.send_group(group, SigInfo(signo, SI_KERNEL))


def send_process(process: Process, signo: int) -> None:
    """A signal from the kernel to `process`."""
    from kvmsentry.kernel import signals

    signals.send_process(process, SigInfo(signo, SI_KERNEL))


def orphaned(group: ProcessGroup) -> bool:
    """No member has a parent in another group of the same session: nobody is there to continue it (POSIX)."""
    for process in group.processes:
        parent = process.parent
        if parent is None or process.zombie:
            continue
        if parent.group is not group and parent.session is group.session:
            return False
    return True


class Tty(ttydisc.LineDiscipline):
    """A terminal. Subclasses are the wires: `emit`, `write_room`, and what happens when the last file is closed."""

    is_pty = True

    def __init__(self, kernel: Kernel, rdev: int) -> None:
        self.kernel, self.rdev = kernel, rdev
        self.queue = WaitQueue()
        self.session: Session | None = None  # the session that this is the controlling terminal of
        self.foreground: ProcessGroup | None = None
        self.winsize = bytes(8)  # struct winsize
        self.files: set[TtyFile] = set()
        self.exclusive = False
        self.locked_modes: Termios | None = None  # TIOCSLCKTRMIOS: bits and characters that are not 0 cannot change
        self.gone = False  # the other side is closed for good
        super().__init__()

    # -- opening and the controlling terminal ------------------------------------------------------------------------
    def open(self, task: Task, inode: Inode, path: Path | None, flags: int) -> TtyFile:
        """A new open file description; it becomes the controlling terminal of a session leader that has none, unless
        O_NOCTTY (tty_open). EIO when the other side is gone, EBUSY after TIOCEXCL."""
        if self.gone:
            raise Errno(errno.EIO)
        if self.exclusive and not task.creds.capable(CAP_SYS_ADMIN):
            raise Errno(errno.EBUSY)
        file = TtyFile(inode, path, flags, self)
        process = task.process
        session = process.session
        if not flags & O_NOCTTY and session.leader is process and session.tty is None and self.session is None:
            if file.readable:
                self.control(process)
        return file

    def control(self, process: Process) -> None:
        """Become the controlling terminal of the session that `process` leads (__proc_set_tty)."""
        self.session, self.foreground = process.session, process.group
        process.session.tty = self

    def session_ended(self, session: Session, exiting: bool = True) -> None:
        """The leader of the session has exited or given its terminal up: the foreground group is hung up and the
        terminal is free for another session (disassociate_ctty). `session.tty` may be cleared already."""
        if self.session is not session:
            return
        group, self.session, self.foreground = self.foreground, None, None
        session.tty = None
        if group is not None:
            send_group(group, SIGHUP)
            if not exiting:  # else exit(2) wakes those that are stopped, as an orphaned group
                send_group(group, SIGCONT)

    def hangup(self) -> None:
        """vhangup: the terminal is taken away from all who have it open; SIGHUP and SIGCONT to the session's leader."""
        for file in list(self.files):
            file.hung_up = True
        session, self.session, self.foreground = self.session, None, None
        if session is not None:
            session.tty = None
            if session.leader is not None and not session.leader.zombie:
                send_process(session.leader, SIGHUP)
                send_process(session.leader, SIGCONT)
        self.queue.wake(READABLE | WRITABLE | POLLHUP | POLLERR)

    def job_control(self, task: Task, signo: int) -> int:
        """May `task` use its terminal? 0, or what the call returns: -ERESTARTSYS after SIGTTIN or SIGTTOU went to
        its group, -EIO where that could not help (__tty_check_change)."""
        if self.foreground is None or self.session is None:
            return 0
        group = task.process.group
        if group is self.foreground or group.session is not self.session:
            return 0
        if task.blocked >> (signo - 1) & 1 or task.sighand.actions[signo].handler == SIG_IGN:
            return -errno.EIO if signo == SIGTTIN else 0
        if orphaned(group):
            return -errno.EIO
        send_group(group, signo)
        return -ERESTARTSYS

    def resize(self, rows: int, cols: int) -> None:
        """A new window size in characters; tells the foreground group when it differs."""
        self.set_winsize(struct.pack("<4H", rows & 0xFFFF, cols & 0xFFFF, 0, 0))

    def set_winsize(self, winsize: bytes) -> None:
        """struct winsize as a whole; SIGWINCH when it differs (tty_do_resize)."""
        if winsize != self.winsize:
            self.winsize = winsize
            if self.foreground is not None:
                send_group(self.foreground, SIGWINCH)

    # -- hooks of the line discipline --------------------------------------------------------------------------------
    def signal_foreground(self, signo: int) -> None:
        """A key that means a signal."""
        if self.foreground is not None:
            send_group(self.foreground, signo)

    def wake_readers(self) -> None:
        """There is input."""
        if self.queue.waiters:
            self.queue.wake(READABLE)

    def wake_writers(self) -> None:
        """There is room for output."""
        if self.queue.waiters:
            self.queue.wake(WRITABLE)

    def last_close(self) -> None:
        """No file is open any more."""

    def pending_output(self) -> int:
        """TIOCOUTQ: bytes the other side has not taken."""
        return 0

    # -- ioctl -------------------------------------------------------------------------------------------------------
    def ioctl(self, task: Task, request: int, argument: int, file: File, master: bool = False) -> int:
        """ioctl(2) through `file`, which may be the pty's master side: then it is about this terminal all the same."""
        handler = _IOCTLS.get(request)
        if handler is None:
            raise Errno(errno.ENOTTY)
        return handler(self, task, argument, file, master)


class TtyFile(File):
    """A terminal, opened."""

    write_all = True  # a blocking write(2) goes on until all of it is out

    def __init__(self, inode: Inode, path: Path | None, flags: int, tty: Tty) -> None:
        super().__init__(inode, path, flags | TASK_IO)
        self.tty, self.queue = tty, tty.queue
        self.hung_up = False
        self._deadline: int | None = None  # VTIME of the read under way
        self._timer: Timer | None = None
        tty.files.add(self)

    def release(self) -> None:
        """The last descriptor is closed."""
        if self._timer is not None:
            self._timer.cancel()
        self.tty.files.discard(self)
        if not self.tty.files and not self.hung_up:
            self.tty.last_close()

    def queue_by(self, task: Task) -> WaitQueue:
        """Where `task` waits."""
        return self.tty.queue

    def read_by(self, task: Task, views: list[memoryview]) -> int:
        """read(2); a background process gets SIGTTIN or -EIO instead."""
        if not self.hung_up:
            refused = self.tty.job_control(task, SIGTTIN)
            if refused:
                return refused
        return self.read(views)

    def write_by(self, task: Task, views: list[memoryview]) -> int:
        """write(2); with TOSTOP a background process gets SIGTTOU instead."""
        if self.tty.termios.lflag & TOSTOP and not self.hung_up:
            refused = self.tty.job_control(task, SIGTTOU)
            if refused:
                return refused
        return self.write(views)

    def read(self, views: list[memoryview]) -> int:
        """By the rules of termios(3): a line, or VMIN bytes within VTIME; 0 at an end of file."""
        tty = self.tty
        if self.hung_up:
            return 0
        count = sum(map(len, views))
        if not count:
            return 0
        if not tty.available():
            if tty.gone:
                return -errno.EIO
            if tty.termios.lflag & ICANON:
                return -errno.EAGAIN
            return self._wait(0, count)
        if not tty.termios.lflag & ICANON and not self.flags & O_NONBLOCK:
            have = len(tty.buffer)
            if have < min(tty.termios.cc[VMIN], count):
                waited = self._wait(have, count)
                if waited:
                    return waited
        self._stop_timer()
        data = tty.take(count)
        n = scatter(views, data)
        tty.refill()
        return n

    def _wait(self, have: int, count: int) -> int:
        """Raw mode with less than was asked for: 0 = give what there is, -EAGAIN = wait, possibly for a timer."""
        cc = self.tty.termios.cc
        least, tenths = cc[VMIN], cc[VTIME]
        if not least and not tenths:
            return 0
        if self.flags & O_NONBLOCK:
            return -errno.EAGAIN
        if not tenths or (least and not have):
            return -errno.EAGAIN
        kernel = self.tty.kernel
        now = kernel.now()
        if self._timer is None and self._deadline is not None and self._deadline <= now < self._deadline + 100_000_000:
            self._deadline = None  # the timer has rung for this read
            return 0
        if self._timer is None or least:  # between bytes the clock starts anew
            self._stop_timer()
            self._deadline = now + tenths * 100_000_000
            self._timer = kernel.timers.at(self._deadline, self._expired)
        return -errno.EAGAIN

    def _expired(self) -> None:
        self._timer = None
        self.tty.queue.wake(READABLE)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._deadline = None

    def write(self, views: list[memoryview]) -> int:
        """write(2): as much as the other side has room for; -EAGAIN when none, -EIO after a hangup."""
        tty = self.tty
        if self.hung_up or tty.gone:
            return -errno.EIO
        data = gather(views, WRITE_CHUNK)
        return tty.output(data) or (-errno.EAGAIN if data else 0)

    def poll(self) -> int:
        """n_tty_poll."""
        if self.hung_up:
            return READABLE | WRITABLE | POLLHUP | POLLERR
        tty = self.tty
        events = 0
        if tty.available(poll=True):
            events = READABLE
        if tty.gone:
            events |= POLLHUP
        if not tty.stopped and tty.write_room() > 0:
            events |= WRITABLE
        return events

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """tty_ioctl(2)."""
        if self.hung_up:
            raise Errno(errno.ENOTTY if request == TIOCSPGRP else errno.EIO)
        return self.tty.ioctl(task, request, argument, self)


# -- ioctls: (tty, task, argument, file, through the master side) -> result ------------------------------------------
def _allowed(tty: Tty, task: Task) -> None:
    """tty_check_change: a background group may not change the terminal."""
    refused = tty.job_control(task, SIGTTOU)
    if refused:
        raise Errno(-refused)


def _tcgets(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    t = tty.termios
    task.mm.write(argument, _termios.pack(t.iflag, t.oflag, t.cflag, t.lflag, t.line, bytes(t.cc)))
    return 0


def _tcgets2(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    t = tty.termios
    fields = t.iflag, t.oflag, t.cflag, t.lflag, t.line, bytes(t.cc), t.ispeed, t.ospeed
    task.mm.write(argument, _termios2.pack(*fields))
    return 0


def _tcgeta(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    t = tty.termios
    fields = t.iflag & 0xFFFF, t.oflag & 0xFFFF, t.cflag & 0xFFFF, t.lflag & 0xFFFF, t.line, bytes(t.cc[:8])
    task.mm.write(argument, _termio.pack(*fields))
    return 0


def _set(tty: Tty, new: Termios, flush: bool) -> int:
    baud = new.cflag & CBAUD
    if baud != _BOTHER:
        new.ospeed = new.ispeed = _BAUD.get(baud, 38400)
    if tty.locked_modes is not None:
        _keep_locked(tty.termios, new, tty.locked_modes)
    if tty.is_pty:  # pty_set_termios: a pty has no wire whose form could change
        new.cflag = new.cflag & ~(CSIZE | PARENB) | CS8 | CREAD
    if flush:
        tty.flush_input()
        tty.backlog.clear()
        tty.input_room()
    tty.set_termios(new)
    return 0


def _keep_locked(old: Termios, new: Termios, locked: Termios) -> None:
    """Bits that TIOCSLCKTRMIOS has locked stay as they are in `old` (unset_locked_termios)."""
    for name in ("iflag", "oflag", "cflag", "lflag"):
        bits = getattr(locked, name)
        setattr(new, name, getattr(new, name) & ~bits | getattr(old, name) & bits)
    if locked.line:
        new.line = old.line
    for index, lock in enumerate(locked.cc):
        if lock:
            new.cc[index] = old.cc[index]


def _glcktrmios(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    t = tty.locked_modes
    fields = (t.iflag, t.oflag, t.cflag, t.lflag, t.line, bytes(t.cc)) if t is not None else (0, 0, 0, 0, 0, b"")
    task.mm.write(argument, _termios.pack(*fields))
    return 0


def _slcktrmios(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    if not task.creds.capable(CAP_SYS_ADMIN):
        raise Errno(errno.EPERM)
    t = tty.locked_modes = Termios()
    t.iflag, t.oflag, t.cflag, t.lflag, t.line, cc = _termios.unpack(task.mm.read(argument, _termios.size))
    t.cc = bytearray(cc)
    return 0


def _tcsets(flush: bool) -> Callable[..., int]:
    def change(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
        _allowed(tty, task)
        raw = task.mm.read(argument, _termios.size)
        new = tty.termios.copy()
        new.iflag, new.oflag, new.cflag, new.lflag, new.line, cc = _termios.unpack(raw)
        new.cc = bytearray(cc)
        return _set(tty, new, flush)

    return change


def _tcsets2(flush: bool) -> Callable[..., int]:
    def change(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
        _allowed(tty, task)
        raw = task.mm.read(argument, _termios2.size)
        new = Termios()
        new.iflag, new.oflag, new.cflag, new.lflag, new.line, cc, new.ispeed, new.ospeed = _termios2.unpack(raw)
        new.cc = bytearray(cc)
        return _set(tty, new, flush)

    return change


def _tcseta(flush: bool) -> Callable[..., int]:
    def change(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
        _allowed(tty, task)
        new = tty.termios.copy()
        iflag, oflag, cflag, lflag, new.line, cc = _termio.unpack(task.mm.read(argument, _termio.size))
        new.iflag, new.oflag = new.iflag & ~0xFFFF | iflag, new.oflag & ~0xFFFF | oflag
        new.cflag, new.lflag = new.cflag & ~0xFFFF | cflag, new.lflag & ~0xFFFF | lflag
        new.cc[:8] = cc
        return _set(tty, new, flush)

    return change


def _tcsbrk(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    _allowed(tty, task)  # tcdrain(3) and breaks: what was written is with the other side already
    return 0


def _tcxonc(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    _allowed(tty, task)
    if argument == 0:  # TCOOFF
        if not tty.stopped_by_ioctl:
            tty.stopped_by_ioctl = True
            tty.stop()
    elif argument == 1:  # TCOON
        if tty.stopped_by_ioctl:
            tty.stopped_by_ioctl = False
            tty.start()
    elif argument in (2, 3):  # TCIOFF, TCION: tell the other side
        key = tty.termios.cc[VSTOP if argument == 2 else VSTART]
        if key:
            tty.emit(bytes((key,)))
    else:
        raise Errno(errno.EINVAL)
    return 0


def _tcflsh(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    _allowed(tty, task)
    if argument not in (0, 1, 2):
        raise Errno(errno.EINVAL)
    if argument != 1:  # TCIFLUSH, TCIOFLUSH
        tty.flush_input()
        tty.backlog.clear()
        tty.input_room()
    if argument != 0:  # TCOFLUSH, TCIOFLUSH
        tty.flush_output()
    return 0


def _exclusive(value: bool) -> Callable[..., int]:
    def change(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
        tty.exclusive = value
        return 0

    return change


def _gexcl(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    task.mm.write(argument, _u32.pack(tty.exclusive))
    return 0


def _sctty(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    process = task.process
    session = process.session
    leads = session.leader is process
    if leads and tty.session is session:
        return 0
    if not leads or session.tty is not None:
        raise Errno(errno.EPERM)
    admin = task.creds.capable(CAP_SYS_ADMIN)
    if tty.session is not None:
        if argument != 1 or not admin:
            raise Errno(errno.EPERM)
        tty.session.tty = None  # stolen
    if not file.readable and not admin:
        raise Errno(errno.EPERM)
    tty.control(process)
    return 0


def _notty(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    session = task.process.session
    if session.tty is not tty:
        raise Errno(errno.ENOTTY)
    if session.leader is task.process:
        tty.session_ended(session, exiting=False)
    return 0


def _gsid(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    if (not master and task.process.session.tty is not tty) or tty.session is None:
        raise Errno(errno.ENOTTY)
    task.mm.write(argument, _s32.pack(task.process.pid_ns.sid_of(tty.session)))
    return 0


def _gpgrp(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    if not master and task.process.session.tty is not tty:
        raise Errno(errno.ENOTTY)
    task.mm.write(argument, _s32.pack(task.process.pid_ns.pgid_of(tty.foreground)))
    return 0


def _spgrp(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    refused = tty.job_control(task, SIGTTOU)
    if refused:
        raise Errno(errno.ENOTTY if refused == -errno.EIO else -refused)
    session = task.process.session
    if session.tty is not tty or tty.session is not session:
        raise Errno(errno.ENOTTY)
    (pgid,) = _s32.unpack(task.mm.read(argument, 4))
    if pgid < 0:
        raise Errno(errno.EINVAL)
    space = task.process.pid_ns
    group = session.groups.get(pgid) if not space.level else space.group(pgid)
    if group is None or group.session is not session:
        known = group is not None or any(pgid in other.groups for other in task.kernel.sessions.values())
        raise Errno(errno.EPERM if known else errno.ESRCH)
    tty.foreground = group
    return 0


def _outq(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    task.mm.write(argument, _s32.pack(len(tty.buffer) if master else tty.pending_output()))
    return 0


def _inq(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    task.mm.write(argument, _s32.pack(tty.pending_output() if master else tty.input_count()))
    return 0


def _sti(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    if not task.creds.capable(CAP_SYS_ADMIN):
        raise Errno(errno.EIO)  # dev.tty.legacy_tiocsti is 0
    tty.input(task.mm.read(argument, 1))
    return 0


def _gwinsz(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    task.mm.write(argument, tty.winsize)
    return 0


def _swinsz(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    tty.set_winsize(task.mm.read(argument, 8))
    return 0


def _getd(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    task.mm.write(argument, _s32.pack(0))  # N_TTY
    return 0


def _setd(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    _allowed(tty, task)
    if task.mm.read(argument, 4) != bytes(4):
        raise Errno(errno.EINVAL)
    return 0


def _gdev(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    task.mm.write(argument, _u32.pack(tty.rdev))
    return 0


def _vhangup(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    if not task.creds.capable(CAP_SYS_ADMIN):
        raise Errno(errno.EPERM)
    tty.hangup()
    return 0


def _cons(tty: Tty, task: Task, argument: int, file: File, master: bool) -> int:
    raise Errno(errno.EPERM)


_IOCTLS: dict[int, Callable[[Tty, Any, int, File, bool], int]] = {
    TCGETS: _tcgets, TCSETS: _tcsets(False), TCSETSW: _tcsets(False), TCSETSF: _tcsets(True),
    TCGETS2: _tcgets2, TCSETS2: _tcsets2(False), TCSETSW2: _tcsets2(False), TCSETSF2: _tcsets2(True),
    TCGETA: _tcgeta, TCSETA: _tcseta(False), TCSETAW: _tcseta(False), TCSETAF: _tcseta(True),
    TCSBRK: _tcsbrk, TCSBRKP: _tcsbrk, TIOCSBRK: _tcsbrk, TIOCCBRK: _tcsbrk, TCXONC: _tcxonc, TCFLSH: _tcflsh,
    TIOCEXCL: _exclusive(True), TIOCNXCL: _exclusive(False), TIOCGEXCL: _gexcl, TIOCSCTTY: _sctty, TIOCNOTTY: _notty,
    TIOCGSID: _gsid, TIOCGPGRP: _gpgrp, TIOCSPGRP: _spgrp, TIOCOUTQ: _outq, FIONREAD: _inq, TIOCSTI: _sti,
    TIOCGWINSZ: _gwinsz, TIOCSWINSZ: _swinsz, TIOCGETD: _getd, TIOCSETD: _setd, TIOCGDEV: _gdev, TIOCVHANGUP: _vhangup,
    TIOCCONS: _cons, TIOCGLCKTRMIOS: _glcktrmios, TIOCSLCKTRMIOS: _slcktrmios,
}  # fmt: skip
assert NCCS == 19
