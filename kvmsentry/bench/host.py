"""The machine that figures come from, and what else it did meanwhile."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from typing import Any

from kvmsentry import __version__
from kvmsentry.cpuinfo import cpu_field

KINDS = {"kvm_pvm": "PVM: neither VMX nor SVM", "kvm_amd": "AMD SVM", "kvm_intel": "Intel VMX"}


def describe() -> dict[str, Any]:
    """Facts of the machine, as words for people."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts = {
        "processor": cpu_field("model name") or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": f"{total / 2**30:.0f} GiB",
        "virtual": "hypervisor" in cpu_field("flags").split(),
        "kernel": platform.release(),
        "kvm": kvm_kind(),
        "python": platform.python_version(),
        "kvmsentry": __version__,
    }
    facts.update(_traits())
    return facts


def sentence(facts: dict[str, Any]) -> str:
    """describe() as one line."""
    where = "in a virtual machine" if facts["virtual"] else "on bare metal"
    kvm = f"KVM: {facts['kvm']}"
    if "entry" in facts:
        kvm += f", calls enter by {facts['entry']}, {facts['paging']} paging"
    return (
        f"{facts['processors']} processors ({facts['processor']}) {where}, {facts['memory']}; {kvm}; "
        f"Linux {facts['kernel']}, Python {facts['python']}, kvmsentry {facts['kvmsentry']}"
    )


def kvm_kind() -> str:
    """Which module serves /dev/kvm."""
    for name, text in KINDS.items():
        if os.path.isdir(f"/sys/module/{name}"):
            return f"{name} ({text})"
    return "present" if os.path.exists("/dev/kvm") else "none"


def _traits() -> dict[str, Any]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return {}
    from kvmsentry.errors import HostError
    from kvmsentry.vcpu import traits

    try:
        kvm = traits.open_kvm("/dev/kvm")
        try:
            found = traits.traits(kvm)
        finally:
            os.close(kvm)
    except HostError as error:
        return {"kvm_refused": str(error)}
    return {name: found[name] for name in ("entry", "paging") if name in found}


def _ticks() -> list[int]:
    """user nice system idle iowait irq softirq steal, in ticks, of all processors (proc(5), /proc/stat)."""
    with open("/proc/stat") as file:
        return [int(word) for word in file.readline().split()[1:9]]


@dataclass
class Noise:
    """What the machine did besides, from now until `finish`."""

    load: tuple[float, float, float] = field(default_factory=os.getloadavg)
    ticks: list[int] = field(default_factory=_ticks)
    own: float = field(default_factory=lambda: sum(os.times()[:4]))
    begin: float = field(default_factory=time.monotonic)

    def finish(self) -> dict[str, float]:
        """load before and after (1 minute), and in per cent of all processors' time: steal, others' share, idle."""
        now = _ticks()
        spent = [after - before for before, after in zip(self.ticks, now, strict=True)]
        total = max(sum(spent), 1)
        hz = os.sysconf("SC_CLK_TCK")
        own = (sum(os.times()[:4]) - self.own) * hz
        idle = spent[3] + spent[4]
        others = max(total - idle - spent[7] - own, 0)
        return {
            "seconds": round(time.monotonic() - self.begin, 1),
            "load_before": round(self.load[0], 2),
            "load_after": round(os.getloadavg()[0], 2),
            "steal": round(100 * spent[7] / total, 1),
            "others": round(100 * others / total, 1),
            "idle": round(100 * idle / total, 1),
        }


def noise_sentence(noise: dict[str, float], processors: int) -> str:
    """finish() as one line, with advice where the machine was not quiet."""
    text = (
        f"{noise['seconds']:.0f} s; load {noise['load_before']:.2f} before, {noise['load_after']:.2f} after; "
        f"others used {noise['others']:.0f}% of the processors, the hypervisor stole {noise['steal']:.1f}%"
    )
    if noise["others"] > 10 or noise["steal"] > 2 or noise["load_before"] > processors / 2:
        text += ". The machine was not quiet: look at the ratios and the least values, and repeat the run"
    return text
