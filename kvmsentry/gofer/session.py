"""The connection of a Gofer: framing, dispatch, fids, version and attach; what server.py's messages stand on.

One connection, one thread, one request at a time. The peer is the Sentry, which an attacker may own: a message that
does not parse ends the connection with one line on stderr; everything else that is wrong is an Rlerror.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Callable, Iterator
from errno import EBADF, EINVAL, EIO, EMFILE, EMSGSIZE, ENOENT, EROFS
from operator import attrgetter
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.gofer import hostcalls, p9
from kvmsentry.gofer.nodes import Node, Nodes, Tree, check_name

FIDS_MOST = 1 << 20
OPENS_MOST = 2048
MOST = (1 << 63) - 1  # the largest off_t

status_fields = attrgetter(
    "st_ino", "st_mode", "st_uid", "st_gid", "st_nlink", "st_rdev", "st_size", "st_blksize", "st_blocks",
    "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
)  # fmt: skip
_pack_attr = p9.ATTR.pack
_stat = os.stat


class Open:
    """What a fid has besides its node: an open file, a directory being read, or an xattr in transit."""

    __slots__ = ("fd", "scan", "implicit", "cookie", "pending", "value", "xattr")

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd
        self.scan: Iterator[Any] | None = None
        self.implicit = False  # opened by readdirattr, closed when that has read everything
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


class Session:
    """Serves `trees` to one peer. Trees are chosen by name or decimal index at attach; b"" is the first."""

    def __init__(
        self, trees: list[Tree], extensions: bool = True, owns: bool = True, trace: Callable[[str], None] | None = None
    ) -> None:
        self.trees = trees
        self.nodes = Nodes()
        self.extensions, self.trace = extensions, trace
        self.msize, self.extended = p9.MSIZE, False
        self.fids: dict[int, Node] = {}
        self.opens: dict[int, Open] = {}
        self.devices: dict[int, int] = {}  # host st_dev -> index shown to the peer
        self.known: Any = None  # the same for listing.c, and its buffers, once they are needed
        self.listed: tuple[Any, Any]
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
            return _pack_attr(dev, *status_fields(status))
        except struct.error:  # times outside 1677 to 2262, which some file systems can hold
            values = list(status_fields(status))
            values[9:] = [min(max(t, -MOST), MOST) for t in values[9:]]
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

    def t_clunkbatch(self, tag: int, fids: tuple[int, ...]) -> None:
        for fid in fids:
            self._unbind(fid)


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
