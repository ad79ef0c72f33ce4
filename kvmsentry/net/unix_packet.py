"""SOCK_DGRAM and SOCK_SEQPACKET of AF_UNIX: an inbox of packets, accounted to their senders (unix_dgram_sendmsg)."""

from __future__ import annotations

import errno
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from kvmsentry.fs.anon import scatter
from kvmsentry.fs.vfs import POLLHUP, TASK_IO, File
from kvmsentry.kernel.traps import WaitQueue
from kvmsentry.net import scm
from kvmsentry.net.socket import NOBODY, Control, Received, credentials_of
from kvmsentry.net.unix import CLOSED, CONNECTED, LISTENING, READABLE, WRITABLE, UnixSocket, parse, sockaddr
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

QUEUE_MOST = 10  # net.unix.max_dgram_qlen: packets from senders that are not connected back
OVERHEAD, FREE_DATA = 768, 192  # what a packet costs its sender's buffer beyond its bytes (SKB_TRUESIZE)


class Packet:
    """One message on its way."""

    __slots__ = ("data", "sender", "name", "files", "creds", "cost")

    def __init__(self, data: bytes, sender: PacketSocket, creds: tuple[int, int, int], files: list[File]) -> None:
        self.data, self.sender, self.name, self.creds, self.files = data, sender, sender.name, creds, files
        self.cost = OVERHEAD + max(0, len(data) - FREE_DATA)


class PacketSocket(UnixSocket):
    """A datagram or seqpacket socket."""

    def __init__(self, task: Task, kind: int, flags: int = 0) -> None:
        super().__init__(task, kind, flags)
        self.flags |= TASK_IO  # every packet says who sent it
        self.packets: deque[Packet] = deque()
        self.sent = 0  # cost of what is on its way from here
        self.callers: weakref.WeakSet[PacketSocket] = weakref.WeakSet()  # datagram sockets connected to us

    def newborn(self, task: Task) -> UnixSocket:
        """The server's end of a seqpacket connection."""
        return PacketSocket(task, self.kind)

    def own_files(self) -> list[File]:
        """Files in the packets."""
        return [file for packet in self.packets for file in packet.files]

    def purge(self) -> None:
        """Drop what nobody will read."""
        packets, self.packets = self.packets, deque()
        for packet in packets:
            self._consumed(packet)
            if packet.files:
                files, packet.files = packet.files, []
                scm.arrive(files)
                scm.drop(files)

    def unread(self) -> bool:
        """Is anything in the inbox?"""
        return bool(self.packets)

    def release(self) -> None:
        """Datagram sockets connected to us have lost their peer."""
        super().release()
        for caller in list(self.callers):
            caller.queue.wake(WRITABLE)

    # -- connecting datagram sockets ---------------------------------------------------------------------------------
    def connect(self, task: Task, name: bytes, again: bool) -> int:
        """connect(2); for datagrams it chooses the peer, AF_UNSPEC forgets it."""
        if self.kind != abi.SOCK_DGRAM:
            return super().connect(task, name, again)
        if abi.FAMILY.unpack_from(name)[0] == abi.AF_UNSPEC:
            self._set_peer(None)
            self.state = CLOSED
            return 0
        text = parse(name)
        if self.passcred:
            self.autobind()
        other = self.find(task, text)
        assert isinstance(other, PacketSocket)
        if other.peer is not None and other.peer is not self:
            return -errno.EPERM
        self._set_peer(other)
        self.state = CONNECTED
        return 0

    def _set_peer(self, other: PacketSocket | None) -> None:
        old = self.peer
        if old is other:
            return
        if old is not None:
            old.callers.discard(self)
            if old.peer is self and not old.gone:  # unix_dgram_disconnected
                old.purge()
                old.error = errno.ECONNRESET
                old.queue.wake()
            self.purge()
        self.peer = other
        if other is not None:
            other.callers.add(self)

    # -- sending -----------------------------------------------------------------------------------------------------
    def write_by(self, task: Task, views: list[memoryview]) -> int:
        """write(2)."""
        return self.send(task, views, None, None, 0)

    def send_queue(self, name: bytes | None) -> WaitQueue:
        """A full inbox tells in its owner's `room`, our own full buffer in our queue."""
        if self.sent >= self.sndbuf:
            return self.queue
        if name:
            text = parse(name)
            for sock in self.names.sockets:
                if sock.name == text:
                    return sock.room
        elif self.peer is not None:
            room: WaitQueue = self.peer.room
            return room
        return self.queue

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """sendmsg(2)."""
        if flags & abi.MSG_OOB:
            return -errno.EOPNOTSUPP
        other: Any
        if self.kind == abi.SOCK_SEQPACKET:
            if self.error:
                return -self.take_error()
            if self.state != CONNECTED:
                return -errno.ENOTCONN
            name = None
        if name:
            text = parse(name)
            other = None
        else:
            other = self.peer
            if other is None:
                return -errno.ENOTCONN
        if self.passcred:
            self.autobind()
        total = sum(map(len, views))
        if total > self.sndbuf - 32:
            return -errno.EMSGSIZE
        if self.down & abi.SEND_SHUTDOWN:
            return -errno.EPIPE
        if self.sent >= self.sndbuf:
            return -errno.EAGAIN
        if name:
            other = self.find(task, text)
        if other.gone:
            if self.kind == abi.SOCK_SEQPACKET:
                return -errno.EPIPE
            if self.peer is other:
                self._set_peer(None)
                self.state = CLOSED
            return -errno.ECONNREFUSED
        if other.peer is not None and other.peer is not self:
            return -errno.EPERM
        if other.down & abi.RCV_SHUTDOWN:
            return -errno.EPIPE
        if other is not self and other.peer is not self and len(other.packets) > QUEUE_MOST:
            return -errno.EAGAIN
        if control is not None and control.creds is not None:
            creds = control.creds
        else:  # only told when one of the two asks by now (maybe_add_creds)
            creds = credentials_of(task) if self.passcred or other.passcred else NOBODY
        files = control.files if control is not None else []
        packet = Packet(b"".join(views), self, creds, files)
        scm.depart(files)
        self.sent += packet.cost
        other.packets.append(packet)
        if other.queue.waiters:
            other.queue.wake(READABLE)
        return total

    def _consumed(self, packet: Packet) -> None:
        """`packet` left our inbox: its sender has room again."""
        sender = packet.sender
        before = sender.sent
        sender.sent -= packet.cost
        quarter = sender.sndbuf >> 2
        if before > quarter >= sender.sent:
            sender.queue.wake(WRITABLE)
        if len(self.packets) <= QUEUE_MOST:
            if self.room.waiters:
                self.room.wake()
            if len(self.packets) == QUEUE_MOST:
                for caller in list(self.callers):
                    caller.queue.wake(WRITABLE)

    # -- receiving ---------------------------------------------------------------------------------------------------
    def read_by(self, task: Task, views: list[memoryview]) -> int:
        """read(2)."""
        received = self.recv(task, views, 0)
        if isinstance(received, int):
            return received
        if received.files:
            scm.drop(received.files)
        return received.n

    def read(self, views: list[memoryview]) -> int:
        """read(2), whoever asks."""
        return self.read_by(None, views)  # type: ignore[arg-type]

    def recv(self, task: Task, views: list[memoryview], flags: int) -> Received | int:
        """recvmsg(2): one packet; what does not fit is lost."""
        if flags & abi.MSG_OOB:
            return -errno.EOPNOTSUPP
        if self.kind == abi.SOCK_SEQPACKET and self.state != CONNECTED:
            return -errno.ENOTCONN
        if self.error:
            return -self.take_error()
        if not self.packets:
            if self.down & abi.RCV_SHUTDOWN:
                return Received(0)
            return -errno.EAGAIN
        peek = flags & abi.MSG_PEEK
        packet = self.packets[0]
        files = packet.files
        if peek:
            for file in files:
                file.get()
        else:
            self.packets.popleft()
            packet.files = []
            if files:
                scm.arrive(files)
            self._consumed(packet)
        data = packet.data
        room = sum(map(len, views))
        stored = scatter(views, data if len(data) <= room else memoryview(data)[:room]) if views else 0
        out = 0
        n = stored
        if len(data) > room:
            out = abi.MSG_TRUNC
            if flags & abi.MSG_TRUNC:
                n = len(data)
        control = None
        if self.passcred:
            control = [(abi.SOL_SOCKET, abi.SCM_CREDENTIALS, abi.UCRED.pack(*packet.creds))]
        name = sockaddr(packet.name) if packet.name is not None else b""
        return Received(n, name, out, control, list(files) or None)

    # -- the rest ----------------------------------------------------------------------------------------------------
    def poll(self) -> int:
        """Readiness."""
        mask = self.hang_up_mask()
        if self.state == LISTENING:
            return mask | (READABLE if self.backlog else 0)
        if self.packets:
            mask |= READABLE
        if self.kind == abi.SOCK_SEQPACKET and self.state == CLOSED:
            mask |= POLLHUP
        if self.sent <= self.sndbuf >> 2:
            peer = self.peer
            if peer is None or peer.peer is self or len(peer.packets) <= QUEUE_MOST:
                mask |= WRITABLE
        return mask

    def input_size(self) -> int:
        """Bytes of the next packet; all of them for seqpackets (unix_inq_len)."""
        if self.kind == abi.SOCK_SEQPACKET:
            return sum(len(packet.data) for packet in self.packets)
        return len(self.packets[0].data) if self.packets else 0

    def output_size(self) -> int:
        """Sent and not yet read, with what Linux counts for each packet."""
        return self.sent
