"""System calls, sleeping and waking, threads and address spaces: the same on each platform."""

from __future__ import annotations

import os
import select
import threading
import time

import pytest
from platform_bench import DATA, NAMES, READ, STACK, Bench

from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import EV_KICKED, EV_SYSCALL, FS_BASE, GS_BASE, R11, RAX, RBX, RCX, RFLAGS, RIP, RSP


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
    assert (ctx.event, ctx.vector) == (layout.EV_EXCEPTION, 6)
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
    assert (ctx.event, ctx.vector) == (layout.EV_EXCEPTION, 6)
    # RF (bit 16) is set in the flags that a fault pushes.
    assert [v & ~0x10000 if i == RFLAGS else v for i, v in enumerate(ctx.regs)] == values
    ctx.release()


@pytest.mark.parametrize("flags", [0x202, 0x202 | 0x001, 0x202 | 0x400, 0x202 | 0x8D5, 0x202 | 0xCD5, 0x40202])
def test_flags_survive_a_call(bench: Bench, flags: int) -> None:
    ctx = bench.run("p_flags", rbx=flags)
    assert ctx.regs[RFLAGS] == flags
    ctx.reply(0)
    assert bench.wait() is ctx
    assert ctx.args[0] == flags
    ctx.release()


def test_fs_base(bench: Bench) -> None:
    bench.memory.words[bench.data >> 3] = 0xABCD
    bench.memory.words[(bench.data >> 3) + 8] = 0xEF01
    ctx = bench.run("p_fs", fs_base=DATA)
    assert ctx.regs[FS_BASE] == DATA
    ctx.regs[FS_BASE] = DATA + 64  # arch_prctl
    ctx.regs[RAX] = 0
    ctx.reload()
    assert bench.wait() is ctx
    assert ctx.args[:2] == (0xABCD, 0xEF01)
    ctx.release()


def test_an_application_with_its_own_gs(bench: Bench) -> None:
    bench.memory.words[(bench.data >> 3) + 1] = 0x600D
    ctx = bench.run("p_gs", rdi=DATA)
    assert (ctx.event, ctx.nr, ctx.args[1], ctx.regs[GS_BASE]) == (EV_SYSCALL, 1001, 7, DATA)
    ctx.reply(77)
    assert bench.wait() is ctx
    assert (ctx.nr, ctx.args[:3]) == (1003, (77, 0x600D, DATA))
    ctx.release()


def test_gs_set_by_arch_prctl(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=3)
    ctx.regs[GS_BASE], ctx.regs[RAX] = DATA, 0
    ctx.reload()
    for _ in range(2):
        assert bench.wait() is ctx and ctx.nr == 39
        assert ctx.regs[GS_BASE] == DATA
        ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003 and ctx.regs[GS_BASE] == DATA
    ctx.release()


def test_exact_count_of_calls(bench: Bench) -> None:
    calls = 20000 if bench.platform.name == "kvm" else 5000
    ctx = bench.context("p_loop", rbx=calls)
    ctx.reload()
    count = 0
    while bench.wait().nr == 39:
        count += 1
        ctx.reply(count)
    assert count == calls
    ctx.release()


def test_a_call_from_a_read_only_stack(bench: Bench) -> None:
    """Nothing of the entry touches the application's stack (its red zone is in use)."""
    ctx = bench.context("p_loop", rbx=2)
    bench.mmu.map(0x700000, bench.take(), 4096, READ)
    ctx.regs[RSP] = 0x700800
    ctx.reload()
    while bench.wait().nr == 39:
        ctx.reply(0)
    assert ctx.nr == 1003 and ctx.regs[RSP] == 0x700800
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


# Sleeping and waking.


def test_park_and_wake(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=3)
    for _ in range(2):
        ctx.park()
        assert bench.platform.wait(30_000_000) is None
        ctx.reply(0)
        assert bench.wait() is ctx
    ctx.reload()  # answered at once: a race of the answer with a guest that spins
    assert bench.wait() is ctx
    ctx.release()


def test_park_answered_at_once(bench: Bench) -> None:
    ctx = bench.context("p_loop", rbx=2000)
    ctx.reload()
    count = 0
    while bench.wait().nr == 39:
        count += 1
        ctx.park()
        ctx.reply(0)  # K4
    assert count == 2000
    ctx.release()


def test_wake_from_another_thread(bench: Bench) -> None:
    timer = threading.Timer(0.05, bench.platform.wake)
    timer.start()
    assert bench.platform.wait(-1) is None
    timer.join()


def test_nothing_to_do_times_out(bench: Bench) -> None:
    assert bench.platform.wait(0) is None
    assert bench.platform.wait(3_000_000) is None


def test_host_descriptors_are_served_while_the_guest_never_rests(bench: Bench) -> None:
    r, w = os.pipe()
    seen: list[int] = []
    bench.platform.watch(r, select.EPOLLIN, lambda events: (os.read(r, 1), seen.append(events)) and None)
    os.write(w, b"x")
    ctx = bench.context("p_loop", rbx=1 << 40)
    ctx.reload()
    for _ in range(2000):
        got = bench.platform.wait(1_000_000_000)
        if got is None:
            break
        got.reply(0)
    assert seen == [select.EPOLLIN]
    bench.platform.unwatch(r)
    os.close(r)
    os.close(w)
    ctx.kick()
    bench.wait().release()


def test_a_host_edge_that_a_call_overtakes_is_told_all_the_same(bench: Bench) -> None:
    """Both come while the wait sleeps: the call is answered first, and epoll tells of an edge once only."""
    machine, rounds = bench.platform, 200
    told = threading.Semaphore(0)
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    words = bench.memory.words
    ctx = bench.context("p_await", rdi=DATA)
    ctx.reload()
    assert bench.wait() is ctx

    def ring() -> None:
        for count in range(1, rounds + 1):
            words[bench.data >> 3] = count  # the guest is about to post ...
            os.eventfd_write(eventfd, 1)  # ... while the wait is on its way out of its sleep
            if not told.acquire(timeout=5):
                break
            time.sleep(0.0002)

    edges = []
    machine.watch(eventfd, select.EPOLLIN | select.EPOLLET, lambda events: (edges.append(events), told.release()))
    ctx.reply(0)
    ringer = threading.Thread(target=ring)
    ringer.start()
    deadline = time.monotonic() + 20
    while ringer.is_alive() and time.monotonic() < deadline:
        if machine.wait(10_000_000) is ctx:
            ctx.reply(0)
    ringer.join()
    machine.unwatch(eventfd)
    os.close(eventfd)
    assert len(edges) == rounds


# Threads and address spaces.


def test_many_contexts_at_once(bench: Bench) -> None:
    contexts = []
    for i in range(70):
        ctx = bench.context("p_loop", rbx=5, rbp=i)
        ctx.owner = i
        contexts.append(ctx)
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
    assert bench.platform.counters.get("vcpus", 0) <= 71


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


def test_switch_is_exec(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=1)
    mmu, data = bench.space()
    bench.memory.words[data >> 3] = 4711
    ctx.switch(mmu)
    for i in range(20):
        ctx.regs[i] = 0
    ctx.regs[layout.RDI], ctx.regs[RIP] = DATA, bench.address("p_load")
    ctx.reload()
    assert bench.wait() is ctx and (ctx.nr, ctx.args[0]) == (1003, 4711)
    ctx.release()
