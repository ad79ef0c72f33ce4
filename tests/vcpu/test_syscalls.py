"""System calls through the channel: real instructions in ring 3, answers from Python."""

from __future__ import annotations

from conftest import Bench

from kvmsentry.vcpu.layout import EV_SYSCALL


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
