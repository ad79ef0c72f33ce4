"""The sandbox's network: its namespace, the ways out of it, published ports, and the files that name hosts.

    none     a namespace of its own with nothing but a loopback interface, made by the Sentry as it locks itself down
    host     the host's own namespace
    bridge   a namespace that the supervisor prepares and wires before the Sentry is forked: by root with a veth pair
             and NAT, by everybody else with pasta or slirp4netns; the Sentry joins it with setns(2)

What was set up is taken down by `Network.close`, whatever happened in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import time
from typing import Any

from kvmsentry import log
from kvmsentry.errors import HostError, UserError
from kvmsentry.gofer import hostcalls
from kvmsentry.sandbox import ports
from kvmsentry.sandbox.spec import SandboxSpec

MODES = ("none", "host", "bridge", "veth", "pasta", "slirp4netns")
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # uapi/linux/sockios.h, if.h
_ifreq = struct.Struct("<16sH22x")


def prepare_namespace() -> None:
    """In a new network namespace of the calling thread's, with its capabilities still there: loopback up, and what
    needs no privilege in a container needs none here: low ports, ping sockets."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock.fileno(), SIOCSIFFLAGS, _ifreq.pack(b"lo", IFF_UP))
    for name, value in (("ip_unprivileged_port_start", "0"), ("ping_group_range", "0 2147483647")):
        try:
            with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
                file.write(value)
        except OSError as error:
            log.log(f"net.ipv4.{name} stays as it is: {error}")


def write_id_maps(uid: int, gid: int) -> None:
    """In a new user namespace: root there is who we were."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def new_namespace() -> tuple[int, int]:
    """(user namespace, network namespace) descriptors of a prepared namespace; the first is -1 for root. A child
    makes it and ends: the descriptors keep it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    uid, gid = os.geteuid(), os.getegid()
    pid = os.fork()
    if pid == 0:
        answer = b"?"
        try:
            ours.close()
            try:
                hostcalls.unshare(hostcalls.CLONE_NEWNET)
                answer = b"n"
            except PermissionError:
                hostcalls.unshare(hostcalls.CLONE_NEWUSER | hostcalls.CLONE_NEWNET)
                write_id_maps(uid, gid)
                answer = b"u"
            prepare_namespace()
            theirs.send(answer)
            theirs.recv(1)
        except OSError as error:
            theirs.send(b"!" + str(error).encode())
        finally:
            os._exit(0)
    theirs.close()
    try:
        answer = ours.recv(512)
        if answer[:1] not in (b"n", b"u"):
            raise HostError(
                f"make a network namespace: {answer[1:].decode(errors='replace')}", 0,
                "allow unprivileged user namespaces, run as root, or use --network host",
            )  # fmt: skip
        user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC) if answer == b"u" else -1
        return user, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        ours.close()
        os.waitpid(pid, 0)


class Network:
    """A sandbox's network as the supervisor sees it."""

    def __init__(self, spec: SandboxSpec) -> None:
        self.mode = spec.network
        self.user_fd = self.net_fd = -1
        self.way_out: Any = None  # what connects the namespace to the host's network
        self.forwarder = 0  # process id
        self.listeners: list[ports.Listener] = []
        if self.mode not in MODES:
            raise UserError(f"--network {self.mode}: {', '.join(MODES)} are known")
        try:
            self._open(spec)
        except BaseException:
            self.close()
            raise

    def _open(self, spec: SandboxSpec) -> None:
        if spec.publish:
            if self.mode == "host":
                raise UserError("--publish and --network host: the sandbox's ports are the host's already")
            self.listeners = [ports.open_listener(publish) for publish in spec.publish]
        if self.mode == "host" or (self.mode == "none" and not self.listeners):
            return
        self.user_fd, self.net_fd = new_namespace()
        if self.mode != "none":
            from kvmsentry.sandbox import outbound  # most sandboxes need none of it

            self.way_out = outbound.connect(self.mode, self.user_fd, self.net_fd)
        if self.listeners:
            address = self.way_out.guest_address if self.way_out is not None else "127.0.0.1"
            self.forwarder = ports.start(self.listeners, self.user_fd, self.net_fd, address)

    def join(self) -> None:
        """In the Sentry: enter the namespace that was prepared."""
        if self.user_fd >= 0:
            hostcalls.setns(self.user_fd, hostcalls.CLONE_NEWUSER)
        hostcalls.setns(self.net_fd, hostcalls.CLONE_NEWNET)

    @property
    def resolv_conf(self) -> str | None:
        """What /etc/resolv.conf should say; None without a way to any name server."""
        if self.mode == "host":
            from kvmsentry.sandbox import outbound

            return outbound.host_resolv_conf(loopback=True)
        return self.way_out.resolv_conf if self.way_out is not None else None

    @property
    def guest_address(self) -> str:
        """The sandbox's own IPv4 address beside loopback, "" when there is none."""
        return self.way_out.guest_address if self.way_out is not None else ""

    def close_child(self) -> None:
        """In a child that has joined: descriptors it no longer needs."""
        for listener in self.listeners:
            listener.sock.close()
        for fd in (self.user_fd, self.net_fd):
            if fd >= 0:
                os.close(fd)
        self.user_fd = self.net_fd = -1

    def close(self) -> None:
        """The sandbox has ended: nothing stays behind."""
        if self.forwarder:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.forwarder, signal.SIGTERM)
            end_process(self.forwarder)
            self.forwarder = 0
        if self.way_out is not None:
            self.way_out.close()
            self.way_out = None
        self.close_child()
        self.listeners = []


def end_process(pid: int, patience: float = 1.0) -> None:
    """Wait for a child that was asked to end, and kill it when it does not."""
    deadline = time.monotonic() + patience
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(0.005)
