"""Runs one command under a time limit and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

from kvmsentry.bench.catalogue import PATH

TAIL = 400


@dataclass
class Outcome:
    """How a command ended. Times are CLOCK_MONOTONIC in ns; `first` is when its first output came, 0 without any."""

    status: int
    stdout: str
    stderr: str
    begin: int
    first: int
    end: int
    late: bool

    @property
    def took(self) -> int:
        """ns from start to end."""
        return self.end - self.begin

    def failure(self, limit: float) -> str:
        """One line for a command that failed, "" for one that did not."""
        if self.late:
            return f"time limit: nothing after {limit:.0f} s"
        if self.status == 0:
            return ""
        words = " ".join(" ".join(self.stderr.splitlines()[-2:]).split())[-TAIL:]
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        return f"{how}: {words}" if words else how


def environment(scratch: str) -> dict[str, str]:
    """What every command gets, natively and inside: as little as programs need."""
    kept = {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME", "USER", "PYTHONPATH") if name in os.environ}
    return {"PATH": PATH, "LANG": "C", "TMPDIR": scratch, **kept}


def run(argv: list[str], limit: float, scratch: str = "/tmp") -> Outcome:
    """Run `argv` to its end or its limit (seconds), standard input empty. Whatever interrupts this ends it as well."""
    begin = time.monotonic_ns()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(scratch),
        start_new_session=True,  # Ctrl-C is ours alone
    )
    assert process.stdout is not None and process.stderr is not None
    first = 0
    pieces: list[bytes] = []
    errors: list[bytes] = []

    def read_output(fd: int) -> None:
        nonlocal first
        while piece := os.read(fd, 65536):
            first = first or time.monotonic_ns()
            pieces.append(piece)

    def read_errors(fd: int) -> None:
        while piece := os.read(fd, 65536):
            errors.append(piece)
            del errors[:-16]

    readers = [
        threading.Thread(target=read_output, args=(process.stdout.fileno(),), daemon=True),
        threading.Thread(target=read_errors, args=(process.stderr.fileno(),), daemon=True),
    ]
    late = False
    try:
        for reader in readers:
            reader.start()
        late = not ended(process.pid, limit)
        end = time.monotonic_ns()
        if not late:
            process.wait()
    finally:
        if process.poll() is None:
            end_tree(process)
    for reader in readers:
        reader.join(5)
    if not any(reader.is_alive() for reader in readers):
        process.stdout.close()
        process.stderr.close()
    out, err = (b"".join(part).decode(errors="replace") for part in (pieces, errors))
    return Outcome(process.returncode, out, err, begin, first, end, late)


def ended(pid: int, limit: float) -> bool:
    """Wait until a child has ended, at most `limit` seconds. Popen.wait with a limit looks every 50 ms only."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(limit * 1e3))
    finally:
        os.close(fd)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all it has started, and wait for it."""
    tree = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        tree = [*parent.children(recursive=True), parent]
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def end_strays(mark: str) -> None:
    """Kill processes that have `mark`, a path that only we use, in an argument: runsc's own outlive its parent."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid != os.getpid() and any(mark in word for word in process.cmdline()):
                process.kill()


def figures(text: str) -> dict[str, dict[str, Any]]:
    """{name: row} of the JSON lines that a program of ours printed. Lines that are none are not ours: dropped."""
    rows = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("name"), str):
                good = isinstance(row.get("ns"), (int, float)) or isinstance(row.get("error"), str)
                if good:
                    rows[row["name"]] = row
    return rows
