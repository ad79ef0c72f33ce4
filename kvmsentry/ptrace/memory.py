"""Application memory of the ptrace platform: one memfd, shared by the Sentry and every stub.

GPA = offset into the memfd; the Sentry sees it all at base + GPA, as with KVM, so user memory is reached directly.
File windows (upper half) are mappings of the file itself; stubs map the same bytes of the same file, through a
descriptor that is lent to them for the time of the mmap.
"""

from __future__ import annotations

import bisect
import errno
import os

from kvmsentry.errors import BrokenInvariant, HostError
from kvmsentry.vcpu import layout
from kvmsentry.vcpu import memory as vcpu_memory

from ._ptrace import ffi, lib

PAGE = 4096
HUGE = 2 << 20
GPA_LIST = 0x1000  # the list of system calls that stubs execute, in what is the machine's own memory with KVM


class FileWindow:
    """A range of GPAs that shows a file. Bytes; `fd` is a descriptor of ours, held until the window goes."""

    __slots__ = ("copied", "end", "fd", "gpa", "noexec", "offset", "version")

    def __init__(self, gpa: int, end: int, fd: int, offset: int) -> None:
        self.gpa, self.end, self.fd, self.offset = gpa, end, fd, offset
        self.noexec = bool(os.fstatvfs(fd).f_flag & os.ST_NOEXEC)
        self.copied: list[tuple[int, int]] = []  # GPA ranges (start, end) of code that lie in the memfd as well
        self.version = (0, 0)  # st_mtime_ns, st_size when they were copied


class GuestMemory(vcpu_memory.GuestMemory):
    """GuestMemory over a memfd; see vcpu.memory for the calls."""

    def __init__(self) -> None:
        super().__init__()
        self._starts: list[int] = []
        self._windows: list[FileWindow] = []
        self.memfd: int = lib.pt_memfd()
        if self.memfd < 0:
            raise HostError("memfd_create", -self.memfd)
        self._share(0, layout.MACHINE_SIZE)
        self.attach(lambda *_: None)  # there are no memslots

    def _share(self, gpa: int, length: int) -> None:
        rc = lib.pt_map_ram(self.memfd, ffi.cast("void *", self.base + gpa), gpa, length)
        if rc < 0:
            raise HostError("mmap of application memory", -rc)

    def grow(self, length: int) -> tuple[int, int]:
        """More RAM, (gpa, length), both multiples of 2 MiB, that reads as zero. HostError at the end of the room."""
        length = (length + HUGE - 1) & ~(HUGE - 1)
        gpa = self._ram_end
        if length <= 0 or gpa + length > self.file_base:
            raise HostError("growing application memory", errno.ENOMEM, "its room is used up")
        self._share(gpa, length)
        self._ram_end = gpa + length
        return gpa, length

    def map_file(self, fd: int, offset: int, length: int, writable: bool) -> int:
        """As with KVM; the descriptor is kept (duplicated) for the stubs that will map the window."""
        gpa = super().map_file(fd, offset, length, writable)
        try:
            own = os.dup(fd)
        except OSError as error:
            super().unmap_file(gpa, length)
            raise HostError("dup", error.errno or errno.EIO, "raise the limit of open files: ulimit -n") from None
        at = bisect.bisect(self._starts, gpa)
        self._starts.insert(at, gpa)
        self._windows.insert(at, FileWindow(gpa, gpa + (length + PAGE - 1 & -PAGE), own, offset))
        return gpa

    def warm(self, gpa: int, length: int) -> bool:
        """Nothing to gain: stubs map the files themselves."""
        return False

    def unmap_file(self, gpa: int, length: int) -> None:
        """Takes a map_file() range, or the first or last part of it, away."""
        end = gpa + (length + PAGE - 1 & -PAGE)
        window = self.window(gpa)
        super().unmap_file(gpa, length)
        if window.copied:
            lib.pt_give_back(self.memfd, window.gpa, window.end - window.gpa)
            window.copied.clear()
        if window.gpa == gpa and window.end == end:
            at = bisect.bisect_left(self._starts, gpa)
            del self._starts[at], self._windows[at]
            os.close(window.fd)
        elif window.gpa == gpa:
            self._starts[bisect.bisect_left(self._starts, gpa)] = end
            window.offset += end - gpa
            window.gpa = end
        elif window.end == end:
            window.end = gpa
        else:
            raise BrokenInvariant(f"the middle of a file window goes: {gpa:#x}+{length:#x}")

    def window(self, gpa: int) -> FileWindow:
        """The window that shows `gpa`; BrokenInvariant when there is none."""
        at = bisect.bisect(self._starts, gpa) - 1
        if at < 0 or gpa >= self._windows[at].end:
            raise BrokenInvariant(f"GPA {gpa:#x} is in no file window")
        return self._windows[at]

    def code(self, window: FileWindow, gpa: int, end: int) -> None:
        """Has the memfd hold gpa..end of a window too, at the same offset. For code of files on mounts with noexec,
        which the host does not let anybody map as such; the Gofer's mounts are. As new as the file was at this call."""
        status = os.fstat(window.fd)
        version = (status.st_mtime_ns, status.st_size)
        if version != window.version:
            if window.copied:
                lib.pt_give_back(self.memfd, window.gpa, window.end - window.gpa)
            window.copied.clear()
            window.version = version
        if any(low <= gpa and end <= high for low, high in window.copied):
            return
        if os.fstat(self.memfd).st_size < end:
            os.ftruncate(self.memfd, end)
        offset, at = window.offset + gpa - window.gpa, gpa
        while at < end:
            n = self._copy(window.fd, offset, at, end - at)
            if n == 0:
                break  # past the end of the file: zeroes
            offset += n
            at += n
        window.copied.append((gpa, end))

    def _copy(self, fd: int, offset: int, at: int, length: int) -> int:
        data = os.pread(fd, min(length, 1 << 20), offset)
        return os.pwrite(self.memfd, data, at) if data else 0

    def release(self, gpa: int, length: int) -> None:
        """Gives the host's memory behind RAM back; it reads as zero afterwards, in stubs too."""
        rc = lib.pt_give_back(self.memfd, gpa, length)
        if rc < 0:
            raise HostError("fallocate of application memory", -rc)

    def close(self) -> None:
        """Ends it; see vcpu.memory."""
        super().close()
        for window in self._windows:
            os.close(window.fd)
        self._windows.clear()
        self._starts.clear()
        os.close(self.memfd)


__all__ = ["FileWindow", "GPA_LIST", "GuestMemory"]
