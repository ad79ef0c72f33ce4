"""System V IPC calls: msg*, sem*, shm*."""

from __future__ import annotations

import errno
import struct
import time
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap
from kvmsentry.kernel.sysvipc import (
    IPC_NOWAIT,
    SEMVMX,
    SHM_LOCKED,
    IpcObject,
    IpcTable,
    Message,
    MessageQueue,
    Segment,
    SemaphoreSet,
    ShmMemory,
    namespace,
    shown_pid,
)
from kvmsentry.kernel.task import RLIMIT_MEMLOCK, Task
from kvmsentry.kernel.traps import park
from kvmsentry.kernel.userns import capable, kgid, kuid, shown_gid, shown_uid
from kvmsentry.syscall.abi_time import read_timespec
from kvmsentry.syscall.table import Int, Long, Size, UInt, ULong, UserPtr, syscall

IPC_RMID, IPC_SET, IPC_STAT, IPC_INFO = 0, 1, 2, 3
MSGMNB, MSGMNI = 16384, 32000  # uapi/linux/msg.h; the limits themselves are the namespace's
MSG_NOERROR, MSG_EXCEPT, MSG_COPY = 0o10000, 0o20000, 0o40000
IPC_PERM = struct.Struct("<iIIIIIH2xQQ")  # struct ipc64_perm: key uid gid cuid cgid mode seq (48 bytes)
MSQID_DS = struct.Struct("<48sqqqQQQii16x")
SEMID_DS = struct.Struct("<48sqQqQQ16x")
SHMID_DS = struct.Struct("<48sQqqqiiQ16x")
SEMBUF = struct.Struct("<Hhh")
MSGINFO = struct.Struct("<7iHxx")  # struct msginfo: pool map max mnb mni ssz tql seg
SEMINFO = struct.Struct("<10i")  # struct seminfo: map mni mns mnu msl opm ume usz vmx aem
SHMINFO = struct.Struct("<5Q32x")  # struct shminfo64: max min mni seg all
SHM_INFO_S = struct.Struct("<i4x5Q")  # struct shm_info: used_ids tot rss swp swap_attempts swap_successes
MSG_STAT, MSG_INFO, MSG_STAT_ANY = 11, 12, 13


def _perm(task: Task, thing: IpcObject) -> bytes:
    ns = task.creds.user_ns
    owner = shown_uid(ns, thing.uid), shown_gid(ns, thing.gid), shown_uid(ns, thing.cuid), shown_gid(ns, thing.cgid)
    return IPC_PERM.pack(thing.key, *owner, thing.mode, thing.seq, 0, 0)


def _set(task: Task, thing: IpcObject, raw: bytes) -> None:
    thing.own(task.creds)
    _, uid, gid, _, _, mode, *_ = IPC_PERM.unpack_from(raw)
    thing.uid, thing.gid = kuid(task.creds, uid), kgid(task.creds, gid)
    thing.mode = thing.mode & ~0o777 | mode & 0o777
    thing.ctime = int(time.time())


def _highest(table: IpcTable) -> int:
    """What the INFO commands return: the highest index in use, 0 when there is none."""
    return max(table.objects, default=0)


def _at(table: IpcTable, index: int) -> Any:
    """The object of the STAT commands, which count indices from 0 on; EINVAL."""
    found = table.objects.get(index)
    if found is None:
        raise Errno(errno.EINVAL)
    return found


# -- message queues --------------------------------------------------------------------------------
@syscall(68)
def msgget(task: Task, key: Int, msgflg: Int) -> int:
    ipc = namespace(task)
    limits = ipc.limits
    return ipc.messages.get(
        key, msgflg, task.creds, lambda: MessageQueue(key, msgflg, task.creds, limits["msgmnb"]), lambda queue: None,
        limits["msgmni"],
    )  # fmt: skip


@syscall(69)
def msgsnd(task: Task, msqid: Int, msgp: UserPtr, msgsz: Size, msgflg: Int) -> Any:
    ipc = namespace(task)
    kind = task.mm.read_u64(msgp)
    if msgsz > ipc.limits["msgmax"] or msqid < 0:
        return -errno.EINVAL
    if not 0 < kind < 1 << 63:
        return -errno.EINVAL
    text = task.mm.read(msgp + 8, msgsz)
    return _send(task, ipc.messages.find(msqid), Message(kind, text), msgflg)


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


@syscall(70)
def msgrcv(task: Task, msqid: Int, msgp: UserPtr, msgsz: Size, msgtyp: Long, msgflg: Int) -> Any:
    if msqid < 0 or msgsz >= 1 << 63:
        return -errno.EINVAL
    if msgflg & MSG_COPY and (msgflg & MSG_EXCEPT or not msgflg & IPC_NOWAIT):
        return -errno.EINVAL
    return _receive(task, namespace(task).messages.find(msqid), msgp, msgsz, msgtyp, msgflg)


async def _receive(task: Task, queue: MessageQueue, address: int, size: int, kind: int, flags: int) -> int:
    while True:
        if queue.removed:
            return -errno.EIDRM
        queue.permit(4, task.creds)
        if flags & MSG_COPY:  # `kind` is a position, and the message stays
            index = kind if 0 <= kind < len(queue.messages) else -1
        else:
            index = queue.select(kind, bool(flags & MSG_EXCEPT))
        if index >= 0:
            message = queue.messages[index]
            if len(message.text) > size and not flags & MSG_NOERROR:
                return -errno.E2BIG
            text = message.text[:size]
            task.mm.write(address, message.kind.to_bytes(8, "little") + text)
            if flags & MSG_COPY:
                return len(text)
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


@syscall(71)
def msgctl(task: Task, msqid: Int, cmd: Int, buf: UserPtr) -> int:
    ipc = namespace(task)
    table, limits = ipc.messages, ipc.limits
    if cmd in (IPC_INFO, MSG_INFO):
        queues = table.objects.values()
        pool, count, total = MSGMNB * MSGMNI >> 10, MSGMNB, MSGMNB  # MSGPOOL, MSGMAP, MSGTQL
        if cmd == MSG_INFO:
            pool, count, total = len(queues), sum(len(q.messages) for q in queues), sum(q.bytes for q in queues)
        most = limits["msgmax"], limits["msgmnb"], limits["msgmni"]
        task.mm.write(buf, MSGINFO.pack(pool, count, *most, 16, total, 0xFFFF))
        return _highest(table)
    if cmd not in (IPC_RMID, IPC_SET, IPC_STAT, MSG_STAT, MSG_STAT_ANY):
        return -errno.EINVAL
    raw = task.mm.read(buf, MSQID_DS.size) if cmd == IPC_SET else b""
    queue: MessageQueue = _at(table, msqid) if cmd in (MSG_STAT, MSG_STAT_ANY) else table.find(msqid)
    if cmd in (IPC_STAT, MSG_STAT, MSG_STAT_ANY):
        if cmd != MSG_STAT_ANY:
            queue.permit(4, task.creds)
        task.mm.write(
            buf,
            MSQID_DS.pack(
                _perm(task, queue),
                queue.stime,
                queue.rtime,
                queue.ctime,
                queue.bytes,
                len(queue.messages),
                queue.max_bytes,
                shown_pid(task, queue.lspid),
                shown_pid(task, queue.lrpid),
            ),
        )
        return 0 if cmd == IPC_STAT else queue.id
    if cmd == IPC_SET:
        limit = MSQID_DS.unpack(raw)[6]
        if limit > limits["msgmnb"] and not task.creds.capable(cap.SYS_RESOURCE):
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
    ipc = namespace(task)
    semmsl, semmns, _, semmni = ipc.sem
    if not 0 <= nsems <= semmsl:
        return -errno.EINVAL

    def make() -> SemaphoreSet:
        if nsems == 0:
            raise Errno(errno.EINVAL)
        if ipc.semaphores.used + nsems > semmns:
            raise Errno(errno.ENOSPC)
        return SemaphoreSet(key, semflg, task.creds, nsems)

    def check(found: SemaphoreSet) -> None:
        if nsems > len(found.values):
            raise Errno(errno.EINVAL)

    return ipc.semaphores.get(key, semflg, task.creds, make, check, semmni)


def _semop(task: Task, semid: int, sops: int, nsops: int, deadline: int | None) -> Any:
    ipc = namespace(task)
    if nsops > ipc.sem[2]:
        return -errno.E2BIG
    if not nsops or semid < 0:
        return -errno.EINVAL
    operations = list(SEMBUF.iter_unpack(task.mm.read(sops, nsops * SEMBUF.size)))
    semaphores: SemaphoreSet = ipc.semaphores.find(semid)
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
SEM_STAT_ANY = 20
SEMMNS, SEMOPM = 1024000000, 500  # uapi/linux/sem.h; the limits themselves are the namespace's


@syscall(66)
def semctl(task: Task, semid: Int, semnum: Int, cmd: Int, arg: ULong) -> int:
    ipc = namespace(task)
    table = ipc.semaphores
    if cmd in (IPC_INFO, SEM_INFO):
        sets, used = 20, SEMVMX  # SEMUSZ, SEMAEM of uapi/linux/sem.h
        if cmd == SEM_INFO:
            sets, used = len(table.objects), table.used
        semmsl, semmns, semopm, semmni = ipc.sem
        limits = SEMMNS, semmni, semmns, SEMMNS, semmsl, semopm, SEMOPM, sets, SEMVMX, used
        task.mm.write(arg, SEMINFO.pack(*limits))
        return _highest(table)
    if cmd not in (IPC_RMID, IPC_SET, IPC_STAT, SEM_STAT, SEM_STAT_ANY) and not GETPID <= cmd <= SETALL:
        return -errno.EINVAL
    raw = task.mm.read(arg, SEMID_DS.size) if cmd == IPC_SET else b""
    semaphores: SemaphoreSet = _at(table, semid) if cmd in (SEM_STAT, SEM_STAT_ANY) else table.find(semid)
    count = len(semaphores.values)
    if cmd in (GETPID, GETVAL, GETNCNT, GETZCNT, SETVAL) and not 0 <= semnum < count:
        return -errno.EINVAL
    if cmd == IPC_RMID:
        semaphores.own(task.creds)
        table.remove(semaphores)
        semaphores.changed.wake()
        return 0
    if cmd == IPC_SET:
        _set(task, semaphores, raw)
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
    if cmd != SEM_STAT_ANY:
        semaphores.permit(4, task.creds)
    if cmd in (IPC_STAT, SEM_STAT, SEM_STAT_ANY):
        task.mm.write(arg, SEMID_DS.pack(_perm(task, semaphores), semaphores.otime, 0, semaphores.ctime, 0, count))
        return 0 if cmd == IPC_STAT else semaphores.id
    if cmd == GETALL:
        task.mm.write(arg, struct.pack(f"<{count}H", *semaphores.values))
        return 0
    if cmd == GETVAL:
        return semaphores.values[semnum]
    if cmd == GETPID:
        return shown_pid(task, semaphores.pids[semnum])
    return semaphores.sleepers.count((semnum, cmd == GETZCNT))


# -- shared memory ---------------------------------------------------------------------------------
SHM_RDONLY, SHM_RND, SHM_REMAP, SHM_EXEC, SHM_HUGETLB = 0o10000, 0o20000, 0o40000, 0o100000, 0o4000
SHM_LOCK, SHM_UNLOCK = 11, 12
SHM_STAT, SHM_INFO, SHM_STAT_ANY = 13, 14, 15
MOST = 1 << 46  # bytes of a segment, whatever shmmax says
PAGE = 4096


@syscall(29)
def shmget(task: Task, key: Int, size: Size, shmflg: Int) -> int:
    ipc = namespace(task)
    limits = ipc.limits

    def make() -> Segment:
        if not 1 <= size <= limits["shmmax"]:
            raise Errno(errno.EINVAL)
        if size + PAGE > 1 << 64 or ipc.segments.used + (size + PAGE - 1 >> 12) > limits["shmall"]:
            raise Errno(errno.ENOSPC)
        if shmflg & SHM_HUGETLB or size > MOST:
            raise Errno(errno.ENOMEM)
        return Segment(ipc, key, shmflg, task, size)

    def check(found: Segment) -> None:
        if size > found.size:
            raise Errno(errno.EINVAL)

    return ipc.segments.get(key, shmflg, task.creds, make, check, limits["shmmni"])


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
            if not shmaddr and shmflg & SHM_REMAP:
                return -errno.EINVAL
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


@syscall(31)
def shmctl(task: Task, shmid: Int, cmd: Int, buf: UserPtr) -> int:
    ipc = namespace(task)
    table, limits = ipc.segments, ipc.limits
    if cmd == IPC_INFO:
        task.mm.write(buf, SHMINFO.pack(limits["shmmax"], 1, limits["shmmni"], limits["shmmni"], limits["shmall"]))
        return _highest(table)
    if cmd == SHM_INFO:
        present = sum(s.resident for s in table.objects.values())
        task.mm.write(buf, SHM_INFO_S.pack(len(table.objects), table.used, present, 0, 0, 0))
        return _highest(table)
    if cmd not in (IPC_RMID, IPC_SET, IPC_STAT, SHM_LOCK, SHM_UNLOCK, SHM_STAT, SHM_STAT_ANY):
        return -errno.EINVAL
    raw = task.mm.read(buf, SHMID_DS.size) if cmd == IPC_SET else b""
    segment: Segment = _at(table, shmid) if cmd in (SHM_STAT, SHM_STAT_ANY) else table.find(shmid)
    if cmd in (IPC_STAT, SHM_STAT, SHM_STAT_ANY):
        if cmd != SHM_STAT_ANY:
            segment.permit(4, task.creds)
        task.mm.write(
            buf,
            SHMID_DS.pack(
                _perm(task, segment),
                segment.size,
                segment.atime,
                segment.dtime,
                segment.ctime,
                shown_pid(task, segment.cpid),
                shown_pid(task, segment.lpid),
                segment.attached,
            ),
        )
        return 0 if cmd == IPC_STAT else segment.id
    if cmd == IPC_SET:
        _set(task, segment, raw)
    elif cmd == IPC_RMID:
        segment.own(task.creds)
        segment.remove()
    else:
        _lock(task, segment, cmd)
    return 0


def _lock(task: Task, segment: Segment, cmd: int) -> None:
    """SHM_LOCK, SHM_UNLOCK (shmctl_do_lock, user_shm_lock). Nothing is ever swapped: they mark and count."""
    creds, limit = task.creds, task.rlimit(RLIMIT_MEMLOCK)
    if not capable(creds, segment.user_ns, cap.IPC_LOCK):
        if creds.euid not in (segment.uid, segment.cuid):
            raise Errno(errno.EPERM)
        if cmd == SHM_LOCK and not limit:
            raise Errno(errno.EPERM)
    if cmd == SHM_UNLOCK:
        segment.mode &= ~SHM_LOCKED
    elif not segment.mode & SHM_LOCKED:
        others = segment.ipc.segments.objects.values()
        locked = sum(s.units for s in others if s.mode & SHM_LOCKED and s.locker == creds.uid)
        if locked + segment.units > limit >> 12 and not creds.capable(cap.IPC_LOCK):
            raise Errno(errno.ENOMEM)
        segment.mode |= SHM_LOCKED
        segment.locker = creds.uid
