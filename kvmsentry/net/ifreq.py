"""The ioctls about interfaces, asked of any socket (netdevice(7)): the host's answers from the sandbox's own namespace.
Only what reads is there; changing anything is EPERM, as without CAP_NET_ADMIN."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.kernel.namespaces import Simple

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

# uapi/linux/sockios.h
SIOCGIFNAME, SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFDSTADDR = 0x8910, 0x8912, 0x8913, 0x8915, 0x8917
SIOCGIFBRDADDR, SIOCGIFNETMASK, SIOCGIFMETRIC, SIOCGIFMTU, SIOCGIFHWADDR, SIOCGIFINDEX = (
    0x8919, 0x891B, 0x891D, 0x8921, 0x8927, 0x8933)  # fmt: skip
SIOCGIFTXQLEN, SIOCGIFMAP, SIOCADDRT, SIOCDELRT = 0x8942, 0x8970, 0x890B, 0x890C
SIOCSET = (0x8914, 0x8916, 0x8918, 0x891A, 0x891C, 0x891E, 0x8922, 0x8923, 0x8924, 0x8943, SIOCADDRT, SIOCDELRT)
SIOCETHTOOL, SIOCGMIIPHY = 0x8946, 0x8947
READING = (SIOCGIFNAME, SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFDSTADDR, SIOCGIFBRDADDR, SIOCGIFNETMASK, SIOCGIFMETRIC,
           SIOCGIFMTU, SIOCGIFHWADDR, SIOCGIFINDEX, SIOCGIFTXQLEN, SIOCGIFMAP)  # fmt: skip
IFREQ_SIZE = 40  # struct ifreq
CONF_MOST = 256  # interfaces that SIOCGIFCONF tells of

_ifconf = struct.Struct("<i4xQ")


def ioctl(task: Task, request: int, argument: int) -> int:
    """Answer one of them; ENOTTY for what is none, ENODEV and EADDRNOTAVAIL as the host says."""
    if not isinstance(task.ns.net, Simple):
        from kvmsentry.net import lone

        return lone.ioctl(task, task.ns.net, request, argument)
    if request == SIOCGIFCONF:
        return _conf(task, argument)
    if request in SIOCSET:
        raise Errno(errno.EPERM)
    if request in (SIOCETHTOOL, SIOCGMIIPHY):
        raise Errno(errno.EOPNOTSUPP)
    if request not in READING:
        raise Errno(errno.ENOTTY)
    wanted = task.mm.read(argument, IFREQ_SIZE)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
            answer = fcntl.ioctl(host.fileno(), request, wanted)
    except OSError as error:
        raise Errno(error.errno or errno.EINVAL) from None
    task.mm.write(argument, answer)
    return 0


def _conf(task: Task, argument: int) -> int:
    """SIOCGIFCONF: the interfaces that have an IPv4 address; with no buffer, how much room they need."""
    size, buffer = _ifconf.unpack(task.mm.read(argument, _ifconf.size))
    rows = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        for _, name in socket.if_nameindex()[:CONF_MOST]:
            row = name.encode()[:15].ljust(16, b"\0")
            try:
                rows.append(row + fcntl.ioctl(host.fileno(), SIOCGIFADDR, row + bytes(24))[16:IFREQ_SIZE])
            except OSError:
                continue  # without an address: not told of
    if not buffer:
        used = len(rows) * IFREQ_SIZE
    else:
        if size < 0:
            raise Errno(errno.EINVAL)
        data = b"".join(rows[: size // IFREQ_SIZE])
        used = len(data)
        if data:
            task.mm.write(buffer, data)
    task.mm.write(argument, _ifconf.pack(used, buffer))
    return 0
