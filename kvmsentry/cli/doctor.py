"""`kvmsentry doctor`: can this host run sandboxes, how, and what to mend."""

from __future__ import annotations

import os
import platform
import resource
from typing import Any

import click

from kvmsentry.cpuinfo import cpu_field
from kvmsentry.errors import HostError

DEVICE = "/dev/kvm"

# trait of kvmsentry.vcpu.traits: (title, what a value means)
TRAITS: dict[str, tuple[str, dict[bool | str, str]]] = {
    "ring0_native": ("ring 0 runs natively", {False: "the host emulates it, instruction by instruction"}),
    "syscall_ring0": ("SYSCALL enters ring 0", {False: "it stays in ring 3: calls are caught there"}),
    "sees_outside_writes": ("sees page-table writes", {False: "shadow paging: changes are made to hold by hand"}),
    "sync_regs": ("registers in shared page", {}),
    "immediate_exit": ("immediate exit", {False: "a kick may come late"}),
    "fsgsbase": ("FSGSBASE", {}),
    "xcr0": ("processor state (XCR0)", {}),
    "xsave_size": ("size of that state", {}),
    "max_vcpus": ("vCPUs at most", {}),
    "phys_bits": ("guest-physical addresses", {}),
    "virtual": ("inside a virtual machine", {True: "small pages first: free huge ones are often the outer host's"}),
    "tsc_khz": ("time stamp counter", {}),
    "ring0_ns_per_100": ("100 ring 0 instructions", {}),
    "entry": ("entry", {"ring0": "the stub in ring 0", "ring3": "the page in ring 3"}),
    "paging": ("paging", {"nested": "by the processor", "shadow": "by the host's software"}),
}
_UNITS = {"xsave_size": "bytes", "phys_bits": "bits", "tsc_khz": "kHz", "ring0_ns_per_100": "ns"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def doctor() -> int:
    """Say what this host's KVM can do, measured, and what to mend.

    Exit status 0 when sandboxes can run on KVM, 1 when not.
    """
    for name, value in host_facts():
        _line(name, value)
    fault = device_fault()
    traits: dict[str, Any] = {}
    if not fault:
        try:
            traits = measured_traits()
        except HostError as error:
            fault = str(error)
    if fault:
        _line("kvm", f"NOT usable: {fault}")
        _line("without kvm", "--platform ptrace, where it is built in, needs no /dev/kvm; it is slower by far")
        return 1
    for name, value in traits.items():
        title, meaning = TRAITS.get(name, (name.replace("_", " "), {}))
        remark = meaning.get(value, "") if isinstance(value, (bool, str)) else ""
        _line(title, _shown(name, value), remark)
    for advice in _advice(traits):
        _line("could be better", advice)
    _line("kvm", "usable")
    return 0


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in _UNITS:
        return f"{value} {_UNITS[name]}"
    return hex(value) if name in ("xcr0", "sync_regs") else str(value)


def _advice(traits: dict[str, Any]) -> list[str]:
    """What would make sandboxes faster or larger on this host."""
    advice = []
    if traits.get("paging") == "shadow":
        advice.append(
            "no nested paging: page tables are shadowed, fork and exec are slow (kvm_intel ept=1, kvm_amd npt=1)"
        )
    if traits.get("ring0_native") is False:
        advice.append("ring 0 is emulated: the ring 3 entry is used (a host with nested VMX or SVM would be faster)")
    if len(os.sched_getaffinity(0)) < 2:
        advice.append("one processor: the application and its kernel must take turns")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 4096:
        advice.append(f"only {hard} open files are allowed (raise the hard limit: ulimit -Hn)")
    return advice


def host_facts() -> list[tuple[str, str]]:
    """What can be told without KVM."""
    facts = [
        ("machine", platform.machine()),
        ("host kernel", platform.release()),
        ("processor", cpu_field("model name") or "unknown"),
        ("processors", str(len(os.sched_getaffinity(0)))),
    ]
    flags = set(cpu_field("flags").split())
    extension = "VMX" if "vmx" in flags else "SVM" if "svm" in flags else "none shown"
    facts.append(("virtualisation", extension))
    return facts


def device_fault() -> str:
    """Why /dev/kvm cannot be opened and how to mend that, "" when it can."""
    if platform.machine() != "x86_64":
        return f"this is {platform.machine()}; only x86_64 is supported"
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        flags = set(cpu_field("flags").split())
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

    kvm = traits.open_kvm(DEVICE)
    try:
        return dict(traits.traits(kvm, fresh=True))
    finally:
        os.close(kvm)


def _line(name: str, value: str, remark: str = "") -> None:
    click.echo(f"{name:26}{value}" + (f"  ({remark})" if remark else ""))
