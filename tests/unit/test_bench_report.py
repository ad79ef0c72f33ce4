"""The benchmark's choices, bookkeeping and reports, without a sandbox: nothing here runs longer than /bin/true."""

from __future__ import annotations

import json
import os
import re
import sys
import xml.dom.minidom
from typing import Any

import pytest

from kvmsentry.bench import catalogue, counters, host, measure, session, startup, table
from kvmsentry.bench.html import page
from kvmsentry.bench.platforms import Platform, choose
from kvmsentry.cli import main as cli
from kvmsentry.errors import UserError

MACHINE = {"processor": "<Tick & Tock>", "processors": 2, "memory": "4 GiB", "virtual": True, "kernel": "6.1",
           "kvm": "kvm_amd (AMD SVM)", "python": "3.11.7", "kvmsentry": "0"}  # fmt: skip


def result(*samples: float, native: float = 0) -> dict[str, Any]:
    made = session.Result()
    for sample in samples:
        made.add(sample, sample * 0.9)
    return made.facts(session.Result([native]) if native else None)


def facts(**changed: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "format": session.FORMAT,
        "machine": MACHINE,
        "noise": {"seconds": 9.0, "load_before": 0.1, "load_after": 0.2, "steal": 0.0, "others": 1.0, "idle": 50.0},
        "rounds": 3,
        "quick": False,
        "interrupted": False,
        "platforms": [{"name": n, "title": n, "failure": ""} for n in ("native", "kvm", "ptrace")],
        "benchmarks": [
            {
                "name": "getpid",
                "group": "calls",
                "unit": "µs",
                "what": "a call",
                "results": {
                    "native": result(100, 120, 110),
                    "kvm": result(1000, 1100, 5000, native=110),
                    "ptrace": {"failure": "status 1: <script>alert(1)</script>"},
                },
            },
            {
                "name": "true",
                "group": "workloads",
                "unit": "ms",
                "what": "all",
                "results": {"native": result(2e6), "kvm": result(9e7, native=2e6)},
            },
            {"name": "redis", "group": "workloads", "unit": "µs", "what": "r", "results": {}, "left_out": "not there"},
        ],
        "counters": {"true": {"kvm": {"events": 29, "doorbells": 4, "exits": 3, "exit_park": 2, "exit_fault": 1,
                     "exit_slow": 0, "seconds": 0.5}}},  # fmt: skip
        "startup": {
            "native": {"total": 2.0, "first": 1.0, "times": 2},
            "kvm": {"total": 90.0, "first": 80.0, "times": 2, "phases": {"python": 50.0, "first": 30.0, "end": 10.0}},
        },
        "idle": {"kvm": {"pss": 30e6, "cpu": 1.0, "seconds": 5.0, "processes": 3}},
    }
    return {**value, **changed}


def test_choice_by_name_group_and_none() -> None:
    assert catalogue.choose([]) == [*catalogue.BENCHMARKS, *catalogue.EXTRAS]
    assert catalogue.choose(["idle", "fork", "getpid"]) == ["getpid", "fork", "idle"]
    assert catalogue.choose(["memory"]) == ["mmap", "touch"]


def test_unknown_benchmark_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["bench", "--only", "getpid,sleepwalk"]) == 125
    said = capsys.readouterr().err
    assert "sleepwalk" in said and "sh100" in said and "workloads" in said and said.count("\n") == 1


def test_unknown_platform_lists_the_known(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="'xen'.*native, kvm, ptrace, runsc-ptrace"):
        choose(["xen"], False, str(tmp_path))


def test_a_named_platform_stays_with_its_reason(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmsentry.bench.platforms.DEVICE", str(tmp_path / "kvm"))
    assert [p.name for p in choose([], False, str(tmp_path)) if p.name != "ptrace"] == ["native"]
    named = choose(["kvm"], False, str(tmp_path))
    assert [p.name for p in named] == ["native", "kvm"] and "not there" in named[1].reason


def test_one_program_serves_many_figures() -> None:
    made = session.steps(["getpid", "stat", "fork", "true", "cpu"])
    assert [[row.name for row in step.rows] for step in made] == [["getpid", "stat"], ["fork"], ["true"], ["cpu"]]


def test_figures_are_json_lines_and_nothing_else() -> None:
    text = (
        'noise\n{"name": "a", "ns": 5}\n{"name": "b", "error": "no"}\n{"name": "c"}\n[1]\n{"name": 3, "ns": 1}\n{"name'
    )
    assert sorted(measure.figures(text)) == ["a", "b"]


def test_median_range_ratio() -> None:
    found = result(3, 1, 2, native=4)
    assert (found["median"], found["low"], found["high"], found["ratio"]) == (2, 1, 3, 0.5)
    assert found["least"] == pytest.approx(0.9)


def fake(name: str, script: str) -> Platform:
    """A platform that runs `script` in place of the command, which are its arguments."""
    return Platform(name, name, ["/bin/sh", "-c", script, "sh"], ours=False)


def run_session(tmp_path: Any, chosen: list[str], *places: Platform) -> dict[str, Any]:
    made = session.Session(chosen, [Platform("native", "native", []), *places], 1, True, str(tmp_path))
    made.run()
    return made.facts()


def test_a_platform_that_breaks_is_reported_and_the_rest_goes_on(tmp_path: Any) -> None:
    flag = tmp_path / "broken"
    breaking = fake("kvm", f'[ -e {flag} ] && {{ echo "on fire" >&2; exit 3; }}; "$@"; touch {flag}')
    found = run_session(tmp_path, ["true"], breaking, fake("ptrace", '"$@"'))
    results = found["benchmarks"][0]["results"]
    assert "on fire" in results["kvm"]["failure"] and "median" not in results["kvm"]
    assert results["ptrace"]["ratio"] > 0
    assert any("kvm" in line and "on fire" in line for line in session.failures(found))


def test_a_benchmark_that_fails_leaves_its_platform_in_use(tmp_path: Any) -> None:
    picky = fake("kvm", 'case "$*" in *sleepy*) exit 9;; esac; "$@"')
    made = session.Session([], [picky], 1, True, str(tmp_path))
    row = catalogue.Benchmark("x", "workloads", "ms", "x", argv=("/bin/echo", "sleepy"))
    made._step(session.Step([row]), picky, 0)
    assert made.results["x"]["kvm"].failure == "status 9" and picky.reason == ""


def test_rows_after_one_that_hangs_are_run_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Platform("native", "native", [])
    rows = [catalogue.Benchmark(n, "calls", "µs", n, "calls", limit=0.5) for n in ("a", "b", "c")]
    made = session.Session([], [place], 1, True, str(tmp_path))
    script = tmp_path / "program"
    script.write_text(
        '#!/bin/sh\nshift 2\nfor n; do [ $n = b ] && exec sleep 100; echo \'{"name": "\'$n\'", "ns": 7}\'; done\n'
    )
    script.chmod(0o755)
    made.built, made.scratch, made.work = {"calls": str(script)}, str(tmp_path), str(tmp_path)
    made._step(session.Step(rows), place, 1)
    assert [made.results[n]["native"].samples for n in "abc"] == [[7], [], [7]]
    assert made.results["b"]["native"].failure.startswith("time limit")


def test_interrupt_keeps_what_there_is(tmp_path: Any) -> None:
    made = session.Session(["true", "idle"], [Platform("native", "native", [])], 5, True, str(tmp_path))
    told = []

    def progress(text: str) -> None:
        told.append(text)
        if len(told) == 4:
            raise KeyboardInterrupt

    made.progress = progress
    made.run()
    found = made.facts()
    assert found["interrupted"] and len(found["benchmarks"][0]["results"]["native"]["samples"]) == 1
    assert "INTERRUPTED" in table.text(found)


def test_nothing_outlives_a_time_limit(tmp_path: Any) -> None:
    note = tmp_path / "pid"
    outcome = measure.run(["/bin/sh", "-c", f"sleep 1000 & echo $! > {note}; wait"], 0.5)
    assert outcome.late and "time limit" in outcome.failure(0.5)
    pid = int(note.read_text())
    state = open(f"/proc/{pid}/stat").read().split()[2] if os.path.exists(f"/proc/{pid}/stat") else "gone"
    assert state in ("Z", "gone")


def test_an_end_is_noticed_when_it_comes_not_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Popen.wait(limit) sleeps between looks, which made all times multiples of 50 ms."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it slept"))
    outcome = measure.run(["/bin/sleep", "0.3"], 60)
    assert outcome.status == 0 and not outcome.late and outcome.took >= 300_000_000


def test_phases_add_up_to_the_whole() -> None:
    outcome = measure.Outcome(0, "1", "", begin=100, first=190, end=200, late=False)
    spans = startup.split(outcome, [("python", 110), ("exec", 160), ("run", 195)])
    assert spans == {"python": 10, "exec": 50, "first": 30, "end": 10}
    with pytest.raises(startup.Failed):
        startup.split(outcome, None)


def test_log_values(tmp_path: Any) -> None:
    log = tmp_path / "log"
    log.write_text("[ 0.1] counters: {'events': 1}\n[ 0.2] counters: {'events': 2}\n[ 0.3] times: __import__('os')\n")
    assert session.logged(str(log), "counters: ") == {"events": 2}
    assert session.logged(str(log), "times: ") is None and session.logged(str(tmp_path / "no"), "x") is None


def test_table_has_figures_ratios_and_failures() -> None:
    text = table.text(facts())
    assert re.search(r"getpid +µs +0\.11 +0\.10–0\.12 +1\.10 +1\.00–5\.00 +×10 +failed", text)
    assert "FAILED: getpid on ptrace: status 1" in text and "left out: redis (not there)" in text
    assert "| getpid, µs | 0.11 (0.10–0.12) | 1.10 (1.00–5.00) ×10 | failed |" in table.markdown(facts())


def test_page_stands_alone_and_escapes() -> None:
    text = page(facts())
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;Tick &amp; Tock&gt;" in text
    assert not re.search(r"(src|href)=|url\(|@import", text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 5  # ratios, one workload, phases, idle twice
    for drawing in drawings:
        xml.dom.minidom.parseString(drawing)
        assert "nan" not in drawing and "inf" not in drawing


def test_exits_a_second_by_reason_in_every_report() -> None:
    found = facts()
    assert re.search(r"exits a second, kvm +park +fault +doorbells\n +true +4.0 +2.0 +8.0\n", table.text(found))
    assert "| exits a second, kvm | park | fault | doorbells |" in table.markdown(found)
    assert "| true | 4.0 | 2.0 | 8.0 |" in table.markdown(found)
    assert "<th>exits a second, kvm<th>park<th>fault<th>doorbells<tr><td>true<td>4.0<td>2.0<td>8.0" in page(found)


def test_counters_of_runs_that_differ() -> None:
    """One run was cut off before its times were known, another is of ptrace, a third was made by an older version."""
    made = counters.tables(
        {
            "a": {"kvm": {"events": 1, "spins": 7, "exit_port": 5}, "ptrace": {"stop_syscall": 30, "seconds": 2.0}},
            "b": {"kvm": {"events": 20000, "exits": 3, "exit_port": 0, "exit_host_error": 40, "seconds": 2.0}},
        }
    )
    assert [(t.title, t.columns) for t in made] == [
        ("counters, kvm", ["events", "spins", "exits"]),
        ("exits a second, kvm", ["host error", "spins"]),
        ("stops a second, ptrace", ["syscall"]),
    ]
    assert made[0].rows == {"a": ["1", "7", "0"], "b": ["20,000", "0", "3"]} and made[1].rows == {"b": ["20", "0"]}
    assert made[2].rows == {"a": ["15"]}


def test_seconds_of_the_application() -> None:
    assert counters.with_seconds({"a": 1}, [("python", 5), ("exec", 10**9), ("run", 3 * 10**9)])["seconds"] == 2
    for marks in (None, [], [("exec", 5)], [("exec", 5), ("run", 5)]):
        assert counters.with_seconds({"a": 1}, marks) == {"a": 1}


@pytest.mark.parametrize("missing", ["benchmarks", "startup", "idle", "counters"])
def test_reports_of_less(missing: str) -> None:
    less = facts(**{missing: [] if missing == "benchmarks" else {}})
    assert page(less) and table.text(less) and table.markdown(less)


def test_from_json_to_page(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text(json.dumps(facts()))
    assert cli.call(["bench", "--from", str(tmp_path / "in"), "--html", str(tmp_path / "out")]) == 1  # a row failed
    assert "×10" in capsys.readouterr().out and (tmp_path / "out").read_text().startswith("<!doctype html>")
    (tmp_path / "in").write_text("{}")
    assert cli.call(["bench", "--from", str(tmp_path / "in")]) == 125


def test_an_unwritable_report_is_found_out_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["bench", "--html", "/nowhere/report.html"]) == 125
    assert "/nowhere/report.html" in capsys.readouterr().err


def test_noise_adds_up() -> None:
    noise = host.Noise().finish()
    assert 0 <= noise["idle"] <= 100 and 0 <= noise["others"] <= 100
    assert "not quiet" in host.noise_sentence({**noise, "load_before": 9.0, "others": 60.0}, 2)
    assert sys.version_info >= (3, 11) and host.sentence(host.describe())
