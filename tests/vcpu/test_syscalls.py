"""System calls through the channel: real instructions in ring 3, answers from Python."""

from __future__ import annotations

import os

import pytest
from conftest import DATA, READ, STACK, Bench

from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import (
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
    ctx = bench.context("p_loop", rbx=20000)
    ctx.reload()
    count = 0
    while bench.wait().nr == 39:
        count += 1
        ctx.reply(count)
    assert count == 20000
    ctx.release()


def test_calls_that_jump_to_the_entry(bench: Bench) -> None:
    """What a patched call site does: R11 is the return address, no SYSCALL instruction."""
    if bench.machine.ring0:
        pytest.skip("no ring 3 entry here")
    ctx = bench.context("p_jumps", rbx=500, rbp=layout.WINDOW_CODE + 3)
    ctx.reload()
    for i in range(500):
        assert bench.wait() is ctx and ctx.nr == 39 and ctx.regs[RBX] == 500 - i
        ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003
    ctx.release()


def test_park_and_wake(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=3)
    for _ in range(2):
        ctx.park()
        assert bench.machine.wait(30_000_000) is None
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


@pytest.mark.parametrize("spins", [1, 3, 40])
def test_guests_that_park_at_once(bench: Bench, spins: int) -> None:
    """K4, K7: the answer comes while the runner goes to sleep; every call is seen once."""
    shared = layout.GPA_SHARED + layout.SH_SPINS
    bench.memory.view[shared : shared + 4] = spins.to_bytes(4, "little")
    calls = 400 if os.environ.get("NESTED_KVM") else 3000
    ctx = bench.context("p_loop", rbx=calls)
    ctx.reload()
    seen = 0
    while bench.wait().nr == 39:
        assert ctx.regs[RBX] == calls - seen
        seen += 1
        ctx.reply(0)
    assert seen == calls
    ctx.release()


def test_parked_guest_uses_no_processor(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=1)
    ctx.park()
    bench.machine.wait(20_000_000)
    before = bench.machine.counters
    bench.machine.wait(100_000_000)
    after = bench.machine.counters
    assert after["exits"] == before["exits"] and after["sleeps"] - before["sleeps"] <= 2
    ctx.reply(0)
    bench.wait()
    ctx.release()


def test_a_sleeping_sentry_hears_the_doorbell(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    assert bench.machine.wait(20_000_000) is None  # asleep by now, the guest computes
    assert bench.machine.counters["sleeps"] >= 1
    ctx.kick()
    assert bench.wait() is ctx and ctx.event == EV_KICKED
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


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
            counts[ctx.owner] += 1
            ctx.reply(0)
        else:
            ended += 1
            ctx.release()
    assert set(counts.values()) == {5}
    assert bench.machine.counters["vcpus"] <= 71



def test_more_than_500_threads_in_one_address_space(bench: Bench) -> None:
    """Channel slots beyond the first leaf table; vCPUs are made for the first few only, the others wait stopped."""
    window = []
    for i in range(520):
        try:
            ctx = bench.context("p_loop", rbx=1, rbp=i)
        except MemoryError:
            pytest.skip("host refuses vCPUs")
        window.append(ctx)
    last = window[-1]
    last.reload()
    assert bench.wait() is last and last.nr == 39
    for ctx in window:
        ctx.release()


def test_a_reused_vcpu_shows_nothing_of_its_last_context(bench: Bench) -> None:
    bench.memory.view[bench.data : bench.data + 512] = bytes(range(256)) * 2
    first = bench.run("p_avx", **{name: 0xDEAD_0000 + i for i, name in enumerate(NAMES)}, fs_base=DATA)
    number = first.id
    first.release()
    mmu, data = bench.space()
    second = bench.context("p_seen", mmu)
    assert second.id == number, "the pool gave another vCPU: nothing is shown by this test"
    assert not any(second.regs[i] for i in range(20) if i not in (RIP, RSP))
    second.reload()
    assert bench.wait() is second and second.nr == 1003
    seen = bytes(bench.memory.view[data : data + 48])
    assert seen[:16] == bytes(16) and seen[32:48] == bytes(16)
    assert int.from_bytes(seen[16:20], "little") == 0x1F80 and int.from_bytes(seen[20:22], "little") == 0x37F
    assert second.regs[FS_BASE] == 0
    second.release()


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


def test_channels_of_a_dead_address_space_are_used_again(bench: Bench) -> None:
    before = len(bench.machine._frames)
    mmu, _ = bench.space()
    ctx = bench.context("p_loop", mmu, rbx=1)
    ctx.reload()
    bench.wait().release()
    assert len(bench.machine._frames) == before - 1
    bench.machine.forget(mmu)
    assert len(bench.machine._frames) == before


def test_wake_from_another_thread(bench: Bench) -> None:
    import threading

    timer = threading.Timer(0.05, bench.machine.wake)
    timer.start()
    assert bench.machine.wait(-1) is None
    timer.join()


def test_host_descriptors_are_served_while_the_guest_never_rests(bench: Bench) -> None:
    import os
    import select

    r, w = os.pipe()
    seen: list[int] = []
    bench.machine.watch(r, select.EPOLLIN, lambda events: (os.read(r, 1), seen.append(events)) and None)
    os.write(w, b"x")
    ctx = bench.context("p_loop", rbx=1 << 40)
    ctx.reload()
    for _ in range(2000):
        got = bench.machine.wait(1_000_000_000)
        if got is None:
            break
        got.reply(0)
    assert seen == [select.EPOLLIN]
    bench.machine.unwatch(r)
    os.close(r)
    os.close(w)


def test_nothing_to_do_times_out(bench: Bench) -> None:
    assert bench.machine.wait(0) is None
    assert bench.machine.wait(3_000_000) is None


def test_an_application_that_forges_states_hurts_only_itself(bench: Bench) -> None:
    """K5, K6: a thread writes the state words of another's channel while that one makes calls and is kicked."""
    if bench.machine.ring0:
        pytest.skip("channels are not in ring 3's reach with the ring 0 entry")
    victim = bench.context("p_loop", rbx=1 << 40)
    channel = layout.WINDOW_CHANNELS + victim._slot * 4096
    for state in (layout.ST_ANSWERED, layout.ST_REQUEST, layout.ST_LEAVE, 7):
        forger = bench.context("p_forge", rdi=channel, rsi=state)
        if not state:
            victim.reload()
        forger.reload()
        for _ in range(300):
            ctx = bench.machine.wait(2_000_000)
            if ctx is None:
                victim.kick()
                continue
            if ctx.event == EV_SYSCALL:
                ctx.reply(0)
            else:
                ctx.reload()
        forger.kick()
        while (ctx := bench.wait()) is not forger:
            ctx.reload()
        forger.release()
    victim.kick()
    while (ctx := bench.machine.wait(5_000_000)) is not victim:
        victim.kick()
    victim.release()
    ctx = bench.run("p_load", rdi=DATA)
    assert ctx.nr == 1003
    ctx.release()


def test_a_call_from_a_read_only_stack(bench: Bench) -> None:
    """Nothing of the entry touches the application's stack (its red zone is in use)."""
    ctx = bench.context("p_loop", rbx=2)
    bench.mmu.map(0x700000, bench.frames.take(), 4096, READ)
    ctx.regs[RSP] = 0x700800
    ctx.reload()
    while bench.wait().nr == 39:
        ctx.reply(0)
    assert ctx.nr == 1003 and ctx.regs[RSP] == 0x700800
    ctx.release()
