"""Tracing through the real loop with fake processors: what the processor is told, and that nobody is left behind."""

from __future__ import annotations

import errno

import pytest
from kernel_fakes import SCRATCH, KernelWorld

from kvmsentry.vcpu.layout import EV_EXCEPTION, EV_KICKED, RAX, RFLAGS, RIP

GETPID, FORK, EXIT, WAIT4, KILL, PTRACE, EXIT_GROUP, GETPPID, CLONE = 39, 57, 60, 61, 62, 101, 231, 110, 56
TRACEME, CONT, SINGLESTEP, GETREGS, SETREGS, ATTACH, DETACH, SYSCALL, SYSEMU = 0, 7, 9, 12, 13, 16, 17, 24, 31
SETOPTIONS, SEIZE, INTERRUPT = 0x4200, 0x4206, 0x4207
O_TRACEFORK, O_TRACEEXIT, O_EXITKILL = 2, 64, 1 << 20
SIGSTOP, SIGKILL, SIGTERM, TF, WNOHANG = 19, 9, 15, 0x100, 1
STOPPED = SIGSTOP << 8 | 0x7F
TRAPPED = 5 << 8 | 0x7F


@pytest.fixture
def world() -> KernelWorld:
    return KernelWorld()


def fork(world, task):
    return world.kernel.tasks[world.call(task, FORK)]


def waited(world, task, pid=-1):
    """(pid, status) of what is there to be waited for."""
    found = world.call(task, WAIT4, pid, SCRATCH, WNOHANG, 0)
    return found, task.mm.read_u32(SCRATCH)


def seized(world, tracer, options=0):
    """A child of `tracer`, seized, in its first stop."""
    child = fork(world, tracer)
    assert world.call(tracer, PTRACE, SEIZE, child.tid, 0, options) == 0
    assert world.call(tracer, PTRACE, INTERRUPT, child.tid, 0, 0) == 0
    assert waited(world, tracer) == (child.tid, 128 << 16 | TRAPPED)
    return child


def test_traceme_and_stop(world):
    init = world.init()
    child = fork(world, init)
    assert world.call(init, PTRACE, CONT, child.tid, 0, 0) == -errno.ESRCH
    assert world.call(child, PTRACE, TRACEME, 0, 0, 0) == 0
    assert world.call(child, PTRACE, TRACEME, 0, 0, 0) == -errno.EPERM
    assert child.slow and not init.slow
    world.call(child, KILL, child.tid, SIGTERM)
    assert child.ctx.where == "parked"
    assert waited(world, init) == (child.tid, SIGTERM << 8 | 0x7F)
    assert waited(world, init)[0] == 0
    assert world.call(init, PTRACE, CONT, child.tid, 0, 0) == 0
    assert child.ctx.where == "guest" and child.ctx.log[-1] == "reload"
    assert child.ctx.regs[RAX] == 0  # of kill(2)
    assert world.call(child, GETPID) == child.tid  # not stopped at calls: an ordinary reply


def test_a_step_is_one_instruction_and_not_seen(world):
    init = world.init()
    child = seized(world, init)
    assert world.call(init, PTRACE, SINGLESTEP, child.tid, 0, 0) == 0
    assert child.ctx.where == "guest" and child.ctx.regs[RFLAGS] & TF
    world.trap(child, EV_KICKED)  # something else came first: the step is still owed
    assert child.ctx.where == "guest" and child.ctx.regs[RFLAGS] & TF
    world.trap(child, EV_EXCEPTION, 1, 0)
    assert waited(world, init) == (child.tid, TRAPPED)
    assert world.call(init, PTRACE, GETREGS, child.tid, 0, SCRATCH) == 0
    assert not init.mm.read_u64(SCRATCH + 18 * 8) & TF
    assert world.call(init, PTRACE, CONT, child.tid, 0, 0) == 0
    assert child.ctx.where == "guest" and not child.ctx.regs[RFLAGS] & TF


@pytest.mark.parametrize("code", [b"\x0f\x05", b"\x48\x0f\x05"])
def test_a_step_over_a_system_call(world, code):
    init = world.init()
    child = seized(world, init)
    child.mm.write_force(child.ctx.regs[RIP], code)
    assert world.call(init, PTRACE, SINGLESTEP, child.tid, 0, 0) == 0
    assert child.ctx.where == "guest" and not child.ctx.regs[RFLAGS] & TF
    world.call(child, GETPPID)
    assert child.ctx.where == "parked" and child.ctx.regs[RAX] == init.tid
    assert waited(world, init) == (child.tid, TRAPPED)
    assert child.ptrace.info.code == 1  # TRAP_BRKPT


def test_a_tracer_that_dies_in_the_middle_of_a_step(world):
    init = world.init()
    tracer = fork(world, init)
    child = seized(world, tracer)
    world.call(tracer, PTRACE, SINGLESTEP, child.tid, 0, 0)
    assert child.ctx.regs[RFLAGS] & TF
    world.call(tracer, EXIT_GROUP, 0)
    assert child.ptrace is None and not child.slow
    assert child.ctx.where == "guest" and not child.ctx.regs[RFLAGS] & TF
    assert world.call(child, GETPPID) == init.tid


def test_the_tracer_sees_a_zombie_first(world):
    init = world.init()
    child, tracer = fork(world, init), fork(world, init)
    assert world.call(tracer, PTRACE, SEIZE, child.tid, 0, 0) == 0
    world.call(child, EXIT, 3)
    assert world.call(init, WAIT4, child.tid, SCRATCH, WNOHANG, 0) == 0
    assert waited(world, tracer) == (child.tid, 0x300)
    assert world.call(tracer, WAIT4, -1, 0, 0, 0) == -errno.ECHILD
    assert waited(world, init, child.tid) == (child.tid, 0x300)


def test_children_are_born_stopped(world):
    init = world.init()
    child = seized(world, init, O_TRACEFORK)
    world.call(init, PTRACE, CONT, child.tid, 0, 0)
    world.call(child, FORK)
    (grandchild,) = world.children(child)
    assert {waited(world, init), waited(world, init)} == {
        (child.tid, 1 << 16 | TRAPPED), (grandchild.tid, 128 << 16 | TRAPPED)
    }  # fmt: skip
    assert grandchild.ctx.where == "parked" and child.ctx.where == "parked"
    world.call(init, PTRACE, DETACH, grandchild.tid, 0, 0)
    world.call(init, PTRACE, CONT, child.tid, 0, 0)
    assert grandchild.ctx.regs[RAX] == 0 and child.ctx.regs[RAX] == grandchild.tid
    assert grandchild.ctx.where == child.ctx.where == "guest"


def test_tracers_of_each_other_do_not_outlive_init(world):
    init = world.init()
    one, other = fork(world, init), fork(world, init)
    assert world.call(one, PTRACE, SEIZE, other.tid, 0, O_TRACEEXIT) == 0
    assert world.call(other, PTRACE, SEIZE, one.tid, 0, O_TRACEEXIT) == 0
    world.post(init, EXIT_GROUP, 0)
    assert world.kernel.run() == 0
    assert not world.platform.contexts and not world.kernel.tasks


def test_a_kill_ends_every_stop(world):
    init = world.init()
    child = seized(world, init, O_TRACEEXIT)
    world.call(init, KILL, child.tid, SIGKILL)
    assert waited(world, init) == (child.tid, 6 << 16 | TRAPPED)
    world.call(init, KILL, child.tid, SIGKILL)  # also the one on the way out
    assert waited(world, init) == (child.tid, SIGKILL)
    assert world.kernel.tasks.keys() == {1}


def test_exitkill(world):
    init = world.init()
    tracer = fork(world, init)
    child = seized(world, tracer, O_EXITKILL)
    world.call(tracer, EXIT_GROUP, 0)
    assert {waited(world, init), waited(world, init)} == {(tracer.tid, 0), (child.tid, SIGKILL)}
