"""Host files in guest-physical memory: one set of windows a file, whoever maps it.

A window is a piece of the file given to GuestMemory.map_file. Windows outlive the VMAs that use them, least recently
used ones going first, because the next program maps the same libraries.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno

if TYPE_CHECKING:
    from kvmsentry.fs.goferfs import GoferInode, HostFd
    from kvmsentry.fs.vfs import File
    from kvmsentry.kernel.kernel import Kernel

PAGE = 4096
CHUNK = 64 << 20  # a larger file is mapped in pieces of this
IDLE_MAPS = 1024  # mapped files kept though no VMA uses them
WARM_AT_ONCE = 256 << 10  # so much of a file is warmed when it is first mapped, more of it when it is mapped again
WARM_MAX = 32 << 20  # bytes that may be warm at a time: they are copies


def refused(error: OSError) -> Errno:
    """A host error in reading or writing data, as the application may see it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.EINTR, errno.EROFS):
        return Errno(error.errno)
    return Errno(errno.EIO)


class Window:
    """A piece of a file shown in guest-physical memory. Bytes; `length` is whole pages."""

    __slots__ = ("gpa", "offset", "length", "writable")

    def __init__(self, gpa: int, offset: int, length: int, writable: bool) -> None:
        self.gpa, self.offset, self.length, self.writable = gpa, offset, length, writable


class Windows:
    """All file maps that hold windows and that no VMA uses, the least recently used first; one for the kernel."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.idle: OrderedDict[FileMap, None] = OrderedDict()
        self.warm = 0  # bytes, see FileMap.warm

    def rest(self, file_map: FileMap) -> None:
        """No VMA uses `file_map` any more: keep what it shows for the next program, up to a limit."""
        self.idle[file_map] = None
        if len(self.idle) > IDLE_MAPS:
            old, _ = self.idle.popitem(last=False)
            old.unmap()


def windows_of(kernel: Kernel) -> Windows:
    """The kernel's list of windows."""
    windows: Windows | None = kernel.__dict__.get("file_windows")
    if windows is None:
        windows = kernel.__dict__["file_windows"] = Windows(kernel.memory)
    return windows


class FileMap:
    """How one host file is shown in guest-physical memory, shared by every process that maps it. `holds` counts
    VMAs."""

    def __init__(self, inode: GoferInode) -> None:
        self.inode = inode
        self.windows: dict[tuple[int, bool], Window] = {}  # by (chunk number, writable)
        self.stale: list[Window] = []  # replaced by longer ones, but perhaps still mapped
        self.holds = 0
        self.uses: dict[tuple[int, int], int] = {}  # of ranges (offset, length): how often mapped; -1: warm
        self.file: weakref.ref[GoferBacking] | None = None
        self.handle: HostFd | None = None

    def backing(self, file: File) -> GoferBacking:
        """The Backing of the file itself (an overlay makes its own)."""
        from kvmsentry.fs.tmpfs import label_of

        backing = self.file() if self.file is not None else None
        if backing is None:
            inode = self.inode
            backing = GoferBacking(self, inode.sb.dev, inode.ino, label_of(inode.sb.kernel, file.path))
            self.file = weakref.ref(backing)
        return backing

    def pages(self, offset: int, length: int, writable: bool) -> list[tuple[int, int]]:
        """(gpa, length) runs of [offset, offset + length), cut at the end of the file. EIO when the host refuses."""
        inode = self.inode
        if inode.seen:
            handle = inode.handle(writable)
            if handle is not None:
                inode.size = os.fstat(handle.fd).st_size
        size = inode.size
        end = min(offset + length, size)
        runs = []
        while offset < end:
            chunk = offset // CHUNK
            window = self.windows.get((chunk, writable))
            want = min(end, (chunk + 1) * CHUNK)
            if window is None or window.offset + window.length < want:
                if window is not None:
                    self.stale.append(window)
                window = self._map(chunk, size, writable)
            runs.append((window.gpa + offset - window.offset, want - offset))
            offset = want
        return runs

    def _map(self, chunk: int, size: int, writable: bool) -> Window:
        handle = self.inode.handle(writable)
        if handle is None:
            raise Errno(errno.ENODEV)
        start = chunk * CHUNK
        length = -(-(min(size, start + CHUNK) - start) // PAGE) * PAGE
        gpa = self.inode.sb.windows.memory.map_file(handle.fd, start, length, writable)
        window = self.windows[(chunk, writable)] = Window(gpa, start, length, writable)
        return window

    def warm(self, offset: int, length: int) -> None:
        """A program maps [offset, offset + length) to read or run it. What programs map again and again is copied once,
        because the host maps its own pages for a guest more cheaply than a file's (GuestMemory.warm)."""
        sb = self.inode.sb
        key = (offset, length)
        uses = self.uses.get(key, 0)
        if uses < 0 or not sb.private:
            return
        self.uses[key] = uses + 1
        if length > WARM_AT_ONCE and not uses:
            return
        length = min(length, -(-self.inode.size // PAGE) * PAGE - offset)
        window = self.windows.get((offset // CHUNK, False))
        if length <= 0 or window is None or offset + length > window.offset + window.length:
            return
        windows = sb.windows
        if windows.warm + length <= WARM_MAX and windows.memory.warm(window.gpa + offset - window.offset, length):
            windows.warm += length
            self.uses[key] = -1

    def hold(self) -> None:
        """A VMA began to use it."""
        self.holds += 1
        if self.holds == 1:
            self.inode.sb.windows.idle.pop(self, None)

    def drop(self) -> None:
        """A VMA ended to use it."""
        self.holds -= 1
        if self.holds == 0:
            if self.inode.sb.private:
                self.inode.sb.windows.rest(self)
            else:
                self.unmap()

    def unmap(self) -> None:
        """Give the windows up; nobody uses them."""
        unmap_file = self.inode.sb.windows.memory.unmap_file
        for window in [*self.windows.values(), *self.stale]:
            unmap_file(window.gpa, window.length)
        self.windows.clear()
        self.stale.clear()
        self.inode.sb.windows.warm -= sum(length for (_, length), uses in self.uses.items() if uses < 0)
        self.uses.clear()

    def shrink(self, size: int) -> None:
        """The file was truncated by the application: pages beyond the end are SIGBUS from now on."""
        from kvmsentry.fs.tmpfs import zap

        backing = self.file() if self.file is not None else None
        if self.holds and backing is not None:
            zap(self.inode.sb.kernel, backing, -(-size // PAGE) * PAGE, 1 << 62)


class GoferBacking:
    """The Backing protocol of kvmsentry.mm for a host file."""

    __slots__ = ("map", "dev", "ino", "label", "ident", "stable", "__weakref__")

    def __init__(self, file_map: FileMap, dev: int, ino: int, label: bytes) -> None:
        self.map, self.dev, self.ino, self.label = file_map, dev, ino, label
        self.ident = (dev, ino)
        self.stable = file_map.inode.sb.private  # nobody changes the file

    def map_pages(self, offset: int, length: int, writable_shared: bool) -> list[tuple[int, int]]:
        """Windows of the file."""
        return self.map.pages(offset, length, writable_shared)

    def warm(self, offset: int, length: int) -> None:
        """A program maps this part to read or run it."""
        self.map.warm(offset, length)

    def hold(self) -> None:
        """A VMA began to use it."""
        self.map.hold()

    def drop(self) -> None:
        """A VMA ended to use it."""
        self.map.drop()

    def sync(self, offset: int, length: int) -> None:
        """msync(2): the host has the pages; make it write them."""
        handle = self.map.inode.writer() if self.map.inode.writer is not None else None
        if handle is not None:
            try:
                os.fdatasync(handle.fd)
            except OSError as error:
                raise refused(error) from None

    def name(self) -> bytes:
        """The path for /proc/PID/maps."""
        return self.label
