"""Who files belong to in the image, where the host's files cannot say so: an ordinary user's store.

The map lies beside the root filesystem as owners.json:

    {"version": 1, "privileged": false,
     "entries": {"etc/shadow": {"uid": 0, "gid": 42, "mode": 416, "xattrs": {"security.capability": "0100..."}}}}

Paths are relative to the root, "" is the root itself; bytes that are no UTF-8 are surrogate-escaped; xattrs are hex.
Without `privileged`, the files on disk all belong to whoever unpacked them; what has no entry belongs to 0:0, with the
mode that the disk shows. With `privileged`, what has no entry is as the disk shows it.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from kvmsentry.errors import HostError

VERSION = 1


class Owner(NamedTuple):
    """`mode` has permission and set-id bits only; `xattrs` those that the file system refused."""

    uid: int
    gid: int
    mode: int
    xattrs: dict[bytes, bytes]


class Owners(NamedTuple):
    """`entries` by path; `everyone` is True when files without an entry belong to 0:0, whatever the disk says."""

    everyone: bool
    entries: dict[bytes, Owner]


def load_owners(path: str) -> Owners:
    """Read the map that `Image.owners` names; an empty one for "". HostError when it cannot be read."""
    if not path:
        return Owners(False, {})
    try:
        with open(path, "rb") as file:
            document = json.load(file)
        if document["version"] != VERSION:
            raise ValueError
        entries = {
            os.fsencode(name): Owner(
                kept["uid"],
                kept["gid"],
                kept["mode"],
                {os.fsencode(key): bytes.fromhex(value) for key, value in kept.get("xattrs", {}).items()},
            )
            for name, kept in document["entries"].items()
        }
        return Owners(not document["privileged"], entries)
    except OSError as error:
        raise HostError(f"read {path}", error.errno or 0) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HostError(f"read {path}", 0, "it is damaged: remove the image with 'kvmsentry images rm'") from None


def sees_all_ids() -> bool:
    """Whether this process may give files to anyone: root, and not of a user namespace that knows only some ids."""
    if os.geteuid() != 0:
        return False
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            first, outside, count = file.readline().split()
    except (OSError, ValueError):
        return True
    return (first, outside, count) == ("0", "0", "4294967295")
