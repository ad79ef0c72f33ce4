"""Opening paths of a directory tree that somebody else filled, never leaving it: openat(2) a component at a time.

Symbolic links are resolved as a process chrooted there would see them: absolute ones start again at the tree's root.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

MAX_LINKS = 40  # as many as Linux follows (namei.h MAXSYMLINKS)
MAX_DEPTH = 256  # directories below the root; bounds recursion and open descriptors
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Escape(OSError):
    """A path that climbs above the root of its tree."""

    def __init__(self) -> None:
        super().__init__(errno.EXDEV, "leads out of the root filesystem")


def open_directory(root: int, path: bytes, made: list[bytes] | None = None) -> tuple[int, bytes]:
    """Open directory `path` beneath descriptor `root`.

    Returns an O_PATH descriptor (the caller closes it) and the path without symbolic links, b"" for the root itself.
    With a list `made`, missing directories are made, mode 0700, and their paths added to it. Raises OSError: ENOENT,
    ENOTDIR, ELOOP, ENAMETOOLONG, or Escape.
    """
    pending = [part for part in reversed(path.split(b"/")) if part and part != b"."]
    names: list[bytes] = []
    links = 0
    fd = os.open(b".", _STEP, dir_fd=root)
    try:
        while pending:
            part = pending.pop()
            if part == b"..":
                if not names:
                    raise Escape()
                names.pop()
                parent, _ = open_directory(root, b"/".join(names))
                os.close(fd)
                fd = parent
                continue
            try:
                child = os.open(part, _STEP, dir_fd=fd)
            except FileNotFoundError:
                if made is None:
                    raise
                os.mkdir(part, 0o700, dir_fd=fd)
                made.append(b"/".join([*names, part]))
                child = os.open(part, _STEP, dir_fd=fd)
            except NotADirectoryError:
                if not stat.S_ISLNK(os.lstat(part, dir_fd=fd).st_mode):
                    raise
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
                target = os.readlink(part, dir_fd=fd)
                if target.startswith(b"/"):
                    names.clear()
                    os.close(fd)
                    fd = os.open(b".", _STEP, dir_fd=root)
                pending.extend(step for step in reversed(target.split(b"/")) if step and step != b".")
                continue
            os.close(fd)
            fd = child
            names.append(part)
            if len(names) > MAX_DEPTH:
                raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} directories deep")
    except BaseException:
        os.close(fd)
        raise
    return fd, b"/".join(names)


def read_file(root: int, path: bytes, limit: int) -> bytes:
    """Up to `limit` bytes of regular file `path` beneath descriptor `root`, following links inside the tree only.

    Raises OSError: ENOENT..., EINVAL when it is no regular file, EFBIG when it is longer than `limit`, or Escape.
    """
    for _ in range(MAX_LINKS):
        directory, _, name = path.rpartition(b"/")
        parent, real = open_directory(root, directory)
        try:
            try:
                fd = os.open(name, _READ, dir_fd=parent)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                target = os.readlink(name, dir_fd=parent)
                path = target if target.startswith(b"/") else real + b"/" + target
                continue
        finally:
            os.close(parent)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "is no regular file")
            data = file.read(limit + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return data
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def remove_tree(
    parent: int, name: bytes, path: bytes = b"", forget: Callable[[bytes], None] = lambda path: None
) -> None:
    """Remove `name` in directory descriptor `parent`, whatever it is, following nothing; missing is fine.

    `forget` is called with the path of everything that is gone, where `path` is that of `name` itself.
    Directories that deny their owner are opened up first, so that an ordinary user gets rid of what he unpacked.
    """
    try:
        os.unlink(name, dir_fd=parent)
        forget(path)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            raise
    try:
        os.rmdir(name, dir_fd=parent)
        forget(path)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    fd = _open_to_empty(parent, name)
    try:
        with os.scandir(fd) as entries:
            names = [os.fsencode(entry.name) for entry in entries]
        for child in names:
            remove_tree(fd, child, path + b"/" + child, forget)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
    forget(path)


def _open_to_empty(parent: int, name: bytes) -> int:
    probe = os.open(name, _STEP, dir_fd=parent)
    try:
        if os.fstat(probe).st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{probe}", 0o700)
    finally:
        os.close(probe)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
