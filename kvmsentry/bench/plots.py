"""Inline SVG: dots on a logarithmic scale, bars, stacked phases. Colours are the page's CSS variables."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from kvmsentry.bench import table
from kvmsentry.bench.startup import PHASES

WIDTH = 1000
LABEL = 120  # pixels for names at the left
ROW = 26
Bar = tuple[str, float, str, "tuple[float, float] | None", str]  # platform, value, words, reach, tooltip


def _text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {extra}>{escape(words)}</text>"


def ratios(groups: list[tuple[str, list[Any]]], places: list[str]) -> str:
    """Rows of dots at ratio to native; `groups`: (title, rows of (name, what, results, ns in a unit, unit))."""
    spans = [
        edge
        for _, rows in groups
        for _, _, results, _, _ in rows
        for place in places
        if "ratio" in results.get(place, {})
        for edge in _reach(results[place], results["native"])
    ]
    low = min(0, math.floor(math.log10(min(spans))))
    high = max(1, math.ceil(math.log10(max(spans))))
    left, right = LABEL, WIDTH - 70

    def at(value: float) -> float:
        return left + (math.log10(max(value, 10.0**low)) - low) / (high - low) * (right - left)

    rows_out: list[str] = []
    y = 30.0
    for title, rows in groups:
        rows_out.append(_text(0, y + 8, title, extra="font-weight='650'"))
        y += ROW
        for name, what, results, scale, unit in rows:
            rows_out.append(f"<line class='grid' x1='{left}' x2='{right}' y1='{y + 4:.1f}' y2='{y + 4:.1f}'/>")
            rows_out.append(f"<g><title>{escape(what)}</title>{_text(8, y + 8, name)}</g>")
            for place in reversed(places):  # ours last, on top
                result = results.get(place, {})
                if "ratio" in result:
                    rows_out.append(_dot(place, result, results["native"], at, y + 4, scale, unit, what))
            best = min((r["ratio"], p) for p in places if "ratio" in (r := results.get(p, {})))
            rows_out.append(_text(WIDTH, y + 8, table.ratio(best[0]), "end", "class='soft'"))
            y += ROW
        y += 10
    height = y + 6
    axis = []
    for power in range(low, high + 1):
        x = at(10.0**power)
        kind = "axis" if power == 0 else "grid"
        axis.append(f"<line class='{kind}' x1='{x:.1f}' x2='{x:.1f}' y1='22' y2='{height - 8:.1f}'/>")
        words = "native" if power == 0 else f"×{10**power:,}" if power > 0 else f"×{10.0**power:g}"
        axis.append(_text(x, 14, words, "middle", "class='soft'"))
    axis.append(_text(WIDTH, 14, "best", "end", "class='soft'"))
    return f"<svg viewBox='0 0 {WIDTH} {height:.0f}' role='img'>{''.join(axis)}{''.join(rows_out)}</svg>"


def _reach(result: dict[str, Any], native: dict[str, Any]) -> tuple[float, float]:
    middle = native["median"]
    return result["low"] / middle, result["high"] / middle


def _dot(place: str, result: dict[str, Any], native: dict[str, Any], at: Any, y: float, scale: float, unit: str,
         what: str) -> str:  # fmt: skip
    low, high = _reach(result, native)
    x = at(result["ratio"])
    words = (
        f"{place}: {table.number(result['median'] / scale)} {unit}, {table.ratio(result['ratio'])} native "
        f"({table.number(result['low'] / scale)} to {table.number(result['high'] / scale)})\n{what}"
    )
    colour = f"var(--{place})"
    return (
        f"<g><title>{escape(words)}</title>"
        f"<line x1='{at(low):.1f}' x2='{at(high):.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='{colour}' stroke-width='3' "
        f"stroke-opacity='.35' stroke-linecap='round'/>"
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5.5' fill='{colour}' stroke='var(--card)' stroke-width='1.5'/></g>"
    )


def bars(rows: list[Bar]) -> str:
    """Horizontal bars with the words at the right of each, a thin line for its reach."""
    width, label, room = 360, 84, 126
    most = max([value for _, value, _, _, _ in rows] + [reach[1] for _, _, _, reach, _ in rows if reach] + [1e-9])
    out = []
    for i, (place, value, words, reach, tip) in enumerate(rows):
        y = i * 24
        length = max(value / most * (width - label - room), 1.0)
        colour = f"var(--{place})"
        out.append(f"<g><title>{escape(tip)}</title>" + _text(0, y + 15, place, extra="class='soft'"))
        if words == "failed":
            out.append(_text(label, y + 15, "failed", extra="style='fill:var(--bad)'") + "</g>")
            continue
        out.append(f"<rect x='{label}' y='{y + 4}' width='{length:.1f}' height='14' rx='3' fill='{colour}'/>")
        end = label + length
        if reach is not None:
            a, b = (label + edge / most * (width - label - room) for edge in reach)
            out.append(f"<line x1='{a:.1f}' x2='{b:.1f}' y1='{y + 11}' y2='{y + 11}' stroke='var(--ink)' "
                       "stroke-opacity='.55' stroke-width='1.5'/>")  # fmt: skip
            end = max(end, b)
        out.append(_text(end + 6, y + 15, words, extra="font-weight='600'") + "</g>")
    return f"<svg viewBox='0 0 {width} {len(rows) * 24}' role='img'>{''.join(out)}</svg>"


def _shade(index: int) -> str:
    """A run of hues from blue through green to sand, alike in lightness."""
    hue = 225 - index * (190 / (len(PHASES) - 1))
    return f"hsl({hue:.0f} 52% {56 if index % 2 else 48}%)"


def phases(measured: list[tuple[str, dict[str, Any]]]) -> str:
    """A stacked bar a platform, and the phases in words with a column of ms a platform."""
    most = max(value["total"] for _, value in measured)
    left, right = LABEL, WIDTH - 60
    out = []
    y = 0.0
    for place, value in measured:
        out.append(_text(0, y + 21, place))
        x = float(left)
        spans = value.get("phases") or {"": value["total"]}
        for name, ms in spans.items():
            length = ms / most * (right - left)
            index = list(PHASES).index(name) if name in PHASES else -1
            colour = _shade(index) if index >= 0 else f"var(--{place})"
            tip = f"{PHASES.get(name, 'from start to end')}: {table.number(ms)} ms"
            out.append(f"<g><title>{escape(tip)}</title><rect x='{x:.1f}' y='{y + 4}' "
                       f"width='{max(length - 1, 0.5):.1f}' height='26' rx='2' fill='{colour}'/>")  # fmt: skip
            if length > 7 * len(name) + 8 and name:
                out.append(_text(x + length / 2, y + 21, name, "middle", "style='fill:#fff'"))
            out.append("</g>")
            x += length
        out.append(_text(x + 6, y + 21, f"{table.number(value['total'])} ms", extra="font-weight='600'"))
        y += 38
    y += 14
    columns = [place for place, value in measured if value.get("phases")]
    for i, place in enumerate(columns):
        out.append(_text(560 + i * 110, y + 10, place, "end", "class='soft'"))
    for index, (name, what) in enumerate(PHASES.items()):
        found = [value["phases"].get(name) for _, value in measured if value.get("phases")]
        if not any(ms is not None for ms in found):
            continue
        y += 22
        out.append(f"<rect x='0' y='{y}' width='12' height='12' rx='2' fill='{_shade(index)}'/>")
        out.append(_text(20, y + 10, name) + _text(100, y + 10, what, extra="class='soft'"))
        for i, ms in enumerate(found):
            out.append(_text(560 + i * 110, y + 10, f"{table.number(ms)} ms" if ms is not None else "", "end"))
    return f"<svg viewBox='0 0 {WIDTH} {y + 24:.0f}' role='img'>{''.join(out)}</svg>"
