"""What all tests share: whether KVM is here, how to start kvmsentry, and a census that finds what was left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What ran on which kind of host, for the summary: tests add to it what is not to be seen from here.
EXERCISED: list[str] = []


def platforms() -> list[str]:
    """A line a platform: what this host's is like, or why there is none."""
    from kvmsentry.errors import HostError

    lines = []
    if KVM:
        from kvmsentry.vcpu.traits import open_kvm, traits

        try:
            kvm = open_kvm()
            try:
                found = traits(kvm)
            finally:
                os.close(kvm)
            paging = f"{found['entry']} entry, {found['paging']} paging, XCR0 {found['xcr0']:#x}"
            lines.append(f"KVM of this host: {paging}")
        except HostError as error:
            lines.append(f"KVM of this host: NOT EXERCISED: {error}")
    else:
        lines.append("KVM of this host: NOT EXERCISED: /dev/kvm is missing or not writable")
    from kvmsentry.ptrace.tracer import Tracer

    try:
        tracer = Tracer()
        try:
            tracer._start()
            lines.append("ptrace")
        finally:
            tracer.close()
    except HostError as error:
        lines.append(f"ptrace: NOT EXERCISED: {error}")
    return lines


def pytest_report_header(config: pytest.Config) -> str:
    return (
        "platforms exercised: KVM"
        if KVM
        else "platforms exercised: NONE with KVM (/dev/kvm is missing or not writable)"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in (*platforms(), *EXERCISED):
        terminalreporter.write_line(f"platform: {line}", red="NOT EXERCISED" in line)
    if not KVM:
        terminalreporter.write_line(
            "KVM TESTS WERE SKIPPED: /dev/kvm is missing or not writable", yellow=True, bold=True
        )


@pytest.fixture
def exercised() -> Callable[[str], None]:
    """Adds a line to the summary's list of platforms."""
    return EXERCISED.append


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
