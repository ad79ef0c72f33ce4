"""The machine's own counters, from the debug log of one run: why vCPUs left the guest, and how often a second.

A run's counters are one flat dictionary, as `Platform.counters` gives them, with "seconds" that the application ran.
Names that begin with exit_ (KVM) or stop_ (ptrace) say for which reason.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PLATFORMS = ("kvm", "ptrace")
REASONS = {"exit_": "exits", "stop_": "stops"}
ALSO_A_SECOND = ("doorbells", "spins")
EXPLAINED = (
    "Totals first. Events are system calls and faults that the Sentry answered; sleeps, how often it found nothing to "
    "do and slept; spins, how often it looked again before; doorbells, how often a guest woke it; services, how often "
    "the service vCPU made changed page tables hold; exits, how often a vCPU left the guest. Then a second of the "
    "application's time, by reason: park, because an answer had to wait; interrupted, because it was told to come; "
    "fault and exception, where the entry is in ring 3; slow, calls of an application with a GS base of its own; port, "
    "its out instructions; host error, what KVM refused. On ptrace every event is a stop, and runs and calls count "
    "lists of mappings carried out in stubs."
)


class Table(NamedTuple):
    """A title, column names, and a line of cells a workload."""

    title: str
    columns: list[str]
    rows: dict[str, list[str]]


def with_seconds(counters: dict[str, Any], marks: Any) -> dict[str, Any]:
    """The counters with the time that the application ran, by the log's marks [(name, CLOCK_MONOTONIC ns)]; without it
    where the marks are not there."""
    at = {name: ns for name, ns in marks} if isinstance(marks, list) else {}
    if at.get("run", 0) > at.get("exec", 0) > 0:
        return {**counters, "seconds": (at["run"] - at["exec"]) / 1e9}
    return counters


def _reason(name: str) -> str:
    """"exit_park" -> "park"; "" for what is no reason."""
    return next((name.removeprefix(prefix) for prefix in REASONS if name.startswith(prefix)), "")


def rate(count: float) -> str:
    """A second: whole numbers, one digit more below ten."""
    return f"{count:,.0f}" if count >= 10 or count == 0 else f"{count:.1f}"


def tables(counters: dict[str, dict[str, dict[str, Any]]]) -> list[Table]:
    """For each platform of ours totals, then rates; counters are {workload: {platform: {name: count}}}. Reasons for
    which nothing happened are left out."""
    found = []
    for place in PLATFORMS:
        rows = {name: by_place[place] for name, by_place in counters.items() if place in by_place}
        if not rows:
            continue
        seen = {name: None for row in rows.values() for name in row}
        totals = [name for name in seen if not _reason(name) and name != "seconds"]
        if totals:
            cells = {n: [f"{row.get(c, 0):,}" for c in totals] for n, row in rows.items()}
            found.append(Table(f"counters, {place}", totals, cells))
        timed = {name: row for name, row in rows.items() if row.get("seconds")}
        reasons = [name for name in seen if _reason(name) and any(row.get(name) for row in timed.values())]
        columns = [*reasons, *[name for name in ALSO_A_SECOND if name in seen]]
        if timed and columns:
            what = next((word for prefix, word in REASONS.items() if any(c.startswith(prefix) for c in columns)), "")
            title = f"{what or 'events'} a second, {place}"
            cells = {n: [rate(row.get(c, 0) / row["seconds"]) for c in columns] for n, row in timed.items()}
            found.append(Table(title, [_reason(c).replace("_", " ") or c for c in columns], cells))
    return found
