"""Compiles the benchmark's C programs into the cache, once for each state of their sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile

from kvmsentry.bench.catalogue import SOURCES
from kvmsentry.errors import UserError

FLAGS = ["-O2", "-Wall", "-pthread"]
FREESTANDING = ["-O2", "-Wall", "-static", "-nostdlib", "-fno-stack-protector"]
PROGRAMS = {
    "calls": FLAGS,
    "memory": FLAGS,
    "process": FLAGS,
    "pingpong": FLAGS,
    "cpu": FLAGS,
    "serve": FLAGS,
    "first": FREESTANDING,
}


def cache() -> str:
    """Where compiled programs are kept: $XDG_CACHE_HOME/kvmsentry/bench, ~/.cache by default."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "kvmsentry", "bench")


def build(names: list[str], directory: str | None = None) -> dict[str, str]:
    """{name: path} of the compiled programs; UserError without a compiler, or when it fails."""
    directory = directory or cache()
    built = {}
    for name in names:
        flags = PROGRAMS[name]
        source = os.path.join(SOURCES, f"{name}.c")
        digest = hashlib.sha256(" ".join(flags).encode())
        for path in (source, os.path.join(SOURCES, "bench.h")):
            with open(path, "rb") as file:
                digest.update(file.read())
        target = os.path.join(directory, f"{name}-{digest.hexdigest()[:12]}")
        if not os.path.exists(target):
            _compile(flags, source, target)
        built[name] = target
    return built


def _compile(flags: list[str], source: str, target: str) -> None:
    compiler = os.environ.get("CC", "gcc").split()
    if shutil.which(compiler[0]) is None:
        raise UserError(f"the benchmark's programs are compiled on first use, and {compiler[0]} is not installed", 125)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    # Under another name first: another benchmark may look for it at this moment.
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as place:
        made = os.path.join(place, "program")
        done = subprocess.run([*compiler, *flags, "-o", made, source], capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise UserError(
                f"{compiler[0]} cannot compile {os.path.basename(source)}: {done.stderr.strip()[-400:]}", 125
            )
        os.replace(made, target)
