"""What needs no process: range merging, the store decoder against capstone, lists of operations from tables."""

from __future__ import annotations

from collections import Counter

import capstone
import pytest
from capstone import x86_const as x86
from hypothesis import given
from hypothesis import strategies as st
from kvmsentry.ptrace._ptrace import lib as ptrace
from kvmsentry.vcpu._kvm import lib as kvm

from kvmsentry.ptrace.decode import stores
from kvmsentry.ptrace.space import merged
from kvmsentry.vcpu import common

IMPLICIT = {"push", "call", "pushfq", "enter", "stosb", "stosw", "stosd", "stosq", "movsb", "movsw", "movsq", "insb"}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1))
def test_merged_covers_the_same(pairs: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in pairs]
    out = merged(ranges)
    assert {n for low, high in out for n in range(low, high)} == {n for low, high in ranges for n in range(low, high)}
    assert all(first[1] < second[0] for first, second in zip(out, out[1:], strict=False))


def test_stores_agrees_with_capstone() -> None:
    """Over code of the C library: what is called a store is one, and hardly any is missed."""
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    with open("/proc/self/maps") as maps:
        names = [line.split()[5] for line in maps if "r-xp" in line and "/libc" in line]
    if not names:
        pytest.skip("no C library is mapped: no code to look at")
    with open(names[0], "rb") as file:
        code = file.read()[0x40000:0x70000]
    wrong: Counter[str] = Counter()
    seen = real = 0
    engine.skipdata = True
    for insn in engine.disasm(code, 0x1000):
        if insn.id == 0:
            continue
        seen += 1
        truth = insn.mnemonic in IMPLICIT or any(
            op.type == x86.X86_OP_MEM and op.access & capstone.CS_AC_WRITE for op in insn.operands
        )
        memory = any(op.type == x86.X86_OP_MEM for op in insn.operands) or truth
        real += truth
        if memory and stores(bytes(insn.bytes)) != truth:
            wrong[insn.mnemonic] += 1
    assert seen > 1000 and real > 50
    assert sum(wrong.values()) <= real // 50, wrong.most_common(12)


def test_both_waits_say_it_in_the_same_numbers() -> None:
    """common.HostSide reads what either returned."""
    for name in ("TIMEOUT", "HOST", "WOKEN", "FAILED"):
        assert getattr(kvm, f"KS_{name}") == getattr(ptrace, f"PT_{name}"), name
    assert (common.HOST, common.FAILED) == (kvm.KS_HOST, kvm.KS_FAILED)
