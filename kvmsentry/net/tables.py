"""/proc/net as the sandbox's sockets make it: rows of tcp, udp, raw and unix are the sockets that this kernel has open,
with what the host says of their addresses and states; dev names the namespace's interfaces."""

from __future__ import annotations

import socket
import struct
from typing import Any

from kvmsentry.net.unix import names_of, proc_unix
from kvmsentry.syscall import abi_net as abi

SOL_TCP, TCP_INFO = 6, 11
TCP_ESTABLISHED, TCP_CLOSE = 1, 7
_KINDS = {
    "tcp": (abi.AF_INET, abi.SOCK_STREAM), "tcp6": (abi.AF_INET6, abi.SOCK_STREAM),
    "udp": (abi.AF_INET, abi.SOCK_DGRAM), "udp6": (abi.AF_INET6, abi.SOCK_DGRAM),
    "raw": (abi.AF_INET, abi.SOCK_RAW), "raw6": (abi.AF_INET6, abi.SOCK_RAW),
}  # fmt: skip


class Stack:
    """What `kernel.net` is: fs/proc/net.py asks it for tables."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.sockets: dict[Any, None] = {}  # internet sockets that are open
        self.connecting: dict[Any, Any] = {}  # clients of this sandbox's own servers, until accept: see loopback.py

    def proc(self, name: str) -> str | None:
        """The text of /proc/net/`name`; None leaves it to the default."""
        if name == "unix":
            return proc_unix(names_of(self.kernel))
        if name in _KINDS:
            from kvmsentry.fs.proc.net import DEFAULTS

            return DEFAULTS[name] + "".join(
                _row(index, sock) for index, sock in enumerate(self._of(*_KINDS[name])) if _shown(sock)
            )
        if name == "dev":
            return _dev()
        if name in ("sockstat", "sockstat6"):
            return self._sockstat(name == "sockstat6")
        return None

    def _of(self, family: int, kind: int) -> list[Any]:
        return [sock for sock in self.sockets if sock.family == family and sock.kind == kind]

    def _sockstat(self, six: bool) -> str:
        family = abi.AF_INET6 if six else abi.AF_INET
        tcp, udp, raw = (len(self._of(family, kind)) for kind in (abi.SOCK_STREAM, abi.SOCK_DGRAM, abi.SOCK_RAW))
        if six:
            return (
                f"TCP6: inuse {tcp}\nUDP6: inuse {udp}\nUDPLITE6: inuse 0\nRAW6: inuse {raw}\n"
                "FRAG6: inuse 0 memory 0\n"
            )
        used = len(self.sockets) + len(names_of(self.kernel).sockets)
        return (
            f"sockets: used {used}\nTCP: inuse {tcp} orphan 0 tw 0 alloc {tcp} mem 0\nUDP: inuse {udp} mem 0\n"
            f"UDPLITE: inuse 0\nRAW: inuse {raw}\nFRAG: inuse 0 memory 0\n"
        )


def stack_of(kernel: Any) -> Stack:
    """The network of `kernel`, made when first asked for."""
    stack: Stack | None = kernel.__dict__.get("net")
    if stack is None:
        stack = kernel.__dict__["net"] = Stack(kernel)
    return stack


def _shown(sock: Any) -> bool:
    """Sockets that are neither bound nor connected are in no table."""
    try:
        return bool(sock.host.getsockname()[1])
    except OSError:
        return False


def _hex(family: int, address: Any) -> str:
    raw = socket.inet_pton(family, address[0].partition("%")[0])
    words = struct.unpack(f"<{len(raw) // 4}I", raw)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


def _row(index: int, sock: Any) -> str:
    family = sock.family
    local = sock.host.getsockname()
    try:
        remote = sock.host.getpeername()
    except OSError:
        remote = ("::" if family == abi.AF_INET6 else "0.0.0.0", 0)
    if sock.kind == abi.SOCK_STREAM:
        state = sock.host.getsockopt(SOL_TCP, TCP_INFO, 1)[0]
    else:
        state = TCP_ESTABLISHED if remote[1] else TCP_CLOSE
    width = "%4d" if sock.kind == abi.SOCK_STREAM else "%5d"
    tail = " 1 0000000000000000 100 0 0 10 0" if sock.kind == abi.SOCK_STREAM else " 2 0000000000000000 0"
    text = (
        f"{width % index}: {_hex(family, local)} {_hex(family, remote)} {state:02X} 00000000:00000000 "
        f"00:00000000 00000000 {sock.inode.uid:5d}        0 {sock.inode.ino}{tail}"
    )
    return text.ljust(149 if family == abi.AF_INET else 0) + "\n"


def _dev() -> str:
    """The interfaces of the namespace; what they have carried is not known to the Sentry."""
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|"
        "bytes    packets errs drop fifo colls carrier compressed\n"
    )
    zeros = "       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0"
    zeros += "          0"
    return text + "".join(f"{name:>6}:{zeros}\n" for _, name in socket.if_nameindex()[:64])
