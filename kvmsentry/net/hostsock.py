"""A guest socket that is a socket of the host, in the sandbox's own network namespace.

The host socket never sleeps; data goes straight between it and guest memory. Readiness comes edge-triggered from the
platform's epoll: one registration for life, made when a call first finds the socket not ready, which reports at once
what is ready by then, so that nothing is lost.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import O_NONBLOCK, POLLERR, POLLHUP, POLLIN, POLLOUT, POLLPRI, POLLRDHUP, POLLRDNORM, POLLWRNORM
from kvmsentry.net.socket import Control, Received, Socket
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

EPOLLET = 1 << 31  # uapi/linux/eventpoll.h
ASKED = POLLIN | POLLOUT | POLLPRI | POLLRDHUP
CONTROL_ROOM = 1024  # bytes for ancillary data of a received message
_DONTWAIT = abi.MSG_DONTWAIT | abi.MSG_NOSIGNAL
EAGAIN = -errno.EAGAIN


def refused(error: OSError) -> Errno:
    """The host's errno is Linux's answer to the application."""
    return Errno(error.errno or errno.EIO)


class HostSocket(Socket, ABC):
    """`host` is a non-blocking socket of the Sentry's."""

    def __init__(self, task: Task, host: socket.socket, kind: int, protocol: int, flags: int = 0) -> None:
        super().__init__(task, kind, protocol, flags)
        self.host = host
        self.watched = False
        self.poller: Any = None
        self.accepted_from: Any = None  # its peer's address as accept(2) tells it, even when that is gone by then
        self.ended = False  # no more datagrams are waited for: shutdown(2)

    # -- names: each family packs and parses its own -----------------------------------------------------------------
    @abstractmethod
    def address(self, name: bytes) -> Any:
        """A sockaddr as Python's socket module wants it."""

    @abstractmethod
    def sockaddr(self, address: Any) -> bytes:
        """The reverse."""

    def getsockname(self) -> bytes:
        """getsockname(2)."""
        return self.sockaddr(self.host.getsockname())

    def getpeername(self) -> bytes:
        """getpeername(2)."""
        try:
            return self.sockaddr(self.host.getpeername())
        except OSError as error:
            raise refused(error) from None

    def bind(self, task: Task, name: bytes) -> None:
        """bind(2)."""
        try:
            self.host.bind(self.address(name))
        except OSError as error:
            raise refused(error) from None

    # -- readiness ---------------------------------------------------------------------------------------------------
    def listen_to_host(self) -> None:
        """From now on the queue hears of every change."""
        if not self.watched:
            self.watched = True
            self.kernel.platform.watch(self.host.fileno(), ASKED | EPOLLET, self._changed)

    def _changed(self, events: int) -> None:
        if events & POLLIN:
            events |= POLLRDNORM
        if events & POLLOUT:
            events |= POLLWRNORM
        self.queue.wake(events)

    def poll(self) -> int:
        """The host socket's own readiness."""
        poller = self.poller
        if poller is None:
            poller = self.poller = select.poll()
            poller.register(self.host.fileno(), ASKED)
        found = poller.poll(0)
        self.listen_to_host()
        if not found:
            return 0
        events: int = found[0][1]
        if events & POLLIN:
            events |= POLLRDNORM
        if events & POLLOUT:
            events |= POLLWRNORM
        return events & (ASKED | POLLRDNORM | POLLWRNORM | POLLHUP | POLLERR)

    # -- data --------------------------------------------------------------------------------------------------------
    def read(self, views: list[memoryview]) -> int:
        """read(2)."""
        try:
            if len(views) == 1:
                return self.host.recv_into(views[0], 0, _DONTWAIT)
            return self.host.recvmsg_into(views, 0, _DONTWAIT)[0]
        except BlockingIOError:
            self.listen_to_host()
            return EAGAIN if self.waits(0) else 0
        except OSError as error:
            raise refused(error) from None

    def waits(self, flags: int) -> bool:
        """Whether nothing to be had yet means to come again. A datagram socket that was shut down for reading ends the
        wait with nothing instead, but only for those who would wait (__skb_wait_for_more_packets)."""
        return not self.ended or bool(self.flags & O_NONBLOCK or flags & abi.MSG_DONTWAIT)

    def write(self, views: list[memoryview]) -> int:
        """write(2)."""
        try:
            if len(views) == 1:
                return self.host.send(views[0], _DONTWAIT)
            return self.host.sendmsg(views, (), _DONTWAIT)
        except BlockingIOError:
            self.listen_to_host()
            return EAGAIN
        except OSError as error:
            raise refused(error) from None

    def send_flags(self, flags: int) -> int:
        """Those of sendmsg(2)'s flags that reach the host."""
        return 0

    def recv_flags(self, flags: int) -> int:
        """Those of recvmsg(2)'s flags that reach the host."""
        return flags & (abi.MSG_PEEK | abi.MSG_TRUNC)

    def check_control(self, task: Task, control: Control) -> list[tuple[int, int, bytes]]:
        """The control messages to send; EINVAL for those that no application needs."""
        if control.raw:
            raise Errno(errno.EINVAL)
        return []

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """sendmsg(2)."""
        ancillary = self.check_control(task, control) if control is not None and control.raw else ()
        host_flags = self.send_flags(flags) | _DONTWAIT
        try:
            if name:
                return self.host.sendmsg(views, ancillary, host_flags, self.address(name))
            if ancillary or len(views) != 1:
                return self.host.sendmsg(views, ancillary, host_flags)
            return self.host.send(views[0], host_flags)
        except BlockingIOError as error:
            self.listen_to_host()
            return -(error.errno or errno.EAGAIN)  # EINPROGRESS: MSG_FASTOPEN
        except OSError as error:
            raise refused(error) from None

    def recv(self, task: Task, views: list[memoryview], flags: int) -> Received | int:
        """recvmsg(2)."""
        host_flags = self.recv_flags(flags) | _DONTWAIT
        try:
            n, ancillary, out, address = self.host.recvmsg_into(views, CONTROL_ROOM, host_flags)
        except BlockingIOError:
            self.listen_to_host()
            return EAGAIN if self.waits(flags) else Received(0)
        except OSError as error:
            raise refused(error) from None
        out &= ~(abi.MSG_DONTWAIT | abi.MSG_NOSIGNAL | abi.MSG_CMSG_CLOEXEC)
        return Received(n, self.sockaddr(address) if address else b"", out, ancillary or None)

    def shutdown(self, how: int) -> None:
        """shutdown(2); a datagram socket that is not connected is shut down all the same (inet_shutdown)."""
        if self.kind != abi.SOCK_STREAM and how != abi.SHUT_WR:
            self.ended = True
        try:
            self.host.shutdown(how)
        except OSError as error:
            raise refused(error) from None
        finally:
            if not self.watched or self.ended:
                self.queue.wake()

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """FIONREAD and its like from the host socket, the rest about interfaces."""
        if request in (abi.FIONREAD, abi.SIOCOUTQ, abi.SIOCATMARK):
            try:
                task.mm.write(argument, fcntl.ioctl(self.host.fileno(), request, bytes(4)))
            except OSError as error:
                raise refused(error) from None
            return 0
        from kvmsentry.net import ifreq

        return ifreq.ioctl(task, request, argument)

    def release(self) -> None:
        """The last descriptor is closed."""
        if self.watched:
            self.watched = False
            self.kernel.platform.unwatch(self.host.fileno())
        self.poller = None
        self.host.close()
        self.queue.wake()
