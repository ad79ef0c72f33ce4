"""The channel: entries, parking, forged states, vCPUs that serve again. See tests/platforms too."""

from __future__ import annotations

import os

import pytest
from platform_bench import DATA
from platform_bench import KvmBench as Bench

from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import (
    EV_KICKED,
    EV_SYSCALL,
    FS_BASE,
    RBX,
    RIP,
    RSP,
)

NAMES = ("rbx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r12", "r13", "r14", "r15")


def test_calls_that_jump_to_the_entry(bench: Bench) -> None:
    """What a patched call site does: R11 is the return address, no SYSCALL instruction."""
    if bench.platform.ring0:
        pytest.skip("no ring 3 entry here")
    ctx = bench.context("p_jumps", rbx=500, rbp=layout.WINDOW_CODE + 3)
    ctx.reload()
    for i in range(500):
        assert bench.wait() is ctx and ctx.nr == 39 and ctx.regs[RBX] == 500 - i
        ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003
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
    bench.platform.wait(20_000_000)
    before = bench.platform.counters
    bench.platform.wait(100_000_000)
    after = bench.platform.counters
    assert after["exits"] == before["exits"] and after["sleeps"] - before["sleeps"] <= 2
    ctx.reply(0)
    bench.wait()
    ctx.release()


def test_a_sleeping_sentry_hears_the_doorbell(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    assert bench.platform.wait(20_000_000) is None  # asleep by now, the guest computes
    assert bench.platform.counters["sleeps"] >= 1
    ctx.kick()
    assert bench.wait() is ctx and ctx.event == EV_KICKED
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


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


def test_channels_of_a_dead_address_space_are_used_again(bench: Bench) -> None:
    before = len(bench.platform._frames)
    mmu, _ = bench.space()
    ctx = bench.context("p_loop", mmu, rbx=1)
    ctx.reload()
    bench.wait().release()
    assert len(bench.platform._frames) == before - 1
    bench.platform.forget(mmu)
    assert len(bench.platform._frames) == before


def test_an_application_that_forges_states_hurts_only_itself(bench: Bench) -> None:
    """K5, K6: a thread writes the state words of another's channel while that one makes calls and is kicked."""
    if bench.platform.ring0:
        pytest.skip("channels are not in ring 3's reach with the ring 0 entry")
    victim = bench.context("p_loop", rbx=1 << 40)
    channel = layout.WINDOW_CHANNELS + victim._slot * 4096
    for state in (layout.ST_ANSWERED, layout.ST_REQUEST, layout.ST_LEAVE, 7):
        forger = bench.context("p_forge", rdi=channel, rsi=state)
        if not state:
            victim.reload()
        forger.reload()
        for _ in range(300):
            ctx = bench.platform.wait(2_000_000)
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
    while (ctx := bench.platform.wait(5_000_000)) is not victim:
        victim.kick()
    victim.release()
    ctx = bench.run("p_load", rdi=DATA)
    assert ctx.nr == 1003
    ctx.release()


