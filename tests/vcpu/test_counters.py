"""Exits are counted by reason, each once."""

from __future__ import annotations

import os

import pytest
from platform_bench import DATA, READ, WRITE, Bench

from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import EXIT_NAMES, GS_BASE, RIP


def counted(bench: Bench, before: dict[str, int]) -> dict[str, int]:
    """The reasons whose counts grew, by how much. They must add up to all exits."""
    now = bench.platform.counters
    grown = {name: now[f"exit_{name}"] - before[f"exit_{name}"] for name in EXIT_NAMES}
    assert sum(grown.values()) == now["exits"] - before["exits"]
    return {name: count for name, count in grown.items() if count}


def test_every_reason_has_a_name() -> None:
    numbers = {name: value for name, value in vars(layout).items() if name.startswith("EXIT_") and name != "EXIT_NAMES"}
    assert [name.removeprefix("EXIT_").lower() for name in numbers] == list(EXIT_NAMES)
    assert list(numbers.values()) == list(range(layout.NEXITS))
    kinds = {name: value for name, value in vars(layout).items() if name.startswith("EV_")}
    assert [name.removeprefix("EV_").lower() for name in kinds] == list(layout.EVENT_NAMES)
    assert list(kinds.values()) == list(range(layout.NEVENTS))


def test_calls_are_no_exits(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=20)
    before = bench.platform.counters
    for _ in range(20):
        ctx.reply(0)
        assert bench.wait() is ctx
    assert set(counted(bench, before)) <= {"park"}  # a guest that spun for long enough while this thread was away
    assert bench.platform.counters["events"] - before["events"] == 20
    ctx.release()


def test_park(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=1)
    before = bench.platform.counters
    ctx.park()
    assert bench.platform.wait(20_000_000) is None
    assert counted(bench, before) in ({"park": 1}, {})  # {}: it had spun for long enough before
    ctx.release()


def test_kick(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    bench.platform.wait(20_000_000)
    before = bench.platform.counters
    ctx.kick()
    assert bench.wait() is ctx
    assert counted(bench, before)["interrupted"] >= 1
    ctx.release()


@pytest.mark.parametrize(("program", "reason"), [("p_load", "fault"), ("p_ud2", "exception")])
def test_faults_and_exceptions_leave_the_guest_only_with_the_ring_3_entry(
    bench: Bench, program: str, reason: str
) -> None:
    ctx = bench.context(program, rdi=0x900000)
    before = bench.platform.counters
    ctx.reload()
    assert bench.wait() is ctx and ctx.event in (layout.EV_FAULT, layout.EV_EXCEPTION)
    found = counted(bench, before)
    found.pop("park", None)  # with the ring 0 entry it waits for the answer, and may be long about it
    assert found == ({} if bench.platform.ring0 else {reason: 1})
    ctx.release()


def test_port(bench: Bench) -> None:
    before = bench.platform.counters
    ctx = bench.run("p_port")
    found = counted(bench, before)
    found.pop("park", None)
    assert found == ({} if bench.platform.ring0 else {"port": 1})  # ring 0: the TSS closes them all, that is a #GP
    ctx.release()


def test_slow_calls(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=5)
    ctx.regs[GS_BASE] = DATA
    before = bench.platform.counters
    ctx.reload()
    for _ in range(5):
        assert bench.wait() is ctx
        ctx.reply(0)
    assert bench.wait() is ctx
    assert counted(bench, before).get("slow", 0) == (0 if bench.platform.ring0 else 5)
    ctx.release()


def test_host_error(bench: Bench, tmp_path: object) -> None:
    fd = os.open(os.path.join(str(tmp_path), "file"), os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    gpa = bench.memory.map_file(fd, 0, 4096, True)
    bench.mmu.map(0x900000, gpa, 4096, READ)
    os.ftruncate(fd, 0)
    ctx = bench.context("p_load", rdi=0x900000)
    before = bench.platform.counters
    ctx.reload()
    assert bench.wait() is ctx and ctx.event == layout.EV_HOST_ERROR and ctx.regs[RIP] == bench.address("p_load")
    assert counted(bench, before) == {"host_error": 1}
    ctx.release()
    os.close(fd)


def test_the_service_vcpu_is_counted_apart(bench: Bench) -> None:
    before = bench.platform.counters
    bench.mmu.map(0x900000, bench.take(), 4096, READ | WRITE)
    bench.mmu.unmap(0x900000, 4096)
    bench.mmu.flush()
    assert counted(bench, before) == {} and bench.platform.counters["services"] - before["services"] == 1
