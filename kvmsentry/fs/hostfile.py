"""A descriptor of the host as the application's stdin, stdout or stderr, when there is no terminal of ours (no `-t`).

The descriptor may be shared with other processes (the shell that started us), so its O_NONBLOCK flag is not ours to
set: flags belong to the open file description. What can be opened again through /proc/self/fd is, with O_NONBLOCK,
which makes a description of our own (pipes, FIFOs, terminals); sockets have MSG_DONTWAIT; for the rest poll(2) comes
before each call and writes are no longer than what a ready file takes for certain. Regular files stay as they are:
their position is shared on purpose, as in `(a; b) > file`, and they never block.

Readiness comes edge-triggered from the platform's epoll: one registration for life, no cost while nothing changes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat as st
import struct
import termios
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno, HostError
from kvmsentry.fs.vfs import (
    O_ACCMODE,
    O_APPEND,
    O_RDONLY,
    O_RDWR,
    O_WRONLY,
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLOUT,
    POLLRDHUP,
    POLLRDNORM,
    POLLWRNORM,
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

EPOLLET = 1 << 31  # uapi/linux/eventpoll.h
PIPE_BUF = 4096  # a pipe that polls writable takes this much
TTY_CHUNK = 256  # WAKEUP_CHARS, drivers/tty/tty_io.c: about what a writable terminal takes
TCGETS, TCSETS, TCSETSF, TIOCGWINSZ, FIONREAD = 0x5401, 0x5402, 0x5404, 0x5413, 0x541B  # uapi/asm-generic/ioctls.h
TERMIOS_SIZE, WINSIZE_SIZE = 36, 8  # struct termios and struct winsize of the kernel

_int = struct.Struct("<i")


class HostFs(SuperBlock):
    """Where the inodes of host descriptors live."""

    magic = 0x50495045
    fstype = "pipefs"

    def __init__(self) -> None:
        super().__init__()
        self.root = Inode(self, 0o040755)


_sb = HostFs()


class HostInode(Inode):
    """What fstat(2) shows of a host descriptor: its kind, and nothing that tells where it is on the host. Opening it
    again (/dev/stdout, /proc/self/fd/1) gives another file on the same descriptor."""

    __slots__ = ("host", "kernel")

    def __init__(self, kernel: Kernel, fd: int, uid: int, gid: int) -> None:
        info = os.fstat(fd)
        kind = st.S_IFMT(info.st_mode)
        if kind not in (st.S_IFREG, st.S_IFCHR):
            kind = st.S_IFIFO  # sockets, and pipes
        super().__init__(_sb, kind | {st.S_IFREG: 0o644, st.S_IFCHR: 0o620}.get(kind, 0o600), uid, gid)
        self.kernel = kernel
        if kind == st.S_IFCHR:
            if os.isatty(fd):
                self.rdev = makedev(136, 0)
            else:
                self.rdev = makedev(os.major(info.st_rdev), os.minor(info.st_rdev))
                self.mode = st.S_IFCHR | 0o666
        self.host: Any = HostDescriptor(fd, kind, info)
        self.refresh()

    def refresh(self) -> None:
        """The size of a regular file is the host's."""
        if st.S_ISREG(self.mode) and self.host.fd >= 0:
            try:
                info = os.fstat(self.host.fd)
            except OSError:
                return
            self.size, self.mtime = info.st_size, info.st_mtime_ns

    def truncate(self, size: int) -> None:
        """ftruncate(2) of a regular file."""
        if not st.S_ISREG(self.mode):
            raise Errno(errno.EINVAL)
        try:
            os.ftruncate(self.host.fd, size)
        except OSError as error:
            raise Errno(error.errno or errno.EIO) from None
        self.size = size

    def open(self, task: Task, path: Path, flags: int) -> File:
        """Another file on the same descriptor; EACCES when the host opened it for the other direction only."""
        host = self.host
        access = flags & O_ACCMODE
        if host.fd < 0:
            raise Errno(errno.ENXIO)
        if host.access not in (O_RDWR, access):
            raise Errno(errno.EACCES)
        file = HostFile(self.kernel, self, flags, path)
        file.own_position = True
        return file


class HostDescriptor:
    """The descriptor and how to use it without sleeping and without touching its flags."""

    __slots__ = ("fd", "kind", "socket", "private", "tty", "access", "limit", "always", "termios", "watched",
                 "given", "users")  # fmt: skip

    def __init__(self, fd: int, kind: int, info: os.stat_result) -> None:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        self.kind, self.access = kind, flags & O_ACCMODE
        self.tty = os.isatty(fd)
        self.socket: socket.socket | None = None
        self.termios: list[Any] | None = None  # of the user's terminal, to be put back
        self.private = False  # O_NONBLOCK is set on a description of our own
        self.watched = False
        self.always = kind == st.S_IFREG or (kind == st.S_IFCHR and not self.tty)
        self.fd = self.given = fd
        self.users = 0  # open files
        if st.S_ISSOCK(info.st_mode):
            self.socket = socket.socket(fileno=os.dup(fd))
        elif not self.always:
            try:
                self.fd = os.open(f"/proc/self/fd/{fd}", self.access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                self.private = True
            except OSError:
                pass  # not ours to open (another user's terminal): poll before each call
        self.limit = 0 if self.private or self.always or self.socket else (TTY_CHUNK if self.tty else PIPE_BUF)

    def ready(self) -> int:
        """POLL* bits now."""
        if self.always:
            return POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM
        poller = select.poll()
        poller.register(self.fd, POLLIN | POLLOUT | POLLRDHUP)
        found = poller.poll(0)
        events = found[0][1] if found else 0
        if events & POLLIN:
            events |= POLLRDNORM
        if events & POLLOUT:
            events |= POLLWRNORM
        return events

    def read(self, views: list[memoryview]) -> int:
        """readv(2) that does not sleep: bytes, 0 at the end, -EAGAIN, or Errno."""
        if not views:
            return 0
        try:
            if self.socket is not None:
                return self.socket.recvmsg_into(views, 0, socket.MSG_DONTWAIT)[0]
            if self.limit and not self.ready() & (POLLIN | POLLHUP | POLLERR):
                return -errno.EAGAIN
            return os.readv(self.fd, views)
        except BlockingIOError:
            return -errno.EAGAIN
        except OSError as error:
            if error.errno == errno.EIO and self.tty:
                return 0  # the terminal hung up
            raise Errno(error.errno or errno.EIO) from None

    def write(self, views: list[memoryview]) -> int:
        """writev(2) that does not sleep: bytes, -EAGAIN, or Errno (EPIPE)."""
        try:
            if self.socket is not None:
                return self.socket.sendmsg(views, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            if self.limit:
                if not self.ready() & (POLLOUT | POLLHUP | POLLERR):
                    return -errno.EAGAIN
                if not views:
                    return 0
                return os.write(self.fd, views[0][: self.limit])
            return os.writev(self.fd, views)
        except BlockingIOError:
            return -errno.EAGAIN
        except OSError as error:
            raise Errno(error.errno or errno.EIO) from None


class HostFile(File):
    """An open file over a host descriptor. A regular file that was opened again has a position of its own, as on Linux;
    the first one has the host's."""

    own_position = False

    def __init__(self, kernel: Kernel, inode: HostInode, flags: int, path: Path | None = None) -> None:
        super().__init__(inode, path, flags)
        self.kernel = kernel
        self.host: HostDescriptor = inode.host
        self.host.users += 1
        self.seekable = self.host.kind == st.S_IFREG
        if not self.host.always:
            queue = inode.__dict__.get("queue")
            if queue is None:
                queue = inode.queue = WaitQueue()  # type: ignore[attr-defined]
            self.queue = queue
            self.write_all = True

    def _listen(self) -> None:
        """From now on the queue hears of every change. Called before the answer "not ready" is given: the registration
        reports what is ready at once, so nothing is lost."""
        host = self.host
        if not host.watched:
            host.watched = True
            self.kernel.platform.watch(host.fd, POLLIN | POLLOUT | POLLRDHUP | EPOLLET, self._changed)

    def _changed(self, events: int) -> None:
        if events & POLLIN:
            events |= POLLRDNORM
        if events & POLLOUT:
            events |= POLLWRNORM
        assert self.queue is not None
        self.queue.wake(events)

    def read(self, views: list[memoryview]) -> int:
        """What the host has; -EAGAIN when nothing."""
        if self.seekable and self.own_position:
            return super().read(views)
        n = self.host.read(views)
        if n == -errno.EAGAIN:
            self._listen()
        return n

    def write(self, views: list[memoryview]) -> int:
        """What the host takes; -EAGAIN when nothing, -EPIPE when nobody reads."""
        if self.seekable and self.own_position:
            self.inode.refresh()
            return super().write(views)
        if self.seekable and self.flags & O_APPEND:
            os.lseek(self.host.fd, 0, os.SEEK_END)
        n = self.host.write(views)
        if n == -errno.EAGAIN:
            self._listen()
        return n

    def pread(self, views: list[memoryview], pos: int) -> int:
        """Regular files only; ESPIPE."""
        if not self.seekable:
            raise Errno(errno.ESPIPE)
        try:
            return os.preadv(self.host.fd, views, pos) if views else 0
        except OSError as error:
            raise Errno(error.errno or errno.EIO) from None

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """Regular files only; ESPIPE."""
        if not self.seekable:
            raise Errno(errno.ESPIPE)
        try:
            return os.pwritev(self.host.fd, views, pos) if views else 0
        except OSError as error:
            raise Errno(error.errno or errno.EIO) from None

    def seek(self, offset: int, whence: int) -> int:
        """The position is the host's, shared with whoever has the descriptor."""
        if not self.seekable:
            raise Errno(errno.ESPIPE)
        if self.own_position:
            self.inode.refresh()
            return super().seek(offset, whence)
        try:
            return os.lseek(self.host.fd, offset, whence)
        except OSError as error:
            raise Errno(error.errno or errno.EINVAL) from None
        except OverflowError:
            raise Errno(errno.EINVAL) from None

    def poll(self) -> int:
        """Readiness of the host's descriptor, in the directions that are open."""
        host = self.host
        events = host.ready()
        if host.access == O_RDONLY:
            events &= ~(POLLOUT | POLLWRNORM)
        elif host.access == O_WRONLY:
            events &= ~(POLLIN | POLLRDNORM)
        if not host.always:
            self._listen()
        return events

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """FIONREAD; on a terminal also its modes and size. Nothing else of the host is reachable."""
        host = self.host
        try:
            if request == FIONREAD:
                if host.kind == st.S_IFREG:
                    left = os.fstat(host.fd).st_size - self.seek(0, os.SEEK_CUR)
                    task.mm.write(argument, _int.pack(max(0, min(left, 0x7FFFFFFF))))
                else:
                    task.mm.write(argument, fcntl.ioctl(host.fd, termios.FIONREAD, bytes(4)))
                return 0
            if host.tty and request == TCGETS:
                task.mm.write(argument, fcntl.ioctl(host.fd, TCGETS, bytes(TERMIOS_SIZE)))
                return 0
            if host.tty and request == TIOCGWINSZ:
                task.mm.write(argument, fcntl.ioctl(host.fd, TIOCGWINSZ, bytes(WINSIZE_SIZE)))
                return 0
            if host.tty and TCSETS <= request <= TCSETSF:
                modes = task.mm.read(argument, TERMIOS_SIZE)
                if host.termios is None:
                    host.termios = termios.tcgetattr(host.fd)
                fcntl.ioctl(host.fd, request, modes)
                return 0
        except OSError as error:
            raise Errno(error.errno or errno.EIO) from None
        except termios.error as error:
            raise Errno(error.args[0]) from None
        raise Errno(errno.ENOTTY)

    def release(self) -> None:
        """The application closed its last descriptor: let go of the host's too, so that whoever reads our output sees
        its end. 0, 1 and 2 stay: they are the Sentry's own."""
        host = self.host
        host.users -= 1
        if host.users:
            return
        if host.watched:
            self.kernel.platform.unwatch(host.fd)
            host.watched = False
        restore_terminal(self)
        if host.socket is not None:
            host.socket.close()
        if host.private:
            os.close(host.fd)
        if host.given > 2:
            os.close(host.given)
        host.fd = -1

    def fsync(self) -> None:
        """Regular files reach the disk; EINVAL for the rest."""
        if not self.seekable:
            raise Errno(errno.EINVAL)
        try:
            os.fsync(self.host.fd)
        except OSError as error:
            raise Errno(error.errno or errno.EIO) from None

    def sync_fd(self) -> int:
        """A regular file's descriptor."""
        return self.host.fd if self.seekable else -1

    def label(self) -> bytes:
        """What /proc/PID/fd/N shows."""
        kind = self.host.kind
        if kind == st.S_IFREG:
            return b"/host:[%d]" % self.inode.ino
        if kind == st.S_IFCHR and not self.host.tty:
            return b"/dev/null"
        return b"/dev/pts/0" if self.host.tty else b"pipe:[%d]" % self.inode.ino


def open_host(kernel: Kernel, fd: int, uid: int = 0, gid: int = 0) -> HostFile:
    """A file over host descriptor `fd` (ours from now on: closed when the application has closed it, unless it is 0, 1
    or 2; give a duplicate where the end of output matters before the sandbox ends), owned by `uid` and `gid` as engines
    do it. Call before the Sentry locks itself down: /proc/self/fd is needed. HostError when `fd` is no open
    descriptor."""
    try:
        inode = HostInode(kernel, fd, uid, gid)
    except OSError as error:
        raise HostError(f"use descriptor {fd}", error.errno or 0, "it must be open") from None
    return HostFile(kernel, inode, inode.host.access | (fcntl.fcntl(fd, fcntl.F_GETFL) & O_APPEND))


def restore_terminal(file: HostFile) -> None:
    """Give the user's terminal back the modes it had before the application changed them; for the launcher's end."""
    host = file.host
    if host.termios is not None and host.fd >= 0:
        termios.tcsetattr(host.fd, termios.TCSADRAIN, host.termios)


