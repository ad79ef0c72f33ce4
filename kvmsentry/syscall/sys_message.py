"""Messages through sockets: sendto, recvfrom, sendmsg, recvmsg and their plural forms.

A message is fetched, checked and sent in that order; a receiver's files become descriptors only when the message was
taken, and are given back when the application's buffers turn out to be bad.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.vfs import O_NONBLOCK, File
from kvmsentry.kernel.task import RLIMIT_NOFILE
from kvmsentry.net import scm
from kvmsentry.net.socket import Control, Received, Socket, check_credentials, shown_credentials
from kvmsentry.syscall import abi_net as abi
from kvmsentry.syscall.abi_time import TIMESPEC
from kvmsentry.syscall.sys_io import BIG, IOV_MAX, MAX_RW_COUNT, broken_pipe, check_range, fetch_iov, iov_views
from kvmsentry.syscall.sys_net import IN, OUT, deadline_of, fetch_name, socket_of, store_name, wait_for
from kvmsentry.syscall.table import Fd, Int, Size, UInt, UserPtr, syscall

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

Fetch = Callable[[int], list[memoryview]]  # bytes already done -> views of what is left
Finish = Callable[[Received, int], int]  # what came, bytes of earlier pieces -> the call's result

EAGAIN = -errno.EAGAIN
NAME_UNTIL = 8  # offsets in struct msghdr of what recvmsg writes
CONTROLLEN_AT, FLAGS_AT = 40, 48


# -- sending ---------------------------------------------------------------------------------------------------------
def transmit(task: Task, sock: Socket, fetch: Fetch, total: int, name: bytes | None, control: Control | None,
             flags: int) -> Any:  # fmt: skip
    """Send `total` bytes: the result, or a coroutine that sleeps for room. The references of `control.files` are used
    up in every case."""
    try:
        n = sock.send(task, fetch(0), name, control, flags)
    except BaseException as error:
        if control is not None and control.files:
            scm.drop(control.files)
        if isinstance(error, Errno) and error.errno == errno.EPIPE and sock.stream and not flags & abi.MSG_NOSIGNAL:
            broken_pipe(task)
        raise
    if n == total or (n >= 0 and not sock.stream):
        return n
    if n < 0 and n != EAGAIN:
        if control is not None and control.files:
            scm.drop(control.files)
        if n == -errno.EPIPE and sock.stream and not flags & abi.MSG_NOSIGNAL:
            broken_pipe(task)
        return n
    if flags & abi.MSG_DONTWAIT or sock.flags & O_NONBLOCK:
        if n < 0 and control is not None and control.files:
            scm.drop(control.files)
        return n
    return _transmit_wait(task, sock, fetch, total, name, control, flags, n)


async def _transmit_wait(task: Task, sock: Socket, fetch: Fetch, total: int, name: bytes | None,
                         control: Control | None, flags: int, n: int) -> int:  # fmt: skip
    deadline = deadline_of(task, sock.write_timeout)
    done = max(n, 0)
    if n > 0:
        control = None  # travelled with the first bytes
    sock.get()
    try:
        while True:
            if n == EAGAIN and not await wait_for(task, "send", sock.send_queue(name), OUT, deadline):
                return done or EAGAIN
            n = sock.send(task, fetch(done), name, control, flags)
            if n == EAGAIN:
                continue
            if n < 0:
                if n == -errno.EPIPE and not done and sock.stream and not flags & abi.MSG_NOSIGNAL:
                    broken_pipe(task)
                return done or n
            control = None
            done += n
            if done >= total or not sock.stream or not n:
                return done
    except Errno as error:
        if done:
            return done
        if error.errno == errno.EPIPE and sock.stream and not flags & abi.MSG_NOSIGNAL:
            broken_pipe(task)
        raise
    finally:
        if control is not None and control.files:
            scm.drop(control.files)
        sock.put()


@syscall(44)
def sendto(task: Task, fd: Fd, buf: UserPtr, count: Size, flags: UInt, addr: UserPtr, length: Int) -> Any:
    """sendto(2), and send(2) with it."""
    count = min(count, MAX_RW_COUNT)
    check_range(buf, count)  # import_ubuf, before the descriptor
    sock = socket_of(task, fd)
    name = fetch_name(task, addr, length) if addr else None
    views = task.mm.views
    if sock.stream and count > BIG:
        return transmit(task, sock, lambda done: views(buf + done, min(count - done, BIG), False), count, name, None,
                        flags)  # fmt: skip
    return transmit(task, sock, lambda done: views(buf + done, count - done, False), count, name, None, flags)


def fetch_control(task: Task, sock: Socket, at: int, length: int) -> Control | None:
    """The ancillary data of a message that is to be sent; EINVAL for malformed ones, EBADF, EPERM (scm_send)."""
    if not length:
        return None
    if length > abi.CONTROL_MAX:
        raise Errno(errno.ENOBUFS)
    data = task.mm.read(at, length)
    control = Control()
    local = sock.family == abi.AF_UNIX
    position = 0
    try:
        while len(data) - position >= abi.CMSG.size:
            size, level, kind = abi.CMSG.unpack_from(data, position)
            if not abi.CMSG.size <= size <= len(data) - position:
                raise Errno(errno.EINVAL)
            value = data[position + abi.CMSG.size : position + size]
            position += size + 7 & ~7
            if level == abi.SOL_SOCKET and kind == abi.SCM_RIGHTS:
                if local:
                    _fetch_rights(task, control, value)
            elif level == abi.SOL_SOCKET and kind == abi.SCM_CREDENTIALS:
                if len(value) != abi.UCRED.size:
                    raise Errno(errno.EINVAL)
                creds = abi.UCRED.unpack(value)
                if local:
                    control.creds = check_credentials(task, *creds)
            elif local:
                if level == abi.SOL_SOCKET:
                    raise Errno(errno.EINVAL)
            else:
                control.raw.append((level, kind, value))
        if control.files:
            scm.check_room(task, len(control.files))
    except Errno:
        scm.drop(control.files)
        raise
    return control


def _fetch_rights(task: Task, control: Control, value: bytes) -> None:
    count = len(value) // 4
    if len(control.files) + count > abi.SCM_MAX_FD:
        raise Errno(errno.EINVAL)
    for index in range(count):
        control.files.append(task.files.get_io(abi.INT.unpack_from(value, 4 * index)[0]).get())


def _iov(task: Task, vec: int, count: int) -> tuple[list[tuple[int, int]], int]:
    if count > IOV_MAX:
        raise Errno(errno.EMSGSIZE)
    return fetch_iov(task, vec, count)


def _no_compat(flags: int) -> None:
    """EINVAL for the kernel's own mark of 32-bit callers (net/socket.c)."""
    if flags & abi.MSG_CMSG_COMPAT:
        raise Errno(errno.EINVAL)


def _send_one(task: Task, sock: Socket, at: int, flags: int) -> Any:
    """sendmsg of the struct msghdr at `at`."""
    name_at, name_len, vec, count, control_at, control_len, _ = abi.MSGHDR.unpack(task.mm.read(at, abi.MSGHDR_SIZE))
    name = None
    if name_at and name_len:
        if name_len & 0x80000000:
            raise Errno(errno.EINVAL)
        name = fetch_name(task, name_at, min(name_len, abi.SOCKADDR_MAX))
    iov, total = _iov(task, vec, count)
    if control_len > 0x7FFFFFFF:
        raise Errno(errno.ENOBUFS)
    control = fetch_control(task, sock, control_at, control_len)
    return transmit(task, sock, lambda done: iov_views(task, iov, False, done), total, name, control, flags)


@syscall(46)
def sendmsg(task: Task, fd: Fd, msg: UserPtr, flags: UInt) -> Any:
    """sendmsg(2)."""
    _no_compat(flags)
    return _send_one(task, socket_of(task, fd), msg, flags)


@syscall(307)
def sendmmsg(task: Task, fd: Fd, msgs: UserPtr, count: UInt, flags: UInt) -> Any:
    """sendmmsg(2)."""
    _no_compat(flags)
    sock = socket_of(task, fd)
    count = min(count, IOV_MAX)
    done = 0
    while done < count:
        at = msgs + done * abi.MMSGHDR_SIZE
        try:
            n = _send_one(task, sock, at, flags)
            if not isinstance(n, int):
                return _sendmmsg_rest(task, sock, msgs, count, flags, done, n)
            if n >= 0:
                task.mm.write(at + abi.MSGHDR_SIZE, abi.UINT.pack(n))
        except Errno as error:
            n = -error.errno
        if n < 0:
            return done or n
        done += 1
    return done


async def _sendmmsg_rest(task: Task, sock: Socket, msgs: int, count: int, flags: int, done: int, pending: Any) -> int:
    while done < count:
        at = msgs + done * abi.MMSGHDR_SIZE
        try:
            n = pending if pending is not None else _send_one(task, sock, at, flags)
            pending = None
            if not isinstance(n, int):
                n = await n
            if n >= 0:
                task.mm.write(at + abi.MSGHDR_SIZE, abi.UINT.pack(n))
        except Errno as error:
            if not done:
                raise
            n = -error.errno
        if n < 0:
            return done or n
        done += 1
    return done


# -- receiving -------------------------------------------------------------------------------------------------------
def receive(task: Task, sock: Socket, fetch: Fetch, total: int, flags: int, finish: Finish) -> Any:
    """Receive a message: the result, or a coroutine that sleeps for one."""
    r = sock.recv(task, fetch(0), flags)
    wait = not (flags & (abi.MSG_DONTWAIT | abi.MSG_ERRQUEUE) or sock.flags & O_NONBLOCK)
    if isinstance(r, int):
        if r == EAGAIN and wait:
            return _receive_wait(task, sock, fetch, total, flags, finish, None)
        return r
    everything = flags & (abi.MSG_WAITALL | abi.MSG_PEEK) == abi.MSG_WAITALL and sock.stream and wait
    if everything and 0 < r.n < total and not r.files:
        return _receive_wait(task, sock, fetch, total, flags, finish, r)
    return finish(r, 0)


async def _receive_wait(task: Task, sock: Socket, fetch: Fetch, total: int, flags: int, finish: Finish,
                        first: Received | None) -> int:  # fmt: skip
    deadline = deadline_of(task, sock.read_timeout)
    everything = flags & abi.MSG_WAITALL and sock.stream and not flags & abi.MSG_PEEK
    done = first.n if first is not None else 0
    last = first
    sock.get()
    try:
        while True:
            r = sock.recv(task, fetch(done), flags) if last is not None else EAGAIN
            if r == EAGAIN:
                try:
                    if not await wait_for(task, "recv", sock.queue, IN, deadline):
                        return finish(last, done - last.n) if last is not None else EAGAIN
                except Errno:
                    if last is None:
                        raise
                    return finish(last, done - last.n)
                r = sock.recv(task, fetch(done), flags)
                if r == EAGAIN:
                    continue
            if isinstance(r, int):
                if last is not None:
                    return finish(last, done - last.n)
                return r
            if last is not None:
                r.control = r.control or last.control
                r.name = r.name or last.name
            done += r.n
            last = r
            if not everything or not r.n or done >= total or r.files:
                return finish(r, done - r.n)
    finally:
        sock.put()


@syscall(45)
def recvfrom(task: Task, fd: Fd, buf: UserPtr, count: Size, flags: UInt, addr: UserPtr, length_at: UserPtr) -> Any:
    """recvfrom(2), and recv(2) with it."""
    count = min(count, MAX_RW_COUNT)
    check_range(buf, count)  # import_ubuf, before the descriptor
    sock = socket_of(task, fd)
    views = task.mm.views
    if not flags and not addr and 0 < count <= BIG and sock.stream:
        n = sock.read(views(buf, count, True))
        if n != EAGAIN or sock.flags & O_NONBLOCK:
            return n

    def fetch(done: int) -> list[memoryview]:
        return views(buf + done, min(count - done, BIG), True)

    def finish(r: Received, before: int) -> int:
        if r.files:
            scm.drop(r.files)
        if addr:
            store_name(task, r.name, addr, length_at)
        return r.n + before

    return receive(task, sock, fetch, count, flags, finish)


def _store_control(task: Task, r: Received, at: int, room: int, flags: int) -> tuple[int, int]:
    """Write ancillary data; (bytes used, flags to add). Files become descriptors here, those for which there is no room
    are given back (put_cmsg, scm_detach_fds)."""
    used = added = 0
    for level, kind, data in r.control or ():
        if kind == abi.SCM_CREDENTIALS and level == abi.SOL_SOCKET and len(data) == abi.UCRED.size:
            data = abi.UCRED.pack(*shown_credentials(task, abi.UCRED.unpack(data)))
        left = room - used
        if left < abi.CMSG.size:
            added |= abi.MSG_CTRUNC
            continue
        size = abi.CMSG.size + len(data)
        if size > left:
            added |= abi.MSG_CTRUNC
            size = left
        task.mm.write(at + used, abi.CMSG.pack(size, level, kind) + data[: size - abi.CMSG.size])
        used += min(size + 7 & ~7, left)
    if r.files:
        files, r.files = r.files, None
        rest, used_by_files = _store_files(task, files, at + used, room - used, flags)
        used += used_by_files
        if rest:
            added |= abi.MSG_CTRUNC
            scm.drop(rest)
    return used, added


def _store_files(task: Task, files: list[File], at: int, room: int, flags: int) -> tuple[list[File], int]:
    most = (room - abi.CMSG.size) // 4 if room > abi.CMSG.size else 0
    fds: list[int] = []
    cloexec = bool(flags & abi.MSG_CMSG_CLOEXEC)
    limit = task.rlimit(RLIMIT_NOFILE)
    try:
        for file in files[:most]:
            fd = task.files.install(file, limit, 0, cloexec)
            fds.append(fd)
            task.mm.write(at + abi.CMSG.size + 4 * len(fds) - 4, abi.INT.pack(fd))
    except Errno as error:
        if error.errno == errno.EFAULT:
            task.files.remove(fds.pop()).put()
            files = files[: len(fds)] + files[len(fds) + 1 :]
    if not fds:
        return files, 0
    size = abi.CMSG.size + 4 * len(fds)
    task.mm.write(at, abi.CMSG.pack(size, abi.SOL_SOCKET, abi.SCM_RIGHTS))
    return files[len(fds) :], min(size + 7 & ~7, room)


def _recv_one(task: Task, sock: Socket, at: int, flags: int) -> Any:
    """recvmsg into the struct msghdr at `at`."""
    name_at, name_len, vec, count, control_at, control_len, _ = abi.MSGHDR.unpack(task.mm.read(at, abi.MSGHDR_SIZE))
    if name_len & 0x80000000 and name_at:
        raise Errno(errno.EINVAL)
    iov, total = _iov(task, vec, count)
    if sum(length for _, length in iov) > BIG and sock.stream:
        iov, total = _first(iov, BIG)
    room = control_len if control_at else 0

    def finish(r: Received, before: int) -> int:
        try:
            out = r.flags
            used = 0
            if r.control or r.files:
                used, added = _store_control(task, r, control_at, room, flags)
                out |= added
            if name_at:
                task.mm.write(name_at, r.name[:name_len])
                task.mm.write(at + NAME_UNTIL, abi.INT.pack(len(r.name)))
            task.mm.write(at + CONTROLLEN_AT, used.to_bytes(8, "little"))
            task.mm.write(at + FLAGS_AT, abi.UINT.pack(out | flags & abi.MSG_CMSG_CLOEXEC))
        finally:
            if r.files:
                scm.drop(r.files)
        return r.n + before

    return receive(task, sock, lambda done: iov_views(task, iov, True, done), total, flags, finish)


def _first(iov: list[tuple[int, int]], limit: int) -> tuple[list[tuple[int, int]], int]:
    """The part of `iov` that holds the first `limit` bytes."""
    out = []
    left = limit
    for base, length in iov:
        if left:
            out.append((base, min(length, left)))
            left -= min(length, left)
    return out, limit - left


@syscall(47)
def recvmsg(task: Task, fd: Fd, msg: UserPtr, flags: UInt) -> Any:
    """recvmsg(2)."""
    _no_compat(flags)
    return _recv_one(task, socket_of(task, fd), msg, flags)


@syscall(299)
def recvmmsg(task: Task, fd: Fd, msgs: UserPtr, count: UInt, flags: UInt, timeout: UserPtr) -> Any:
    """recvmmsg(2); as on Linux the timeout is looked at after each message only."""
    _no_compat(flags)
    deadline = None
    if timeout:
        seconds, nanos = task.mm.read_struct(TIMESPEC, timeout)
        if seconds < 0 or not 0 <= nanos < 1_000_000_000:
            raise Errno(errno.EINVAL)
        deadline = task.kernel.now() + seconds * 1_000_000_000 + nanos
    sock = socket_of(task, fd)
    return _recvmmsg(task, sock, msgs, min(count, IOV_MAX), flags, timeout, deadline)


async def _recvmmsg(task: Task, sock: Socket, msgs: int, count: int, flags: int, timeout: int,
                    deadline: int | None) -> int:  # fmt: skip
    done = 0
    sock.get()
    try:
        while done < count:
            at = msgs + done * abi.MMSGHDR_SIZE
            try:
                n = _recv_one(task, sock, at, flags & ~abi.MSG_WAITFORONE)
                if not isinstance(n, int):
                    n = await n
                if n >= 0:
                    task.mm.write(at + abi.MSGHDR_SIZE, abi.UINT.pack(n))
            except Errno as error:
                if not done:
                    raise
                n = -error.errno
            if n < 0:
                return done or n
            done += 1
            if flags & abi.MSG_WAITFORONE:
                flags |= abi.MSG_DONTWAIT
            if deadline is not None:
                left = max(0, deadline - task.kernel.now())
                task.mm.write_struct(TIMESPEC, timeout, left // 1_000_000_000, left % 1_000_000_000)
                if not left:
                    break
        return done
    finally:
        sock.put()
