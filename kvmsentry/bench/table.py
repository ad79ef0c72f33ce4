"""The figures as text: a table for the terminal, and one in Markdown for the docs."""

from __future__ import annotations

from typing import Any

from kvmsentry.bench import counters, host, session
from kvmsentry.bench.catalogue import GROUPS, UNITS
from kvmsentry.bench.startup import PHASES


def number(value: float) -> str:
    """Three digits that count, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def ratio(value: float) -> str:
    """×1.2, ×340."""
    return f"×{value:,.0f}" if value >= 10 else f"×{value:.1f}" if value >= 1.95 else f"×{value:.2f}"


def cell(result: dict[str, Any] | None, unit: str, native: bool) -> tuple[str, str, str]:
    """(median, spread, ratio) as text; a failure as its first words."""
    if not result:
        return "-", "", ""
    if "median" not in result:
        return "failed", "", ""
    scale = UNITS[unit]
    spread = f"{number(result['low'] / scale)}–{number(result['high'] / scale)}"
    shown = "" if native or "ratio" not in result else ratio(result["ratio"])
    return number(result["median"] / scale), spread, shown


def grid(rows: list[list[str]], left: int = 1) -> list[str]:
    """Lines of columns as wide as they need to be, the first `left` of them flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def names(facts: dict[str, Any]) -> list[str]:
    """The platforms in the order they were run, without those that failed before they gave any figure."""
    gave = {place for row in facts["benchmarks"] for place, result in row["results"].items() if "median" in result}
    return [p["name"] for p in facts["platforms"] if not p["failure"] or p["name"] in gave]


def text(facts: dict[str, Any]) -> str:
    """Everything for a terminal."""
    places = names(facts)
    parts: list[list[str]] = []
    for group, title in GROUPS.items():
        rows = [row for row in facts["benchmarks"] if row["group"] == group and row["results"]]
        if rows:
            parts.append(_group(rows, places, title))
    if facts["startup"]:
        parts.append(_startup(facts, places))
    parts += [_counters(table) for table in counters.tables(facts["counters"])]
    if facts["idle"]:
        parts.append(_idle(facts["idle"], places))
    notes = [host.sentence(facts["machine"]), host.noise_sentence(facts["noise"], facts["machine"]["processors"])]
    notes += [f"left out: {row['name']} ({row['left_out']})" for row in facts["benchmarks"] if "left_out" in row]
    notes += [f"FAILED: {line}" for line in session.failures(facts)]
    if facts["interrupted"]:
        notes.append("INTERRUPTED: these are the figures until then")
    parts.append(notes)
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _group(rows: list[dict[str, Any]], places: list[str], title: str) -> list[str]:
    lines = [[title, ""]]
    for place in places:
        lines[0] += [place, "", ""] if place != "native" else [place, ""]
    for row in rows:
        line = [f"  {row['name']}", row["unit"]]
        for place in places:
            middle, spread, times = cell(row["results"].get(place), row["unit"], place == "native")
            line += [middle, spread] + ([times] if place != "native" else [])
        lines.append(line)
    return grid(lines, left=2)


def _startup(facts: dict[str, Any], places: list[str]) -> list[str]:
    measured = {p: facts["startup"][p] for p in places if p in facts["startup"] and "total" in facts["startup"][p]}
    lines = [["start-up, ms", *measured]]
    for name, what in PHASES.items():
        if any(name in value.get("phases", {}) for value in measured.values()):
            shown = [number(v["phases"][name]) if name in v.get("phases", {}) else "" for v in measured.values()]
            lines.append([f"  {what}", *shown])
    lines.append(["  to the first byte of output, all told", *[number(value["first"]) for value in measured.values()]])
    lines.append(["  to the end, all told", *[number(value["total"]) for value in measured.values()]])
    return grid(lines)


def _counters(table: counters.Table) -> list[str]:
    return grid([[table.title, *table.columns], *[[f"  {name}", *cells] for name, cells in table.rows.items()]])


def _idle(idle: dict[str, Any], places: list[str]) -> list[str]:
    lines = [["idle", "PSS, MB", "processor, ms", "in s", "processes"]]
    for place in places:
        value = idle.get(place)
        if value and "pss" in value:
            cells = [f"{value['pss'] / 1e6:.1f}", f"{value['cpu']:.0f}", f"{value['seconds']:.0f}"]
            lines.append([f"  {place}", *cells, str(value["processes"])])
    return grid(lines)


def markdown(facts: dict[str, Any]) -> str:
    """Everything as Markdown tables: figures with spread and ratio, start-up, idle."""
    places = names(facts)
    lines = _head("", places)
    for group, title in GROUPS.items():
        rows = [row for row in facts["benchmarks"] if row["group"] == group and row["results"]]
        if rows:
            lines.append(f"| **{title}** |" + " |" * len(places))
        for row in rows:
            cells = []
            for place in places:
                middle, spread, times = cell(row["results"].get(place), row["unit"], place == "native")
                cells.append(" ".join(filter(None, [middle, f"({spread})" if spread else "", times])))
            lines.append(f"| {row['name']}, {row['unit']} | " + " | ".join(cells) + " |")
    measured = {p: facts["startup"][p] for p in places if "total" in facts["startup"].get(p, {})}
    if measured:
        lines += ["", *_head("start-up, ms", list(measured))]
        for name, what in {**PHASES, "total": "all told"}.items():
            shown = [v["total"] if name == "total" else v.get("phases", {}).get(name) for v in measured.values()]
            if any(ms is not None for ms in shown):
                lines.append(f"| {what} | " + " | ".join("" if ms is None else number(ms) for ms in shown) + " |")
    idle = {p: facts["idle"][p] for p in places if "pss" in facts["idle"].get(p, {})}
    if idle:
        lines += ["", *_head("idle", list(idle))]
        lines.append("| PSS, MB | " + " | ".join(f"{v['pss'] / 1e6:.1f}" for v in idle.values()) + " |")
        lines.append("| processor, ms/s | " + " | ".join(number(v["cpu"] / v["seconds"]) for v in idle.values()) + " |")
        lines.append("| processes | " + " | ".join(str(v["processes"]) for v in idle.values()) + " |")
    for table in counters.tables(facts["counters"]):
        lines += ["", *_head(table.title, table.columns)]
        lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in table.rows.items()]
    return "\n".join(lines) + "\n"


def _head(title: str, columns: list[str]) -> list[str]:
    return [f"| {title} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
