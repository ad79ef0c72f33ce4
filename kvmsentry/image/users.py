"""Who "name[:group]" or "uid[:gid]" is in an image: its own /etc/passwd and /etc/group, read beneath its root.

The rules are Docker's and runc's (libcontainer/user, GetExecPath and GetExecUser): a user that passwd does not know
must be a number; with a group given there are no supplementary groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from kvmsentry.errors import UserError
from kvmsentry.image.beneath import read_file

MAX_ID = 0x7FFF_FFFF  # runc's bound
_MAX_FILE = 16 << 20


class User(NamedTuple):
    """Numeric identity in the sandbox; `home` is "/" where passwd tells none."""

    uid: int
    gid: int
    groups: list[int]
    home: str


def resolve_user(rootfs: str, spec: str) -> User:
    """Identity for `spec`: "", "name", "uid", either with ":group" or ":gid". UserError when there is none."""
    root = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _resolve(root, spec)
    finally:
        os.close(root)


def _resolve(root: int, spec: str) -> User:
    wanted, colon, group = spec.partition(":")
    if colon and not group:
        raise UserError(f"user {spec!r}: no group after the colon")
    number = _number(wanted) if wanted else 0
    name, uid, gid, home = "", number, 0, "/"
    for fields in _lines(root, b"/etc/passwd", 6):
        entry_uid = _number(fields[2])
        if entry_uid is None or not (entry_uid == number if number is not None else fields[0] == wanted):
            continue
        name, uid, gid, home = fields[0], entry_uid, _number(fields[3]) or 0, fields[5] or "/"
        break
    if uid is None:
        raise UserError(f"user {wanted}: not in the image's /etc/passwd")
    if not 0 <= uid <= MAX_ID:
        raise UserError(f"user {wanted}: the number must lie between 0 and {MAX_ID}")
    groups: list[int] = []
    if group:
        gid = _group(root, group)
    elif name:
        for fields in _lines(root, b"/etc/group", 4):
            member_gid = _number(fields[2])
            if member_gid is not None and member_gid <= MAX_ID and name in fields[3].split(","):
                groups.append(member_gid)
    return User(uid, gid, groups[:65536], home)  # limits.h NGROUPS_MAX


def _group(root: int, wanted: str) -> int:
    number = _number(wanted)
    if number is None:
        for fields in _lines(root, b"/etc/group", 3):
            if fields[0] == wanted and (gid := _number(fields[2])) is not None:
                number = gid
                break
        else:
            raise UserError(f"group {wanted}: not in the image's /etc/group")
    if number > MAX_ID:
        raise UserError(f"group {wanted}: the number must lie between 0 and {MAX_ID}")
    return number


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else None


def _lines(root: int, path: bytes, fields: int) -> Iterator[list[str]]:
    """The colon-separated lines of a file in the image that have at least `fields` fields; none when it is missing."""
    try:
        text = read_file(root, path, _MAX_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"the image's {os.fsdecode(path)}: {error.strerror}") from None
    for line in text.split(b"\n"):
        parts = os.fsdecode(line).strip().split(":")
        if len(parts) >= fields and not line.startswith(b"#"):
            yield parts
