"""AF_INET and AF_INET6: TCP, UDP, ping sockets and raw sockets, served by the host kernel inside the sandbox's network
namespace (ip(7), ipv6(7), tcp(7), udp(7), icmp(7), raw(7))."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.sysctl import Sysctls, sysctl
from kvmsentry.gofer import hostcalls
from kvmsentry.kernel import cap
from kvmsentry.kernel.namespaces import Simple
from kvmsentry.kernel.userns import ROOT, UserNamespace, capable
from kvmsentry.net import options
from kvmsentry.net.hostsock import HostSocket, refused
from kvmsentry.net.socket import Control
from kvmsentry.net.tables import stack_of
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMPV6, IPPROTO_UDPLITE = 1, 6, 17, 58, 136  # uapi/linux/in.h
SOCKADDR_IN = struct.Struct("<H2s4s8x")  # the port as it is on the wire
SOCKADDR_IN6 = struct.Struct("<H2s4s16sI")
SIN_LEAST = 8  # bytes of a sockaddr_in that must be there for sending
SIN6_LEAST = 24  # SIN6_LEN_RFC2133

_PROTOCOLS = {
    abi.SOCK_STREAM: (0, IPPROTO_TCP),
    abi.SOCK_DGRAM: (0, IPPROTO_UDP, IPPROTO_UDPLITE),
}
FIRST_PORT = "net/ipv4/ip_unprivileged_port_start"
_LEVELS = {abi.SOCK_STREAM: abi.SOL_TCP, abi.SOCK_DGRAM: abi.SOL_UDP, abi.SOCK_RAW: abi.SOL_RAW}


def may_bind(task: Task, port: int, sysctls: Sysctls, owner: UserNamespace) -> None:
    """EACCES for a port that is kept for CAP_NET_BIND_SERVICE in `owner`, whose network namespace it is."""
    if 0 < port < sysctls.number(FIRST_PORT) and not capable(task.creds, owner, cap.NET_BIND_SERVICE):
        raise Errno(errno.EACCES)


class InetSocket(HostSocket):
    """An IPv4 or IPv6 socket."""

    def __init__(self, task: Task, host: socket.socket, family: int, kind: int, protocol: int, flags: int = 0) -> None:
        super().__init__(task, host, kind, protocol, flags)
        self.family = family
        self.settings = host  # who keeps the options
        self.stack = stack_of(task.kernel)
        self.stack.sockets[self] = None

    def release(self) -> None:
        """No longer in the tables."""
        self.stack.sockets.pop(self, None)
        super().release()

    # -- names -------------------------------------------------------------------------------------------------------
    def bind(self, task: Task, name: bytes) -> None:
        """bind(2): EACCES below ip_unprivileged_port_start, which is 0 until somebody sets it."""
        if self.kind in (abi.SOCK_STREAM, abi.SOCK_DGRAM):
            may_bind(task, self.address(name)[1], sysctl(task.kernel), ROOT)
        super().bind(task, name)

    def address(self, name: bytes) -> Any:
        """(host, port[, flow, scope]); EINVAL for short ones, EAFNOSUPPORT for another family."""
        family = abi.FAMILY.unpack_from(name)[0]
        if self.family == abi.AF_INET:
            if len(name) < SOCKADDR_IN.size:
                raise Errno(errno.EINVAL)
            if family != abi.AF_INET and not (family == abi.AF_UNSPEC and name[4:8] == b"\0\0\0\0"):
                raise Errno(errno.EAFNOSUPPORT)
            return socket.inet_ntop(socket.AF_INET, name[4:8]), name[2] << 8 | name[3]
        if family == abi.AF_INET6:
            if len(name) < SIN6_LEAST:
                raise Errno(errno.EINVAL)
            scope = int.from_bytes(name[24:28], "little") if len(name) >= SOCKADDR_IN6.size else 0
            flow = int.from_bytes(name[4:8], "big") & 0xFFFFF
            return socket.inet_ntop(socket.AF_INET6, name[8:24]), name[2] << 8 | name[3], flow, scope
        if family == abi.AF_INET and len(name) >= SOCKADDR_IN.size:  # a mapped address, as udpv6_sendmsg takes it
            return "::ffff:" + socket.inet_ntop(socket.AF_INET, name[4:8]), name[2] << 8 | name[3], 0, 0
        raise Errno(errno.EINVAL if len(name) < SIN6_LEAST else errno.EAFNOSUPPORT)

    def sockaddr(self, address: Any) -> bytes:
        """A sockaddr_in or sockaddr_in6."""
        if self.family == abi.AF_INET:
            return SOCKADDR_IN.pack(abi.AF_INET, address[1].to_bytes(2, "big"), socket.inet_aton(address[0]))
        host, port, flow, scope = address
        raw = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        return SOCKADDR_IN6.pack(abi.AF_INET6, port.to_bytes(2, "big"), flow.to_bytes(4, "big"), raw, scope)

    # -- connections -------------------------------------------------------------------------------------------------
    def listen(self, task: Task, backlog: int) -> None:
        """listen(2)."""
        try:
            self.host.listen(max(0, min(backlog & 0xFFFFFFFF, abi.SOMAXCONN)))
        except OSError as error:
            raise refused(error) from None

    def accept(self, task: Task, flags: int) -> InetSocket | int:
        """accept4(2)."""
        try:
            fd, peer = self.host._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            self.listen_to_host()
            return -errno.EAGAIN
        except OSError as error:
            raise refused(error) from None
        host = socket.socket(self.family, self.kind, self.protocol, fileno=fd)
        host.setblocking(False)
        child = type(self)(task, host, self.family, self.kind, self.protocol)
        child.accepted_from = peer
        return child

    def connect(self, task: Task, name: bytes, again: bool) -> int:
        """connect(2). Asked again, the host tells how the first attempt went."""
        # Straight to the host: it knows families and lengths best, and AF_UNSPEC has no form in Python.
        number = -hostcalls.call(hostcalls.SYS_CONNECT, self.host.fileno(), name, len(name))
        if not number:
            return 0
        if number == errno.EISCONN and again:
            return 0
        if number in (errno.EINPROGRESS, errno.EALREADY):
            self.listen_to_host()
        return -number

    # -- messages ----------------------------------------------------------------------------------------------------
    def send_flags(self, flags: int) -> int:
        """Those on the list."""
        return flags & options.SEND_FLAGS

    def recv_flags(self, flags: int) -> int:
        """Those on the list."""
        return flags & options.RECV_FLAGS

    def check_control(self, task: Task, control: Control) -> list[tuple[int, int, bytes]]:
        """Those on the list, with their sizes; EINVAL."""
        for level, kind, data in control.raw:
            most = options.SENT.get((level, kind))
            if most is None or len(data) > most:
                raise Errno(errno.EINVAL)
        return control.raw

    # -- options -----------------------------------------------------------------------------------------------------
    def setsockopt(self, task: Task, level: int, name: int, value: bytes) -> None:
        """Options on the list."""
        if level == abi.SOL_SOCKET:
            if name in (abi.SO_PASSCRED, abi.SO_PASSSEC):
                raise Errno(errno.EOPNOTSUPP)
            if name in (abi.SO_SNDBUFFORCE, abi.SO_RCVBUFFORCE, abi.SO_MARK) and not task.creds.capable(cap.NET_ADMIN):
                raise Errno(errno.EPERM)
            if name in (abi.SO_ATTACH_FILTER, 50):  # SO_ATTACH_BPF
                raise Errno(errno.EPERM)
            if name == 27:  # SO_DETACH_FILTER: there never is one
                raise Errno(errno.ENOENT)
        directions, most = options.OPTIONS.get((level, name), (0, 0))
        if not directions & options.SET:
            raise Errno(errno.ENOPROTOOPT)
        try:
            self.settings.setsockopt(level, name, value[:most])
        except OSError as error:
            raise refused(error) from None

    def getsockopt(self, task: Task, level: int, name: int, size: int) -> bytes:
        """Options on the list, and who is at the other end: nobody we know."""
        if level == abi.SOL_SOCKET:
            if name == abi.SO_PEERCRED:
                return abi.UCRED.pack(0, 0xFFFFFFFF, 0xFFFFFFFF)
            if name == abi.SO_PASSCRED:
                return abi.INT.pack(0)
            if name in (abi.SO_PEERGROUPS, abi.SO_PEERPIDFD):
                raise Errno(errno.ENODATA)
        directions, most = options.OPTIONS.get((level, name), (0, 0))
        if not directions & options.GET:
            foreign = self.family == abi.AF_INET and level not in (abi.SOL_SOCKET, abi.SOL_IP, _LEVELS.get(self.kind))
            raise Errno(errno.EOPNOTSUPP if foreign else errno.ENOPROTOOPT)  # do_ip_getsockopt
        if not size:
            return b""
        try:
            return self.settings.getsockopt(level, name, min(most, size))
        except OSError as error:
            raise refused(error) from None


def create(task: Task, family: int, kind: int, protocol: int, flags: int) -> InetSocket:
    """socket(AF_INET) and socket(AF_INET6): EAFNOSUPPORT where the sandbox has no namespace of its own to make them in,
    ESOCKTNOSUPPORT, EPROTONOSUPPORT, EPERM for raw sockets without CAP_NET_RAW."""
    net = task.ns.net
    lone = not isinstance(net, Simple)
    if task.kernel.__dict__.get("inet_refused") and not lone:
        raise Errno(errno.EAFNOSUPPORT)
    if kind == abi.SOCK_RAW:
        if not task.creds.capable(cap.NET_RAW) or lone:
            raise Errno(errno.EPERM)
        if not 0 < protocol <= 255:
            raise Errno(errno.EPROTONOSUPPORT)
    elif kind not in _PROTOCOLS:
        raise Errno(errno.ESOCKTNOSUPPORT)
    elif protocol not in _PROTOCOLS[kind] and (
        kind != abi.SOCK_DGRAM or protocol != (IPPROTO_ICMP if family == abi.AF_INET else IPPROTO_ICMPV6)
    ):
        raise Errno(errno.EPROTONOSUPPORT)
    if lone:
        from kvmsentry.net.lone import create as create_lone

        if protocol in (IPPROTO_ICMP, IPPROTO_ICMPV6):
            raise Errno(errno.EACCES)  # net.ipv4.ping_group_range of a new namespace is empty
        return create_lone(task, net, family, kind, protocol or _PROTOCOLS[kind][1], flags)
    try:
        host = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    except OSError as error:
        raise refused(error) from None
    host.setblocking(False)
    if not protocol:
        protocol = IPPROTO_TCP if kind == abi.SOCK_STREAM else IPPROTO_UDP
    if kind == abi.SOCK_STREAM:
        from kvmsentry.net.loopback import TcpSocket

        return TcpSocket(task, host, family, kind, protocol, flags)
    return InetSocket(task, host, family, kind, protocol, flags)
