"""What the Sentry gives up before it serves the first guest instruction.

Done here: own mount, network, IPC and UTS namespaces, an empty root, no new privileges, no capabilities. Where the
host refuses (an ordinary user without user namespaces) the process keeps what it had, and the log says so.
"""

from __future__ import annotations

import os
import resource
import signal

from kvmsentry import log
from kvmsentry.errors import HostError
from kvmsentry.gofer import hostcalls
from kvmsentry.sandbox.network import Network, prepare_namespace, write_id_maps

CAP_NET_BIND_SERVICE, CAP_NET_RAW = 1 << 10, 1 << 13  # uapi/linux/capability.h


def leave_session() -> None:
    """First thing in the child: die with the supervisor, hear no signals of its terminal."""
    hostcalls.prctl(hostcalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the application's internet sockets are ours too
    for signo in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGPIPE,
        signal.SIGTSTP,
        signal.SIGUSR2,
    ):
        signal.signal(signo, signal.SIG_IGN)


def enter(network: Network) -> bool:
    """Lock the process in. Everything it needs by path was opened. False when the network is the host's though nobody
    asked for that: then no internet sockets may be made."""
    flags = hostcalls.CLONE_NEWNS | hostcalls.CLONE_NEWIPC | hostcalls.CLONE_NEWUTS
    own_network = network.mode == "host"
    try:
        if network.net_fd >= 0:
            network.join()  # before anything else: a user namespace that comes with it gives the right to the rest
            own_network = True
            hostcalls.unshare(flags)
        elif not own_network:
            flags |= hostcalls.CLONE_NEWNET
            uid, gid = os.geteuid(), os.getegid()
            try:
                hostcalls.unshare(flags)
            except PermissionError:
                hostcalls.unshare(flags | hostcalls.CLONE_NEWUSER)
                write_id_maps(uid, gid)
            own_network = True
            prepare_namespace()
        else:
            hostcalls.unshare(flags)
        hostcalls.mount(None, b"/", None, hostcalls.MS_REC | hostcalls.MS_PRIVATE)
        hostcalls.mount(
            b"none",
            b"/proc",
            b"tmpfs",
            hostcalls.MS_NOSUID | hostcalls.MS_NODEV | hostcalls.MS_NOEXEC,
            b"size=0,mode=555",
        )
        os.chroot("/proc")
        os.chdir("/")
    except OSError as error:
        log.log(f"the host refuses namespaces to the sentry ({error}); it keeps its own")
    try:
        # Both reach no further than the network namespace that the process is in.
        hostcalls.keep_capabilities(CAP_NET_BIND_SERVICE | CAP_NET_RAW if own_network else 0)
    except OSError as error:
        raise HostError("drop capabilities", error.errno or 0) from None
    hostcalls.prctl(hostcalls.PR_SET_NO_NEW_PRIVS, 1)
    hostcalls.prctl(hostcalls.PR_SET_DUMPABLE, 0)
    hostcalls.prctl(hostcalls.PR_SET_PDEATHSIG, signal.SIGKILL)  # cleared by what was just done (prctl(2))
    network.close_child()
    return own_network
