"""SOCK_STREAM of AF_UNIX: one ring of bytes for each direction, in its reader (unix_stream_sendmsg,
unix_stream_read_generic)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmsentry.fs.vfs import POLLHUP, File
from kvmsentry.net import scm
from kvmsentry.net.ring import Ring
from kvmsentry.net.socket import NOBODY, Control, Received, credentials_of
from kvmsentry.net.unix import CLOSED, CONNECTED, LISTENING, READABLE, WRITABLE, UnixSocket, sockaddr
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task


class StreamSocket(UnixSocket):
    """A stream socket. It is writable while a quarter of the peer's ring is used at most (unix_writable), and takes
    what fits at any time."""

    def __init__(self, task: Task, kind: int, flags: int = 0) -> None:
        super().__init__(task, kind, flags)
        self.inbox = Ring()

    def newborn(self, task: Task) -> UnixSocket:
        """The server's end."""
        return StreamSocket(task, self.kind)

    def own_files(self) -> list[File]:
        """Files between the bytes."""
        return [file for mark in self.inbox.marks or () for file in mark.files]

    def purge(self) -> None:
        """Drop what nobody will read."""
        files = self.inbox.clear()
        if files:
            scm.arrive(files)
            scm.drop(files)

    def unread(self) -> bool:
        """Is anything in the ring?"""
        return bool(self.inbox.used)

    def set_sndbuf(self, size: int) -> None:
        """The peer's ring is our send buffer."""
        self.sndbuf = size
        if self.peer is not None:
            self.peer.inbox.resize(size)

    # -- reading -----------------------------------------------------------------------------------------------------
    def read(self, views: list[memoryview]) -> int:
        """read(2)."""
        ring = self.inbox
        used = ring.used
        if not used:
            return self._nothing() if views else 0
        if ring.marks is not None:
            received = self._marked(views, False)
            if received.files:
                scm.drop(received.files)
            return received.n
        n = ring.take(views)
        quarter = ring.capacity >> 2
        if used > quarter >= ring.used and self.peer is not None:
            self.peer.queue.wake(WRITABLE)
        return n

    def read_by(self, task: Task, views: list[memoryview]) -> int:
        """read(2) when somebody wants credentials: the same."""
        return self.read(views)

    def _nothing(self) -> int:
        if self.error:
            return -self.take_error()
        if self.state != CONNECTED:
            return -errno.EINVAL
        if self.down & abi.RCV_SHUTDOWN:
            return 0
        return -errno.EAGAIN

    def recv(self, task: Task, views: list[memoryview], flags: int) -> Received | int:
        """recvmsg(2): stops where the credentials change and behind bytes that bring files."""
        if flags & (abi.MSG_OOB | abi.MSG_ERRQUEUE):
            return -errno.EOPNOTSUPP if flags & abi.MSG_OOB else -errno.EAGAIN
        ring = self.inbox
        skip = self.peek_offset if flags & abi.MSG_PEEK and self.peek_offset > 0 else 0
        if ring.used <= skip:
            n = self._nothing()
            return n if n < 0 else Received(0)
        name = sockaddr(self.peer.name) if self.peer is not None and self.peer.name is not None else b""
        if flags & abi.MSG_PEEK and not ring.marks and not self.passcred:
            n = ring.take(views, skip=skip, peek=True)
            if self.peek_offset >= 0:
                self.peek_offset += n
            return Received(n, name)
        if ring.marks is None and not self.passcred:
            return Received(self.read(views), name)
        received = self._marked(views, bool(flags & abi.MSG_PEEK), skip)
        received.name = name
        return received

    def _marked(self, views: list[memoryview], peek: bool, skip: int = 0) -> Received:
        """Take bytes that carry something, up to where it changes."""
        ring = self.inbox
        position = ring.taken + skip
        room = sum(map(len, views))
        limit = min(room, ring.used - skip)
        creds: tuple[int, int, int] | None = None
        files: list[File] = []
        done = 0
        first = True
        for mark in list(ring.marks or ()):
            if mark.end <= position:
                continue
            if mark.start > position + done:  # plain bytes before it
                if self.passcred and first:
                    creds, first = NOBODY, False
                done = min(mark.start - position, limit)
                if done == limit:
                    break
            if self.passcred:
                theirs = mark.creds or NOBODY
                if not first and theirs != creds:
                    break
                creds, first = theirs, False
            done = min(mark.end - position, limit)
            if mark.files:
                files = list(mark.files)
                if peek:
                    for file in files:
                        file.get()
                else:
                    mark.files = []
                    scm.arrive(files)
                break
            if done == limit:
                break
        else:
            if not self.passcred or first or creds == NOBODY:
                done = limit
                if self.passcred and first:
                    creds = NOBODY
        before = ring.used
        n = ring.take(views, done, skip, peek)
        if peek:
            if self.peek_offset >= 0:
                self.peek_offset += n
        else:
            marks = ring.marks
            while marks and marks[0].end <= ring.taken:
                marks.popleft()
            if not marks:
                ring.marks = None
            if before > ring.capacity >> 2 >= ring.used and self.peer is not None:
                self.peer.queue.wake(WRITABLE)
        control = None
        if self.passcred:
            control = [(abi.SOL_SOCKET, abi.SCM_CREDENTIALS, abi.UCRED.pack(*(creds or NOBODY)))]
        return Received(n, b"", 0, control, files or None)

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(self, views: list[memoryview]) -> int:
        """write(2)."""
        peer = self.peer
        if peer is None or self.down & abi.SEND_SHUTDOWN or peer.down & abi.RCV_SHUTDOWN:
            return self._cannot_send()
        ring = peer.inbox
        total = len(views[0]) if len(views) == 1 else sum(map(len, views))
        n = ring.put(views, total)
        if not n:
            return -errno.EAGAIN if total else 0
        waiters = peer.queue.waiters
        if waiters:
            peer.queue.wake(READABLE)
        return n

    def _cannot_send(self) -> int:
        if self.down & abi.SEND_SHUTDOWN or self.state == CONNECTED:
            return -errno.EPIPE
        return -errno.ENOTCONN

    def write_by(self, task: Task, views: list[memoryview]) -> int:
        """write(2) when one of the two wants credentials."""
        return self._send(task, views, None)

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """sendmsg(2)."""
        if flags & abi.MSG_OOB:
            return -errno.EOPNOTSUPP
        if name:
            return -errno.EISCONN if self.peer is not None else -errno.EOPNOTSUPP
        return self._send(task, views, control)

    def _send(self, task: Task, views: list[memoryview], control: Control | None) -> int:
        n = self.write(views)
        if n <= 0:
            if n == 0 and control is not None and control.files:
                scm.drop(control.files)  # no bytes to travel with
            return n
        peer = self.peer
        creds = None
        if control is not None and control.creds is not None:
            creds = control.creds
        elif self.passcred or peer.passcred:
            creds = credentials_of(task)
        files = control.files if control is not None else []
        if files or creds is not None:
            scm.depart(files)
            peer.inbox.mark(n, files, creds)
        return n

    # -- the rest ----------------------------------------------------------------------------------------------------
    def poll(self) -> int:
        """Readiness."""
        if self.state == LISTENING:
            return self.hang_up_mask() | (READABLE if self.backlog else 0)
        mask = self.hang_up_mask()
        if self.inbox.used:
            mask |= READABLE
        if self.state == CLOSED:
            return mask | POLLHUP | WRITABLE
        peer = self.peer
        if peer is None or peer.inbox.used <= peer.inbox.capacity >> 2:
            mask |= WRITABLE
        return mask

    def input_size(self) -> int:
        """Bytes to read."""
        return self.inbox.used

    def output_size(self) -> int:
        """Bytes that the peer has not read."""
        return self.peer.inbox.used if self.peer is not None else 0
