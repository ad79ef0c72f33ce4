"""System calls, registers, faults, exceptions, kicks and address spaces of the ptrace platform: real instructions."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kvmsentry.ptrace._ptrace import ffi
from ptrace_bench import CODE, DATA, EXEC, READ, STACK, WRITE, Bench

from kvmsentry.errors import Errno, HostError
from kvmsentry.ptrace.tracer import Tracer, lib
from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import (
    EV_EXCEPTION,
    EV_FAULT,
    EV_HOST_ERROR,
    EV_KICKED,
    EV_SYSCALL,
    FS_BASE,
    GS_BASE,
    R11,
    RAX,
    RBX,
    RCX,
    RFLAGS,
    RIP,
    RSP,
)

NAMES = ("rbx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r12", "r13", "r14", "r15")


# Calls and registers.


def test_three_calls(bench: Bench) -> None:
    ctx = bench.run("p_hello")
    assert (ctx.event, ctx.nr, ctx.args) == (EV_SYSCALL, 1001, (1, 2, 3, 4, 5, 6))
    ctx.reply(111)
    assert bench.wait() is ctx
    assert (ctx.event, ctx.nr, ctx.args) == (EV_SYSCALL, 1002, (1, 2, 3, 4, 5, 6))
    ctx.reply(-14)
    assert bench.wait() is ctx
    assert (ctx.nr, ctx.args[0], ctx.args[1]) == (1003, 111, 2**64 - 14)
    ctx.release()


def test_a_call_shows_and_keeps_every_register(bench: Bench) -> None:
    values = {name: 0x1111_2222_3333_0000 + i for i, name in enumerate(NAMES)}
    ctx = bench.run("p_syscall", rax=1001, **values)
    for name, value in values.items():
        assert ctx.regs[getattr(layout, name.upper())] == value, name
    done = bench.address("p_syscall_done")
    assert ctx.regs[RAX] == 1001 and ctx.regs[RIP] == done and ctx.regs[RSP] == STACK + 0x3000
    assert ctx.regs[RCX] == done and ctx.regs[R11] == ctx.regs[RFLAGS]
    ctx.reply(0x55)
    assert bench.wait() is ctx  # the ud2 behind
    assert (ctx.event, ctx.vector) == (EV_EXCEPTION, 6)
    assert ctx.regs[RIP] == done and ctx.regs[RAX] == 0x55 and ctx.regs[RSP] == STACK + 0x3000
    for name, value in values.items():
        assert ctx.regs[getattr(layout, name.upper())] == value, name
    ctx.release()


@pytest.mark.parametrize("place", ["syscall", "exception"])
def test_reload_sets_every_register(bench: Bench, place: str) -> None:
    ctx = bench.run("p_syscall" if place == "syscall" else "p_ud2", rax=1001)
    values = [0x7000_0000_0000 + 0x1111 * i for i in range(20)]
    values[RIP], values[RFLAGS], values[GS_BASE] = bench.address("p_ud2"), 0x246 | 0x400, 0
    for i, value in enumerate(values):
        ctx.regs[i] = value
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.vector) == (EV_EXCEPTION, 6)
    # RF (bit 16) is set in the flags that a fault pushes.
    assert [v & ~0x10000 if i == RFLAGS else v for i, v in enumerate(ctx.regs)] == values
    ctx.release()


@pytest.mark.parametrize("result", [-1, -4, -511, -512, -513, -514, -516, -517, -4095, 1 << 40])
def test_results_that_the_host_could_take_for_restarts(bench: Bench, result: int) -> None:
    """The host restarts calls of its own that return -512 .. -516 when a signal or an interrupt follows."""
    ctx = bench.run("p_hello")
    ctx.reply(result)
    ctx.kick()
    events = []
    while True:
        assert bench.wait() is ctx
        events.append((ctx.event, ctx.nr))
        if ctx.event == EV_SYSCALL:
            break
        assert ctx.event == EV_KICKED
        ctx.reload()
    assert ctx.nr == 1002 and ctx.regs[RBX] == result & 2**64 - 1, events
    ctx.release()


def test_kernel_restarts_a_call(bench: Bench) -> None:
    """What the Sentry does for ERESTARTSYS: RIP back by two, RAX the number again."""
    ctx = bench.run("p_loop", rbx=1)
    for _ in range(3):
        ctx.regs[RIP] -= 2
        ctx.regs[RAX] = 39
        ctx.reload()
        assert bench.wait() is ctx and ctx.nr == 39
    ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003
    ctx.release()


@pytest.mark.parametrize("flags", [0x202, 0x202 | 0x001, 0x202 | 0x400, 0x202 | 0x8D5, 0x202 | 0xCD5, 0x40202])
def test_flags_survive_a_call(bench: Bench, flags: int) -> None:
    ctx = bench.run("p_flags", rbx=flags)
    assert ctx.regs[RFLAGS] == flags
    ctx.reply(0)
    assert bench.wait() is ctx
    assert ctx.args[0] == flags
    ctx.release()


def test_fs_and_gs_bases(bench: Bench) -> None:
    bench.memory.words[bench.data >> 3] = 0xABCD
    bench.memory.words[(bench.data >> 3) + 1] = 0x600D
    bench.memory.words[(bench.data >> 3) + 8] = 0xEF01
    ctx = bench.run("p_fs", fs_base=DATA)
    assert ctx.regs[FS_BASE] == DATA
    ctx.regs[FS_BASE] = DATA + 64  # arch_prctl
    ctx.regs[RAX] = 0
    ctx.reload()
    assert bench.wait() is ctx and ctx.args[:2] == (0xABCD, 0xEF01)
    ctx.release()
    ctx = bench.run("p_gs", rdi=DATA)
    assert (ctx.nr, ctx.args[1], ctx.regs[GS_BASE]) == (1001, 7, DATA)
    ctx.reply(77)
    assert bench.wait() is ctx and (ctx.nr, ctx.args[:3]) == (1003, (77, 0x600D, DATA))
    ctx.release()


def test_exact_count_of_calls(bench: Bench) -> None:
    ctx = bench.context("p_loop", rbx=5000)
    ctx.reload()
    count = 0
    while bench.wait().nr == 39:
        count += 1
        ctx.reply(count)
    assert count == 5000
    ctx.release()


def test_avx_survives_calls_and_the_executor(bench: Bench) -> None:
    pattern = os.urandom(512)
    bench.memory.view[bench.data : bench.data + 512] = pattern
    ctx = bench.run("p_avx")
    state = ctx.xsave()
    assert len(state) == bench.tracer.xsave_size and state[160:176] == pattern[:16]
    bench.mmu.map(0x900000, bench.frames.alloc(1), 4096, READ)  # the list is executed by this thread
    ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003
    stored = bytes(bench.memory.view[bench.data + 1024 : bench.data + 1024 + 512])
    assert stored[:64] == pattern[:64] and stored[480:512] == pattern[480:512]
    # A fork's child begins with the parent's state, another thread with the initial one.
    child = bench.context("p_seen")
    child.set_xsave(state)
    child.reload()
    assert bench.wait() is child
    assert bytes(bench.memory.view[bench.data : bench.data + 16]) == pattern[:16]
    fresh = bench.context("p_seen")
    fresh.reload()
    assert bench.wait() is fresh
    seen = bytes(bench.memory.view[bench.data : bench.data + 48])
    assert seen[:16] == bytes(16) and seen[32:48] == bytes(16)
    assert int.from_bytes(seen[16:20], "little") == 0x1F80 and int.from_bytes(seen[20:22], "little") == 0x37F
    for each in (ctx, child, fresh):
        each.release()


def test_forged_processor_state_is_masked(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=3)
    for junk in (b"\xff" * bench.tracer.xsave_size, b"\xff" * 512, b"\xff" * 700, os.urandom(bench.tracer.xsave_size)):
        ctx.set_xsave(junk)
        ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 3
        ctx.reload()
        assert bench.wait() is ctx and (ctx.event, ctx.nr) == (EV_SYSCALL, 39)
    ctx.release()


# Faults and exceptions.


def test_load_from_nowhere_then_resumed(bench: Bench) -> None:
    ctx = bench.run("p_load", rdi=0x900010, rbx=5)
    assert (ctx.event, ctx.fault_address, ctx.error_code) == (EV_FAULT, 0x900010, 4)
    assert ctx.regs[RIP] == bench.address("p_load") and ctx.regs[RBX] == 5
    gpa = bench.frames.alloc(1)
    bench.memory.words[(gpa + 0x10) >> 3] = 99
    bench.mmu.map(0x900000, gpa, 4096, READ)
    ctx.reload()
    assert bench.wait() is ctx and (ctx.nr, ctx.args[0], ctx.regs[RBX]) == (1003, 99, 5)
    ctx.release()


def test_store_to_nowhere_and_to_read_only(bench: Bench) -> None:
    ctx = bench.run("p_store", rdi=0x900008, rsi=33)
    assert (ctx.event, ctx.fault_address, ctx.error_code) == (EV_FAULT, 0x900008, 6)
    gpa = bench.frames.alloc(1)
    bench.mmu.map(0x900000, gpa, 4096, READ)
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.error_code) == (EV_FAULT, 0x900008, 7)
    bench.mmu.map(0x900000, gpa, 4096, READ | WRITE)
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 1003
    assert bench.memory.words[(gpa + 8) >> 3] == 33
    ctx.release()


def test_fetch_from_a_data_page(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.regs[RIP] = DATA
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.error_code & 0x15) == (EV_FAULT, DATA, 0x15)
    ctx.release()


@pytest.mark.parametrize("address", [0xFFFF800000000000, 0xFFFFFFFF80002000, 0xFFFFFFFFFF600000])
def test_kernel_half_is_closed(bench: Bench, address: int) -> None:
    ctx = bench.run("p_load", rdi=address)
    assert (ctx.event, ctx.fault_address) == (EV_FAULT, address) and ctx.error_code & 4
    ctx.release()


def test_vsyscall_page_does_not_answer(bench: Bench) -> None:
    """The host's page cannot be unmapped; a call into it is a fault at its address, with nothing done."""
    stack = STACK + 0x2FF0
    gpa = bench.mmu.entry(STACK + 0x2000) & 0x000F_FFFF_FFFF_F000
    bench.memory.words[(gpa + 0xFF0) >> 3] = bench.address("p_ud2")
    ctx = bench.context("p_spin")
    ctx.regs[RIP], ctx.regs[RSP] = 0xFFFFFFFFFF600000, stack
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.regs[RIP]) == (EV_FAULT, 0xFFFFFFFFFF600000, 0xFFFFFFFFFF600000)
    assert ctx.regs[RSP] == stack
    ctx.release()


@pytest.mark.parametrize(
    ("program", "vector", "behind"), [("p_int3", 3, 1), ("p_ud2", 6, 0), ("p_div0", 0, 9), ("p_gp", 13, 0)]
)
def test_exceptions(bench: Bench, program: str, vector: int, behind: int) -> None:
    ctx = bench.run(program, rsi=8)
    assert (ctx.event, ctx.vector, ctx.error_code) == (EV_EXCEPTION, vector, 0)
    assert ctx.regs[RIP] == bench.address(program) + behind
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


def plant(bench: Bench, code: bytes) -> int:
    """Code of the test's own, behind the programs; its address."""
    at = 3 * 4096
    bench.memory.view[bench.code_gpa + at : bench.code_gpa + at + len(code)] = code
    return CODE + at


def test_int80_is_no_gate(bench: Bench) -> None:
    ctx = bench.context("p_spin", rax=20, rcx=0x1234, rbx=9)
    ctx.regs[RIP] = plant(bench, b"\xcd\x80\x0f\x0b")
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.vector) == (EV_EXCEPTION, 13)
    assert ctx.regs[RIP] == CODE + 3 * 4096 and ctx.regs[RAX] == 20 and ctx.regs[RCX] == 0x1234
    ctx.release()


def test_compatibility_mode_is_refused(bench: Bench) -> None:
    """A far return to the host's 32-bit code segment: nothing runs there that we would answer."""
    # push 0x23; push rbx; lretq
    ctx = bench.context("p_spin", rbx=CODE + 3 * 4096 + 16)
    ctx.regs[RIP] = plant(bench, b"\x6a\x23\x53\x48\xcb".ljust(16, b"\x90") + b"\xb8\x14\0\0\0\xcd\x80\x0f\x0b")
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.vector) == (EV_EXCEPTION, 13)
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


def test_single_step(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.regs[RFLAGS] = 0x302
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.vector) == (EV_EXCEPTION, 1)
    ctx.release()


def test_wild_return_address(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=1)
    ctx.regs[RIP] = 0x900000
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.regs[RIP]) == (EV_FAULT, 0x900000, 0x900000)
    ctx.regs[RIP] = 1 << 62
    ctx.reload()
    assert bench.wait() is ctx and ctx.event in (EV_FAULT, EV_EXCEPTION)
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


# Kicks, waiting.


def test_kick_of_a_computing_guest(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    last = moved = 0
    while moved < 5:
        assert bench.tracer.wait(2_000_000) is None
        ctx.kick()
        assert bench.wait() is ctx and ctx.event == EV_KICKED
        moved += ctx.regs[RBX] > last
        last = ctx.regs[RBX]
        ctx.reload()
    ctx.kick()
    assert bench.wait() is ctx
    ctx.release()


def test_kicks_amid_calls_lose_none(bench: Bench) -> None:
    ctx = bench.context("p_loop", rbx=2000)
    ctx.reload()
    ctx.kick()
    calls = kicks = 0
    while True:
        assert bench.wait() is ctx
        if ctx.event == EV_KICKED:
            kicks += 1
            ctx.reload()
        elif ctx.nr == 39:
            calls += 1
            ctx.reply(0)
            ctx.kick()
        else:
            break
    assert calls == 2000 and kicks <= 2001
    ctx.release()


def test_a_kick_of_a_stopped_context_is_nothing(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=2)
    ctx.kick()
    ctx.park()
    assert bench.tracer.wait(5_000_000) is None
    ctx.reply(0)
    assert bench.wait() is ctx and ctx.event == EV_SYSCALL
    ctx.release()


def test_signals_from_the_host_do_not_reach_the_application(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    pid = bench.mmu.stub.pid
    for signo in (signal.SIGUSR1, signal.SIGTERM, signal.SIGSEGV, signal.SIGTRAP, signal.SIGSTOP, signal.SIGCONT):
        os.kill(pid, signo)
        assert bench.tracer.wait(5_000_000) is None
    ctx.kick()
    assert bench.wait() is ctx and ctx.event == EV_KICKED
    ctx.release()


def test_a_stub_killed_by_the_host_is_a_host_error(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    os.kill(bench.mmu.stub.pid, signal.SIGKILL)
    assert bench.wait() is ctx and (ctx.event, ctx.error_code) == (EV_HOST_ERROR, errno.ESRCH)
    ctx.release()
    mmu, _ = bench.space()
    ctx = bench.context("p_loop", mmu, rbx=1)
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    os.kill(mmu.stub.pid, signal.SIGKILL)  # while it is stopped: the answer finds nobody
    ctx.reply(0)
    assert bench.wait() is ctx and (ctx.event, ctx.error_code) == (EV_HOST_ERROR, errno.ESRCH)
    with pytest.raises(Errno):
        bench.tracer.new_context(mmu)
    ctx.release()
    mmu.destroy()
    mmu, _ = bench.space()
    ctx = bench.context("p_loop", mmu, rbx=1)  # not with what is left of the dead one
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


def test_wake_from_another_thread(bench: Bench) -> None:
    timer = threading.Timer(0.05, bench.tracer.wake)
    timer.start()
    assert bench.tracer.wait(-1) is None
    timer.join()


def test_timeouts(bench: Bench) -> None:
    assert bench.tracer.wait(0) is None
    assert bench.tracer.wait(3_000_000) is None


def test_host_descriptors_are_served_while_the_guest_never_rests(bench: Bench) -> None:
    r, w = os.pipe()
    seen: list[int] = []

    def readable(events: int) -> None:
        os.read(r, 1)
        seen.append(events)

    bench.tracer.watch(r, select.EPOLLIN, readable)
    os.write(w, b"x")
    ctx = bench.context("p_loop", rbx=1 << 40)
    ctx.reload()
    for _ in range(2000):
        got = bench.tracer.wait(1_000_000_000)
        if got is None:
            break
        got.reply(0)
    assert seen == [select.EPOLLIN]
    bench.tracer.unwatch(r)
    os.close(r)
    os.close(w)
    ctx.kick()
    bench.wait().release()


# Threads and address spaces.


def test_many_contexts_at_once(bench: Bench) -> None:
    for i in range(70):
        ctx = bench.context("p_loop", rbx=5, rbp=i)
        ctx.owner = i
        ctx.reload()
    counts = dict.fromkeys(range(70), 0)
    ended = 0
    while ended < 70:
        ctx = bench.wait()
        if ctx.nr == 39:
            assert ctx.regs[layout.RBP] == ctx.owner
            counts[ctx.owner] += 1
            ctx.reply(0)
        else:
            ended += 1
            ctx.release()
    assert set(counts.values()) == {5}
    assert not bench.mmu.contexts and len(bench.mmu.stub.free) == len(bench.mmu.stub.threads)


def test_a_thread_is_made_while_all_others_compute(bench: Bench) -> None:
    first = bench.context("p_spin")
    first.reload()
    second = bench.context("p_loop", rbx=1)  # stops the first for the clone, and lets it go on
    second.reload()
    assert bench.wait() is second and second.nr == 39
    first.kick()
    assert bench.wait() is first and first.event == EV_KICKED and first.regs[RBX] > 0
    first.release()
    second.release()


def test_address_spaces_are_apart(bench: Bench) -> None:
    other, data = bench.space()
    bench.memory.words[bench.data >> 3], bench.memory.words[data >> 3] = 1, 2
    a, b = bench.context("p_load", rdi=DATA), bench.context("p_load", other, rdi=DATA)
    a.reload()
    b.reload()
    got = {ctx: ctx.args[0] for ctx in (bench.wait(), bench.wait())}
    assert got == {a: 1, b: 2}
    a.release()
    b.release()


def test_switch_is_exec_and_the_old_stub_serves_again(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=1)
    pid = bench.mmu.stub.pid
    mmu, data = bench.space()
    bench.memory.words[data >> 3] = 4711
    ctx.switch(mmu)
    for i in range(20):
        ctx.regs[i] = 0
    ctx.regs[layout.RDI], ctx.regs[RIP] = DATA, bench.address("p_load")
    ctx.reload()
    bench.mmu.map(0xA00000, bench.frames.alloc(1), 4096, READ)
    bench.mmu.destroy()
    assert bench.wait() is ctx and (ctx.nr, ctx.args[0]) == (1003, 4711)
    third, _ = bench.space()
    again = bench.context("p_load", third, rdi=0xA00000)
    assert third.stub.pid == pid, "the pool gave another stub: nothing is shown by this test"
    again.reload()
    assert bench.wait() is again and (again.event, again.fault_address) == (EV_FAULT, 0xA00000)
    again.release()
    ctx.release()


@pytest.mark.parametrize("change", ["unmap", "protect", "replace"])
def test_flush_holds_for_a_thread_that_runs(bench: Bench, change: str) -> None:
    """A computing thread stores to a page that is taken away: after flush() not one store arrives there."""
    page = bench.frames.alloc(1)
    bench.mmu.map(0x900000, page, 4096, READ | WRITE)
    ctx = bench.context("p_stores", rdi=0x900000)
    ctx.reload()
    while not bench.memory.words[page >> 3]:
        assert bench.tracer.wait(1_000_000) is None
    if change == "unmap":
        bench.mmu.unmap(0x900000, 4096)
    elif change == "protect":
        bench.mmu.protect(0x900000, 4096, READ)
    else:
        other = bench.frames.alloc(1)
        bench.mmu.map(0x900000, other, 4096, READ | WRITE)
    bench.mmu.flush()
    seen = bench.memory.words[page >> 3]
    if change == "replace":
        while not bench.memory.words[other >> 3]:
            assert bench.tracer.wait(1_000_000) is None
        ctx.kick()
        assert bench.wait() is ctx and ctx.event == EV_KICKED
    else:
        assert bench.wait() is ctx and ctx.event == EV_FAULT and ctx.fault_address == 0x900000
        assert ctx.error_code == (7 if change == "protect" else 6)
    assert bench.memory.words[page >> 3] == seen
    ctx.release()


def test_more_mappings_than_the_host_allows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses the next mapping: all go, and come back as they are used."""
    frame = bench.frames.alloc(1)
    bench.memory.words[frame >> 3] = 77
    bench.mmu.map(0x900000, frame, 4096, READ | WRITE)
    ctx = bench.run("p_loop", rbx=1)
    bench.mmu.map(0xA00000, bench.frames.alloc(1), 4096, READ)
    real = bench.tracer._execute
    calls = []

    def short_of_room(thread: object, ops: list[int], lent: list[int]) -> int:
        calls.append(ops[0])
        return -errno.ENOMEM if len(calls) == 1 else real(thread, ops, lent)

    monkeypatch.setattr(bench.tracer, "_execute", short_of_room)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0x900000
    ctx.reload()
    assert bench.wait() is ctx and (ctx.nr, ctx.args[0]) == (1003, 77)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0xB00000
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.fault_address) == (EV_FAULT, 0xB00000)
    ctx.release()


# Files.


def test_file_windows_are_the_file(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    gpa = bench.memory.map_file(fd, 0, 8192, True)
    bench.mmu.map(0x900000, gpa, 8192, READ | WRITE)
    ctx = bench.run("p_store", rdi=0x901000, rsi=0x1122334455667788)
    assert ctx.nr == 1003
    assert path.read_bytes()[4096:4104] == bytes.fromhex("8877665544332211")
    os.pwrite(fd, (5150).to_bytes(8, "little"), 8)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0x900008
    ctx.reload()
    assert bench.wait() is ctx and ctx.args[0] == 5150
    os.ftruncate(fd, 0)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0x901000
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.vector) == (EV_EXCEPTION, 12)  # SIGBUS
    bench.mmu.unmap(0x900000, 8192)
    bench.mmu.flush()
    bench.memory.unmap_file(gpa, 8192)
    ctx.release()
    os.close(fd)


def test_code_of_a_file(bench: Bench, tmp_path: Path) -> None:
    """Code is executed from the file, and from a copy where the file's mount says noexec."""
    path = tmp_path / "code"
    path.write_bytes(bench.code.ljust(16384, b"\0"))
    fd = os.open(path, os.O_RDONLY)
    gpa = bench.memory.map_file(fd, 0, 16384, False)
    bench.mmu.map(0x900000, gpa, 16384, READ | EXEC)
    for noexec in (False, True):
        bench.memory.window(gpa).noexec = noexec
        bench.mmu.mark(0x900000 + (bench.symbols["p_hello"] & -4096))
        ctx = bench.context("p_hello")
        ctx.regs[RIP] = 0x900000 + bench.symbols["p_hello"]
        ctx.reload()
        assert bench.wait() is ctx and (ctx.event, ctx.nr) == (EV_SYSCALL, 1001), noexec
        ctx.release()
    os.close(fd)


# What a stub is.


def test_a_stub_holds_nothing_of_ours(bench: Bench, tmp_path: Path) -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    ctx = bench.run("p_loop", rbx=1)
    pid = bench.mmu.stub.pid
    open_files = {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    assert sorted(open_files) == [0, 1]
    assert "memfd:kvmsentry" in open_files[0] and open_files[1].startswith("socket:")
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) > 5}
    assert names <= {"/memfd:kvmsentry (deleted)", "[vsyscall]"}, names
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert int(status["TracerPid"]) == os.getpid() and int(status["PPid"]) == os.getpid()
    ctx.release()
    os.close(fd)


def test_stubs_die_with_the_tracer(bench: Bench) -> None:
    """A tracer that is killed leaves nobody behind."""
    here = Path(__file__).parent
    program = (
        f"import sys, importlib.util as u; sys.path.insert(0, {str(here)!r}); import ptrace_bench as c\n"
        "t = c.Tracer(); b = c.Bench(t); x = b.context('p_spin'); x.reload(); t.wait(1000000)\n"
        "print(t._zygote and c_pid(t), b.mmu.stub.pid, flush=True); sys.stdin.read()"
    ).replace("c_pid(t)", "__import__('kvmsentry.ptrace.tracer', fromlist=['lib']).lib.pt_tid(t._zygote)")
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = [int(word) for word in child.stdout.readline().split()]
    assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    child.kill()
    child.wait()
    for _ in range(200):
        left = [pid for pid in pids if _alive(pid)]
        if not left:
            break
        threading.Event().wait(0.01)
    assert not left
    child.stdout.close()
    assert child.stdin is not None
    child.stdin.close()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_refused_ptrace_says_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr("kvmsentry.ptrace.tracer.lib", _Refusing())
    with pytest.raises(HostError, match="yama"):
        tracer._start()
    monkeypatch.undo()
    tracer.close()


_WORD = ffi.new("char[]", b"PTRACE_SEIZE")


class _Refusing:
    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)

    def pt_start(self, *args: object) -> int:
        args[6][0] = _WORD  # type: ignore[index]
        return -errno.EPERM
