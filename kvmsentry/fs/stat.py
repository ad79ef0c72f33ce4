"""What stat(2), statx(2) and statfs(2) show of an inode, packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsentry.fs.vfs import (
    MS_NOATIME,
    MS_NODEV,
    MS_NODIRATIME,
    MS_NOEXEC,
    MS_NOSUID,
    MS_NOSYMFOLLOW,
    MS_RDONLY,
    MS_STRICTATIME,
    NAME_MAX,
    Inode,
    Mount,
)
from kvmsentry.kernel.userns import ROOT, UserNamespace, shown_gid, shown_uid
from kvmsentry.syscall.abi_fs import (
    ST_NOSYMFOLLOW,
    ST_RELATIME,
    ST_VALID,
    STAT,
    STATFS,
    STATX,
    STATX_ATTR_MOUNT_ROOT,
    STATX_BASIC_STATS,
    STATX_BTIME,
    STATX_MNT_ID,
)  # fmt: skip

if TYPE_CHECKING:
    from kvmsentry.fs.vfs import Path

_pack_stat = STAT.pack
_SECOND = 1_000_000_000
BLOCK_SIZE = 4096


def pack_stat(inode: Inode, ns: UserNamespace = ROOT) -> bytes:
    """struct stat, 144 bytes, with owners as they are called in `ns`."""
    inode.refresh()
    uid, gid = inode.uid, inode.gid
    if ns is not ROOT:
        uid, gid = shown_uid(ns, uid), shown_gid(ns, gid)
    atime, mtime, ctime = inode.atime, inode.mtime, inode.ctime
    a, m, c = atime // _SECOND, mtime // _SECOND, ctime // _SECOND
    return _pack_stat(
        inode.sb.dev, inode.ino, inode.nlink, inode.mode, uid, gid, inode.rdev, inode.size, BLOCK_SIZE,
        inode.blocks, a, atime - a * _SECOND, m, mtime - m * _SECOND, c, ctime - c * _SECOND,
    )  # fmt: skip


def _split(dev: int) -> tuple[int, int]:
    """Major and minor of the user-visible encoding (new_decode_dev)."""
    return (dev & 0xFFF00) >> 8, (dev & 0xFF) | ((dev >> 12) & 0xFFF00)


def pack_statx(inode: Inode, place: Path | None, ns: UserNamespace = ROOT) -> bytes:
    """struct statx, 256 bytes; the creation time is shown too."""
    inode.refresh()
    attributes = 0
    mount_id = 0
    if place is not None:
        mount_id = place.mount.id
        if place.dentry is place.mount.root:
            attributes = STATX_ATTR_MOUNT_ROOT
    return STATX.pack(
        STATX_BASIC_STATS | STATX_BTIME | (STATX_MNT_ID if mount_id else 0), BLOCK_SIZE, attributes, inode.nlink,
        shown_uid(ns, inode.uid), shown_gid(ns, inode.gid), inode.mode, inode.ino, inode.size, inode.blocks,
        STATX_ATTR_MOUNT_ROOT,
        *divmod(inode.atime, _SECOND), *divmod(inode.btime, _SECOND), *divmod(inode.ctime, _SECOND),
        *divmod(inode.mtime, _SECOND), *_split(inode.rdev), *_split(inode.sb.dev), mount_id,
    )  # fmt: skip


def pack_statfs(inode: Inode, mount: Mount | None) -> bytes:
    """struct statfs, 120 bytes."""
    sb = inode.sb
    bsize, blocks, bfree, bavail, files, ffree = sb.statfs()
    kept = mount.flags if mount is not None else 0
    flags = ST_VALID | kept & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    if not kept & (MS_NOATIME | MS_STRICTATIME):
        flags |= ST_RELATIME
    if kept & MS_NOSYMFOLLOW:
        flags |= ST_NOSYMFOLLOW
    if sb.readonly:
        flags |= MS_RDONLY
    return STATFS.pack(sb.magic, bsize, blocks, bfree, bavail, files, ffree, sb.dev, NAME_MAX, bsize, flags)
