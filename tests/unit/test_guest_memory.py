"""GuestMemory without a machine: what the host's mappings behind guest RAM are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmsentry.vcpu import layout
from kvmsentry.vcpu.memory import HUGE, SMALL, SMALL_IN_VM, GuestMemory


def flags_at(address: int) -> set[str]:
    """VmFlags (proc_pid_smaps(5)) of the mapping of ours that holds `address`."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in entry.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return set(re.findall(r"VmFlags: (.*)", entry)[0].split())
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("in_vm", [False, True])
def test_small_pages_come_first(in_vm: bool) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    memory = GuestMemory(in_vm=in_vm)
    slots: list[tuple[int, int]] = []
    memory.attach(lambda slot, gpa, length, file: slots.append((gpa, length)))
    small = SMALL_IN_VM if in_vm else SMALL
    try:
        for length in (HUGE // 2, 64 << 20, 256 << 20):
            memory.grow(length)
        end = layout.MACHINE_SIZE + (HUGE + (64 << 20) + (256 << 20))
        assert sum(length for _, length in slots) == end - layout.MACHINE_SIZE
        for gpa in range(layout.MACHINE_SIZE, end, HUGE):
            flags = flags_at(memory.base + gpa)
            if gpa < layout.MACHINE_SIZE + small:
                assert "nh" in flags and "hg" not in flags, hex(gpa)
            else:
                assert "hg" in flags, hex(gpa)
            assert "dc" in flags, "not copied at fork"
        memory.view[end - 1] = 7
    finally:
        memory.close()
