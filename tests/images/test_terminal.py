"""`run -it`: a person at a terminal. The test is the person: it types on a pty and reads the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest


class Person:
    """Types, and waits for what the screen should show."""

    def __init__(self, argv: list[str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def see(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """Wait until the screen shows `pattern` after what was seen before."""
        deadline = time.monotonic() + timeout
        while True:
            match = re.search(pattern, self.screen)
            if match:
                self.screen = self.screen[match.end() :]
                return match
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {pattern!r}; the screen shows {self.screen!r}"
            self.screen += os.read(self.master, 65536).decode(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def shell(kvmsentry: list[str], busybox: str) -> Iterator[Person]:
    person = Person([*kvmsentry, "run", "-it", busybox, "sh"])
    person.see(r"# ")
    yield person
    person.close()


def test_terminal_is_one(shell: Person) -> None:
    shell.type("tty; stty size\r")
    shell.see(r"/dev/pts/\d+\r\n30 100\r\n")


def test_interrupt(shell: Person) -> None:
    shell.type("sleep 100\r")
    time.sleep(0.3)
    shell.type("\x03")
    shell.see(r"# ")
    shell.type("echo status $?\r")
    shell.see(r"status 130")


def test_job_control(shell: Person) -> None:
    shell.type("sleep 100\r")
    time.sleep(0.3)
    shell.type("\x1a")
    shell.see(r"Stopped")
    shell.type("jobs\r")
    shell.see(r"\[1\].*sleep 100")
    shell.type("bg; jobs\r")
    shell.see(r"Running\s+sleep 100|sleep 100")
    shell.type("fg\r")
    time.sleep(0.3)
    shell.type("\x03")
    shell.see(r"# ")
    shell.type("jobs; echo none\r")
    shell.see(r"none\r\n")


def test_resize(shell: Person) -> None:
    shell.type("sleep 1; stty size\r")
    time.sleep(0.3)
    fcntl.ioctl(shell.master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    os.kill(shell.process.pid, signal.SIGWINCH)
    shell.see(r"50 132")


def test_line_editing_and_end(shell: Person) -> None:
    shell.type("echo abd\x7fc\r")
    shell.see(r"abc\r\n")
    shell.type("cat\r")
    time.sleep(0.5)
    shell.type("line\r")
    shell.see(r"line\r\nline\r\n")
    shell.type("\x04")
    shell.see(r"# ")
    shell.type("exit 9\r")
    assert shell.process.wait(30) == 9


def test_terminal_comes_back(kvmsentry: list[str], busybox: str) -> None:
    person = Person([*kvmsentry, "run", "-it", busybox, "true"])
    assert person.process.wait(30) == 0
    assert termios.tcgetattr(person.slave) == person.before
    assert not fcntl.fcntl(person.slave, fcntl.F_GETFL) & os.O_NONBLOCK
    person.close()
