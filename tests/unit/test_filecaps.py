"""File capabilities: the attribute's layouts, what exec makes of it, and what an ordinary user's image store keeps."""

from __future__ import annotations

import errno as e
import json

import pytest
from fs_world import FsWorld, gofer

from kvmsentry.errors import Errno
from kvmsentry.fs.goferfs import GoferSuper
from kvmsentry.fs.overlay import OverlaySuper
from kvmsentry.kernel import filecaps
from kvmsentry.sandbox.boot import image_owners

PERMITTED_13 = b"\0\x20\0\0\0\0\0\0"


@pytest.mark.parametrize(
    "value, found",
    [
        (b"\1\0\0\1" + b"\0\x20\0\0" + b"\1\0\0\0", (1 << 13, 1, True)),  # version 1
        (b"\0\0\0\2" + PERMITTED_13 + b"\1\0\0\0\2\0\0\0", (1 << 13 | 1 << 32, 2 << 32, False)),
        (b"\1\0\0\3" + PERMITTED_13 + bytes(12), (1 << 13, 0, True)),
        (b"\1\0\0\3" + PERMITTED_13 + bytes(8) + b"\1\0\0\0", None),  # another namespace's root
        (b"\1\0\0\2" + PERMITTED_13, None),  # cut
        (b"\1\0\0\4" + PERMITTED_13 + bytes(8), None),
        (b"\1", None),
        (b"\0\0\0\2" + b"\xff" * 16, ((1 << 41) - 1, (1 << 41) - 1, False)),  # unknown ones are not there
    ],
)
def test_layouts(value, found):
    caps = filecaps.parse(value)
    assert (caps and tuple(caps)) == found


def test_only_whole_attributes_are_taken():
    filecaps.check(b"\1\0\0\2" + bytes(16))
    filecaps.check(b"\1\0\0\3" + bytes(20))
    for value in (b"", b"junk", b"\1\0\0\1" + bytes(8), b"\1\0\0\2" + bytes(15), b"\1\0\0\3" + bytes(16)):
        with pytest.raises(Errno) as error:
            filecaps.check(value)
        assert error.value.errno == e.EINVAL


def test_what_is_granted():
    caps = filecaps.FileCaps(permitted=0b110, inheritable=0b1000, effective=False)
    assert filecaps.granted(caps, bounding=0b111, inheritable=0) == 0b110
    assert filecaps.granted(caps, bounding=0b011, inheritable=0b1001) == 0b1010
    with pytest.raises(Errno):
        filecaps.granted(caps._replace(effective=True), bounding=0b011, inheritable=0)


def test_the_store_s_sidecar_is_shown_through_the_overlay(tmp_path):
    """Where the host refuses the attribute, owners.json has it."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/ping").write_bytes(b"x")
    value = b"\1\0\0\2" + PERMITTED_13 + bytes(8)
    entry = {"uid": 0, "gid": 0, "mode": 0o755, "xattrs": {"security.capability": value.hex()}}
    (tmp_path / "owners.json").write_text(
        json.dumps({"version": 1, "privileged": False, "entries": {"bin/ping": entry}})
    )
    world = FsWorld(ram_limit=16 << 20)
    client = gofer(("root", str(root), False))
    try:
        owners = image_owners(str(tmp_path / "owners.json"))
        lower = GoferSuper(world.kernel, client.attach("root"), True, True, owners=owners)
        inode = OverlaySuper(world.kernel, lower, 0).root.lookup(b"bin").lookup(b"ping")
        assert inode.getxattr(filecaps.XATTR) == value and inode.listxattr() == [filecaps.XATTR]
        assert filecaps.of(inode) == (1 << 13, 0, True)
        filecaps.drop(inode)  # copied up without it
        assert filecaps.of(inode) is None and inode.listxattr() == []
    finally:
        client.close()
