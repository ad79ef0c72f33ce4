"""A line per system call, as strace(1) shows it, from the rows of the table."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.syscall.table import Row, _Sentinel

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

_OPEN_FLAGS = [
    (getattr(os, name), name)
    for name in (
        "O_CREAT",
        "O_EXCL",
        "O_NOCTTY",
        "O_TRUNC",
        "O_APPEND",
        "O_NONBLOCK",
        "O_DIRECTORY",
        "O_NOFOLLOW",
        "O_CLOEXEC",
        "O_PATH",
    )
]
_RESTARTS = {512: "ERESTARTSYS", 513: "ERESTARTNOINTR", 514: "ERESTARTNOHAND", 516: "ERESTART_RESTARTBLOCK"}


def _open_flags(value: int) -> str:
    names = [("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")[value & 3]]
    value &= ~3
    for bit, name in _OPEN_FLAGS:
        if bit and value & bit == bit:
            names.append(name)
            value &= ~bit
    if value:
        names.append(hex(value))
    return "|".join(names)


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def show_argument(task: Task, show: str, value: int) -> str:
    """One register as the row says it should be shown."""
    if show == "path":
        if not value:
            return "NULL"
        try:
            return '"' + task.mm.read_cstring(value, 4096).decode(errors="backslashreplace") + '"'
        except Errno:
            return hex(value)
    if show == "pointer":
        return hex(value) if value else "NULL"
    if show == "dirfd":
        number = _signed(value, 32)
        return "AT_FDCWD" if number == -100 else str(number)
    if show == "fd":
        return str(_signed(value, 32))
    if show == "int":
        return str(_signed(value, 64 if value >> 32 not in (0, 0xFFFFFFFF) else 32))
    if show == "octal":
        return oct(value & 0xFFFFFFFF).replace("0o", "0")
    if show == "open_flags":
        return _open_flags(value & 0xFFFFFFFF)
    if show == "signal":
        number = _signed(value, 32)
        try:
            return signal.Signals(number).name
        except ValueError:
            return str(number)
    return hex(value)


def show_result(result: Any) -> str:
    """What the call answered."""
    if isinstance(result, _Sentinel) or not isinstance(result, int):
        return "?"
    if -4096 < result < 0:
        number = -result
        if number in _RESTARTS:
            return f"? {_RESTARTS[number]}"
        return f"-1 {errno.errorcode.get(number, number)} ({os.strerror(number)})"
    return str(result) if result < 1 << 32 else hex(result)


class Strace:
    """Writes to a host descriptor: `[pid tid] name(arguments) = result`. Arguments are shown as they were at entry."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.open_calls: dict[int, str] = {}

    def __call__(self, task: Task, row: Row, args: tuple[int, ...], result: Any) -> None:
        """Called at entry with `result` None, and at the end with it."""
        if result is None:
            shown = ", ".join(
                show_argument(task, show, value) for (_, show), value in zip(row.parameters, args, strict=False)
            )
            self.open_calls[task.tid] = f"[{task.process.pid:5} {task.tid:5}] {row.name}({shown})"
            if row.name in ("exit", "exit_group", "execve", "execveat", "rt_sigreturn"):
                self._write(
                    self.open_calls.pop(task.tid) + (" = ?" if row.name.startswith(("exit", "rt_")) else " ...")
                )
            return
        call = self.open_calls.pop(task.tid, f"[{task.process.pid:5} {task.tid:5}] {row.name}(...)")
        self._write(f"{call} = {show_result(result)}")

    def signal(self, task: Task, signo: int) -> None:
        """A signal is about to be delivered."""
        self._write(f"[{task.process.pid:5} {task.tid:5}] --- {show_argument(task, 'signal', signo)} ---")

    def _write(self, line: str) -> None:
        data = (line + "\n").encode(errors="backslashreplace")
        while data:
            data = data[os.write(self.fd, data) :]
