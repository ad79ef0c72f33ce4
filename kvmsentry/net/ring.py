"""The bytes on their way into a stream socket: a ring, and marks beside it where bytes carry files or credentials."""

from __future__ import annotations

from collections import deque
from typing import Any

from kvmsentry.fs import ringbuffer

CAPACITY = 212992  # net.core.wmem_default: what one direction of a stream holds
_spare: list[memoryview] = []  # rings of dead sockets, warm in the cache


class Mark:
    """Bytes [start, end) of the stream were sent together, with files or as somebody; positions count from the stream's
    first byte."""

    __slots__ = ("start", "end", "files", "creds")

    def __init__(self, start: int, end: int, files: list[Any], creds: tuple[int, int, int] | None) -> None:
        self.start, self.end, self.files, self.creds = start, end, files, creds


class Ring:
    """`used` bytes from `head` on; `taken` counts the bytes that were ever read."""

    __slots__ = ("capacity", "buffer", "head", "used", "taken", "marks")

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.buffer: memoryview | None = None  # made by the first write
        self.head = self.used = self.taken = 0
        self.marks: deque[Mark] | None = None

    def put(self, views: list[memoryview], total: int) -> int:
        """Append up to `total` bytes of `views`; how many fitted."""
        used, capacity = self.used, self.capacity
        if total > capacity - used:
            total = capacity - used
        if not total:
            return 0
        buffer = self.buffer
        if buffer is None:
            if capacity == CAPACITY and _spare:
                buffer = _spare.pop()
            else:
                buffer = memoryview(bytearray(capacity))
            self.buffer = buffer
        ringbuffer.put(buffer, self.head + used, views, total)
        self.used = used + total
        return total

    def take(self, views: list[memoryview], limit: int = 1 << 62, skip: int = 0, peek: bool = False) -> int:
        """Move up to `limit` bytes into `views`; with `peek` they stay, and `skip` bytes before them are left out."""
        buffer, head = self.buffer, self.head
        left = self.used - skip
        if left > limit:
            left = limit
        if left <= 0:
            return 0
        assert buffer is not None
        if skip:
            head = (head + skip) % self.capacity
        done = ringbuffer.take(buffer, head, views, left)
        if not peek:
            self.used -= done
            self.taken += done
            self.head = (head + done) % self.capacity if self.used else 0
        return done

    def mark(self, length: int, files: list[Any], creds: tuple[int, int, int] | None) -> None:
        """The last `length` bytes carry something."""
        if self.marks is None:
            self.marks = deque()
        end = self.taken + self.used
        self.marks.append(Mark(end - length, end, files, creds))

    def resize(self, capacity: int) -> None:
        """Another capacity, not less than what is inside."""
        capacity = max(capacity, self.used)
        if capacity == self.capacity:
            return
        if self.buffer is not None:
            buffer = memoryview(bytearray(capacity))
            self.take([buffer[: self.used]], peek=True)
            self.buffer = buffer
        self.head, self.capacity = 0, capacity

    def clear(self) -> list[Any]:
        """Drop everything; the files that were inside."""
        if self.buffer is not None and self.capacity == CAPACITY and len(_spare) < 16:
            _spare.append(self.buffer)
        files = [file for mark in self.marks or () for file in mark.files]
        self.taken += self.used
        self.buffer = self.marks = None
        self.head = self.used = 0
        return files
