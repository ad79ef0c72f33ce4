"""/proc/PID/mounts, mountinfo and mountstats: text as elsewhere, and poll(2) tells when the mounts have changed since
it last told (mounts_poll in fs/proc_namespace.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.nodes import TextFile, TextInode
from kvmsentry.fs.vfs import POLLERR, POLLIN, POLLPRI, POLLRDNORM, Path, SuperBlock
from kvmsentry.kernel.traps import WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task


class MountsFile(TextFile):
    """An open table of the mounts of one namespace."""

    def __init__(self, inode: MountsInode, path: Path | None, flags: int, task: Task) -> None:
        from kvmsentry.fs.mounts import namespace_of

        super().__init__(inode, path, flags, task)
        target = inode.target()
        if target.fs is None:
            raise Errno(errno.EINVAL)  # a zombie has no mounts (mounts_open_common)
        self.namespace = namespace_of(target)
        self.queue: WaitQueue = self.namespace.queue
        self.told = self.namespace.changes

    def poll(self) -> int:
        """Always readable; POLLERR and POLLPRI, once, after each change."""
        changes = self.namespace.changes
        if changes == self.told:
            return POLLIN | POLLRDNORM
        self.told = changes
        return POLLIN | POLLRDNORM | POLLERR | POLLPRI


class MountsInode(TextInode):
    """One of the tables; `target()` is the task whose mounts it shows."""

    def __init__(self, sb: SuperBlock, target: Callable[[], Task], show: Callable[[Any, Any], Any], mode: int) -> None:
        super().__init__(sb, lambda reader: show(reader, target()), mode)
        self.target = target

    def open(self, task: Task, path: Path, flags: int) -> MountsFile:
        """Knows the mounts of this moment."""
        return MountsFile(self, path, flags, task)
