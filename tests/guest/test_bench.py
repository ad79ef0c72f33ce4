"""The benchmark's programs as guest tests: they check what they measure. No time is asserted."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmsentry.bench import measure, programs
from kvmsentry.bench.catalogue import BENCHMARKS

MICRO = sorted({row.program for row in BENCHMARKS.values() if row.program} - {"serve"})


@pytest.mark.parametrize("platform", ["kvm", "ptrace"])
@pytest.mark.parametrize("program", MICRO)
def test_right_answers_inside(program: str, platform: str, request: pytest.FixtureRequest) -> None:
    if platform == "kvm":
        request.getfixturevalue("kvmsentry_do")  # skips where there is none
    path = programs.build([program])[program]
    argv = [sys.executable, "-m", "kvmsentry", "do", f"--platform={platform}", path, "2", "/tmp"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(measure.figures(done.stdout)) == [row.name for row in BENCHMARKS.values() if row.program == program]
