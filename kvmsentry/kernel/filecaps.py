"""File capabilities: the extended attribute security.capability, which execve(2) turns into a program's capabilities
(capabilities(7), security/commoncap.c)."""

from __future__ import annotations

import errno
import struct
from typing import Any, NamedTuple

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap

XATTR = b"security.capability"
# uapi/linux/capability.h: struct vfs_cap_data (1: one half, 2: two), struct vfs_ns_cap_data (3: two and a root id)
_HALF = struct.Struct("<II")  # permitted, inheritable
REVISION_MASK, FLAG_EFFECTIVE = 0xFF000000, 1
_SIZES = {0x01000000: 12, 0x02000000: 20, 0x03000000: 24}
_KNOWN = (1 << cap.LAST + 1) - 1


class FileCaps(NamedTuple):
    """What a file's attribute says."""

    permitted: int
    inheritable: int
    effective: bool


def parse(value: bytes) -> FileCaps | None:
    """get_vfs_caps_from_disk: None for what is no such attribute or belongs to another user namespace's root."""
    if len(value) < 4:
        return None
    magic = int.from_bytes(value[:4], "little")
    revision = magic & REVISION_MASK
    if _SIZES.get(revision) != len(value):
        return None
    if revision == 0x03000000 and value[20:24] != b"\0\0\0\0":
        return None
    permitted = inheritable = 0
    for half in range(1 if revision == 0x01000000 else 2):
        p, i = _HALF.unpack_from(value, 4 + 8 * half)
        permitted |= p << 32 * half
        inheritable |= i << 32 * half
    return FileCaps(permitted & _KNOWN, inheritable & _KNOWN, bool(magic & FLAG_EFFECTIVE))


def check(value: bytes) -> None:
    """What setxattr(2) takes: version 2 or 3, whole; EINVAL (cap_convert_nscap)."""
    revision = int.from_bytes(value[:4], "little") & REVISION_MASK
    if revision not in (0x02000000, 0x03000000) or _SIZES[revision] != len(value):
        raise Errno(errno.EINVAL)


def of(inode: Any) -> FileCaps | None:
    """The capabilities of a program file; None for the many that have none."""
    try:
        return parse(inode.getxattr(XATTR))
    except Errno:
        return None


def drop(inode: Any) -> None:
    """Data or owner changed: they are taken away (security_inode_killpriv)."""
    try:
        inode.removexattr(XATTR)
    except Errno as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise


def granted(caps: FileCaps, bounding: int, inheritable: int) -> int:
    """The permitted set that `caps` gives (bprm_caps_from_vfs_caps). EPERM when a program that relies on all of them
    would not get all."""
    permitted = bounding & caps.permitted | inheritable & caps.inheritable
    if caps.effective and caps.permitted & ~permitted:
        raise Errno(errno.EPERM)
    return permitted
