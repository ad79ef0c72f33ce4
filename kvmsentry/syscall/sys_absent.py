"""Calls that Linux itself answers with an error: removed long ago, never implemented, or switched off in the kernel
that we say we are. A row here is the whole truth, so an application can't tell the difference."""

from __future__ import annotations

import errno
from typing import Any

from kvmsentry.syscall.names import NAMES
from kvmsentry.syscall.table import syscall

ROWS: tuple[tuple[str, int, str], ...] = (
    ("uselib", errno.ENOSYS, "as without CONFIG_USELIB"),
    ("_sysctl", errno.ENOSYS, "gone since Linux 5.5"),
    *((name, errno.ENOSYS, "gone since Linux 2.6") for name in ("create_module", "get_kernel_syms", "query_module")),
    ("nfsservctl", errno.ENOSYS, "gone since Linux 3.1"),
    *(
        (name, errno.ENOSYS, "never implemented")
        for name in ("getpmsg", "putpmsg", "afs_syscall", "tuxcall", "security", "vserver")
    ),
    *((name, errno.ENOSYS, "32-bit processes only") for name in ("set_thread_area", "get_thread_area")),
    ("lookup_dcookie", errno.ENOSYS, "as without CONFIG_PROFILING"),
    *((name, errno.ENOSYS, "never implemented on amd64") for name in ("epoll_ctl_old", "epoll_wait_old")),
    ("quotactl_fd", errno.ENOSYS, "as without CONFIG_QUOTA"),
    *(
        (name, errno.EOPNOTSUPP, "EOPNOTSUPP, as where Landlock is not enabled at boot")
        for name in ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
    ),
    ("memfd_secret", errno.ENOSYS, "ENOSYS, as without secretmem.enable=1"),
)


def _declare(nr: int, name: str, number: int, note: str) -> None:
    def handler(task: Any) -> int:
        return -number

    handler.__name__ = name
    syscall(nr, note=note if note.startswith("E") else f"ENOSYS: {note}")(handler)


_numbers = {name: nr for nr, name in NAMES.items()}
for _name, _number, _note in ROWS:
    _declare(_numbers[_name], _name, _number, _note)
