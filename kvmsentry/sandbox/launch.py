"""Puts the processes of a sandbox together.

    kvmsentry run  =  the supervisor: terminal, signals, exit status
      |- gofer        serves the file trees over 9P, sees nothing else
      '- sentry       runs the application; no files, no network of its own

Both children are forked from the supervisor, so the interpreter's pages are shared, and die with it.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from kvmsentry import log
from kvmsentry.errors import HostError, UserError
from kvmsentry.gofer import process as gofer_process
from kvmsentry.sandbox import boot, supervisor
from kvmsentry.sandbox.network import Network
from kvmsentry.sandbox.spec import SandboxSpec


def choose_platform(name: str) -> str:
    """kvm, ptrace, or auto where KVM looks usable and the Sentry shall try it. With `auto`, a host without KVM gets
    ptrace, which a line on stderr says. HostError where kvm was asked for and can't be used, UserError for unknown
    names."""
    if name not in ("auto", "kvm", "ptrace"):
        raise UserError(f"unknown platform {name!r} (known: auto, kvm, ptrace)")
    if name == "ptrace":
        return name
    device = "/dev/kvm"
    refused = None
    if not os.path.exists(device):
        refused = HostError(
            "/dev/kvm is not there",
            0,
            "load it with 'modprobe kvm_amd' or 'modprobe kvm_intel'; in a virtual machine, "
            "enable nested virtualisation; 'kvmsentry doctor' says more",
        )
    elif not os.access(device, os.R_OK | os.W_OK):
        refused = HostError(
            "no permission to open /dev/kvm",
            0,
            "add yourself to its group: 'sudo usermod -aG kvm $USER', then log in again",
        )
    if refused is None:
        return name
    if name == "kvm":
        raise refused
    log.complain(f"{refused}; {boot.FALLBACK}")
    return "ptrace"


def run(spec: SandboxSpec) -> int:
    """Run one sandbox to its end; returns the exit status for the shell (128 + n when a signal ended the command)."""
    log.mark("imports")
    spec.platform = choose_platform(spec.platform)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # the children share these objects: leave their pages alone
    network = Network(spec)
    try:
        return _run(spec, network)
    finally:
        network.close()


def _run(spec: SandboxSpec, network: Network) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    trees = [gofer_process.TreeSpec("root", spec.rootfs, spec.overlay or spec.readonly_root)]
    trees += [
        gofer_process.TreeSpec(f"volume{number}", volume.host, volume.readonly)
        for number, volume in enumerate(spec.volumes)
    ]
    gofer = gofer_process.begin(trees)
    log.mark("gofer")
    sentry_pid = os.fork()
    if sentry_pid == 0:
        status = 70
        try:
            gofer.forget()
            ours.close()
            status = boot.main(spec, gofer.sock, theirs, network)
        finally:
            os._exit(status)
    theirs.close()
    try:
        gofer.ready()  # it confines itself while the Sentry imports its modules
    except HostError:
        os.kill(sentry_pid, signal.SIGKILL)
        os.waitpid(sentry_pid, 0)
        raise
    gofer.sock.close()
    return supervisor.supervise(spec, sentry_pid, gofer.pid, ours)
