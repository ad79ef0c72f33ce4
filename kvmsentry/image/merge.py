"""From an archive's layers to one directory with `fs/`, `meta.json` and `owners.json`; digests checked on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from kvmsentry.image import owners
from kvmsentry.image.archive import Archive, Member
from kvmsentry.image.faults import ImageFault, Limits
from kvmsentry.image.layout import Layer
from kvmsentry.image.stream import PackedStream
from kvmsentry.image.tar import TarReader
from kvmsentry.image.unpack import Unpacker

_REPORT = 256  # entries between two reports of progress


def merge_layers(
    archive: Archive,
    layers: list[Layer],
    folder: str,
    limits: Limits,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Unpack `layers`, lowest first, into the empty directory `folder`. ImageFault names the layer that is wrong."""
    rootfs = os.path.join(folder, "fs")
    os.mkdir(rootfs, 0o700)
    root = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    unpacker = Unpacker(root, limits)
    members: list[Member] = []
    try:
        for number, layer in enumerate(layers, 1):
            member = archive.open(layer.member)
            if member is None:
                raise ImageFault(f"layer {number} ({layer.member}) is missing")
            members.append(member)
            if layer.size not in (-1, member.size):
                raise ImageFault(f"layer {number} is {member.size} bytes long, the manifest says {layer.size}")
        total, before = sum(member.size for member in members), 0
        for number, (layer, member) in enumerate(zip(layers, members, strict=True), 1):
            try:
                _apply(unpacker, layer, member, limits, progress, before, total)
            except ImageFault as fault:
                raise ImageFault(f"layer {number}: {fault}") from None
            before += member.size
        unpacker.finish()
    finally:
        unpacker.close()
        os.close(root)
        for member in members:
            member.close()
    _describe(unpacker, layers, folder)


def _apply(
    unpacker: Unpacker,
    layer: Layer,
    member: Member,
    limits: Limits,
    progress: Callable[[int, int], None] | None,
    before: int,
    total: int,
) -> None:
    stream = PackedStream(member, limits)
    after = None
    if progress is not None:
        report, count = progress, 0

        def after() -> None:
            nonlocal count
            count += 1
            if count % _REPORT == 0:
                report(before + stream.done, total)

    try:
        unpacker.apply(TarReader(stream.next), after)
        stream.drain()
    finally:
        stream.close()
    if layer.digest and stream.packed_digest != layer.digest:
        raise ImageFault(f"wrong digest sha256:{stream.packed_digest}, not sha256:{layer.digest}")
    if stream.plain_digest != layer.diff_id:
        raise ImageFault(f"wrong diff_id sha256:{stream.plain_digest}, not sha256:{layer.diff_id}")
    if progress is not None:
        progress(before + member.size, total)


def _describe(unpacker: Unpacker, layers: list[Layer], folder: str) -> None:
    entries = {os.fsdecode(path): kept for path, kept in unpacker.owners.items()}
    # An ordinary user's files all look like his, so there a map is needed even when it has no entry.
    wanted = bool(entries) or not unpacker.privileged
    if wanted:
        document = {"version": owners.VERSION, "privileged": unpacker.privileged, "entries": entries}
        with open(os.path.join(folder, "owners.json"), "w", encoding="ascii") as file:
            json.dump(document, file, separators=(",", ":"))
    meta = {
        "version": 1,
        "diff_ids": [layer.diff_id for layer in layers],
        "entries": unpacker.entries,
        "bytes": unpacker.bytes,
        "owners": wanted,
        "devices": [{"path": os.fsdecode(path), **device} for path, device in sorted(unpacker.devices.items())],
    }
    with open(os.path.join(folder, "meta.json"), "w", encoding="ascii") as file:
        json.dump(meta, file, separators=(",", ":"))
