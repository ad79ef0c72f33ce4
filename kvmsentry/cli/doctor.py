"""`kvmsentry doctor`: can this host run sandboxes, how, and what to mend."""

from __future__ import annotations

import os
import platform
from typing import Any

import click

from kvmsentry.errors import HostError

DEVICE = "/dev/kvm"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def doctor() -> int:
    """Say what this host's KVM can do, measured, and what to mend.

    Exit status 0 when sandboxes can run on KVM, 1 when not.
    """
    for name, value in host_facts():
        _line(name, value)
    fault = device_fault()
    if fault:
        _line("kvm", f"NOT usable: {fault}")
        return 1
    try:
        traits = measured_traits()
    except HostError as error:
        _line("kvm", f"NOT usable: {error}")
        return 1
    for name, value in traits.items():
        _line(name, value)
    _line("kvm", "usable")
    return 0


def host_facts() -> list[tuple[str, str]]:
    """What can be told without KVM."""
    facts = [
        ("machine", platform.machine()),
        ("host kernel", platform.release()),
        ("processor", _cpu_field("model name") or "unknown"),
        ("processors", str(len(os.sched_getaffinity(0)))),
    ]
    flags = set(_cpu_field("flags").split())
    extension = "VMX" if "vmx" in flags else "SVM" if "svm" in flags else "none shown"
    facts.append(("virtualisation", extension))
    facts.append(("inside a virtual machine", "yes" if "hypervisor" in flags else "no"))
    return facts


def device_fault() -> str:
    """Why /dev/kvm cannot be opened and how to mend that, "" when it can."""
    if platform.machine() != "x86_64":
        return f"this is {platform.machine()}; only x86_64 is supported"
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        flags = set(_cpu_field("flags").split())
        if flags & {"vmx", "svm"}:
            module = "kvm_intel" if "vmx" in flags else "kvm_amd"
            return f"{DEVICE} is missing (load the module: modprobe {module})"
        if "hypervisor" in flags:
            return f"{DEVICE} is missing (this is a virtual machine: switch nested virtualisation on in its host)"
        return f"{DEVICE} is missing (switch virtualisation on in the firmware)"
    except PermissionError:
        return f"{DEVICE} may not be opened (join the group that owns it, or chmod 666 {DEVICE})"
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    return ""


def measured_traits() -> dict[str, Any]:
    """The machine's own measurements; HostError where one fails."""
    from kvmsentry.vcpu import traits

    return dict(traits.probe())


def _cpu_field(name: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(name):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def _line(name: str, value: Any) -> None:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    click.echo(f"{name:26}{value}")
