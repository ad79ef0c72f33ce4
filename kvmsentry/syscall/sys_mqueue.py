"""POSIX message queues: mq_open(3), mq_unlink(3), mq_send(3), mq_receive(3), mq_notify(3), mq_getattr(3)."""

from __future__ import annotations

import errno
import struct
import time
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs import ops
from kvmsentry.fs.mqueue import (
    HELD_MOST,
    MQ_PRIO_MAX,
    SIGEV_NONE,
    SIGEV_SIGNAL,
    SIGEV_THREAD,
    Notification,
    QueueFile,
    QueueInode,
    RootInode,
    limit_of,
    space_of,
)
from kvmsentry.fs.vfs import (
    MAY_EXEC,
    MAY_READ,
    MAY_WRITE,
    NAME_MAX,
    O_ACCMODE,
    O_CREAT,
    O_EXCL,
    O_NONBLOCK,
    PATH_MAX,
    permission,
)
from kvmsentry.kernel.task import NSIG, Task
from kvmsentry.syscall.abi_time import read_timespec
from kvmsentry.syscall.sys_io import install
from kvmsentry.syscall.table import Fd, Mode, OpenFlags, Size, UInt, UserPtr, syscall

MQ_ATTR = struct.Struct("<4q32x")  # struct mq_attr: flags, maxmsg, msgsize, curmsgs (uapi/linux/mqueue.h)
SIGEVENT = struct.Struct("<Qii48x")  # struct sigevent: value, signo, notify
NOTIFY_COOKIE_LEN = 32
_ACCESS = (MAY_READ, MAY_WRITE, MAY_READ | MAY_WRITE)


def _name(task: Task, pointer: int) -> bytes:
    """The name without its slash, which the C library has taken off; EACCES for what is no single name
    (lookup_one_len)."""
    name = task.mm.read_cstring(pointer, PATH_MAX)
    if not name:
        raise Errno(errno.ENOENT)
    if name in (b".", b"..") or b"/" in name:
        raise Errno(errno.EACCES)
    if len(name) > NAME_MAX:
        raise Errno(errno.ENAMETOOLONG)
    return name


@syscall(240)
def mq_open(task: Task, name: UserPtr, oflag: OpenFlags, mode: Mode, attr: UserPtr) -> int:
    """mq_open(3)."""
    wanted = MQ_ATTR.unpack(task.mm.read(attr, MQ_ATTR.size))[1:3] if attr else None
    text = _name(task, name)
    root: RootInode = space_of(task).super.root
    inode = root.entries.get(text)
    if inode is None:
        if not oflag & O_CREAT:
            return -errno.ENOENT
        permission(root, MAY_WRITE | MAY_EXEC, task.creds)
        inode = root.add(text, mode & 0o7777 & ~task.fs.umask, task.creds, wanted, limit_of(task))
    else:
        if oflag & (O_CREAT | O_EXCL) == O_CREAT | O_EXCL:
            return -errno.EEXIST
        if oflag & O_ACCMODE == O_ACCMODE:
            return -errno.EINVAL
        permission(inode, _ACCESS[oflag & O_ACCMODE], task.creds)
    return install(task, inode.open(task, None, oflag), 0, True)


@syscall(241)
def mq_unlink(task: Task, name: UserPtr) -> int:
    """mq_unlink(3)."""
    text = _name(task, name)
    root: RootInode = space_of(task).super.root
    inode = root.lookup(text)
    ops._may_delete(root, inode, task.creds, False)
    root.unlink(text, inode)
    return 0


def _deadline(task: Task, pointer: int) -> int | None:
    """The absolute CLOCK_REALTIME timeout at `pointer`, on the kernel's clock."""
    return read_timespec(task.mm, pointer) - task.kernel.monotonic_to_real() if pointer else None


def _queue(task: Task, fd: int) -> QueueFile:
    file = task.files.files.get(fd)
    if not isinstance(file, QueueFile):
        raise Errno(errno.EBADF)
    return file


@syscall(242)
def mq_timedsend(task: Task, mqdes: Fd, msg: UserPtr, length: Size, priority: UInt, timeout: UserPtr) -> Any:
    """mq_timedsend(3)."""
    deadline = _deadline(task, timeout)
    if priority >= MQ_PRIO_MAX:
        return -errno.EINVAL
    file = _queue(task, mqdes)
    if not file.writable:
        return -errno.EBADF
    inode = file.inode
    if length > inode.message_size:
        return -errno.EMSGSIZE
    if inode.space.held + length > HELD_MOST:
        return -errno.ENOMEM
    text = task.mm.read(msg, length) if length else b""
    if inode.messages < inode.max_messages:
        inode.space.held += length
        inode.post(task, priority, text)
        return 0
    if file.flags & O_NONBLOCK:
        return -errno.EAGAIN
    inode.space.held += length
    return _held(file, inode.send_wait(task, priority, text, deadline))


async def _held(file: QueueFile, work: Any) -> int:
    """The file stays while somebody sleeps in it, whoever closes the descriptor."""
    file.get()
    try:
        result: int = await work
        return result
    finally:
        file.put()


@syscall(243)
def mq_timedreceive(task: Task, mqdes: Fd, msg: UserPtr, length: Size, priority: UserPtr, timeout: UserPtr) -> Any:
    """mq_timedreceive(3)."""
    deadline = _deadline(task, timeout)
    file = _queue(task, mqdes)
    if not file.readable:
        return -errno.EBADF
    inode = file.inode
    if length < inode.message_size:
        return -errno.EMSGSIZE
    if inode.messages:
        return _deliver(task, inode, inode.fetch(), msg, priority)
    if file.flags & O_NONBLOCK:
        return -errno.EAGAIN
    return _held(file, _receive_later(task, inode, msg, priority, deadline))


async def _receive_later(task: Task, inode: QueueInode, msg: int, priority: int, deadline: int | None) -> int:
    got = await inode.receive_wait(task, deadline)
    return got if isinstance(got, int) else _deliver(task, inode, got, msg, priority)


def _deliver(task: Task, inode: QueueInode, message: tuple[int, bytes], msg: int, priority: int) -> int:
    """Into user memory; what can't be stored is lost, as there."""
    level, text = message
    inode.space.held -= len(text)
    if priority:
        task.mm.write_u32(priority, level)
    if text:
        task.mm.write(msg, text)
    return len(text)


@syscall(244)
def mq_notify(task: Task, mqdes: Fd, sevp: UserPtr) -> int:
    """mq_notify(3). SIGEV_THREAD is the C library's: the value points at a cookie of 32 bytes, the signal number is a
    netlink socket, on which the cookie comes back with its last byte saying why."""
    if not sevp:
        inode = _queue(task, mqdes).inode
        if inode.notification is not None and inode.notification.owner is task.process:
            inode.unregister()
            inode.atime = inode.ctime = time.time_ns()
        return 0
    value, signo, kind = SIGEVENT.unpack(task.mm.read(sevp, SIGEVENT.size))
    if kind not in (SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD) or (kind == SIGEV_SIGNAL and not 0 <= signo <= NSIG):
        return -errno.EINVAL
    thread = None
    if kind == SIGEV_THREAD:
        cookie = task.mm.read(value, NOTIFY_COOKIE_LEN)
        thread = _netlink(task, signo), cookie
    inode = _queue(task, mqdes).inode
    if inode.notification is not None:
        return -errno.EBUSY
    if thread is not None:
        thread[0].get()
    inode.notification = Notification(task, kind, signo, value, thread)
    inode.atime = inode.ctime = time.time_ns()
    return 0


def _netlink(task: Task, fd: int) -> Any:
    """netlink_getsockbyfd: EBADF, ENOTSOCK, EINVAL."""
    from kvmsentry.net.netlink import NetlinkSocket
    from kvmsentry.syscall.sys_net import socket_of

    sock = socket_of(task, fd)
    if not isinstance(sock, NetlinkSocket):
        raise Errno(errno.EINVAL)
    return sock


@syscall(245)
def mq_getsetattr(task: Task, mqdes: Fd, new: UserPtr, old: UserPtr) -> int:
    """mq_getattr(3), mq_setattr(3): of a queue that is there only O_NONBLOCK can be changed."""
    flags = MQ_ATTR.unpack(task.mm.read(new, MQ_ATTR.size))[0] if new else 0
    if flags & ~O_NONBLOCK:
        return -errno.EINVAL
    file = _queue(task, mqdes)
    inode = file.inode
    before = file.flags & O_NONBLOCK
    if new:
        file.flags = file.flags & ~O_NONBLOCK | flags
        inode.atime = inode.ctime = time.time_ns()
    if old:
        task.mm.write(old, MQ_ATTR.pack(before, inode.max_messages, inode.message_size, inode.messages))
    return 0
