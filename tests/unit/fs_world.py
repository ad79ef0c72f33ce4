"""File systems without a guest: a kernel and a task over fake memory, host trees through a Gofer in a thread."""

from __future__ import annotations

import os
import socket
import threading

from mm_fakes import FakeMemory, World

from kvmsentry.fs.fdtable import FdTable
from kvmsentry.fs.goferfs import GoferSuper
from kvmsentry.fs.mounts import first_namespace
from kvmsentry.fs.overlay import OverlaySuper
from kvmsentry.fs.vfs import FsContext
from kvmsentry.gofer.client import Client
from kvmsentry.gofer.nodes import Tree
from kvmsentry.gofer.server import Server
from kvmsentry.kernel.kernel import Kernel
from kvmsentry.kernel.task import Credentials, Process, ProcessGroup, Session, SigHand, Task
from kvmsentry.syscall import sys_dents, sys_mount, sys_path, sys_xattr  # noqa: F401 - they declare the rows
from kvmsentry.syscall.table import calls

AT_FDCWD = -100 & 0xFFFFFFFFFFFFFFFF


class FsMemory(FakeMemory):
    """FakeMemory that maps host files (as copies) and counts them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mapped: list[tuple[int, int]] = []
        self.warmed: list[tuple[int, int]] = []

    def map_file(self, fd: int, offset: int, length: int, writable: bool) -> int:
        gpa = self.map_bytes(os.pread(fd, length, offset).ljust(length, b"\0"), offset)
        self.mapped.append((gpa, length))
        return gpa

    def warm(self, gpa: int, length: int) -> bool:
        self.warmed.append((gpa, length))
        return True

    def unmap_file(self, gpa: int, length: int) -> None:
        self.mapped.remove((gpa, length))


def gofer(*trees: tuple[str, str, bool]) -> Client:
    """A client of a Gofer thread that serves (name, path, read-only)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    served = [
        Tree(name.encode(), os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), ro) for name, path, ro in trees
    ]
    server = Server(served)
    threading.Thread(target=server.serve, args=(theirs,), daemon=True).start()
    return Client(ours)


class FsWorld(World):
    """One kernel, one task, a root file system: `root` is a SuperBlock made by one of the methods."""

    def __init__(self, ram_limit: int = 256 << 20, limit_pages: int = 1 << 20) -> None:
        super().__init__(ram_limit, limit_pages)
        self.memory = FsMemory(ram_limit)
        self.platform.memory = self.memory
        self.frames = type(self.frames)(self.memory, limit_pages, 8 << 20)
        self.kernel = Kernel(self.platform, self.frames)
        self.clients: list[Client] = []

    def gofer_super(self, path: str, private: bool = True, readonly: bool = False) -> GoferSuper:
        client = gofer(("root", path, readonly))
        self.clients.append(client)
        return GoferSuper(self.kernel, client.attach("root"), private, readonly)

    def overlay(self, path: str, size: int = 0) -> OverlaySuper:
        return OverlaySuper(self.kernel, self.gofer_super(path), size)

    def task(self, sb, uid: int = 0, gid: int = 0, groups: frozenset[int] = frozenset()) -> FsTask:
        place = first_namespace(self.kernel, sb).top()
        group = ProcessGroup(1, Session(1))
        process = Process(self.kernel, 1, None, group)
        creds = Credentials(uid, gid, groups)
        task = FsTask(self.kernel, 1, process, self.space(), FdTable(), FsContext(place, place), SigHand(), creds)
        process.leader = task
        process.rlimits[7] = (1024, 4096)
        task.scratch = task.mm.mmap(0, 4 << 20, 3, 0x22, None, 0)
        for offset in (0, 2 << 20):  # so that no later frame is the address space's
            task.mm.write(task.scratch + offset, bytes(2 << 20))
        self.kernel.tasks[1] = task
        return task


class FsTask(Task):
    """A task whose system calls are Python calls: `task.call(nr, ...)` with bytes where a pointer to a string goes."""

    scratch = 0

    def call(self, nr: int, *args) -> int:
        from kvmsentry.errors import Errno

        at = self.scratch + (2 << 20)
        values = []
        for arg in args:
            if isinstance(arg, bytes):
                self.mm.write(at, arg + b"\0")
                values.append(at)
                at += len(arg) + 64 & ~15
            else:
                values.append(arg & 0xFFFFFFFFFFFFFFFF)
        values += [0] * (6 - len(values))
        try:
            result = calls[nr](self, tuple(values))
        except Errno as error:
            result = -error.errno
        return result

    # what tests ask for most
    def open(self, path: bytes, flags: int = 0, mode: int = 0o644) -> int:
        return self.call(257, AT_FDCWD, path, flags, mode)

    def write(self, fd: int, data: bytes) -> int:
        return self.files.get_io(fd).write([memoryview(bytearray(data))])

    def read(self, fd: int, length: int) -> bytes:
        buf = bytearray(length)
        n = self.files.get_io(fd).read([memoryview(buf)])
        return bytes(buf[:n])

    def close(self, fd: int) -> None:
        self.files.remove(fd).put()

    def put(self, path: bytes, data: bytes, mode: int = 0o644) -> None:
        fd = self.open(path, 0o1101, mode)
        assert fd >= 0, (path, fd)
        assert not data or self.write(fd, data) == len(data)
        self.close(fd)

    def slurp(self, path: bytes) -> bytes:
        fd = self.open(path)
        assert fd >= 0, (path, fd)
        parts = []
        while part := self.read(fd, 1 << 16):
            parts.append(part)
        self.close(fd)
        return b"".join(parts)

    def listing(self, path: bytes) -> dict[bytes, tuple[int, int]]:
        """name to (inode number, type), through getdents64 in small pieces."""
        fd = self.open(path, 0o200000)
        assert fd >= 0, (path, fd)
        names = {}
        while True:
            n = self.call(217, fd, self.scratch, 300)
            assert n >= 0, n
            if not n:
                break
            data, at = self.mm.read(self.scratch, n), 0
            while at < n:
                ino = int.from_bytes(data[at : at + 8], "little")
                size = int.from_bytes(data[at + 16 : at + 18], "little")
                name = data[at + 19 : at + size].split(b"\0")[0]
                assert name not in names
                names[name] = (ino, data[at + 18])
                at += size
        self.close(fd)
        return names

    def stat(self, path: bytes, follow: bool = True):
        """(st_dev, st_ino, st_nlink, st_mode, ...) or a negative errno."""
        from kvmsentry.syscall.abi_fs import STAT

        result = self.call(4 if follow else 6, path, self.scratch)
        return result if result < 0 else STAT.unpack(self.mm.read(self.scratch, STAT.size))
