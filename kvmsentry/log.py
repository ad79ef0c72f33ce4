"""The sandbox's log: one sink, off until somebody opens it, never on a system call's fast path.

Callers on warm paths test `enabled` first, so that no string is built for nobody.
"""

from __future__ import annotations

import os
import sys
import time

enabled = False
_fd = -1
_started = time.monotonic()
_seen: set[str] = set()
marks: list[tuple[str, int]] = []  # (what has just been done, CLOCK_MONOTONIC in ns), from the command line on


def open_log(fd: int) -> None:
    """Send log lines to descriptor `fd` (kept open, written to with O_APPEND semantics of its own)."""
    global _fd, enabled
    _fd, enabled = fd, True


def log(line: str) -> None:
    """Write one line with the seconds since start; nothing where no log is open."""
    if _fd >= 0:
        os.write(_fd, f"[{time.monotonic() - _started:11.6f}] {line}\n".encode(errors="backslashreplace"))


def log_once(line: str) -> None:
    """Like `log`, but each line only the first time: for what an application may do a million times."""
    if _fd >= 0 and line not in _seen and len(_seen) < 4096:
        _seen.add(line)
        log(line)


def mark(done: str) -> None:
    """Note when a step of starting up was done: a dozen in a sandbox's life. They go to the log at its end, for
    `kvmsentry bench`."""
    marks.append((done, time.monotonic_ns()))


def complain(line: str) -> None:
    """A line for the user's terminal, and for the log."""
    sys.stderr.write(f"kvmsentry: {line}\n")
    sys.stderr.flush()
    log(line)
