"""The report as one page: no external resource, plots as inline SVG, readable in light and dark."""

from __future__ import annotations

from html import escape
from typing import Any

from kvmsentry.bench import counters, host, plots, session, table
from kvmsentry.bench.catalogue import GROUPS, UNITS

STYLE = """
:root{--back:#fbfaf8;--card:#fff;--ink:#1d2129;--soft:#667085;--line:#e6e3dc;--grid:#eceae4;--accent:#2457d6;
--native:#8a919e;--kvm:#2457d6;--ptrace:#d9730d;--runsc-ptrace:#148a72;--runsc-kvm:#9747c7;--bad:#b42318;--badback:#fef3f2}
@media(prefers-color-scheme:dark){:root{--back:#14161a;--card:#1c1f25;--ink:#e8eaed;--soft:#98a1b0;--line:#2d323b;
--grid:#2a2e36;--accent:#7ea2ff;--native:#8a919e;--kvm:#7ea2ff;--ptrace:#f2a154;--runsc-ptrace:#4fc7ad;
--runsc-kvm:#c792ea;--bad:#ff9b8f;--badback:#3a1f1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 4px}
p{margin:4px 0 14px;max-width:75ch}
.soft{color:var(--soft)} .small{font-size:13px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(185px,1fr));gap:12px;margin:22px 0 8px}
.tile b{display:block;font-size:25px;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(325px,1fr));gap:12px}
.cards h3{font-size:14px;margin:0} .cards p{margin:0 0 6px;font-size:12.5px;color:var(--soft);min-height:38px}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin:8px 0 12px;font-size:13px;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
.bad{background:var(--badback);border:1px solid var(--bad);border-radius:10px;padding:12px 18px;margin:18px 0}
.bad ul{margin:4px 0;padding-left:20px;overflow-wrap:anywhere} .bad b{color:var(--bad)}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:12.5px}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr:last-child td{border-bottom:0} tr.group td{font-weight:650;padding-top:16px}
td small{color:var(--soft);display:block;line-height:1.2} td em{font-style:normal;color:var(--bad)}
details summary{cursor:pointer;color:var(--accent);margin:10px 0}
.wide svg{min-width:640px}
svg{display:block;max-width:100%;height:auto;font:12px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
svg text{fill:var(--ink)} svg .soft{fill:var(--soft)} svg .grid{stroke:var(--grid)} svg .axis{stroke:var(--soft)}
code{font:13px ui-monospace,"DejaVu Sans Mono",monospace}
"""


def page(facts: dict[str, Any]) -> str:
    """The whole page for what Session.facts() tells."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>kvmsentry bench</title><style>{STYLE}</style><main>",
        "<h1>What sandboxes cost on this machine</h1>",
        f"<p class=soft>{escape(host.sentence(facts['machine']))}</p>",
        _tiles(facts),
        _failures(facts),
        _ratios(facts),
        _workloads(facts),
        _startup(facts),
        _idle(facts),
        _figures(facts),
        _counters(facts),
        _method(facts),
        "</main></html>\n",
    ]
    return "".join(parts)


def _row(facts: dict[str, Any], name: str) -> dict[str, Any]:
    for row in facts["benchmarks"]:
        if row["name"] == name:
            results: dict[str, Any] = row["results"]
            return results
    return {}


def _tiles(facts: dict[str, Any]) -> str:
    """What one wants to know first, of the best platform of ours that ran."""
    ours = [p["name"] for p in facts["platforms"] if p["name"] in ("kvm", "ptrace") and not p["failure"]]
    if not ours:
        return ""
    place = ours[0]
    tiles = []
    for name, scale, unit, what in (
        ("getpid", 1e3, "µs", "a system call"),
        ("true", 1e6, "ms", "a sandbox from start to end"),
        ("python", 1e6, "ms", "python3 starts in a new one"),
        ("fork", 1e3, "µs", "fork and wait"),
    ):
        result = _row(facts, name).get(place, {})
        if "median" in result:
            times = f", {table.ratio(result['ratio'])} native" if "ratio" in result else ""
            tiles.append((f"{table.number(result['median'] / scale)} {unit}", f"{what}{times}"))
    idle = facts["idle"].get(place, {})
    if "pss" in idle:
        tiles.append((f"{idle['pss'] / 1e6:.0f} MB", "memory of an idle sandbox"))
    cells = "".join(f"<div class='card tile'><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in tiles)
    return f"<div class=tiles>{cells}</div><p class='small soft'>On the {escape(place)} platform.</p>" if cells else ""


def _failures(facts: dict[str, Any]) -> str:
    lines = session.failures(facts)
    lines += ["The run was interrupted: these are the figures until then."] if facts["interrupted"] else []
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<div class=bad><b>Not everything worked</b><ul>{items}</ul></div>"


def _legend(places: list[str]) -> str:
    items = "".join(f"<span><i style='background:var(--{p})'></i>{escape(p)}</span>" for p in places)
    return f"<div class=legend>{items}</div>"


def _ratios(facts: dict[str, Any]) -> str:
    places = [name for name in table.names(facts) if name != "native"]
    groups = []
    for group, title in GROUPS.items():
        rows = [(r["name"], r["what"], r["results"], UNITS[r["unit"]], r["unit"]) for r in facts["benchmarks"]
                if r["group"] == group and any("ratio" in r["results"].get(p, {}) for p in places)]  # fmt: skip
        if rows:
            groups.append((title, rows))
    if not groups:
        return ""
    return (
        "<h2>How many times as long as natively</h2><p class=soft>Medians; the line through a dot is the range of all "
        "rounds. The scale is logarithmic: each step is ten times the one before. Left is better.</p>"
        f"<div class='card wide'>{_legend(places)}{plots.ratios(groups, places)}</div>"
    )


def _workloads(facts: dict[str, Any]) -> str:
    cards = []
    for row in facts["benchmarks"]:
        if row["group"] == "workloads" and any("median" in result for result in row["results"].values()):
            bars = []
            for place in table.names(facts):
                result = row["results"].get(place)
                if result:
                    middle, spread, times = table.cell(result, row["unit"], place == "native")
                    scale = UNITS[row["unit"]]
                    value = result.get("median", 0.0) / scale
                    reach = (result["low"] / scale, result["high"] / scale) if "median" in result else None
                    shown = f"{middle} {row['unit']}  {times}" if "median" in result else "failed"
                    bars.append((place, value, shown, reach, result.get("failure") or spread))
            cards.append(
                f"<div class=card><h3>{escape(row['name'])}</h3><p>{escape(row['what'])}</p>{plots.bars(bars)}</div>"
            )
    if not cards:
        return ""
    return (
        "<h2>Workloads</h2><p class=soft>From start to end, with the sandbox's own start and end in it, unless a row "
        f"says otherwise. Shorter is better.</p><div class=cards>{''.join(cards)}</div>"
    )


def _startup(facts: dict[str, Any]) -> str:
    measured = [(p, facts["startup"][p]) for p in table.names(facts) if "total" in facts["startup"].get(p, {})]
    if not measured:
        return ""
    return (
        "<h2>Start-up</h2><p class=soft>From the command to the end of a program that writes one byte; medians, in ms. "
        f"Platforms of ours are broken into phases.</p><div class=card>{plots.phases(measured)}</div>"
    )


def _idle(facts: dict[str, Any]) -> str:
    rows = [(p, facts["idle"][p]) for p in table.names(facts) if "pss" in facts["idle"].get(p, {})]
    if not rows:
        return ""
    memory: list[plots.Bar] = [
        (p, v["pss"] / 1e6, f"{v['pss'] / 1e6:.1f} MB", None, f"{v['processes']} processes") for p, v in rows
    ]
    used: list[plots.Bar] = [(p, v["cpu"], f"{v['cpu']:.0f} ms in {v['seconds']:.0f} s", None, "") for p, v in rows]
    return (
        "<h2>Idle</h2><p class=soft>A sandbox whose application sleeps.</p><div class=cards>"
        f"<div class=card><h3>Memory</h3><p>proportional set size over the process tree</p>{plots.bars(memory)}</div>"
        f"<div class=card><h3>Processor time</h3><p>user and system, over the same tree</p>{plots.bars(used)}</div>"
        "</div>"
    )


def _figures(facts: dict[str, Any]) -> str:
    places = table.names(facts)
    lines = ["<tr><th>" + "".join(f"<th>{escape(place)}" for place in places)]
    for group, title in GROUPS.items():
        rows = [row for row in facts["benchmarks"] if row["group"] == group and row["results"]]
        if rows:
            lines.append(f"<tr class=group><td colspan={len(places) + 1}>{escape(title)}")
        for row in rows:
            cells = [f"<td title='{escape(row['what'], quote=True)}'>{escape(row['name'])}, {row['unit']}"]
            for place in places:
                result = row["results"].get(place)
                middle, spread, times = table.cell(result, row["unit"], place == "native")
                if result and "median" not in result:
                    middle = "<em>failed</em>"
                cells.append(f"<td>{middle}{f' <b>{times}</b>' if times else ''}<small>{spread}</small>")
            lines.append("<tr>" + "".join(cells))
    if len(lines) == 1:
        return ""
    return (
        "<h2>All figures</h2><p class=soft>Median, ratio to native, least and greatest round.</p>"
        f"<div class=card><table>{''.join(lines)}</table></div>"
    )


def _counters(facts: dict[str, Any]) -> str:
    tables = []
    for title, columns, rows in counters.tables(facts["counters"]):
        lines = [f"<tr><th>{escape(title)}" + "".join(f"<th>{escape(column)}" for column in columns)]
        for name, cells in rows.items():
            lines.append(f"<tr><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells))
        tables.append(f"<div class=card><table>{''.join(lines)}</table></div><br>")
    if not tables:
        return ""
    return (
        "<details><summary>The machine's own counters, a run each: why vCPUs leave the guest</summary>"
        f"<p class=soft>{escape(counters.EXPLAINED)}</p>{''.join(tables)}</details>"
    )


def _method(facts: dict[str, Any]) -> str:
    noise = host.noise_sentence(facts["noise"], facts["machine"]["processors"]) if facts["noise"] else ""
    left = [f"{row['name']} ({row['left_out']})" for row in facts["benchmarks"] if "left_out" in row]
    absent = f" Left out: {escape(', '.join(left))}." if left else ""
    return (
        "<h2>How it was measured</h2>"
        f"<p class=soft>{facts['rounds']} rounds after one that is not counted; within a round the platforms take "
        "turns. "
        "Micro programs measure inside, five slices each, the middle one counts. Every program checks its results. "
        f"{escape(noise)}.{absent} To repeat: <code>kvmsentry bench --html FILE</code>.</p>"
    )
