"""Servers and language runtimes of the host's own root: each script runs natively and inside, and says the same.

A script prints figures too when TIME is set: `TIME=1 kvmsentry do env TIME=1 bash tests/images/servers/redis.sh`;
docs/programs.md shows some.
"""

from __future__ import annotations

import glob
import os
import pathlib
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.timeout(300)
SCRIPTS = pathlib.Path(__file__).with_name("servers")
# script: what it needs
QUICK = {
    "node": ["node"],
    "php": ["php", "curl"],
    "sqlite": ["sqlite3"],
}
SLOW = {
    "git": ["git"],
    "go": ["go"],
    "java": ["javac", "java"],
    "make": ["make", "gcc", "musl-gcc"],
    "nginx": ["nginx", "ab", "curl"],
    "postgres": ["pgbench", "setpriv"],
    "redis": ["redis-server", "redis-benchmark"],
}


def _run(command: list[str], script: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TIME", "N", "T")}
    return subprocess.run(
        [*command, "bash", str(SCRIPTS / f"{script}.sh")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        errors="replace",
        env=environment,
    )


def _beside(kvmsentry_do: list[str], script: str, needs: list[str]) -> None:
    missing = [name for name in needs if shutil.which(name) is None]
    if script == "postgres":
        if not glob.glob("/usr/lib/postgresql/*/bin/initdb"):
            missing.append("initdb")
        if os.geteuid() != 0:
            pytest.skip("the server takes a user of its own: root only")
    if missing:
        pytest.skip(f"NOT TESTED, not installed here: {', '.join(missing)}")
    native = _run([], script)
    assert native.returncode == 0, f"{script} fails natively, so it can't judge us:\n{native.stdout}{native.stderr}"
    inside = _run(kvmsentry_do, script)
    assert (inside.returncode, inside.stdout) == (0, native.stdout), inside.stdout + inside.stderr


@pytest.mark.parametrize("script", QUICK)
def test_same_as_native(script: str, kvmsentry_do: list[str]) -> None:
    _beside(kvmsentry_do, script, QUICK[script])


@pytest.mark.slow
@pytest.mark.parametrize("script", SLOW)
def test_same_as_native_slowly(script: str, kvmsentry_do: list[str]) -> None:
    _beside(kvmsentry_do, script, SLOW[script])
