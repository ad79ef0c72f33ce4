"""Device files: /dev and what the nodes in it open, by number, wherever a node stands; null(4), random(4), tty(4).

`Devices` (one a sandbox, `devices(kernel)`) knows the terminals; `DevSuper` is the file system mounted at /dev: a tmpfs
with the usual nodes, since applications make links, sockets and directories there.
"""

from __future__ import annotations

import errno
import os
import stat as st
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import gather, scatter
from kvmsentry.fs.devpts import PTMX, SLAVE_MAJOR, DevptsSuper
from kvmsentry.fs.tmpfs import TmpSuper
from kvmsentry.fs.tty import Tty
from kvmsentry.fs.vfs import (
    O_NOCTTY,
    O_NONBLOCK,
    POLLIN,
    POLLOUT,
    POLLRDNORM,
    POLLWRNORM,
    File,
    Inode,
    Path,
    SuperBlock,
    makedev,
)
from kvmsentry.kernel.task import Credentials

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

# Documentation/admin-guide/devices.txt
NULL, ZERO, FULL, RANDOM, URANDOM, KMSG = (makedev(1, minor) for minor in (3, 5, 7, 8, 9, 11))
TTY, CONSOLE = makedev(5, 0), makedev(5, 1)

RANDOM_CHUNK = 1 << 16
RNDGETENTCNT, RNDADDTOENTCNT, RNDADDENTROPY, RNDZAPENTCNT, RNDCLEARPOOL, RNDRESEEDCRNG = (
    0x80045200, 0x40045201, 0x40085203, 0x5204, 0x5206, 0x5207,
)  # fmt: skip  # uapi/linux/random.h
ENTROPY_BITS = 256

_zeros = bytes(1 << 20)


class Device(File):
    """A character device of memory's major number: no position, ready at any time."""

    endless = True

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2): nothing happens (null_lseek)."""
        self.pos = 0
        return 0

    def read(self, views: list[memoryview]) -> int:
        """read(2)."""
        return self.pread(views, 0)

    def write(self, views: list[memoryview]) -> int:
        """write(2)."""
        return self.pwrite(views, 0)

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """Everything is accepted and forgotten."""
        return sum(map(len, views))


class Null(Device):
    """/dev/null."""

    def pread(self, views: list[memoryview], pos: int) -> int:
        """End of file."""
        return 0


class Zero(Device):
    """/dev/zero."""

    def pread(self, views: list[memoryview], pos: int) -> int:
        """Zero bytes, copied from one page-cache-warm block."""
        total = 0
        for view in views:
            n = len(view)
            total += n
            if n <= len(_zeros):
                view[:] = memoryview(_zeros)[:n]
                continue
            for at in range(0, n, len(_zeros)):
                part = view[at : at + len(_zeros)]
                part[:] = memoryview(_zeros)[: len(part)]
        return total

    def backing(self) -> Any:
        """None: mmap(2) makes an anonymous mapping of it, private or shared."""
        return None


class Full(Zero):
    """/dev/full."""

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """No space, ever."""
        return -errno.ENOSPC if views else 0

    def backing(self) -> Any:
        """Not to be mapped."""
        raise Errno(errno.ENODEV)


class Random(Device):
    """/dev/random and /dev/urandom: the host's getrandom(2), which never blocks once it is seeded."""

    def pread(self, views: list[memoryview], pos: int) -> int:
        """Random bytes."""
        total = 0
        urandom = os.urandom
        for view in views:
            n = len(view)
            total += n
            if n <= RANDOM_CHUNK:
                view[:] = urandom(n)
                continue
            for at in range(0, n, RANDOM_CHUNK):
                part = view[at : at + RANDOM_CHUNK]
                part[:] = urandom(len(part))
        return total

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """random(4): entropy is always full, and nobody can take or need add any."""
        if request == RNDGETENTCNT:
            task.mm.write(argument, ENTROPY_BITS.to_bytes(4, "little"))
        elif request in (RNDADDTOENTCNT, RNDADDENTROPY, RNDZAPENTCNT, RNDCLEARPOOL, RNDRESEEDCRNG):
            if not task.creds.capable(21):  # CAP_SYS_ADMIN
                raise Errno(errno.EPERM)
        else:
            raise Errno(errno.EINVAL)
        return 0


class Kmsg(File):
    """/dev/kmsg: the boot's story a record at a time, and what applications add to it (ABI/testing/dev-kmsg)."""

    seekable = True

    def __init__(self, inode: Inode, path: Path | None, flags: int, log: KernelLog) -> None:
        super().__init__(inode, path, flags)
        self.log, self._next = log, 0

    def read(self, views: list[memoryview]) -> int:
        """One record `level,sequence,microseconds,-;text`; EINVAL when it does not fit."""
        records = self.log.records()
        if self._next >= len(records):
            return -errno.EAGAIN if self.flags & O_NONBLOCK else 0
        level, at, text = records[self._next]
        line = f"{level},{self._next},{at},-;{text}\n".encode(errors="backslashreplace")
        if len(line) > sum(map(len, views)):
            return -errno.EINVAL
        self._next += 1
        return scatter(views, line)

    def write(self, views: list[memoryview]) -> int:
        """A record of the application's own."""
        data = gather(views, 1024)
        self.log.add(data)
        return sum(map(len, views))

    def seek(self, offset: int, whence: int) -> int:
        """To the first (SEEK_SET) or behind the last record (SEEK_END)."""
        if offset:
            raise Errno(errno.ESPIPE)
        self._next = 0 if whence == 0 else len(self.log.records())
        return 0

    def poll(self) -> int:
        """Readable while there are records."""
        more = self._next < len(self.log.records())
        return (POLLIN | POLLRDNORM if more else 0) | POLLOUT | POLLWRNORM


class KernelLog:
    """The ring buffer: how the kernel booted, then what applications wrote to /dev/kmsg (the last ones)."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.boot: list[tuple[int, int, str]] | None = None

    def records(self) -> list[tuple[int, int, str]]:
        """(level, microseconds since boot, text) of every record."""
        if self.boot is None:
            from kvmsentry.kernel import identity

            self.boot = identity.boot_lines(self.kernel)
        return [*self.boot, *self.kernel.messages]

    def add(self, data: bytes) -> None:
        """A record as it was written to /dev/kmsg: `<level>text`, level 4 by default."""
        level, text = 4, data.rstrip(b"\n")
        if text[:1] == b"<" and b">" in text[:6]:
            number, _, text = text[1:].partition(b">")
            if number.isdigit():
                level = int(number)
        self.kernel.say(level, text.decode(errors="backslashreplace"))


class Devices:
    """What device numbers lead to. `console` is the terminal behind /dev/console, None without one."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.pts = DevptsSuper(kernel)
        self.console: Tty | None = None
        self.log = KernelLog(kernel)
        self.mounted: list[DevSuper] = []  # to show the console in

    def attach_console(self, tty: Tty) -> None:
        """`tty` (the host's terminal) becomes /dev/console and shows as the lowest free /dev/pts/N."""
        self.console = tty
        index = self.pts.free_index()
        tty.rdev = makedev(SLAVE_MAJOR + (index >> 8), index & 0xFF)
        self.pts.add(index, tty)
        for sb in self.mounted:
            sb.add_console()


def devices(kernel: Kernel) -> Devices:
    """The devices of the sandbox, made when first asked for."""
    if kernel.devices is None:
        kernel.devices = Devices(kernel)
    return kernel.devices


def pts_super(kernel: Kernel) -> DevptsSuper:
    """devpts, for mount(2): the one there is."""
    return devices(kernel).pts


def _simple(cls: type[Device]) -> Callable[[Task, Inode, Path | None, int], File]:
    def open_it(task: Task, inode: Inode, path: Path | None, flags: int) -> File:
        return cls(inode, path, flags)

    return open_it


def _kmsg(task: Task, inode: Inode, path: Path | None, flags: int) -> File:
    return Kmsg(inode, path, flags, devices(task.kernel).log)


def _controlling(task: Task, inode: Inode, path: Path | None, flags: int) -> File:
    tty: Tty | None = task.process.session.tty
    if tty is None:
        raise Errno(errno.ENXIO)
    return tty.open(task, inode, path, flags | O_NOCTTY)


def _console(task: Task, inode: Inode, path: Path | None, flags: int) -> File:
    tty = devices(task.kernel).console
    if tty is None:
        raise Errno(errno.ENODEV)
    return tty.open(task, inode, path, flags | O_NOCTTY)


def _ptmx(task: Task, inode: Inode, path: Path | None, flags: int) -> File:
    return devices(task.kernel).pts.open_master(task, inode, path, flags)


_OPEN: dict[int, Callable[[Any, Inode, Path | None, int], File]] = {
    NULL: _simple(Null), ZERO: _simple(Zero), FULL: _simple(Full), RANDOM: _simple(Random), URANDOM: _simple(Random),
    KMSG: _kmsg, TTY: _controlling, CONSOLE: _console, PTMX: _ptmx,
}  # fmt: skip


def open_device(task: Task, inode: Inode, path: Path | None, flags: int) -> File:
    """The open file description of a device node, by its number; ENXIO when there is no such device."""
    if st.S_ISCHR(inode.mode):
        rdev = inode.rdev
        opener = _OPEN.get(rdev)
        if opener is not None:
            return opener(task, inode, path, flags)
        major = rdev >> 8 & 0xFFF
        if SLAVE_MAJOR <= major < SLAVE_MAJOR + 8:
            node = devices(task.kernel).pts.nodes.get((major - SLAVE_MAJOR) << 8 | rdev & 0xFF)
            if node is not None:
                return node.tty.open(task, inode, path, flags)
    raise Errno(errno.ENXIO)


_NODES = (
    (b"null", 0o666, NULL), (b"zero", 0o666, ZERO), (b"full", 0o666, FULL), (b"random", 0o666, RANDOM),
    (b"urandom", 0o666, URANDOM), (b"tty", 0o666, TTY), (b"kmsg", 0o644, KMSG),
)  # fmt: skip
_LINKS = (
    (b"ptmx", b"pts/ptmx"), (b"fd", b"/proc/self/fd"), (b"stdin", b"/proc/self/fd/0"), (b"stdout", b"/proc/self/fd/1"),
    (b"stderr", b"/proc/self/fd/2"),
)  # fmt: skip
_DIRECTORIES = ((b"pts", 0o755), (b"shm", 0o1777), (b"mqueue", 0o1777))


class DevSuper(TmpSuper):
    """What is mounted at /dev: a small tmpfs with the usual nodes. `pts` and `shm` in it are for further mounts."""

    fstype = "devtmpfs"

    def __init__(self, kernel: Kernel, size: int = 64 << 20, mode: int = 0o755) -> None:
        super().__init__(kernel, size, 0, mode)
        root, creds = self.root, Credentials()
        for name, permissions, rdev in _NODES:
            root.mknod(name, st.S_IFCHR | permissions, rdev, creds)
        for name, permissions in _DIRECTORIES:
            root.mkdir(name, st.S_IFDIR | permissions, creds)
        for name, target in _LINKS:
            root.symlink(name, target, creds)
        self.options = f"size={size >> 10}k,mode={mode:o}"
        known = devices(kernel)
        known.mounted.append(self)
        if known.console is not None:
            self.add_console()

    def release(self) -> None:
        """It is not mounted any more, and stays what it is for the next mount."""
        SuperBlock.release(self)

    def add_console(self) -> None:
        """There is a console: show its node."""
        try:
            self.root.lookup(b"console")
        except Errno:
            self.root.mknod(b"console", st.S_IFCHR | 0o620, CONSOLE, Credentials(0, 5))  # group tty
