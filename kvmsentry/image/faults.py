"""What can be wrong with an image, and how much of one is accepted."""

from __future__ import annotations

import os

from kvmsentry.errors import UserError


class ImageFault(Exception):
    """The image is damaged or hostile; the message lacks the file's name, which `open_image` puts in front."""


class Limits:
    """Bounds on what an image may ask for: sums over all its layers. The environment overrides the defaults."""

    __slots__ = ("max_bytes", "max_entries", "max_ratio")

    MAX_DOCUMENT = 8 << 20  # bytes of one JSON document (containerd and Docker allow 4 to 8 MiB)
    MAX_LAYERS = 1024  # Docker stops at 127, OCI names no bound
    MAX_MEMBERS = 1 << 16  # files of the outer archive
    RATIO_FREE = 1 << 30  # bytes that a layer may have before its ratio counts

    def __init__(self) -> None:
        self.max_bytes = _from_environment("KVMSENTRY_MAX_IMAGE_BYTES", 256 << 30)
        self.max_entries = _from_environment("KVMSENTRY_MAX_IMAGE_ENTRIES", 8_000_000)
        self.max_ratio = _from_environment("KVMSENTRY_MAX_IMAGE_RATIO", 2000)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"{name}={text}: a positive whole number is wanted")
    return int(text)
