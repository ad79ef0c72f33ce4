"""Published ports: a process that listens on the host and connects inside the sandbox's network namespace.

The listening sockets are opened in the host's namespace before anything else of the sandbox exists, so that a port that
is taken is said at once. Then the forwarder is forked; it enters the sandbox's namespace, where every socket that it
makes from then on lives, and keeps the listeners, which stay where they were made.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from typing import Any

from kvmsentry.errors import UserError
from kvmsentry.gofer import hostcalls
from kvmsentry.sandbox.spec import Publish

CHUNK = 65536  # bytes of one read; a direction holds this much at most
UDP_IDLE = 60.0  # seconds after which a UDP client's socket is given up
UDP_CLIENTS = 1024
TCP_CONNECTIONS = 4096


class Listener:
    """A published port's socket on the host."""

    def __init__(self, publish: Publish, sock: socket.socket) -> None:
        self.publish, self.sock = publish, sock


def open_listener(publish: Publish) -> Listener:
    """Bind a host port; UserError when it is taken, not allowed, or no address of this host."""
    address = publish.address or "0.0.0.0"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if publish.protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, publish.host_port))
        if kind == socket.SOCK_STREAM:
            sock.listen(256)
    except (OSError, UnicodeError) as error:
        sock.close()
        shown = f"[{address}]" if ":" in address else address
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        where = f"{shown}:{publish.host_port}/{publish.protocol}"
        raise UserError(f"--publish: cannot listen on {where}: {reason}") from None
    return Listener(publish, sock)


def start(listeners: list[Listener], user_fd: int, net_fd: int, address: str) -> int:
    """Fork the forwarder to `address` inside the namespace; its process id. It dies with its parent."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        hostcalls.prctl(hostcalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for signo in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(signo, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if user_fd >= 0:
            hostcalls.setns(user_fd, hostcalls.CLONE_NEWUSER)
        hostcalls.setns(net_fd, hostcalls.CLONE_NEWNET)
        hostcalls.close_all_but({2, *(listener.sock.fileno() for listener in listeners)})
        hostcalls.keep_capabilities(0)
        hostcalls.prctl(hostcalls.PR_SET_NO_NEW_PRIVS, 1)
        Forwarder(listeners, address).run()
        status = 0
    finally:
        os._exit(status)


class Side:
    """One end of a TCP connection that is passed on."""

    __slots__ = ("sock", "other", "pending", "ended", "closed_write", "connecting", "mask")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.other: Side
        self.pending = b""  # to be written to `sock`
        self.ended = False  # nothing more comes from `sock`
        self.closed_write = False
        self.connecting = False
        self.mask = 0


class Forwarder:
    """The forwarder's loop."""

    def __init__(self, listeners: list[Listener], address: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.address = address
        self.clients: dict[tuple[int, Any], tuple[socket.socket, float]] = {}  # UDP
        self.connections = 0
        for listener in listeners:
            serve = self.accept if listener.publish.protocol == "tcp" else self.datagrams
            self.selector.register(listener.sock, selectors.EVENT_READ, (serve, listener))

    def run(self) -> None:
        """For ever."""
        while True:
            for key, events in self.selector.select(UDP_IDLE if self.clients else None):
                if key.fd in self.selector.get_map():
                    serve, what = key.data
                    serve(what, events)
            if self.clients:
                self.forget_idle()

    # -- TCP ---------------------------------------------------------------------------------------------------------
    def accept(self, listener: Listener, events: int) -> None:
        """A client of the host's side."""
        try:
            client, _ = listener.sock.accept()
        except OSError:
            return
        client.setblocking(False)
        if self.connections >= TCP_CONNECTIONS:
            client.close()
            return
        inner = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        for sock in (client, inner):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        outside, inside = Side(client), Side(inner)
        outside.other, inside.other = inside, outside
        inside.connecting = True
        self.connections += 1
        inner.connect_ex((self.address, listener.publish.guest_port))
        self.watch(inside)
        self.watch(outside)

    def watch(self, side: Side) -> None:
        """Ask for what `side` can do something with."""
        mask = 0
        if not side.ended and not side.other.pending and not side.connecting and not side.other.connecting:
            mask |= selectors.EVENT_READ
        if side.connecting or side.pending:
            mask |= selectors.EVENT_WRITE
        if mask == side.mask:
            return
        if not side.mask:
            self.selector.register(side.sock, mask, (self.move, side))
        elif not mask:
            self.selector.unregister(side.sock)
        else:
            self.selector.modify(side.sock, mask, (self.move, side))
        side.mask = mask

    def move(self, side: Side, events: int) -> None:
        """Something happened at one end."""
        other = side.other
        try:
            if side.connecting:
                error = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, "refused")
                side.connecting = False
            if events & selectors.EVENT_WRITE and side.pending:
                side.pending = side.pending[side.sock.send(side.pending) :]
            if events & selectors.EVENT_READ and not other.pending and not side.ended:
                data = side.sock.recv(CHUNK)
                if data:
                    with contextlib.suppress(BlockingIOError):
                        data = data[other.sock.send(data) :]
                    other.pending = data
                else:
                    side.ended = True
            for one in (side, other):
                if one.other.ended and not one.pending and not one.closed_write and not one.connecting:
                    one.closed_write = True
                    one.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self.drop(side)
            return
        if side.closed_write and other.closed_write:
            self.drop(side)
            return
        self.watch(side)
        self.watch(other)

    def drop(self, side: Side) -> None:
        """The connection is over; a reset is passed on as one."""
        self.connections -= 1
        for one in (side, side.other):
            if one.mask:
                self.selector.unregister(one.sock)
                one.mask = 0
            if not one.closed_write:
                with contextlib.suppress(OSError):
                    one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            one.sock.close()

    # -- UDP ---------------------------------------------------------------------------------------------------------
    def datagrams(self, listener: Listener, events: int) -> None:
        """A datagram of the host's side; each client has a socket of its own inside."""
        try:
            data, who = listener.sock.recvfrom(CHUNK)
        except OSError:
            return
        key = listener.sock.fileno(), who
        known = self.clients.get(key)
        if known is not None:
            inner = known[0]
        else:
            if len(self.clients) >= UDP_CLIENTS:
                return
            inner = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            inner.connect((self.address, listener.publish.guest_port))
            self.selector.register(inner, selectors.EVENT_READ, (self.answers, (listener, key, inner)))
        self.clients[key] = inner, time.monotonic()
        with contextlib.suppress(OSError):
            inner.send(data)

    def answers(self, what: tuple[Listener, tuple[int, Any], socket.socket], events: int) -> None:
        """A datagram from inside."""
        listener, key, inner = what
        with contextlib.suppress(OSError):
            listener.sock.sendto(inner.recv(CHUNK), key[1])
        self.clients[key] = inner, time.monotonic()

    def forget_idle(self) -> None:
        """Clients that were silent for a while."""
        limit = time.monotonic() - UDP_IDLE
        for key, (inner, used) in list(self.clients.items()):
            if used < limit:
                self.selector.unregister(inner)
                inner.close()
                del self.clients[key]
