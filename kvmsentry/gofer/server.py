"""The Gofer's side of the connection: what each 9P2000.L message does to a host tree.

One connection, one thread, one request at a time. The peer is the Sentry, which an attacker may own: a message that
does not parse ends the connection with one line on stderr; everything else that is wrong is an Rlerror. No request
makes us follow a symlink, leave a tree, or open anything but regular files and directories (see nodes.py).
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from errno import EBADF, EBUSY, EFBIG, EINVAL, EIO, EISDIR, EMFILE, EMSGSIZE, ENOENT, ENOTDIR, EOPNOTSUPP, EPERM

from errno import EROFS, EXDEV  # isort: skip
from operator import attrgetter
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.gofer import hostcalls, p9
from kvmsentry.gofer.nodes import O_TMPFILE_BIT, Node, Nodes, Tree, check_name, chmod, writes

FIDS_MOST = 1 << 20
OPENS_MOST = 2048
XATTR_MOST = 65536  # uapi/linux/limits.h XATTR_SIZE_MAX
_XATTRS_READABLE = (b"user.", b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default")
_XATTRS_WRITABLE = (b"user.",)
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37  # uapi asm-generic/fcntl.h
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock, x86-64
_RENAME_FLAGS = 0x3  # RENAME_NOREPLACE | RENAME_EXCHANGE (uapi/linux/fs.h)
_MOST = (1 << 63) - 1
_FS_ENCODING = sys.getfilesystemencoding()

_status_fields = attrgetter(
    "st_ino", "st_mode", "st_uid", "st_gid", "st_nlink", "st_rdev", "st_size", "st_blksize", "st_blocks",
    "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
)  # fmt: skip
_pack_attr = p9.ATTR.pack
_stat = os.stat


class _Open:
    """What a fid has besides its node: an open file, a directory being read, or an xattr in transit."""

    __slots__ = ("fd", "scan", "cookie", "pending", "value", "xattr")

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd
        self.scan: Iterator[Any] | None = None
        self.cookie = 0  # number of entries handed out so far
        self.pending: tuple[bytes, bytes] | None = None  # an entry that did not fit the last reply
        self.value: bytearray | None = None  # xattr: bytes read or written
        self.xattr: tuple[bytes, int, int] | None = None  # name, size, flags of an xattr being written

    def close(self) -> None:
        if self.scan is not None:
            self.scan.close()  # type: ignore[attr-defined]
            self.scan = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Server:
    """Serves `trees` to one peer. Trees are chosen by name or decimal index at attach; b"" is the first."""

    def __init__(
        self, trees: list[Tree], extensions: bool = True, owns: bool = True, trace: Callable[[str], None] | None = None
    ) -> None:
        self.trees = trees
        self.nodes = Nodes()
        self.extensions, self.trace = extensions, trace
        self.msize, self.extended = p9.MSIZE, False
        self.fids: dict[int, Node] = {}
        self.opens: dict[int, _Open] = {}
        self.devices: dict[int, int] = {}  # host st_dev -> index shown to the peer
        self.give: int = -1  # descriptor to send along with the reply
        # May we give files away? In a user namespace that maps one user (owns=False) the capability does not say it.
        self.owns = owns and bool(hostcalls.effective_capabilities() & 1 << hostcalls.CAP_CHOWN)
        self.handlers: list[tuple[Callable[..., Any], Callable[..., Any], p9.Message] | None] = [None] * 256
        for row in p9.MESSAGES.values():
            method = getattr(self, "t_" + row.name[1:], None)
            if row.name[0] == "T" and method is not None:
                self.handlers[row.number] = (row.decode, method, getattr(p9.R, row.name[1:]))

    # --- the connection ---

    def serve(self, sock: socket.socket) -> None:
        """Answer until the peer hangs up or says something that does not parse."""
        rest = b""
        try:
            while True:
                data = sock.recv(1 << 16)
                if not data:
                    return
                data = rest + data if rest else data
                at, end = 0, len(data)
                while end - at >= 4:
                    size = int.from_bytes(data[at : at + 4], "little")
                    if size < p9.HEADER or size > self.msize:
                        raise p9.Malformed(f"a message of {size} bytes")
                    if end - at < size:
                        if size > 1 << 16:  # gather a large write without quadratic copying
                            data = data[at:] + _receive(sock, size - (end - at))
                            at, end = 0, len(data)
                            if end < size:
                                return
                        else:
                            break
                    reply = self.handle(data, at, at + size)
                    if reply is not None:
                        self._send(sock, reply)
                    at += size
                rest = data[at:]
        except p9.Malformed as problem:
            complain(f"gofer: closing the connection: {problem}")
        except (ConnectionError, TimeoutError):
            pass  # the peer is gone: the same as the end of its stream
        except MemoryError:
            complain("gofer: closing the connection: out of memory")
        except Exception as problem:  # noqa: BLE001 - a bug of ours must end in one line and a closed connection too
            complain(f"gofer: closing the connection: {type(problem).__name__}: {problem}")
        finally:
            self.reset()
            sock.close()

    def _send(self, sock: socket.socket, reply: bytes) -> None:
        fd = self.give
        if fd < 0:
            sock.sendall(reply)
            return
        self.give = -1
        try:
            sent = sock.sendmsg([reply], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        finally:
            os.close(fd)
        if sent < len(reply):
            sock.sendall(reply[sent:])

    def handle(self, data: bytes, at: int, end: int) -> bytes | None:
        """Answer the message data[at:end]; None when it has no answer. Malformed when it does not parse."""
        handler = self.handlers[data[at + 4]]
        tag = data[at + 5] | data[at + 6] << 8
        if self.trace:
            self.trace(p9.describe(data[at:end]))
        if handler is None or (not self.extended and data[at + 4] >= p9.EXTENDED_FIRST):
            raise p9.Malformed(f"message type {data[at + 4]}")
        decode, method, answer = handler
        try:
            values = decode(data, at + p9.HEADER, end)
        except struct.error:
            raise p9.Malformed("a message is shorter than its fields") from None
        try:
            reply = method(tag, *values)
        except OSError as problem:
            reply = p9.LERROR.encode(tag, problem.errno or EIO)
        except Errno as problem:
            reply = p9.LERROR.encode(tag, problem.errno)
        if reply is None:
            if answer is p9.R.clunkbatch:
                return None
            reply = answer.encode(tag)
        elif len(reply) > self.msize:
            reply = p9.LERROR.encode(tag, EMSGSIZE)
        if self.trace:
            self.trace(p9.describe(reply))
        return reply

    def reset(self) -> None:
        """Forget all fids and close what they hold; the trees stay."""
        for opened in self.opens.values():
            opened.close()
        self.opens.clear()
        for node in self.fids.values():
            self.nodes.release(node)
        self.fids.clear()
        if self.give >= 0:
            os.close(self.give)
            self.give = -1

    # --- fids ---

    def _node(self, fid: int) -> Node:
        node = self.fids.get(fid)
        if node is None:
            raise Errno(EBADF)
        return node

    def _writable(self, fid: int) -> Node:
        node = self._node(fid)
        if node.tree.read_only:
            raise Errno(EROFS)
        return node

    def _vacant(self, *fids: int) -> None:
        """Errno unless every one of `fids` can be bound now."""
        for fid in fids:
            if fid in self.fids or fid == p9.NOFID:
                raise Errno(EBADF)
        if len(set(fids)) != len(fids):
            raise Errno(EBADF)
        if len(self.fids) + len(fids) > FIDS_MOST:
            raise Errno(EMFILE)

    def _bind(self, fid: int, node: Node) -> None:
        node.refs += 1
        self.fids[fid] = node

    def _unbind(self, fid: int) -> None:
        node = self.fids.pop(fid, None)
        if node is not None:
            opened = self.opens.pop(fid, None)
            if opened is not None:
                opened.close()
            self.nodes.release(node)

    def _opening(self, fid: int) -> None:
        if fid in self.opens:
            raise Errno(EBADF)
        if len(self.opens) >= OPENS_MOST:
            raise Errno(EMFILE)

    def _file(self, fid: int) -> int:
        opened = self.opens.get(fid)
        if opened is None or opened.fd < 0:
            raise Errno(EBADF)
        return opened.fd

    def _attr(self, status: os.stat_result) -> bytes:
        devices = self.devices
        dev = devices.get(status.st_dev)
        if dev is None:
            dev = devices[status.st_dev] = len(devices)
        try:
            return _pack_attr(dev, *_status_fields(status))
        except struct.error:  # times outside 1677 to 2262, which some file systems can hold
            values = list(_status_fields(status))
            values[9:] = [min(max(t, -_MOST), _MOST) for t in values[9:]]
            return _pack_attr(dev, *values)

    def _as_attr(self, status: os.stat_result) -> p9.Attr:
        return p9.Attr._make(p9.ATTR.unpack(self._attr(status)))

    def _child(self, directory: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Look `name` up in `directory`. The node is unreferenced: bind it, or `drop_unused` it."""
        check_name(name)
        status = _stat(name, dir_fd=self.nodes.directory(directory), follow_symlinks=False)
        return self.nodes.child(directory, name, status), status

    # --- session ---

    def t_version(self, tag: int, msize: int, version: bytes) -> bytes:
        self.reset()
        if msize < p9.MSIZE_LEAST:
            raise Errno(EINVAL)
        self.msize = min(msize, p9.MSIZE)
        self.extended = self.extensions and version == p9.VERSION_EXTENDED and msize >= p9.MSIZE_EXTENDED
        if not self.extended:
            # version(5): answer the longest prefix that we speak, else "unknown"
            version = p9.VERSION if version == p9.VERSION or version.startswith(p9.VERSION + b".") else b"unknown"
        return p9.R.version.encode(tag, self.msize, version)

    def t_auth(self, tag: int, afid: int, uname: bytes, aname: bytes, n_uname: int) -> bytes:
        raise Errno(ENOENT)  # not required; diod's client looks for this errno

    def t_attach(self, tag: int, fid: int, afid: int, uname: bytes, aname: bytes, n_uname: int) -> bytes:
        self._vacant(fid)
        chosen = None
        for index, tree in enumerate(self.trees):
            if aname == tree.name or aname == b"%d" % index or (not aname and index == 0):
                chosen = tree
                break
        if chosen is None:
            raise Errno(ENOENT)
        status = self.nodes.lstat(chosen.root)
        self._bind(fid, chosen.root)
        return p9.R.attach.encode(tag, self._as_attr(status).qid)

    def t_flush(self, tag: int, oldtag: int) -> None:
        """Requests are answered in order: whatever it names was answered already."""

    def t_clunk(self, tag: int, fid: int) -> None:
        node = self._node(fid)
        opened = self.opens.get(fid)
        try:
            if opened is not None and opened.xattr is not None and opened.value is not None:
                name, size, flags = opened.xattr
                if len(opened.value) != size:
                    raise Errno(EINVAL)
                # v9fs removes an attribute by replacing it with nothing
                self._set_xattr(node, name, bytes(opened.value), p9.XATTR_REMOVE if flags == 2 and not size else flags)
        finally:
            self._unbind(fid)

    def t_clunkbatch(self, tag: int, fids: tuple[int, ...]) -> None:
        for fid in fids:
            self._unbind(fid)

    def t_remove(self, tag: int, fid: int) -> None:
        node = self._node(fid)
        try:
            if node.tree.read_only:
                raise Errno(EROFS)
            if node.parent is None or node is node.tree.root:
                raise Errno(EBUSY)
            if node.pinned:
                raise Errno(ENOENT)
            self.nodes.lstat(node)
            self._remove(node.parent, node.name, node.kind == stat.S_IFDIR)
        finally:
            self._unbind(fid)

    # --- names ---

    def t_walk(self, tag: int, fid: int, newfid: int, names: list[bytes]) -> bytes:
        node = start = self._node(fid)
        if fid in self.opens:
            raise Errno(EBADF)
        if newfid != fid:
            self._vacant(newfid)
        qids: list[tuple[int, int, int]] = []
        start.refs += 1
        try:
            for name in names:
                try:
                    below, status = self._child(node, name)
                except (OSError, Errno):
                    if not qids:
                        raise
                    return p9.R.walk.encode(tag, qids)  # walk(5): part of the way is an answer, newfid stays unbound
                below.refs += 1
                self.nodes.release(node)
                node = below
                qids.append(self._as_attr(status).qid)
            if newfid == fid:
                self.fids.pop(fid)
                self.nodes.release(start)
            self._bind(newfid, node)
        finally:
            self.nodes.release(node)
        return p9.R.walk.encode(tag, qids)

    def t_walkattr(self, tag: int, fid: int, steps: list[tuple[int, bytes]]) -> bytes:
        fids, nodes = self.fids, self.nodes
        node = fids.get(fid)
        if node is None:
            raise Errno(EBADF)
        self._vacant(*[step[0] for step in steps])
        attrs, link, error = b"", b"", 0
        found = 0
        for newfid, name in steps:
            if node.kind != stat.S_IFDIR:
                error = ENOTDIR
                break
            try:
                if not 0 < len(name) < 256 or b"/" in name or b"\0" in name or name == b"." or name == b"..":
                    check_name(name)
                status = _stat(name, dir_fd=nodes.directory(node), follow_symlinks=False)
            except OSError as problem:
                error = problem.errno or EIO
                break
            except Errno as problem:
                error = problem.errno
                break
            node = nodes.child(node, name, status)
            node.refs += 1
            fids[newfid] = node
            attrs += self._attr(status)
            found += 1
        if found and node.kind == stat.S_IFLNK:
            try:
                assert node.parent is not None
                link = os.readlink(node.name, dir_fd=nodes.directory(node.parent))
            except OSError:
                link = b""  # replaced since: the Sentry asks with readlink, and gets the errno
        return (
            p9._HEAD.pack(p9.HEADER + 8 + len(link) + len(attrs), 201, tag)
            + struct.pack("<IH", error, len(link)) + link + struct.pack("<H", found) + attrs
        )  # fmt: skip

    def t_readlink(self, tag: int, fid: int) -> bytes:
        node = self._node(fid)
        if node.kind != stat.S_IFLNK:
            raise Errno(EINVAL)
        return p9.R.readlink.encode(tag, self._readlink(node))

    def _readlink(self, node: Node) -> bytes:
        fd, mine = self.nodes.path_fd(node)
        try:
            return bytes(os.readlink(b"", dir_fd=fd))
        finally:
            if mine:
                os.close(fd)

    # --- attributes ---

    def t_attr(self, tag: int, fid: int) -> bytes:
        return p9._HEAD.pack(87, 215, tag) + self._attr(self._status(fid))

    def _status(self, fid: int) -> os.stat_result:
        node = self._node(fid)
        opened = self.opens.get(fid)
        if opened is not None and opened.fd >= 0:
            return os.fstat(opened.fd)
        return self.nodes.lstat(node)

    def t_getattr(self, tag: int, fid: int, mask: int) -> bytes:
        a = self._as_attr(self._status(fid))
        times = []
        for ns in (a.atime_ns, a.mtime_ns, a.ctime_ns):
            times += [ns // 10**9 & 0xFFFFFFFFFFFFFFFF, ns % 10**9]
        return p9.R.getattr.encode(
            tag, mask & p9.GETATTR_BASIC, a.qid, a.mode, a.uid, a.gid, a.nlink, a.rdev, a.size, a.blksize, a.blocks,
            *times, 0, 0, 0, 0,
        )  # fmt: skip

    def t_setattr(self, tag: int, fid: int, *values: int) -> None:
        self._set_attributes(fid, *values)

    def t_setattrx(self, tag: int, fid: int, *values: int) -> bytes:
        self._set_attributes(fid, *values)
        return p9._HEAD.pack(87, 217, tag) + self._attr(self._status(fid))

    def _set_attributes(
        self, fid: int, valid: int, mode: int, uid: int, gid: int, size: int, at: int, at_ns: int, mt: int, mt_ns: int
    ) -> None:
        node = self._writable(fid)
        if valid & ~p9.SETATTR_ALL:
            raise Errno(EINVAL)
        if valid & p9.SETATTR_SIZE:
            self._truncate(fid, node, size)
        change = valid & ~(p9.SETATTR_SIZE | p9.SETATTR_CTIME)
        if not change:
            return
        opened = self.opens.get(fid)
        fd, mine = (opened.fd, False) if opened is not None and opened.fd >= 0 else self.nodes.path_fd(node)
        try:
            if valid & (p9.SETATTR_UID | p9.SETATTR_GID):
                uid = uid if valid & p9.SETATTR_UID else p9.NOID
                gid = gid if valid & p9.SETATTR_GID else p9.NOID
                hostcalls.fchown_path(fd, uid, gid)
            if valid & p9.SETATTR_MODE:
                if node.kind == stat.S_IFLNK:
                    raise Errno(EOPNOTSUPP)
                if opened is not None and opened.fd == fd:
                    os.fchmod(fd, mode & 0o7777)
                else:
                    chmod(fd, node, mode & 0o7777)
            if valid & (p9.SETATTR_ATIME | p9.SETATTR_MTIME):
                times = []
                for bit, bit_set, sec, nsec in (
                    (p9.SETATTR_ATIME, p9.SETATTR_ATIME_SET, at, at_ns),
                    (p9.SETATTR_MTIME, p9.SETATTR_MTIME_SET, mt, mt_ns),
                ):
                    if not valid & bit:
                        times.append((0, hostcalls.UTIME_OMIT))
                    elif not valid & bit_set:
                        times.append((0, hostcalls.UTIME_NOW))
                    elif nsec >= 10**9:
                        raise Errno(EINVAL)
                    else:
                        times.append((sec - (1 << 64) if sec >> 63 else sec, nsec))
                hostcalls.utimens_path(fd, times[0], times[1])
        finally:
            if mine:
                os.close(fd)

    def _truncate(self, fid: int, node: Node, size: int) -> None:
        if node.kind != stat.S_IFREG:
            raise Errno(EISDIR if node.kind == stat.S_IFDIR else EINVAL)
        if size > _MOST:
            raise Errno(EFBIG)
        opened = self.opens.get(fid)
        if opened is not None and opened.fd >= 0 and fcntl.fcntl(opened.fd, fcntl.F_GETFL) & os.O_ACCMODE:
            os.ftruncate(opened.fd, size)
            return
        fd = self.nodes.open(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def t_statfs(self, tag: int, fid: int) -> bytes:
        fd, mine = self.nodes.path_fd(self._node(fid))
        try:
            kind, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen = hostcalls.fstatfs(fd)
        finally:
            if mine:
                os.close(fd)
        return p9.R.statfs.encode(
            tag, kind & 0xFFFFFFFF, bsize & 0xFFFFFFFF, blocks, bfree, bavail, files, ffree, 0, namelen & 0xFFFFFFFF
        )

    # --- open files ---

    def _check_open(self, flags: int) -> None:
        if flags & O_TMPFILE_BIT or flags & os.O_PATH:
            raise Errno(EOPNOTSUPP)

    def t_lopen(self, tag: int, fid: int, flags: int) -> bytes:
        node = self._node(fid)
        self._opening(fid)
        self._check_open(flags)
        fd = self.nodes.open(node, flags)
        self.opens[fid] = _Open(fd)
        return p9.R.lopen.encode(tag, self._as_attr(os.fstat(fd)).qid, self.msize - 24)

    def t_openfd(self, tag: int, fid: int, newfid: int, flags: int, name: bytes) -> bytes:
        node = self._node(fid)
        self._check_open(flags)
        link = b""
        if name:
            self._vacant(newfid)
            node, status = self._child(node, name)
            if node.kind not in (stat.S_IFREG, stat.S_IFDIR):  # the Sentry wants to know what it is, not an error
                if node.kind == stat.S_IFLNK:
                    try:
                        link = self._readlink(node)
                    except (OSError, Errno):
                        self.nodes.drop_unused(node)
                        raise
                self._bind(newfid, node)
                return p9.R.openfd.encode(tag, p9.ATTR.unpack(self._attr(status)), link)
        try:
            if node.kind == stat.S_IFDIR:
                # Never given away: whoever holds a directory can walk out of it with "..".
                if writes(flags):
                    raise Errno(EISDIR)
                status = self.nodes.lstat(node)
            else:
                fd = self.give = self.nodes.open(node, flags)
                status = os.fstat(fd)
        except (OSError, Errno):
            if name:
                self.nodes.drop_unused(node)
            raise
        if name:
            self._bind(newfid, node)
        return p9.R.openfd.encode(tag, p9.ATTR.unpack(self._attr(status)), link)

    def _create(self, parent: Node, name: bytes, flags: int, mode: int, uid: int, gid: int) -> tuple[Node, int]:
        """Create (or, without O_EXCL, open) a regular file; the node is unreferenced, the descriptor the caller's."""
        check_name(name)
        self._check_open(flags)
        if parent.tree.read_only:
            raise Errno(EROFS)
        directory = self.nodes.directory(parent)
        host_flags = flags & (os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_DIRECT) | os.O_CLOEXEC
        host_flags |= os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK
        try:
            fd = self.nodes.open_at(name, host_flags | os.O_CREAT | os.O_EXCL, directory, mode & 0o7777)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            node, _ = self._child(parent, name)
            try:
                return node, self.nodes.open(node, flags)
            except (OSError, Errno):
                self.nodes.drop_unused(node)
                raise
        try:
            self._give_to(fd, mode, uid, gid)
            return self.nodes.child(parent, name, os.fstat(fd)), fd
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=directory)
            raise

    def _give_to(self, fd: int, mode: int, uid: int, gid: int) -> None:
        """Owner of what was just created; where we may not give files away, it stays ours."""
        if self.owns and (uid != p9.NOID or gid != p9.NOID):
            hostcalls.fchown_path(fd, uid, gid)
            if mode & 0o6000:  # chown(2) clears these
                if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
                    hostcalls.fchmod_path(fd, mode & 0o7777)
                else:
                    os.fchmod(fd, mode & 0o7777)

    def t_lcreate(self, tag: int, fid: int, name: bytes, flags: int, mode: int, gid: int) -> bytes:
        parent = self._node(fid)
        self._opening(fid)
        node, fd = self._create(parent, name, flags, mode, p9.NOID, gid)
        self._bind(fid, node)  # the fid now stands for the file
        self.nodes.release(parent)
        self.opens[fid] = _Open(fd)
        return p9.R.lcreate.encode(tag, self._as_attr(os.fstat(fd)).qid, self.msize - 24)

    def t_createfd(
        self, tag: int, dfid: int, newfid: int, flags: int, mode: int, uid: int, gid: int, name: bytes
    ) -> bytes:
        parent = self._node(dfid)
        self._vacant(newfid)
        node, fd = self._create(parent, name, flags, mode, uid, gid)
        self._bind(newfid, node)
        if node.kind != stat.S_IFREG:
            os.close(fd)
            self._unbind(newfid)
            raise Errno(EISDIR)
        self.give = fd
        return p9.R.createfd.encode(tag, p9.ATTR.unpack(self._attr(os.fstat(fd))))

    def t_read(self, tag: int, fid: int, offset: int, count: int) -> bytes:
        opened = self.opens.get(fid)
        if opened is None:
            raise Errno(EBADF)
        count = min(count, self.msize - 24)
        if opened.value is not None:
            return p9.R.read.encode(tag, opened.value[offset : offset + count])
        if opened.fd < 0:
            raise Errno(EBADF)
        if offset > _MOST - count:
            raise Errno(EINVAL)
        return p9.R.read.encode(tag, os.pread(opened.fd, count, offset))

    def t_write(self, tag: int, fid: int, offset: int, data: bytes) -> bytes:
        opened = self.opens.get(fid)
        if opened is None:
            raise Errno(EBADF)
        if opened.value is not None:
            if opened.xattr is None:
                raise Errno(EBADF)
            if offset != len(opened.value) or offset + len(data) > opened.xattr[1]:
                raise Errno(EINVAL)
            opened.value += data
            return p9.R.write.encode(tag, len(data))
        if offset > _MOST - len(data):
            raise Errno(EFBIG)
        return p9.R.write.encode(tag, os.pwrite(self._file(fid), data, offset))

    def t_fsync(self, tag: int, fid: int, datasync: int) -> None:
        opened = self.opens.get(fid)
        if opened is not None and opened.fd >= 0:
            (os.fdatasync if datasync else os.fsync)(opened.fd)
            return
        node = self._node(fid)
        fd = self.nodes.open(node, os.O_RDONLY)
        try:
            (os.fdatasync if datasync else os.fsync)(fd)
        finally:
            os.close(fd)

    def t_lock(
        self, tag: int, fid: int, kind: int, flags: int, start: int, length: int, proc_id: int, client_id: bytes
    ) -> bytes:
        if kind > p9.LOCK_UNLCK or start > _MOST or length > _MOST:
            raise Errno(EINVAL)
        try:
            # Open file description locks: two fids of one peer are two owners, as they are to Linux.
            fcntl.fcntl(self._file(fid), _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        except (BlockingIOError, PermissionError):
            return p9.R.lock.encode(tag, p9.LOCK_BLOCKED)
        return p9.R.lock.encode(tag, p9.LOCK_SUCCESS)

    def t_getlock(
        self, tag: int, fid: int, kind: int, start: int, length: int, proc_id: int, client_id: bytes
    ) -> bytes:
        if kind > p9.LOCK_UNLCK or start > _MOST or length > _MOST:
            raise Errno(EINVAL)
        answer = fcntl.fcntl(self._file(fid), _F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        kind, _, start, length, _ = _FLOCK.unpack(answer)
        return p9.R.getlock.encode(tag, kind, start, length, proc_id, client_id)

    # --- directories ---

    def _scan(self, fid: int, cookie: int, dots: bool) -> _Open:
        """Directory `fid`'s reading position, put at entry number `cookie`; the caller takes entries with _entries."""
        opened = self.opens.get(fid)
        if opened is None:
            node = self._node(fid)
            if node.kind != stat.S_IFDIR:
                raise Errno(ENOTDIR)
            self._opening(fid)
            opened = self.opens[fid] = _Open(self.nodes.open(node, os.O_RDONLY))
        if opened.fd < 0 or opened.value is not None:
            raise Errno(EBADF)
        if opened.scan is None or cookie != opened.cookie:
            if opened.scan is not None:
                opened.scan.close()  # type: ignore[attr-defined]
            opened.scan, opened.cookie, opened.pending = _entries(opened.fd, dots), 0, None
            while opened.cookie < cookie:
                if next(opened.scan, None) is None:
                    break
                opened.cookie += 1
        return opened

    def t_readdirattr(self, tag: int, fid: int, cookie: int, count: int) -> bytes:
        was_open = fid in self.opens
        opened = self._scan(fid, cookie, False)
        room = min(count, self.msize - 32)
        parts: list[bytes] = []
        done, full = 0, False
        put, devices, fields = p9.ENTRY.pack, self.devices, _status_fields
        if opened.pending is not None:
            entry = opened.pending[0]
            if len(entry) > room:
                raise Errno(EINVAL)
            parts.append(entry)
            done, opened.pending = 1, None
            room -= len(entry)
        assert opened.scan is not None
        for found in opened.scan:
            name = found.name.encode(_FS_ENCODING, "surrogateescape")
            try:
                status = found.stat(follow_symlinks=False)
                dev = devices.get(status.st_dev)
                if dev is None:
                    dev = devices[status.st_dev] = len(devices)
                entry = put(dev, *fields(status), len(name)) + name
            except struct.error:
                entry = self._attr(status) + struct.pack("<H", len(name)) + name
            except OSError:
                continue  # removed since it was listed
            room -= len(entry)
            if room < 0:
                opened.pending, full = (entry, name), True
                break
            parts.append(entry)
            done += 1
        opened.cookie += done
        if full and not parts:
            raise Errno(EINVAL)  # not even one entry fits
        if not full and not was_open:  # read in one go: nothing stays open
            self.opens.pop(fid).close()
        data = b"".join(parts)
        return p9._HEAD.pack(p9.HEADER + 12 + len(data), 203, tag) + struct.pack(
            "<QI", opened.cookie if full else 0, len(data)
        ) + data  # fmt: skip

    def t_readdir(self, tag: int, fid: int, offset: int, count: int) -> bytes:
        if fid not in self.opens:
            raise Errno(EBADF)
        opened = self._scan(fid, offset, True)
        room = min(count, self.msize - 24)
        parts: list[bytes] = []
        node = self.fids[fid]
        assert opened.scan is not None
        while True:
            if opened.pending is not None:
                entry, opened.pending = opened.pending[0], None
            else:
                found = next(opened.scan, None)
                if found is None:
                    break
                entry = self._dirent(node, opened.fd, found, opened.cookie + 1)
            if len(entry) > room:
                opened.pending = (entry, b"")
                if not parts:
                    raise Errno(EINVAL)
                break
            room -= len(entry)
            parts.append(entry)
            opened.cookie += 1
        return p9.R.readdir.encode(tag, b"".join(parts))

    def _dirent(self, node: Node, fd: int, found: Any, following: int) -> bytes:
        if found == "." or found == "..":
            # ".." of a tree's root is the root; any other has the qid its parent node was walked with
            name = found.encode()
            above = node.parent if found == ".." and node.parent is not None and node is not node.tree.root else node
            dev = self.devices.setdefault(above.dev, len(self.devices))
            return p9.DIRENT.pack(p9.QTDIR, 0, above.ino ^ (dev << 48), following, 4, len(name)) + name
        name = found.name.encode(_FS_ENCODING, "surrogateescape")
        kind = 4 if found.is_dir(follow_symlinks=False) else 10 if found.is_symlink() else 8
        qtype = p9.QTDIR if kind == 4 else p9.QTSYMLINK if kind == 10 else p9.QTFILE
        dev = self.devices.setdefault(node.dev, len(self.devices))
        if kind == 8 and not found.is_file(follow_symlinks=False):
            try:
                kind = stat.S_IFMT(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode) >> 12  # DT_* (dirent.h)
            except OSError:
                kind = 0
        return p9.DIRENT.pack(qtype, 0, found.inode() ^ (dev << 48), following, kind, len(name)) + name

    # --- making, linking and removing names ---

    def _make(
        self, dfid: int, name: bytes, mode: int, uid: int, gid: int, target: bytes
    ) -> tuple[Node, os.stat_result]:
        """mkdir, symlink, FIFO, socket or empty file; the node is unreferenced. Device nodes are EPERM."""
        parent = self._writable(dfid)
        check_name(name)
        directory = self.nodes.directory(parent)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, mode & 0o7777, dir_fd=directory)
            if mode & 0o7000:
                self._chmod_new(name, directory, mode)
        elif kind == stat.S_IFLNK:
            if not target or b"\0" in target:
                raise Errno(ENOENT if not target else EINVAL)
            os.symlink(target, name, dir_fd=directory)
        elif kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG, 0):
            os.mknod(name, mode & 0o7777 | (kind or stat.S_IFREG), dir_fd=directory)
        else:
            raise Errno(EPERM if kind in (stat.S_IFCHR, stat.S_IFBLK) else EINVAL)
        node, status = self._child(parent, name)
        try:
            if self.owns and (uid != p9.NOID or gid != p9.NOID):
                fd, mine = self.nodes.path_fd(node)
                try:
                    self._give_to(fd, mode if kind != stat.S_IFLNK else 0, uid, gid)
                    status = os.fstat(fd)
                finally:
                    if mine:
                        os.close(fd)
        except BaseException:
            self.nodes.drop_unused(node)
            (os.rmdir if kind == stat.S_IFDIR else os.unlink)(name, dir_fd=directory)
            raise
        return node, status

    def _chmod_new(self, name: bytes, directory: int, mode: int) -> None:
        """mkdir(2) drops set-id bits."""
        fd = self.nodes.open_at(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, directory)
        try:
            os.fchmod(fd, mode & 0o7777 | os.fstat(fd).st_mode & stat.S_ISGID)
        finally:
            os.close(fd)

    def _made(self, dfid: int, name: bytes, mode: int, gid: int, target: bytes = b"") -> tuple[int, int, int]:
        node, status = self._make(dfid, name, mode, p9.NOID, gid, target)
        self.nodes.drop_unused(node)
        return self._as_attr(status).qid

    def t_make(
        self, tag: int, dfid: int, newfid: int, mode: int, uid: int, gid: int, major: int, minor: int, name: bytes,
        target: bytes,
    ) -> bytes:  # fmt: skip
        self._vacant(newfid)
        node, status = self._make(dfid, name, mode, uid, gid, target)
        self._bind(newfid, node)
        return p9._HEAD.pack(87, 209, tag) + self._attr(status)

    def t_mkdir(self, tag: int, dfid: int, name: bytes, mode: int, gid: int) -> bytes:
        return p9.R.mkdir.encode(tag, self._made(dfid, name, stat.S_IFDIR | mode & 0o7777, gid))

    def t_symlink(self, tag: int, dfid: int, name: bytes, target: bytes, gid: int) -> bytes:
        return p9.R.symlink.encode(tag, self._made(dfid, name, stat.S_IFLNK | 0o777, gid, target))

    def t_mknod(self, tag: int, dfid: int, name: bytes, mode: int, major: int, minor: int, gid: int) -> bytes:
        if stat.S_IFMT(mode) in (stat.S_IFDIR, stat.S_IFLNK):
            raise Errno(EPERM)
        return p9.R.mknod.encode(tag, self._made(dfid, name, mode, gid))

    def _link(self, dfid: int, fid: int, name: bytes) -> Node:
        parent, node = self._writable(dfid), self._writable(fid)
        check_name(name)
        if node.tree is not parent.tree or node.kind == stat.S_IFDIR:
            raise Errno(EPERM if node.kind == stat.S_IFDIR else EXDEV)
        if node.pinned or node.parent is None:
            raise Errno(ENOENT)
        self.nodes.lstat(node)
        target = os.dup(self.nodes.directory(parent))  # a duplicate: opening the other directory may push it out
        try:
            source = self.nodes.directory(node.parent)
            os.link(node.name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(target)
        return node

    def t_link(self, tag: int, dfid: int, fid: int, name: bytes) -> None:
        self._link(dfid, fid, name)

    def t_linkattr(self, tag: int, dfid: int, fid: int, name: bytes) -> bytes:
        node = self._link(dfid, fid, name)
        return p9._HEAD.pack(87, 223, tag) + self._attr(self.nodes.lstat(node))

    def t_renameat(self, tag: int, olddirfid: int, oldname: bytes, newdirfid: int, newname: bytes) -> None:
        self._rename(self._writable(olddirfid), oldname, self._writable(newdirfid), newname, 0)

    def t_renameat2(
        self, tag: int, olddirfid: int, newdirfid: int, flags: int, oldname: bytes, newname: bytes
    ) -> None:
        self._rename(self._writable(olddirfid), oldname, self._writable(newdirfid), newname, flags)

    def t_rename(self, tag: int, fid: int, dfid: int, name: bytes) -> None:
        node = self._writable(fid)
        if node.parent is None or node is node.tree.root:
            raise Errno(EBUSY)
        if node.pinned:
            raise Errno(ENOENT)
        self.nodes.lstat(node)
        self._rename(node.parent, node.name, self._writable(dfid), name, 0)

    def _rename(self, old: Node, old_name: bytes, new: Node, new_name: bytes, flags: int) -> None:
        check_name(old_name)
        check_name(new_name)
        if old.tree is not new.tree:
            raise Errno(EXDEV)
        if flags & ~_RENAME_FLAGS or flags == _RENAME_FLAGS:
            raise Errno(EINVAL)
        nodes = self.nodes
        moving, replaced = nodes.known(old, old_name), nodes.known(new, new_name)
        if moving is replaced and moving is not None:
            replaced = None
        exchange = flags & 2
        if replaced is not None and not exchange and not flags & 1:
            nodes.pin(replaced)
        try:
            new_fd = os.dup(nodes.directory(new))  # a duplicate: opening `old` may push `new` out
            try:
                old_fd = nodes.directory(old)
                if flags:
                    hostcalls.renameat2(old_fd, old_name, new_fd, new_name, flags)
                else:
                    os.rename(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
            finally:
                os.close(new_fd)
        except BaseException:
            if replaced is not None:
                nodes.unpin(replaced)
            raise
        if moving is not None and moving is nodes.known(new, new_name):
            return
        if replaced is not None:
            nodes.forget(replaced)
        if moving is not None:
            nodes.moved(moving, new, new_name)
        if exchange and replaced is not None:
            nodes.moved(replaced, old, old_name)

    def t_unlinkat(self, tag: int, dfid: int, name: bytes, flags: int) -> None:
        parent = self._writable(dfid)
        check_name(name)
        if flags & ~p9.AT_REMOVEDIR:
            raise Errno(EINVAL)
        self._remove(parent, name, flags & p9.AT_REMOVEDIR != 0)

    def _remove(self, parent: Node, name: bytes, directory: bool) -> None:
        nodes = self.nodes
        node = nodes.known(parent, name)
        if node is not None:
            nodes.pin(node)
        try:
            (os.rmdir if directory else os.unlink)(name, dir_fd=nodes.directory(parent))
        except BaseException:
            if node is not None:
                nodes.unpin(node)
            raise
        if node is not None:
            nodes.forget(node)

    # --- extended attributes ---

    def _get_xattr(self, node: Node, name: bytes) -> bytes:
        """The value of `name`, or for b"" the names, each ended by NUL; only the namespaces that we serve."""
        if len(name) > 255 or b"\0" in name:
            raise Errno(EINVAL)
        if name and not name.startswith(_XATTRS_READABLE):
            raise Errno(EOPNOTSUPP)
        target: Any = node.fd if node.real >= 0 else self.nodes.enter(node)
        follow = node.real >= 0
        if name:
            return bytes(os.getxattr(target, name, follow_symlinks=follow))
        names = [os.fsencode(n) for n in os.listxattr(target, follow_symlinks=follow)]
        return b"".join([n + b"\0" for n in names if n.startswith(_XATTRS_READABLE)])

    def _set_xattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        if node.tree.read_only:
            raise Errno(EROFS)
        if not 0 < len(name) <= 255 or b"\0" in name or flags not in (0, 1, 2, p9.XATTR_REMOVE):
            raise Errno(EINVAL)
        if not name.startswith(_XATTRS_WRITABLE):
            raise Errno(EOPNOTSUPP)
        target: Any = node.fd if node.real >= 0 else self.nodes.enter(node)
        follow = node.real >= 0
        if flags == p9.XATTR_REMOVE:
            os.removexattr(target, name, follow_symlinks=follow)
        else:
            os.setxattr(target, name, value, flags, follow_symlinks=follow)

    def t_xattrget(self, tag: int, fid: int, name: bytes) -> bytes:
        return p9.R.xattrget.encode(tag, self._get_xattr(self._node(fid), name))

    def t_xattrset(self, tag: int, fid: int, flags: int, name: bytes, data: bytes) -> None:
        if len(data) > XATTR_MOST:
            raise Errno(EINVAL)
        self._set_xattr(self._node(fid), name, data, flags)

    def t_xattrwalk(self, tag: int, fid: int, newfid: int, name: bytes) -> bytes:
        node = self._node(fid)
        self._vacant(newfid)
        self._opening(newfid)
        value = self._get_xattr(node, name)
        self._bind(newfid, node)
        opened = self.opens[newfid] = _Open()
        opened.value = bytearray(value)
        return p9.R.xattrwalk.encode(tag, len(value))

    def t_xattrcreate(self, tag: int, fid: int, name: bytes, size: int, flags: int) -> None:
        self._writable(fid)
        self._opening(fid)
        if size > XATTR_MOST:
            raise Errno(EINVAL)
        opened = self.opens[fid] = _Open()
        opened.value, opened.xattr = bytearray(), (name, size, flags)


def _entries(fd: int, dots: bool) -> Iterator[Any]:
    """os.scandir of an open directory from its start, after "." and ".." (as strings) if `dots`."""
    os.lseek(fd, 0, os.SEEK_SET)
    if dots:
        yield "."
        yield ".."
    with os.scandir(fd) as found:
        yield from found


def _receive(sock: socket.socket, count: int) -> bytes:
    """Up to `count` bytes; fewer only when the peer hung up."""
    buf = bytearray(count)
    view, got = memoryview(buf), 0
    while got < count:
        n = sock.recv_into(view[got:])
        if not n:
            break
        got += n
    return bytes(buf[:got])


def complain(line: str) -> None:
    """One line on stderr; the Gofer has no log of its own."""
    os.write(2, f"kvmsentry: {line}\n".encode(errors="backslashreplace"))
