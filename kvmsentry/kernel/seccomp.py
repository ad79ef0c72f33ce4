"""Seccomp filters that applications install on themselves (seccomp(2)): classic BPF over struct seccomp_data.

Filters form a chain that only grows; a task's children inherit it. All filters of the chain run, the most severe answer
counts. A program's answer for a call number is remembered when it did not look at arguments or the instruction
pointer, which is the common case: then a call costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import struct
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import ptrace
from kvmsentry.kernel.task import SigInfo, Task
from kvmsentry.vcpu.layout import RAX, RIP

# uapi/linux/seccomp.h
RET_KILL_PROCESS, RET_KILL_THREAD, RET_TRAP, RET_ERRNO = 0x80000000, 0, 0x00030000, 0x00050000
RET_USER_NOTIF, RET_TRACE, RET_LOG, RET_ALLOW = 0x7FC00000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000
RET_ACTION_FULL, RET_DATA = 0xFFFF0000, 0x0000FFFF
AUDIT_ARCH_X86_64 = 0xC000003E
SYS_SECCOMP = 1  # si_code of SIGSYS
SIGSYS, SIGKILL = 31, 9
DATA = struct.Struct("<IIQ6Q")  # struct seccomp_data: nr, arch, instruction_pointer, args
INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter
BPF_MAXINSNS = 4096
MAX_INSTRUCTIONS_PER_PATH = 32768
STRICT_CALLS = (0, 1, 15, 60)  # read, write, rt_sigreturn, exit

# uapi/linux/bpf_common.h
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
_ALU_OPS = {0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xA0}
_JUMPS = {0x00, 0x10, 0x20, 0x30, 0x40}


class Filter:
    """One checked program."""

    def __init__(self, program: bytes, log: bool = False) -> None:
        self.code = list(INSTRUCTION.iter_unpack(program))
        self.log = log
        self.known: dict[int, int] = {}  # number -> answer, where the answer depends on the number alone
        _check(self.code)

    def run(self, nr: int, data: bytes) -> int:
        """The filter's answer for struct seccomp_data `data`."""
        answer = self.known.get(nr)
        if answer is None:
            answer, by_number = _run(self.code, data)
            if by_number and len(self.known) < 1024:
                self.known[nr] = answer
        return answer


def _check(code: list[tuple[int, int, int, int]]) -> None:
    """seccomp_check_filter and bpf_check_classic: EINVAL for what the interpreter does not know."""
    length = len(code)
    if not 0 < length <= BPF_MAXINSNS:
        raise Errno(errno.EINVAL)
    for at, (op, jt, jf, k) in enumerate(code):
        kind = op & 7
        ok = False
        if kind == LD:
            ok = (op == 0x20 and k < DATA.size and k % 4 == 0) or op in (0x00, 0x80) or (op == 0x60 and k < 16)
        elif kind == LDX:
            ok = op in (0x01, 0x81) or (op == 0x61 and k < 16)
        elif kind in (ST, STX):
            ok = op in (0x02, 0x03) and k < 16
        elif kind == ALU:
            operation, from_x = op & 0xF0, op & 8
            ok = operation in _ALU_OPS and not (operation == 0x30 and not from_x and k == 0)
            ok = ok and not (operation in (0x60, 0x70) and not from_x and k >= 32)
        elif kind == JMP:
            if op & 0xF0 == 0:
                ok = op == 0x05 and at + 1 + k < length
            else:
                ok = op & 0xF0 in _JUMPS and at + 1 + jt < length and at + 1 + jf < length
        elif kind == RET:
            ok = op in (0x06, 0x16)
        elif kind == MISC:
            ok = op in (0x07, 0x87)
        if not ok:
            raise Errno(errno.EINVAL)
    if code[-1][0] & 7 != RET:
        raise Errno(errno.EINVAL)
    _check_scratch(code)


def _check_scratch(code: list[tuple[int, int, int, int]]) -> None:
    """check_load_and_stores: EINVAL for a scratch word that is read where some way leads to it unwritten. Jumps lead
    forward only, so one pass sees every way."""
    everything = 0xFFFF
    written = [everything] * (len(code) + 1)  # words that every way to this instruction has written
    written[0] = 0
    for at, (op, jt, jf, k) in enumerate(code):
        valid, kind = written[at], op & 7
        ways: tuple[int, ...] = (at + 1,)
        if kind in (ST, STX):
            valid |= 1 << k
        elif op in (0x60, 0x61):
            if not valid >> k & 1:
                raise Errno(errno.EINVAL)
        elif kind == JMP:
            ways = (at + 1 + k,) if op == 0x05 else (at + 1 + jt, at + 1 + jf)
        elif kind == RET:
            ways = ()
        for way in ways:
            written[way] &= valid


def _run(code: list[tuple[int, int, int, int]], data: bytes) -> tuple[int, bool]:
    """Interpret; returns (answer, whether only nr and arch were read). Programs are checked and jump forward only."""
    a = x = at = 0
    by_number = True
    scratch = [0] * 16
    while True:
        op, jt, jf, k = code[at]
        at += 1
        kind = op & 7
        if kind == LD:
            if op == 0x20:
                a = int.from_bytes(data[k : k + 4], "little")
                by_number = by_number and k < 8
            elif op == 0x60:
                a = scratch[k]
            else:
                a = k if op == 0 else DATA.size
        elif kind == JMP:
            operation = op & 0xF0
            if operation == 0:
                at += k
                continue
            right = x if op & 8 else k
            if operation == 0x10:
                taken = a == right
            elif operation == 0x20:
                taken = a > right
            elif operation == 0x30:
                taken = a >= right
            else:
                taken = bool(a & right)
            at += jt if taken else jf
        elif kind == RET:
            return (a if op == 0x16 else k), by_number
        elif kind == ALU:
            right = x if op & 8 else k
            operation = op & 0xF0
            if operation == 0x00:
                a = a + right & 0xFFFFFFFF
            elif operation == 0x10:
                a = a - right & 0xFFFFFFFF
            elif operation == 0x20:
                a = a * right & 0xFFFFFFFF
            elif operation == 0x30:
                if right == 0:
                    return 0, by_number
                a //= right
            elif operation == 0x40:
                a |= right
            elif operation == 0x50:
                a &= right
            elif operation == 0x60:
                a = a << (right & 31) & 0xFFFFFFFF
            elif operation == 0x70:
                a >>= right & 31
            elif operation == 0x80:
                a = -a & 0xFFFFFFFF
            else:
                a ^= right
        elif kind == ST:
            scratch[k] = a
        elif kind == STX:
            scratch[k] = x
        elif kind == LDX:
            x = scratch[k] if op == 0x61 else k if op == 0x01 else DATA.size
        elif op == 0x07:
            x = a
        else:
            a = x


class Seccomp:
    """What stands before a task's system calls: strict mode, or a chain of filters (newest last). Never changed in
    place."""

    __slots__ = ("filters", "strict")

    def __init__(self, filters: tuple[Filter, ...] = (), strict: bool = False) -> None:
        self.filters, self.strict = filters, strict

    @property
    def mode(self) -> int:
        """1 strict, 2 filter (prctl(2) PR_GET_SECCOMP, /proc/PID/status)."""
        return 1 if self.strict else 2

    def check(self, task: Task, nr: int, args: tuple[int, ...], traced: bool = False) -> Any:
        """None: the call may go on. Else what the kernel loop finishes instead: an errno, the task's end, or a
        coroutine that asks the tracer. `traced`: it was asked already."""
        if self.strict:
            return None if nr in STRICT_CALLS else _kill_strict(task)
        data = DATA.pack(nr & 0xFFFFFFFF, AUDIT_ARCH_X86_64, task.ctx.regs[RIP], *args)
        worst, answer = 1 << 32, RET_ALLOW
        for program in reversed(self.filters):
            found = program.run(nr, data)
            action = found & RET_ACTION_FULL
            rank = action - (1 << 32) if action & 0x80000000 else action
            if rank < worst:
                worst, answer = rank, found
        action = answer & RET_ACTION_FULL
        if action in (RET_ALLOW, RET_LOG):
            return None
        if action == RET_ERRNO:
            return -min(answer & RET_DATA, 4095)
        if action == RET_TRACE and task.ptrace is not None and task.ptrace.enabled(ptrace.EVENT_SECCOMP):
            return None if traced else ptrace.seccomp_event(task, answer & RET_DATA)
        if action in (RET_TRACE, RET_USER_NOTIF):
            return -errno.ENOSYS  # nobody traces, nobody listens
        if action == RET_TRAP:
            return _trap(task, nr, answer & RET_DATA)
        return _kill(task, nr, answer & RET_DATA, action != RET_KILL_THREAD)


def _info(task: Task, nr: int, data: int) -> SigInfo:
    """The SIGSYS of call `nr`; the registers show it as if it were still to be made (syscall_rollback)."""
    regs = task.ctx.regs
    regs[RAX] = nr
    task.orig_rax = -1
    return SigInfo(SIGSYS, SYS_SECCOMP, errno=data, addr=regs[RIP], syscall=nr, arch=AUDIT_ARCH_X86_64)


def _trap(task: Task, nr: int, data: int) -> Any:
    """SECCOMP_RET_TRAP: SIGSYS; the handler finds the call's number in RAX and decides."""
    from kvmsentry.kernel import signals
    from kvmsentry.syscall.table import RELOAD

    signals.force(task, _info(task, nr, data))
    return RELOAD


def _kill(task: Task, nr: int, data: int, whole: bool) -> Any:
    """SECCOMP_RET_KILL_*: the process ends as by a SIGSYS that nothing catches, or this thread of several does."""
    from kvmsentry.kernel import exit as exit_
    from kvmsentry.syscall.table import GONE

    if whole or len(task.process.threads) == 1:
        return _die(task, _info(task, nr, data))
    if task.ptrace is not None:
        return ptrace.end(task, SIGSYS)
    exit_.do_exit(task, SIGSYS)
    return GONE


async def _die(task: Task, info: SigInfo) -> Any:
    from kvmsentry.kernel import coredump
    from kvmsentry.syscall.table import RELOAD

    await coredump.dump(task, info)
    return RELOAD  # exit_to_user finds that the process is ending


def _kill_strict(task: Task) -> Any:
    """Strict mode: the thread dies as by SIGKILL."""
    from kvmsentry.kernel import exit as exit_
    from kvmsentry.syscall.table import GONE

    if len(task.process.threads) == 1:
        exit_.exit_group(task.process, SIGKILL)
    if task.ptrace is not None:
        return ptrace.end(task, SIGKILL)
    exit_.do_exit(task, SIGKILL)
    return GONE


def _follows(thread: Task, chain: tuple[Filter, ...]) -> bool:
    """May `thread` be given `chain` and more: its own filters must be an earlier state of it (is_ancestor)."""
    state: Seccomp | None = thread.seccomp
    if state is None:
        return True
    own = state.filters
    return not state.strict and len(own) <= len(chain) and all(a is b for a, b in zip(own, chain, strict=False))


def install(task: Task, program: bytes, flags: int, sync: bool) -> int:
    """Add a filter to `task` (and to its siblings with `sync`, SECCOMP_FILTER_FLAG_TSYNC). The caller checked
    privilege. 0, or the id of a sibling that went its own way, and then nothing was done."""
    new = Filter(program, bool(flags & 2))
    current: Seccomp | None = task.seccomp
    if current is not None and current.strict:
        raise Errno(errno.EINVAL)
    old = current.filters if current else ()
    chain = (*old, new)
    if sum(len(f.code) + 4 for f in chain) > MAX_INSTRUCTIONS_PER_PATH:
        raise Errno(errno.ENOMEM)
    state = Seccomp(chain)
    if sync:
        siblings = [thread for thread in task.process.threads.values() if thread is not task and not thread.dead]
        for thread in siblings:
            if not _follows(thread, old):
                return thread.vtid
        for thread in siblings:
            thread.seccomp = state
    task.seccomp = state
    return 0
