"""POSIX message queues (mq_overview(7), ipc/mqueue.c): the queues, their file system, and the open files.

    QueueSpace (one a sandbox, held by its IPC namespace)
      .super: MqueueSuper -- root directory -- QueueInode "name" -- QueueFile (a descriptor of mq_open, or of open(2)
                                                                     in a mounted mqueue file system)

A message that finds a sleeping receiver is handed to it and never stands in the queue; a message taken out of a full
queue makes room for that of the first sleeping sender, in one step (pipelined_send, pipelined_receive). So nobody who
came later overtakes a sleeper.
"""

from __future__ import annotations

import errno
import stat as st
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import scatter
from kvmsentry.fs.vfs import POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM, File, Inode, Path, SuperBlock
from kvmsentry.kernel import cap, sysvipc
from kvmsentry.kernel.task import RLIMIT_MSGQUEUE, SigInfo
from kvmsentry.kernel.traps import WaitQueue, park

if TYPE_CHECKING:
    from kvmsentry.fs.fdtable import FdTable
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Credentials, Process, Task

MQUEUE_MAGIC = 0x19800202  # uapi/linux/magic.h
MQ_PRIO_MAX = 32768  # uapi/linux/mqueue.h
HARD_MSGMAX, HARD_MSGSIZEMAX = 65536, 16 << 20  # include/linux/ipc_namespace.h
DIRENT_SIZE, FILENT_SIZE = 20, 80  # ipc/mqueue.c
MESSAGE_COST, LEVEL_COST = 48, 48  # sizeof struct msg_msg, struct posix_msg_tree_node: charged to RLIMIT_MSGQUEUE
HELD_MOST = 128 << 20  # bytes of messages in one namespace: they are in our own memory, whatever the limits allow
MSGQUEUE_DEFAULT = 819200  # MQ_BYTES_MAX, the first soft limit
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD = 0, 1, 2  # uapi/asm-generic/siginfo.h
NOTIFY_WOKENUP, NOTIFY_REMOVED = 1, 2  # uapi/linux/mqueue.h: last byte of a SIGEV_THREAD cookie
SI_MESGQ = -3


class Waiter:
    """A task that sleeps in mq_timedsend (with its message) or mq_timedreceive (until one is put here)."""

    __slots__ = ("queue", "nice", "message", "done")

    def __init__(self, nice: int, message: tuple[int, bytes] | None) -> None:
        self.queue = WaitQueue()
        self.nice, self.message, self.done = nice, message, False

    def finish(self) -> None:
        """What it waited for has happened."""
        self.done = True
        self.queue.wake()


def _enqueue(waiters: list[Waiter], waiter: Waiter) -> None:
    """By priority of the task, then in order of arrival (wq_add)."""
    index = len(waiters)
    while index and waiters[index - 1].nice > waiter.nice:
        index -= 1
    waiters.insert(index, waiter)


class Notification:
    """A mq_notify registration. `thread`: (netlink socket, 32 byte cookie) of SIGEV_THREAD."""

    __slots__ = ("owner", "table", "kind", "signo", "value", "thread")

    def __init__(self, task: Task, kind: int, signo: int, value: int, thread: tuple[Any, bytes] | None) -> None:
        self.owner: Process = task.process
        self.table: FdTable = task.files
        self.kind, self.signo, self.value, self.thread = kind, signo, value, thread

    def tell(self, code: int) -> None:
        """The cookie's way back to the C library's helper thread: `code` is its last byte (set_cookie)."""
        if self.thread is not None:
            sock, cookie = self.thread
            sock.refusals.append(cookie[:31] + bytes([code]))
            sock.queue.wake()
            sock.put()
            self.thread = None


class QueueInode(Inode):
    """A message queue. `levels` maps a priority to its messages, oldest first; `priorities` is sorted."""

    def __init__(self, space: QueueSpace, mode: int, creds: Credentials, gid: int, attr: tuple[int, int] | None,
                 limit: int) -> None:  # fmt: skip
        number = space.number
        self.max_messages = min(number("msg_max"), number("msg_default"))
        self.message_size = min(number("msgsize_max"), number("msgsize_default"))
        if attr is not None:
            self.max_messages, self.message_size = attr
        if self.max_messages <= 0 or self.message_size <= 0:
            raise Errno(errno.EINVAL)
        privileged = creds.capable(cap.SYS_RESOURCE)
        most = (HARD_MSGMAX, HARD_MSGSIZEMAX) if privileged else (number("msg_max"), number("msgsize_max"))
        if self.max_messages > most[0] or self.message_size > most[1]:
            raise Errno(errno.EINVAL)
        count = self.max_messages
        self.charge = count * (self.message_size + MESSAGE_COST) + min(count, MQ_PRIO_MAX) * LEVEL_COST
        charged = space.charged.get(creds.uid, 0) + self.charge
        if charged > limit:
            raise Errno(errno.EMFILE)
        super().__init__(space.super, st.S_IFREG | (mode & 0o7777), creds.fsuid, gid)
        self.space, self.payer = space, creds.uid
        space.charged[creds.uid] = charged
        space.count += 1
        self.name = b""
        self.size = FILENT_SIZE
        self.opens = 0
        self.levels: dict[int, deque[bytes]] = {}
        self.priorities: list[int] = []
        self.messages = self.bytes = 0
        self.queue = WaitQueue()  # poll(2)
        self.senders: list[Waiter] = []
        self.receivers: list[Waiter] = []
        self.notification: Notification | None = None

    # -- messages
    def insert(self, priority: int, text: bytes) -> None:
        """One message more; there is room."""
        level = self.levels.get(priority)
        if level is None:
            level = self.levels[priority] = deque()
            insort(self.priorities, priority)
        level.append(text)
        self.messages += 1
        self.bytes += len(text)

    def take(self) -> tuple[int, bytes]:
        """The oldest message of the highest priority; there is one."""
        priority = self.priorities[-1]
        level = self.levels[priority]
        text = level.popleft()
        if not level:
            del self.levels[priority]
            del self.priorities[bisect_left(self.priorities, priority)]
        self.messages -= 1
        self.bytes -= len(text)
        return priority, text

    def post(self, task: Task, priority: int, text: bytes) -> None:
        """A message arrives and there is room: a sleeping receiver gets it, else the queue (do_mq_timedsend)."""
        if self.receivers:
            receiver = self.receivers.pop(0)
            receiver.message = priority, text
            receiver.finish()
        else:
            self.insert(priority, text)
            if self.messages == 1 and self.notification is not None:
                self._notify(task)
            self.queue.wake(POLLIN | POLLRDNORM)
        self.atime = self.mtime = self.ctime = time.time_ns()

    def fetch(self) -> tuple[int, bytes]:
        """The next message, and the first sleeping sender's takes its room (do_mq_timedreceive)."""
        message = self.take()
        if self.senders:
            sender = self.senders.pop(0)
            assert sender.message is not None
            self.insert(*sender.message)
            sender.finish()
        else:
            self.queue.wake(POLLOUT | POLLWRNORM)
        self.atime = self.mtime = self.ctime = time.time_ns()
        return message

    async def send_wait(self, task: Task, priority: int, text: bytes, deadline: int | None) -> int:
        """Sleep until a receiver has made room for the message; ETIMEDOUT."""
        waiter = Waiter(task.nice, (priority, text))
        try:
            return await _sleep(task, self.senders, waiter, deadline)
        finally:
            if not waiter.done:
                self.space.held -= len(text)

    async def receive_wait(self, task: Task, deadline: int | None) -> tuple[int, bytes] | int:
        """Sleep until a message is handed over; -ETIMEDOUT."""
        waiter = Waiter(task.nice, None)
        result = await _sleep(task, self.receivers, waiter, deadline)
        return result if waiter.message is None else waiter.message

    # -- notification
    def _notify(self, task: Task) -> None:
        """The queue is no longer empty: tell who registered, once (__do_notify). `task` is the sender."""
        told = self.notification
        assert told is not None
        self.notification = None
        if told.kind == SIGEV_SIGNAL:
            if told.signo and not told.owner.zombie:
                from kvmsentry.kernel import signals

                info = SigInfo(told.signo, SI_MESGQ, pid=task.process.pid, uid=task.creds.uid, value=told.value)
                try:
                    signals.send_process(told.owner, info)
                except Errno:
                    pass  # RLIMIT_SIGPENDING: the signal is lost, as there
        told.tell(NOTIFY_WOKENUP)

    def unregister(self) -> None:
        """The registration ends without a message (remove_notification)."""
        if self.notification is not None:
            told, self.notification = self.notification, None
            told.tell(NOTIFY_REMOVED)

    # -- as a file
    def open(self, task: Task, path: Path | None, flags: int) -> QueueFile:
        """A descriptor of the queue."""
        return QueueFile(self, path, flags)

    def truncate(self, size: int) -> None:
        """The size of a queue is a number without meaning (simple_setattr)."""
        self.size = size

    def evict(self) -> None:
        """Without a name and without a descriptor it is gone (mqueue_evict_inode)."""
        if self.nlink or self.opens:
            return
        left = self.space.charged[self.payer] - self.charge
        if left:
            self.space.charged[self.payer] = left
        else:
            del self.space.charged[self.payer]
        self.space.count -= 1
        self.space.held -= self.bytes
        self.levels, self.priorities, self.messages, self.bytes = {}, [], 0, 0

    def text(self) -> bytes:
        """What read(2) gives (mqueue_read_file)."""
        told = self.notification
        return b"QSIZE:%-10d NOTIFY:%-5d SIGNO:%-5d NOTIFY_PID:%-6d\n" % (
            self.bytes,
            told.kind if told is not None else 0,
            told.signo if told is not None and told.kind == SIGEV_SIGNAL else 0,
            told.owner.pid if told is not None else 0,
        )


async def _sleep(task: Task, waiters: list[Waiter], waiter: Waiter, deadline: int | None) -> int:
    """wq_sleep: 0 when the other side has finished with `waiter`, -ETIMEDOUT; a signal that comes later than that no
    longer counts."""
    _enqueue(waiters, waiter)
    try:
        while not waiter.done:
            if not await park(task, "mqueue", waiter.queue, deadline=deadline) and not waiter.done:
                return -errno.ETIMEDOUT
    except Errno:
        if not waiter.done:
            raise
    finally:
        if not waiter.done:
            waiters.remove(waiter)
    return 0


class QueueFile(File):
    """A message queue descriptor."""

    seekable = True
    flushes = True
    inode: QueueInode

    def __init__(self, inode: QueueInode, path: Path | None, flags: int) -> None:
        super().__init__(inode, path, flags)
        self.queue = inode.queue
        inode.opens += 1

    def pread(self, views: list[memoryview], pos: int) -> int:
        """The status line."""
        text = self.inode.text()[pos:]
        self.inode.atime = self.inode.ctime = time.time_ns()
        return scatter(views, text) if text else 0

    def poll(self) -> int:
        """POLLIN with a message, POLLOUT with room for one."""
        inode = self.inode
        mask = POLLIN | POLLRDNORM if inode.messages else 0
        return mask | POLLOUT | POLLWRNORM if inode.messages < inode.max_messages else mask

    def flush(self, table: FdTable) -> None:
        """A descriptor was closed: with any of its owner's the registration ends (mqueue_flush_file)."""
        told = self.inode.notification
        if told is not None and (told.table is table or told.owner.leader.files is table):
            self.inode.unregister()

    def release(self) -> None:
        """The last holder is gone."""
        self.inode.opens -= 1
        self.inode.evict()

    def label(self) -> bytes:
        """What /proc/PID/fd/N shows."""
        return b"/" + self.inode.name + (b"" if self.inode.nlink else b" (deleted)")


class RootInode(Inode):
    """The directory of all queues."""

    def __init__(self, sb: SuperBlock, space: QueueSpace) -> None:
        super().__init__(sb, st.S_IFDIR | st.S_ISVTX | 0o777)
        self.size = 0
        self.space = space
        self.entries: dict[bytes, QueueInode] = {}

    def lookup(self, name: bytes) -> Inode:
        """ENOENT."""
        inode = self.entries.get(name)
        if inode is None:
            raise Errno(errno.ENOENT)
        return inode

    def add(self, name: bytes, mode: int, creds: Credentials, attr: tuple[int, int] | None, limit: int) -> QueueInode:
        """A new queue; ENOSPC over queues_max, EMFILE over `limit` (RLIMIT_MSGQUEUE), EINVAL for its attributes."""
        space = self.space
        if space.count >= space.number("queues_max") and not creds.capable(cap.SYS_RESOURCE):
            raise Errno(errno.ENOSPC)
        gid = self.gid if self.mode & st.S_ISGID else creds.fsgid
        inode = self.entries[name] = QueueInode(space, mode, creds, gid, attr, limit)
        inode.name = name
        self.size += DIRENT_SIZE
        self.atime = self.mtime = self.ctime = time.time_ns()
        return inode

    def create(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """open(2) with O_CREAT in the file system: a queue with the default attributes."""
        return self.add(name, mode, creds, None, MSGQUEUE_DEFAULT)

    def mkdir(self, name: bytes, mode: int, creds: Credentials) -> Inode:
        """EPERM: only queues are here. The same holds for the next four."""
        raise Errno(errno.EPERM)

    def mknod(self, name: bytes, mode: int, rdev: int, creds: Credentials) -> Inode:
        """EPERM."""
        raise Errno(errno.EPERM)

    def symlink(self, name: bytes, target: bytes, creds: Credentials) -> Inode:
        """EPERM."""
        raise Errno(errno.EPERM)

    def link(self, name: bytes, inode: Inode) -> Inode:
        """EPERM."""
        raise Errno(errno.EPERM)

    def rename(
        self, name: bytes, inode: Inode, target: Inode, new_name: bytes, replaced: Inode | None, flags: int
    ) -> None:
        """EPERM."""
        raise Errno(errno.EPERM)

    def unlink(self, name: bytes, inode: Inode) -> None:
        """mq_unlink(3): the queue lives on while somebody has it open."""
        assert isinstance(inode, QueueInode)
        del self.entries[name]
        inode.nlink -= 1
        self.size -= DIRENT_SIZE
        self.atime = self.mtime = self.ctime = time.time_ns()
        inode.evict()

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """(name, inode number, DT_REG)."""
        return [(name, inode.ino, inode.mode >> 12 & 15) for name, inode in self.entries.items()]


class MqueueSuper(SuperBlock):
    """The file system of one IPC namespace's queues."""

    fstype = "mqueue"
    magic = MQUEUE_MAGIC
    caching = False  # mq_open and mq_unlink change it behind the name cache's back

    def __init__(self, space: QueueSpace) -> None:
        super().__init__()
        self.root: RootInode = RootInode(self, space)


class QueueSpace:
    """The queues of one IPC namespace. `charged` are the bytes of RLIMIT_MSGQUEUE by user."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.count = 0
        self.held = 0  # bytes of all messages, also of those that sleepers want to send
        self.charged: dict[int, int] = kernel.__dict__.setdefault("mqueue_charged", {})
        self.super = MqueueSuper(self)

    def number(self, name: str) -> int:
        """A value of /proc/sys/fs/mqueue."""
        from kvmsentry.fs.proc.sysctl import sysctl

        return sysctl(self.kernel).number(f"fs/mqueue/{name}")


def space_in(kernel: Kernel, ipc: sysvipc.IpcNamespace) -> QueueSpace:
    """The queues of the IPC namespace `ipc`, made on first use."""
    found: QueueSpace | None = ipc.__dict__.get("mqueues")
    if found is None:
        found = ipc.__dict__["mqueues"] = QueueSpace(kernel)
    return found


def first_space(kernel: Kernel) -> QueueSpace:
    """The queues of the namespace that the sandbox boots with."""
    return space_in(kernel, sysvipc.first(kernel))


def space_of(task: Any) -> QueueSpace:
    """The queues that `task` sees."""
    return space_in(task.kernel, sysvipc.namespace(task))


def limit_of(task: Task) -> int:
    """RLIMIT_MSGQUEUE of `task`, in bytes."""
    return task.rlimit(RLIMIT_MSGQUEUE)
