"""Reading tar archives of every dialect that layers come in: ustar, GNU and PAX, long names, sparse files, xattrs.

POSIX.1-2017 pax(1) "Extended Description" for ustar and pax; the GNU tar manual ("Basic Tar Format", "Storing Sparse
Files") for the GNU types. An own reader rather than tarfile because a layer is an attacker's: a damaged header must be
a fault and not an early end, nothing may grow without bound, and an entry costs a few microseconds instead of fifty.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from struct import Struct

from kvmsentry.image.faults import ImageFault

BLOCK = 512
MAX_PATH = 4096  # limits.h PATH_MAX
MAX_EXTENDED = 8 << 20  # bytes of one PAX header; holds xattrs and 0.x sparse maps
MAX_SPARSE_RUNS = 1 << 20
MAX_ID = 0xFFFF_FFFE  # (uid_t) -1 means "no change" to chown(2)
MAX_SECONDS = 1 << 35

REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_PLAIN_TYPES = frozenset((b"0", b"\0", b"7"))
_KNOWN_TYPES = frozenset((b"0", b"1", b"2", b"3", b"4", b"5", b"6"))
_DATALESS = frozenset((b"2", b"3", b"4", b"5", b"6"))

# name mode uid gid size mtime chksum typeflag linkname magic version uname gname devmajor devminor prefix
_HEADER = Struct("100s8s8s8s12s12s8sc100s6s2x64x8s8s155s12x")
_ZEROS = bytes(BLOCK)
_XATTR = b"SCHILY.xattr."


class Entry:
    """One member: `name` and `link` as written, `size` of the file, `runs` of a sparse file as (offset, length)."""

    __slots__ = ("name", "kind", "mode", "uid", "gid", "size", "mtime_ns", "link", "major", "minor", "xattrs", "runs")

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes
    major: int
    minor: int
    xattrs: dict[bytes, bytes] | None
    runs: list[tuple[int, int]] | None


class TarReader:
    """Entries of a tar archive that comes in pieces.

    `feed()` returns the next piece, b"" at the end. `seek(n)`, where there is one, skips up to n bytes of what the
    feed has not returned yet and says how many. Raises ImageFault for a damaged or truncated archive.
    """

    def __init__(self, feed: Callable[[], bytes], seek: Callable[[int], int] | None = None) -> None:
        self._feed, self._seek = feed, seek
        self._piece = b""
        self._at = 0  # in the piece
        self._passed = 0  # bytes of the archive before the piece
        self._left = 0  # unread bytes of the entry's data in the archive
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self.entries = 0

    @property
    def offset(self) -> int:
        """Where in the archive the next unread byte is: after `next`, the start of the entry's data."""
        return self._passed + self._at

    # -------------------------------------------------------------------------------------------------- bytes

    def _more(self) -> bool:
        self._passed += len(self._piece)
        self._piece, self._at = self._feed(), 0
        return bool(self._piece)

    def _take(self, length: int) -> bytes:
        """Exactly `length` bytes, or b"" when the archive ends just here."""
        at = self._at
        block = self._piece[at : at + length]
        self._at = at + len(block)
        if len(block) == length:
            return block
        parts = [block]
        missing = length - len(block)
        while missing:
            if not self._more():
                if missing == length:
                    return b""
                raise ImageFault("truncated tar archive")
            part = self._piece[:missing]
            self._at = len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _skip(self, length: int) -> None:
        while length:
            step = min(length, len(self._piece) - self._at)
            self._at += step
            length -= step
            if not length:
                return
            if self._seek is not None:
                gone = self._seek(length)
                self._passed += gone
                length -= gone
            if length and not self._more():
                raise ImageFault("truncated tar archive")

    def copy(self, fd: int) -> int:
        """Write the entry's data to descriptor `fd` (at its offset, which moves); returns the bytes written."""
        total = self._left
        while self._left:
            available = len(self._piece) - self._at
            if not available:
                if not self._more():
                    raise ImageFault("truncated tar archive")
                continue
            step = min(available, self._left)
            if step == len(self._piece):
                written = os.write(fd, self._piece)
            else:
                written = os.write(fd, memoryview(self._piece)[self._at : self._at + step])
            self._at += written
            self._left -= written
        return total

    def copy_sparse(self, fd: int, entry: Entry) -> int:
        """Like `copy` for a sparse entry: data goes to its runs' offsets, the rest stays a hole."""
        assert entry.runs is not None
        left, total = self._left, 0
        for offset, length in entry.runs:
            os.lseek(fd, offset, os.SEEK_SET)
            self._left = length
            total += self.copy(fd)
        self._left = left - total
        os.ftruncate(fd, entry.size)
        return total

    def read(self, limit: int) -> bytes:
        """The entry's data, ImageFault when it is longer than `limit` bytes."""
        if self._left > limit:
            raise ImageFault(f"a tar header of {self._left} bytes is too long")
        data = self._take(self._left) if self._left else b""
        if len(data) < self._left:
            raise ImageFault("truncated tar archive")
        self._left = 0
        return data

    # ------------------------------------------------------------------------------------------------- headers

    def next(self) -> Entry | None:
        """The next entry, None at the end of the archive. What was not read of the last one's data is skipped."""
        extended: dict[bytes, bytes] = {}
        sparse_0: list[bytes] = []
        block = self._header(extended, sparse_0)
        if not block:
            return None
        name, mode, uid, gid, size, mtime, _, kind, link, magic, major, minor, prefix = _HEADER.unpack(block)
        length = _number(size)
        self.entries += 1
        entry = Entry()
        entry.name = name.split(b"\0", 1)[0]
        entry.link = link.split(b"\0", 1)[0]
        if magic == b"ustar\0" and prefix[0]:
            entry.name = prefix.split(b"\0", 1)[0] + b"/" + entry.name
        entry.mode = _number(mode) & 0o7777
        entry.uid, entry.gid = _number(uid), _number(gid)
        entry.mtime_ns = _clamped(_number(mtime)) * 1_000_000_000
        entry.xattrs = entry.runs = None
        entry.major = entry.minor = 0
        if kind in b"34":
            entry.major, entry.minor = _number(major), _number(minor)
        if kind in _PLAIN_TYPES:
            kind = DIRECTORY if entry.name.endswith(b"/") and kind == b"\0" else REGULAR
        old_sparse = kind == b"S"
        if old_sparse:
            kind = REGULAR
        elif kind not in _KNOWN_TYPES:
            raise ImageFault(f"unknown type {kind!r} of the tar entry {shown(entry.name)}")
        entry.kind = kind
        entry.size = length
        if self._globals:
            extended = {**self._globals, **extended}
        if extended:
            length = self._extend(entry, extended, length)
        if kind in _DATALESS:
            length = entry.size = 0  # POSIX: whatever size says, no data follows
        self._left, self._padding = length, -length % BLOCK
        if old_sparse:
            self._old_sparse(entry, block)
        elif extended and any(key.startswith(b"GNU.sparse.") for key in extended):
            self._pax_sparse(entry, extended, sparse_0)
        if not 0 <= entry.uid <= MAX_ID or not 0 <= entry.gid <= MAX_ID:
            raise ImageFault(f"impossible owner of {shown(entry.name)}")
        if len(entry.name) > MAX_PATH or len(entry.link) > MAX_PATH:
            raise ImageFault(f"name too long: {shown(entry.name)}")
        if b"\0" in entry.name or b"\0" in entry.link:
            raise ImageFault(f"name with a zero byte: {shown(entry.name)}")
        return entry

    def _header(self, extended: dict[bytes, bytes], sparse_0: list[bytes]) -> bytes:
        """The next file's header block, b"" at the end; what the extended headers before it say is put into the two."""
        while True:
            if self._left or self._padding:
                self._skip(self._left + self._padding)
                self._left = self._padding = 0
            block = self._take(BLOCK)
            if not block or block == _ZEROS:
                if extended:
                    raise ImageFault("tar archive ends after an extended header")
                return b""
            if not sum_holds(block, block[148:156]):
                raise ImageFault(f"damaged tar header at byte {self.offset - BLOCK}")
            length = _number(block[124:136])
            if length < 0:
                raise ImageFault("negative size in a tar header")
            kind = block[156:157]
            if kind not in b"xXgLKV":
                return block
            self._left, self._padding = length, -length % BLOCK
            if kind in b"xX":
                _parse_pax(self.read(MAX_EXTENDED), extended, sparse_0)
            elif kind == b"g":
                _parse_pax(self.read(MAX_EXTENDED), self._globals, [])
            elif kind != b"V":  # a volume label is no file
                text = self.read(MAX_EXTENDED).split(b"\0", 1)[0]
                extended.setdefault(b"path" if kind == b"L" else b"linkpath", text)

    def _extend(self, entry: Entry, extended: dict[bytes, bytes], length: int) -> int:
        """Apply PAX records; returns the length of the data in the archive."""
        xattrs = {}
        for key, value in extended.items():
            if key == b"path":
                entry.name = value
            elif key == b"linkpath":
                entry.link = value
            elif key == b"size":
                length = entry.size = _decimal(value)
            elif key == b"uid":
                entry.uid = _decimal(value)
            elif key == b"gid":
                entry.gid = _decimal(value)
            elif key == b"mtime":
                entry.mtime_ns = _nanoseconds(value)
            elif key.startswith(_XATTR):
                xattrs[key[len(_XATTR) :]] = value
        if xattrs:
            entry.xattrs = xattrs
        return length

    # -------------------------------------------------------------------------------------------------- sparse

    def _old_sparse(self, entry: Entry, block: bytes) -> None:
        """GNU type 'S': up to 4 runs in the header, then blocks of 21 before the data."""
        runs: list[tuple[int, int]] = []
        entry.size = _number(block[483:495])
        area, extended = block[386:482], block[482]
        while True:
            for at in range(0, len(area) - 23, 24):
                if area[at + 12] == 0:
                    break
                runs.append((_number(area[at : at + 12]), _number(area[at + 12 : at + 24])))
            if not extended:
                break
            block = self._take(BLOCK)
            if not block or len(runs) > MAX_SPARSE_RUNS:
                raise ImageFault(f"damaged sparse map of {shown(entry.name)}")
            area, extended = block[:504], block[504]
        self._set_runs(entry, runs)

    def _pax_sparse(self, entry: Entry, extended: dict[bytes, bytes], sparse_0: list[bytes]) -> None:
        """GNU sparse files in PAX headers: versions 0.0 and 0.1 (map in the header) and 1.0 (map before the data)."""
        entry.name = extended.get(b"GNU.sparse.name", entry.name)
        if extended.get(b"GNU.sparse.major") == b"1":
            entry.size = _decimal(extended.get(b"GNU.sparse.realsize", b""))
            numbers = self._sparse_1_map(entry)
        else:
            entry.size = _decimal(extended.get(b"GNU.sparse.size", extended.get(b"GNU.sparse.realsize", b"")))
            words = extended[b"GNU.sparse.map"].split(b",") if b"GNU.sparse.map" in extended else sparse_0
            numbers = [_decimal(word) for word in words]
        if len(numbers) % 2:
            raise ImageFault(f"damaged sparse map of {shown(entry.name)}")
        self._set_runs(entry, list(zip(numbers[::2], numbers[1::2], strict=True)))

    def _sparse_1_map(self, entry: Entry) -> list[int]:
        numbers: list[int] = []
        wanted, rest = 1, b""
        while len(numbers) < wanted:
            if self._left < BLOCK or len(rest) > MAX_PATH:
                raise ImageFault(f"damaged sparse map of {shown(entry.name)}")
            rest += self._take(BLOCK)
            self._left -= BLOCK
            *lines, rest = rest.split(b"\n")
            for line in lines[: wanted - len(numbers)] if numbers else lines:
                numbers.append(_decimal(line))
                if len(numbers) == 1:
                    if numbers[0] > MAX_SPARSE_RUNS:
                        raise ImageFault(f"damaged sparse map of {shown(entry.name)}")
                    wanted = 1 + 2 * numbers[0]
                if len(numbers) == wanted:
                    break
        return numbers[1:]

    def _set_runs(self, entry: Entry, runs: list[tuple[int, int]]) -> None:
        end = total = 0
        for offset, length in runs:
            if offset < end or length < 0 or offset + length > entry.size:
                raise ImageFault(f"damaged sparse map of {shown(entry.name)}")
            end = offset + length
            total += length
        if total > self._left or entry.size < 0:
            raise ImageFault(f"damaged sparse map of {shown(entry.name)}")
        entry.runs = runs


def sum_holds(block: bytes, field: bytes) -> bool:
    """The header's checksum counts its own field as spaces. Adler-32's low half is 1 + the sum modulo 65521."""
    claimed = _number(field)
    wanted = claimed - 8 * 32 + sum(field)
    if (zlib.adler32(block) & 0xFFFF) == (1 + wanted) % 65521:
        return True
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])  # old Sun and DEC tars
    return signed + 8 * 32 == claimed


def _number(field: bytes) -> int:
    """A header's number: octal text, or GNU's base 256 when the first byte has its top bit."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        return value - (1 << bits) if field[0] & 0x40 else value & ((1 << (bits - 1)) - 1)
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    try:
        return int(text, 8)
    except ValueError:
        raise ImageFault("damaged number in a tar header") from None


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ImageFault("damaged number in an extended tar header")
    return int(text)


def _clamped(seconds: int) -> int:
    return max(-MAX_SECONDS, min(seconds, MAX_SECONDS))


def _nanoseconds(text: bytes) -> int:
    """PAX time "seconds[.fraction]", seconds may be negative (then the fraction is, too)."""
    whole, _, fraction = text.partition(b".")
    negative = whole.startswith(b"-")
    seconds = _clamped(_decimal(whole.removeprefix(b"-") or b"0"))
    if fraction and not fraction.isdigit():
        raise ImageFault("damaged time in an extended tar header")
    value = seconds * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -value if negative else value


def _parse_pax(data: bytes, records: dict[bytes, bytes], sparse_0: list[bytes]) -> None:
    """Add "length key=value\\n" records; an empty value deletes the key. Keys that GNU 0.0 repeats go to `sparse_0`."""
    at = 0
    while at < len(data):
        if data[at] == 0:  # some writers pad with zeros
            break
        space = data.find(b" ", at, at + 20)
        text = data[at:space] if space > 0 else b""
        end = at + int(text) if text.isdigit() else 0
        equals = data.find(b"=", space, end)
        if equals < 0 or end > len(data) or data[end - 1] != 0x0A:
            raise ImageFault("damaged extended tar header")
        key, value = data[space + 1 : equals], data[equals + 1 : end - 1]
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            sparse_0.append(value)
        if value or key.startswith(_XATTR):
            records[key] = value
        else:
            records.pop(key, None)
        at = end


def shown(name: bytes) -> str:
    text = ascii(os.fsdecode(name[:80]))[1:-1]
    return text + "..." if len(name) > 80 else text
