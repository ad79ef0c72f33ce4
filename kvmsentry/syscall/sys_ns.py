"""unshare(2), setns(2)."""

from __future__ import annotations

import errno

from kvmsentry.kernel import fork, namespaces
from kvmsentry.kernel.pidfd import PidFile
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.table import Fd, Int, ULong, syscall

UNSHARABLE = (
    fork.NAMESPACES | fork.CLONE_THREAD | fork.CLONE_FS | fork.CLONE_VM | fork.CLONE_SIGHAND | fork.CLONE_FILES
    | fork.CLONE_SYSVSEM
)  # fmt: skip


@syscall(272, partial="a network namespace never gets more than its loopback device")
def unshare(task: Task, flags: ULong) -> int:
    if flags & fork.CLONE_NEWUSER:
        flags |= fork.CLONE_THREAD | fork.CLONE_FS
    if flags & fork.CLONE_NEWNS:
        flags |= fork.CLONE_FS
    if flags & ~UNSHARABLE:
        return -errno.EINVAL
    if flags & (fork.CLONE_THREAD | fork.CLONE_SIGHAND | fork.CLONE_VM):
        if len(task.process.threads) > 1:
            return -errno.EINVAL
        if flags & (fork.CLONE_SIGHAND | fork.CLONE_VM) and (task.sighand.users > 1 or task.mm.users > 1):
            return -errno.EINVAL
    if flags & (fork.NAMESPACES | fork.CLONE_FS):
        namespaces.unshare(task, flags)
    if flags & fork.CLONE_FILES and task.files.users > 1:
        task.files.users -= 1
        task.files = task.files.copy()
    return 0


@syscall(308)
def setns(task: Task, fd: Fd, kind: Int) -> int:
    from kvmsentry.fs.proc.links import NsFile

    file = task.files.get_io(fd)
    kind &= 0xFFFFFFFF
    if isinstance(file, PidFile):
        return namespaces.enter(task, namespaces.of_process(task, file.process, kind))
    if not isinstance(file, NsFile):
        return -errno.EINVAL
    namespace = file.namespace
    if kind and kind != namespaces.FLAGS[namespace.kind]:
        return -errno.EINVAL
    return namespaces.enter(task, [namespace])
