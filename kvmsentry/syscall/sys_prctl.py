"""prctl(2), arch_prctl(2), personality(2): switches of a task."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap
from kvmsentry.kernel.task import Task
from kvmsentry.syscall import sys_seccomp
from kvmsentry.syscall.abi_signal import NSIG_VALID
from kvmsentry.syscall.table import Int, UInt, ULong, syscall
from kvmsentry.vcpu.layout import FS_BASE, GS_BASE, RAX, USER_TOP

# uapi/linux/prctl.h
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE = 1, 2, 3, 4
PR_GET_UNALIGN, PR_SET_UNALIGN, PR_GET_KEEPCAPS, PR_SET_KEEPCAPS = 5, 6, 7, 8
PR_GET_TIMING, PR_SET_TIMING, PR_SET_NAME, PR_GET_NAME = 13, 14, 15, 16
PR_GET_SECCOMP, PR_SET_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP = 21, 22, 23, 24
PR_GET_TSC, PR_SET_TSC, PR_GET_SECUREBITS, PR_SET_SECUREBITS = 25, 26, 27, 28
PR_SET_TIMERSLACK, PR_GET_TIMERSLACK, PR_MCE_KILL, PR_MCE_KILL_GET, PR_SET_MM = 29, 30, 33, 34, 35
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS, PR_GET_TID_ADDRESS, PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = (
    38,
    39,
    40,
    41,
    42,
)
PR_CAP_AMBIENT, PR_GET_SPECULATION_CTRL, PR_SET_SPECULATION_CTRL = 47, 52, 53
PR_SET_IO_FLUSHER, PR_GET_IO_FLUSHER = 57, 58
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0
PR_SET_PTRACER = 0x59616D61
PR_CAP_AMBIENT_IS_SET, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_LOWER, PR_CAP_AMBIENT_CLEAR_ALL = 1, 2, 3, 4
PR_TSC_ENABLE = 1
SECCOMP_MODE_STRICT, SECCOMP_MODE_FILTER = 1, 2  # uapi/linux/seccomp.h
ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS = 0x1001, 0x1002, 0x1003, 0x1004  # arch/x86 uapi/asm/prctl.h
ARCH_GET_CPUID, ARCH_SET_CPUID = 0x1011, 0x1012


@syscall(157, partial="PR_SET_MM is EPERM, PR_SET_TSC only PR_TSC_ENABLE")
def prctl(task: Task, option: Int, arg2: ULong, arg3: ULong, arg4: ULong, arg5: ULong) -> Any:
    handler = _OPTIONS.get(option)
    if handler is None:
        return -errno.EINVAL
    return handler(task, arg2, arg3, arg4, arg5)


def _set_name(task: Task, address: int, *_: int) -> int:
    try:
        name = task.mm.read(address, 16).split(b"\0", 1)[0]
    except Errno:
        name = task.mm.read_cstring(address, 16)  # a short name at the end of a page
    task.comm = name[:15]
    return 0


def _get_name(task: Task, address: int, *_: int) -> int:
    task.mm.write(address, task.comm.ljust(16, b"\0"))
    return 0


def _set_pdeathsig(task: Task, signo: int, *_: int) -> int:
    if signo > NSIG_VALID:
        return -errno.EINVAL
    task.pdeath_signal = signo
    return 0


def _get_pdeathsig(task: Task, address: int, *_: int) -> int:
    task.mm.write_u32(address, task.pdeath_signal)
    return 0


def _set_dumpable(task: Task, value: int, *_: int) -> int:
    if value > 1:
        return -errno.EINVAL
    task.process.dumpable = value
    return 0


def _set_keepcaps(task: Task, value: int, *_: int) -> int:
    if value > 1:
        return -errno.EINVAL
    bits = task.creds.securebits
    if bits & cap.SECBIT_KEEP_CAPS << 1:
        return -errno.EPERM
    bits = bits | cap.SECBIT_KEEP_CAPS if value else bits & ~cap.SECBIT_KEEP_CAPS
    task.creds = task.creds.replace(securebits=bits)
    return 0


def _set_no_new_privs(task: Task, value: int, *rest: int) -> int:
    if value != 1 or any(rest):
        return -errno.EINVAL
    task.process.no_new_privs = True
    return 0


def _get_no_new_privs(task: Task, *rest: int) -> int:
    return -errno.EINVAL if any(rest) else int(task.process.no_new_privs)


def _set_subreaper(task: Task, value: int, *_: int) -> int:
    task.process.subreaper = bool(value)
    return 0


def _get_subreaper(task: Task, address: int, *_: int) -> int:
    task.mm.write_u32(address, int(task.process.subreaper))
    return 0


def _capbset_read(task: Task, number: int, *_: int) -> int:
    if number > cap.LAST:
        return -errno.EINVAL
    return task.creds.bounding >> number & 1


def _capbset_drop(task: Task, number: int, *_: int) -> int:
    if not task.creds.holds(cap.SETPCAP):
        return -errno.EPERM
    if number > cap.LAST:
        return -errno.EINVAL
    task.creds = task.creds.replace(bounding=task.creds.bounding & ~(1 << number))
    return 0


def _set_securebits(task: Task, value: int, *_: int) -> int:
    creds = task.creds
    old = creds.securebits
    locks = old & cap.SECURE_ALL_LOCKS
    if (
        (locks >> 1) & (old ^ value)  # a locked bit would change
        or locks & ~value  # a lock would open
        or value & ~(cap.SECURE_ALL_BITS | cap.SECURE_ALL_LOCKS)
        or not creds.holds(cap.SETPCAP)
    ):
        return -errno.EPERM
    task.creds = creds.replace(securebits=value)
    return 0


def _set_timerslack(task: Task, value: int, *_: int) -> int:
    task.timerslack = value if 0 < value < 1 << 63 else task.default_timerslack
    return 0


def _ambient(task: Task, what: int, number: int, *rest: int) -> int:
    creds = task.creds
    if any(rest):
        return -errno.EINVAL
    if what == PR_CAP_AMBIENT_CLEAR_ALL:
        if number:
            return -errno.EINVAL
        task.creds = creds.replace(ambient=0)
        return 0
    if number > cap.LAST:
        return -errno.EINVAL
    bit = 1 << number
    if what == PR_CAP_AMBIENT_IS_SET:
        return int(bool(creds.ambient & bit))
    if what == PR_CAP_AMBIENT_RAISE:
        if not creds.permitted & creds.inheritable & bit or creds.securebits & cap.SECBIT_NO_CAP_AMBIENT_RAISE:
            return -errno.EPERM
        task.creds = creds.replace(ambient=creds.ambient | bit)
        return 0
    if what == PR_CAP_AMBIENT_LOWER:
        task.creds = creds.replace(ambient=creds.ambient & ~bit)
        return 0
    return -errno.EINVAL


def _set_vma(task: Task, what: int, address: int, length: int, name: int) -> int:
    if what != PR_SET_VMA_ANON_NAME or address & 4095:
        return -errno.EINVAL
    if name:
        text = task.mm.read_cstring(name, 80)
        if any(not 0x20 <= c < 0x7F or c in b"\\`$[]" for c in text):
            return -errno.EINVAL
    return 0


def _set_seccomp(task: Task, mode: int, program: int, *_: int) -> int:
    if mode == SECCOMP_MODE_STRICT:
        return sys_seccomp.set_strict(task)
    return sys_seccomp.set_filter(task, 0, program) if mode == SECCOMP_MODE_FILTER else -errno.EINVAL


def _get_tsc(task: Task, address: int, *_: int) -> int:
    task.mm.write_u32(address, PR_TSC_ENABLE)
    return 0


def _get_tid_address(task: Task, address: int, *_: int) -> int:
    task.mm.write_u64(address, task.clear_child_tid)
    return 0


def _mce_kill(task: Task, what: int, how: int, *rest: int) -> int:
    if any(rest) or what > 1 or (what == 0 and how) or how > 2:
        return -errno.EINVAL
    return 0


_OPTIONS: dict[int, Callable[..., int]] = {
    PR_SET_PDEATHSIG: _set_pdeathsig,
    PR_GET_PDEATHSIG: _get_pdeathsig,
    PR_GET_DUMPABLE: lambda task, *_: task.process.dumpable,
    PR_SET_DUMPABLE: _set_dumpable,
    PR_GET_KEEPCAPS: lambda task, *_: int(bool(task.creds.securebits & cap.SECBIT_KEEP_CAPS)),
    PR_SET_KEEPCAPS: _set_keepcaps,
    PR_GET_TIMING: lambda task, *_: 0,
    PR_SET_TIMING: lambda task, value, *_: -errno.EINVAL if value else 0,
    PR_SET_NAME: _set_name,
    PR_GET_NAME: _get_name,
    PR_GET_SECCOMP: lambda task, *_: task.seccomp.mode if task.seccomp is not None else 0,
    PR_SET_SECCOMP: _set_seccomp,
    PR_CAPBSET_READ: _capbset_read,
    PR_CAPBSET_DROP: _capbset_drop,
    PR_GET_TSC: _get_tsc,
    PR_SET_TSC: lambda task, value, *_: 0 if value == PR_TSC_ENABLE else -errno.EINVAL,
    PR_GET_SECUREBITS: lambda task, *_: task.creds.securebits,
    PR_SET_SECUREBITS: _set_securebits,
    PR_SET_TIMERSLACK: _set_timerslack,
    PR_GET_TIMERSLACK: lambda task, *_: task.timerslack,
    PR_MCE_KILL: _mce_kill,
    PR_MCE_KILL_GET: lambda task, *rest: -errno.EINVAL if any(rest) else 2,
    PR_SET_MM: lambda task, *_: -errno.EPERM,
    PR_SET_CHILD_SUBREAPER: _set_subreaper,
    PR_GET_CHILD_SUBREAPER: _get_subreaper,
    PR_SET_NO_NEW_PRIVS: _set_no_new_privs,
    PR_GET_NO_NEW_PRIVS: _get_no_new_privs,
    PR_GET_TID_ADDRESS: _get_tid_address,
    PR_SET_THP_DISABLE: lambda task, value, *rest: -errno.EINVAL if any(rest) else 0,
    PR_GET_THP_DISABLE: lambda task, *rest: -errno.EINVAL if any(rest) else 0,
    PR_CAP_AMBIENT: _ambient,
    PR_SET_VMA: _set_vma,
    PR_SET_PTRACER: lambda task, *_: 0,
}


@syscall(158, note="no shadow stacks and no CPUID faulting: those requests are EINVAL")
def arch_prctl(task: Task, code: Int, address: ULong) -> Any:
    regs = task.ctx.regs
    if code == ARCH_SET_FS or code == ARCH_SET_GS:
        if address >= USER_TOP:
            return -errno.EPERM
        regs[FS_BASE if code == ARCH_SET_FS else GS_BASE] = address
        return _reload(task, 0)
    if code == ARCH_GET_FS:
        task.mm.write_u64(address, regs[FS_BASE])
        return 0
    if code == ARCH_GET_GS:
        task.mm.write_u64(address, regs[GS_BASE])
        return 0
    if code == ARCH_GET_CPUID:
        return 1
    return -errno.EINVAL if code != ARCH_SET_CPUID else -errno.ENODEV


def _reload(task: Task, result: int) -> Any:
    """The call changed registers beyond RAX: load them all."""
    from kvmsentry.syscall.table import RELOAD

    task.ctx.regs[RAX] = result
    task.orig_rax = -1
    return RELOAD


@syscall(135, note="ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC and UNAME26 count, the others are kept and shown")
def personality(task: Task, persona: UInt) -> int:
    old = task.process.personality
    if persona != 0xFFFFFFFF:
        task.process.personality = persona
    return old
