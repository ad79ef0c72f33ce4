"""seccomp(2); prctl(PR_SET_SECCOMP) comes here too."""

from __future__ import annotations

import errno
import struct

from kvmsentry.kernel import seccomp as filters
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.table import UInt, UserPtr, syscall

# uapi/linux/seccomp.h
SET_MODE_STRICT, SET_MODE_FILTER, GET_ACTION_AVAIL, GET_NOTIF_SIZES = range(4)
FLAG_TSYNC, FLAG_LOG, FLAG_SPEC_ALLOW, FLAG_NEW_LISTENER, FLAG_TSYNC_ESRCH = 1, 2, 4, 8, 16
FPROG = struct.Struct("<H6xQ")  # struct sock_fprog
CAP_SYS_ADMIN = 21
ACTIONS = (
    filters.RET_KILL_PROCESS,
    filters.RET_KILL_THREAD,
    filters.RET_TRAP,
    filters.RET_ERRNO,
    filters.RET_TRACE,
    filters.RET_LOG,
    filters.RET_ALLOW,
)


def set_strict(task: Task) -> int:
    """SECCOMP_SET_MODE_STRICT."""
    if task.seccomp is not None and not task.seccomp.strict:
        return -errno.EINVAL
    task.seccomp = filters.Seccomp(strict=True)
    return 0


def set_filter(task: Task, flags: int, args: int) -> int:
    """SECCOMP_SET_MODE_FILTER with struct sock_fprog at `args`."""
    if flags & ~(FLAG_TSYNC | FLAG_LOG | FLAG_SPEC_ALLOW | FLAG_TSYNC_ESRCH):
        return -errno.EINVAL
    length, address = task.mm.read_struct(FPROG, args)
    if not 0 < length <= filters.BPF_MAXINSNS:
        return -errno.EINVAL
    if not task.process.no_new_privs and not task.creds.holds(CAP_SYS_ADMIN):
        return -errno.EACCES
    program = task.mm.read(address, length * filters.INSTRUCTION.size)
    diverged = filters.install(task, program, flags, bool(flags & FLAG_TSYNC))
    return -errno.ESRCH if diverged and flags & FLAG_TSYNC_ESRCH else diverged


@syscall(317, partial="no user notification, no tracer")
def seccomp(task: Task, operation: UInt, flags: UInt, args: UserPtr) -> int:
    if operation == SET_MODE_STRICT:
        return -errno.EINVAL if flags or args else set_strict(task)
    if operation == SET_MODE_FILTER:
        return set_filter(task, flags, args)
    if operation == GET_ACTION_AVAIL:
        if flags:
            return -errno.EINVAL
        return 0 if task.mm.read_u32(args) in ACTIONS else -errno.EOPNOTSUPP
    if operation == GET_NOTIF_SIZES:
        if flags:
            return -errno.EINVAL
        task.mm.write(args, struct.pack("<HHH", 80, 24, 64))
        return 0
    return -errno.EINVAL
