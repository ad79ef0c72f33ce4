"""Signals: frames laid out as Linux does, restart rules, masks, stops, and what kills."""

from __future__ import annotations

import errno
import struct

import pytest
from kernel_fakes import SCRATCH, KernelWorld

from kvmsentry.kernel import signals, traps
from kvmsentry.kernel.task import SigInfo
from kvmsentry.kernel.traps import Pace, WaitQueue, park
from kvmsentry.syscall import abi_signal as abi
from kvmsentry.syscall import table
from kvmsentry.vcpu.layout import EV_EXCEPTION, EV_FAULT, RAX, RDI, RDX, RFLAGS, RIP, RSI, RSP

GETPID, SIGACTION, SIGPROCMASK, SIGRETURN, PAUSE, FORK, KILL, TGKILL, WAIT4 = 39, 13, 14, 15, 34, 57, 62, 234, 61
CLONE, EXIT, EXIT_GROUP, SIGSUSPEND, SIGTIMEDWAIT, SIGQUEUE, ALTSTACK, SIGPENDING = 56, 60, 231, 130, 128, 129, 131, 127
SETSID, SETPGID = 112, 109
THREAD = 0x3D0F00 & ~0x1300000
HANDLER, RESTORER = 0x401800, 0x401900
STACK = SCRATCH + 0x3F00
RESTORER_FLAG, SIGINFO, ONSTACK, RESTART, NODEFER, RESETHAND = (
    0x04000000,
    4,
    0x08000000,
    0x10000000,
    0x40000000,
    0x80000000,
)
SLEEP = 500  # a call of the tests' own
sleep_restart = traps.ERESTARTSYS


if table.rows[SLEEP] is None:

    async def _sleeper(task) -> int:
        await park(task, "test", WaitQueue(), restart=sleep_restart)
        return 0

    table.calls[SLEEP] = lambda task, a: _sleeper(task)


@pytest.fixture
def world() -> KernelWorld:
    return KernelWorld()


@pytest.fixture
def child(world):
    init = world.init()
    task = world.kernel.tasks[world.call(init, FORK)]
    task.ctx.regs[RSP] = STACK
    return task


def act(world, task, signo, handler=HANDLER, flags=0, mask=0, restorer=True) -> None:
    flags |= RESTORER_FLAG if restorer else 0
    world.put(task, abi.SIGACTION.pack(handler, flags, RESTORER, mask))
    assert world.call(task, SIGACTION, signo, SCRATCH, 0, 8) == 0


def kill(world, task, signo, **fields) -> None:
    signals.send_process(task.process, SigInfo(signo, 0, pid=1, uid=0))
    world.run()


def frame(task) -> tuple:
    return abi.FRAME.unpack(task.mm.read(task.ctx.regs[RSP], abi.FRAME_SIZE))


def test_frame_layout_is_linuxs():
    assert abi.FRAME_SIZE == 440 and abi.UCONTEXT.size == 304
    # offsets from arch/x86 uapi: uc_mcontext.gregs at 40, fpstate at 224 in ucontext, uc_sigmask at 296
    packed = abi.UCONTEXT.pack(*range(5), *range(100, 118), 0x33, 0, 0, 0x2B, 7, 14, 9, 0xBAD, 0xF00, 0x51)
    assert struct.unpack_from("<Q", packed, 40)[0] == 100
    assert struct.unpack_from("<Q", packed, 40 + 16 * 8)[0] == 116  # rip
    assert struct.unpack_from("<Q", packed, 40 + 184)[0] == 0xF00
    assert struct.unpack_from("<Q", packed, 296)[0] == 0x51


def test_handler_runs_and_returns_to_equal_registers(world, child):
    act(world, child, 10, flags=SIGINFO, mask=1 << 11)
    ctx = child.ctx
    for index in range(16):
        ctx.regs[index] = 0x1111 * (index + 1)
    ctx.regs[RSP], ctx.regs[RFLAGS] = STACK, 0x246
    state = bytearray(range(256)) * 4
    state[464:576] = bytes(112)
    struct.pack_into("<Q", state, 512, 3)
    ctx.state = bytes(state[:832])
    before = bytes(ctx.regs)
    state_before = ctx.state
    kill(world, child, 10)
    assert ctx.regs[RIP] == HANDLER and ctx.regs[RDI] == 10 and ctx.regs[RAX] == 0
    sp = ctx.regs[RSP]
    assert sp % 16 == 8 and sp < STACK - 128 - 832
    assert ctx.regs[RDX] == sp + 8 and ctx.regs[RSI] == sp + 312
    words = frame(child)
    assert words[0] == RESTORER and words[1] == 7
    fpstate = words[32]
    assert fpstate % 64 == 0 and child.mm.read(fpstate, 464) == state_before[:464]
    assert struct.unpack("<IIQI", child.mm.read(fpstate + 464, 20)) == (abi.FP_XSTATE_MAGIC1, 836, 7, 832)
    assert child.mm.read_u32(fpstate + 832) == abi.FP_XSTATE_MAGIC2
    assert child.mm.read(ctx.regs[RSI], 20) == struct.pack("<iii4xi", 10, 0, 0, 1)
    assert child.blocked == 1 << 9 | 1 << 11 and ctx.state == bytes(832)
    ctx.regs[RSP] += 8  # the handler's ret
    assert world.call(child, SIGRETURN) is None
    assert bytes(ctx.regs) == before and ctx.state == state_before and child.blocked == 0


def test_sigreturn_sanitises(world, child):
    act(world, child, 10)
    kill(world, child, 10)
    sp = child.ctx.regs[RSP]
    flags_at, cs_at = sp + 8 + 40 + 17 * 8, sp + 8 + 40 + 18 * 8
    child.mm.write_u64(flags_at, (1 << 64) - 1)
    child.mm.write_u64(cs_at, 0xFFFFFFFFFFFFFFFF)
    child.ctx.regs[RFLAGS] = 0x202
    child.ctx.regs[RSP] += 8
    world.call(child, SIGRETURN)
    assert child.ctx.regs[RFLAGS] == 0x202 | abi.FIX_EFLAGS


def test_bad_sigreturn_frame_kills(world, child):
    child.ctx.regs[RSP] = 0x10
    world.call(child, SIGRETURN)
    assert child.process.exit_code == 11


@pytest.mark.parametrize(
    "restart, flags, handler, rax, wound",
    [
        (traps.ERESTARTSYS, 0, True, -errno.EINTR, False),
        (traps.ERESTARTSYS, RESTART, True, SLEEP, True),
        (traps.ERESTARTNOINTR, 0, True, SLEEP, True),
        (traps.ERESTARTNOHAND, RESTART, True, -errno.EINTR, False),
        (traps.ERESTART_RESTARTBLOCK, RESTART, True, -errno.EINTR, False),
        (traps.ERESTARTSYS, 0, False, SLEEP, True),
        (traps.ERESTARTNOHAND, 0, False, SLEEP, True),
        (traps.ERESTARTNOINTR, 0, False, SLEEP, True),
        (traps.ERESTART_RESTARTBLOCK, 0, False, 219, True),
        (errno.EINTR, RESTART, True, -errno.EINTR, False),
    ],
)
def test_restart_rules(world, child, monkeypatch, restart, flags, handler, rax, wound):
    monkeypatch.setitem(globals(), "sleep_restart", restart)
    act(world, child, 10, flags=flags)
    rip = child.ctx.regs[RIP]
    world.call(child, SLEEP)
    assert child.ctx.where == "parked"
    if handler:
        kill(world, child, 10)
        words = frame(child)
        regs_rax, regs_rip = words[6 + 13], words[6 + 16]
    else:
        kill(world, child, 19)
        assert child.ctx.where == "parked" and child.process.stopped == 19
        kill(world, child, 18)
        regs_rax, regs_rip = child.ctx.regs[RAX], child.ctx.regs[RIP]
    assert regs_rax == rax & (1 << 64) - 1
    assert regs_rip == rip + (0 if wound else 2)


def test_default_actions(world, child):
    for signo in (17, 18, 23, 28):
        kill(world, child, signo)
        assert child.ctx.where == "guest"
    kill(world, child, 15)
    assert child.dead and child.process.exit_code == 15 and child.process.zombie


@pytest.mark.parametrize("limit, status", [(0, 6), (1 << 20, 6 | 0x80)])
def test_core_bit(world, child, limit, status, monkeypatch):
    monkeypatch.setattr(Pace, "TURN", 1 << 62)  # however slow the machine: nobody lets timers run here
    child.process.rlimits[4] = (limit, limit)
    kill(world, child, 6)
    assert child.process.exit_code == status


def test_blocked_waits_and_ignored_vanishes(world, child):
    world.put(child, (1 << 9 | 1 << 8).to_bytes(8, "little"))
    assert world.call(child, SIGPROCMASK, 0, SCRATCH, SCRATCH + 8, 8) == 0
    assert child.blocked == 1 << 9  # SIGKILL can't be
    kill(world, child, 10)
    assert child.ctx.where == "guest"
    assert world.call(child, SIGPENDING, SCRATCH + 16, 8) == 0 and child.mm.read_u64(SCRATCH + 16) == 1 << 9
    act(world, child, 10, handler=1)
    assert child.process.pending.mask == 0
    act(world, child, 10)
    kill(world, child, 10)
    world.put(child, bytes(8))
    world.call(child, SIGPROCMASK, 2, SCRATCH, 0, 8)
    assert child.ctx.regs[RIP] == HANDLER and frame(child)[19] == 0  # RAX of the interrupted call


def test_standard_signals_coalesce_and_realtime_ones_queue(world, child):
    child.blocked = 1 << 9 | 1 << 39 | 1 << 34
    for _ in range(3):
        kill(world, child, 10)
    for signo, value in ((40, 1), (35, 2), (40, 3), (35, 4)):
        signals.send_process(child.process, SigInfo(signo, -1, pid=1, uid=0, value=value))
    seen = []
    while (info := signals.dequeue(child, ~0 & (1 << 64) - 1)) is not None:
        seen.append((info.signo, info.fields.get("value")))
    assert seen == [(10, None), (35, 2), (35, 4), (40, 1), (40, 3)]
    assert child.process.pending.mask == 0


def test_sigpending_limit(world, child):
    child.blocked = 1 << 39
    child.process.rlimits[11] = (2, 2)
    data = struct.pack("<iii4xiiQ", 40, 0, -1, 0, 0, 5).ljust(128, b"\0")
    world.put(child, data)
    results = [world.call(child, SIGQUEUE, child.tid, 40, SCRATCH) for _ in range(3)]
    assert results == [0, 0, -errno.EAGAIN]


def test_sigqueue_may_not_lie(world, child):
    world.put(child, struct.pack("<iii4xiiQ", 10, 0, 0, 0, 0, 5).ljust(128, b"\0"))
    assert world.call(child, SIGQUEUE, 1, 10, SCRATCH) == -errno.EPERM


def test_altstack(world, child):
    low = SCRATCH + 0x1000
    world.put(child, abi.STACK_T.pack(low, 0, 0x2000))
    assert world.call(child, ALTSTACK, SCRATCH, 0) == 0
    act(world, child, 10, flags=ONSTACK | NODEFER)
    kill(world, child, 10)
    first = child.ctx.regs[RSP]
    assert low < first < low + 0x2000
    assert frame(child)[3:6] == (low, 0, 0x2000)
    assert world.call(child, ALTSTACK, 0, SCRATCH) == 0
    assert abi.STACK_T.unpack(child.mm.read(SCRATCH, 24)) == (low, 1, 0x2000)
    world.put(child, abi.STACK_T.pack(low, 0, 0x3000))
    assert world.call(child, ALTSTACK, SCRATCH, 0) == -errno.EPERM
    kill(world, child, 10)  # nested: goes on below
    assert low < child.ctx.regs[RSP] < first - 128
    for _ in range(10):
        if child.dead:
            break
        kill(world, child, 10)
    assert child.process.exit_code == 11  # the alternate stack overflowed


def test_autodisarm(world, child):
    low = SCRATCH + 0x1000
    world.put(child, abi.STACK_T.pack(low, 1 << 31, 0x2000))
    assert world.call(child, ALTSTACK, SCRATCH, 0) == 0
    act(world, child, 10, flags=ONSTACK)
    kill(world, child, 10)
    assert child.altstack == (0, 2, 0)
    child.ctx.regs[RSP] += 8
    world.call(child, SIGRETURN)
    assert child.altstack == (low, 1 << 31, 0x2000)


def test_too_small_altstack(world, child):
    world.put(child, abi.STACK_T.pack(SCRATCH, 0, 100))
    assert world.call(child, ALTSTACK, SCRATCH, 0) == -errno.ENOMEM
    world.put(child, abi.STACK_T.pack(SCRATCH, 7, 4096))
    assert world.call(child, ALTSTACK, SCRATCH, 0) == -errno.EINVAL


def test_resethand_and_nodefer(world, child):
    act(world, child, 10, flags=RESETHAND | NODEFER)
    kill(world, child, 10)
    assert child.blocked == 0 and child.sighand.actions[10].handler == 0
    kill(world, child, 10)
    assert child.process.exit_code == 10


def test_bad_stack_and_missing_restorer_kill(world, child):
    act(world, child, 10)
    child.ctx.regs[RSP] = 0x10000
    kill(world, child, 10)
    assert child.process.exit_code == 11


def test_no_restorer(world, child):
    act(world, child, 10, restorer=False)
    kill(world, child, 10)
    assert child.process.exit_code == 11


@pytest.mark.parametrize(
    "vector, signo, code, addr",
    [(0, 8, 1, "rip"), (3, 5, 0x80, 0), (6, 4, 2, "rip"), (13, 11, 0x80, 0), (17, 7, 1, 0)],
)
def test_exceptions(world, child, vector, signo, code, addr):
    act(world, child, signo, flags=SIGINFO)
    rip = child.ctx.regs[RIP]
    world.trap(child, EV_EXCEPTION, vector, 0)
    assert child.ctx.regs[RDI] == signo
    assert struct.unpack("<iii4xQ", child.mm.read(child.ctx.regs[RSI], 24)) == (signo, 0, code, rip if addr else 0)
    assert frame(child)[29] == vector  # trapno


def test_fault_tells_where(world, child):
    act(world, child, 11, flags=SIGINFO)
    world.trap(child, EV_FAULT, 0x1234, 6)
    assert struct.unpack("<iii4xQ", child.mm.read(child.ctx.regs[RSI], 24)) == (11, 0, 1, 0x1234)
    words = frame(child)
    assert (words[28], words[29], words[31]) == (6, 14, 0x1234)


def test_blocked_fault_kills(world, child):
    act(world, child, 11)
    child.blocked = 1 << 10
    world.trap(child, EV_FAULT, 0x1234, 6)
    assert child.process.exit_code == 11


def test_init_is_not_killed_from_inside(world, child):
    init = world.kernel.init.leader
    for signo in (9, 15, 19):
        assert world.call(child, KILL, 1, signo) == 0
        assert init.ctx.where == "guest" and not init.process.stopped
    world.trap(init, EV_FAULT, 0x10, 6)
    assert world.kernel.exit_status == 11


def test_init_dies_by_the_launchers_sigkill(world, child):
    init = world.kernel.init
    signals.send_process(init, SigInfo(15, 0, pid=0, uid=0), force=True)
    world.run()
    assert not init.zombie
    signals.send_process(init, SigInfo(9, 0, pid=0, uid=0), force=True)
    assert world.kernel.run() == 9


def test_sigsuspend_restores_the_mask(world, child):
    act(world, child, 10)
    child.blocked = 1 << 9
    world.put(child, bytes(8))
    assert world.call(child, SIGSUSPEND, SCRATCH, 8) is None
    assert child.blocked == 0
    kill(world, child, 10)
    words = frame(child)
    assert words[33] == 1 << 9 and words[19] == -errno.EINTR & (1 << 64) - 1
    child.ctx.regs[RSP] += 8
    world.call(child, SIGRETURN)
    assert child.blocked == 1 << 9


def test_sigtimedwait(world, child):
    child.blocked = 1 << 9
    world.put(child, (1 << 9).to_bytes(8, "little") + struct.pack("<qq", 0, 0))
    assert world.call(child, SIGTIMEDWAIT, SCRATCH, 0, SCRATCH + 8, 8) == -errno.EAGAIN
    assert world.call(child, SIGTIMEDWAIT, SCRATCH, SCRATCH + 64, 0, 8) is None
    kill(world, child, 10)
    assert child.ctx.log[-1] == 10 and child.mm.read_u32(SCRATCH + 64) == 10
    kill(world, child, 10)
    assert world.call(child, SIGTIMEDWAIT, SCRATCH, 0, 0, 8) == 10
    act(world, child, 12)
    world.put(child, (1 << 9).to_bytes(8, "little"))
    assert world.call(child, SIGTIMEDWAIT, SCRATCH, 0, 0, 8) is None
    kill(world, child, 12)
    assert frame(child)[19] == -errno.EINTR & (1 << 64) - 1


def test_stop_and_continue_are_reported(world, child):
    init = world.kernel.init.leader
    pid = child.tid
    kill(world, child, 19)
    assert child.ctx.where == "parked"
    assert world.call(init, WAIT4, -1, SCRATCH, 1, 0) == 0
    assert world.call(init, WAIT4, -1, SCRATCH, 2, 0) == pid and init.mm.read_u32(SCRATCH) == 0x137F
    assert world.call(init, WAIT4, -1, SCRATCH, 3, 0) == 0
    kill(world, child, 18)
    assert child.ctx.where == "guest"
    assert world.call(init, WAIT4, -1, SCRATCH, 8, 0) == pid and init.mm.read_u32(SCRATCH) == 0xFFFF
    kill(world, child, 19)
    kill(world, child, 9)
    assert world.call(init, WAIT4, pid, SCRATCH, 0, 0) == pid and init.mm.read_u32(SCRATCH) == 9


def test_all_threads_stop(world, child):
    thread = world.kernel.tasks[world.call(child, CLONE, THREAD, 0x700000, 0, 0, 0)]
    assert world.call(thread, SLEEP) is None
    kill(world, child, 19)
    assert child.ctx.where == thread.ctx.where == "parked"
    assert child.process.stop_report == 0x137F
    kill(world, child, 18)
    assert child.ctx.where == "guest" and thread.ctx.where == "guest"


def test_stop_and_continue_clear_each_other(world, child):
    child.blocked = 1 << 19 | 1 << 17
    kill(world, child, 20)
    assert child.process.pending.mask == 1 << 19
    kill(world, child, 18)
    assert child.process.pending.mask == 1 << 17
    kill(world, child, 20)
    assert child.process.pending.mask == 1 << 19


def test_orphaned_group_does_not_stop_at_tstp(world, child):
    kill(world, child, 20)  # its parent is init in the same group: nobody could continue it
    assert not child.process.stopped


def test_newly_orphaned_stopped_group_is_hung_up(world, child):
    world.call(child, SETSID)
    grandchild = world.kernel.tasks[world.call(child, FORK)]
    world.call(child, SETPGID, grandchild.tid, grandchild.tid)
    kill(world, grandchild, 20)
    assert grandchild.process.stopped == 20
    world.call(child, EXIT_GROUP, 0)
    world.run()
    assert grandchild.process.exit_code == 1


def test_process_signal_goes_to_a_thread_that_wants_it(world, child):
    thread = world.kernel.tasks[world.call(child, CLONE, THREAD, STACK - 0x2000, 0, 0, 0)]
    act(world, child, 10)
    child.blocked = 1 << 9
    kill(world, child, 10)
    assert thread.ctx.regs[RIP] == HANDLER and child.ctx.regs[RIP] != HANDLER
    assert world.call(child, TGKILL, child.tid, child.tid, 10) == 0
    assert child.pending.mask == 1 << 9


def test_kill_targets(world, child):
    init = world.kernel.init.leader
    other = world.kernel.tasks[world.call(init, FORK)]
    assert world.call(other, SETPGID, 0, 0) == 0
    assert world.call(init, KILL, -other.tid, 0) == 0
    assert world.call(init, KILL, 4242, 0) == -errno.ESRCH
    assert world.call(init, KILL, -4242, 0) == -errno.ESRCH
    assert world.call(init, KILL, 1, 65) == -errno.EINVAL
    child.creds = child.creds.replace(uid=7, euid=7, suid=7, effective=0)
    assert world.call(child, KILL, other.tid, 15) == -errno.EPERM
    assert world.call(init, KILL, -1, 15) == 0
    assert child.process.zombie and other.process.zombie and not init.process.zombie
