"""A packed layer as a stream of plain pieces, unpacked and hashed by a helper thread that does nothing else.

Decompression and hashing release the GIL, so that on two processors they cost the unpacker of files nothing.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol, cast

from kvmsentry.image.faults import ImageFault, Limits

PIECE = 1 << 20  # plain bytes in one hand-over
INPUT = 1 << 18  # packed bytes read at once
AHEAD = 8  # pieces that may wait
ZSTD_WINDOW = 1 << 27  # bytes; zstd's own limit for a frame that is unpacked without --long


class Readable(Protocol):
    size: int

    def read(self, at: int, length: int) -> bytes: ...


def packing_of(head: bytes) -> str:
    """The compression that the first bytes tell of: "gzip" (RFC 1952), "zstd" (RFC 8878) or "" for none.

    Raises ImageFault for others, which nobody packs layers with but somebody may pack an archive with.
    """
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or (len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    for magic, name in ((b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x04\x22\x4d\x18", "lz4")):
        if head.startswith(magic):
            raise ImageFault(f"packed with {name}; gzip and zstd are understood")
    return ""


class PackedStream:
    """`next()` returns piece after piece, b"" at the end, and raises what the helper met.

    After the end `packed_digest` and `plain_digest` hold sha256 in hex. `close()` may come at any time, must come once.
    """

    def __init__(self, source: Readable, limits: Limits) -> None:
        self.done = 0  # packed bytes so far
        self.packed_digest = self.plain_digest = ""
        self._source, self._limits = source, limits
        self._pieces: queue.Queue[bytes | BaseException] = queue.Queue(AHEAD)
        self._stop = False
        self._last: bytes | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="layer", daemon=True)
        self._thread.start()

    def next(self) -> bytes:
        if self._last is None:
            piece = self._pieces.get()
            if piece and isinstance(piece, bytes):
                return piece
            self._last = piece
        if isinstance(self._last, bytes):
            return b""
        raise self._last

    def drain(self) -> None:
        """Read to the end for the digests' sake."""
        while self.next():
            pass

    def close(self) -> None:
        self._stop = True
        while self._thread.is_alive():
            try:
                self._pieces.get_nowait()
            except queue.Empty:
                self._thread.join(0.001)

    # ---------------------------------------------------------------------------------------- the helper thread

    def _run(self) -> None:
        try:
            for piece in self._plain():
                self._pieces.put(piece)
                if self._stop:
                    return
            self._pieces.put(b"")
        except BaseException as error:  # handed to whoever calls next()
            self._pieces.put(error)

    def _plain(self) -> Iterator[bytes]:
        packing = packing_of(self._source.read(0, 16))
        packed, plain = hashlib.sha256(), hashlib.sha256()

        def more() -> bytes:
            data = self._source.read(self.done, INPUT if packing else PIECE)
            packed.update(data)
            self.done += len(data)
            return data

        total = 0
        for piece in {"": _copied, "gzip": _gunzipped, "zstd": _unzstded}[packing](more):
            total += len(piece)
            if total > Limits.RATIO_FREE and total > self._limits.max_ratio * self.done:
                raise ImageFault(f"unpacks to more than {self._limits.max_ratio} times its size")
            if total > self._limits.max_bytes:
                raise ImageFault(f"unpacks to more than {self._limits.max_bytes} bytes")
            if packing:
                plain.update(piece)
            yield piece
        self.packed_digest = packed.hexdigest()
        self.plain_digest = plain.hexdigest() if packing else self.packed_digest


def _copied(more: Callable[[], bytes]) -> Iterator[bytes]:
    while piece := more():
        yield piece


def _gunzipped(more: Callable[[], bytes]) -> Iterator[bytes]:
    """RFC 1952: members follow one another; zeros may pad the end."""
    data = more()
    while data:
        unpacker, ended = zlib.decompressobj(31), False
        try:
            while not unpacker.eof:
                if not data:
                    data = more()
                    ended = not data
                piece = unpacker.decompress(data, PIECE)
                data = unpacker.unconsumed_tail
                if piece:
                    yield piece
                elif ended and not unpacker.eof:
                    raise ImageFault("truncated gzip data")
        except zlib.error as error:
            raise ImageFault(f"damaged gzip data ({error})") from None
        data = unpacker.unused_data or more()
        while data and not data.strip(b"\0"):
            data = more()
        data = data.lstrip(b"\0")


def _unzstded(more: Callable[[], bytes]) -> Iterator[bytes]:
    """RFC 8878. A frame cut short shows as a tar that ends too early, or in the digest."""
    import zstandard

    class Source:
        def __init__(self) -> None:
            self.rest = b""

        def read(self, length: int) -> bytes:
            data = self.rest or more()
            self.rest = data[length:]
            return data[:length]

    unpacker = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    try:
        with unpacker.stream_reader(cast(IO[bytes], Source()), read_size=INPUT, read_across_frames=True) as reader:
            while piece := reader.read(PIECE):
                yield piece
    except zstandard.ZstdError as error:
        raise ImageFault(f"damaged zstd data ({str(error).removeprefix('zstd decompress error: ')})") from None
