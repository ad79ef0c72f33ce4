"""Who may look at whom: __ptrace_may_access with file system credentials (ptrace(2), "Ptrace access mode checking")."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.kernel import userns

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

CAP_SYS_PTRACE = 19  # uapi/linux/capability.h


def may_look(reader: Task, target: Task) -> bool:
    """May `reader` see what only the owner of `target` may see (PTRACE_MODE_READ_FSCREDS)?"""
    if reader.process is target.process:
        return True
    mine, theirs = reader.creds, target.creds
    if userns.capable(mine, theirs.user_ns, CAP_SYS_PTRACE):
        return True
    uid, gid = mine.fsuid, mine.fsgid
    same = uid == theirs.uid == theirs.euid == theirs.suid and gid == theirs.gid == theirs.egid == theirs.sgid
    return (
        same and target.process.dumpable == 1 and theirs.user_ns is mine.user_ns
        and not theirs.permitted & ~mine.permitted
    )  # fmt: skip


def look(reader: Task, target: Task) -> None:
    """EACCES unless `may_look`."""
    if not may_look(reader, target):
        raise Errno(errno.EACCES)
