"""The benchmark's run: rounds in which the platforms take turns, and what came of them.

Order matters more than care in each figure: a machine's speed drifts (other tenants, frequency, caches), so within a
round every platform does the same thing one after the other, and what is compared was measured side by side. Round 0
warms caches up, finds out what does not work, and brings the counters of our own platforms; it is not counted.
"""

from __future__ import annotations

import ast
import os
import shutil
import signal
import socket
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvmsentry.bench import catalogue, counters, host, measure, platforms, programs, startup
from kvmsentry.bench.catalogue import BENCHMARKS, SOURCES, Benchmark
from kvmsentry.bench.platforms import Platform

FORMAT = 1
BUDGET_MS, QUICK_BUDGET_MS = 60, 15  # for one figure of a program that measures inside
MEMORY_DISK = "/dev/shm"


@dataclass
class Step:
    """What is run at once: one command from outside, or one program with the names of several figures."""

    rows: list[Benchmark]

    @property
    def program(self) -> str:
        return self.rows[0].program

    @property
    def label(self) -> str:
        return self.rows[0].name if len(self.rows) == 1 else f"{self.program} ({len(self.rows)})"


def steps(names: list[str]) -> list[Step]:
    """The chosen benchmarks, those of one micro program together."""
    found: dict[str, Step] = {}
    for name in names:
        if name in BENCHMARKS:
            row = BENCHMARKS[name]
            key = row.name if row.group == "workloads" else row.program
            found.setdefault(key, Step([])).rows.append(row)
    return list(found.values())


@dataclass
class Result:
    """Of one benchmark on one platform: a figure a round in ns, the least seen, and why there is none."""

    samples: list[float] = field(default_factory=list)
    least: float = 0.0
    failure: str = ""

    def add(self, ns: float, least: float) -> None:
        """One round's figure; `least` is the best slice within it."""
        self.samples.append(ns)
        self.least = min(self.least or least, least)

    def facts(self, native: Result | None) -> dict[str, Any]:
        """As JSON holds it."""
        facts: dict[str, Any] = {}
        if self.samples:
            facts = {
                "median": statistics.median(self.samples),
                "low": min(self.samples),
                "high": max(self.samples),
                "least": self.least,
                "samples": self.samples,
            }
            if native is not None and native.samples:
                facts["ratio"] = facts["median"] / statistics.median(native.samples)
        if self.failure:
            facts["failure"] = self.failure
        return facts


class Session:
    """One run of the benchmark. `run` may be interrupted (KeyboardInterrupt): `facts` then tells what there is."""

    def __init__(self, chosen: list[str], places: list[Platform], rounds: int, quick: bool, state: str,
                 progress: Callable[[str], None] = lambda text: None) -> None:  # fmt: skip
        self.names, self.platforms, self.rounds, self.quick = chosen, places, rounds, quick
        self.state, self.progress = state, progress
        self.left_out = {n: BENCHMARKS[n].missing() for n in chosen if n in BENCHMARKS and BENCHMARKS[n].missing()}
        self.steps = steps([name for name in chosen if name not in self.left_out])
        self.results: dict[str, dict[str, Result]] = {}
        self.counters: dict[str, dict[str, dict[str, Any]]] = {}
        self.startup: dict[str, Any] = {}
        self.idle: dict[str, Any] = {}
        self.failed = {place.name: place.reason for place in places if place.reason}
        self.noise: dict[str, float] = {}
        self.interrupted = False
        self.built: dict[str, str] = {}
        self.scratch = ""
        self.work = ""

    @property
    def length(self) -> int:
        """How often `progress` will be called."""
        extras = sum(name in self.names for name in catalogue.EXTRAS)
        return len(self.platforms) * (1 + len(self.steps) * (self.rounds + 1) + extras)

    def run(self) -> None:
        """Measure everything; on SIGINT or SIGTERM, stop and keep what there is."""
        noise = host.Noise()
        before = {signo: signal.signal(signo, signal.default_int_handler) for signo in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run()
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            measure.end_strays(self.state)
            self.noise = noise.finish()
            for signo, handler in before.items():
                signal.signal(signo, handler)

    def _run(self) -> None:
        disk = MEMORY_DISK if os.path.isdir(MEMORY_DISK) else None
        with (
            tempfile.TemporaryDirectory(prefix="kvmsentry-bench-", dir=disk) as self.scratch,
            tempfile.TemporaryDirectory(prefix="kvmsentry-bench-") as self.work,
        ):
            os.chmod(self.work, 0o755)
            needed = {step.program for step in self.steps if step.program}
            if "startup" in self.names:
                needed.add("first")
            self.built = programs.build(sorted(needed))
            for place in self.platforms:
                self.progress(f"{place.name}: /bin/true")
                self._try(place)
            for number in range(self.rounds + 1):
                for step in self.steps:
                    for place in self.platforms:
                        self.progress(f"{place.name}: {step.label}")
                        self._step(step, place, number)
            for place in self.platforms:
                if "startup" in self.names:
                    self.progress(f"{place.name}: startup")
                    self._extra("startup", place)
            for place in self.platforms:
                if "idle" in self.names:
                    self.progress(f"{place.name}: idle")
                    self._extra("idle", place)

    # -- one thing on one platform
    def _try(self, place: Platform) -> None:
        """Whether the platform can run anything at all."""
        if not place.reason:
            outcome = self._command(place, ["/bin/true"], place.trial)
            if outcome.failure(place.trial):
                place.reason = self.failed[place.name] = f"cannot run /bin/true: {outcome.failure(place.trial)}"

    def _command(self, place: Platform, argv: list[str], limit: float, log: str = "") -> measure.Outcome:
        outcome = measure.run(place.command(argv, log), limit, self._scratch(place))
        if outcome.late:
            measure.end_strays(self.state)
        return outcome

    def _scratch(self, place: Platform) -> str:
        """A directory in memory: on the host a tmpfs, inside wherever writes go."""
        return self.scratch if place.name == "native" else "/tmp"

    def _result(self, row: Benchmark, place: Platform) -> Result:
        return self.results.setdefault(row.name, {}).setdefault(place.name, Result())

    def _step(self, step: Step, place: Platform, number: int) -> None:
        rows = [row for row in step.rows if not self._result(row, place).failure]
        while rows and not place.reason:
            rows = self._attempt(rows, place, number)
        for row in rows:
            result = self._result(row, place)
            result.failure = result.failure or place.reason

    def _attempt(self, rows: list[Benchmark], place: Platform, number: int) -> list[Benchmark]:
        """Run `rows` at once; returns those that are still to be done because one before them hung or crashed."""
        first = rows[0]
        argv = self._argv(rows, place)
        log = os.path.join(self.work, "log") if number == 0 and place.ours else ""
        limit = first.limit
        outcome = self._command(place, argv, limit, log)
        failure = outcome.failure(limit)
        if log:
            self._keep_counters(first, place, log)
        if not first.program and not first.prints:
            if failure:
                self._fail(first, place, failure)
            elif number:
                self._result(first, place).add(outcome.took, outcome.took)
            return []
        found = measure.figures(outcome.stdout)
        rest = list(rows)
        for row in rows:
            figure = found.get(row.name)
            if figure is None:
                break
            rest.remove(row)
            if "error" in figure:
                self._fail(row, place, figure["error"])
            elif number:
                self._result(row, place).add(figure["ns"], figure.get("min", figure["ns"]))
        if rest:
            self._fail(rest.pop(0), place, failure or "it printed no figure")
        return rest

    def _argv(self, rows: list[Benchmark], place: Platform) -> list[str]:
        first, scratch = rows[0], self._scratch(place)
        values = {"scratch": scratch, "data": SOURCES}
        if any("{port}" in word for word in first.argv):
            values["port"] = str(free_port())
        words = catalogue.fill(first.argv, values)
        if not first.program:
            return words
        program = self.built[first.program]
        budget = str(QUICK_BUDGET_MS if self.quick else BUDGET_MS)
        return [program, *words] if words else [program, budget, scratch, *[row.name for row in rows]]

    def _fail(self, row: Benchmark, place: Platform, why: str) -> None:
        """A benchmark failed. Is it the benchmark, or the platform as a whole?"""
        self._result(row, place).failure = why
        if place.name != "native":
            self._try(place)

    def _keep_counters(self, row: Benchmark, place: Platform, log: str) -> None:
        name = row.name if row.group == "workloads" else row.program
        found = logged(log, "counters: ")
        if isinstance(found, dict):
            found = counters.with_seconds(found, logged(log, "times: "))
            self.counters.setdefault(name, {})[place.name] = found
        if os.path.exists(log):
            os.unlink(log)

    def _extra(self, name: str, place: Platform) -> None:
        if place.reason:
            return
        where: dict[str, Any] = self.startup if name == "startup" else self.idle
        log = os.path.join(self.work, "log")
        try:
            if name == "startup":
                times = 2 if self.quick else 2 * self.rounds
                where[place.name] = startup.phases(place, self.built["first"], times, log)
            else:
                where[place.name] = startup.idle(place, 2.0 if self.quick else 5.0)
        except startup.Failed as error:
            where[place.name] = {"failure": str(error)}

    # -- what came of it
    def facts(self) -> dict[str, Any]:
        """Everything as plain values: what --json writes and what the table and the page are made from."""
        rows = []
        for name in self.names:
            if name not in BENCHMARKS or (name not in self.results and name not in self.left_out):
                continue
            row = BENCHMARKS[name]
            by_platform = self.results.get(name, {})
            facts = {place: result.facts(by_platform.get("native")) for place, result in by_platform.items()}
            rows.append(
                {
                    "name": name,
                    "group": row.group,
                    "unit": row.unit,
                    "what": row.what,
                    "results": {place: value for place, value in facts.items() if value},
                    **({"left_out": self.left_out[name]} if name in self.left_out else {}),
                }
            )
        return {
            "format": FORMAT,
            "machine": host.describe(),
            "noise": self.noise,
            "rounds": self.rounds,
            "quick": self.quick,
            "interrupted": self.interrupted,
            "platforms": [
                {"name": p.name, "title": p.title, "failure": self.failed.get(p.name, "")} for p in self.platforms
            ],
            "benchmarks": rows,
            "counters": self.counters,
            "startup": self.startup,
            "idle": self.idle,
        }


def failures(facts: dict[str, Any]) -> list[str]:
    """A line for each thing that failed."""
    lines = [f"{p['name']}: {p['failure']}" for p in facts["platforms"] if p["failure"]]
    broken = {p["name"] for p in facts["platforms"] if p["failure"]}
    for row in facts["benchmarks"]:
        for place, result in row["results"].items():
            if result.get("failure") and not (place in broken and "cannot run /bin/true" in result["failure"]):
                lines.append(f"{row['name']} on {place}: {result['failure']}")
    for what in ("startup", "idle"):
        lines += [f"{what} on {place}: {r['failure']}" for place, r in facts[what].items() if r.get("failure")]
    return lines


def logged(path: str, prefix: str) -> Any:
    """The value after the last `prefix` in a debug log; None where there is none."""
    try:
        with open(path, errors="replace") as file:
            lines = [line.partition(prefix)[2] for line in file if prefix in line]
    except FileNotFoundError:
        return None
    try:
        return ast.literal_eval(lines[-1]) if lines else None
    except (ValueError, SyntaxError):
        return None


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(chosen: list[str], named: list[str], runsc: bool, rounds: int, quick: bool,
        started: Callable[[Session], Callable[[str], None]]) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark; `started` gets the session before it runs and returns what is told of progress."""
    state = tempfile.mkdtemp(prefix="kvmsentry-bench-runsc-")
    try:
        session = Session(chosen, platforms.choose(named, runsc, state), rounds, quick, state)
        session.progress = started(session)
        session.run()
        return session.facts()
    finally:
        shutil.rmtree(state, ignore_errors=True)
