"""The system-call table: one row a call, read by dispatch, by strace, by the support table in the docs.

    @syscall(318, partial="GRND_RANDOM is served from urandom")
    def getrandom(task: Task, buf: UserPtr, count: Size, flags: UInt) -> int:

A handler is a plain function. It returns a non-negative result or a negative errno, may raise `Errno`, and may return a
coroutine when it must sleep (then the task parks; the coroutine's return value is the result). The annotations name
how each register becomes an argument; the conversion is compiled into the row, so that a call costs one Python call
more than nothing.

`RELOAD` as a result means that the handler has rewritten the registers (exec, sigreturn); `GONE` that the task is no
more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NR_SYSCALLS = 512


class Kind:
    """How one register becomes an argument: the C type, by its letter in the struct module, and the name that strace
    prints it by."""

    def __init__(self, name: str, letter: str, show: str) -> None:
        self.name, self.letter, self.show = name, letter, show


_EXPRESSIONS = {
    "i": "(({} & 0x7fffffff) - ({} & 0x80000000))",
    "I": "({} & 0xffffffff)",
    "q": "(({} & 0x7fffffffffffffff) - ({} & 0x8000000000000000))",
    "Q": "{}",
}

# The annotations of handlers. For mypy they are all plain ints; `KINDS` maps the name to its conversion.
Fd = int
Int = int
UInt = int
Long = int
ULong = int
Size = int
UserPtr = int
Path = int
Mode = int
OpenFlags = int
Pid = int
Signal = int
Offset = int
DirFd = int
KINDS = {
    kind.name: kind
    for kind in (
        Kind("Fd", "i", "fd"),
        Kind("DirFd", "i", "dirfd"),
        Kind("Int", "i", "int"),
        Kind("Pid", "i", "int"),
        Kind("Signal", "i", "signal"),
        Kind("UInt", "I", "hex"),
        Kind("Mode", "I", "octal"),
        Kind("OpenFlags", "I", "open_flags"),
        Kind("Long", "q", "int"),
        Kind("Offset", "q", "int"),
        Kind("ULong", "Q", "hex"),
        Kind("Size", "Q", "int"),
        Kind("UserPtr", "Q", "pointer"),
        Kind("Path", "Q", "path"),
    )
}


class _Sentinel:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


RELOAD = _Sentinel("RELOAD")
GONE = _Sentinel("GONE")


class Row:
    """One system call: number, Linux's name, parameters, and how true our answer is."""

    __slots__ = ("nr", "name", "handler", "partial", "note")

    def __init__(self, nr: int, handler: Callable[..., Any], partial: str, note: str) -> None:
        self.nr, self.handler, self.partial, self.note = nr, handler, partial, note
        self.name = handler.__name__.removeprefix("sys_")

    @property
    def kinds(self) -> list[tuple[str, Kind]]:
        """(name, kind) of each parameter after the task."""
        code, annotations = self.handler.__code__, self.handler.__annotations__
        return [(name, KINDS[annotations[name]]) for name in code.co_varnames[1 : code.co_argcount]]

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """(name, how strace shows it) of each parameter."""
        return [(name, kind.show) for name, kind in self.kinds]

    def compile(self) -> Callable[[Any, tuple[int, ...]], Any]:
        """The function (task, six registers) that converts and calls; takes its place in `calls`."""
        arguments = "".join(
            ", " + _EXPRESSIONS[kind.letter].replace("{}", f"a[{index}]") for index, (_, kind) in enumerate(self.kinds)
        )
        # The source is ours alone: names from KINDS.
        call: Callable[[Any, tuple[int, ...]], Any] = eval(
            f"lambda task, a: handler(task{arguments})", {"handler": self.handler}
        )
        calls[self.nr] = call
        return call

    def plan(self) -> tuple[Callable[..., Any], str]:
        """The handler and the letters of its arguments' kinds, for a dispatcher that converts by itself."""
        return self.handler, "".join(kind.letter for _, kind in self.kinds)

    def call(self, task: Any, args: tuple[int, ...]) -> Any:
        """Convert and call; stands in `calls` until the row is first used: compiling all would cost start-up time."""
        return self.compile()(task, args)

    @property
    def status(self) -> str:
        """`full` or `partial`, for the support table."""
        return "partial" if self.partial else "full"


rows: list[Row | None] = [None] * NR_SYSCALLS
calls: list[Callable[[Any, tuple[int, ...]], Any] | None] = [None] * NR_SYSCALLS


def syscall(nr: int, *, partial: str = "", note: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a handler for amd64 call `nr` (arch/x86/entry/syscalls/syscall_64.tbl). `partial` says what is missing,
    `note` a deviation that an application can see. Several decorators may stand on one handler."""

    def declare(handler: Callable[..., Any]) -> Callable[..., Any]:
        if (other := rows[nr]) is not None:
            raise ValueError(f"system call {nr} is declared twice: {other.name} and {handler.__name__}")
        row = Row(nr, handler, partial, note)
        rows[nr] = row
        calls[nr] = row.call
        return handler

    return declare


def load() -> None:
    """Import every family of handlers, so that the table is filled. Called once before the sandbox is locked down."""
    import importlib
    import pkgutil

    import kvmsentry.syscall as package

    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("sys_"):
            importlib.import_module(f"kvmsentry.syscall.{module.name}")
