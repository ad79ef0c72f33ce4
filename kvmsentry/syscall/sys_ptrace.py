"""ptrace(2): the requests. What a tracee is and how it stops: kernel/ptrace.py."""

from __future__ import annotations

import errno
from struct import Struct, pack_into, unpack_from
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap, ptrace, regsets, signals
from kvmsentry.kernel.regsets import (
    NT_PRFPREG,
    NT_PRSTATUS,
    NT_X86_XSTATE,
    ORIG_RAX,
    REGS,
    USER_REGS,
    get_register,
)
from kvmsentry.kernel.seccomp import INSTRUCTION
from kvmsentry.kernel.task import SigInfo, Task
from kvmsentry.syscall.abi_signal import (
    ALL,
    FXSAVE_SIZE,
    NSIG_VALID,
    SI_USER,
    SIGINFO_SIZE,
    SIGKILL,
    SIGTRAP,
    SW_OFFSET,
    UNBLOCKABLE,
    XSAVE_HEADER,
    pack_siginfo,
    unpack_siginfo,
)
from kvmsentry.syscall.sys_process import may_trace
from kvmsentry.syscall.table import Long, Pid, ULong, UserPtr, syscall
from kvmsentry.vcpu.layout import (
    FS_BASE,
    GS_BASE,
    RAX,
    RFLAGS,
    RIP,
    RSP,
    USER_TOP,
)

# uapi/linux/ptrace.h, arch/x86/include/uapi/asm/ptrace-abi.h
TRACEME, PEEKTEXT, PEEKDATA, PEEKUSER, POKETEXT, POKEDATA, POKEUSER, CONT, KILL, SINGLESTEP = range(10)
GETREGS, SETREGS, GETFPREGS, SETFPREGS, ATTACH, DETACH, SYSCALL = 12, 13, 14, 15, 16, 17, 24
ARCH_PRCTL, SYSEMU, SYSEMU_SINGLESTEP, SINGLEBLOCK = 30, 31, 32, 33
(SETOPTIONS, GETEVENTMSG, GETSIGINFO, SETSIGINFO, GETREGSET, SETREGSET, SEIZE, INTERRUPT, LISTEN, PEEKSIGINFO,
 GETSIGMASK, SETSIGMASK, SECCOMP_GET_FILTER, SECCOMP_GET_METADATA, GET_SYSCALL_INFO,
 GET_RSEQ_CONFIGURATION) = range(0x4200, 0x4210)  # fmt: skip
OLDSETOPTIONS = 21
OPTIONS = 0x3000FF  # PTRACE_O_MASK
O_SUSPEND_SECCOMP = 1 << 21
AUDIT_ARCH_X86_64 = 0xC000003E
PEEKSIGINFO_SHARED = 1
ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS = range(0x1001, 0x1005)  # arch/x86/include/uapi/asm/prctl.h

USER_SIZE, DEBUG_REGISTERS = 928, 848  # struct user, u_debugreg in it (arch/x86/include/asm/user_64.h)
FLAGS = 0x54DD5  # FLAG_MASK in arch/x86/kernel/ptrace.c
PEEK_ARGS = Struct("<QIi")  # struct ptrace_peeksiginfo_args
IOVEC = Struct("<QQ")
INFO_HEAD = Struct("<BxxxIQQ")  # struct ptrace_syscall_info: op, arch, instruction_pointer, stack_pointer
INFO_CALL = Struct("<7Q")  # nr, args
RSEQ_CONFIGURATION = Struct("<QIIII")


# -- registers --
def _set_register(task: Task, place: int, value: int) -> None:
    """putreg in arch/x86/kernel/ptrace.c. EIO: a base outside user space, or another segment than there is."""
    regs = task.ctx.regs
    if place >= 0:
        if place == RFLAGS:
            task.ptrace.forced = False
            value = (regs[RFLAGS] & ~FLAGS) | (value & FLAGS)
        elif place in (FS_BASE, GS_BASE) and value >= USER_TOP:
            raise Errno(errno.EIO)
        regs[place] = value
    elif place == ORIG_RAX:
        task.orig_rax = -1 if value == ALL else value
    elif value & 0xFFFF != get_register(task, place):
        raise Errno(errno.EIO)


def _set_registers(task: Task, data: bytes) -> None:
    for place, (value,) in zip(USER_REGS, Struct("<Q").iter_unpack(data), strict=False):
        _set_register(task, place, value)


def _peek_user(task: Task, address: int) -> int:
    if address & 7 or address >= USER_SIZE:
        raise Errno(errno.EIO)
    if address < REGS.size:
        return get_register(task, USER_REGS[address >> 3])
    if DEBUG_REGISTERS <= address < DEBUG_REGISTERS + 64:
        registers = task.ptrace.debug
        number = address - DEBUG_REGISTERS >> 3
        if registers is not None:
            value: int = registers[number]
            return value
        return ptrace.DR6_FIXED if number == 6 else 0
    return 0


def _poke_user(task: Task, address: int, value: int) -> None:
    if address & 7 or address >= USER_SIZE:
        raise Errno(errno.EIO)
    if address < REGS.size:
        _set_register(task, USER_REGS[address >> 3], value)
        return
    if not DEBUG_REGISTERS <= address < DEBUG_REGISTERS + 64:
        raise Errno(errno.EIO)
    ptrace.set_debug(task, address - DEBUG_REGISTERS >> 3, value)


def _set_fpregs(task: Task, data: bytes) -> None:
    if unpack_from("<I", data, 24)[0] & ~0xFFFF:
        raise Errno(errno.EINVAL)
    state = bytearray(task.ctx.xsave())
    (present,) = unpack_from("<Q", state, XSAVE_HEADER)
    state[:SW_OFFSET] = data[:SW_OFFSET]
    pack_into("<Q", state, XSAVE_HEADER, present | 3)
    task.ctx.set_xsave(bytes(state))


def _set_xstate(task: Task, data: bytes) -> None:
    """xstateregs_set: the whole area, with nothing in it that is not there. EFAULT, EINVAL."""
    platform = task.kernel.platform
    if len(data) != platform.xsave_size:
        raise Errno(errno.EFAULT)
    present, compacted = unpack_from("<QQ", data, XSAVE_HEADER)
    if present & ~platform.xcr0 or compacted or any(data[XSAVE_HEADER + 16 : XSAVE_HEADER + 64]):
        raise Errno(errno.EINVAL)
    if unpack_from("<I", data, 24)[0] & ~0xFFFF:
        raise Errno(errno.EINVAL)
    state = bytearray(data)
    state[SW_OFFSET:FXSAVE_SIZE] = bytes(FXSAVE_SIZE - SW_OFFSET)
    task.ctx.set_xsave(bytes(state))


def _regset(task: Task, tracee: Task, kind: int, vector: int, write: bool) -> int:
    mm = task.mm
    base, length = IOVEC.unpack(mm.read(vector, IOVEC.size))
    if kind not in (NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE) or length % 8:
        raise Errno(errno.EINVAL)
    size = {NT_PRSTATUS: REGS.size, NT_PRFPREG: FXSAVE_SIZE}.get(kind, tracee.kernel.platform.xsave_size)
    length = min(length, size)
    if write:
        data = mm.read(base, length)
        if kind == NT_PRSTATUS:
            _set_registers(tracee, data)
        elif kind == NT_X86_XSTATE:
            _set_xstate(tracee, data)
        else:
            _set_fpregs(tracee, data + regsets.extended(tracee)[length:FXSAVE_SIZE])
    else:
        data = regsets.general(tracee) if kind == NT_PRSTATUS else regsets.extended(tracee)
        if kind == NT_PRFPREG:
            data = regsets.floating(data)
        mm.write(base, data[:length])
    mm.write_u64(vector + 8, length)
    return 0


def _arch_prctl(task: Task, tracee: Task, address: int, code: int) -> int:
    """PTRACE_ARCH_PRCTL: arch_prctl(2) of a tracee's bases. EINVAL, EPERM outside user space."""
    place = {ARCH_SET_FS: FS_BASE, ARCH_GET_FS: FS_BASE, ARCH_SET_GS: GS_BASE, ARCH_GET_GS: GS_BASE}.get(code)
    if place is None:
        raise Errno(errno.EINVAL)
    if code in (ARCH_GET_FS, ARCH_GET_GS):
        task.mm.write_u64(address, tracee.ctx.regs[place])
        return 0
    if address >= USER_TOP:
        raise Errno(errno.EPERM)
    tracee.ctx.regs[place] = address
    return 0


# -- signals --
def _siginfo(tracee: Task) -> SigInfo:
    info: SigInfo | None = tracee.ptrace.info
    if info is None:
        raise Errno(errno.EINVAL)
    return info


def _set_siginfo(task: Task, tracee: Task, address: int) -> int:
    _siginfo(tracee)
    data = task.mm.read(address, SIGINFO_SIZE)
    tracee.ptrace.info = unpack_siginfo(data, unpack_from("<i", data)[0])
    return 0


def _peek_siginfo(task: Task, tracee: Task, address: int, buffer: int) -> int:
    offset, flags, count = PEEK_ARGS.unpack(task.mm.read(address, PEEK_ARGS.size))
    if flags & ~PEEKSIGINFO_SHARED or count < 0:
        raise Errno(errno.EINVAL)
    pending = tracee.process.pending if flags & PEEKSIGINFO_SHARED else tracee.pending
    infos = pending.queue[offset : offset + count]
    for index, info in enumerate(infos):
        try:
            task.mm.write(buffer + SIGINFO_SIZE * index, pack_siginfo(info))
        except Errno:
            if not index:
                raise
            return index
    return len(infos)


# -- what else is asked --
def _syscall_info(task: Task, tracee: Task, size: int, address: int) -> int:
    trace, regs = tracee.ptrace, tracee.ctx.regs
    code = trace.info.code if trace.info is not None else 0
    op, rest = 0, b""
    if code == ptrace.SYSCALL_TRAP and trace.message == ptrace.MESSAGE_ENTRY:
        op, rest = 1, INFO_CALL.pack(tracee.orig_rax & ALL, *ptrace.arguments(tracee))
    elif code == ptrace.SYSCALL_TRAP and trace.message == ptrace.MESSAGE_EXIT:
        value = regs[RAX]
        op, rest = 2, Struct("<QB").pack(value, value > ALL - 4095)
    elif code == SIGTRAP | ptrace.EVENT_SECCOMP << 8:
        op = 3
        rest = INFO_CALL.pack(tracee.orig_rax & ALL, *ptrace.arguments(tracee)) + trace.message.to_bytes(4, "little")
    data = INFO_HEAD.pack(op, AUDIT_ARCH_X86_64, regs[RIP], regs[RSP]) + rest
    task.mm.write(address, data[:size])
    return len(data)


def _filter(task: Task, tracee: Task, index: int) -> Any:
    """Filter number `index` of a tracee, the oldest first. EACCES, EINVAL, ENOENT (get_nth_filter)."""
    if not task.creds.capable(cap.SYS_ADMIN) or task.seccomp is not None:
        raise Errno(errno.EACCES)
    state = tracee.seccomp
    if state is None or state.strict:
        raise Errno(errno.EINVAL)
    if index >= len(state.filters):
        raise Errno(errno.ENOENT)
    return state.filters[index]


def _get_filter(task: Task, tracee: Task, index: int, address: int) -> int:
    program = _filter(task, tracee, index)
    if address:
        task.mm.write(address, b"".join(INSTRUCTION.pack(*line) for line in program.code))
    return len(program.code)


def _get_metadata(task: Task, tracee: Task, size: int, address: int) -> int:
    size = min(size, 16)
    if size < 8:
        raise Errno(errno.EINVAL)
    index = task.mm.read_u64(address)
    program = _filter(task, tracee, index)
    task.mm.write(address, Struct("<QQ").pack(index, 2 if program.log else 0)[:size])
    return size


def _rseq(task: Task, tracee: Task, size: int, address: int) -> int:
    pointer, length, signature = tracee.rseq or (0, 0, 0)
    data = RSEQ_CONFIGURATION.pack(pointer, length, signature, 0, 0)
    task.mm.write(address, data[:size])
    return len(data)


def _options(task: Task, data: int) -> int:
    if data & ~OPTIONS:
        raise Errno(errno.EINVAL)
    if data & O_SUSPEND_SECCOMP:
        raise Errno(errno.EINVAL if task.creds.capable(cap.SYS_ADMIN) else errno.EPERM)
    return data


# -- attaching --
def _attach(task: Task, pid: int, request: int, address: int, data: int) -> Any:
    tracee = task.process.pid_ns.tasks.get(pid)
    if tracee is None:
        raise Errno(errno.ESRCH)
    options = 0
    if request == SEIZE:
        if address:
            raise Errno(errno.EIO)
        try:
            options = _options(task, data)
        except Errno as error:
            raise Errno(errno.EIO if data & ~OPTIONS else error.errno) from None
    if tracee.process is task.process or not may_trace(task, tracee):
        raise Errno(errno.EPERM)
    return ptrace.attach(task, tracee, request == SEIZE, options)


def _attached(task: Task, pid: int, stopped: bool) -> Task:
    """The tracee `pid` of the caller. ESRCH when it is none, or is not in a stop (ptrace_check_attach)."""
    tracee: Task | None = task.process.pid_ns.tasks.get(pid)
    trace = tracee.ptrace if tracee is not None else None
    if tracee is None or trace is None or trace.tracer is not task:
        raise Errno(errno.ESRCH)
    if stopped and (trace.code is None or trace.listening):
        raise Errno(errno.ESRCH)
    return tracee


_RESUME = {  # syscalls, step, emulate
    CONT: (False, False, False), SYSCALL: (True, False, False), SINGLESTEP: (False, True, False),
    SYSEMU: (False, False, True), SYSEMU_SINGLESTEP: (False, True, True),
}  # fmt: skip


def _resume(tracee: Task, request: int, data: int) -> int:
    if data > NSIG_VALID:
        raise Errno(errno.EIO)
    syscalls, step, emulate = _RESUME[request]
    ptrace.resume(tracee, syscalls=syscalls, step=step, emulate=emulate, signo=data)
    return 0


def _interrupt(tracee: Task) -> int:
    if not tracee.ptrace.seized:
        raise Errno(errno.EIO)
    ptrace.trap_due(tracee, False)
    return 0


def _listen(tracee: Task) -> int:
    trace = tracee.ptrace
    if not trace.seized or trace.info is None or trace.info.code >> 8 != ptrace.EVENT_STOP:
        raise Errno(errno.EIO)
    trace.listening = True
    trace.report = 0
    if trace.trap_notify:
        ptrace.trap_due(tracee, True)
    return 0


def _word(task: Task, tracee: Task, request: int, address: int, data: int) -> int:
    """PEEK and POKE of text and data: a word, whatever the protection says. EIO."""
    try:
        if request in (PEEKTEXT, PEEKDATA):
            word = tracee.mm.read_force(address, 8)
        else:
            tracee.mm.write_force(address, data.to_bytes(8, "little"))
            return 0
    except Errno:
        raise Errno(errno.EIO) from None
    task.mm.write(data, word)
    return 0


def _signals_and_masks(task: Task, tracee: Task, request: int, address: int, data: int) -> int | None:
    if request == GETSIGINFO:
        task.mm.write(data, pack_siginfo(_siginfo(tracee)))
        return 0
    if request == SETSIGINFO:
        return _set_siginfo(task, tracee, data)
    if request == PEEKSIGINFO:
        return _peek_siginfo(task, tracee, address, data)
    if request not in (GETSIGMASK, SETSIGMASK):
        return None
    if address != 8:
        raise Errno(errno.EINVAL)
    if request == GETSIGMASK:
        saved = tracee.saved_blocked
        task.mm.write_u64(data, tracee.blocked if saved is None else saved)
    else:
        tracee.saved_blocked = None
        signals.set_blocked(tracee, task.mm.read_u64(data) & ~UNBLOCKABLE)
    return 0


def _registers(task: Task, tracee: Task, request: int, address: int, data: int) -> int | None:
    mm = task.mm
    if request == PEEKUSER:
        mm.write_u64(data, _peek_user(tracee, address))
    elif request == POKEUSER:
        _poke_user(tracee, address, data)
    elif request == GETREGS:
        mm.write(data, regsets.general(tracee))
    elif request == SETREGS:
        _set_registers(tracee, mm.read(data, REGS.size))
    elif request == GETFPREGS:
        mm.write(data, regsets.floating(regsets.extended(tracee)))
    elif request == SETFPREGS:
        _set_fpregs(tracee, mm.read(data, FXSAVE_SIZE))
    elif request == ARCH_PRCTL:
        return _arch_prctl(task, tracee, address, data)
    elif request in (GETREGSET, SETREGSET):
        return _regset(task, tracee, address & 0xFFFFFFFF, data, request == SETREGSET)
    else:
        return None
    return 0


def _others(task: Task, tracee: Task, request: int, address: int, data: int) -> int:
    if request in (SETOPTIONS, OLDSETOPTIONS):
        tracee.ptrace.options = _options(task, data)
        return 0
    if request == GETEVENTMSG:
        task.mm.write_u64(data, tracee.ptrace.message)
        return 0
    if request == GET_SYSCALL_INFO:
        return _syscall_info(task, tracee, address, data)
    if request == SECCOMP_GET_FILTER:
        return _get_filter(task, tracee, address, data)
    if request == SECCOMP_GET_METADATA:
        return _get_metadata(task, tracee, address, data)
    if request == GET_RSEQ_CONFIGURATION:
        return _rseq(task, tracee, address, data)
    raise Errno(errno.EIO)


@syscall(
    101,
    partial="no PTRACE_SINGLEBLOCK, PTRACE_O_SUSPEND_SECCOMP is EINVAL; debug registers are to be had on the "
    "ptrace platform only (else ENOSPC) and do not see what the kernel stores",
)
def sys_ptrace(task: Task, request: Long, pid: Pid, address: ULong, data: UserPtr) -> Any:
    if request == TRACEME:
        ptrace.traceme(task)
        return 0
    if request in (ATTACH, SEIZE):
        return _attach(task, pid, request, address, data)
    tracee = _attached(task, pid, request not in (KILL, INTERRUPT))
    if request in _RESUME:
        return _resume(tracee, request, data)
    if request in (PEEKTEXT, PEEKDATA, POKETEXT, POKEDATA):
        return _word(task, tracee, request, address, data)
    if request == KILL:
        signals.send_task(tracee, SigInfo(SIGKILL, SI_USER, pid=task.process.pid, uid=task.creds.uid), force=True)
        return 0
    if request == INTERRUPT:
        return _interrupt(tracee)
    if request == LISTEN:
        return _listen(tracee)
    if request == DETACH:
        if data > NSIG_VALID:
            return -errno.EIO
        ptrace.detach(tracee, data)
        return 0
    for family in (_registers, _signals_and_masks):
        done = family(task, tracee, request, address, data)
        if done is not None:
            return done
    return _others(task, tracee, request, address, data)
