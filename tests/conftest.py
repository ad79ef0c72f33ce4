"""What all tests share: whether KVM is here, how to start kvmsentry, and a census that finds what was left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def pytest_report_header(config: pytest.Config) -> str:
    return (
        "platforms exercised: KVM"
        if KVM
        else "platforms exercised: NONE with KVM (/dev/kvm is missing or not writable)"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not KVM:
        terminalreporter.write_line(
            "KVM TESTS WERE SKIPPED: /dev/kvm is missing or not writable", yellow=True, bold=True
        )


@pytest.fixture(scope="session")
def kvmsentry() -> list[str]:
    """The command, for tests that need KVM."""
    if not KVM:
        pytest.skip("/dev/kvm is missing or not writable")
    return [sys.executable, "-m", "kvmsentry"]


@pytest.fixture(scope="session")
def kvmsentry_do(kvmsentry: list[str]) -> list[str]:
    """The prefix that runs a command of the host's root inside."""
    return [*kvmsentry, "do"]


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A busybox image in docker-archive format."""
    path = tmp_path_factory.mktemp("images") / "busybox.tar"
    subprocess.run(
        [sys.executable, os.path.join(ROOT, "hack", "mkimage"), "busybox", str(path)], check=True, capture_output=True
    )
    return str(path)


Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def in_busybox(kvmsentry: list[str], busybox: str) -> Runner:
    """Runs a command in the busybox image: in_busybox("echo", "hi", options=["-w", "/"], input="...")."""

    def run(
        *argv: str, options: list[str] | None = None, input: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*kvmsentry, "run", *(options or []), "-i", busybox, *argv],
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            errors="replace",
        )

    return run
