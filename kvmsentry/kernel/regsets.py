"""A stopped task's registers as others see them: ptrace(2)'s regsets and the notes of a core file.

Both are Linux's layouts: struct user_regs_struct, the FXSAVE area, the XSAVE area with XCR0 in software's bytes.
"""

from __future__ import annotations

from struct import Struct, pack_into, unpack_from
from typing import TYPE_CHECKING

from kvmsentry.syscall.abi_signal import (
    ALL,
    EFLAGS_TF,
    FXSAVE_SIZE,
    SW_OFFSET,
    USER_CS,
    USER_SS,
    XSAVE_HEADER,
)
from kvmsentry.vcpu.layout import (
    FS_BASE,
    GS_BASE,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
)

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE = 1, 2, 0x202  # uapi/linux/elf.h

# struct user_regs_struct: index into Context.regs, or one of the names below.
ORIG_RAX, CS, SS, _ZERO = -1, -2, -3, -4
USER_REGS = (
    R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI, ORIG_RAX, RIP, CS, RFLAGS, RSP, SS,
    FS_BASE, GS_BASE, _ZERO, _ZERO, _ZERO, _ZERO,
)  # fmt: skip
REGS = Struct("<27Q")


def get_register(task: Task, place: int) -> int:
    """A member of struct user_regs_struct; `place` is one of USER_REGS."""
    if place >= 0:
        value: int = task.ctx.regs[place]
        if place == RFLAGS and task.ptrace is not None and task.ptrace.forced:
            value &= ~EFLAGS_TF
        return value
    if place == ORIG_RAX:
        return task.orig_rax & ALL
    return USER_CS if place == CS else USER_SS if place == SS else 0


def general(task: Task) -> bytes:
    """NT_PRSTATUS's registers: struct user_regs_struct of a stopped task."""
    return REGS.pack(*[get_register(task, place) for place in USER_REGS])


def extended(task: Task) -> bytes:
    """NT_X86_XSTATE: the XSAVE area; what is in its initial state is written out, software's bytes tell XCR0."""
    state = bytearray(task.ctx.xsave())
    (present,) = unpack_from("<Q", state, XSAVE_HEADER)
    if not present & 1:
        state[:24] = b"\x7f\x03" + bytes(22)
        state[32:160] = bytes(128)
    if not present & 2:
        state[160:416] = bytes(256)
    pack_into("<Q", state, SW_OFFSET, task.kernel.platform.xcr0)
    return bytes(state)


def floating(state: bytes) -> bytes:
    """NT_PRFPREG: the FXSAVE area out of what `extended` gave."""
    return state[:SW_OFFSET] + bytes(FXSAVE_SIZE - SW_OFFSET)
