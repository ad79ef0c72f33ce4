"""Network namespaces below the first one (network_namespaces(7)): a loopback device and nothing else.

    InetSocket's names, flags, options    <- LoneSocket ->    a Unix socket of the host, which moves the bytes
    127.0.0.1:80 in `NetNamespace.ports`  ->  its abstract name b"\\0kvmsentry-RANDOM/SERIAL/ADDRESS/PORT"

The Sentry may make no network namespace on the host once it is locked in. But what a lone loopback carries, Unix
sockets of the host carry just as well: streams that are listened to, connected and refused, and datagrams. They are
reached by the name alone, which only this module gives, so namespaces cannot see each other.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.sysctl import NETWORK, Sysctls
from kvmsentry.kernel import cap, userns
from kvmsentry.net.hostsock import HostSocket, refused
from kvmsentry.net.inet import FIRST_PORT, InetSocket, may_bind
from kvmsentry.net.netlink import NLM_F_ACK, NLM_F_REQUEST, NLMSGHDR, NetlinkSocket
from kvmsentry.net.socket import Control, Received
from kvmsentry.net.tables import stack_of
from kvmsentry.net.unix import Names, names_of
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

PREFIX = b"\0kvmsentry-%s/" % os.urandom(8).hex().encode()  # no other sandbox finds them
EPHEMERAL = range(32768, 61000)  # net.ipv4.ip_local_port_range
UDP_MOST = 65507
OUT_OF_SIGHT = abi.MSG_DONTWAIT | abi.MSG_NOSIGNAL | abi.MSG_CMSG_CLOEXEC  # of msg_flags: ours, not the sender's
LOCAL4, LOCAL6 = b"\x7f\0\0\1", bytes(15) + b"\1"
MAPPED = bytes(10) + b"\xff\xff"
_serial = itertools.count(1)

# uapi/linux/rtnetlink.h, if_link.h, if_addr.h, if.h
RTM_NEWLINK, RTM_GETLINK, RTM_SETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 18, 19, 20, 22
NLM_F_MULTI, NLM_F_DUMP, NLM_F_EXCL, NLMSG_DONE = 2, 0x300, 0x200, 3
IFF_UP, IFF_LOOPBACK, IFF_RUNNING, IFF_LOWER_UP = 1, 8, 0x40, 0x10000
IFLA_ADDRESS, IFLA_BROADCAST, IFLA_IFNAME, IFLA_MTU, IFLA_TXQLEN, IFLA_OPERSTATE = 1, 2, 3, 4, 13, 16
IFA_ADDRESS, IFA_LOCAL, IFA_LABEL = 1, 2, 3
ARPHRD_LOOPBACK, LO_INDEX, LO_MTU = 772, 1, 65536
IFINFOMSG = struct.Struct("<BxHiII")
IFADDRMSG = struct.Struct("<BBBBI")
# uapi/linux/sockios.h
SIOCGIFNAME, SIOCGIFCONF, SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFADDR = 0x8910, 0x8912, 0x8913, 0x8914, 0x8915
SIOCGIFNETMASK, SIOCGIFMTU, SIOCGIFHWADDR, SIOCGIFINDEX = 0x891B, 0x8921, 0x8927, 0x8933
IFREQ_SIZE = 40


class NetNamespace:
    """One namespace. `up`: its loopback device is; then it has 127.0.0.1 and ::1."""

    kind = b"net"

    def __init__(self, kernel: Any, user_ns: userns.UserNamespace) -> None:
        self.sysctls = Sysctls(NETWORK)
        self.sysctls.values[FIRST_PORT] = "1024"  # PROT_SOCK: unlike the sandbox's own, which everybody may use all of
        self.user_ns, self.ns_ino, self.up = user_ns, 0, False
        self.ever_up = False
        self.ports: dict[tuple[int, int, int], LoneSocket] = {}  # by (type, family, port)
        self.names = Names()  # abstract names of Unix sockets; those with paths are the file system's
        self.names.paths = names_of(kernel).paths

    def flags(self) -> int:
        """Of the loopback device."""
        return IFF_LOOPBACK | (IFF_UP | IFF_RUNNING | IFF_LOWER_UP if self.up else 0)

    def set_up(self, up: bool) -> None:
        """Set the loopback device up or down."""
        self.up = up
        self.ever_up = self.ever_up or up

    def may_change(self, task: Task) -> None:
        """EPERM without CAP_NET_ADMIN here."""
        if not userns.capable(task.creds, self.user_ns, cap.NET_ADMIN):
            raise Errno(errno.EPERM)


def of_task(task: Task) -> NetNamespace | None:
    """The task's namespace if it is not the first."""
    net = task.ns.net
    return net if isinstance(net, NetNamespace) else None


class LoneSocket(InetSocket):
    """TCP and UDP over the loopback device of `net`. Addresses are 4 or 16 bytes; `local` and `remote` are (address,
    port) or None."""

    def __init__(self, task: Task, net: NetNamespace, host: socket.socket, settings: socket.socket, family: int,
                 kind: int, protocol: int, flags: int = 0) -> None:  # fmt: skip
        HostSocket.__init__(self, task, host, kind, protocol, flags)
        self.family, self.net, self.settings = family, net, settings
        self.stack = stack_of(task.kernel)
        self.local: tuple[bytes, int] | None = None
        self.remote: tuple[bytes, int] | None = None
        self.keys: list[tuple[int, int, int]] = []  # its places in net.ports
        self.place_name = b""
        self.listening = self.connected = False
        self.pending = 0  # the error that the next call gets: nobody had the port

    def release(self) -> None:
        """The port is free again."""
        for key in self.keys:
            if self.net.ports.get(key) is self:
                del self.net.ports[key]
        self.settings.close()
        super().release()

    # -- names -------------------------------------------------------------------------------------------------------
    def _parsed(self, name: bytes) -> tuple[bytes, int]:
        host, port, *_ = self.address(name)
        return socket.inet_pton(self.family if ":" in host else abi.AF_INET, host), port

    def _named(self, place: tuple[bytes, int] | None) -> bytes:
        any_address = bytes(4 if self.family == abi.AF_INET else 16)
        raw, port = place if place is not None else (any_address, 0)
        if self.family == abi.AF_INET:
            return self.sockaddr((socket.inet_ntop(socket.AF_INET, raw[-4:]), port))
        if len(raw) == 4:
            raw = MAPPED + raw
        return self.sockaddr((socket.inet_ntop(socket.AF_INET6, raw), port, 0, 0))

    def _is_local(self, raw: bytes) -> bool:
        if len(raw) == 16 and raw[:12] != MAPPED:
            return raw in (LOCAL6, bytes(16))
        return raw[-4] == 127 or raw[-4:] == bytes(4)

    def getsockname(self) -> bytes:
        """getsockname(2)."""
        return self._named(self.local)

    def getpeername(self) -> bytes:
        """getpeername(2)."""
        if self.remote is None:
            raise Errno(errno.ENOTCONN)
        return self._named(self.remote)

    def bind(self, task: Task, name: bytes) -> None:
        """bind(2): EADDRNOTAVAIL for addresses that nothing here has."""
        raw, port = self._parsed(name)
        # Linux lets IPv4 sockets bind to anything as long as there has never been a route (inet_addr_type).
        here = self.net.up and self._is_local(raw) or (len(raw) == 4 and not self.net.ever_up)
        if any(raw) and not here:
            raise Errno(errno.EADDRNOTAVAIL)
        may_bind(task, port, self.net.sysctls, self.net.user_ns)
        if self.local is not None:
            raise Errno(errno.EINVAL)
        self._take(raw, port)

    def _reuses(self) -> bool:
        return bool(self.settings.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR))

    def _families(self, raw: bytes) -> list[int]:
        """Whose ports a bind takes: :: takes IPv4's too unless IPV6_V6ONLY."""
        if self.family == abi.AF_INET or raw[:12] == MAPPED:
            return [abi.AF_INET]
        both = not any(raw) and not self.settings.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        return [abi.AF_INET6, abi.AF_INET] if both else [abi.AF_INET6]

    def _take(self, raw: bytes, port: int) -> None:
        ports, families = self.net.ports, self._families(raw)

        def keys(number: int) -> list[tuple[int, int, int]]:
            return [(self.kind, family, number) for family in families]

        if port:
            for key in keys(port):
                holder = ports.get(key)
                if holder is not None and (holder.listening or not (self._reuses() and holder._reuses())):
                    raise Errno(errno.EADDRINUSE)
        else:
            port = next((n for n in EPHEMERAL if not any(key in ports for key in keys(n))), 0)
            if not port:
                raise Errno(errno.EADDRINUSE)
        self.place_name = b"%s%d/%s/%d" % (PREFIX, next(_serial), raw.hex().encode(), port)
        try:
            self.host.bind(self.place_name)
        except OSError as error:
            raise refused(error) from None
        self.keys = keys(port)
        for key in self.keys:
            ports[key] = self
        self.local = raw, port

    def _autobind(self, towards: bytes) -> None:
        if self.local is not None:
            return
        if self.kind != abi.SOCK_STREAM:
            raw = bytes(4 if self.family == abi.AF_INET else 16)
        elif len(towards) == 4:
            raw = LOCAL4
        else:
            raw = MAPPED + LOCAL4 if towards[:12] == MAPPED else LOCAL6
        self._take(raw, 0)

    def _place(self, label: bytes | str | None) -> tuple[bytes, int]:
        """(address, port) of the socket with that name; a wildcard's is the loopback address."""
        text = label if isinstance(label, bytes) else (label or "").encode()
        parts = text.split(b"/")
        if len(parts) != 4:
            return LOCAL4, 0
        raw = bytes.fromhex(parts[2].decode())
        if not any(raw):
            raw = LOCAL4 if self.family == abi.AF_INET else LOCAL6
        return raw, int(parts[3])

    def _target(self, raw: bytes, port: int) -> LoneSocket | None:
        """Who has the port; ENETUNREACH for what is not on the loopback device."""
        if not self.net.up or not self._is_local(raw):
            raise Errno(errno.ENETUNREACH)
        four = len(raw) == 4 or raw[:12] == MAPPED
        return self.net.ports.get((self.kind, abi.AF_INET if four else abi.AF_INET6, port))

    # -- connections -------------------------------------------------------------------------------------------------
    def listen(self, task: Task, backlog: int) -> None:
        """listen(2)."""
        if self.kind != abi.SOCK_STREAM:
            raise Errno(errno.EOPNOTSUPP)
        if self.connected:
            raise Errno(errno.EINVAL)
        if self.local is None:
            self._take(bytes(4 if self.family == abi.AF_INET else 16), 0)
        try:
            self.host.listen(abi.SOMAXCONN)  # a Unix socket would have clients wait where TCP lets them retry
        except OSError as error:
            raise refused(error) from None
        self.listening = True
        for key in self.keys:
            self.net.ports[key] = self

    def accept(self, task: Task, flags: int) -> InetSocket | int:
        """accept4(2)."""
        if not self.listening:
            return -errno.EINVAL if self.kind == abi.SOCK_STREAM else -errno.EOPNOTSUPP
        try:
            fd, peer = self.host._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            self.listen_to_host()
            return -errno.EAGAIN
        except OSError as error:
            raise refused(error) from None
        host = socket.socket(socket.AF_UNIX, self.kind, 0, fileno=fd)
        host.setblocking(False)
        child = LoneSocket(task, self.net, host, _settings(self.family, self.kind), self.family, self.kind,
                           self.protocol)  # fmt: skip
        child.remote = self._place(peer)
        assert self.local is not None
        raw = self.local[0]
        child.local = raw if any(raw) else child.remote[0], self.local[1]
        child.connected = True
        return child

    def connect(self, task: Task, name: bytes, again: bool) -> int:
        """connect(2). Nothing here takes time."""
        if again and self.connected:
            return 0
        if abi.FAMILY.unpack_from(name)[0] == abi.AF_UNSPEC:
            if self.kind == abi.SOCK_STREAM:
                return -errno.EOPNOTSUPP
            self.remote, self.connected = None, False
            return 0
        raw, port = self._parsed(name)
        if not any(raw):
            raw = LOCAL4 if len(raw) == 4 else LOCAL6
        if self.kind == abi.SOCK_STREAM:
            if self.connected:
                return -errno.EISCONN
            if self.listening:
                return -errno.EISCONN
        if self.kind != abi.SOCK_STREAM:
            self._autobind(raw)  # inet_dgram_connect: whatever becomes of it
        target = self._target(raw, port)
        self._autobind(raw)
        if self.kind == abi.SOCK_STREAM:
            if target is None or not target.listening:
                return -errno.ECONNREFUSED
            try:
                self.host.connect(target.place_name)
            except BlockingIOError:
                return -errno.ETIMEDOUT  # its queue of connections is full
            except OSError as error:
                return -(error.errno or errno.ECONNREFUSED)
        self.remote, self.connected = (raw, port), True
        self.queue.wake()
        return 0

    # -- data --------------------------------------------------------------------------------------------------------
    def _take_pending(self) -> None:
        if self.pending:
            number, self.pending = self.pending, 0
            raise Errno(number)

    def read(self, views: list[memoryview]) -> int:
        """read(2)."""
        if self.kind == abi.SOCK_STREAM:
            if not self.connected:
                raise Errno(errno.ENOTCONN)
            return super().read(views)
        received = self._datagram(views, 0)
        return received if isinstance(received, int) else received.n

    def write(self, views: list[memoryview]) -> int:
        """write(2)."""
        if self.kind == abi.SOCK_STREAM:
            if not self.connected:
                raise Errno(errno.EPIPE)
            return super().write(views)
        return self._send_datagram(views, None)

    def check_control(self, task: Task, control: Control) -> list[tuple[int, int, bytes]]:
        """Checked, and of no effect on a loopback device."""
        super().check_control(task, control)
        return []

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """sendmsg(2)."""
        if flags & abi.MSG_OOB:
            return -errno.EOPNOTSUPP
        if self.kind == abi.SOCK_STREAM:
            if not self.connected:
                return -errno.EPIPE
            return super().send(task, views, None, control, flags)
        if control is not None and control.raw:
            self.check_control(task, control)
        return self._send_datagram(views, name)

    def _send_datagram(self, views: list[memoryview], name: bytes | None) -> int:
        self._take_pending()
        place = self._parsed(name) if name else self.remote
        if place is None:
            return -errno.EDESTADDRREQ
        total = sum(map(len, views))
        if total > UDP_MOST:
            return -errno.EMSGSIZE
        self._autobind(place[0])
        target = self._target(*place)
        if target is None:
            if self.remote is not None:
                self.pending = errno.ECONNREFUSED  # the ICMP message comes with the next call
            return total
        try:
            self.host.sendmsg(views, (), abi.MSG_DONTWAIT, target.place_name)
        except BlockingIOError:
            return total  # no room there: UDP drops it
        except OSError as error:
            raise refused(error) from None
        return total

    def recv(self, task: Task, views: list[memoryview], flags: int) -> Received | int:
        """recvmsg(2)."""
        if flags & abi.MSG_OOB:
            return -errno.EINVAL
        if self.kind == abi.SOCK_STREAM:
            if not self.connected:
                return -errno.ENOTCONN
            try:
                n, _, out, _ = self.host.recvmsg_into(views, 0, self.recv_flags(flags) | abi.MSG_DONTWAIT)
            except BlockingIOError:
                self.listen_to_host()
                return -errno.EAGAIN
            except OSError as error:
                raise refused(error) from None
            return Received(n, b"", out & ~OUT_OF_SIGHT)
        return self._datagram(views, flags)

    def _datagram(self, views: list[memoryview], flags: int) -> Received | int:
        self._take_pending()
        while True:
            host_flags = self.recv_flags(flags) | abi.MSG_DONTWAIT
            try:
                if self.remote is not None:  # a connected socket hears its peer only
                    _, _, _, sender = self.host.recvmsg_into([bytearray(1)], 0, abi.MSG_DONTWAIT | abi.MSG_PEEK)
                    if self._place(sender)[1] != self.remote[1]:
                        self.host.recvmsg_into([bytearray(1)], 0, abi.MSG_DONTWAIT)
                        continue
                n, _, out, sender = self.host.recvmsg_into(views, 0, host_flags)
            except BlockingIOError:
                self.listen_to_host()
                return -errno.EAGAIN if self.waits(flags) else Received(0)
            except OSError as error:
                raise refused(error) from None
            return Received(n, self._named(self._place(sender)), out & ~OUT_OF_SIGHT)

    def getsockopt(self, task: Task, level: int, name: int, size: int) -> bytes:
        """As an internet socket's; errors and states are our own."""
        if level == abi.SOL_SOCKET and name == abi.SO_ERROR:
            number, self.pending = self.pending, 0
            return abi.INT.pack(number or self.host.getsockopt(level, name))
        if level == abi.SOL_SOCKET and name == abi.SO_ACCEPTCONN:
            return abi.INT.pack(self.listening)
        return super().getsockopt(task, level, name, size)


def _settings(family: int, kind: int) -> socket.socket:
    """A socket of the host that goes nowhere: it knows and keeps the options."""
    try:
        return socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise refused(error) from None


def create(task: Task, net: NetNamespace, family: int, kind: int, protocol: int, flags: int) -> LoneSocket:
    """socket(AF_INET) and socket(AF_INET6) in `net`; the caller has checked type and protocol. EPERM for raw and ping
    sockets: nothing here answers them."""
    settings = _settings(family, kind)
    try:
        host = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        settings.close()
        raise refused(error) from None
    host.setblocking(False)
    return LoneSocket(task, net, host, settings, family, kind, protocol, flags)


# -- what tells of interfaces ------------------------------------------------------------------------------------------
def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(value), kind) + value + bytes(-len(value) & 3)


class LoneNetlink(NetlinkSocket):
    """A route socket of a namespace that has the loopback device alone: it answers itself."""

    net: NetNamespace
    task: Task  # who asks

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """sendmsg(2), to the kernel only."""
        self.task = task
        return super().send(task, views, name, control, flags)

    def _request(self, data: bytes) -> int:
        position = 0
        while len(data) - position >= NLMSGHDR.size:
            size, kind, flags, _, _ = NLMSGHDR.unpack_from(data, position)
            if not NLMSGHDR.size <= size <= len(data) - position:
                break
            message = data[position : position + size]
            position += size + 3 & ~3
            number = 0
            if flags & NLM_F_REQUEST and kind >= 16:
                try:
                    if self._serve(kind, flags, message):
                        continue
                except Errno as error:
                    number = error.errno
            if number or flags & NLM_F_ACK:
                self._answer(-number, message)
        return len(data)

    def _serve(self, kind: int, flags: int, message: bytes) -> bool:
        """Do one of them; True when it has its answer already."""
        body = message[NLMSGHDR.size :]
        if kind in (RTM_NEWLINK, RTM_SETLINK):
            self.net.may_change(self.task)
            self._set_link(body)
            return False
        if kind == RTM_NEWADDR:
            self.net.may_change(self.task)
            self._new_address(body, flags)
            return False
        dump = flags & NLM_F_DUMP
        if kind == RTM_GETLINK:
            self._tell(message, [(RTM_NEWLINK, self._link())], dump)
        elif kind == RTM_GETADDR and dump:
            self._tell(message, [(RTM_NEWADDR, row) for row in self._addresses()], dump)
        elif (kind - 16) & 3 == 2 and dump:
            self._tell(message, [], dump)
        elif (kind - 16) & 3 == 2:
            raise Errno(errno.ENETUNREACH)
        else:
            self.net.may_change(self.task)
            raise Errno(errno.EOPNOTSUPP)
        return True

    def _tell(self, message: bytes, rows: list[tuple[int, bytes]], dump: int) -> None:
        pid = self.host.getsockname()[0]
        _, _, _, sequence, _ = NLMSGHDR.unpack_from(message)
        if dump:
            rows = [*rows, (NLMSG_DONE, bytes(4))]
        data = b""
        for kind, row in rows:
            data += NLMSGHDR.pack(NLMSGHDR.size + len(row), kind, NLM_F_MULTI if dump else 0, sequence, pid) + row
            data += bytes(-len(data) & 3)
        self.refusals.append(data)
        self.queue.wake()

    def _link(self) -> bytes:
        return IFINFOMSG.pack(0, ARPHRD_LOOPBACK, LO_INDEX, self.net.flags(), 0) + b"".join((
            _attribute(IFLA_IFNAME, b"lo\0"), _attribute(IFLA_TXQLEN, struct.pack("<I", 1000)),
            _attribute(IFLA_OPERSTATE, b"\0" if self.net.up else b"\2"),
            _attribute(IFLA_MTU, struct.pack("<I", LO_MTU)), _attribute(IFLA_ADDRESS, bytes(6)),
            _attribute(IFLA_BROADCAST, bytes(6)),
        ))  # fmt: skip

    def _addresses(self) -> list[bytes]:
        if not self.net.up:
            return []
        return [
            IFADDRMSG.pack(abi.AF_INET, 8, 0x80, 254, LO_INDEX) + _attribute(IFA_ADDRESS, LOCAL4)
            + _attribute(IFA_LOCAL, LOCAL4) + _attribute(IFA_LABEL, b"lo\0"),
            IFADDRMSG.pack(abi.AF_INET6, 128, 0x80, 254, LO_INDEX) + _attribute(IFA_ADDRESS, LOCAL6),
        ]  # fmt: skip

    def _set_link(self, body: bytes) -> None:
        if len(body) < IFINFOMSG.size:
            raise Errno(errno.EINVAL)
        _, _, index, flags, change = IFINFOMSG.unpack_from(body)
        named = _attribute(IFLA_IFNAME, b"lo\0") in body[IFINFOMSG.size :]
        if index != LO_INDEX and not (index == 0 and named):
            raise Errno(errno.ENODEV if index else errno.EOPNOTSUPP)
        if change & IFF_UP or (not change and flags & IFF_UP):
            self.net.set_up(bool(flags & IFF_UP))

    def _new_address(self, body: bytes, flags: int) -> None:
        if len(body) < IFADDRMSG.size:
            raise Errno(errno.EINVAL)
        family, _, _, _, index = IFADDRMSG.unpack_from(body)
        own = LOCAL4 if family == abi.AF_INET else LOCAL6
        if index != LO_INDEX:
            raise Errno(errno.ENODEV)
        if own not in body[IFADDRMSG.size :]:
            raise Errno(errno.EOPNOTSUPP)
        if self.net.up and flags & NLM_F_EXCL:
            raise Errno(errno.EEXIST)


def ioctl(task: Task, net: NetNamespace, request: int, argument: int) -> int:
    """netdevice(7) for the loopback device: ENODEV for others, EADDRNOTAVAIL while it is down, ENOTTY."""
    mm = task.mm
    if request == SIOCGIFCONF:
        size, buffer = struct.unpack("<i4xQ", mm.read(argument, 16))
        row = b"lo".ljust(16, b"\0") + struct.pack("<H2x4s", abi.AF_INET, LOCAL4).ljust(24, b"\0")
        data = row if net.up and (not buffer or size >= IFREQ_SIZE) else b""
        if buffer and data:
            mm.write(buffer, data)
        mm.write(argument, struct.pack("<i4xQ", len(data), buffer))
        return 0
    if request not in (SIOCGIFNAME, SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFADDR, SIOCGIFNETMASK, SIOCGIFMTU, SIOCGIFHWADDR,
                       SIOCGIFINDEX):  # fmt: skip
        raise Errno(errno.ENOTTY if not 0x8900 <= request <= 0x89FF else errno.EOPNOTSUPP)
    wanted = mm.read(argument, IFREQ_SIZE)
    if request == SIOCGIFNAME:
        if int.from_bytes(wanted[16:20], "little") != LO_INDEX:
            raise Errno(errno.ENODEV)
        mm.write(argument, b"lo".ljust(16, b"\0"))
        return 0
    if wanted[:16].split(b"\0")[0] != b"lo":
        raise Errno(errno.ENODEV)
    if request == SIOCSIFFLAGS:
        net.may_change(task)
        net.set_up(bool(wanted[16] & IFF_UP))
        return 0
    if request in (SIOCGIFADDR, SIOCGIFNETMASK):
        if not net.up:
            raise Errno(errno.EADDRNOTAVAIL)
        value = struct.pack("<H2x4s", abi.AF_INET, LOCAL4 if request == SIOCGIFADDR else b"\xff\0\0\0")
    elif request == SIOCGIFFLAGS:
        value = struct.pack("<H", net.flags() & 0xFFFF)
    elif request == SIOCGIFHWADDR:
        value = struct.pack("<H", ARPHRD_LOOPBACK)
    else:
        value = struct.pack("<i", LO_MTU if request == SIOCGIFMTU else LO_INDEX)
    mm.write(argument + 16, value)
    return 0
