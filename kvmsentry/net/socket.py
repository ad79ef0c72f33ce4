"""What all sockets have in common: an inode on sockfs, options that are bookkeeping, and the calls of sys_net.

A socket is a File. Its calls never sleep: they answer -EAGAIN, and the system call parks on `queue`. The data calls of
File (read, write) are the ones that read(2) and write(2) use; `send` and `recv` serve the rest of the family.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import O_NONBLOCK, O_RDWR, File, Inode, SuperBlock
from kvmsentry.kernel import cap, userns
from kvmsentry.kernel.traps import WaitQueue
from kvmsentry.syscall import abi_net as abi

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

DEFAULT_BUFFER = 212992  # net.core.{r,w}mem_default: 208 KiB
MAX_BUFFER = 212992  # net.core.{r,w}mem_max
MIN_SNDBUF, MIN_RCVBUF = 4608, 2304  # SOCK_MIN_SNDBUF, SOCK_MIN_RCVBUF of amd64
MAX_TIMEOUT = (1 << 62) // 1_000_000_000  # seconds; longer is for ever


class SockFs(SuperBlock):
    """sockfs: an inode for each socket."""

    magic = 0x534F434B  # SOCKFS_MAGIC, uapi/linux/magic.h
    fstype = "sockfs"

    def __init__(self) -> None:
        super().__init__()
        self.root = Inode(self, 0o040777)


_sockfs = SockFs()
_cookies = itertools.count(1)


class Control:
    """Ancillary data of one message on its way out: files (each with a reference of its own), credentials, and what
    goes to the host as it is."""

    __slots__ = ("files", "creds", "raw")

    def __init__(self) -> None:
        self.files: list[File] = []
        self.creds: tuple[int, int, int] | None = None
        self.raw: list[tuple[int, int, bytes]] = []


class Received:
    """What came with a message: `n` bytes (with MSG_TRUNC perhaps more than were stored), the sender's name, msg_flags,
    (level, type, data) control messages, and files whose references the receiver now owns."""

    __slots__ = ("n", "name", "flags", "control", "files")

    def __init__(self, n: int, name: bytes = b"", flags: int = 0, control: Any = None, files: Any = None) -> None:
        self.n, self.name, self.flags = n, name, flags
        self.control: list[tuple[int, int, bytes]] | None = control
        self.files: list[File] | None = files


class Socket(File):
    """A socket of any family."""

    family = abi.AF_UNSPEC

    def __init__(self, task: Task, kind: int, protocol: int, flags: int = 0) -> None:
        creds = task.creds
        super().__init__(Inode(_sockfs, 0o140777, creds.fsuid, creds.fsgid), None, O_RDWR | (flags & O_NONBLOCK))
        self.kernel: Kernel = task.kernel
        self.kind, self.protocol = kind, protocol
        self.queue: WaitQueue = WaitQueue()
        self.write_all = kind == abi.SOCK_STREAM
        self.read_timeout = self.write_timeout = 0  # SO_RCVTIMEO, SO_SNDTIMEO in ns, 0: for ever

    def label(self) -> bytes:
        """What readlink(2) of /proc/PID/fd/N gives."""
        return b"socket:[%d]" % self.inode.ino

    @property
    def stream(self) -> bool:
        """Bytes without boundaries?"""
        return self.kind == abi.SOCK_STREAM

    # -- what families provide ---------------------------------------------------------------------------------------
    def bind(self, task: Task, name: bytes) -> None:
        """bind(2); `name` is the sockaddr."""
        raise Errno(errno.EOPNOTSUPP)

    def listen(self, task: Task, backlog: int) -> None:
        """listen(2)."""
        raise Errno(errno.EOPNOTSUPP)

    def accept(self, task: Task, flags: int) -> Socket | int:
        """A connection from the backlog, or -EAGAIN."""
        raise Errno(errno.EOPNOTSUPP)

    def connect(self, task: Task, name: bytes, again: bool) -> int:
        """connect(2): 0 or a negative errno. -EAGAIN: ask again when `queue_of_connect` was woken; -EINPROGRESS: it is
        under way, ask again when the socket is writable. `again`: this call has asked before."""
        raise Errno(errno.EOPNOTSUPP)

    def connect_queue(self, name: bytes) -> WaitQueue:
        """Where to wait for a connect that gave -EAGAIN."""
        return self.queue

    def send_queue(self, name: bytes | None) -> WaitQueue:
        """Where to wait for a send to `name` that gave -EAGAIN."""
        return self.queue

    def send(self, task: Task, views: list[memoryview], name: bytes | None, control: Control | None, flags: int) -> int:
        """Send one message, or as much of a stream as fits; bytes or a negative errno. The references of
        `control.files` pass to the socket when it answers >= 0."""
        raise Errno(errno.EOPNOTSUPP)

    def recv(self, task: Task, views: list[memoryview], flags: int) -> Received | int:
        """Receive one message, or what there is of a stream; a negative errno when there is none."""
        raise Errno(errno.EOPNOTSUPP)

    def shutdown(self, how: int) -> None:
        """shutdown(2); `how` was checked."""
        raise Errno(errno.EOPNOTSUPP)

    def getsockname(self) -> bytes:
        """Our sockaddr."""
        raise Errno(errno.EOPNOTSUPP)

    def getpeername(self) -> bytes:
        """The peer's sockaddr; ENOTCONN."""
        raise Errno(errno.EOPNOTSUPP)

    def setsockopt(self, task: Task, level: int, name: int, value: bytes) -> None:
        """setsockopt(2) beyond the options that `set_common` knows."""
        raise Errno(errno.ENOPROTOOPT)

    def getsockopt(self, task: Task, level: int, name: int, size: int) -> bytes:
        """getsockopt(2), ditto; at most `size` bytes are used of the answer."""
        raise Errno(errno.ENOPROTOOPT)

    # -- options that never leave the Sentry -------------------------------------------------------------------------
    def set_common(self, name: int, value: bytes) -> bool:
        """SOL_SOCKET options about sleeping; False for the others."""
        if name in (abi.SO_RCVTIMEO, abi.SO_SNDTIMEO, abi.SO_RCVTIMEO_NEW, abi.SO_SNDTIMEO_NEW):
            if len(value) < 16:
                raise Errno(errno.EINVAL)
            seconds, micros = abi.TIMEVAL.unpack_from(value)
            if not 0 <= micros < 1_000_000:
                raise Errno(errno.EDOM)
            timeout = seconds * 1_000_000_000 + micros * 1000
            if seconds < 0:
                timeout = 1  # sock_set_timeout: a negative one is over at once
            elif seconds >= MAX_TIMEOUT:
                timeout = 0
            if name in (abi.SO_RCVTIMEO, abi.SO_RCVTIMEO_NEW):
                self.read_timeout = timeout
            else:
                self.write_timeout = timeout
            return True
        return False

    def get_common(self, name: int) -> bytes | None:
        """SOL_SOCKET options that are the same everywhere; None for the others."""
        if name == abi.SO_TYPE:
            return abi.INT.pack(self.kind)
        if name == abi.SO_DOMAIN:
            return abi.INT.pack(self.family)
        if name == abi.SO_PROTOCOL:
            return abi.INT.pack(self.protocol)
        if name in (abi.SO_RCVTIMEO, abi.SO_RCVTIMEO_NEW):
            return abi.TIMEVAL.pack(self.read_timeout // 1_000_000_000, self.read_timeout // 1000 % 1_000_000)
        if name in (abi.SO_SNDTIMEO, abi.SO_SNDTIMEO_NEW):
            return abi.TIMEVAL.pack(self.write_timeout // 1_000_000_000, self.write_timeout // 1000 % 1_000_000)
        if name == abi.SO_COOKIE:
            cookie = self.__dict__.get("cookie")
            if cookie is None:
                cookie = self.__dict__["cookie"] = next(_cookies)
            return int(cookie).to_bytes(8, "little")
        if name == abi.SO_SNDLOWAT:
            return abi.INT.pack(1)
        return None

    def fsync(self) -> None:
        """EINVAL: a socket has no storage."""
        raise Errno(errno.EINVAL)


NOBODY = (0, 65534, 65534)  # who sent what was written before anybody asked


def credentials_of(task: Task) -> tuple[int, int, int]:
    """(pid, uid, gid) as SO_PEERCRED and SCM_CREDENTIALS tell them: the process and its effective ids."""
    creds = task.creds
    return task.process.pid, creds.euid, creds.egid


def check_credentials(task: Task, pid: int, uid: int, gid: int) -> tuple[int, int, int]:
    """What `task` claims to be, as the kernel knows it: EPERM unless it may (scm_check_creds in net/core/scm.c), ESRCH
    and EINVAL for numbers without meaning in its namespaces."""
    creds, space = task.creds, task.process.pid_ns
    uid, gid = userns.kuid(creds, uid), userns.kgid(creds, gid)
    if (
        (pid == task.process.vpid or userns.capable(creds, space.user_ns, cap.SYS_ADMIN))
        and (uid in (creds.uid, creds.euid, creds.suid) or creds.holds(cap.SETUID))
        and (gid in (creds.gid, creds.egid, creds.sgid) or creds.holds(cap.SETGID))
    ):
        if not space.level or not pid:
            return pid, uid, gid
        process = space.processes.get(pid)
        if process is None:
            raise Errno(errno.ESRCH)
        return process.pid, uid, gid
    raise Errno(errno.EPERM)


def shown_credentials(task: Task, credentials: tuple[int, int, int]) -> tuple[int, int, int]:
    """The other way round: what `task` is told of somebody's (pid, uid, gid)."""
    pid, uid, gid = credentials
    space, ns = task.process.pid_ns, task.creds.user_ns
    if space.level and pid:
        pid = space.pid_of(task.kernel.processes.get(pid))
    if ns is not userns.ROOT and uid != userns.INVALID:
        uid, gid = userns.shown_uid(ns, uid), userns.shown_gid(ns, gid)
    return pid, uid, gid
