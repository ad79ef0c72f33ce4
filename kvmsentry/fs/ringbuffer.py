"""Bytes into and out of a ring, for pipes and stream sockets: the ring is a memoryview of its whole capacity."""

from __future__ import annotations


def put(ring: memoryview, tail: int, views: list[memoryview], total: int) -> None:
    """Copies the first `total` bytes of `views` to the ring from index `tail` (less than twice its size) on; the caller
    knows that there is room."""
    capacity = len(ring)
    if tail >= capacity:
        tail -= capacity
    for view in views:
        n = len(view)
        if n > total:
            n = total
            view = view[:n]
        end = tail + n
        if end <= capacity:
            ring[tail:end] = view
            tail = end
        else:
            first = capacity - tail
            tail = end - capacity
            ring[capacity - first :] = view[:first]
            ring[:tail] = view[first:]
        total -= n
        if not total:
            break


def take(ring: memoryview, head: int, views: list[memoryview], most: int) -> int:
    """Copies up to `most` bytes from index `head` on into `views`; how many there was room for."""
    capacity = len(ring)
    left = most
    for view in views:
        n = len(view)
        if n > left:
            n = left
            view = view[:n]
        end = head + n
        if end <= capacity:
            view[:] = ring[head:end]
            head = end
        else:
            first = capacity - head
            head = end - capacity
            view[:first] = ring[capacity - first :]
            view[first:] = ring[:head]
        left -= n
        if not left:
            break
    return most - left
