"""Where a command can be run: natively, under kvmsentry's platforms, under the system's runsc."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass

from kvmsentry.bench.catalogue import PATH
from kvmsentry.errors import UserError

DEVICE = "/dev/kvm"


@dataclass
class Platform:
    """One way to run a command. `reason` tells why it can't be used or has failed; "" while it works."""

    name: str
    title: str
    prefix: list[str]
    ours: bool = False
    reason: str = ""
    trial: float = 60.0  # seconds that a first /bin/true may take

    def command(self, argv: list[str], log: str = "") -> list[str]:
        """`argv` as it is started there; our own write their debug log to the file `log`, where one is named."""
        options = ["--debug-log", log] if log and self.ours else []
        return [*self.prefix, *options, *argv]


def known(state: str) -> dict[str, Platform]:
    """All platforms, native first. `state` is a directory for runsc's own state."""

    def ours(name: str, reason: str) -> Platform:
        prefix = [sys.executable, "-m", "kvmsentry", "do", f"--platform={name}"]
        return Platform(name, f"kvmsentry, {name}", prefix, True, reason)

    def runsc(platform: str) -> Platform:
        reason = "" if shutil.which("runsc", path=PATH) else "runsc is not installed"
        if not reason and os.geteuid() != 0:
            reason = "runsc do needs root"
        prefix = ["runsc", f"--root={state}", f"--platform={platform}", "--network=none", "--ignore-cgroups", "do"]
        return Platform(f"runsc-{platform}", f"gVisor's runsc, {platform}", prefix, False, reason, trial=15.0)

    rows = [
        Platform("native", "native", []),
        ours("kvm", kvm_fault()),
        ours("ptrace", ptrace_fault()),
        runsc("ptrace"),
        runsc("kvm"),
    ]
    return {row.name: row for row in rows}


def kvm_fault() -> str:
    """Why KVM cannot be used, "" when it can."""
    if not os.path.exists(DEVICE):
        return f"{DEVICE} is not there"
    return "" if os.access(DEVICE, os.R_OK | os.W_OK) else f"no permission to open {DEVICE}"


def ptrace_fault() -> str:
    """Why the ptrace platform cannot be used, "" when it can."""
    try:
        import kvmsentry.ptrace.tracer  # noqa: F401
    except ImportError as error:
        return f"not built: {error}"
    return ""


def choose(names: list[str], runsc: bool, state: str) -> list[Platform]:
    """The platforms to measure, native always first: those named, or all of ours, and runsc's where asked for. One that
    was named and cannot be used stays, with its reason; others are left out. UserError for unknown names."""
    rows = known(state)
    for name in names:
        if name not in rows:
            raise UserError(f"unknown platform {name!r} (known: {', '.join(rows)})", 125)
    wanted = names or ["kvm", "ptrace"]
    chosen = [rows["native"]]
    for name, row in rows.items():
        asked = name in names or (runsc and name.startswith("runsc"))
        if name != "native" and (asked or (name in wanted and not row.reason)):
            chosen.append(row)
    return chosen
