"""A 9P2000.L connection as its client sees it: requests, answers, fids, and the descriptors that come with answers.

What the server sends is checked like any peer's input: sizes, types, tags, the kind of a passed descriptor. A lost or
misbehaving server is `HostError("the gofer is gone")` once and for every later call.
"""

from __future__ import annotations

import array
import os
import socket
import stat
import struct
from errno import EIO
from typing import Any

from kvmsentry.errors import Errno, HostError
from kvmsentry.gofer import p9
from kvmsentry.gofer.p9 import Message

TAG = 1  # of every request: one is under way at a time
_unpack_head = struct.Struct("<IBH").unpack_from


class Connection:
    """One connection. `sock`: a connected stream socket, owned from now on; descriptors pass only over AF_UNIX."""

    def __init__(self, sock: socket.socket, msize: int = p9.MSIZE, extensions: bool = True) -> None:
        self._sock = sock
        self._buf = bytearray(msize)
        self._view = memoryview(self._buf)
        self._gone = ""
        self._next_fid = 0
        self._free: list[int] = []
        self._clunks: list[int] = []  # fids nobody needs any more; the server hears of them with the next call
        self.calls = 0  # round trips so far
        self.extended = False
        self.msize = msize
        extensions = extensions and sock.family == socket.AF_UNIX
        version = b"unknown"
        for offer in (p9.VERSION_EXTENDED, p9.VERSION) if extensions else (p9.VERSION,):
            try:
                self.msize, version = self._call(p9.T.version, p9.R.version, msize, offer, tag=p9.NOTAG)
            except Errno:
                continue  # diod says EIO to a version it does not know
            if version in (offer, p9.VERSION):
                break
        if version not in (p9.VERSION, p9.VERSION_EXTENDED) or not p9.MSIZE_LEAST <= self.msize <= msize:
            raise self._lost(f"it speaks {version[:32]!r} with messages of {self.msize} bytes, not 9P2000.L")
        self.extended = version == p9.VERSION_EXTENDED

    # --- the connection ---

    def _lost(self, why: str) -> HostError:
        if not self._gone:
            self._gone = why
            self._sock.close()
        return HostError(f"the gofer is gone: {self._gone}")

    def _exchange(self, message: bytes, tag: int, answer: int) -> int:
        """Send one request and receive its answer into `_buf`; returns the answer's size. Errno from an Rlerror."""
        if self._gone:
            raise self._lost("")
        if self._clunks:
            message = self._clunk_message() + message
        self.calls += 1
        sock = self._sock
        try:
            sent = sock.send(message)
            if sent < len(message):
                sock.sendall(message[sent:])
            got = sock.recv_into(self._view)
        except OSError as problem:
            raise self._lost(problem.strerror or "the connection broke") from None
        except BaseException:
            self._lost("a call was interrupted")  # its answer would be taken for that of the next call
            raise
        return self._checked(got, tag, answer)

    def _checked(self, got: int, tag: int, answer: int) -> int:
        buf = self._buf
        if got < 7:
            got = self._fill(got, 7)
        size, number, got_tag = _unpack_head(buf)
        if got != size:
            if size < 7 or size > self.msize or got > size:
                raise self._lost(f"an answer of {size} bytes")
            self._fill(got, size)
        if got_tag != tag or number != answer:
            if got_tag == tag and number == 7 and size == 11:
                ecode: int = p9.LERROR.decode(buf, 7, 11)[0]
                raise Errno(ecode if 0 < ecode < 4096 else EIO)
            raise self._lost(f"answer {number} with tag {got_tag} to request {answer - 1} with tag {tag}")
        return size

    def _fill(self, got: int, size: int) -> int:
        """Receive until `_buf` holds at least `size` bytes, and no more than the message when its size is known."""
        try:
            while got < size:
                more = self._sock.recv_into(self._view[got:size])
                if not more:
                    raise self._lost("it hung up")
                got += more
        except OSError as problem:
            raise self._lost(problem.strerror or "the connection broke") from None
        except BaseException:
            self._lost("a call was interrupted")
            raise
        return got

    def _call(self, row: Message, answer: Message, *values: Any, tag: int = TAG) -> tuple[Any, ...]:
        size = self._exchange(row.encode(tag, *values), tag, answer.number)
        return self._decode(answer, size)

    def _decode(self, answer: Message, size: int) -> tuple[Any, ...]:
        try:
            return answer.decode(self._buf, 7, size)
        except (p9.Malformed, struct.error) as problem:
            raise self._lost(f"{answer.name} does not parse: {problem}") from None

    def _call_fd(self, row: Message, answer: Message, *values: Any) -> tuple[tuple[Any, ...], int]:
        """A call whose answer may bring a descriptor (-1: none)."""
        if self._gone:
            raise self._lost("")
        message = row.encode(TAG, *values)
        if self._clunks:
            message = self._clunk_message() + message
        self.calls += 1
        fds = array.array("i")
        try:
            self._sock.sendall(message)
            got, ancillary, flags, _ = self._sock.recvmsg_into(
                [self._view], socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as problem:
            raise self._lost(problem.strerror or "the connection broke") from None
        except BaseException:
            self._lost("a call was interrupted")
            raise
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % 4])
        try:
            size = self._checked(got, TAG, answer.number)
            decoded = self._decode(answer, size)
            if len(fds) > 1 or flags & socket.MSG_CTRUNC:
                raise self._lost("it sent descriptors that nobody asked for, or we have no room for more")
            if fds and not stat.S_ISREG(os.fstat(fds[0]).st_mode):
                raise self._lost("it sent a descriptor of something that is no regular file")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return decoded, fds[0] if fds else -1

    def _clunk_message(self) -> bytes:
        """The batch of fids to forget, to go in front of a request; plain servers are told and waited for here."""
        clunks, self._clunks = self._clunks, []
        if not self.extended:
            for fid in clunks:
                try:
                    self._call(p9.T.clunk, p9.R.clunk, fid)
                except Errno:
                    pass  # clunk(5): the fid is gone whatever the answer
                self._free.append(fid)
            return b""
        self._free += clunks
        if len(clunks) <= p9.CLUNKS_MOST:
            return p9.T.clunkbatch.encode(TAG, clunks)
        most = p9.CLUNKS_MOST
        return b"".join([p9.T.clunkbatch.encode(TAG, clunks[i : i + most]) for i in range(0, len(clunks), most)])

    def flush(self) -> None:
        """Tell the server now of the fids that were clunked (they keep removed files alive on the host)."""
        if self._clunks and not self._gone:
            message = self._clunk_message()
            try:
                if message:
                    self._sock.sendall(message)
            except OSError as problem:
                raise self._lost(problem.strerror or "the connection broke") from None

    def close(self) -> None:
        """Hang up; every later call is a HostError."""
        if not self._gone:
            self._gone = "the connection was closed"
            self._sock.close()

    def _fid(self) -> int:
        if self._free:
            return self._free.pop()
        self._next_fid += 1
        return self._next_fid - 1

    def _forget(self, fid: int) -> None:
        self._clunks.append(fid)
