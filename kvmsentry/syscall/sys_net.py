"""Sockets: making them, naming them, connecting them, asking them (net/socket.c). Messages are in sys_message.py."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import O_NONBLOCK, POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, POLLRDNORM, POLLWRNORM
from kvmsentry.kernel.task import RLIMIT_NOFILE
from kvmsentry.kernel.traps import ERESTARTSYS, WaitQueue, park
from kvmsentry.net import ifreq, inet, lone, netlink, unix, unix_packet, unix_stream  # noqa: F401 - no imports once locked in
from kvmsentry.net.socket import Socket
from kvmsentry.syscall import abi_net as abi
from kvmsentry.syscall.sys_io import install
from kvmsentry.syscall.table import Fd, Int, UserPtr, syscall

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

IN = POLLIN | POLLRDNORM | POLLHUP | POLLRDHUP | POLLERR
OUT = POLLOUT | POLLWRNORM | POLLHUP | POLLERR
OPTION_MOST = 65536  # bytes of an option's value that are ever looked at

_two_ints = abi.LINGER


# -- helpers that the messages use too -------------------------------------------------------------------------------
def socket_of(task: Task, fd: int) -> Socket:
    """The socket behind `fd`; EBADF, ENOTSOCK."""
    file = task.files.get_io(fd)
    if not isinstance(file, Socket):
        raise Errno(errno.ENOTSOCK)
    return file


def addressed_socket(task: Task, fd: int, addr: int, length: int) -> tuple[Socket, bytes]:
    """The socket behind `fd` and the sockaddr for it: EBADF, then what is wrong with the address, then ENOTSOCK
    (__sys_connect)."""
    file = task.files.get_io(fd)
    name = fetch_name(task, addr, length)
    if not isinstance(file, Socket):
        raise Errno(errno.ENOTSOCK)
    return file, name


def fetch_name(task: Task, addr: int, length: int) -> bytes:
    """A sockaddr (move_addr_to_kernel): EINVAL for impossible lengths, EFAULT."""
    if not 0 <= length <= abi.SOCKADDR_MAX:
        raise Errno(errno.EINVAL)
    return task.mm.read(addr, length) if length else b""


def store_name(task: Task, name: bytes, addr: int, length_at: int) -> None:
    """A sockaddr into the application's buffer, and its true length (move_addr_to_user)."""
    room = abi.INT.unpack(task.mm.read(length_at, 4))[0]
    if room < 0:
        raise Errno(errno.EINVAL)
    if room and name:
        task.mm.write(addr, name[:room])
    task.mm.write(length_at, abi.INT.pack(len(name)))


async def wait_for(task: Task, reason: str, queue: WaitQueue, mask: int, deadline: int | None) -> bool:
    """Sleep until `queue` is woken; False when the time (SO_RCVTIMEO, SO_SNDTIMEO) is over. A signal restarts the call
    unless there is a deadline (sock_intr_errno)."""
    restart = ERESTARTSYS if deadline is None else errno.EINTR
    return bool(await park(task, reason, queue, mask=mask, deadline=deadline, restart=restart))


def deadline_of(task: Task, timeout: int) -> int | None:
    """When a sleep with SO_RCVTIMEO or SO_SNDTIMEO `timeout` (ns, 0 = none) ends."""
    return task.kernel.now() + timeout if timeout else None


def _kind_and_flags(kind: int) -> tuple[int, int, bool]:
    """(type, O_NONBLOCK or 0, close on exec) of the type argument; EINVAL."""
    flags = kind & ~abi.SOCK_TYPE_MASK
    if flags & ~(abi.SOCK_NONBLOCK | abi.SOCK_CLOEXEC):
        raise Errno(errno.EINVAL)
    kind &= abi.SOCK_TYPE_MASK
    if kind > 10:
        raise Errno(errno.EINVAL)
    return kind, flags & O_NONBLOCK, bool(flags & abi.SOCK_CLOEXEC)


# -- making ----------------------------------------------------------------------------------------------------------
def _make(task: Task, family: int, kind: int, protocol: int, flags: int) -> Socket:
    """An unnamed socket; EAFNOSUPPORT, EPROTONOSUPPORT, ESOCKTNOSUPPORT, EPERM."""
    if not 0 <= family < abi.AF_MAX:
        raise Errno(errno.EAFNOSUPPORT)
    if family == abi.AF_UNIX:
        if protocol not in (0, abi.AF_UNIX):
            raise Errno(errno.EPROTONOSUPPORT)
        return unix.create(task, kind, flags)
    if family in (abi.AF_INET, abi.AF_INET6):
        return inet.create(task, family, kind, protocol, flags)
    if family == abi.AF_NETLINK:
        return netlink.create(task, kind, protocol, flags)
    raise Errno(errno.EAFNOSUPPORT)


@syscall(41, note="families: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK")
def socket(task: Task, family: Int, type: Int, protocol: Int) -> int:
    """socket(2)."""
    kind, flags, cloexec = _kind_and_flags(type)
    sock = _make(task, family, kind, protocol, flags)
    return install(task, sock, 0, cloexec)


@syscall(53)
def socketpair(task: Task, family: Int, type: Int, protocol: Int, fds: UserPtr) -> int:
    """socketpair(2)."""
    kind, flags, cloexec = _kind_and_flags(type)
    task.mm.write(fds, task.mm.read(fds, _two_ints.size))  # can they be stored? That comes first
    if family != abi.AF_UNIX:
        _make(task, family, kind, protocol, flags).put()  # what is wrong with it comes first
        raise Errno(errno.EOPNOTSUPP)
    if protocol not in (0, abi.AF_UNIX):
        raise Errno(errno.EPROTONOSUPPORT)
    one, other = unix.pair(task, kind, flags)
    table = task.files
    try:
        first = install(task, one, 0, cloexec)
    except Errno:
        other.put()
        raise
    try:
        second = install(task, other, 0, cloexec)
    except Errno:
        table.remove(first).put()
        raise
    try:
        task.mm.write(fds, _two_ints.pack(first, second))
    except Errno:
        table.remove(second).put()
        table.remove(first).put()
        raise
    return 0


# -- naming and connecting -------------------------------------------------------------------------------------------
@syscall(49)
def bind(task: Task, fd: Fd, addr: UserPtr, length: Int) -> int:
    """bind(2)."""
    sock = socket_of(task, fd)
    name = fetch_name(task, addr, length)
    if len(name) < 2:
        raise Errno(errno.EINVAL)
    sock.bind(task, name)
    return 0


@syscall(50)
def listen(task: Task, fd: Fd, backlog: Int) -> int:
    """listen(2)."""
    socket_of(task, fd).listen(task, backlog)
    return 0


@syscall(43)
def accept(task: Task, fd: Fd, addr: UserPtr, length_at: UserPtr) -> Any:
    """accept(2)."""
    return accept4(task, fd, addr, length_at, 0)


@syscall(288)
def accept4(task: Task, fd: Fd, addr: UserPtr, length_at: UserPtr, flags: Int) -> Any:
    """accept4(2)."""
    task.files.get_io(fd)
    if flags & ~(abi.SOCK_CLOEXEC | abi.SOCK_NONBLOCK):
        raise Errno(errno.EINVAL)
    sock = socket_of(task, fd)
    task.files.check_room(task.rlimit(RLIMIT_NOFILE))
    child = sock.accept(task, flags)
    if child.__class__ is int:
        if child == -errno.EAGAIN and not sock.flags & O_NONBLOCK:
            return _accept_wait(task, sock, addr, length_at, flags)
        return child
    return _accepted(task, child, addr, length_at, flags)


async def _accept_wait(task: Task, sock: Socket, addr: int, length_at: int, flags: int) -> int:
    deadline = deadline_of(task, sock.read_timeout)
    sock.get()
    try:
        while True:
            if not await wait_for(task, "accept", sock.queue, IN, deadline):
                return -errno.EAGAIN
            child = sock.accept(task, flags)
            if isinstance(child, Socket):
                return _accepted(task, child, addr, length_at, flags)
            if child != -errno.EAGAIN:
                return child
    finally:
        sock.put()


def _accepted(task: Task, child: Any, addr: int, length_at: int, flags: int) -> int:
    if flags & abi.SOCK_NONBLOCK:
        child.flags |= O_NONBLOCK
    fd = install(task, child, 0, bool(flags & abi.SOCK_CLOEXEC))
    if addr:
        try:
            try:
                name = child.getpeername()
            except Errno:  # gone already
                if getattr(child, "accepted_from", None) is None:
                    raise Errno(errno.ECONNABORTED) from None
                name = child.sockaddr(child.accepted_from)
            store_name(task, name, addr, length_at)
        except Errno:
            task.files.remove(fd).put()
            raise
    return fd


@syscall(42)
def connect(task: Task, fd: Fd, addr: UserPtr, length: Int) -> Any:
    """connect(2)."""
    sock, name = addressed_socket(task, fd, addr, length)
    if len(name) < 2:
        raise Errno(errno.EINVAL)
    n = sock.connect(task, name, False)
    if n in (-errno.EAGAIN, -errno.EINPROGRESS, -errno.EALREADY) and not sock.flags & O_NONBLOCK:
        return _connect_wait(task, sock, name, n)
    return n


async def _connect_wait(task: Task, sock: Socket, name: bytes, n: int) -> int:
    deadline = deadline_of(task, sock.write_timeout)
    sock.get()
    try:
        while True:
            queue = sock.connect_queue(name) if n == -errno.EAGAIN else sock.queue
            if not await wait_for(task, "connect", queue, OUT, deadline):
                return -errno.EAGAIN if n == -errno.EAGAIN else -errno.EINPROGRESS
            n = sock.connect(task, name, True)
            if n not in (-errno.EAGAIN, -errno.EINPROGRESS, -errno.EALREADY):
                return n
    finally:
        sock.put()


@syscall(51)
def getsockname(task: Task, fd: Fd, addr: UserPtr, length_at: UserPtr) -> int:
    """getsockname(2)."""
    store_name(task, socket_of(task, fd).getsockname(), addr, length_at)
    return 0


@syscall(52)
def getpeername(task: Task, fd: Fd, addr: UserPtr, length_at: UserPtr) -> int:
    """getpeername(2)."""
    store_name(task, socket_of(task, fd).getpeername(), addr, length_at)
    return 0


@syscall(48)
def shutdown(task: Task, fd: Fd, how: Int) -> int:
    """shutdown(2)."""
    sock = socket_of(task, fd)
    if not 0 <= how <= abi.SHUT_RDWR:
        raise Errno(errno.EINVAL)
    sock.shutdown(how)
    return 0


# -- options ---------------------------------------------------------------------------------------------------------
@syscall(54, partial="options on an allow-list; no BPF filters, no kernel TLS, no packet tables")
def setsockopt(task: Task, fd: Fd, level: Int, name: Int, value_at: UserPtr, size: Int) -> int:
    """setsockopt(2)."""
    sock = socket_of(task, fd)
    if size < 0:
        raise Errno(errno.EINVAL)
    if sock.family == abi.AF_UNIX and level != abi.SOL_SOCKET:
        raise Errno(errno.EOPNOTSUPP)
    value = task.mm.read(value_at, min(size, OPTION_MOST)) if size else b""
    if level == abi.SOL_SOCKET and sock.set_common(name, value):
        return 0
    sock.setsockopt(task, level, name, value)
    return 0


@syscall(55, partial="options on an allow-list")
def getsockopt(task: Task, fd: Fd, level: Int, name: Int, value_at: UserPtr, size_at: UserPtr) -> int:
    """getsockopt(2)."""
    sock = socket_of(task, fd)
    if sock.family == abi.AF_UNIX and level != abi.SOL_SOCKET:
        raise Errno(errno.EOPNOTSUPP)
    size = abi.INT.unpack(task.mm.read(size_at, 4))[0]
    if size < 0:
        raise Errno(errno.EINVAL)
    value = sock.get_common(name) if level == abi.SOL_SOCKET else None
    if value is None:
        value = sock.getsockopt(task, level, name, size)
    value = value[:size]
    if value:
        task.mm.write(value_at, value)
    task.mm.write(size_at, abi.INT.pack(len(value)))
    return 0
