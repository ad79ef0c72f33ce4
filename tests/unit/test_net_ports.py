"""Published ports: listeners, and the forwarder's loop on loopback."""

from __future__ import annotations

import socket
import threading

import pytest

from kvmsentry.errors import UserError
from kvmsentry.net import options
from kvmsentry.sandbox.ports import Forwarder, open_listener
from kvmsentry.sandbox.spec import Publish
from kvmsentry.syscall import abi_net as abi


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}/tcp: Address already in use"):
            open_listener(Publish("127.0.0.1", port, 80))
    with pytest.raises(UserError, match="203.0.113.77"):
        open_listener(Publish("203.0.113.77", port, 80))


def test_forwarder_passes_bytes_ends_and_datagrams() -> None:
    tcp_port, udp_port = free_port(), free_port(socket.SOCK_DGRAM)
    server = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    listeners = [
        open_listener(Publish("127.0.0.1", tcp_port, server.getsockname()[1])),
        open_listener(Publish("127.0.0.1", udp_port, udp.getsockname()[1], "udp")),
    ]
    threading.Thread(target=Forwarder(listeners, "127.0.0.1").run, daemon=True).start()
    data = bytes(range(256)) * 4096

    def serve() -> None:
        inner, _ = server.accept()
        with inner:
            got = b"".join(iter(lambda: inner.recv(65536), b""))
            inner.sendall(got[::-1])

    threading.Thread(target=serve, daemon=True).start()
    with socket.create_connection(("127.0.0.1", tcp_port), timeout=10) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: client.recv(65536), b"")) == data[::-1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.sendto(b"ping", ("127.0.0.1", udp_port))
        message, who = udp.recvfrom(100)
        udp.sendto(message.upper(), who)
        assert client.recv(100) == b"PING"


def test_no_option_on_the_list_loads_programs_or_reaches_kernel_tables() -> None:
    forbidden = {(abi.SOL_SOCKET, name) for name in (abi.SO_ATTACH_FILTER, 50, 51, 52)}  # BPF, SO_REUSEPORT_CBPF, EBPF
    forbidden |= {(abi.SOL_TCP, name) for name in (14, 19, 31, 35)}  # MD5SIG, REPAIR, ULP, ZEROCOPY_RECEIVE
    forbidden.add((abi.SOL_UDP, 100))  # UDP_ENCAP
    assert not forbidden & set(options.OPTIONS)
    assert not [key for key in options.OPTIONS if key[0] in (abi.SOL_IP, abi.SOL_IPV6) and 64 <= key[1] < 66]
