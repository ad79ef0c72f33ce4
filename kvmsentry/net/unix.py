"""AF_UNIX: names, connections and what both kinds of sockets share (unix(7), net/unix/af_unix.c).

    connect: client --peer--> newborn socket in the listener's backlog --accept--> a descriptor
    send:    into the receiver's inbox (a ring of bytes: net/unix_stream.py; packets: net/unix_packet.py)

A socket with a path stands in `Names.paths` under the file system and inode number that bind(2) made.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs import ops
from kvmsentry.fs.vfs import (
    MAY_WRITE,
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLOUT,
    POLLRDHUP,
    POLLRDNORM,
    POLLWRBAND,
    POLLWRNORM,
    TASK_IO,
    File,
    Inode,
    permission,
    walk,
)  # fmt: skip
from kvmsentry.kernel import cap
from kvmsentry.kernel.namespaces import Simple
from kvmsentry.kernel.traps import WaitQueue
from kvmsentry.net import scm
from kvmsentry.net.socket import (
    DEFAULT_BUFFER,
    MAX_BUFFER,
    MIN_RCVBUF,
    MIN_SNDBUF,
    Socket,
    credentials_of,
    shown_credentials,
)
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

S_IFSOCK = 0o140000
READABLE = POLLIN | POLLRDNORM
WRITABLE = POLLOUT | POLLWRNORM | POLLWRBAND
HUNG_UP = READABLE | WRITABLE | POLLHUP | POLLRDHUP
MAX_FORCED = 16 * MAX_BUFFER  # the most SO_SNDBUFFORCE gets: it is memory of the Sentry
UNKNOWN = (0, 0xFFFFFFFF, 0xFFFFFFFF)  # SO_PEERCRED of a socket without a peer
CLOSED, LISTENING, CONNECTED = range(3)


class Names:
    """What unix sockets of one kernel are bound to."""

    def __init__(self) -> None:
        self.paths: dict[Any, UnixSocket] = {}  # (super block, inode number)
        self.abstract: dict[bytes, UnixSocket] = {}  # the name without its leading NUL
        self.sockets: dict[UnixSocket, None] = {}  # all of them, for /proc/net/unix
        self._next = 0

    def automatic(self) -> bytes:
        """A free abstract name of five hexadecimal digits (unix_autobind)."""
        for _ in range(1 << 20):
            self._next = (self._next + 1) & 0xFFFFF
            name = b"%05x" % self._next
            if name not in self.abstract:
                return name
        raise Errno(errno.ENOSPC)


def names_of(kernel: Any) -> Names:
    """The names of `kernel`, made when first asked for."""
    names: Names | None = kernel.__dict__.get("unix_names")
    if names is None:
        names = kernel.__dict__["unix_names"] = Names()
    return names


def parse(name: bytes) -> bytes:
    """What follows the family in a sockaddr_un: a path up to its NUL, or NUL and an abstract name; EINVAL
    (unix_validate_addr, unix_mkname)."""
    if not 2 < len(name) <= 2 + abi.UNIX_PATH_MAX or abi.FAMILY.unpack_from(name)[0] != abi.AF_UNIX:
        raise Errno(errno.EINVAL)
    rest = name[2:]
    if not rest[0]:
        return rest
    return rest.partition(b"\0")[0]


def sockaddr(name: bytes | None) -> bytes:
    """A sockaddr_un: the family alone without a name, a path with its NUL."""
    if name is None:
        return b"\1\0"
    return b"\1\0" + name + (b"\0" if name[:1] != b"\0" else b"")


class UnixSocket(Socket, ABC):
    """A Unix socket of either kind."""

    family = abi.AF_UNIX

    def __init__(self, task: Task, kind: int, flags: int = 0) -> None:
        super().__init__(task, kind, 0, flags)
        net = task.ns.net
        self.names: Names = names_of(task.kernel) if isinstance(net, Simple) else net.names
        self.names.sockets[self] = None
        self.state = CLOSED
        self.name: bytes | None = None
        self.bound: Any = None  # key in names.paths
        self.bound_inode: Inode | None = None  # keeps its number from being used again
        self.peer: Any = None
        self.down = 0  # RCV_SHUTDOWN | SEND_SHUTDOWN
        self.error = 0  # sk_err: told once
        self.passcred = False
        self.creds = UNKNOWN  # ours, as a peer sees them
        self.peercred = UNKNOWN
        self.peer_groups: frozenset[int] = frozenset()
        self.backlog: deque[UnixSocket] = deque()
        self.backlog_most = 0
        self.room = WaitQueue()  # those who connect to a full backlog, or send to a full inbox
        self.sndbuf = self.rcvbuf = DEFAULT_BUFFER
        self.gone = False
        self.peek_offset = -1
        self.misc: dict[int, int] = {}  # options that only remember what they were set to

    # -- for scm -----------------------------------------------------------------------------------------------------
    def own_files(self) -> list[File]:
        """Files in our own inbox."""
        return []

    def queued_files(self) -> list[File]:
        """Files that only reading from us, or from those in our backlog, can bring out."""
        files = self.own_files()
        for newborn in self.backlog:
            files += newborn.own_files()
        return files

    def purge(self) -> None:
        """Empty the inbox: nobody will ever read it."""

    def put(self) -> None:
        """One holder less. When only queues hold us, nobody may be able to reach us any more."""
        File.put(self)
        if scm.in_flight and self.refs == scm.in_flight.get(self):
            self.collect_soon()

    def collect_soon(self) -> None:
        """Look for cycles once the call under way is over."""
        deferred = self.kernel.deferred
        if scm.collect not in deferred:
            deferred.append(scm.collect)

    # -- names -------------------------------------------------------------------------------------------------------
    def bind(self, task: Task, name: bytes) -> None:
        """bind(2)."""
        if name[:2] == b"\1\0" and len(name) == 2:
            self.autobind()
            return
        text = parse(name)
        if text[:1] == b"\0":
            if self.name is not None:
                raise Errno(errno.EINVAL)
            if text[1:] in self.names.abstract:
                raise Errno(errno.EADDRINUSE)
            self.names.abstract[text[1:]] = self
        else:
            try:
                place = ops.mknod_at(task, None, text, S_IFSOCK | (self.inode.mode & 0o7777), 0)
            except Errno as error:
                raise Errno(errno.EADDRINUSE if error.errno == errno.EEXIST else error.errno) from None
            if self.name is not None:  # in this order on Linux too: the path comes first, and goes again
                ops.unlink_at(task, None, text)
                raise Errno(errno.EINVAL)
            inode = place.inode
            self.bound, self.bound_inode = (inode.sb, inode.ino), inode
            self.names.paths[self.bound] = self
        self.name = text

    def autobind(self) -> None:
        """An abstract name of the kernel's choice, unless there is one."""
        if self.name is None:
            name = self.names.automatic()
            self.names.abstract[name] = self
            self.name = b"\0" + name

    def find(self, task: Task, text: bytes) -> UnixSocket:
        """The socket bound to `text`; ECONNREFUSED and what the walk says, EPROTOTYPE for another kind."""
        if text[:1] == b"\0":
            found = self.names.abstract.get(text[1:])
        else:
            inode = walk(task, text).inode
            inode.refresh()
            permission(inode, MAY_WRITE, task.creds)
            if inode.mode & 0o170000 != S_IFSOCK:
                raise Errno(errno.ECONNREFUSED)
            found = self.names.paths.get((inode.sb, inode.ino))
        if found is None:
            raise Errno(errno.ECONNREFUSED)
        if found.kind != self.kind:
            raise Errno(errno.EPROTOTYPE)
        return found

    def getsockname(self) -> bytes:
        """What bind(2) was given."""
        return sockaddr(self.name)

    def getpeername(self) -> bytes:
        """The name of the other end; ENOTCONN."""
        if self.peer is None:
            raise Errno(errno.ENOTCONN)
        return sockaddr(self.peer.name)

    # -- connections -------------------------------------------------------------------------------------------------
    @abstractmethod
    def newborn(self, task: Task) -> UnixSocket:
        """The other end of a connection that is being made; in nobody's descriptors yet."""

    def listen(self, task: Task, backlog: int) -> None:
        """listen(2)."""
        if self.kind == abi.SOCK_DGRAM:
            raise Errno(errno.EOPNOTSUPP)
        if self.name is None or self.state == CONNECTED:
            raise Errno(errno.EINVAL)
        most = min(backlog & 0xFFFFFFFF, abi.SOMAXCONN)
        if most > self.backlog_most:
            self.room.wake()
        self.backlog_most = most
        self.state = LISTENING
        self.creds = self.peercred = credentials_of(task)  # its own are its peer's for now (init_peercred)
        self.peer_groups = task.creds.groups

    def connect(self, task: Task, name: bytes, again: bool) -> int:
        """connect(2) of streams and seqpackets: done at once, or -EAGAIN while the backlog is full."""
        text = parse(name)
        if self.passcred:
            self.autobind()
        other = self.find(task, text)
        if other.state != LISTENING or other.gone or other.down & abi.RCV_SHUTDOWN:
            return -errno.ECONNREFUSED
        if len(other.backlog) > other.backlog_most:
            return -errno.EAGAIN
        if self.state != CLOSED:
            return -errno.EISCONN if self.state == CONNECTED else -errno.EINVAL
        child = other.newborn(task)
        child.refs = 0  # accept gives the first
        child.name, child.passcred = other.name, other.passcred
        child.sndbuf = other.sndbuf
        child.creds, self.peercred = other.creds, other.creds
        child.peercred = self.creds = credentials_of(task)
        child.peer_groups, self.peer_groups = task.creds.groups, other.peer_groups
        join(self, child)
        other.backlog.append(child)
        other.queue.wake(READABLE)
        self.queue.wake(WRITABLE)
        return 0

    def connect_queue(self, name: bytes) -> WaitQueue:
        """The listener's, which tells when its backlog has room."""
        text = parse(name)
        found = self.names.abstract.get(text[1:]) if text[:1] == b"\0" else None
        if found is None:
            for sock in self.names.paths.values():
                if sock.name == text:
                    return sock.room
            return self.room
        return found.room

    def accept(self, task: Task, flags: int) -> Socket | int:
        """accept4(2)."""
        if self.kind == abi.SOCK_DGRAM:
            raise Errno(errno.EOPNOTSUPP)
        if self.state != LISTENING:
            raise Errno(errno.EINVAL)
        if not self.backlog:
            return -errno.EINVAL if self.down & abi.RCV_SHUTDOWN else -errno.EAGAIN
        child = self.backlog.popleft()
        child.refs = 1
        child.inode.uid, child.inode.gid = task.creds.fsuid, task.creds.fsgid
        self.room.wake()
        return child

    def shutdown(self, how: int) -> None:
        """shutdown(2): the peer of a connection sees the mirror image."""
        down = how + 1
        self.down |= down
        peer = self.peer
        if peer is not None and self.kind != abi.SOCK_DGRAM:
            peer.down |= (down & 1) << 1 | down >> 1
            peer.queue.wake(HUNG_UP)
        self.queue.wake(HUNG_UP)
        if self.state == LISTENING:
            self.room.wake()

    def release(self) -> None:
        """The last descriptor is closed."""
        self.gone = True
        self.down = abi.RCV_SHUTDOWN | abi.SEND_SHUTDOWN
        names = self.names
        names.sockets.pop(self, None)
        if self.bound is not None:
            if names.paths.get(self.bound) is self:
                del names.paths[self.bound]
            self.bound = self.bound_inode = None
        elif self.name is not None and names.abstract.get(self.name[1:]) is self and self.name[:1] == b"\0":
            del names.abstract[self.name[1:]]
        backlog, self.backlog = self.backlog, deque()
        for child in backlog:
            child.release_newborn()
        self.disconnect(False)
        self.purge()
        self.room.wake()
        self.queue.wake(HUNG_UP)
        if scm.in_flight:
            self.collect_soon()

    def release_newborn(self) -> None:
        """Nobody will accept us any more: for the client it is a reset."""
        peer = self.peer
        if peer is not None:
            peer.error = errno.ECONNRESET
        self.gone = True
        self.names.sockets.pop(self, None)
        self.disconnect(True)
        self.purge()

    def disconnect(self, reset: bool) -> None:
        """The peer hears that we are gone; unread bytes of its make it a reset."""
        peer, self.peer = self.peer, None
        if peer is not None and self.kind != abi.SOCK_DGRAM:
            peer.down = abi.RCV_SHUTDOWN | abi.SEND_SHUTDOWN
            if reset or self.unread():
                peer.error = errno.ECONNRESET
            peer.queue.wake(HUNG_UP | (POLLERR if peer.error else 0))

    def unread(self) -> bool:
        """Is anything in the inbox?"""
        return False

    def take_error(self) -> int:
        """The pending error, which is told once."""
        error, self.error = self.error, 0
        return error

    # -- options -----------------------------------------------------------------------------------------------------
    def set_passcred(self, on: bool) -> None:
        """SO_PASSCRED: from now on messages to us and from us carry who sent them."""
        self.passcred = on
        if on:
            self.flags |= TASK_IO
            if self.peer is not None:
                self.peer.flags |= TASK_IO

    def set_sndbuf(self, size: int) -> None:
        """SO_SNDBUF, already doubled and bounded."""
        self.sndbuf = size

    def setsockopt(self, task: Task, level: int, name: int, value: bytes) -> None:
        """SOL_SOCKET options."""
        if level != abi.SOL_SOCKET:
            raise Errno(errno.EOPNOTSUPP)
        if name == abi.SO_LINGER:
            if len(value) < 8:
                raise Errno(errno.EINVAL)
            on, seconds = abi.LINGER.unpack_from(value)
            self.misc[name] = (seconds << 1 | 1) if on else 0
            return
        if len(value) < 4:
            raise Errno(errno.EINVAL)
        number = abi.INT.unpack_from(value)[0]
        if name == abi.SO_PASSCRED:
            self.set_passcred(bool(number))
        elif name == abi.SO_SNDBUF:
            self.set_sndbuf(max(2 * min(number & 0xFFFFFFFF, MAX_BUFFER), MIN_SNDBUF))
            self.queue.wake(WRITABLE)
        elif name == abi.SO_RCVBUF:
            self.rcvbuf = max(2 * min(number & 0xFFFFFFFF, MAX_BUFFER), MIN_RCVBUF)
        elif name == abi.SO_PEEK_OFF:
            self.peek_offset = max(-1, number)
        elif name in _REMEMBERED:
            self.misc[name] = number if name in (abi.SO_PRIORITY, abi.SO_RCVLOWAT) else int(bool(number))
        elif name in (abi.SO_SNDBUFFORCE, abi.SO_RCVBUFFORCE) and task.creds.capable(cap.NET_ADMIN):
            size = 2 * min(max(number, 0), MAX_FORCED)
            if name == abi.SO_RCVBUFFORCE:
                self.rcvbuf = max(size, MIN_RCVBUF)
            else:
                self.set_sndbuf(max(size, MIN_SNDBUF))
                self.queue.wake(WRITABLE)
        elif name in (abi.SO_SNDBUFFORCE, abi.SO_RCVBUFFORCE, abi.SO_MARK):
            raise Errno(errno.EPERM)
        else:
            raise Errno(errno.ENOPROTOOPT)

    def getsockopt(self, task: Task, level: int, name: int, size: int) -> bytes:
        """SOL_SOCKET options."""
        if level != abi.SOL_SOCKET:
            raise Errno(errno.EOPNOTSUPP)
        if name == abi.SO_ERROR:
            return abi.INT.pack(self.take_error())
        if name == abi.SO_PASSCRED:
            return abi.INT.pack(self.passcred)
        if name == abi.SO_PEERCRED:
            return abi.UCRED.pack(*shown_credentials(task, self.peercred))
        if name == abi.SO_PEERGROUPS:
            if self.peercred is UNKNOWN:
                raise Errno(errno.ENODATA)
            groups = sorted(self.peer_groups)
            if size < 4 * len(groups):
                raise Errno(errno.ERANGE)
            return b"".join(map(abi.UINT.pack, groups))
        if name == abi.SO_PEERPIDFD:
            return self._peer_pidfd(task)
        if name == abi.SO_ACCEPTCONN:
            return abi.INT.pack(self.state == LISTENING)
        if name == abi.SO_SNDBUF:
            return abi.INT.pack(self.sndbuf)
        if name == abi.SO_RCVBUF:
            return abi.INT.pack(self.rcvbuf)
        if name == abi.SO_PEEK_OFF:
            return abi.INT.pack(self.peek_offset)
        if name == abi.SO_LINGER:
            kept = self.misc.get(name, 0)
            return abi.LINGER.pack(kept & 1, kept >> 1)
        if name == abi.SO_RCVLOWAT:
            return abi.INT.pack(self.misc.get(name) or 1)
        if name in _REMEMBERED:
            return abi.INT.pack(self.misc.get(name, 0))
        raise Errno(errno.ENOPROTOOPT)

    def _peer_pidfd(self, task: Task) -> bytes:
        from kvmsentry.kernel.pidfd import PidFile
        from kvmsentry.kernel.task import RLIMIT_NOFILE

        process = self.kernel.processes.get(self.peercred[0]) if self.peercred is not UNKNOWN else None
        if process is None:
            raise Errno(errno.ENODATA if self.peercred is UNKNOWN else errno.ESRCH)
        file = PidFile(process)
        try:
            return abi.INT.pack(task.files.install(file, task.rlimit(RLIMIT_NOFILE), cloexec=True))
        except Errno:
            file.put()
            raise

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """FIONREAD (SIOCINQ), SIOCOUTQ, and what asks for interfaces."""
        if request == abi.FIONREAD:
            if self.state == LISTENING:
                raise Errno(errno.EINVAL)
            task.mm.write(argument, abi.INT.pack(self.input_size()))
            return 0
        if request == abi.SIOCOUTQ:
            task.mm.write(argument, abi.INT.pack(self.output_size()))
            return 0
        from kvmsentry.net import ifreq

        return ifreq.ioctl(task, request, argument)

    def input_size(self) -> int:
        """SIOCINQ."""
        return 0

    def output_size(self) -> int:
        """SIOCOUTQ: sent and not yet read."""
        return 0

    def hang_up_mask(self) -> int:
        """The part of poll(2) about errors and shutdown."""
        mask = POLLERR if self.error else 0
        down = self.down
        if down:
            if down == 3:
                mask |= POLLHUP
            if down & abi.RCV_SHUTDOWN:
                mask |= POLLRDHUP | READABLE
        return mask


_REMEMBERED = frozenset(
    (abi.SO_DEBUG, abi.SO_REUSEADDR, abi.SO_DONTROUTE, abi.SO_BROADCAST, abi.SO_KEEPALIVE, abi.SO_OOBINLINE,
     abi.SO_NO_CHECK, abi.SO_PRIORITY, abi.SO_RCVLOWAT, abi.SO_TIMESTAMP, abi.SO_TIMESTAMPNS, abi.SO_PASSSEC,
     abi.SO_BSDCOMPAT, abi.SO_RXQ_OVFL)  # fmt: skip
)


def join(one: UnixSocket, other: UnixSocket) -> None:
    """Make them each other's peer."""
    one.peer, other.peer = other, one
    if one.kind != abi.SOCK_DGRAM:
        one.state = other.state = CONNECTED
    if one.passcred or other.passcred:
        one.flags |= TASK_IO
        other.flags |= TASK_IO


def create(task: Task, kind: int, flags: int) -> UnixSocket:
    """socket(AF_UNIX); ESOCKTNOSUPPORT for kinds it does not know."""
    from kvmsentry.net.unix_packet import PacketSocket
    from kvmsentry.net.unix_stream import StreamSocket

    if kind == abi.SOCK_STREAM:
        return StreamSocket(task, kind, flags)
    if kind in (abi.SOCK_DGRAM, abi.SOCK_SEQPACKET, abi.SOCK_RAW):
        return PacketSocket(task, abi.SOCK_DGRAM if kind == abi.SOCK_RAW else kind, flags)
    raise Errno(errno.ESOCKTNOSUPPORT)


def pair(task: Task, kind: int, flags: int) -> tuple[UnixSocket, UnixSocket]:
    """socketpair(2)."""
    one, other = create(task, kind, flags), create(task, kind, flags)
    one.creds = one.peercred = other.creds = other.peercred = credentials_of(task)
    one.peer_groups = other.peer_groups = task.creds.groups
    join(one, other)
    return one, other


def proc_unix(names: Names) -> str:
    """/proc/net/unix."""
    rows = ["Num       RefCount Protocol Flags    Type St Inode Path\n"]
    for sock in names.sockets:
        state = 3 if sock.state == CONNECTED else 1  # SS_CONNECTED, SS_UNCONNECTED
        flags = 0x10000 if sock.state == LISTENING else 0  # __SO_ACCEPTCON
        shown = ""
        if sock.name is not None:
            text = sock.name.replace(b"\0", b"@") if sock.name[:1] == b"\0" else sock.name
            shown = " " + text.decode(errors="replace")
        rows.append(
            f"{0:016x}: {sock.refs + 1:08X} {0:08X} {flags:08X} {sock.kind:04X} {state:02X} "
            f"{sock.inode.ino:5d}{shown}\n"
        )
    return "".join(rows)
