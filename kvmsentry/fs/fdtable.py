"""Descriptor tables: small integers to open file descriptions, shared between tasks with CLONE_FILES."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import O_PATH, File, Inode

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel


class FdTable:
    """Descriptors of one or more tasks. `files` maps a descriptor to its File; those in `cloexec` end at execve(2)."""

    __slots__ = ("files", "cloexec", "users", "_lowest")

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self.cloexec: set[int] = set()
        self.users = 1
        self._lowest = 0  # no descriptor below it is free

    def get(self, fd: int) -> File:
        """The file behind `fd`, also one opened with O_PATH; EBADF."""
        file = self.files.get(fd)
        if file is None:
            raise Errno(errno.EBADF)
        return file

    def get_io(self, fd: int) -> File:
        """The file behind `fd` for I/O: EBADF also for O_PATH."""
        file = self.files.get(fd)
        if file is None or file.flags & O_PATH:
            raise Errno(errno.EBADF)
        return file

    def install(self, file: File, limit: int, lowest: int = 0, cloexec: bool = False) -> int:
        """Give `file` (whose reference passes to the table) the lowest free descriptor >= `lowest`; EMFILE at `limit`
        (RLIMIT_NOFILE), in which case the reference stays with the caller."""
        files = self.files
        fd = max(lowest, self._lowest)
        while fd in files:
            fd += 1
        if fd >= limit:
            raise Errno(errno.EMFILE)
        if lowest <= self._lowest:
            self._lowest = fd + 1
        files[fd] = file
        if cloexec:
            self.cloexec.add(fd)
        return fd

    def check_room(self, limit: int) -> None:
        """EMFILE when no descriptor below `limit` is free: asked before the work that would have to be undone."""
        files = self.files
        if all(fd in files for fd in range(self._lowest, limit)):
            raise Errno(errno.EMFILE)

    def replace(self, fd: int, file: File, cloexec: bool = False) -> None:
        """Make `fd` mean `file` (its reference passes to the table), closing what it meant before (dup2(2))."""
        old = self.files.get(fd)
        self.files[fd] = file
        (self.cloexec.add if cloexec else self.cloexec.discard)(fd)
        if old is not None:
            self.drop(old)

    def remove(self, fd: int) -> File:
        """Take `fd` out; the caller owns the reference (and must `put` it). EBADF."""
        file = self.files.pop(fd, None)
        if file is None:
            raise Errno(errno.EBADF)
        self.cloexec.discard(fd)
        if fd < self._lowest:
            self._lowest = fd
        return file

    def drop(self, file: File) -> None:
        """Give back the reference of a descriptor that is no more: the owner of POSIX locks is the table, and closing
        any descriptor of a file releases them (fcntl(2))."""
        if file.inode.locks is not None:
            file.inode.locks.closed(self)
        if file.flushes:
            file.flush(self)
        file.put()

    def copy(self) -> FdTable:
        """For fork: the same files behind the same numbers."""
        table = FdTable()
        table.files = dict(self.files)
        table.cloexec = set(self.cloexec)
        table._lowest = self._lowest
        for file in table.files.values():
            file.refs += 1
        return table

    def close_on_exec(self) -> None:
        """execve(2): close what is marked so."""
        for fd in sorted(self.cloexec):
            self.drop(self.remove(fd))
        self.cloexec.clear()

    def close_all(self) -> None:
        """The last user is gone."""
        for fd in sorted(self.files):
            self.drop(self.files.pop(fd))
        self.cloexec.clear()
        self._lowest = 0


def all_files(kernel: Kernel) -> Iterator[File]:
    """What the descriptors of all tasks mean, every table once: for what happens rarely."""
    seen: set[int] = set()
    for task in kernel.tasks.values():
        table = task.files
        if table is not None and id(table) not in seen:
            seen.add(id(table))
            yield from table.files.values()


def files_of(kernel: Kernel, inode: Inode) -> Iterator[File]:
    """The open files of `inode` that descriptors of any task mean, O_PATH ones apart."""
    for file in all_files(kernel):
        if file.inode is inode and file.refs and not file.flags & O_PATH:
            yield file
