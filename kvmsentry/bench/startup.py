"""What starting a sandbox consists of, and what a sleeping one costs."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from typing import Any

import psutil

from kvmsentry.bench import measure
from kvmsentry.bench.platforms import Platform

# Marks (kvmsentry.log.mark) in their order, and what lies before each.
PHASES = {
    "python": "python starts, the command line's library is imported",
    "imports": "modules of the launcher, options read",
    "gofer": "the gofer is forked and serves",
    "fork": "the Sentry is forked",
    "modules": "modules of the kernel",
    "machine": "the machine: VM, memory, entry code (or the first stub)",
    "handlers": "system calls' handlers, file systems",
    "mounts": "the mount tree",
    "lockdown": "look-ups, hosts files, namespaces, seccomp",
    "exec": "the first program is loaded",
    "first": "to its first byte of output",
    "end": "to its end and the sandbox's",
}
LIMIT = 30.0
SETTLE = 1.0  # seconds before an idle sandbox is looked at


class Failed(Exception):
    """It could not be measured; says why."""


def phases(place: Platform, program: str, times: int, log: str) -> dict[str, Any]:
    """{"total": ms, "first": ms to the first byte, "phases": {name: ms}}, medians over `times` runs; phases for our own
    platforms only. Failed when the program fails there."""
    from kvmsentry.bench.session import logged

    totals, firsts = [], []
    spans: dict[str, list[float]] = {}
    for _ in range(times):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(log)
        outcome = measure.run(place.command([program], log), LIMIT)
        if outcome.failure(LIMIT) or not outcome.first:
            raise Failed(outcome.failure(LIMIT) or "it printed nothing")
        totals.append(outcome.took / 1e6)
        firsts.append((outcome.first - outcome.begin) / 1e6)
        if place.ours:
            for name, ns in split(outcome, logged(log, "times: ")).items():
                spans.setdefault(name, []).append(ns / 1e6)
    facts: dict[str, Any] = {"total": statistics.median(totals), "first": statistics.median(firsts), "times": times}
    if spans:
        facts["phases"] = {name: statistics.median(spans[name]) for name in PHASES if name in spans}
    return facts


def split(outcome: measure.Outcome, marks: Any) -> dict[str, int]:
    """{phase: ns} of one run. Marks have CLOCK_MONOTONIC times, as the outcome has."""
    if not isinstance(marks, list):
        raise Failed("the debug log has no times")
    points = [(name, at) for name, at in marks if name in PHASES]
    points += [("first", outcome.first), ("end", outcome.end)]
    spans = {}
    before = outcome.begin
    for name, at in points:
        spans[name] = max(at - before, 0)
        before = max(at, before)
    return spans


def idle(place: Platform, seconds: float) -> dict[str, Any]:
    """{"pss": bytes, "cpu": ms in `seconds`, "processes": n} over the process tree of a sandbox that sleeps. PSS is
    smaps(5)'s: a page that n processes share counts 1/n in each. Failed when it does not start."""
    argv = place.command(["/bin/sh", "-c", "echo ready; exec sleep 1000"])
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=measure.environment("/tmp"),
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        if not _ready(process):
            raise Failed(f"no sandbox after {LIMIT:.0f} s")
        time.sleep(SETTLE)
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
        before = _cpu(tree)
        time.sleep(seconds)
        used = _cpu(tree) - before
        pss = 0
        for member in tree:
            pss += member.memory_full_info().pss
        return {"pss": pss, "cpu": used * 1e3, "seconds": seconds, "processes": len(tree)}
    except (psutil.NoSuchProcess, psutil.AccessDenied) as error:
        raise Failed(str(error)) from None
    finally:
        measure.end_tree(process)
        process.stdout.close()


def _ready(process: subprocess.Popen[bytes]) -> bool:
    import select

    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], LIMIT)
    return bool(readable) and process.stdout.readline() == b"ready\n"


def _cpu(tree: list[psutil.Process]) -> float:
    """Seconds of processor time of these processes."""
    return float(sum(sum(member.cpu_times()[:2]) for member in tree))
