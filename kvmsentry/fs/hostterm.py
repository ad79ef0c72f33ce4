"""The user's own terminal as the container's: what `run -it` connects; the guest's side is a tty like any other.

    keyboard --in_fd--> input (our line discipline) --> TtyFile.read
    screen <--out_fd-- outgoing <-- output processing <-- TtyFile.write

The host's terminal is in raw mode: echo, ^C and line editing are ours. The launcher sets and restores that. Both
descriptors are opened anew where that is allowed, since O_NONBLOCK belongs to the open file description and the user's
shell shares the one we were given. The Sentry's one thread never waits for a slow screen: what does not fit waits in
`outgoing` until the host says that there is room, and writers are held back meanwhile.
"""

from __future__ import annotations

import errno
import os
import select
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvmsentry import log
from kvmsentry.errors import Errno, HostError
from kvmsentry.fs.devfs import devices
from kvmsentry.fs.devpts import SLAVE_MAJOR
from kvmsentry.fs.tty import Tty, TtyFile
from kvmsentry.fs.vfs import O_RDWR, FsContext, Path, makedev, walk
from kvmsentry.kernel.task import Credentials

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel

OUTGOING_LIMIT = 65536  # bytes that wait for a slow screen before writers are held back
INPUT_CHUNK = 4096
BACKLOG_LIMIT = 65536  # typed bytes that wait for a program before we stop reading the keyboard
FINAL_FLUSH_MS = 1000  # how long `close` waits for a screen that takes nothing


def _own(fd: int, mode: int) -> int:
    """A non-blocking descriptor of what `fd` is: an open file of our own, or `fd` itself with the flag set (a terminal
    of another user's after su(1), a socket)."""
    try:
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        pass
    try:
        os.set_blocking(fd, False)
    except OSError as error:
        raise HostError(f"O_NONBLOCK on the terminal's descriptor {fd}", error.errno or 0) from None
    return fd


class HostTerminal(Tty):
    """A tty whose other side is the host's terminal: `in_fd` (-1: nobody types) and `out_fd`. Constructing it makes it
    /dev/console and /dev/pts/0. Call before the Sentry is locked down."""

    def __init__(self, kernel: Kernel, in_fd: int, out_fd: int, rows: int = 0, cols: int = 0) -> None:
        super().__init__(kernel, makedev(SLAVE_MAJOR, 0))
        same = in_fd == out_fd
        self.in_fd = _own(in_fd, os.O_RDONLY if not same else os.O_RDWR) if in_fd >= 0 else -1
        self.out_fd = self.in_fd if same else _own(out_fd, os.O_WRONLY)
        self.outgoing = bytearray()
        self._watching_in = self._watching_out = False
        if rows or cols:
            self.resize(rows, cols)
        devices(kernel).attach_console(self)
        self._watch_input()

    # -- keyboard ----------------------------------------------------------------------------------------------------
    def _watch_input(self) -> None:
        if self.in_fd >= 0 and not self._watching_in and not self.gone:
            try:
                self.kernel.platform.watch(self.in_fd, select.EPOLLIN, self._typed)
            except (OSError, HostError) as error:
                if error.errno != errno.EPERM:
                    raise
                self.in_fd = -1  # no keyboard: a file, or /dev/null, which epoll(7) does not take
                return
            self._watching_in = True

    def _unwatch_input(self) -> None:
        if self._watching_in:
            self._watching_in = False
            if not (self._watching_out and self.in_fd == self.out_fd):
                self.kernel.platform.unwatch(self.in_fd)

    def _typed(self, events: int) -> None:
        """Called within the platform's wait: the keyboard, and the screen too when it is the same descriptor."""
        if self._watching_out and self.in_fd == self.out_fd and events & select.EPOLLOUT:
            self._screen_ready(events)
        if not self._watching_in or not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return
        try:
            data = os.read(self.in_fd, INPUT_CHUNK)
        except BlockingIOError:
            return
        except InterruptedError:
            return
        except OSError as error:
            self._lost(error)
            return
        if not data:
            self._lost(None)
            return
        self.input(data)
        if len(self.backlog) >= BACKLOG_LIMIT:
            self._unwatch_input()

    def input_room(self) -> None:
        """A program has read: listen to the keyboard again."""
        if len(self.backlog) < BACKLOG_LIMIT:
            self._watch_input()

    def _lost(self, error: OSError | None) -> None:
        """The user's terminal is gone: a hangup, as when a modem drops."""
        if self.gone:
            return
        log.log(f"the host's terminal is gone: {error or 'end of file'}")
        self._unwatch_input()
        self._unwatch_output()
        self.gone = True
        self.outgoing.clear()
        self.hangup()

    # -- screen ------------------------------------------------------------------------------------------------------
    def emit(self, data: bytes) -> None:
        """To the screen: at once if it takes it, else later and in order."""
        if self.gone:
            return
        if not self.outgoing:
            n = self._write(data)
            if n == len(data):
                return
            data = data[n:]
        self.outgoing += data
        self._watch_output()

    def write_room(self) -> int:
        """Writers are held back while the screen is behind."""
        return OUTGOING_LIMIT - len(self.outgoing)

    def pending_output(self) -> int:
        """What the screen has not taken."""
        return len(self.outgoing)

    def flush_output(self) -> None:
        """TCOFLUSH, and what a typed ^C throws away."""
        self.outgoing.clear()
        self._unwatch_output()

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self.out_fd, data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._lost(error)
            return len(data)

    def _watch_output(self) -> None:
        if self._watching_out or self.gone:
            return
        self._watching_out = True
        platform = self.kernel.platform
        if self.in_fd == self.out_fd:
            if self._watching_in:
                platform.unwatch(self.in_fd)
            platform.watch(self.out_fd, select.EPOLLOUT | (select.EPOLLIN if self._watching_in else 0), self._typed)
        else:
            platform.watch(self.out_fd, select.EPOLLOUT, self._screen_ready)

    def _unwatch_output(self) -> None:
        if not self._watching_out:
            return
        self._watching_out = False
        platform = self.kernel.platform
        platform.unwatch(self.out_fd)
        if self.in_fd == self.out_fd and self._watching_in:
            platform.watch(self.in_fd, select.EPOLLIN, self._typed)

    def _screen_ready(self, events: int) -> None:
        n = self._write(self.outgoing[:OUTGOING_LIMIT])
        if self.gone:
            return
        del self.outgoing[:n]
        if not self.outgoing:
            self._unwatch_output()
        if self.write_room() > 0:
            self.flush_echo()
            self.wake_writers()

    def close(self) -> None:
        """The sandbox ends: write out what is left, for as long as the screen takes some within a second."""
        while self.outgoing and not self.gone:
            poller = select.poll()
            poller.register(self.out_fd, select.POLLOUT)
            if not poller.poll(FINAL_FLUSH_MS):
                break
            n = self._write(bytes(self.outgoing))
            del self.outgoing[:n]
        self._unwatch_output()
        self._unwatch_input()


def open_terminal(kernel: Kernel, in_fd: int, out_fd: int, uid: int, root: Path) -> tuple[HostTerminal, TtyFile]:
    """The terminal of `run -t` and an open file of it for standard input, output and error, known by its place under
    /dev/pts as seen from `root` (ttyname(3)). `uid` owns the node."""
    terminal = HostTerminal(kernel, in_fd, out_fd)
    pts = devices(kernel).pts
    index = terminal.rdev & 0xFF
    node = pts.nodes[index]
    node.uid = uid
    path: Path | None = None
    nobody: Any = SimpleNamespace(kernel=kernel, fs=FsContext(root, root), creds=Credentials())
    try:
        place = walk(nobody, b"/dev/pts/%d" % index)
    except Errno:
        log.log("the terminal has no name: devpts is not mounted at /dev/pts")
    else:
        path = place if place.inode is node else None
    return terminal, TtyFile(node, path, O_RDWR, terminal)
