"""TCP between two sockets of one sandbox: the connection is the host's, the bytes take a short cut.

The host makes the connection (names, backlogs, refusals, states, errors are its own) and ends it. Between accept and
the end the bytes go through a Ring of ours in each direction, which spares the host's stack, four system calls and an
event a message. What keeps the order of bytes right:

- a pair is made by accept(2). What the client sent before goes through the host, so many bytes are counted, and the
  server reads those first (`before`), then the ring;
- a writer may go back to the host's way at any time and for good (`direct`): the reader drains the ring first.
  shutdown, close, urgent data and options that only the host can serve do that. So the end of a connection, whole or
  by a reset, is always the host's.

tcp(7). What differs: TCP_INFO's counters and a packet capture do not see these bytes.
"""

from __future__ import annotations

import errno
import socket
import struct
import weakref
from typing import TYPE_CHECKING, Any

from kvmsentry.fs.vfs import POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM
from kvmsentry.net.hostsock import refused
from kvmsentry.net.inet import InetSocket
from kvmsentry.net.ring import Ring
from kvmsentry.net.socket import Control, Received
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

READABLE, WRITABLE = POLLIN | POLLRDNORM, POLLOUT | POLLWRNORM
EVERYTHING = (1 << 32) - 1
FIRST, MOST = 16 << 10, 256 << 10  # bytes of a ring: at first, and when much is written
WAITING_MOST = 4096  # connections that wait for their accept
_ABORT = struct.pack("ii", 1, 0)  # struct linger: close with a reset
# Options of which the host must see the bytes.
_HOST_ONLY = frozenset(
    [(abi.SOL_SOCKET, name) for name in (
        abi.SO_RCVLOWAT, abi.SO_OOBINLINE, abi.SO_TIMESTAMP, abi.SO_TIMESTAMPNS, abi.SO_TIMESTAMPING,
        abi.SO_TIMESTAMP_NEW, abi.SO_TIMESTAMPNS_NEW, abi.SO_TIMESTAMPING_NEW, abi.SO_PEEK_OFF,
    )] + [(abi.SOL_TCP, 36)]  # TCP_INQ
)  # fmt: skip

_BUFFERS = frozenset((abi.SO_SNDBUF, abi.SO_RCVBUF, abi.SO_SNDBUFFORCE, abi.SO_RCVBUFFORCE))

Ends = tuple[str, int, str, int]  # local address and port, the peer's


def ends_of(local: Any, peer: Any) -> Ends:
    """A connection by its two names; IPv4 in IPv6 clothes is IPv4."""
    return local[0].removeprefix("::ffff:"), local[1], peer[0].removeprefix("::ffff:"), peer[1]


class TcpSocket(InetSocket):
    """A stream socket. `peer` is set while bytes take the short cut; `inbox` holds what the peer wrote."""

    def __init__(self, task: Task, host: socket.socket, family: int, kind: int, protocol: int, flags: int = 0) -> None:
        super().__init__(task, host, family, kind, protocol, flags)
        self.peer: TcpSocket | None = None
        self.inbox: Ring | None = None
        self.sent = 0  # bytes that the host took of us before there was a peer
        self.before = 0  # bytes that come through the host before those of the ring
        self.direct = False  # our writes go to the host again
        self.ends_by_host = False  # the peer's did: behind the ring comes what the host says
        self.host_only = False  # an option asks for the host
        self.sndbuf = self.rcvbuf = 0  # as the application set them
        self.most = MOST  # bytes that our writes may have on the way
        self.ends: Ends | None = None  # a client that waits for its accept

    # -- pairs -------------------------------------------------------------------------------------------------------
    def connect(self, task: Task, name: bytes, again: bool) -> int:
        """connect(2); a connection to this sandbox itself is remembered for its accept."""
        if self.peer is not None:
            self._part()
        result = super().connect(task, name, again)
        if (result == 0 or result == -errno.EINPROGRESS) and self.ends is None and not self.host_only:
            self._await_accept(name)
        return result

    def _await_accept(self, name: bytes) -> None:
        try:
            peer = self.address(name)
            if peer[0] != "::1" and not peer[0].removeprefix("::ffff:").startswith("127."):
                return
            self.ends = ends_of(self.host.getsockname(), peer)
        except OSError:  # a name that only the host understands: no short cut
            return
        waiting = self.stack.connecting
        while len(waiting) >= WAITING_MOST:
            waiting.pop(next(iter(waiting)))
        waiting[self.ends] = weakref.ref(self)

    def accept(self, task: Task, flags: int) -> InetSocket | int:
        """accept4(2)."""
        child = super().accept(task, flags)
        if not isinstance(child, TcpSocket):
            return child
        child.sndbuf, child.rcvbuf = self.sndbuf, self.rcvbuf
        if self.stack.connecting:
            try:
                ends = ends_of(child.host.getpeername(), child.host.getsockname())
            except OSError:  # it is gone already
                return child
            known = self.stack.connecting.pop(ends, None)
            client = known() if known is not None else None
            if client is not None and client.ends == ends and not client.host_only and not self.host_only:
                client._pair(child)
        return child

    def _stay(self) -> None:
        """What only the host can carry was asked for before the accept, so that accept makes no pair."""
        if self.ends is not None:
            self.stack.connecting.pop(self.ends, None)

    def _pair(self, server: TcpSocket) -> None:
        self.peer, server.peer = server, self
        self.inbox, server.inbox = Ring(FIRST), Ring(FIRST)
        server.before = self.sent
        self.listen_to_host()
        server.listen_to_host()
        self._limit()
        server._limit()
        self.queue.wake(WRITABLE)  # it may be waiting for its connection still

    def _limit(self) -> None:
        """Small buffers on both sides hold a writer back as the host's would."""
        peer = self.peer
        if peer is not None and peer.inbox is not None and self.sndbuf and peer.rcvbuf:
            self.most = min(MOST, self.sndbuf + peer.rcvbuf)
            if peer.inbox.capacity > self.most:
                peer.inbox.resize(self.most)

    def _go_direct(self) -> None:
        """From now on our bytes go through the host."""
        self.direct = True
        peer = self.peer
        if peer is not None:
            peer.ends_by_host = True

    def _part(self) -> None:
        """The short cut ends both ways; what is in the rings can still be read."""
        self._go_direct()
        if self.peer is not None:
            self.peer._go_direct()

    # -- data --------------------------------------------------------------------------------------------------------
    def read(self, views: list[memoryview]) -> int:
        """read(2)."""
        inbox = self.inbox
        if inbox is None:
            return super().read(views)
        if self.before:
            return self._read_before(views)
        used = inbox.used
        if used:
            n = inbox.take(views)
            full = inbox.capacity // 3 * 2
            if used > full >= inbox.used and self.peer is not None:
                self.peer.queue.wake(WRITABLE)
            return n
        if self.ends_by_host:
            return super().read(views)
        return -errno.EAGAIN if any(map(len, views)) else 0

    def _read_before(self, views: list[memoryview]) -> int:
        left = self.before
        short = []
        for view in views:
            if not left:
                break
            short.append(view[:left])
            left -= len(short[-1])
        n = super().read(short)
        if n > 0:
            self.before -= n
        return n

    def write(self, views: list[memoryview]) -> int:
        """write(2)."""
        peer = self.peer
        if peer is None or self.direct:
            n = super().write(views)
            if n > 0:
                self.sent += n
            return n
        inbox = peer.inbox
        assert inbox is not None
        total = 0
        for view in views:
            total += len(view)
        if total > inbox.capacity - inbox.used and inbox.capacity < self.most:
            inbox.resize(min(self.most, 4 * max(inbox.capacity, total)))
        n = inbox.put(views, total)
        if n:
            if peer.queue.waiters:
                peer.queue.wake(READABLE)
            return n
        return -errno.EAGAIN if total else 0

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """sendmsg(2)."""
        if self.peer is None or self.direct:
            if flags & abi.MSG_OOB:
                self._stay()
            n = super().send(task, views, name, control, flags)
            if n > 0:
                self.sent += n
            return n
        if flags & (abi.MSG_OOB | abi.MSG_FASTOPEN | abi.MSG_ZEROCOPY) or (control is not None and control.raw):
            self._go_direct()
            return super().send(task, views, name, control, flags)
        return self.write(views)

    def recv(self, task: Task, views: list[memoryview], flags: int) -> Received | int:
        """recvmsg(2)."""
        inbox = self.inbox
        if inbox is None or flags & (abi.MSG_OOB | abi.MSG_ERRQUEUE):
            return super().recv(task, views, flags)
        if self.before:
            if flags & abi.MSG_PEEK:
                return super().recv(task, views, flags)
            n = self._read_before(views)
        elif flags & abi.MSG_PEEK and inbox.used:
            if flags & abi.MSG_TRUNC:  # counted, not copied (tcp_recvmsg_locked)
                return Received(min(inbox.used, sum(map(len, views))))
            n = inbox.take(views, peek=True)
        elif not inbox.used and self.ends_by_host:
            return super().recv(task, views, flags)
        elif flags & abi.MSG_TRUNC and inbox.used:  # tcp(7): the bytes are thrown away
            n = inbox.take([memoryview(bytearray(min(inbox.used, sum(map(len, views)))))])
        else:
            n = self.read(views)
        return n if n < 0 else Received(n)

    # -- readiness ---------------------------------------------------------------------------------------------------
    def poll(self) -> int:
        """What the rings say while they are all there is, else what the host says behind them."""
        peer, inbox = self.peer, self.inbox
        if inbox is None:
            return super().poll()
        found = READABLE if inbox.used and not self.before else 0
        if self.before or self.ends_by_host or self.direct or peer is None or peer.inbox is None:
            return found | super().poll()
        if peer.inbox.used <= peer.inbox.capacity // 3 * 2:
            found |= WRITABLE
        return found

    # -- the end -----------------------------------------------------------------------------------------------------
    def shutdown(self, how: int) -> None:
        """shutdown(2)."""
        if self.peer is not None:
            peer = self.peer
            if how != abi.SHUT_RD:
                self._go_direct()
            self.ends_by_host = True
            super().shutdown(how)
            self.queue.wake(EVERYTHING)
            peer.queue.wake(EVERYTHING)
            return
        self._stay()
        super().shutdown(how)

    def release(self) -> None:
        """The last descriptor is closed: with bytes that nobody read, the peer sees a reset (RFC 1122, 4.2.2.13)."""
        self._stay()
        peer, inbox = self.peer, self.inbox
        self._part()
        if inbox is not None and inbox.used:
            try:
                self.host.setsockopt(abi.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            except OSError:
                pass  # the host has ended the connection: there is nobody to tell
        super().release()
        if inbox is not None:
            inbox.clear()
        if peer is not None:
            self.peer = peer.peer = None
            peer.queue.wake(EVERYTHING)

    # -- the rest ----------------------------------------------------------------------------------------------------
    def setsockopt(self, task: Task, level: int, name: int, value: bytes) -> None:
        """Options that concern the bytes themselves end the short cut."""
        super().setsockopt(task, level, name, value)
        if level == abi.SOL_SOCKET and name in _BUFFERS:
            try:
                self.sndbuf, self.rcvbuf = (
                    self.host.getsockopt(level, option) if name in (option, forced) else known
                    for option, forced, known in (
                        (abi.SO_SNDBUF, abi.SO_SNDBUFFORCE, self.sndbuf),
                        (abi.SO_RCVBUF, abi.SO_RCVBUFFORCE, self.rcvbuf),
                    )
                )
            except OSError as error:
                raise refused(error) from None
            self._limit()
            if self.peer is not None:
                self.peer._limit()
        elif (level, name) in _HOST_ONLY:
            self.host_only = True
            self._part()

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """FIONREAD counts the ring."""
        if request == abi.FIONREAD and self.inbox is not None and self.inbox.used:
            task.mm.write(argument, abi.INT.pack(self.inbox.used))
            return 0
        return super().ioctl(task, request, argument)


__all__ = ["TcpSocket"]
