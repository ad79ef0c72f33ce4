"""Errors by culprit: the application's, the host's, the user's, and our own.

- `Errno`: the application asked for something Linux refuses; becomes a negative RAX and nothing else.
- `HostError`: the host refused something the sandbox needs; one line that says what and how to mend it.
- `UserError`: what the user gave us (a flag, an image) is wrong; one line and an exit status.
- `BrokenInvariant`: we are wrong; the sandbox stops with a dump rather than go on with a wrong answer.
"""

from __future__ import annotations

import os


class Errno(Exception):
    """An error that Linux would report to the application; `errno` is positive."""

    __slots__ = ("errno",)

    def __init__(self, errno: int) -> None:
        self.errno = errno

    def __str__(self) -> str:
        return os.strerror(self.errno)


class OutOfMemory(Errno):
    """The application's memory limit is reached amid an access of its memory: Linux kills it, whatever it was doing."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(12)  # ENOMEM


class HostError(Exception):
    """The host refused `operation`; `errno` is the host's (0 when there is none), `mend` says what helps."""

    def __init__(self, operation: str, errno: int = 0, mend: str = "") -> None:
        self.operation, self.errno, self.mend = operation, errno, mend
        reason = f": {os.strerror(errno)}" if errno else ""
        super().__init__(f"{operation}{reason}" + (f" ({mend})" if mend else ""))


class UserError(Exception):
    """Bad input from the user: one line for the terminal and an exit status (125 ours, 126 not executable, 127 not
    found)."""

    def __init__(self, message: str, status: int = 125) -> None:
        self.status = status
        super().__init__(message)


class BrokenInvariant(Exception):
    """Something that must hold does not: a bug of ours."""
