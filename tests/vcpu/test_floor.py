"""The vCPU floor without KVM: layout, window ranges, host errors."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest

from kvmsentry.errors import BrokenInvariant, HostError
from kvmsentry.vcpu import layout, traits
from kvmsentry.vcpu.memory import Ranges

ROOT = Path(__file__).parent.parent.parent
REGISTERS = "RAX RBX RCX RDX RSI RDI RSP RBP R8 R9 R10 R11 R12 R13 R14 R15 RIP RFLAGS FS_BASE GS_BASE".split()


def test_registers_are_struct_kvm_regs_and_the_bases() -> None:
    assert [getattr(layout, name) for name in REGISTERS] == list(range(layout.NREGS))


def test_the_build_made_its_constants_from_layout() -> None:
    """C and assembly saw these numbers, not older ones: hack/build after a change of layout.py."""
    header = ROOT / "guest_stub" / "out" / "constants.h"
    if not header.exists():
        pytest.skip("nothing was built in this checkout")
    built = {name: int(value, 16) for name, value in re.findall(r"#define KS_(\w+) (0x[0-9a-f]+)", header.read_text())}
    written = {name: value for name, value in vars(layout).items() if name.isupper() and isinstance(value, int)}
    assert built == written


def test_structures_are_pinned() -> None:
    """Every channel word that has a number has a _Static_assert."""
    header = (ROOT / "guest_stub" / "layout.h").read_text()
    for name in vars(layout):
        if re.fullmatch(r"(CH|SH)_\w+", name) and name != "CH_XSAVE_ROOM":
            assert re.search(rf"KS_PIN\(\w+, \w+, KS_{name}\)", header), name


def test_linker_script_has_layouts_addresses() -> None:
    script = (ROOT / "guest_stub" / "stub.ld").read_text()
    for address in (layout.WINDOW_CODE, layout.GPA_ENTRY, layout.STUB_BASE + layout.GPA_STUB, layout.GPA_STUB):
        assert f"{address:#x}" in script
    assert layout.GPA_STUB == layout.GPA_ENTRY + 4096 and layout.WINDOW_SHARED == layout.WINDOW_CODE + 4096


def test_areas_do_not_overlap() -> None:
    assert layout.GPA_STUB + layout.STUB_PAGES * 4096 <= layout.GPA_GDT
    assert layout.GPA_LINEAR_PDS + 512 * 4096 <= layout.GPA_SUPERVISOR
    assert layout.GPA_SUPERVISOR + layout.MAX_VCPUS * 4096 <= layout.GPA_CHANNELS
    assert layout.GPA_CHANNELS + layout.CHANNEL_FRAMES * 4096 <= layout.MACHINE_SIZE
    assert layout.CH_XSAVE + layout.XSAVE_MAX <= 4096


def test_ranges_merge_and_align() -> None:
    ranges = Ranges()
    ranges.add(0, 0x1000)
    ranges.add(0x2000, 0x1000)
    assert ranges.take(0x2000, 0x1000, 0) is None
    ranges.add(0x1000, 0x1000)
    assert ranges.take(0x1000, 0x1000, 0x1000 & 0xFFF) == 0
    assert ranges.take(0x1000, 0x2000, 0) == 0x2000
    assert ranges.take(0x1000, 0x1000, 0) == 0x1000
    assert ranges.take(1, 1, 0) is None
    ranges.add(0x5000, 0x1000)
    with pytest.raises(BrokenInvariant):
        ranges.add(0x5800, 0x100)


def test_ranges_keep_a_phase() -> None:
    ranges = Ranges()
    ranges.add(0x200000, 0x800000)
    assert ranges.take(0x400000, 0x200000, 0x3000) == 0x203000
    assert ranges.take(0x1000, 0x1000, 0) == 0x200000


def test_no_kvm_says_how_to_mend(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="modprobe kvm_amd"):
        traits.open_kvm(str(tmp_path / "kvm"))
    for error, words in ((errno.EACCES, "usermod -aG kvm"), (errno.EBUSY, "VirtualBox"), (errno.EMFILE, "ulimit -n")):
        assert words in str(traits.refusal("open /dev/kvm", error))


def test_traits_are_kept_and_survive_a_bad_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def probe(kvm: int) -> dict[str, object]:
        asked.append(kvm)
        return {"entry": "ring3"}

    monkeypatch.setattr(traits, "probe", probe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert traits.traits(5) == traits.traits(5) == {"entry": "ring3"}
    assert asked == [5]
    kept = tmp_path / "kvmsentry" / "traits.json"
    other_boot = json.loads(kept.read_text()) | {"key": "another boot"}
    for text in ("not json", "[]", json.dumps(other_boot)):
        kept.write_text(text)
        asked.clear()
        assert traits.traits(5) == {"entry": "ring3"} and asked == [5]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert traits.traits(5) == {"entry": "ring3"}
