"""Whether an instruction stores: ptrace tells the address of a page fault, not the error code's write bit.

Good for the signal frame of a fault on a page that is not there (for one that is, the page's own bits tell); what is
not known here counts as a load. SDM vol. 2, appendix A, opcode maps; 64-bit mode.
"""

from __future__ import annotations

PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
# mov, stos, movs, ins; arithmetic with a destination in memory but cmp; xchg; push, call, enter
ONE = frozenset(
    [0x88, 0x89, 0x8C, 0xA2, 0xA3, 0xAA, 0xAB, 0xA4, 0xA5, 0x6C, 0x6D, 0x86, 0x87, 0xC6, 0xC7, 0xE8, 0xC8, 0x68, 0x6A]
    + [base + low for base in (0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30) for low in (0, 1)]
    + list(range(0x50, 0x58))
)
TWO = frozenset(
    [0x11, 0x13, 0x17, 0x29, 0x2B, 0x7F, 0xD6, 0xE7, 0xC3, 0xB0, 0xB1, 0xC0, 0xC1, 0xC7, 0xA4, 0xA5, 0xAC, 0xAD]
    + [0xAB, 0xB3, 0xBB]
    + list(range(0x90, 0xA0))
)
GROUPS: dict[int, tuple[int, ...]] = {  # opcode -> values of ModRM.reg that store
    0x80: (0, 1, 2, 3, 4, 5, 6), 0x81: (0, 1, 2, 3, 4, 5, 6), 0x83: (0, 1, 2, 3, 4, 5, 6),
    0xC0: (0, 1, 2, 3, 4, 5, 7), 0xC1: (0, 1, 2, 3, 4, 5, 7), 0xD0: (0, 1, 2, 3, 4, 5, 7), 0xD1: (0, 1, 2, 3, 4, 5, 7),
    0xD2: (0, 1, 2, 3, 4, 5, 7), 0xD3: (0, 1, 2, 3, 4, 5, 7), 0xF6: (2, 3), 0xF7: (2, 3), 0xFE: (0, 1),
    0xFF: (0, 1, 2, 3, 6), 0xD9: (2, 3, 6, 7), 0xDD: (1, 2, 3, 6, 7), 0xDB: (1, 2, 3, 7), 0xDF: (1, 2, 3, 6, 7),
}  # fmt: skip


def stores(code: bytes) -> bool:
    """Whether the instruction that `code` (up to 15 bytes) begins with writes to memory."""
    at, end = 0, len(code)
    while at < end and code[at] in PREFIXES:
        at += 1
    if at < end and code[at] & 0xF0 == 0x40:
        at += 1
    if at >= end:
        return False
    opcode = code[at]
    if opcode in (0xC4, 0xC5, 0x62):  # VEX and EVEX: the two-byte map's stores
        skip = {0xC5: 2, 0xC4: 3, 0x62: 4}[opcode]
        return at + skip < end and code[at + skip] in (0x11, 0x13, 0x17, 0x29, 0x2B, 0x7F, 0xD6, 0xE7)
    if opcode == 0x0F:
        if at + 1 >= end:
            return False
        if code[at + 1] == 0xBA:
            return at + 2 < end and code[at + 2] >> 3 & 7 in (5, 6, 7)
        return code[at + 1] in TWO
    if opcode in ONE:
        return True
    group = GROUPS.get(opcode)
    return group is not None and at + 1 < end and code[at + 1] >> 3 & 7 in group
