"""Starting the Gofer: a fork that shuts itself into the trees it serves.

The parent opens nothing for the child but a socket pair; the child finds the trees by path, and reports on a pipe
whether it got where it wanted before `start` returns, so that a bad path or a refusing host is an error of `start`.

With namespaces (root, or an ordinary user on a host that allows user namespaces) the child's root is an empty,
read-only tmpfs with the trees mounted at /0, /1, ...: detached copies (open_tree), nosuid, nodev, noexec, and read-only
where asked. Nothing is ever mounted in the host's mount namespace. Without namespaces it is an ordinary process of the
user that holds descriptors of the trees; containment then rests on how nodes.py looks names up.

Order in the child, and why: die with the parent first; mount namespace and mounts while we still have CAP_SYS_ADMIN;
close descriptors after the last path was looked up; capabilities go last, no_new_privs with them.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import stat
from dataclasses import dataclass

from kvmsentry.errors import HostError
from kvmsentry.gofer import hostcalls as host
from kvmsentry.gofer.nodes import Tree
from kvmsentry.gofer.server import Server
from kvmsentry.gofer.session import complain

# Reading and owning files as the container's root does; nothing else.
KEPT_CAPABILITIES = (
    1 << host.CAP_CHOWN | 1 << host.CAP_DAC_OVERRIDE | 1 << host.CAP_DAC_READ_SEARCH | 1 << host.CAP_FOWNER
    | 1 << host.CAP_FSETID
)  # fmt: skip
_NAMESPACES = host.CLONE_NEWNS | host.CLONE_NEWNET | host.CLONE_NEWIPC | host.CLONE_NEWUTS
_DESCRIPTORS_WANTED = 16384


@dataclass(frozen=True)
class TreeSpec:
    """A host path to serve: a directory, or a single file (a bind mount of one file)."""

    name: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class Gofer:
    """A running Gofer: its pid (the caller waits for it), the Sentry's end of the connection, how it is confined."""

    pid: int
    sock: socket.socket
    namespaces: tuple[str, ...]


class Starting:
    """A Gofer that was forked and confines itself; what is written to `sock` meanwhile waits for it."""

    def __init__(self, pid: int, sock: socket.socket, status: int, namespaces: bool | None) -> None:
        self.pid, self.sock, self._status, self._namespaces = pid, sock, status, namespaces

    def forget(self) -> None:
        """For a process that was forked meanwhile: it is not the one that asks."""
        os.close(self._status)

    def ready(self) -> Gofer:
        """Wait until it serves. HostError names what the host refused; the Gofer is gone then."""
        with os.fdopen(self._status, "rb") as pipe:
            report = pipe.read(4096).decode(errors="backslashreplace")
        if not report.startswith("ok"):
            self.sock.close()
            os.waitpid(self.pid, 0)
            number, _, operation = report.partition(" ")
            raise HostError(
                f"gofer: {operation or 'it ended before it was ready'}", int(number or 0),
                "run as root, allow user namespaces, or start without namespaces"
                if self._namespaces is not False else "",
            )  # fmt: skip
        return Gofer(self.pid, self.sock, tuple(report.split()[1:]))


def start(trees: list[TreeSpec], namespaces: bool | None = None) -> Gofer:
    """`begin`, and wait until it serves."""
    return begin(trees, namespaces).ready()


def begin(trees: list[TreeSpec], namespaces: bool | None = None) -> Starting:
    """Fork a Gofer that will serve `trees`; aname at attach is the spec's name or its index.

    `namespaces`: True: HostError unless the host allows them; False: none; None: when the host allows them. Call it
    before the process grows and before it has threads. The Gofer ends when the socket is closed or this process dies.
    HostError names the path or the step that was refused.
    """
    for spec in trees:
        try:
            kind = stat.S_IFMT(os.stat(spec.path).st_mode)
        except OSError as problem:
            raise HostError(f"gofer: open {spec.path}", problem.errno or 0, "does the path exist?") from None
        if kind not in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFSOCK, stat.S_IFIFO):
            raise HostError(f"gofer: serve {spec.path}", errno.ENODEV, "only directories and files can be served")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    status_read, status_write = os.pipe()
    parent = os.getpid()
    try:
        pid = _fork_into_pid_namespace(namespaces)
    except OSError as problem:
        for fd in (status_read, status_write):
            os.close(fd)
        ours.close()
        theirs.close()
        raise HostError("gofer: fork", problem.errno or 0) from None
    if pid == 0:
        code = 1
        try:
            ours.detach()  # closed with everything else, below
            code = _child(trees, namespaces, theirs, status_write, parent)
        except BaseException as problem:  # noqa: BLE001 - nothing may return into the parent's program
            complain(f"gofer: {type(problem).__name__}: {problem}")
        finally:
            os._exit(code)
    theirs.close()
    os.close(status_write)
    return Starting(pid, ours, status_read, namespaces)


def _fork_into_pid_namespace(namespaces: bool | None) -> int:
    """fork(2), the child in a PID namespace of its own where root may make one: it can then signal nobody."""
    here = -1
    if namespaces is not False and os.geteuid() == 0:
        try:
            here = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            host.unshare(host.CLONE_NEWPID)
        except OSError:
            if here >= 0:
                os.close(here)
                here = -1
    try:
        return os.fork()
    finally:
        if here >= 0:
            # In both processes; the parent's next children must be born where the parent lives.
            try:
                host.setns(here, host.CLONE_NEWPID)
            except OSError as problem:
                if problem.errno not in (errno.EINVAL, errno.EPERM):  # the child cannot go back up, and need not
                    raise
            os.close(here)


class _Refused(Exception):
    def __init__(self, operation: str, number: int) -> None:
        self.operation, self.number = operation, number


def _child(trees: list[TreeSpec], namespaces: bool | None, sock: socket.socket, status: int, parent: int) -> int:
    try:
        host.prctl(host.PR_SET_PDEATHSIG, signal.SIGKILL)
        inside_pid = os.getpid() == 1
        if not inside_pid and os.getppid() != parent:
            return 1  # the parent died before we asked to die with it
        os.setsid()  # a terminal's ^C is for the Sentry to handle
        for signum in signal.valid_signals():  # handlers of the parent's Python must not run here
            if callable(signal.getsignal(signum)):
                signal.signal(signum, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.umask(0)
        _quiet_stdio()
        names: list[str] = []
        if namespaces is not False:
            names = _enter_namespaces(namespaces is True)
            if inside_pid and names:
                names.append("pid")
        served = _pivot(trees) if names else _open_plain(trees)
        host.close_all_but({0, 1, 2, sock.fileno(), status, *[tree.root_fd for tree in served]})
        _limits()
        try:
            host.keep_capabilities(KEPT_CAPABILITIES)
            host.prctl(host.PR_SET_NO_NEW_PRIVS, 1)
            host.prctl(host.PR_SET_DUMPABLE, 0)
            # PR_SET_DUMPABLE and credentials changes clear it (prctl(2))
            host.prctl(host.PR_SET_PDEATHSIG, signal.SIGKILL)
            host.prctl(host.PR_SET_NAME, b"kvmsentry-gofer")
        except OSError as problem:
            raise _Refused("drop capabilities", problem.errno or 0) from None
        server = Server(served, owns="user" not in names)
    except (_Refused, OSError) as problem:
        number = problem.number if isinstance(problem, _Refused) else problem.errno or 0
        operation = problem.operation if isinstance(problem, _Refused) else f"start: {problem.strerror}"
        os.write(status, f"{number} {operation}".encode(errors="backslashreplace")[:4000])
        return 1
    os.write(status, " ".join(["ok", *names]).encode())
    os.close(status)
    gc.collect()
    gc.disable()  # nodes are counted by hand; there are no other cycles
    server.serve(sock)
    return 0


def _quiet_stdio() -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    try:
        os.fstat(2)
    except OSError:
        os.dup2(null, 2)
    if null > 2:
        os.close(null)


def _limits() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS_WANTED)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _enter_namespaces(required: bool) -> list[str]:
    """Leave the host's mount, net, IPC and UTS namespaces; names what was entered, [] when refused and optional."""
    uid, gid = os.geteuid(), os.getegid()
    names = ["mount", "net", "ipc", "uts"]
    try:
        host.unshare(_NAMESPACES)
    except OSError as problem:
        if uid == 0 and problem.errno != errno.EPERM:
            raise _Refused("unshare(CLONE_NEWNS|...)", problem.errno or 0) from None
        if not required and host.effective_capabilities() & 1 << host.CAP_CHOWN:
            return []  # in a user namespace we would lose sight of all owners but one, which is worse
        try:
            host.unshare(_NAMESPACES | host.CLONE_NEWUSER)
        except OSError as again:
            if required:
                raise _Refused("unshare(CLONE_NEWUSER|CLONE_NEWNS|...)", again.errno or 0) from None
            return []
        names.append("user")
        # The user's own files are the container root's; user_namespaces(7) wants setgroups denied first.
        try:
            host.prctl(host.PR_SET_DUMPABLE, 1)  # after a setuid(2), /proc/self would be root's
            for path, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                with open(f"/proc/self/{path}", "w") as file:
                    file.write(line)
        except OSError as problem:
            raise _Refused("map the user into the user namespace", problem.errno or 0) from None
    try:
        host.mount(None, b"/", None, host.MS_REC | host.MS_PRIVATE)
    except OSError as problem:
        raise _Refused("make mounts private", problem.errno or 0) from None
    return names


def _pivot(specs: list[TreeSpec]) -> list[Tree]:
    """Make an empty tmpfs with the trees in it the root of this mount namespace."""
    copies = []
    for spec in specs:
        attributes = host.MOUNT_ATTR_NOSUID | host.MOUNT_ATTR_NODEV | host.MOUNT_ATTR_NOEXEC
        if spec.read_only:
            attributes |= host.MOUNT_ATTR_RDONLY
        try:
            path = os.path.realpath(os.fsencode(spec.path))
            kind = stat.S_IFMT(os.stat(path).st_mode)
            fd = host.open_tree(path)
            host.mount_setattr(fd, attributes)
        except OSError as problem:
            raise _Refused(f"take a copy of the mount at {spec.path}", problem.errno or 0) from None
        copies.append((fd, kind, os.path.basename(path)))
    base = next((d for d in (b"/tmp", b"/run", b"/mnt", b"/var", b"/usr") if os.path.isdir(d)), b"/")
    flags = host.MS_NOSUID | host.MS_NODEV | host.MS_NOEXEC
    try:
        host.mount(b"gofer", base, b"tmpfs", flags, b"mode=755,size=64k")
        os.chdir(base)
        for index, (fd, kind, name) in enumerate(copies):
            place = b"%d" % index
            os.mkdir(place)
            if kind != stat.S_IFDIR:
                place += b"/" + name
                os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            host.move_mount(fd, place)
            os.close(fd)
        host.pivot_root(b".", b".")  # pivot_root(2): the old root is stacked over the new one
        host.umount2(b".", host.MNT_DETACH)
        os.chdir("/")
        host.mount(None, b"/", None, flags | host.MS_REMOUNT | host.MS_RDONLY)
    except OSError as problem:
        raise _Refused("pivot into the trees", problem.errno or 0) from None
    trees = []
    for index, (spec, (_, kind, name)) in enumerate(zip(specs, copies, strict=True)):
        fd = os.open(f"/{index}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        trees.append(Tree(spec.name.encode(), fd, spec.read_only, None if kind == stat.S_IFDIR else name))
    return trees


def _open_plain(specs: list[TreeSpec]) -> list[Tree]:
    """Descriptors of the trees, in the namespaces of the host."""
    trees = []
    for spec in specs:
        path = os.path.realpath(os.fsencode(spec.path))
        only = None
        try:
            if not os.path.isdir(path):
                path, only = os.path.split(path)
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            trees.append(Tree(spec.name.encode(), fd, spec.read_only, only))
        except OSError as problem:
            raise _Refused(f"open {spec.path}", problem.errno or 0) from None
    return trees
