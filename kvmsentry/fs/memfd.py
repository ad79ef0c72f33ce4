"""memfd_create(2): a file in memory without a name, with seals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsentry.fs.tmpfs import F_SEAL_SEAL, TmpFile, TmpInode, memory_file
from kvmsentry.fs.vfs import O_LARGEFILE, O_RDWR

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

F_SEAL_EXEC = 32  # uapi/linux/fcntl.h
PROT_WRITE, VM_SHARED = 2, 1


class MemFile(TmpFile):
    """The open file that memfd_create gives."""

    __slots__ = ()

    def label(self) -> bytes:
        """What /proc/PID/fd/N shows."""
        return self.inode.target + b" (deleted)"


def new_memfd(task: Task, name: bytes, sealing: bool, executable: bool) -> MemFile:
    """An empty memory file; without `sealing` it is sealed against seals. Not `executable`: mode 0666 and sealed so."""
    inode = memory_file(task.kernel, b"/memfd:" + name, 0o777 if executable else 0o666, task.creds)
    inode.seals = (0 if sealing else F_SEAL_SEAL) | (0 if executable else F_SEAL_EXEC)
    return MemFile(inode, None, O_RDWR | O_LARGEFILE)


def is_memfd(kernel: Kernel, inode: object) -> bool:
    """Does `inode` live on the kernel's internal tmpfs, so that it can be sealed?"""
    return type(inode) is TmpInode and inode.sb is kernel.__dict__.get("shm_super")


def mapped_writable(kernel: Kernel, inode: TmpInode) -> bool:
    """May anybody write to `inode` through a shared mapping? Looks through all address spaces: asked when a seal is
    added."""
    if inode.store is None or not inode.store.mapped:
        return False
    seen = set()
    for task in kernel.tasks.values():
        space = task.mm
        if space is None or id(space) in seen:
            continue
        seen.add(id(space))
        for vma in space.maps():
            if vma.flags & VM_SHARED and vma.max_prot & PROT_WRITE and getattr(vma.backing, "inode", None) is inode:
                return True
    return False
