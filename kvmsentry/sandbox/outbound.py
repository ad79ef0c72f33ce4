"""Ways from a sandbox's network namespace to the host's network: a veth pair with NAT (root), pasta, slirp4netns.

Each way is an object with `guest_address`, `resolv_conf` and `close`. The programs they need are the host's: ip and
iptables (iproute2, iptables), pasta (passt), slirp4netns.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import time
from typing import Any

from kvmsentry import log
from kvmsentry.errors import HostError
from kvmsentry.gofer import hostcalls

SUBNETS = ipaddress.ip_network("10.137.0.0/16")  # a /30 of it for each sandbox
MTU = 1500
PATIENCE = 10.0  # seconds for pasta or slirp4netns to be ready
SLIRP_ADDRESS, SLIRP_DNS = "10.0.2.100", "10.0.2.3"
PASTA_DNS = "169.254.1.1"
DNS_FALLBACK = "1.1.1.1"


def host_resolv_conf(loopback: bool = False) -> str:
    """The host's /etc/resolv.conf, without name servers on the host's loopback unless `loopback`: from elsewhere those
    cannot be reached."""
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            with open(path) as file:
                lines = file.read().splitlines()
        except OSError:
            continue
        kept = [line for line in lines if loopback or not _loopback_server(line)]
        if any(line.startswith("nameserver") for line in kept):
            return "\n".join(kept) + "\n"
    return "" if loopback else f"nameserver {DNS_FALLBACK}\n"


def _loopback_server(line: str) -> bool:
    words = line.split()
    return len(words) > 1 and words[0] == "nameserver" and (words[1].startswith("127.") or words[1] == "::1")


def connect(mode: str, user_fd: int, net_fd: int) -> Any:
    """Connect a prepared namespace: `bridge` takes what fits who we are; HostError says what is missing."""
    if mode == "bridge":
        if os.geteuid() == 0 and user_fd < 0 and shutil.which("ip") and shutil.which("iptables"):
            mode = "veth"
        else:
            mode = "pasta" if shutil.which("pasta") else "slirp4netns"
            if not shutil.which(mode):
                raise HostError("connect the sandbox to the network", 0, "install passt (pasta) or slirp4netns")
    if mode == "veth":
        return Veth(net_fd)
    if shutil.which(mode) is None:
        raise HostError(f"{mode} is not installed", 0, f"install it, or use another --network ({mode} was asked for)")
    return Pasta(user_fd, net_fd) if mode == "pasta" else Slirp(user_fd, net_fd)


def _command(*words: str, fatal: bool = True) -> bool:
    try:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"run {words[0]}: {error}", 0, f"install {words[0]}") from None
    if done.returncode and fatal:
        raise HostError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}", 0)
    return done.returncode == 0


def run_inside(user_fd: int, net_fd: int, *commands: tuple[str, ...]) -> None:
    """Run host programs inside the namespace; HostError tells the first that fails."""

    def enter() -> None:
        if user_fd >= 0:
            hostcalls.setns(user_fd, hostcalls.CLONE_NEWUSER)
        hostcalls.setns(net_fd, hostcalls.CLONE_NEWNET)

    for words in commands:
        done = subprocess.run(
            words, capture_output=True, text=True, stdin=subprocess.DEVNULL, preexec_fn=enter, timeout=30
        )
        if done.returncode:
            raise HostError(f"{' '.join(words)} (inside): {(done.stderr or done.stdout).strip()}", 0)


class Veth:
    """A pair of interfaces, an address at each end, and masquerading behind the host's."""

    def __init__(self, net_fd: int) -> None:
        if os.geteuid() != 0:
            raise HostError("--network veth needs root", 0, "use --network pasta or slirp4netns")
        self.undo: list[tuple[str, ...]] = []
        self.forward_was_off = False
        try:
            self._set_up(net_fd)
        except BaseException:
            self.close()
            raise
        self.resolv_conf = host_resolv_conf()

    def _set_up(self, net_fd: int) -> None:
        _sweep()
        tag = f"ks{os.getpid() & 0xFFFFFF:x}"
        network = self._choose()
        gateway, guest = network[1], network[2]
        self.guest_address, source = str(guest), str(network)
        here, there = f"{tag}h", f"{tag}g"
        path = f"/proc/{os.getpid()}/fd/{net_fd}"
        _command("ip", "link", "add", here, "mtu", str(MTU), "type", "veth", "peer", "name", there, "mtu", str(MTU))
        self.undo.append(("ip", "link", "del", here))
        _command("ip", "link", "set", there, "netns", path, "name", "eth0")
        _command("ip", "addr", "add", f"{gateway}/30", "dev", here)
        _command("ip", "link", "set", here, "up")
        run_inside(
            -1, net_fd,
            ("ip", "addr", "add", f"{guest}/30", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
            ("ip", "route", "add", "default", "via", str(gateway)),
        )  # fmt: skip
        mark = ("-m", "comment", "--comment", f"kvmsentry {tag}")
        self._rule("nat", "POSTROUTING", "-s", source, "!", "-o", here, *mark, "-j", "MASQUERADE")
        self._rule("filter", "FORWARD", "-i", here, *mark, "-j", "ACCEPT")
        self._rule("filter", "FORWARD", "-o", here, *mark, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED",
                   "-j", "ACCEPT")  # fmt: skip
        with open("/proc/sys/net/ipv4/ip_forward", "r+") as file:
            if file.read().strip() == "0":
                file.seek(0)
                file.write("1")
                self.forward_was_off = True

    @staticmethod
    def _choose() -> Any:
        """A /30 that no interface or route of the host uses."""
        used = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True).stdout
        subnets = list(SUBNETS.subnets(new_prefix=30))
        first = os.getpid() % len(subnets)
        for network in subnets[first:] + subnets[:first]:
            if str(network) not in used:
                return network
        raise HostError(f"no /30 of {SUBNETS} is free", 0)

    def _rule(self, table: str, chain: str, *rule: str) -> None:
        where = "-I" if table == "filter" else "-A"
        _command("iptables", "-w", "10", "-t", table, where, chain, *rule)
        self.undo.append(("iptables", "-w", "10", "-t", table, "-D", chain, *rule))

    def close(self) -> None:
        """Take the rules and interfaces away; forwarding is switched off again unless others of us need it."""
        for words in reversed(self.undo):
            if not _command(*words, fatal=False):
                log.log(f"could not undo: {' '.join(words)}")
        self.undo = []
        if self.forward_was_off and not any(name.startswith("ks") for _, name in socket.if_nameindex()):
            with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/ip_forward", "w") as file:
                file.write("0")
        self.forward_was_off = False


def _sweep() -> None:
    """Rules of sandboxes whose supervisor was killed: their interface went with their namespace, the rules stayed. A
    sandbox's interface is there before its first rule and goes after its last."""
    for table in ("nat", "filter"):
        listed = subprocess.run(["iptables", "-w", "10", "-t", table, "-S"], capture_output=True, text=True).stdout
        alive = {name for _, name in socket.if_nameindex()}  # after the list: a new rule's interface is among them
        for line in listed.splitlines():
            words = shlex.split(line)
            mark = next((word for word in words if word.startswith("kvmsentry ks")), "")
            if words[:1] == ["-A"] and mark and mark.split()[1] + "h" not in alive:
                _command("iptables", "-w", "10", "-t", table, "-D", *words[1:], fatal=False)


class _Helper:
    """A host program that carries packets, started by us and ended by us."""

    process: subprocess.Popen[bytes]

    def close(self) -> None:
        """End it."""
        process = self.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _die_with_parent() -> None:
    hostcalls.prctl(hostcalls.PR_SET_PDEATHSIG, signal.SIGTERM)


class Slirp(_Helper):
    """slirp4netns: a TCP/IP stack in user space behind a tap device."""

    guest_address = SLIRP_ADDRESS

    def __init__(self, user_fd: int, net_fd: int) -> None:
        ours, theirs = os.pipe()
        fds = [theirs]
        me = os.getpid()
        words = ["slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", f"--ready-fd={theirs}",
                 "--netns-type=path"]  # fmt: skip
        if user_fd >= 0:
            words.append(f"--userns-path=/proc/{me}/fd/{user_fd}")
        words += [f"/proc/{me}/fd/{net_fd}", "tap0"]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, pass_fds=fds, start_new_session=True,
                                        preexec_fn=_die_with_parent)  # fmt: skip
        os.close(theirs)
        try:
            ready, _, _ = select.select([ours], [], [], PATIENCE)
            if not ready or os.read(ours, 1) != b"1":
                self.close()
                assert self.process.stderr is not None
                raise HostError(f"slirp4netns: {self.process.stderr.read().decode(errors='replace').strip()[-200:]}", 0)
        finally:
            os.close(ours)
        self.resolv_conf = f"nameserver {SLIRP_DNS}\n"


class Pasta(_Helper):
    """pasta: the host's addresses and routes, sockets of the host for the sandbox's connections."""

    def __init__(self, user_fd: int, net_fd: int) -> None:
        words = ["pasta", "--config-net", "--foreground", "--quiet", "--no-map-gw", "-t", "none", "-u", "none", "-T",
                 "none", "-U", "none", "--dns-forward", PASTA_DNS]  # fmt: skip
        words += ["--runas", "0"] if os.geteuid() == 0 else []
        words += ["--userns", f"/proc/self/fd/{user_fd}"] if user_fd >= 0 else ["--netns-only"]
        words += ["--netns", f"/proc/self/fd/{net_fd}"]  # its own: it may not look into ours
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, start_new_session=True,
                                        pass_fds=[fd for fd in (user_fd, net_fd) if fd >= 0],
                                        preexec_fn=_die_with_parent)  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        self.guest_address = ""
        while not self.guest_address:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                assert self.process.stderr is not None
                raise HostError(f"pasta: {self.process.stderr.read().decode(errors='replace').strip()[-300:]}", 0)
            time.sleep(0.02)
            self.guest_address = _address_inside(user_fd, net_fd)
        self.resolv_conf = f"nameserver {PASTA_DNS}\n"


def _address_inside(user_fd: int, net_fd: int) -> str:
    """The IPv4 address that packets leave the namespace from, "" while there is none: asked by a child that enters."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if user_fd >= 0:
                hostcalls.setns(user_fd, hostcalls.CLONE_NEWUSER)
            hostcalls.setns(net_fd, hostcalls.CLONE_NEWNET)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(("192.0.2.1", 9))
                os.write(theirs, sock.getsockname()[0].encode())
        except OSError:
            pass  # no route yet
        finally:
            os._exit(0)
    os.close(theirs)
    address = os.read(ours, 64).decode()
    os.close(ours)
    os.waitpid(pid, 0)
    return address
