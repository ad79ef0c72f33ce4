"""The ring behind stream sockets against a byte string."""

from __future__ import annotations

import random

from kvmsentry.net.ring import Ring


def views_of(length: int, rng: random.Random) -> list[memoryview]:
    out = []
    while length > 0:
        n = rng.randint(1, length)
        out.append(memoryview(bytearray(n)))
        length -= n
    return out


def test_ring_is_a_queue_of_bytes() -> None:
    rng = random.Random(7)
    for _ in range(30):
        ring, model, position = Ring(rng.choice((1, 7, 64, 100))), b"", 0
        for _ in range(200):
            if rng.random() < 0.5:
                data = bytes((position + i) & 0xFF for i in range(rng.randint(0, 80)))
                cut = rng.randint(0, len(data))
                pieces = [memoryview(bytearray(part)) for part in (data[:cut], data[cut:]) if part]
                n = ring.put(pieces, len(data))
                assert n == min(len(data), ring.capacity - len(model))
                model += data[:n]
                position += n
            else:
                peek, skip = rng.random() < 0.3, 0
                if peek:
                    skip = rng.randint(0, len(model))
                room = rng.randint(0, 90)
                views, limit = views_of(room, rng), rng.randint(0, 90)
                n = ring.take(views, limit, skip, peek)
                assert n == min(room, limit, len(model) - skip)
                assert b"".join(views)[:n] == model[skip : skip + n]
                if not peek:
                    model = model[n:]
            assert ring.used == len(model)


def test_resize_keeps_what_is_inside() -> None:
    ring = Ring(8)
    ring.put([memoryview(b"abcdefgh")], 8)
    ring.take([memoryview(bytearray(5))])
    ring.put([memoryview(b"ijk")], 3)
    ring.resize(100)
    out = bytearray(20)
    assert ring.take([memoryview(out)]) == 6 and out[:6] == b"fghijk"
    ring.resize(2)
    assert ring.put([memoryview(b"xyz")], 3) == 2
