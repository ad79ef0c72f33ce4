"""A kernel world with /proc, /sys, /dev, /dev/pts and cgroup2 mounted, and short names for the calls that tests make
there."""

from __future__ import annotations

import os
import select
import stat as st
import struct
from typing import Any

from kernel_fakes import SCRATCH, KernelWorld

from kvmsentry.errors import Errno
from kvmsentry.fs import mounts, mounttree
from kvmsentry.fs.hostterm import open_terminal
from kvmsentry.fs.vfs import FOLLOW, O_RDONLY, Path, walk

READ, WRITE, OPEN, CLOSE, POLL, MMAP, IOCTL, FORK, EXIT = 0, 1, 2, 3, 7, 9, 16, 57, 60
SETPGID, SETSID, READLINK, LSEEK, SETUID, KILL, GETDENTS = 109, 112, 89, 8, 105, 62, 217
BUFFER = SCRATCH + 0x2000
O_RDWR, O_NOCTTY, O_NONBLOCK = 2, 0o400, 0o4000


class DevWorld(KernelWorld):
    """`KernelWorld` with the mounts of a container; host descriptors are watched by `spin`."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, tuple[int, Any]] = {}
        platform: Any = self.platform
        platform.watch, platform.unwatch = self._watch, self._unwatch
        mounttree.MountNamespace(self.root.mount)
        task: Any = mounts._Builder(self.kernel, self.root)
        for name in (b"proc", b"sys", b"dev"):
            self.directory(name)
        for target, fstype in (
            (b"/proc", "proc"),
            (b"/sys", "sysfs"),
            (b"/sys/fs/cgroup", "cgroup2"),
            (b"/dev", "devtmpfs"),
            (b"/dev/pts", "devpts"),
        ):
            mounttree.attach(mounttree.new_mount(mounts.make_super(self.kernel, fstype)), walk(task, target))

    def _watch(self, fd: int, events: int, callback: Any) -> None:
        self.watched[fd] = events, callback

    def _unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def spin(self) -> None:
        """Serve host descriptors that are ready, then the kernel, until neither has anything to do."""
        for _ in range(1000):
            poller = select.poll()
            for fd, (events, _callback) in self.watched.items():
                poller.register(fd, events)
            ready = poller.poll(5)
            if not ready:
                break
            for fd, events in ready:
                if fd in self.watched:
                    self.watched[fd][1](events)
            self.run()
        self.run()

    def terminal(self, in_fd: int, out_fd: int) -> Any:
        """init with a HostTerminal as its descriptors 0, 1, 2: (task, terminal)."""
        from kvmsentry.fs.fdtable import FdTable

        terminal, file = open_terminal(self.kernel, in_fd, out_fd, 0, self.root)
        files = FdTable()
        for fd in (0, 1, 2):
            files.replace(fd, file if fd == 0 else file.get())
        return self.init(files=files, tty=terminal), terminal

    def place(self, task: Any, path: bytes, flags: int = FOLLOW) -> Path:
        return walk(task, path, None, flags)

    def open(self, task: Any, path: bytes, flags: int = O_RDONLY) -> Any:
        return self.call(task, OPEN, self.put(task, path + b"\0"), flags, 0)

    def read(self, task: Any, fd: int, count: int = 8192) -> Any:
        """Bytes, a negative errno, or None when the task sleeps."""
        n = self.call(task, READ, fd, BUFFER, min(count, 8192))
        return bytes(task.mm.read(BUFFER, n)) if n is not None and n >= 0 else n

    def write(self, task: Any, fd: int, data: bytes) -> Any:
        task.mm.write(BUFFER, data)
        return self.call(task, WRITE, fd, BUFFER, len(data))

    def whole(self, task: Any, path: bytes) -> Any:
        """A file's content, or the negative errno of opening or reading it."""
        fd = self.open(task, path)
        if fd is None or fd < 0:
            return fd
        out = b""
        while True:
            data = self.read(task, fd)
            if not isinstance(data, bytes):
                return data
            if not data:
                break
            out += data
        assert self.call(task, CLOSE, fd) == 0
        return out

    def store(self, task: Any, path: bytes, data: bytes) -> Any:
        fd = self.open(task, path, 1)
        if fd < 0:
            return fd
        n = self.write(task, fd, data)
        self.call(task, CLOSE, fd)
        return n

    def ioctl(self, task: Any, fd: int, request: int, data: bytes | int = 0) -> Any:
        """(result, the argument's bytes afterwards) for a pointer, the result for a number."""
        if isinstance(data, int):
            return self.call(task, IOCTL, fd, request, data)
        task.mm.write(BUFFER, data)
        result = self.call(task, IOCTL, fd, request, BUFFER)
        return result, bytes(task.mm.read(BUFFER, len(data)))

    def poll(self, task: Any, fd: int, events: int = 5) -> int:
        """Events ready now."""
        task.mm.write(BUFFER, struct.pack("<ihh", fd, events, 0))
        assert self.call(task, POLL, BUFFER, 1, 0) in (0, 1)
        return struct.unpack("<ihh", task.mm.read(BUFFER, 8))[2]

    def child(self, task: Any) -> Any:
        return self.kernel.tasks[self.call(task, FORK)]

    def dump(self, task: Any, path: bytes, target: str, depth: int = 6) -> None:
        """A copy of a tree of ours on the host, links with their text, so that the host's tools can read it."""
        os.makedirs(target, exist_ok=True)
        directory = self.place(task, path).inode
        for name, _ino, _kind in list(directory.readdir()):
            here, there = path + b"/" + name, os.path.join(os.fsencode(target), name)
            try:
                inode = self.place(task, here, 0).inode
            except Errno:
                continue
            if st.S_ISLNK(inode.mode):
                try:
                    text = inode.readlink(task)
                except Errno:
                    continue
                os.symlink(text, there)
            elif st.S_ISDIR(inode.mode):
                if depth:
                    self.dump(task, here, os.fsdecode(there), depth - 1)
            elif name not in (b"mem", b"pagemap", b"clear_refs", b"kmsg"):
                content = self.whole(task, here)
                if isinstance(content, bytes):
                    with open(there, "wb") as copy:
                        copy.write(content)
