"""The message table: what one side encodes the other decodes, and nothing else decodes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmsentry.gofer import p9

_ATTR = st.builds(
    p9.Attr,
    *[st.integers(0, (1 << bits) - 1) for bits in (32, 64, 32, 32, 32, 32, 64, 64, 32, 64)],
    *[st.integers(-(1 << 63), (1 << 63) - 1)] * 3,
)
_QID = st.tuples(st.integers(0, 255), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1))
_BYTES = st.binary(max_size=300)
_FID = st.integers(0, (1 << 32) - 1)
_KINDS = {
    "1": st.integers(0, 255), "2": st.integers(0, 65535), "4": _FID, "8": st.integers(0, (1 << 64) - 1),
    "s": _BYTES, "d": _BYTES, "q": _QID, "a": _ATTR,
    "S": st.lists(_BYTES, max_size=16), "Q": st.lists(_QID, max_size=16), "A": st.lists(_ATTR, max_size=16),
    "w": st.lists(st.tuples(_FID, _BYTES), max_size=16), "f": st.lists(_FID, max_size=64),
}  # fmt: skip
_ROWS = sorted(p9.MESSAGES.values(), key=lambda row: row.number)


def _plain(value: object) -> object:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row.name)
def test_what_is_encoded_is_decoded(row: p9.Message) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 65535), st.tuples(*[_KINDS[kind.rstrip("?")] for _, kind in row.fields]))
    def check(tag: int, values: tuple[object, ...]) -> None:
        message = row.encode(tag, *values)
        assert struct.unpack_from("<IBH", message) == (len(message), row.number, tag)
        assert _plain(row.decode(message, p9.HEADER, len(message))) == _plain(values)
        assert p9.describe(message).startswith(f"{row.name} tag {tag}")
        # One byte less or more never decodes to something.
        if len(message) > p9.HEADER and not row.fields[-1][1].endswith("?"):
            with pytest.raises((p9.Malformed, struct.error)):
                row.decode(message[:-1], p9.HEADER, len(message) - 1)
        with pytest.raises((p9.Malformed, struct.error)):
            row.decode(message + b"\0", p9.HEADER, len(message) + 1)

    check()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_ROWS), st.binary(max_size=200))
def test_random_bytes_decode_or_are_malformed(row: p9.Message, body: bytes) -> None:
    try:
        row.decode(body, 0, len(body))
    except (p9.Malformed, struct.error):
        pass
    p9.describe(struct.pack("<IBH", 7 + len(body), row.number, 1) + body)


def test_known_bytes() -> None:
    """Twalk and Tversion as in the Plan 9 manual: layout pinned by hand, so that both halves cannot be wrong alike."""
    hello = bytes.fromhex("15000000 64 ffff 00200000 0800") + b"9P2000.L"
    assert p9.T.version.encode(0xFFFF, 8192, b"9P2000.L") == hello
    assert p9.T.walk.encode(1, 2, 3, [b"usr", b"x"]) == (
        bytes.fromhex("19000000 6e 0100 02000000 03000000 0200 0300") + b"usr" + bytes.fromhex("0100") + b"x"
    )
    assert p9.ATTR.size == 80
    assert p9.DIRENT.size == 24


def test_an_older_fsync_has_no_datasync() -> None:
    assert p9.T.fsync.decode(struct.pack("<I", 7), 0, 4) == (7, 0)


def test_a_list_that_claims_more_than_it_has() -> None:
    for row, body in (
        (p9.T.walk, struct.pack("<IIH", 0, 1, 65535)),
        (p9.T.clunkbatch, struct.pack("<H", 5)),
        (p9.R.walkattr, struct.pack("<IHH", 0, 0, 16)),
    ):
        with pytest.raises(p9.Malformed):
            row.decode(body, 0, len(body))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"x" * 256])
def test_names_that_name_no_entry(name: bytes) -> None:
    assert p9.name_errno(name)


@pytest.mark.parametrize("name", [b"a", b"...", b"..a", b" ", b"\xff\n", b"x" * 255])
def test_names_that_do(name: bytes) -> None:
    assert not p9.name_errno(name)
