"""Structures of the file system calls, amd64 (arch/x86/include/uapi/asm/stat.h, uapi/linux/{stat,fcntl,openat2}.h)."""

from __future__ import annotations

import struct

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW, AT_EACCESS, AT_REMOVEDIR, AT_SYMLINK_FOLLOW = 0x100, 0x200, 0x200, 0x400
AT_NO_AUTOMOUNT, AT_EMPTY_PATH = 0x800, 0x1000
AT_STATX_SYNC_TYPE, AT_STATX_FORCE_SYNC, AT_STATX_DONT_SYNC, AT_STATX_RESERVED = 0x6000, 0x2000, 0x4000, 0x80000000

R_OK, W_OK, X_OK = 4, 2, 1

# struct stat: dev ino nlink mode uid gid pad rdev size blksize blocks atime mtime ctime (each s, ns) unused[3]
STAT = struct.Struct("<QQQIII4xQqqqqqqqqq24x")
assert STAT.size == 144

# struct statx: mask blksize attributes nlink uid gid mode pad ino size blocks attributes_mask,
# atime btime ctime mtime (each s, ns, pad), rdev_major rdev_minor dev_major dev_minor mnt_id, the rest unused
STATX = struct.Struct("<IIQIIIH2xQQQQ" + "qI4x" * 4 + "IIIIQ104x")
assert STATX.size == 256

STATX_BASIC_STATS, STATX_BTIME, STATX_MNT_ID = 0x7FF, 0x800, 0x1000
STATX_ATTR_MOUNT_ROOT = 0x2000

# struct statfs: type bsize blocks bfree bavail files ffree fsid namelen frsize flags spare[4]
STATFS = struct.Struct("<qqQQQQQQqqq32x")
assert STATFS.size == 120
ST_VALID = 0x20  # include/linux/statfs.h
ST_RELATIME, ST_NOSYMFOLLOW = 0x1000, 0x2000

DIRENT64 = struct.Struct("<QqHB")  # struct linux_dirent64 up to the name: ino, off, reclen, type
DIRENT = struct.Struct(
    "<QQH"
)  # struct linux_dirent up to the name: ino, off, reclen; the type is the record's last byte

OPEN_HOW = struct.Struct("<QQQ")  # struct open_how: flags, mode, resolve
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT, RESOLVE_CACHED = (
    1,
    2,
    4,
    8,
    16,
    32,
)

TIMESPEC2 = struct.Struct("<qqqq")
UTIMBUF = struct.Struct("<qq")
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
