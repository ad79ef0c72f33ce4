#!/usr/bin/env python3
"""What a system call costs through the channel: a guest's getpid loop answered by Python, in µs a round trip.

    hack/bench_channel.py [calls]

On a busy machine run it as `chrt -f 10 hack/bench_channel.py 20000`: two threads that nobody else disturbs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "vcpu"))

from conftest import Bench  # noqa: E402

from kvmsentry.vcpu import layout  # noqa: E402
from kvmsentry.vcpu.machine import Machine  # noqa: E402


def loop(bench: Bench, calls: int, program: str = "p_loop") -> float:
    """Seconds for `calls` getpid calls of one guest thread."""
    machine = bench.machine
    ctx = bench.context(program, rbx=calls, rbp=layout.WINDOW_CODE + 3)
    ctx.reload()
    wait = machine.wait
    start = time.perf_counter()
    while True:
        ctx = wait(-1)  # type: ignore[assignment]
        if ctx.nr != 39:
            break
        ctx.reply(42)
    took = time.perf_counter() - start
    ctx.release()
    return took


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    machine = Machine()
    bench = Bench(machine)
    loop(bench, 1000)
    best = min(loop(bench, calls) for _ in range(3))
    print(f"entry {machine.traits['entry']}, paging {machine.traits['paging']}, {machine.tsc_khz / 1e6:.2f} GHz TSC")
    print(f"getpid answered by Python         {best / calls * 1e6:8.2f} us")
    if not machine.ring0:
        best = min(loop(bench, calls, "p_jumps") for _ in range(3))
        print(f"the same from a patched call site {best / calls * 1e6:8.2f} us")
    print(f"counters {machine.counters}")
    machine.close()


if __name__ == "__main__":
    main()
