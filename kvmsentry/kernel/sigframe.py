"""The frame that a signal handler finds on its stack, and the way back from it (arch/x86/kernel/signal_64.c,
fpu/signal.c).

    sp before ->  red zone (128)
                  xsave area, 64-byte aligned, with FP_XSTATE_MAGIC2 behind it     <- uc_mcontext.fpstate
                  struct rt_sigframe: pretcode, ucontext, siginfo                  <- sp in the handler, 16n + 8
"""

from __future__ import annotations

import errno
from struct import pack_into, unpack_from
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel.task import SigInfo, Task
from kvmsentry.syscall.abi_signal import (
    EFLAGS_DF,
    EFLAGS_RF,
    EFLAGS_TF,
    FIX_EFLAGS,
    FP_XSTATE_MAGIC1,
    FP_XSTATE_MAGIC2,
    FRAME,
    FRAME_SIZE,
    FXSAVE_SIZE,
    MINSIGSTKSZ,
    SA_ONSTACK,
    SA_RESTORER,
    SIGINFO_OFFSET,
    SS_AUTODISARM,
    SS_DISABLE,
    SS_ONSTACK,
    SW_BYTES,
    SW_OFFSET,
    UC_FP_XSTATE,
    UC_SIGCONTEXT_SS,
    UC_STRICT_RESTORE_SS,
    UCONTEXT,
    UCONTEXT_OFFSET,
    USER_CS,
    USER_SS,
    XSAVE_HEADER,
    pack_siginfo,
)
from kvmsentry.vcpu.layout import (
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

# The order of the registers in struct sigcontext.
_ORDER = (R8, R9, R10, R11, R12, R13, R14, R15, RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP, RIP, RFLAGS)
TASK_SIZE = 0x7FFF_FFFF_F000
RED_ZONE = 128
_ARMED = (0, SS_DISABLE, 0)


def on_altstack(task: Task, sp: int) -> bool:
    """Is `sp` on the alternate stack (on_sig_stack in include/linux/sched/signal.h)?"""
    start, flags, size = task.altstack
    return not flags & SS_AUTODISARM and start < sp <= start + size


def _on_altstack_range(task: Task, sp: int) -> bool:
    start, _, size = task.altstack
    return start < sp <= start + size


def deliver(task: Task, info: SigInfo, handler: int, flags: int, restorer: int, saved_mask: int) -> None:
    """Put a frame on the stack and point the registers at the handler. `saved_mask` is what rt_sigreturn restores.
    EFAULT: the stack is bad, nothing was changed."""
    ctx = task.ctx
    regs = ctx.regs
    if not flags & SA_RESTORER or handler >= TASK_SIZE:
        raise Errno(errno.EFAULT)
    old_sp = regs[RSP]
    sp = old_sp - RED_ZONE
    nested = on_altstack(task, old_sp)
    entering = False
    start, stack_flags, size = task.altstack
    if flags & SA_ONSTACK and size and not nested:
        if not (stack_flags & SS_AUTODISARM and _on_altstack_range(task, sp)):
            sp = start + size
            entering = True
    state = bytearray(ctx.xsave())
    length = len(state)
    fpstate = (sp - length - 4) & ~63
    frame = ((fpstate - FRAME_SIZE) & ~15) - 8
    if frame < 0 or ((nested or entering) and not _on_altstack_range(task, frame)):
        raise Errno(errno.EFAULT)
    platform = task.kernel.platform
    SW_BYTES.pack_into(state, SW_OFFSET, FP_XSTATE_MAGIC1, length + 4, platform.xcr0, length)
    state += FP_XSTATE_MAGIC2.to_bytes(4, "little")
    trapno, error_code, cr2 = task.trap
    data = FRAME.pack(
        restorer,
        UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS, 0,
        start, stack_flags, size,
        *[regs[i] for i in _ORDER],
        USER_CS, 0, 0, USER_SS,
        error_code & 0xFFFF_FFFF_FFFF_FFFF, trapno, saved_mask, cr2,
        fpstate,
        saved_mask,
        pack_siginfo(info),
    )  # fmt: skip
    task.mm.write(fpstate, state)
    task.mm.write(frame, data)
    if stack_flags & SS_AUTODISARM:
        task.altstack = _ARMED
    regs[RDI] = info.signo
    regs[RSI] = frame + SIGINFO_OFFSET
    regs[RDX] = frame + UCONTEXT_OFFSET
    regs[RAX] = 0
    regs[RSP] = frame
    regs[RIP] = handler
    regs[RFLAGS] &= ~(EFLAGS_DF | EFLAGS_RF | EFLAGS_TF)
    ctx.set_xsave(None)


def restore(task: Task) -> int:
    """rt_sigreturn(2): load what the frame under RSP says; returns the signal mask to be set. EFAULT: the frame is
    bad."""
    ctx = task.ctx
    regs = ctx.regs
    mm = task.mm
    frame = regs[RSP] - 8
    words = UCONTEXT.unpack(mm.read(frame + UCONTEXT_OFFSET, UCONTEXT.size))
    stack = words[2:5]
    values = words[5:23]
    fpstate, mask = words[31], words[32]
    state = _read_fpstate(task, fpstate) if fpstate else None
    old_flags = regs[RFLAGS]
    for index, value in zip(_ORDER, values, strict=True):
        regs[index] = value
    regs[RFLAGS] = (old_flags & ~FIX_EFLAGS) | (values[17] & FIX_EFLAGS)
    ctx.set_xsave(state)
    set_altstack(task, *stack, sp=values[15], restoring=True)
    return mask


def _read_fpstate(task: Task, address: int) -> bytes:
    """The XSAVE area at `address`, made whole: what the frame does not hold is in its initial state."""
    mm, platform = task.mm, task.kernel.platform
    full: int = platform.xsave_size
    state = bytearray(full)
    legacy = mm.read(address, FXSAVE_SIZE)
    magic1, extended_size, features, size = unpack_from("<IIQI", legacy, SW_OFFSET)
    valid = magic1 == FP_XSTATE_MAGIC1 and FXSAVE_SIZE + 64 <= size <= full and size <= extended_size
    if valid:
        valid = mm.read(address + size, 4) == FP_XSTATE_MAGIC2.to_bytes(4, "little")
    if valid:
        state[:size] = mm.read(address, size)
        (present,) = unpack_from("<Q", state, XSAVE_HEADER)
        pack_into("<Q", state, XSAVE_HEADER, present & features & platform.xcr0)
    else:  # an application made the frame from FXSAVE: x87 and SSE only
        state[:FXSAVE_SIZE] = legacy
        pack_into("<Q", state, XSAVE_HEADER, 3)
    state[SW_OFFSET:FXSAVE_SIZE] = bytes(FXSAVE_SIZE - SW_OFFSET)
    state[XSAVE_HEADER + 8 : XSAVE_HEADER + 64] = bytes(56)
    return bytes(state)


def altstack_flags(task: Task, sp: int) -> int:
    """What sigaltstack(2) shows in ss_flags: SS_ONSTACK or SS_DISABLE, and SS_AUTODISARM as it was set."""
    _, flags, size = task.altstack
    if not size:
        return SS_DISABLE
    return (SS_ONSTACK if on_altstack(task, sp) else 0) | (flags & SS_AUTODISARM)


def set_altstack(task: Task, start: int, flags: int, size: int, *, sp: int, restoring: bool = False) -> Any:
    """sigaltstack(2). EPERM on the stack itself, EINVAL, ENOMEM when too small; none of them when `restoring`."""
    if not restoring and on_altstack(task, sp):
        raise Errno(errno.EPERM)
    mode = flags & ~SS_AUTODISARM
    if mode not in (0, SS_ONSTACK, SS_DISABLE):
        if restoring:
            return
        raise Errno(errno.EINVAL)
    if restoring and on_altstack(task, sp):
        return  # the stack in use is not changed under us
    if mode == SS_DISABLE:
        start = size = 0
    elif size < MINSIGSTKSZ:
        if restoring:
            return
        raise Errno(errno.ENOMEM)
    task.altstack = start, flags, size


__all__ = ["altstack_flags", "deliver", "on_altstack", "restore", "set_altstack"]
