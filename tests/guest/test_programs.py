"""Guest programs: each C file here passes natively first, then does the same inside.

A program prints what it saw and exits 0 when all is as Linux has it; 4 means skipped. Its output must be the same
inside.
"""

from __future__ import annotations

import pathlib
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
PROGRAMS = sorted(path.stem for path in HERE.glob("*.c"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    out = tmp_path_factory.mktemp("guest")
    programs = {}
    for name in PROGRAMS:
        programs[name] = out / name
        subprocess.run(["gcc", "-O1", "-g", "-Wall", "-pthread", "-o", programs[name], HERE / f"{name}.c"], check=True)
    return programs


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, errors="replace")


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_as_linux(name: str, built: dict[str, pathlib.Path], kvmsentry_do: list[str]) -> None:
    native = run([str(built[name])])
    if native.returncode == 4:
        pytest.skip(f"{name} skips natively: {native.stdout.strip()}")
    assert native.returncode == 0, f"{name} fails natively, so it can't judge us:\n{native.stdout}{native.stderr}"
    inside = run([*kvmsentry_do, str(built[name])])
    assert (inside.returncode, inside.stdout) == (0, native.stdout), inside.stdout + inside.stderr
