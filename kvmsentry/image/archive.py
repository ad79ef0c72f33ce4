"""The file or directory that an image comes in, as named members with random access.

`docker save` and OCI layouts are tars of documents and layer tars, where a layer may be a symbolic link to another
member (old `docker save`); an OCI layout may be a plain directory. A tar packed as a whole with gzip or zstd is
unpacked into an unnamed temporary file first.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from typing import Protocol

from kvmsentry.image import tar
from kvmsentry.image.beneath import Escape, open_directory
from kvmsentry.image.faults import ImageFault, Limits
from kvmsentry.image.stream import PackedStream, packing_of

PIECE = 1 << 16


class Member:
    """A run of bytes of an open file; read with `pread`, so that several readers do not meet."""

    __slots__ = ("fd", "offset", "size", "owned")

    def __init__(self, fd: int, offset: int, size: int, owned: bool = False) -> None:
        self.fd, self.offset, self.size, self.owned = fd, offset, size, owned

    def read(self, at: int, length: int) -> bytes:
        """Up to `length` bytes from `at`; ImageFault where the file ends too early (somebody truncates it)."""
        length = min(length, self.size - at)
        if length <= 0:
            return b""
        data = os.pread(self.fd, length, self.offset + at)
        if not data:
            raise ImageFault("the file became shorter while it was read")
        return data

    def close(self) -> None:
        if self.owned:
            os.close(self.fd)
            self.owned = False


class Archive(Protocol):
    def open(self, name: str) -> Member | None:
        """The regular member `name`, None when there is none."""

    def document(self, name: str) -> bytes | None:
        """A small member as a whole; ImageFault over Limits.MAX_DOCUMENT bytes."""

    def close(self) -> None: ...


class _Documents(ABC):
    @abstractmethod
    def open(self, name: str) -> Member | None: ...

    def document(self, name: str) -> bytes | None:
        member = self.open(name)
        if member is None:
            return None
        try:
            if member.size > Limits.MAX_DOCUMENT:
                raise ImageFault(f"{name} is {member.size} bytes long, more than {Limits.MAX_DOCUMENT}")
            parts, at = [], 0
            while at < member.size:
                parts.append(member.read(at, member.size - at))
                at += len(parts[-1])
            return b"".join(parts)
        finally:
            member.close()


class TarArchive(_Documents):
    """A tar on disk; the directory of members is read once, skipping over their data."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        position = 0

        def feed() -> bytes:
            nonlocal position
            data = os.pread(fd, PIECE, position)
            position += len(data)
            return data

        def seek(length: int) -> int:
            nonlocal position
            if position + length > size:
                raise ImageFault(f"truncated: {position + length - size} bytes are missing at the end")
            position += length
            return length

        reader = tar.TarReader(feed, seek)
        while (entry := reader.next()) is not None:
            if reader.entries > Limits.MAX_MEMBERS:
                raise ImageFault(f"more than {Limits.MAX_MEMBERS} members")
            name = _normal(os.fsdecode(entry.name))
            self._members.pop(name, None)
            self._links.pop(name, None)
            if entry.kind == tar.REGULAR and entry.runs is None:
                self._members[name] = (reader.offset, entry.size)
            elif entry.kind == tar.SYMLINK:
                self._links[name] = _normal(os.path.join(os.path.dirname(name), os.fsdecode(entry.link)))
            elif entry.kind == tar.HARDLINK:
                self._links[name] = _normal(os.fsdecode(entry.link))

    def open(self, name: str) -> Member | None:
        name = _normal(name)
        for _ in range(8):
            if name in self._members:
                return Member(self._fd, *self._members[name])
            if name not in self._links:
                return None
            name = self._links[name]
        raise ImageFault(f"too many links behind {name}")

    def close(self) -> None:
        os.close(self._fd)


class DirectoryArchive(_Documents):
    """An OCI layout as a directory. Links are followed within it only."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def open(self, name: str) -> Member | None:
        if "\0" in name:
            return None
        directory, _, last = os.fsencode(_normal(name)).rpartition(b"/")
        try:
            parent, _ = open_directory(self._fd, directory)
            try:
                fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            finally:
                os.close(parent)
        except Escape:
            raise ImageFault(f"{name} leads out of the directory") from None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ImageFault(f"{name}: {error.strerror}") from None
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            return None
        return Member(fd, 0, status.st_size, owned=True)

    def close(self) -> None:
        os.close(self._fd)


def open_archive(fd: int, limits: Limits, scratch: str) -> Archive:
    """What descriptor `fd` holds, told by its content. Takes the descriptor over, also when it fails.

    `scratch` is a directory for the unpacked copy of a compressed archive. Raises ImageFault when it is no archive.
    """
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            return DirectoryArchive(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageFault("is neither a file nor a directory")
        head = os.pread(fd, 512, 0)
        if packing_of(head):
            plain = _unpack_whole(fd, status.st_size, limits, scratch)
            os.close(fd)
            fd = plain
            status, head = os.fstat(fd), os.pread(fd, 512, 0)
        if head[257:262] != b"ustar" and not _old_tar(head):
            raise ImageFault("is no tar archive")
        return TarArchive(fd, status.st_size)
    except BaseException:
        os.close(fd)
        raise


def _unpack_whole(fd: int, size: int, limits: Limits, scratch: str) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        out = os.open(scratch, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        name = os.path.join(scratch, f"plain.{os.getpid()}")
        out = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(name)
    stream = PackedStream(Member(fd, 0, size), limits)
    try:
        while piece := stream.next():
            view = memoryview(piece)
            while view:
                view = view[os.write(out, view) :]
    except BaseException:
        os.close(out)
        raise
    finally:
        stream.close()
    return out


def _old_tar(head: bytes) -> bool:
    """A header of the time before ustar has no magic; its checksum tells."""
    try:
        return len(head) == tar.BLOCK and any(head) and tar.sum_holds(head, head[148:156])
    except ImageFault:
        return False


def _normal(name: str) -> str:
    return os.path.normpath("/" + name).lstrip("/")
