"""The process the user sees: passes signals on, lends its terminal, reports how the sandbox ended.

Messages on the control socket (SOCK_SEQPACKET), a byte of kind and what follows:

    to the Sentry     S signo:u32          deliver a signal to the container's first process
                      W rows:u16 cols:u16  the terminal has another size
    from the Sentry   X status:u32         the first process has ended; a wait status
                      E status:u32 text    the sandbox could not start, or broke
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any

from kvmsentry.sandbox.spec import SandboxSpec

NUMBER = struct.Struct("<I")
WINDOW = struct.Struct("<HH")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
GOFER_PATIENCE = 2.0  # seconds for the gofer to end once its connection is gone


def window_size(fd: int) -> tuple[int, int]:
    """(rows, columns) of a terminal; (24, 80) when it does not know."""
    try:
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    except OSError:
        return 24, 80
    return rows or 24, columns or 80


@contextlib.contextmanager
def lent_terminal() -> Iterator[None]:
    """The user's terminal in raw mode while the sandbox has it, and as it was afterwards: its modes, and the
    O_NONBLOCK that the Sentry sets on descriptors which the user's shell shares."""
    before = termios.tcgetattr(0)
    flags = {fd: fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (0, 1)}
    try:
        tty.setraw(0, termios.TCSADRAIN)
        yield
    finally:
        for fd, value in flags.items():
            fcntl.fcntl(fd, fcntl.F_SETFL, value)
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _send(control: socket.socket, message: bytes) -> None:
    try:
        control.send(message, socket.MSG_DONTWAIT)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass  # the Sentry is gone or about to say so: its end is what counts


def supervise(spec: SandboxSpec, sentry_pid: int, gofer_pid: int, control: socket.socket) -> int:
    """Wait for the sandbox to end; returns the exit status for the shell."""

    def pass_on(signo: int, frame: FrameType | None) -> None:
        _send(control, b"S" + NUMBER.pack(signo))

    def resized(signo: int, frame: FrameType | None) -> None:
        _send(control, b"W" + WINDOW.pack(*window_size(0)))

    before: dict[int, Any] = {signo: signal.signal(signo, pass_on) for signo in PASSED_ON}
    terminal: Any = contextlib.nullcontext()
    if spec.tty and spec.interactive and os.isatty(0):
        before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, resized)
        terminal = lent_terminal()
    try:
        with terminal:
            status, complaint = _wait(sentry_pid, control)
    finally:
        _end(sentry_pid, gofer_pid)
        for signo, handler in before.items():
            signal.signal(signo, handler)
    if complaint:
        sys.stderr.write(f"kvmsentry: {complaint}\n")
    return status


def _wait(sentry_pid: int, control: socket.socket) -> tuple[int, str]:
    try:
        message = control.recv(65536)
    except ConnectionResetError:
        message = b""
    if message[:1] == b"X" and len(message) == 1 + NUMBER.size:
        status = NUMBER.unpack_from(message, 1)[0]
        return (status >> 8 & 0xFF) if status & 0x7F == 0 else 128 + (status & 0x7F), ""
    if message[:1] == b"E" and len(message) >= 1 + NUMBER.size:
        return NUMBER.unpack_from(message, 1)[0] & 0xFF, message[1 + NUMBER.size :].decode(errors="replace")
    _, status = os.waitpid(sentry_pid, 0)
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
    return 125, f"the sentry ended unexpectedly ({how})"


def _end(sentry_pid: int, gofer_pid: int) -> None:
    """Nothing of the sandbox outlives this."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(sentry_pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(sentry_pid, 0)
    deadline = time.monotonic() + GOFER_PATIENCE
    pause = 0.0005
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        while os.waitpid(gofer_pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(gofer_pid, signal.SIGKILL)
                os.waitpid(gofer_pid, 0)
                break
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
