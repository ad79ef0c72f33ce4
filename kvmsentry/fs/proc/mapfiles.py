"""/proc/PID/map_files: a link for each mapped file, named by its addresses, that leads to the file itself even when its
name is gone."""

from __future__ import annotations

import errno
import re
import stat as st
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.access import look
from kvmsentry.fs.proc.links import Target
from kvmsentry.fs.vfs import DT_LNK, Dentry, Inode, Mount, Path, SuperBlock
from kvmsentry.kernel import cap

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

_NAME = re.compile(rb"(0|[1-9a-f][0-9a-f]{0,15})-([1-9a-f][0-9a-f]{0,15})")
PROT_READ, PROT_WRITE = 1, 2


def file_of(vma: Any) -> Inode | None:
    """The inode that a VMA maps, None for memory without a file."""
    backing = vma.backing
    inode: Inode | None = getattr(backing, "inode", None)
    if inode is None:
        inode = getattr(getattr(backing, "map", None), "inode", None)
    return inode


def is_file(vma: Any) -> bool:
    """Does the VMA have a link? What is shown by a path has, memory that is shared without a file too."""
    return file_of(vma) is not None or vma.name.startswith(b"/")


class MapLink(Inode):
    """One link."""

    def __init__(self, sb: SuperBlock, target: Target, start: int, end: int, prot: int) -> None:
        mode = (0o400 if prot & PROT_READ else 0) | (0o200 if prot & PROT_WRITE else 0)
        super().__init__(sb, st.S_IFLNK | mode)
        self.target, self.start, self.end, self.size = target, start, end, 64

    def _vma(self, task: Task) -> Any:
        target = self.target()
        look(task, target)
        return find(target, self.start, self.end)

    def follow(self, task: Task) -> Path:
        """The file; EPERM without CAP_CHECKPOINT_RESTORE (proc_map_files_get_link)."""
        if not task.creds.capable(cap.SYS_ADMIN) and not task.creds.capable(cap.CHECKPOINT_RESTORE):
            raise Errno(errno.EPERM)
        inode = file_of(self._vma(task))
        if inode is None:
            raise Errno(errno.ENOENT)
        dentry = Dentry(b"", None, inode)
        return Path(Mount(inode.sb, dentry), dentry)

    def readlink(self, task: Task | None = None) -> bytes:
        """As in /proc/PID/maps."""
        assert task is not None
        text: bytes = self._vma(task).name
        return text


def find(target: Task, start: int, end: int) -> Any:
    """The VMA of a file with just these addresses; ENOENT."""
    vma = target.mm.tree.find(start) if target.mm is not None else None
    if vma is None or (vma.start, vma.end) != (start, end) or not is_file(vma):
        raise Errno(errno.ENOENT)
    return vma


class MapDirectory(Inode):
    """/proc/PID/map_files."""

    def __init__(self, sb: SuperBlock, target: Target) -> None:
        super().__init__(sb, st.S_IFDIR | 0o500)
        self.target = target
        self._links: dict[tuple[int, int, int], MapLink] = {}

    def lookup(self, name: bytes) -> Inode:
        """ENOENT unless a file is mapped there."""
        target = self.target()
        match = _NAME.fullmatch(name)
        if match is None:
            raise Errno(errno.ENOENT)
        start, end = int(match[1], 16), int(match[2], 16)
        return self._link(find(target, start, end))

    def _link(self, vma: Any) -> MapLink:
        key = vma.start, vma.end, vma.prot
        node = self._links.get(key)
        if node is None:
            if len(self._links) > 4096:
                self._links.clear()
            node = self._links[key] = MapLink(self.sb, self.target, *key)
        node.uid, node.gid = self.uid, self.gid
        return node

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """Every mapped file."""
        target = self.target()
        for vma in list(target.mm.maps()) if target.mm is not None else ():
            if is_file(vma):
                yield b"%x-%x" % (vma.start, vma.end), self._link(vma).ino, DT_LNK
