"""The benchmark's C programs natively: they compile, check themselves, print a figure for every row of theirs."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

from kvmsentry.bench import catalogue, measure, programs
from kvmsentry.bench.catalogue import BENCHMARKS
from kvmsentry.errors import UserError

MICRO = sorted({row.program for row in BENCHMARKS.values() if row.program} - {"serve"})


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return programs.build(sorted(programs.PROGRAMS), str(tmp_path_factory.mktemp("bench")))


def rows_of(program: str) -> list[str]:
    return [row.name for row in BENCHMARKS.values() if row.program == program]


@pytest.mark.parametrize("program", MICRO)
def test_figures_for_every_row(program: str, built: dict[str, str], tmp_path: pathlib.Path) -> None:
    done = subprocess.run([built[program], "1", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found = measure.figures(done.stdout)
    assert list(found) == rows_of(program)
    assert all(0 < row["min"] <= row["ns"] <= row["max"] for row in found.values())
    assert os.listdir(tmp_path) == []


def test_a_wrong_answer_is_an_error(built: dict[str, str]) -> None:
    done = subprocess.run([built["calls"], "1", "/nowhere", "getpid", "stat"], capture_output=True, text=True)
    found = measure.figures(done.stdout)
    assert done.returncode == 1 and "ns" in found["getpid"] and "No such file" in found["stat"]["error"]


def test_first_byte(built: dict[str, str]) -> None:
    assert subprocess.run([built["first"]], capture_output=True, timeout=10).stdout == b"1"


def test_serve_tells_what_its_server_did(built: dict[str, str]) -> None:
    argv = [built["serve"], "x", "http", "1", "1", "1", "--", "sh", "-c", "exit 3"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ended with status 0x300" in done.stderr and done.stdout == ""


def test_serve_against_a_web_server(built: dict[str, str]) -> None:
    from kvmsentry.bench.session import free_port

    port = str(free_port())
    server = (
        "import http.server as h\n"
        "class H(h.SimpleHTTPRequestHandler):\n"
        "    protocol_version = 'HTTP/1.1'\n"
        f"h.ThreadingHTTPServer(('127.0.0.1', {port}), H).serve_forever()"
    )
    argv = [built["serve"], "web", "http", port, "2", "9", "--", "python3", "-c", server]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert measure.figures(done.stdout)["web"]["calls"] == 9, done.stderr


def test_no_compiler(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not installed"):
        programs.build(["calls"], str(tmp_path))


def test_every_source_is_in_the_catalogue() -> None:
    sources = {path.stem for path in pathlib.Path(catalogue.SOURCES).glob("*.c")}
    assert sources == set(programs.PROGRAMS)
