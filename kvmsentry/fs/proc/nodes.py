"""The kinds of files that procfs and sysfs are made of: text generated when it is read, directories that know their
names.

A text file's content is made when it is read from its beginning and kept with the open file, so that a program that
reads in
pieces sees one consistent snapshot, and one that seeks back to the beginning (top, free) sees a fresh one: seq_file's
habit.
"""

from __future__ import annotations

import errno
import re
import stat as st
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import gather, scatter
from kvmsentry.fs.vfs import DT_DIR, DT_LNK, DT_REG, File, Inode, Path, SuperBlock

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

WRITE_LIMIT = 4096  # PAGE_SIZE: more is refused with EINVAL, as proc handlers do
INT = (-(1 << 31), (1 << 31) - 1)  # what a plain knob may be set to
_NUMBERS = re.compile(rb"\s*(-?\d+(?:\s+-?\d+)*)\s*\0?\s*")
_TYPES = {st.S_IFDIR: DT_DIR, st.S_IFLNK: DT_LNK, st.S_IFREG: DT_REG}

Text = Callable[[Any], "str | bytes"]  # (the task that opened the file) -> content
Store = Callable[[Any, bytes], None]  # (the task that opened the file, what was written); Errno for what it refuses


def numbers(data: bytes, old: list[int], rule: tuple[int, int]) -> list[int]:
    """The numbers of `old` as `data` changes them, from the first on; EINVAL for what is no number or out of range."""
    match = _NUMBERS.fullmatch(data)
    if match is None:
        raise Errno(errno.EINVAL)
    new = [int(word) for word in match[1].split()][: len(old)]
    if any(not rule[0] <= value <= rule[1] for value in new):
        raise Errno(errno.EINVAL)
    return [*new, *old[len(new) :]]


class KernelSuper(SuperBlock):
    """A file system whose files are windows into the kernel."""

    caching = False

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel


class TextFile(File):
    """An open text file."""

    seekable = True

    def __init__(self, inode: TextInode, path: Path | None, flags: int, task: Task) -> None:
        super().__init__(inode, path, flags)
        self.task = task
        self.text = inode.text
        self._snapshot: bytes | None = None

    def pread(self, views: list[memoryview], pos: int) -> int:
        """A piece of the snapshot; a new snapshot at the beginning."""
        snapshot = self._snapshot
        if snapshot is None or pos == 0:
            if self.text is None:
                raise Errno(errno.EIO)
            made = self.text(self.task)
            snapshot = made.encode("utf-8", "surrogateescape") if isinstance(made, str) else made
            self._snapshot = snapshot
        if pos >= len(snapshot):
            return 0
        return scatter(views, memoryview(snapshot)[pos:] if pos else snapshot)

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """The whole of a write is one value."""
        store = self.inode.store  # type: ignore[attr-defined]
        if store is None:
            raise Errno(errno.EIO)
        length = sum(map(len, views))
        if length > WRITE_LIMIT:
            raise Errno(errno.EINVAL)
        if pos and length:
            return length  # sysctl_writes_strict: only the first write of a file counts
        store(self.task, gather(views, length))
        return length


class TextInode(Inode):
    """A file whose content is `text(task)`; `store(task, data)` takes what is written to it."""

    def __init__(self, sb: SuperBlock, text: Text | None, mode: int = 0o444, store: Store | None = None,
                 uid: int = 0, gid: int = 0, size: int = 0) -> None:  # fmt: skip
        super().__init__(sb, st.S_IFREG | mode, uid, gid)
        self.text, self.store = text, store
        self.size = size

    def open(self, task: Task, path: Path, flags: int) -> File:
        """An open file that has no content yet."""
        return TextFile(self, path, flags, task)

    def truncate(self, size: int) -> None:
        """O_TRUNC on a file that is about to be written to: nothing to cut."""

    @property
    def blocks(self) -> int:
        """No storage."""
        return 0


class LinkInode(Inode):
    """A symbolic link whose text is `target(task)`."""

    def __init__(self, sb: SuperBlock, target: Callable[[Any], bytes]) -> None:
        super().__init__(sb, st.S_IFLNK | 0o777)
        self.target = target

    def readlink(self, task: Task | None = None) -> bytes:
        """Where it points, for the task that asks."""
        return self.target(task)


class TreeInode(Inode):
    """A directory with a fixed set of names. A value is an Inode, or a function of the super block that makes one when
    it is
    first looked up."""

    def __init__(self, sb: SuperBlock, entries: dict[bytes, Any] | None = None, mode: int = 0o555) -> None:
        super().__init__(sb, st.S_IFDIR | mode)
        self.entries: dict[bytes, Any] = entries if entries is not None else {}

    def lookup(self, name: bytes) -> Inode:
        """The child; ENOENT."""
        entry = self.entries.get(name)
        if entry is None:
            raise Errno(errno.ENOENT)
        if not isinstance(entry, Inode):
            entry = self.entries[name] = entry(self.sb)
        return entry

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """All children."""
        for name in list(self.entries):
            inode = self.lookup(name)
            yield name, inode.ino, _TYPES.get(st.S_IFMT(inode.mode), 0)

    def put(self, path: bytes, entry: Any, mode: int = 0o555) -> None:
        """Add `entry` at `path` below, making directories on the way."""
        directory = self
        *parents, name = path.split(b"/")
        for parent in parents:
            child: Any = directory.entries.get(parent)
            if child is None:
                child = directory.entries[parent] = TreeInode(self.sb, {}, mode)
                directory.nlink += 1
            elif not isinstance(child, Inode):
                child = directory.lookup(parent)  # made only when asked for, as now
            directory = child
        directory.entries[name] = entry


def text(function: Text, mode: int = 0o444, store: Store | None = None) -> Callable[[SuperBlock], Inode]:
    """An entry of a TreeInode: a text file."""
    return lambda sb: TextInode(sb, function, mode, store)


def constant(value: str | bytes, mode: int = 0o444) -> Callable[[SuperBlock], Inode]:
    """An entry of a TreeInode: a file that never changes."""
    return lambda sb: TextInode(sb, lambda task: value, mode)


def link(target: bytes) -> Callable[[SuperBlock], Inode]:
    """An entry of a TreeInode: a symbolic link."""
    return lambda sb: LinkInode(sb, lambda task: target)


def cpu_list(cpus: Iterable[int]) -> str:
    """A set of processors as `0-3,8`."""
    parts: list[str] = []
    start = last = -2
    for cpu in [*sorted(cpus), -9]:
        if cpu == last + 1:
            last = cpu
            continue
        if start >= 0:
            parts.append(str(start) if start == last else f"{start}-{last}")
        start = last = cpu
    return ",".join(parts)


def cpu_mask(cpus: Iterable[int]) -> str:
    """A set of processors as comma-separated 32-bit words in hex, highest first."""
    mask = sum(1 << cpu for cpu in cpus)
    words = []
    while True:
        words.append(mask & 0xFFFFFFFF)
        mask >>= 32
        if not mask:
            break
    head, *rest = reversed(words)
    return ",".join([f"{head:x}", *(f"{word:08x}" for word in rest)])
