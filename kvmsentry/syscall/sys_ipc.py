"""System V IPC calls: msg*, sem*, shm*."""

from __future__ import annotations

import errno
import struct
import time
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel.sysvipc import (
    IPC_NOWAIT,
    MSGMAX,
    MSGMNB,
    SEMMSL,
    SEMOPM,
    SEMVMX,
    IpcObject,
    Message,
    MessageQueue,
    Segment,
    SemaphoreSet,
    ShmMemory,
    namespace,
)
from kvmsentry.kernel.task import Task
from kvmsentry.kernel.traps import park
from kvmsentry.syscall.abi_time import read_timespec
from kvmsentry.syscall.table import Int, Long, Size, UInt, ULong, UserPtr, syscall

IPC_RMID, IPC_SET, IPC_STAT, IPC_INFO = 0, 1, 2, 3
MSG_NOERROR, MSG_EXCEPT, MSG_COPY = 0o10000, 0o20000, 0o40000
IPC_PERM = struct.Struct("<iIIIIIH2xQQ")  # struct ipc64_perm: key uid gid cuid cgid mode seq (48 bytes)
MSQID_DS = struct.Struct("<48sqqqQQQii16x")
SEMID_DS = struct.Struct("<48sqQqQQ16x")
SHMID_DS = struct.Struct("<48sQqqqiiQ16x")
SEMBUF = struct.Struct("<Hhh")


def _perm(thing: IpcObject) -> bytes:
    return IPC_PERM.pack(thing.key, thing.uid, thing.gid, thing.cuid, thing.cgid, thing.mode, thing.seq, 0, 0)


def _set(task: Task, thing: IpcObject, raw: bytes) -> None:
    thing.own(task.creds)
    _, uid, gid, _, _, mode, *_ = IPC_PERM.unpack_from(raw)
    thing.uid, thing.gid, thing.mode = uid, gid, mode & 0o777
    thing.ctime = int(time.time())


# -- message queues --------------------------------------------------------------------------------
@syscall(68)
def msgget(task: Task, key: Int, msgflg: Int) -> int:
    return namespace(task).messages.get(
        key, msgflg, task.creds, lambda: MessageQueue(key, msgflg, task.creds), lambda queue: None
    )


@syscall(69)
def msgsnd(task: Task, msqid: Int, msgp: UserPtr, msgsz: Size, msgflg: Int) -> Any:
    if msgsz > MSGMAX or msqid < 0:
        return -errno.EINVAL
    kind = task.mm.read_u64(msgp)
    if not 0 < kind < 1 << 63:
        return -errno.EINVAL
    text = task.mm.read(msgp + 8, msgsz)
    return _send(task, namespace(task).messages.find(msqid), Message(kind, text), msgflg)


async def _send(task: Task, queue: MessageQueue, message: Message, flags: int) -> int:
    while True:
        if queue.removed:
            return -errno.EIDRM
        queue.permit(2, task.creds)
        if queue.bytes + len(message.text) <= queue.max_bytes and len(queue.messages) < queue.max_bytes:
            queue.messages.append(message)
            queue.bytes += len(message.text)
            queue.stime, queue.lspid = int(time.time()), task.process.pid
            queue.receivers.wake()
            return 0
        if flags & IPC_NOWAIT:
            return -errno.EAGAIN
        try:
            await park(task, "msgsnd", queue.senders)
        except Errno:
            return -errno.EINTR


@syscall(70, partial="no MSG_COPY")
def msgrcv(task: Task, msqid: Int, msgp: UserPtr, msgsz: Size, msgtyp: Long, msgflg: Int) -> Any:
    if msqid < 0 or msgsz >= 1 << 63:
        return -errno.EINVAL
    if msgflg & MSG_COPY:
        return -errno.ENOSYS
    return _receive(task, namespace(task).messages.find(msqid), msgp, msgsz, msgtyp, msgflg)


async def _receive(task: Task, queue: MessageQueue, address: int, size: int, kind: int, flags: int) -> int:
    while True:
        if queue.removed:
            return -errno.EIDRM
        queue.permit(4, task.creds)
        index = queue.select(kind, bool(flags & MSG_EXCEPT))
        if index >= 0:
            message = queue.messages[index]
            if len(message.text) > size and not flags & MSG_NOERROR:
                return -errno.E2BIG
            text = message.text[:size]
            task.mm.write(address, message.kind.to_bytes(8, "little") + text)
            del queue.messages[index]
            queue.bytes -= len(message.text)
            queue.rtime, queue.lrpid = int(time.time()), task.process.pid
            queue.senders.wake()
            return len(text)
        if flags & IPC_NOWAIT:
            return -errno.ENOMSG
        try:
            await park(task, "msgrcv", queue.receivers)
        except Errno:
            return -errno.EINTR


@syscall(71, partial="IPC_RMID, IPC_SET and IPC_STAT")
def msgctl(task: Task, msqid: Int, cmd: Int, buf: UserPtr) -> int:
    table = namespace(task).messages
    if cmd not in (IPC_RMID, IPC_SET, IPC_STAT):
        return -errno.EINVAL
    queue: MessageQueue = table.find(msqid)
    if cmd == IPC_STAT:
        queue.permit(4, task.creds)
        task.mm.write(
            buf,
            MSQID_DS.pack(
                _perm(queue),
                queue.stime,
                queue.rtime,
                queue.ctime,
                queue.bytes,
                len(queue.messages),
                queue.max_bytes,
                queue.lspid,
                queue.lrpid,
            ),
        )
    elif cmd == IPC_SET:
        raw = task.mm.read(buf, MSQID_DS.size)
        limit = MSQID_DS.unpack(raw)[6]
        if limit > MSGMNB and not task.creds.capable(24):  # CAP_SYS_RESOURCE
            return -errno.EPERM
        _set(task, queue, raw)
        queue.max_bytes = limit
        queue.senders.wake()
    else:
        queue.own(task.creds)
        table.remove(queue)
        queue.senders.wake()
        queue.receivers.wake()
    return 0


# -- semaphores ------------------------------------------------------------------------------------
@syscall(64)
def semget(task: Task, key: Int, nsems: Int, semflg: Int) -> int:
    if not 0 <= nsems <= SEMMSL:
        return -errno.EINVAL

    def make() -> SemaphoreSet:
        if nsems == 0:
            raise Errno(errno.EINVAL)
        return SemaphoreSet(key, semflg, task.creds, nsems)

    def check(found: SemaphoreSet) -> None:
        if nsems > len(found.values):
            raise Errno(errno.EINVAL)

    return namespace(task).semaphores.get(key, semflg, task.creds, make, check)


def _semop(task: Task, semid: int, sops: int, nsops: int, deadline: int | None) -> Any:
    if not nsops or semid < 0:
        return -errno.EINVAL
    if nsops > SEMOPM:
        return -errno.E2BIG
    operations = list(SEMBUF.iter_unpack(task.mm.read(sops, nsops * SEMBUF.size)))
    semaphores: SemaphoreSet = namespace(task).semaphores.find(semid)
    if any(number >= len(semaphores.values) for number, _, _ in operations):
        return -errno.EFBIG
    semaphores.permit(2 if any(operation for _, operation, _ in operations) else 4, task.creds)
    blocked = semaphores.attempt(operations, task.process)
    if blocked < 0:
        return 0
    if operations[blocked][2] & IPC_NOWAIT:
        return -errno.EAGAIN
    return semaphores.wait(task, operations, deadline)


@syscall(65)
def semop(task: Task, semid: Int, sops: UserPtr, nsops: UInt) -> Any:
    return _semop(task, semid, sops, nsops, None)


@syscall(220)
def semtimedop(task: Task, semid: Int, sops: UserPtr, nsops: UInt, timeout: UserPtr) -> Any:
    deadline = task.kernel.now() + read_timespec(task.mm, timeout) if timeout else None
    return _semop(task, semid, sops, nsops, deadline)


GETPID, GETVAL, GETALL, GETNCNT, GETZCNT, SETVAL, SETALL, SEM_STAT, SEM_INFO = 11, 12, 13, 14, 15, 16, 17, 18, 19


@syscall(66, partial="no IPC_INFO, SEM_INFO and SEM_STAT")
def semctl(task: Task, semid: Int, semnum: Int, cmd: Int, arg: ULong) -> int:
    table = namespace(task).semaphores
    if cmd in (IPC_INFO, SEM_INFO, SEM_STAT) or not (cmd in (IPC_RMID, IPC_SET, IPC_STAT) or GETPID <= cmd <= SETALL):
        return -errno.EINVAL
    semaphores: SemaphoreSet = table.find(semid)
    count = len(semaphores.values)
    if cmd in (GETPID, GETVAL, GETNCNT, GETZCNT, SETVAL) and not 0 <= semnum < count:
        return -errno.EINVAL
    if cmd == IPC_RMID:
        semaphores.own(task.creds)
        table.remove(semaphores)
        semaphores.changed.wake()
        return 0
    if cmd == IPC_SET:
        _set(task, semaphores, task.mm.read(arg, SEMID_DS.size))
        return 0
    if cmd in (SETVAL, SETALL):
        semaphores.permit(2, task.creds)
        if cmd == SETVAL:
            value = (arg & 0x7FFFFFFF) - (arg & 0x80000000)
            values = [value if index == semnum else old for index, old in enumerate(semaphores.values)]
        else:
            values = list(struct.unpack(f"<{count}H", task.mm.read(arg, 2 * count)))
        if any(not 0 <= value <= SEMVMX for value in values):
            return -errno.ERANGE
        semaphores.values = values
        for undo in semaphores.undo.values():
            for index in range(count) if cmd == SETALL else (semnum,):
                undo[index] = 0
        if cmd == SETVAL:
            semaphores.pids[semnum] = task.process.pid
        semaphores.ctime = int(time.time())
        semaphores.changed.wake()
        return 0
    semaphores.permit(4, task.creds)
    if cmd == IPC_STAT:
        task.mm.write(arg, SEMID_DS.pack(_perm(semaphores), semaphores.otime, 0, semaphores.ctime, 0, count))
        return 0
    if cmd == GETALL:
        task.mm.write(arg, struct.pack(f"<{count}H", *semaphores.values))
        return 0
    if cmd == GETVAL:
        return semaphores.values[semnum]
    if cmd == GETPID:
        return semaphores.pids[semnum]
    return semaphores.sleepers.count((semnum, cmd == GETZCNT))


# -- shared memory ---------------------------------------------------------------------------------
SHM_RDONLY, SHM_RND, SHM_REMAP, SHM_EXEC, SHM_HUGETLB = 0o10000, 0o20000, 0o40000, 0o100000, 0o4000
SHM_LOCK, SHM_UNLOCK, SHM_DEST, SHM_LOCKED = 11, 12, 0o1000, 0o2000
SHMMAX = 1 << 46
PAGE = 4096


@syscall(29)
def shmget(task: Task, key: Int, size: Size, shmflg: Int) -> int:
    def make() -> Segment:
        if not 1 <= size <= SHMMAX:
            raise Errno(errno.EINVAL)
        if shmflg & SHM_HUGETLB:
            raise Errno(errno.ENOMEM)
        return Segment(key, shmflg, task.creds, size, task.kernel.frames, task.process.pid)

    def check(found: Segment) -> None:
        if size > found.size:
            raise Errno(errno.EINVAL)

    return namespace(task).segments.get(key, shmflg, task.creds, make, check)


@syscall(30)
def shmat(task: Task, shmid: Int, shmaddr: UserPtr, shmflg: Int) -> int:
    segment: Segment = namespace(task).segments.find(shmid)
    readonly = bool(shmflg & SHM_RDONLY)
    segment.permit(4 if readonly else 6, task.creds)
    flags = 1  # MAP_SHARED
    if shmaddr:
        if shmaddr & (PAGE - 1):
            if not shmflg & SHM_RND:
                return -errno.EINVAL
            shmaddr &= -PAGE
        flags |= 0x10 if shmflg & SHM_REMAP else 0x100000  # MAP_FIXED or MAP_FIXED_NOREPLACE
    elif shmflg & SHM_REMAP:
        return -errno.EINVAL
    prot = (1 if readonly else 3) | (4 if shmflg & SHM_EXEC else 0)
    try:
        address: int = task.mm.mmap(
            shmaddr, segment.size, prot, flags, segment.memory, 0, max_prot=5 if readonly else 7
        )
    except Errno as error:
        raise Errno(errno.EINVAL if error.errno == errno.EEXIST else error.errno) from None
    segment.atime, segment.lpid = int(time.time()), task.process.pid
    return address


@syscall(67)
def shmdt(task: Task, shmaddr: UserPtr) -> int:
    if shmaddr & (PAGE - 1):
        return -errno.EINVAL
    pieces = [
        vma
        for vma in task.mm.maps()
        if isinstance(vma.backing, ShmMemory) and vma.start - vma.offset == shmaddr and vma.start >= shmaddr
    ]
    if not pieces:
        return -errno.EINVAL
    segment = pieces[0].backing.segment
    for start, end in [(vma.start, vma.end) for vma in pieces if vma.backing is segment.memory]:
        task.mm.munmap(start, end - start)
    segment.dtime, segment.lpid = int(time.time()), task.process.pid
    return 0


@syscall(31, partial="no IPC_INFO, SHM_INFO and SHM_STAT")
def shmctl(task: Task, shmid: Int, cmd: Int, buf: UserPtr) -> int:
    table = namespace(task).segments
    if cmd not in (IPC_RMID, IPC_SET, IPC_STAT, SHM_LOCK, SHM_UNLOCK):
        return -errno.EINVAL
    segment: Segment = table.find(shmid)
    if cmd == IPC_STAT:
        segment.permit(4, task.creds)
        task.mm.write(
            buf,
            SHMID_DS.pack(
                _perm(segment),
                segment.size,
                segment.atime,
                segment.dtime,
                segment.ctime,
                segment.cpid,
                segment.lpid,
                segment.attached,
            ),
        )
    elif cmd == IPC_SET:
        _set(task, segment, task.mm.read(buf, SHMID_DS.size))
    elif cmd == IPC_RMID:
        segment.own(task.creds)
        table.remove(segment)
        segment.memory.drop()
    else:
        segment.own(task.creds)
    return 0
