"""/proc/PID/uid_map, gid_map, projid_map, setgroups (user_namespaces(7)) and timens_offsets (time_namespaces(7))."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import gather
from kvmsentry.fs.proc.nodes import TextFile, TextInode
from kvmsentry.fs.vfs import Path, SuperBlock
from kvmsentry.kernel import timens, userns

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

NAMES = (b"gid_map", b"projid_map", b"setgroups", b"uid_map")
PAGE = 4096


class IdMapFile(TextFile):
    """An open map. Whoever writes to it is judged by the credentials that it was opened with, too: the descriptor may
    have come to a privileged program as its output."""

    def __init__(self, inode: IdMapInode, path: Path | None, flags: int, task: Task) -> None:
        super().__init__(inode, path, flags, task)
        self.creds, self.namespace, self.which = task.creds, inode.target().creds.user_ns, inode.which
        self.text = self._show

    def _show(self, reader: Task) -> str:
        if self.which == "setgroups":
            return "allow\n" if self.namespace.setgroups else "deny\n"
        return userns.map_text(self.creds, self.namespace, getattr(self.namespace, self.which), self.which)

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """All of a map in one write: EINVAL when it is too long or not at the beginning; else as userns.write_map."""
        length = sum(map(len, views))
        if length >= PAGE or pos:
            raise Errno(errno.EINVAL)
        data = gather(views, length)
        if self.which == "setgroups":
            userns.write_setgroups(self.creds, self.namespace, data)
        else:
            userns.write_map(self.task, self.creds, self.namespace, self.which, data)
        return length


class IdMapInode(TextInode):
    """The file; `which` is an attribute of UserNamespace."""

    def __init__(self, sb: SuperBlock, target: Callable[[], Task], which: str) -> None:
        super().__init__(sb, None, 0o644)
        self.target, self.which = target, which

    def open(self, task: Task, path: Path, flags: int) -> IdMapFile:
        """EACCES: setgroups may be opened for writing only by who may change it."""
        file = IdMapFile(self, path, flags, task)
        if self.which == "setgroups" and file.writable and not userns.capable(task.creds, file.namespace, 21):
            raise Errno(errno.EACCES)  # CAP_SYS_ADMIN
        return file


class OffsetsFile(TextFile):
    """An open /proc/PID/timens_offsets; who opened it must be allowed to write."""

    inode: OffsetsInode

    def __init__(self, inode: OffsetsInode, path: Path | None, flags: int, task: Task) -> None:
        super().__init__(inode, path, flags, task)
        self.creds = task.creds
        self.text = lambda reader: timens.show(inode.target())

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """EINVAL when it is too long or not at the beginning; else as timens.write; ESRCH."""
        length = sum(map(len, views))
        if length >= PAGE or pos:
            raise Errno(errno.EINVAL)
        return timens.write(self.inode.target(), self.creds, gather(views, length))


class OffsetsInode(TextInode):
    """The file."""

    def __init__(self, sb: SuperBlock, target: Callable[[], Task]) -> None:
        super().__init__(sb, None, 0o644)
        self.target = target

    def open(self, task: Task, path: Path, flags: int) -> OffsetsFile:
        """An open file that has no content yet."""
        return OffsetsFile(self, path, flags, task)
