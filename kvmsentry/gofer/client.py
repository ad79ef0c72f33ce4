"""The Sentry's side of 9P2000.L: synchronous calls to the Gofer, or to any other 9P2000.L server.

A `Node` is a fid with the attributes it was last seen with. Operations raise `Errno` with the server's errno; a lost or
misbehaving server is `HostError("the gofer is gone")` once and for every later call. Not thread safe: one connection
belongs to one thread.

With a server that speaks VERSION_EXTENDED a path walk, an open with its descriptor, or a whole directory with
attributes is one round trip; otherwise the same calls are made of standard messages, and files are read and written
through the fid. What the server sends is checked like any peer's input: sizes, types, tags, names, the kind of a passed
descriptor.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from errno import EBADF, EEXIST, EINVAL, EIO, EISDIR, ELOOP, ENOENT, ENOTDIR, EOPNOTSUPP
from typing import NamedTuple

from kvmsentry.errors import Errno
from kvmsentry.gofer import p9
from kvmsentry.gofer.connection import TAG, Connection
from kvmsentry.gofer.p9 import NOFID, NOID, Attr

NOW = -1  # setattr: a time of "now", by the server's clock

_CLUNKS_AT_ONCE = 512
_unpack_entry = p9.ENTRY.unpack_from
_unpack_attr = p9.ATTR.unpack_from
_walk_head = struct.Struct("<IBHIHIH").pack  # a walkattr of one step up to the name
_new = tuple.__new__
_LISTING = struct.Struct("<IIH")  # tree: errno, length of the entries, of the path
_DOTS = frozenset((b"", b".", b".."))


class StatFs(NamedTuple):
    """statfs(2)'s fields that 9P carries."""

    type: int
    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    fsid: int
    namelen: int


class Client(Connection):
    """A connection and the trees at its other end."""

    def attach(self, tree: str | bytes = b"", uid: int = 0) -> Node:
        """The root of a tree: by name, decimal index, or b"" for the first. `uid` is whom a plain server acts for."""
        aname = tree.encode() if isinstance(tree, str) else tree
        fid = self._fid()
        try:
            self._call(p9.T.attach, p9.R.attach, fid, NOFID, b"", aname, uid)
        except Errno:
            self._free.append(fid)
            raise
        node = Node(self, fid, None, b"")
        node.getattr()
        return node


class Node:
    """A fid: `attr` as last seen (refreshed by the calls that say so), `target` that of a symlink.

    A node that is garbage collected is clunked with the next call.
    """

    __slots__ = ("client", "fid", "attr", "target", "_io", "_io_flags", "__weakref__")

    attr: Attr

    def __init__(self, client: Client, fid: int, attr: Attr | None, target: bytes) -> None:
        self.client, self.fid, self.target = client, fid, target
        if attr is not None:
            self.attr = attr
        self._io = -1  # plain servers: the fid that was opened for I/O
        self._io_flags = 0

    def clunk(self) -> None:
        """Give the fid up; the server is told with the next call, or when many have gathered."""
        fid = self.fid
        if fid >= 0:
            self.fid = -1
            client = self.client
            client._clunks.append(fid)
            if self._io >= 0:
                client._clunks.append(self._io)
                self._io = -1
            if len(client._clunks) >= _CLUNKS_AT_ONCE:
                client.flush()

    def __del__(self) -> None:
        if self.fid >= 0:
            self.client._clunks.append(self.fid)
            if self._io >= 0:
                self.client._clunks.append(self._io)

    # --- names ---

    def lookup(self, name: bytes) -> Node | None:
        """The child `name`, None when there is none; one round trip. Errno ENOTDIR, ENAMETOOLONG, EINVAL, ...."""
        client = self.client
        if not client.extended:
            nodes, error = self._walk_plain([name])
            if nodes:
                return nodes[0]
            if error == ENOENT:
                return None
            raise Errno(error)
        fid = client._free.pop() if client._free else client._fid()
        length = len(name)
        if length > 255:
            length, name = 256, name[:256]  # the server says ENAMETOOLONG
        message = _walk_head(19 + length, 200, TAG, self.fid, 1, fid, length) + name
        try:
            size = client._exchange(message, TAG, 201)
        except Errno:
            client._free.append(fid)
            raise
        buf = client._buf
        # walkattr's answer: errno[4] link[s] n[2] attr[80]; the common case is no error and no link
        if size == 95 and buf[7:15] == b"\0\0\0\0\0\0\1\0":
            return Node(client, fid, _new(Attr, _unpack_attr(buf, 15)), b"")
        error, link, attrs = client._decode(p9.R.walkattr, size)
        if len(attrs) == 1:
            return Node(client, fid, attrs[0], link)
        client._free.append(fid)
        if attrs or not error:
            raise client._lost("a walk of one name found several")
        if error == ENOENT:
            return None
        raise Errno(error if error < 4096 else EIO)

    def walk(self, names: list[bytes]) -> tuple[list[Node], int]:
        """Walk several names in one round trip (up to 16 at a time): the nodes found, in order, and why it stopped.

        The second is 0 when all were found, ENOENT when the next name is missing, ENOTDIR when the last node found is
        no directory (a symlink has its `target`), or the server's errno for the next name.
        """
        client = self.client
        if len(names) > p9.WALK_MOST:
            nodes, error = self.walk(names[: p9.WALK_MOST])
            if error:
                return nodes, error
            more, error = nodes[-1].walk(names[p9.WALK_MOST :])
            return nodes + more, error
        if not client.extended:
            return self._walk_plain(names)
        for name in names:
            if len(name) > 65535:
                raise Errno(EINVAL)
        fids = [client._fid() for _ in names]
        try:
            error, link, attrs = client._call(
                p9.T.walkattr, p9.R.walkattr, self.fid, list(zip(fids, names, strict=True))
            )
        except Errno:
            client._free += fids
            raise
        found = len(attrs)
        if found > len(names) or (found < len(names)) != (error != 0):
            raise client._lost("a walk found what was not asked for")
        client._free += fids[found:]
        nodes = [Node(client, fid, attr, b"") for fid, attr in zip(fids[:found], attrs, strict=True)]
        if link:
            if not nodes:
                raise client._lost("a walk found nothing, and its target")
            nodes[-1].target = link
        return nodes, min(error, 4095)

    def _walk_plain(self, names: list[bytes]) -> tuple[list[Node], int]:
        nodes: list[Node] = []
        above = self
        for name in names:
            if above is not self and not stat.S_ISDIR(above.attr.mode):
                return nodes, ENOTDIR
            problem = p9.name_errno(name)  # a server may take ".." for what it is in Plan 9
            if problem:
                return nodes, problem
            try:
                above = above._clone(name)
                above.getattr()
                if stat.S_ISLNK(above.attr.mode):
                    above.target = above.readlink()
            except Errno as error:
                return nodes, error.errno
            nodes.append(above)
        return nodes, 0

    def _clone(self, *names: bytes) -> Node:
        client = self.client
        fid = client._fid()
        try:
            (qids,) = client._call(p9.T.walk, p9.R.walk, self.fid, fid, list(names))
            if len(qids) != len(names):
                raise Errno(ENOENT)
        except Errno:
            client._free.append(fid)
            raise
        return Node(client, fid, None, b"")

    def readlink(self) -> bytes:
        """The target. Errno EINVAL when this is no symlink."""
        (target,) = self.client._call(p9.T.readlink, p9.R.readlink, self.fid)
        if not target or b"\0" in target:
            raise Errno(EIO)
        return target

    # --- attributes ---

    def getattr(self) -> Attr:
        """Attributes now; also kept in `attr`. Errno ESTALE when the name leads to another object by now."""
        client = self.client
        if client.extended:
            size = client._exchange(p9.T.attr.encode(TAG, self.fid), TAG, 215)
            if size != 87:
                raise client._lost("attributes of another length")
            self.attr = _new(Attr, _unpack_attr(client._buf, 7))
            return self.attr
        (_, qid, mode, uid, gid, nlink, rdev, length, blksize, blocks, at, at_ns, mt, mt_ns, ct, ct_ns, *_rest) = (
            client._call(p9.T.getattr, p9.R.getattr, self.fid, p9.GETATTR_BASIC)
        )
        self.attr = Attr(
            0, qid[2], mode, uid, gid, nlink, rdev, length, blksize, blocks,
            _ns(at, at_ns), _ns(mt, mt_ns), _ns(ct, ct_ns),
        )  # fmt: skip
        return self.attr

    def setattr(
        self, mode: int | None = None, uid: int | None = None, gid: int | None = None, size: int | None = None,
        atime_ns: int | None = None, mtime_ns: int | None = None,
    ) -> Attr:  # fmt: skip
        """Change what is given (times: nanoseconds or NOW) and return the attributes after it; `attr` is refreshed."""
        valid, times = 0, []
        for bit, value in (
            (p9.SETATTR_MODE, mode), (p9.SETATTR_UID, uid), (p9.SETATTR_GID, gid), (p9.SETATTR_SIZE, size),
        ):  # fmt: skip
            if value is not None:
                valid |= bit
        for bit, set_bit, when in (
            (p9.SETATTR_ATIME, p9.SETATTR_ATIME_SET, atime_ns),
            (p9.SETATTR_MTIME, p9.SETATTR_MTIME_SET, mtime_ns),
        ):
            if when is None or when == NOW:
                valid |= bit if when == NOW else 0
                times += [0, 0]
            else:
                valid |= bit | set_bit
                times += [when // 10**9 & 0xFFFFFFFFFFFFFFFF, when % 10**9]
        client = self.client
        values = (self.fid, valid, mode or 0, uid or 0, gid or 0, size or 0, *times)
        if client.extended:
            (self.attr,) = client._call(p9.T.setattrx, p9.R.setattrx, *values)
            return self.attr
        client._call(p9.T.setattr, p9.R.setattr, *values)
        return self.getattr()

    def statfs(self) -> StatFs:
        """The file system's figures."""
        return StatFs(*self.client._call(p9.T.statfs, p9.R.statfs, self.fid))

    # --- directories ---

    def readdir_attrs(self) -> list[tuple[bytes, Attr]]:
        """All entries with their attributes, without "." and ".."."""
        entries: list[tuple[bytes, Attr]] = []
        for page in self.readdir_pages():
            entries += page
        return entries

    def _entries(self, data: bytes, at: int, end: int) -> list[tuple[bytes, Attr]]:
        """The entries packed in data[at:end], checked."""
        entries = []
        try:
            while at < end:
                values = _unpack_entry(data, at)
                start = at + 82
                at = start + values[13]
                name = data[start:at]
                if b"/" in name or b"\0" in name or name in _DOTS or at > end:
                    raise self.client._lost("a directory entry with an impossible name")
                entries.append((name, _new(Attr, values[:13])))
        except struct.error:
            raise self.client._lost("a directory entry was cut short") from None
        return entries

    def tree(
        self, names: list[bytes], count: int, depth: int
    ) -> list[tuple[bytes, list[tuple[bytes, Attr]] | None]] | None:
        """[(path from here, entries)] of the child directories `names` (at most WALK_MOST), and of directories up to
        `depth` levels below each, as far as `count` bytes go, in one round trip; names[0] is there in any case. Entries
        None: it cannot be had this way (an error, too large; read it by itself). None altogether: the peer does not
        know how."""
        client = self.client
        if not client.extended:
            return None
        (data,) = client._call(p9.T.tree, p9.R.tree, self.fid, min(count, client.msize - 32), depth, names)
        found: list[tuple[bytes, list[tuple[bytes, Attr]] | None]] = []
        at, end = 0, len(data)
        while at < end:
            if end - at < _LISTING.size:
                raise client._lost("a listing was cut short")
            problem, length, path_length = _LISTING.unpack_from(data, at)
            at += _LISTING.size
            if length + path_length > end - at:
                raise client._lost("a listing was cut short")
            path = data[at : at + path_length]
            at += path_length
            found.append((path, self._entries(data, at, at + length) if not problem else None))
            at += length
        if not found or found[0][0] != names[0]:
            raise client._lost("listings that nobody asked for")
        return found

    def readdir_pages(self) -> Iterator[list[tuple[bytes, Attr]]]:
        """The same in pieces as the server sends them, so that a huge directory need not be held at once."""
        client = self.client
        if not client.extended:
            yield from self._readdir_plain()
            return
        cookie = 0
        while True:
            size = client._exchange(
                p9.T.readdirattr.encode(TAG, self.fid, cookie, client.msize - 32), TAG, p9.R.readdirattr.number
            )
            following, data = client._decode(p9.R.readdirattr, size)
            page = self._entries(data, 0, len(data))
            if following and (not page or following <= cookie):
                raise client._lost("a directory that does not end")
            yield page
            if not following:
                return
            cookie = following

    def _readdir_plain(self) -> Iterator[list[tuple[bytes, Attr]]]:
        client = self.client
        reader = self._clone()
        client._call(p9.T.lopen, p9.R.lopen, reader.fid, os.O_RDONLY | os.O_DIRECTORY)
        offset, seen = 0, 0
        while True:
            (data,) = client._call(p9.T.readdir, p9.R.readdir, reader.fid, offset, client.msize - 24)
            if not data:
                break
            names = []
            at, end = 0, len(data)
            try:
                while at < end:
                    *_, offset, _kind, length = p9.DIRENT.unpack_from(data, at)
                    name = data[at + 24 : at + 24 + length]
                    at += 24 + length
                    if at > end or b"/" in name or b"\0" in name or not name:
                        raise client._lost("a directory entry with an impossible name")
                    names.append(name)
            except struct.error:
                raise client._lost("a directory entry was cut short") from None
            seen += len(names)
            if seen > 1 << 24:
                raise client._lost("a directory that does not end")
            page = []
            for name in names:
                if name not in _DOTS:
                    node = self.lookup(name)
                    if node is not None:
                        page.append((name, node.attr))
                        node.clunk()
            yield page
        reader.clunk()

    # --- files ---

    def open(self, flags: int) -> tuple[int | None, int]:
        """Open with open(2) `flags`: (descriptor of the host that the caller owns, or None, and the server's iounit).

        None: a directory, or a server that passes no descriptors: use read and write. `attr` is refreshed.
        """
        client = self.client
        if client.extended:
            (attr, _), fd = client._call_fd(p9.T.openfd, p9.R.openfd, self.fid, NOFID, flags, b"")
            self.attr = attr
            return (fd if fd >= 0 else None), client.msize - 24
        if self._io >= 0:  # opened before: one fid that can do both
            have, want = self._io_flags & os.O_ACCMODE, flags & os.O_ACCMODE
            flags = flags & ~os.O_ACCMODE | (want if have == want else os.O_RDWR)
        opened = self._clone()
        _, iounit = client._call(p9.T.lopen, p9.R.lopen, opened.fid, flags)
        self._opened(opened, flags)
        self.getattr()
        return None, iounit

    def _opened(self, opened: Node, flags: int) -> None:
        if self._io >= 0:
            self.client._forget(self._io)
        self._io, self._io_flags, opened.fid = opened.fid, flags, -1

    def open_child(self, name: bytes, flags: int) -> tuple[Node | None, int | None]:
        """lookup and open in one round trip: (node or None when missing, descriptor or None).

        Symlinks, devices, FIFOs and sockets are found but not opened.
        """
        client = self.client
        if not client.extended:
            node = self.lookup(name)
            if node is None or not (stat.S_ISREG(node.attr.mode) or stat.S_ISDIR(node.attr.mode)):
                return node, None
            return node, node.open(flags)[0]
        if not 0 < len(name) <= 65535:
            raise Errno(ENOENT if not name else EINVAL)
        newfid = client._fid()
        try:
            (attr, link), fd = client._call_fd(p9.T.openfd, p9.R.openfd, self.fid, newfid, flags, name)
        except Errno as error:
            client._free.append(newfid)
            if error.errno == ENOENT:
                return None, None
            raise
        return Node(client, newfid, attr, link), fd if fd >= 0 else None

    def create(self, name: bytes, flags: int, mode: int, gid: int = NOID, uid: int = NOID) -> tuple[Node, int | None]:
        """Create and open a regular file of uid:gid (NOID: the server's). O_EXCL as open(2); O_CREAT is implied."""
        client = self.client
        if client.extended:
            if not 0 < len(name) <= 65535:
                raise Errno(ENOENT if not name else EINVAL)
            newfid = client._fid()
            try:
                (attr,), fd = client._call_fd(
                    p9.T.createfd, p9.R.createfd, self.fid, newfid, flags, mode, uid, gid, name
                )
            except Errno:
                client._free.append(newfid)
                raise
            return Node(client, newfid, attr, b""), fd if fd >= 0 else None
        there = self.lookup(name)
        if there is not None:
            if flags & os.O_EXCL:
                raise Errno(EEXIST)
            if not stat.S_ISREG(there.attr.mode):
                raise Errno(EISDIR if stat.S_ISDIR(there.attr.mode) else ELOOP)
            there.open(flags)
            return there, None
        opened = self._clone()
        client._call(p9.T.lcreate, p9.R.lcreate, opened.fid, name, flags | os.O_CREAT, mode & 0o7777, gid)
        node = self.lookup(name)
        if node is None:
            raise Errno(ENOENT)
        node._opened(opened, flags)
        if uid != NOID:
            node.setattr(uid=uid)
        return node, None

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes at `offset`, b"" at the end; through the fid, for servers that pass no descriptors."""
        client, parts = self.client, []
        fid = self._io if self._io >= 0 else self.fid
        while count:
            asked = min(count, client.msize - 24)
            (data,) = client._call(p9.T.read, p9.R.read, fid, offset, asked)
            if len(data) > asked:
                raise client._lost("more data than was asked for")
            parts.append(data)
            offset += len(data)
            count -= len(data)
            if len(data) < asked:
                break
        return b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Bytes written at `offset`; through the fid, as read."""
        client, done = self.client, 0
        fid = self._io if self._io >= 0 else self.fid
        while done < len(data):
            piece = data[done : done + client.msize - 24]
            (count,) = client._call(p9.T.write, p9.R.write, fid, offset + done, piece)
            if count > len(piece):
                raise client._lost("more written than was given")
            done += count
            if count < len(piece):
                break
        return done

    def fsync(self, datasync: bool = False) -> None:
        """fsync(2) or fdatasync(2) of the file on the host. With a descriptor at hand, call it on that instead."""
        fid = self._io if self._io >= 0 else self.fid
        self.client._call(p9.T.fsync, p9.R.fsync, fid, int(datasync))

    def lock(self, kind: int, start: int, length: int, owner: int = 0) -> bool:
        """A record lock (p9.LOCK_RDLCK, WRLCK, UNLCK) on the fid opened for I/O; False when another owner has it."""
        if self._io < 0:
            raise Errno(EBADF)
        (status,) = self.client._call(p9.T.lock, p9.R.lock, self._io, kind, 0, start, length, owner, b"kvmsentry")
        if status in (p9.LOCK_ERROR, p9.LOCK_GRACE):
            raise Errno(EIO)
        return bool(status == p9.LOCK_SUCCESS)

    # --- making, linking and removing names ---

    def _make(self, name: bytes, mode: int, uid: int, gid: int, target: bytes) -> Node:
        client = self.client
        if len(name) > 65535 or len(target) > 65535:
            raise Errno(EINVAL)
        if client.extended:
            newfid = client._fid()
            try:
                (attr,) = client._call(p9.T.make, p9.R.make, self.fid, newfid, mode, uid, gid, 0, 0, name, target)
            except Errno:
                client._free.append(newfid)
                raise
            return Node(client, newfid, attr, target)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            client._call(p9.T.mkdir, p9.R.mkdir, self.fid, name, mode & 0o7777, gid)
        elif kind == stat.S_IFLNK:
            client._call(p9.T.symlink, p9.R.symlink, self.fid, name, target, gid)
        else:
            client._call(p9.T.mknod, p9.R.mknod, self.fid, name, mode, 0, 0, gid)
        node = self.lookup(name)
        if node is None:
            raise Errno(ENOENT)
        if uid != NOID:
            node.setattr(uid=uid)
        return node

    def mkdir(self, name: bytes, mode: int, gid: int = NOID, uid: int = NOID) -> Node:
        """mkdir(2); the mode is taken as it is, no umask."""
        return self._make(name, stat.S_IFDIR | mode & 0o7777, uid, gid, b"")

    def symlink(self, name: bytes, target: bytes, gid: int = NOID, uid: int = NOID) -> Node:
        """symlink(2)."""
        return self._make(name, stat.S_IFLNK | 0o777, uid, gid, target)

    def mknod(self, name: bytes, mode: int, gid: int = NOID, uid: int = NOID) -> Node:
        """A FIFO, socket or empty regular file by the type in `mode`; device nodes are EPERM from our Gofer."""
        if stat.S_IFMT(mode) in (stat.S_IFDIR, stat.S_IFLNK):
            raise Errno(EINVAL)
        return self._make(name, mode, uid, gid, b"")

    def link(self, name: bytes, target: Node) -> Attr:
        """A hard link `name` in this directory to `target`, whose `attr` is refreshed and returned."""
        client = self.client
        if client.extended:
            (target.attr,) = client._call(p9.T.linkattr, p9.R.linkattr, self.fid, target.fid, name)
            return target.attr
        client._call(p9.T.link, p9.R.link, self.fid, target.fid, name)
        return target.getattr()

    def rename(self, name: bytes, new_dir: Node, new_name: bytes, flags: int = 0) -> None:
        """renameat2(2) from this directory, `flags` NOREPLACE or EXCHANGE; nodes of what moved stay valid."""
        client = self.client
        if client.extended:
            client._call(p9.T.renameat2, p9.R.renameat2, self.fid, new_dir.fid, flags, name, new_name)
            return
        if flags:
            raise Errno(EINVAL)
        try:
            client._call(p9.T.renameat, p9.R.renameat, self.fid, name, new_dir.fid, new_name)
        except Errno as error:
            if error.errno != EOPNOTSUPP:
                raise
            moving = self._clone(name)  # a server from before renameat
            client._call(p9.T.rename, p9.R.rename, moving.fid, new_dir.fid, new_name)

    def unlink(self, name: bytes, directory: bool = False) -> None:
        """unlink(2), or rmdir(2) with `directory`. Nodes of the removed object keep working for getattr and open."""
        client = self.client
        try:
            client._call(p9.T.unlinkat, p9.R.unlinkat, self.fid, name, p9.AT_REMOVEDIR if directory else 0)
        except Errno as error:
            if client.extended or error.errno != EOPNOTSUPP:
                raise
            node = self.lookup(name)  # a server from before unlinkat
            if node is None:
                raise Errno(ENOENT) from None
            if stat.S_ISDIR(node.attr.mode) != directory:
                raise Errno(ENOTDIR if directory else EISDIR) from None
            fid, node.fid = node.fid, -1
            try:
                client._call(p9.T.remove, p9.R.remove, fid)  # clunks it whatever the answer
            finally:
                client._free.append(fid)

    # --- extended attributes ---

    def getxattr(self, name: bytes) -> bytes:
        """The value of an extended attribute. Errno ENODATA, EOPNOTSUPP (a namespace the server does not serve)."""
        client = self.client
        if client.extended:
            return client._call(p9.T.xattrget, p9.R.xattrget, self.fid, name)[0]
        reader = Node(client, client._fid(), None, b"")
        try:
            (size,) = client._call(p9.T.xattrwalk, p9.R.xattrwalk, self.fid, reader.fid, name)
        except Errno:
            client._free.append(reader.fid)
            reader.fid = -1
            raise
        if size > 65536:
            raise client._lost("an extended attribute over 64 KiB")
        return reader.read(0, size)

    def listxattr(self) -> list[bytes]:
        """The names of the extended attributes."""
        return [name for name in self.getxattr(b"").split(b"\0") if name]

    def setxattr(self, name: bytes, value: bytes, flags: int = 0) -> None:
        """setxattr(2); flags XATTR_CREATE, XATTR_REPLACE."""
        client = self.client
        if client.extended:
            client._call(p9.T.xattrset, p9.R.xattrset, self.fid, flags, name, value)
            return
        writer = self._clone()
        client._call(p9.T.xattrcreate, p9.R.xattrcreate, writer.fid, name, len(value), flags)
        writer.write(0, value)
        fid, writer.fid = writer.fid, -1
        try:
            client._call(p9.T.clunk, p9.R.clunk, fid)  # it is set now, so its errno counts
        finally:
            client._free.append(fid)

    def removexattr(self, name: bytes) -> None:
        """removexattr(2)."""
        client = self.client
        if client.extended:
            client._call(p9.T.xattrset, p9.R.xattrset, self.fid, p9.XATTR_REMOVE, name, b"")
        else:
            self.setxattr(name, b"", os.XATTR_REPLACE)  # v9fs's way to say it


def _ns(seconds: int, nanoseconds: int) -> int:
    """9P's unsigned seconds are two's complement before 1970."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * 10**9 + nanoseconds % 10**9
