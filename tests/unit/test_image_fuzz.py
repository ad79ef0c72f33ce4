"""Damaged layers: whatever the bytes are, the answer is files below the root or an ImageFault, nothing else."""

from __future__ import annotations

import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest
from image_factory import folder, hardlink, item, layer, symlink
from test_image_unpack import pieces

from kvmsentry.image.faults import ImageFault, Limits
from kvmsentry.image.tar import TarReader
from kvmsentry.image.unpack import Unpacker

ROUNDS = int(os.environ.get("KVMSENTRY_FUZZ_ROUNDS", "150"))


def _sum(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def _samples() -> list[bytes]:
    xattr = {"SCHILY.xattr.user.a": "b", "mtime": "1234567.891"}
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,4,100,4", "GNU.sparse.size": "200"}
    items = [
        folder("d"), item("d/f", b"data" * 200, pax_headers=xattr), symlink("l", "d"), item("l/g", b"x"),
        hardlink("h", "d/f"), item("p", type=tarfile.FIFOTYPE), item("n" * 150, b"y"),
        item("s", b"12345678", pax_headers=sparse),
        item("c", type=tarfile.CHRTYPE, devmajor=1, devminor=2), item(".wh.d"), item("e/.wh..wh..opq"),
    ]  # fmt: skip
    return [layer(*items), layer(*items, format=tarfile.GNU_FORMAT)]


@pytest.mark.parametrize("seed", range(4))
def test_damage(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    samples = _samples()
    outcomes = {"whole": 0, "refused": 0}
    (tmp_path / "guard").write_bytes(b"")
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(ROUNDS):
        data = bytearray(chance.choice(samples))
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            if chance.random() < 0.5:
                at = at // 512 * 512 + chance.randrange(0, 345)  # more often in what looks like a header
            data[at : at + chance.randint(1, 8)] = chance.choice(
                [
                    bytes([chance.randrange(256)]),
                    b"\xff" * 4,
                    b"\x80",
                    b"7777",
                    b"/../",
                    b"\0",
                    b"-1",
                    b"9" * 8,
                    b"=",
                    b"\n",
                ]
            )
        del data[len(data) // 512 * 512 :]
        for at in range(0, len(data), 512):  # most headers shall get past the checksum
            header = data[at : at + 512]
            if header[257:262] == b"ustar" and chance.random() < 0.9:
                _sum(header)
                data[at : at + 512] = header
        root = tmp_path / "root"
        root.mkdir()
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        unpacker = Unpacker(fd, Limits())
        try:
            for _ in range(2):
                unpacker.apply(TarReader(pieces(bytes(data), 1000)))
            unpacker.finish()
            outcomes["whole"] += 1
        except ImageFault:
            outcomes["refused"] += 1
        finally:
            unpacker.close()
            os.close(fd)
        assert sorted(os.listdir(tmp_path)) == ["guard", "root"]
        os.chmod(root, 0o700)
        shutil.rmtree(root)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert outcomes["whole"] and outcomes["refused"], outcomes
