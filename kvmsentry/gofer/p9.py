"""9P2000.L messages and our extensions: one row per message drives encode, decode and the debug print.

Sources: diod's protocol.md, Linux include/net/9p/9p.h. Integers are little-endian; a message is size[4] type[1] tag[2]
and its fields. Whatever is decoded here comes from a peer that may be hostile: every length is checked against the
message's end before it is used, a message must be used up exactly, and anything else is `Malformed`.

Field kinds in the rows:
    1 2 4 8  unsigned integers               q  qid: (type, version, path)
    s        string, length[2]               d  data, length[4]
    S        list of strings, n[2]           Q  list of qids, n[2]
    a        Attr (ours, 80 bytes)           A  list of Attr, n[2]
    w        walk steps (newfid[4] name[s]), n[2]
    f        list of fids, n[2]              ?  after a kind: may be missing at the end (0 then)
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

VERSION = b"9P2000.L"
VERSION_EXTENDED = b"9P2000.L.kvmsentry.1"

NOTAG = 0xFFFF  # 9p.h P9_NOTAG
NOFID = 0xFFFFFFFF  # 9p.h P9_NOFID
NOID = 0xFFFFFFFF  # (uid_t)-1: leave the owner alone; also P9_NONUNAME
HEADER = 7
MSIZE = (256 << 10) + 4096  # what we offer: 256 KiB of payload and room for any header
MSIZE_LEAST = 4096  # v9fs's smallest
MSIZE_EXTENDED = 16384  # the largest fixed reply of the extension (walkattr) and some entries fit
WALK_MOST = 16  # 9p.h P9_MAXWELEM
CLUNKS_MOST = 1024
NAME_MOST = 255  # NAME_MAX

# 9p.h P9_QTDIR, P9_QTSYMLINK, P9_QTFILE
QTDIR, QTSYMLINK, QTFILE = 0x80, 0x02, 0x00

# protocol.md, getattr and setattr
GETATTR_BASIC = 0x7FF
SETATTR_MODE, SETATTR_UID, SETATTR_GID, SETATTR_SIZE = 0x1, 0x2, 0x4, 0x8
SETATTR_ATIME, SETATTR_MTIME, SETATTR_CTIME = 0x10, 0x20, 0x40
SETATTR_ATIME_SET, SETATTR_MTIME_SET = 0x80, 0x100
SETATTR_ALL = 0x1FF

# protocol.md, lock
LOCK_RDLCK, LOCK_WRLCK, LOCK_UNLCK = 0, 1, 2
LOCK_SUCCESS, LOCK_BLOCKED, LOCK_ERROR, LOCK_GRACE = 0, 1, 2, 3

XATTR_REMOVE = 0x80000000  # ours, beside XATTR_CREATE and XATTR_REPLACE of uapi/linux/xattr.h
AT_REMOVEDIR = 0x200  # uapi/linux/fcntl.h; the flag of unlinkat


class Malformed(Exception):
    """The peer's message does not parse; the connection cannot go on."""


class Attr(NamedTuple):
    """A file's attributes, as struct stat has them; times in nanoseconds, blocks of 512 bytes.

    `dev` is a small index of the file system within the connection (0: the first one seen), never the host's number.
    `ino` is the host's inode number; (dev, ino) names the object.
    """

    dev: int
    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    blksize: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int

    @property
    def qid(self) -> tuple[int, int, int]:
        """The qid a plain 9P2000.L peer sees for this object: (type, version, path)."""
        kind = stat.S_IFMT(self.mode)
        qtype = QTDIR if kind == stat.S_IFDIR else QTSYMLINK if kind == stat.S_IFLNK else QTFILE
        # One inode number may occur on several file systems of a tree, a qid's path may not.
        return qtype, (self.mtime_ns ^ self.size) & 0xFFFFFFFF, self.ino ^ (self.dev << 48)


ATTR = struct.Struct("<IQIIIIQQIQqqq")
_new_attr = tuple.__new__
_unpack_attr = ATTR.unpack_from
_U16, _U32 = struct.Struct("<H"), struct.Struct("<I")
_STEP = struct.Struct("<IH")
_QID = struct.Struct("<BIQ")
_HEAD = struct.Struct("<IBH")
DIRENT = struct.Struct("<BIQQBH")  # readdir: qid[13] offset[8] type[1] and the name's length
ENTRY = struct.Struct(ATTR.format + "H")  # readdirattr: attr and the name's length


def _put_s(value: bytes) -> bytes:
    return _U16.pack(len(value)) + value


def _put_d(value: Any) -> bytes:
    return _U32.pack(len(value)) + bytes(value)


def _put_list_s(value: Any) -> bytes:
    return _U16.pack(len(value)) + b"".join([_put_s(v) for v in value])


def _put_list_q(value: Any) -> bytes:
    return _U16.pack(len(value)) + b"".join([_QID.pack(*v) for v in value])


def _put_q(value: tuple[int, int, int]) -> bytes:
    return _QID.pack(*value)


def _put_a(value: Any) -> bytes:
    return ATTR.pack(*value)


def _put_list_a(value: Any) -> bytes:
    return _U16.pack(len(value)) + b"".join([ATTR.pack(*v) for v in value])


def _put_w(value: Any) -> bytes:
    return _U16.pack(len(value)) + b"".join([_STEP.pack(fid, len(name)) + name for fid, name in value])


def _put_f(value: Any) -> bytes:
    return struct.pack(f"<H{len(value)}I", len(value), *value)


def _get_s(buf: Any, at: int, end: int) -> tuple[bytes, int]:
    stop = at + 2 + _U16.unpack_from(buf, at)[0]
    if stop > end:
        raise Malformed("a string runs past the message's end")
    return bytes(buf[at + 2 : stop]), stop


def _get_d(buf: Any, at: int, end: int) -> tuple[bytes, int]:
    stop = at + 4 + _U32.unpack_from(buf, at)[0]
    if stop > end:
        raise Malformed("data run past the message's end")
    return bytes(buf[at + 4 : stop]), stop


def _count(buf: Any, at: int, end: int, most: int, each: int) -> int:
    count: int = _U16.unpack_from(buf, at)[0]
    if count > most or at + 2 + count * each > end:
        raise Malformed(f"a list of {count} does not fit")
    return count


def _get_list_s(buf: Any, at: int, end: int) -> tuple[list[bytes], int]:
    count = _count(buf, at, end, WALK_MOST, 2)
    values, at = [], at + 2
    for _ in range(count):
        value, at = _get_s(buf, at, end)
        values.append(value)
    return values, at


def _get_q(buf: Any, at: int, end: int) -> tuple[tuple[int, ...], int]:
    return _QID.unpack_from(buf, at), at + 13


def _get_list_q(buf: Any, at: int, end: int) -> tuple[list[tuple[int, ...]], int]:
    count = _count(buf, at, end, WALK_MOST, 13)
    return [_QID.unpack_from(buf, at + 2 + 13 * i) for i in range(count)], at + 2 + 13 * count


def _get_a(buf: Any, at: int, end: int) -> tuple[Attr, int]:
    return _new_attr(Attr, _unpack_attr(buf, at)), at + 80


def _get_list_a(buf: Any, at: int, end: int) -> tuple[list[Attr], int]:
    count = _count(buf, at, end, WALK_MOST, 80)
    at += 2
    return [_new_attr(Attr, _unpack_attr(buf, at + 80 * i)) for i in range(count)], at + 80 * count


def _get_w(buf: Any, at: int, end: int) -> tuple[list[tuple[int, bytes]], int]:
    count = _count(buf, at, end, WALK_MOST, 6)
    steps, at = [], at + 2
    for _ in range(count):
        fid, length = _STEP.unpack_from(buf, at)
        at += 6
        if at + length > end:
            raise Malformed("a name runs past the message's end")
        steps.append((fid, bytes(buf[at : at + length])))
        at += length
    return steps, at


def _get_f(buf: Any, at: int, end: int) -> tuple[tuple[int, ...], int]:
    count = _count(buf, at, end, CLUNKS_MOST, 4)
    return struct.unpack_from(f"<{count}I", buf, at + 2), at + 2 + 4 * count


_INTEGERS = {"1": "B", "2": "H", "4": "I", "8": "Q"}
_PUT: dict[str, Callable[[Any], bytes]] = {
    "s": _put_s, "d": _put_d, "S": _put_list_s, "Q": _put_list_q, "q": _put_q,
    "a": _put_a, "A": _put_list_a, "w": _put_w, "f": _put_f,
}  # fmt: skip
_GET: dict[str, Callable[[Any, int, int], tuple[Any, int]]] = {
    "s": _get_s, "d": _get_d, "S": _get_list_s, "Q": _get_list_q, "q": _get_q,
    "a": _get_a, "A": _get_list_a, "w": _get_w, "f": _get_f,
}  # fmt: skip


class Message:
    """One row compiled: `encode(tag, *fields) -> bytes`, `decode(buf, at, end) -> tuple` with `at` past the header."""

    __slots__ = ("number", "name", "fields", "encode", "decode")

    encode: Callable[..., bytes]
    decode: Callable[[Any, int, int], tuple[Any, ...]]

    def __init__(self, number: int, name: str, spec: str) -> None:
        self.number, self.name = number, name
        self.fields = [tuple(part.split(":")) for part in spec.split()]

    def __getattr__(self, name: str) -> Any:
        """`encode` and `decode` are compiled when first asked for: most messages of a session are of a few kinds."""
        if name not in ("encode", "decode"):
            raise AttributeError(name)
        self.encode, self.decode = _compile(self.number, self.fields)
        return getattr(self, name)


def _compile(number: int, fields: list[tuple[str, ...]]) -> tuple[Any, Any]:
    """Write the straight-line code for a row, as collections.namedtuple does: runs of integers become one Struct."""
    scope: dict[str, Any] = {"Malformed": Malformed, "_HEAD": _HEAD}
    names = [name for name, _ in fields]
    pieces: list[tuple[str, list[str], bool]] = []  # (struct format or kind, names, optional)
    for name, kind in fields:
        optional = kind.endswith("?")
        kind = kind.rstrip("?")
        if kind in _INTEGERS and pieces and pieces[-1][0][0] == "<" and not optional:
            pieces[-1] = (pieces[-1][0] + _INTEGERS[kind], [*pieces[-1][1], name], False)
        elif kind in _INTEGERS:
            pieces.append(("<" + _INTEGERS[kind], [name], optional))
        else:
            pieces.append((kind, [name], False))
    before, parts, sizes, decode = [], [], [], []
    fixed = HEADER
    for i, (kind, group, optional) in enumerate(pieces):
        if kind[0] == "<":
            packed = struct.Struct(kind)
            scope[f"p{i}"], scope[f"u{i}"] = packed.pack, packed.unpack_from
            fixed += packed.size
            parts.append(f"p{i}({', '.join(group)})")
            if optional:
                decode.append(f"    if at == end: return {', '.join(n if n not in group else '0' for n in names)},")
            decode += [f"    {', '.join(group)}, = u{i}(buf, at)", f"    at += {packed.size}"]
        else:
            scope[f"p{i}"], scope[f"g{i}"] = _PUT[kind], _GET[kind]
            before.append(f"    v{i} = p{i}({group[0]})")
            sizes.append(f"len(v{i})")
            parts.append(f"v{i}")
            decode.append(f"    {group[0]}, at = g{i}(buf, at, end)")
    size = " + ".join([str(fixed), *sizes])
    if parts and not before and len(parts) == 1:  # integers only: one Struct with the header
        whole = struct.Struct("<IBH" + pieces[0][0][1:])
        scope["whole"] = whole.pack
        body = [f"    return whole({whole.size}, {number}, tag, {', '.join(names)})"]
    else:
        body = [*before, "    return " + " + ".join([f"_HEAD.pack({size}, {number}, tag)", *parts])]
    source = "\n".join([
        f"def encode({', '.join(['tag', *names])}):", *body,
        "def decode(buf, at, end):", *decode,
        "    if at != end: raise Malformed('a message is longer or shorter than its fields')",
        f"    return ({', '.join(names)}{',' if names else ''})",
    ])  # fmt: skip
    exec(source, scope)  # noqa: S102 - our own table, above
    return scope["encode"], scope["decode"]


# number of the T-message (the R-message is one more), name, T fields, R fields. 9p.h enum p9_msg_t.
_ROWS = [
    (8, "statfs", "fid:4", "type:4 bsize:4 blocks:8 bfree:8 bavail:8 files:8 ffree:8 fsid:8 namelen:4"),
    (12, "lopen", "fid:4 flags:4", "qid:q iounit:4"),
    (14, "lcreate", "fid:4 name:s flags:4 mode:4 gid:4", "qid:q iounit:4"),
    (16, "symlink", "dfid:4 name:s target:s gid:4", "qid:q"),
    (18, "mknod", "dfid:4 name:s mode:4 major:4 minor:4 gid:4", "qid:q"),
    (20, "rename", "fid:4 dfid:4 name:s", ""),
    (22, "readlink", "fid:4", "target:s"),
    (24, "getattr", "fid:4 mask:8",
     "valid:8 qid:q mode:4 uid:4 gid:4 nlink:8 rdev:8 size:8 blksize:8 blocks:8 atime:8 atime_ns:8 mtime:8 mtime_ns:8 "
     "ctime:8 ctime_ns:8 btime:8 btime_ns:8 gen:8 data_version:8"),
    (26, "setattr", "fid:4 valid:4 mode:4 uid:4 gid:4 size:8 atime:8 atime_ns:8 mtime:8 mtime_ns:8", ""),
    (30, "xattrwalk", "fid:4 newfid:4 name:s", "size:8"),
    (32, "xattrcreate", "fid:4 name:s size:8 flags:4", ""),
    (40, "readdir", "fid:4 offset:8 count:4", "data:d"),
    (50, "fsync", "fid:4 datasync:4?", ""),  # older peers send no datasync
    (52, "lock", "fid:4 type:1 flags:4 start:8 length:8 proc_id:4 client_id:s", "status:1"),
    (54, "getlock", "fid:4 type:1 start:8 length:8 proc_id:4 client_id:s",
     "type:1 start:8 length:8 proc_id:4 client_id:s"),
    (70, "link", "dfid:4 fid:4 name:s", ""),
    (72, "mkdir", "dfid:4 name:s mode:4 gid:4", "qid:q"),
    (74, "renameat", "olddirfid:4 oldname:s newdirfid:4 newname:s", ""),
    (76, "unlinkat", "dfid:4 name:s flags:4", ""),
    (100, "version", "msize:4 version:s", "msize:4 version:s"),
    (102, "auth", "afid:4 uname:s aname:s n_uname:4", "aqid:q"),
    (104, "attach", "fid:4 afid:4 uname:s aname:s n_uname:4", "qid:q"),
    (108, "flush", "oldtag:2", ""),
    (110, "walk", "fid:4 newfid:4 names:S", "qids:Q"),
    (116, "read", "fid:4 offset:8 count:4", "data:d"),
    (118, "write", "fid:4 offset:8 data:d", "count:4"),
    (120, "clunk", "fid:4", ""),
    (122, "remove", "fid:4", ""),
    # Ours, with VERSION_EXTENDED only.
    # Each step found is bound to its own newfid. `errno` says why the walk stopped early (0: it did not); `link` is the
    # target when the last step found is a symlink.
    (200, "walkattr", "fid:4 steps:w", "errno:4 link:s attrs:A"),
    # Entries are attr[80] name[s], without "." and ".."; `next` is the next cookie, 0 at the end.
    (202, "readdirattr", "fid:4 cookie:8 count:4", "next:8 data:d"),
    # Name empty: open fid itself; else its child, bound to newfid. The descriptor comes by SCM_RIGHTS and fid stays
    # unopened; a directory comes with none.
    (204, "openfd", "fid:4 newfid:4 flags:4 name:s", "attr:a link:s"),
    (206, "createfd", "dfid:4 newfid:4 flags:4 mode:4 uid:4 gid:4 name:s", "attr:a"),
    # mkdir, symlink and mknod by the file type in `mode`.
    (208, "make", "dfid:4 newfid:4 mode:4 uid:4 gid:4 major:4 minor:4 name:s target:s", "attr:a"),
    (210, "clunkbatch", "fids:f", ""),  # is not answered
    (212, "renameat2", "olddirfid:4 newdirfid:4 flags:4 oldname:s newname:s", ""),
    (214, "attr", "fid:4", "attr:a"),
    (216, "setattrx", "fid:4 valid:4 mode:4 uid:4 gid:4 size:8 atime:8 atime_ns:8 mtime:8 mtime_ns:8", "attr:a"),
    (218, "xattrget", "fid:4 name:s", "data:d"),  # name empty: the list, each ended by NUL
    (220, "xattrset", "fid:4 flags:4 name:s data:d", ""),
    (222, "linkattr", "dfid:4 fid:4 name:s", "attr:a"),
    # The whole of the directories `names` in `fid` and, as far as `count` bytes go, of `depth` levels of directories
    # below each, depth first: for each errno[4] length[4] path[s] (from fid) and entries as in readdirattr. One that is
    # too large says EOVERFLOW and is read with readdirattr.
    (224, "tree", "fid:4 count:4 depth:4 names:S", "data:d"),
]  # fmt: skip

LERROR = Message(7, "Rlerror", "ecode:4")
MESSAGES: dict[int, Message] = {7: LERROR}


class _Rows:
    """The messages by name: `T.walk`, `R.walk`."""

    def __init__(self, side: str) -> None:
        for number, name, t_fields, r_fields in _ROWS:
            row = Message(number, "T" + name, t_fields) if side == "T" else Message(number + 1, "R" + name, r_fields)
            MESSAGES[row.number] = row
            setattr(self, name, row)

    def __getattr__(self, name: str) -> Message:
        raise AttributeError(name)


T, R = _Rows("T"), _Rows("R")
EXTENDED_FIRST = 200  # numbers from here on belong to the extension


def describe(message: bytes | bytearray | memoryview) -> str:
    """One line for a whole message (header included), for traces; says so when it does not parse."""
    if len(message) < HEADER:
        return f"short message of {len(message)} bytes"
    _, number, tag = _HEAD.unpack_from(message)
    row = MESSAGES.get(number)
    if row is None:
        return f"message type {number} tag {tag} of {len(message)} bytes"
    try:
        values = row.decode(message, HEADER, len(message))
    except (Malformed, struct.error) as problem:
        return f"{row.name} tag {tag}: {problem}"
    shown = []
    for (name, kind), value in zip(row.fields, values, strict=True):
        shown.append(f"{name} {len(value)} bytes" if kind == "d" else f"{name} {value!r}")
    return " ".join([row.name, "tag", str(tag), *shown])


def name_errno(name: bytes) -> int:
    """0 when `name` can name a directory entry, else the errno that Linux would give."""
    import errno

    if not name:
        return errno.ENOENT
    if len(name) > NAME_MOST:
        return errno.ENAMETOOLONG
    if b"/" in name or b"\0" in name or name == b"." or name == b"..":
        return errno.EINVAL
    return 0
