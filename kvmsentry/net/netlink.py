"""AF_NETLINK: NETLINK_ROUTE to read links, addresses, routes, rules and neighbours, NETLINK_KOBJECT_UEVENT, which
never says anything (netlink(7), rtnetlink(7)).

A route socket is a host socket in the sandbox's namespace. Requests pass one by one: only messages that read, of
bounded size; what would change something is answered EPERM by us, as the kernel answers without CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel.namespaces import Simple
from kvmsentry.net.hostsock import HostSocket, refused
from kvmsentry.net.socket import Control, Received
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

NETLINK_ROUTE, NETLINK_SOCK_DIAG, NETLINK_KOBJECT_UEVENT = 0, 4, 15  # uapi/linux/netlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK = 1, 4
SOCKADDR_NL = struct.Struct("<HHII")
NLMSGHDR = struct.Struct("<IHHII")
REQUEST_MOST = 65536  # bytes of one send

# uapi/linux/rtnetlink.h: RTM_GET LINK, ADDR, ROUTE, NEIGH, RULE, QDISC, ADDRLABEL, NETCONF, MDB, STATS, NEXTHOP
READING = frozenset((18, 22, 26, 30, 34, 38, 66, 74, 82, 86, 94, 106, 110))

# SOL_NETLINK: ADD_MEMBERSHIP DROP_MEMBERSHIP PKTINFO BROADCAST_ERROR NO_ENOBUFS LIST_MEMBERSHIPS CAP_ACK EXT_ACK
# GET_STRICT_CHK
OPTIONS = frozenset((1, 2, 3, 4, 5, 9, 10, 11, 12))
SOCKET_OPTIONS = frozenset((abi.SO_SNDBUF, abi.SO_RCVBUF, abi.SO_TIMESTAMP, abi.SO_RXQ_OVFL, abi.SO_SNDBUFFORCE,
                            abi.SO_RCVBUFFORCE, abi.SO_ERROR, abi.SO_ACCEPTCONN, abi.SO_PEEK_OFF, abi.SO_REUSEADDR,
                            abi.SO_PASSCRED))  # fmt: skip


class NetlinkSocket(HostSocket):
    """A netlink socket. `refusals` are our own answers, read before the host's."""

    family = abi.AF_NETLINK

    def __init__(self, task: Task, host: socket.socket, kind: int, protocol: int, flags: int = 0) -> None:
        super().__init__(task, host, kind, protocol, flags)
        self.refusals: list[bytes] = []
        self.passcred = False

    def address(self, name: bytes) -> Any:
        """(port id, groups)."""
        if len(name) < SOCKADDR_NL.size:
            raise Errno(errno.EINVAL)
        family, _, pid, groups = SOCKADDR_NL.unpack_from(name)
        if family != abi.AF_NETLINK:
            raise Errno(errno.EINVAL)
        return pid, groups

    def sockaddr(self, address: Any) -> bytes:
        """A sockaddr_nl."""
        return SOCKADDR_NL.pack(abi.AF_NETLINK, 0, *address)

    def getpeername(self) -> bytes:
        """Connected or not, the kernel is the default."""
        return self.sockaddr((0, 0))

    def connect(self, task: Task, name: bytes, again: bool) -> int:
        """connect(2) to the kernel."""
        if abi.FAMILY.unpack_from(name)[0] == abi.AF_UNSPEC:
            return 0
        pid, groups = self.address(name)
        if pid or groups:
            return -errno.EPERM
        return 0

    def write(self, views: list[memoryview]) -> int:
        """write(2)."""
        return self._request(b"".join(views))

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """sendmsg(2), to the kernel only."""
        if flags & abi.MSG_OOB:
            return -errno.EOPNOTSUPP
        if name:
            pid, groups = self.address(name)
            if pid or groups:
                return -errno.EPERM
        if sum(map(len, views)) > REQUEST_MOST:
            return -errno.EMSGSIZE
        return self._request(b"".join(views))

    def _request(self, data: bytes) -> int:
        if self.protocol != NETLINK_ROUTE:
            return -errno.ECONNREFUSED
        position = 0
        while len(data) - position >= NLMSGHDR.size:  # netlink_rcv_skb
            size, kind, flags, sequence, pid = NLMSGHDR.unpack_from(data, position)
            if not NLMSGHDR.size <= size <= len(data) - position:
                break
            message = data[position : position + size]
            position += size + 3 & ~3
            if not flags & NLM_F_REQUEST or kind < 16:
                if flags & NLM_F_ACK and flags & NLM_F_REQUEST:
                    self._answer(0, message)
                continue
            if kind not in READING:
                self._answer(-errno.EPERM if kind < 130 else -errno.EOPNOTSUPP, message)
                continue
            try:
                self.host.sendto(message, abi.MSG_DONTWAIT, (0, 0))
            except OSError as error:
                raise refused(error) from None
        return len(data)

    def _answer(self, error: int, message: bytes) -> None:
        """A NLMSG_ERROR of our own."""
        if len(self.refusals) > 64:
            raise Errno(errno.ENOBUFS)
        pid = self.host.getsockname()[0]
        _, _, _, sequence, _ = NLMSGHDR.unpack_from(message)
        body = struct.pack("<i", error) + (message if error else message[: NLMSGHDR.size])
        self.refusals.append(NLMSGHDR.pack(NLMSGHDR.size + len(body), NLMSG_ERROR, 0, sequence, pid) + body)
        self.queue.wake()

    def poll(self) -> int:
        """Our own answers count."""
        return super().poll() | (0x41 if self.refusals else 0)

    def read(self, views: list[memoryview]) -> int:
        """read(2)."""
        if self.refusals:
            received = self._refused(views, 0)
            return received.n
        return super().read(views)

    def _refused(self, views: list[memoryview], flags: int) -> Received:
        from kvmsentry.fs.anon import scatter

        data = self.refusals[0] if flags & abi.MSG_PEEK else self.refusals.pop(0)
        room = sum(map(len, views))
        n = scatter(views, data[:room]) if views else 0
        truncated = abi.MSG_TRUNC if len(data) > room else 0
        return Received(len(data) if flags & abi.MSG_TRUNC else n, self.sockaddr((0, 0)), truncated)

    def recv(self, task: Task, views: list[memoryview], flags: int) -> Received | int:
        """recvmsg(2)."""
        if flags & abi.MSG_OOB:
            return -errno.EOPNOTSUPP
        received = self._refused(views, flags) if self.refusals else super().recv(task, views, flags)
        if isinstance(received, Received) and self.passcred:
            mine = (abi.SOL_SOCKET, abi.SCM_CREDENTIALS, abi.UCRED.pack(0, 0, 0))  # the kernel
            received.control = [mine] + [c for c in received.control or () if c[1] != abi.SCM_CREDENTIALS]
        return received

    def setsockopt(self, task: Task, level: int, name: int, value: bytes) -> None:
        """Options on the list."""
        if level == abi.SOL_SOCKET and name == abi.SO_PASSCRED:
            if len(value) < 4:
                raise Errno(errno.EINVAL)
            self.passcred = value[:4] != b"\0\0\0\0"
            return
        if level == abi.SOL_SOCKET and name == abi.SO_ATTACH_FILTER:
            return  # whoever filters also checks what passes
        if not (level == abi.SOL_NETLINK and name in OPTIONS or level == abi.SOL_SOCKET and name in SOCKET_OPTIONS):
            raise Errno(errno.ENOPROTOOPT)
        try:
            self.host.setsockopt(level, name, value[:4])
        except OSError as error:
            raise refused(error) from None

    def getsockopt(self, task: Task, level: int, name: int, size: int) -> bytes:
        """Options on the list."""
        if level == abi.SOL_SOCKET and name == abi.SO_PASSCRED:
            return abi.INT.pack(self.passcred)
        if not (level == abi.SOL_NETLINK and name in OPTIONS or level == abi.SOL_SOCKET and name in SOCKET_OPTIONS):
            raise Errno(errno.ENOPROTOOPT)
        try:
            return self.host.getsockopt(level, name, min(size, 64))
        except OSError as error:
            raise refused(error) from None


def create(task: Task, kind: int, protocol: int, flags: int) -> NetlinkSocket:
    """socket(AF_NETLINK): NETLINK_ROUTE and NETLINK_KOBJECT_UEVENT; EPROTONOSUPPORT for the others."""
    if kind not in (abi.SOCK_RAW, abi.SOCK_DGRAM):
        raise Errno(errno.ESOCKTNOSUPPORT)
    net = task.ns.net
    lone = not isinstance(net, Simple)
    if protocol not in (NETLINK_ROUTE, NETLINK_KOBJECT_UEVENT) or (
        task.kernel.__dict__.get("inet_refused") and not lone
    ):
        raise Errno(errno.EPROTONOSUPPORT)
    try:
        # Both are route sockets on the host: one that was never asked anything is silent, as uevents are here.
        host = socket.socket(socket.AF_NETLINK, kind | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
    except OSError as error:
        raise refused(error) from None
    host.setblocking(False)
    if lone and protocol == NETLINK_ROUTE:
        from kvmsentry.net.lone import LoneNetlink

        sock = LoneNetlink(task, host, kind, protocol, flags)
        sock.net, sock.task = net, task
        return sock
    return NetlinkSocket(task, host, kind, protocol, flags)
