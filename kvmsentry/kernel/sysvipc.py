"""System V IPC: message queues, semaphore sets, shared memory segments (sysvipc(7)), and their limits."""

from __future__ import annotations

import errno
import time
from itertools import chain
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel.task import Credentials, Process, Task
from kvmsentry.kernel.traps import WaitQueue, park
from kvmsentry.kernel.userns import ROOT, UserNamespace, capable
from kvmsentry.mm.shared import PAGE, SharedMemory

IPC_PRIVATE, IPC_CREAT, IPC_EXCL, IPC_NOWAIT = 0, 0o1000, 0o2000, 0o4000  # uapi/linux/ipc.h
CAP_IPC_OWNER, CAP_SYS_ADMIN = 15, 21
SEQ_SHIFT, MAX_IDS = 15, 1 << 15  # an id is sequence << 15 | index (ipc/util.h)
MAX_SEQ = (1 << 31) - 1 >> SEQ_SHIFT  # ipcid_seq_max
MIN_CYCLE = 64  # ipc_min_cycle, ipc/util.c
SEMVMX = 32767
# What an IPC namespace starts with, by name in /proc/sys/kernel (uapi/linux/msg.h, sem.h, shm.h).
LIMITS = {"shmmax": (1 << 64) - 1 - (1 << 24), "shmall": (1 << 64) - 1 - (1 << 24), "shmmni": 4096,
          "shm_rmid_forced": 0, "msgmax": 8192, "msgmnb": 16384, "msgmni": 32000}  # fmt: skip
SEM_LIMITS = (32000, 1024000000, 500, 32000)  # SEMMSL, SEMMNS, SEMOPM, SEMMNI
SEM_UNDO = 0x1000
SHM_DEST, SHM_LOCKED = 0o1000, 0o2000  # uapi/linux/shm.h


class IpcObject:
    """What the three kinds share: key, owner, mode (a segment's with SHM_DEST and SHM_LOCKED), id. `units` is what it
    counts against the limit on all of its kind: semaphores, pages."""

    units = 0

    def __init__(self, key: int, mode: int, creds: Credentials) -> None:
        self.key, self.mode = key, mode & 0o777
        self.uid = self.cuid = creds.euid
        self.gid = self.cgid = creds.egid
        self.user_ns = ROOT  # whose capabilities count: the IPC namespace's owner
        self.id = self.seq = 0
        self.ctime = int(time.time())
        self.removed = False

    def permit(self, mask: int, creds: Credentials) -> None:
        """EACCES unless `creds` may do `mask` (4 read, 2 write), ipcperms in ipc/util.c."""
        bits = self.mode
        if creds.euid in (self.uid, self.cuid):
            bits >>= 6
        elif {self.gid, self.cgid} & ({creds.egid} | creds.groups):
            bits >>= 3
        if mask & ~bits & 7 and not capable(creds, self.user_ns, CAP_IPC_OWNER):
            raise Errno(errno.EACCES)

    def own(self, creds: Credentials) -> None:
        """EPERM unless `creds` may change or remove this."""
        if creds.euid not in (self.uid, self.cuid) and not capable(creds, self.user_ns, CAP_SYS_ADMIN):
            raise Errno(errno.EPERM)


class IpcTable:
    """Ids and keys of one kind. `next_id`: the id that whoever restores a program wants for the next object, -1: any
    (/proc/sys/kernel/*_next_id)."""

    def __init__(self, user_ns: UserNamespace = ROOT) -> None:
        self.user_ns = user_ns
        self.next_id = -1
        self.objects: dict[int, Any] = {}  # by index
        self.keys: dict[int, Any] = {}
        self.used = 0  # units of all objects
        self._seq, self._last = 0, -1  # of the newest object whose id nobody chose

    def get(self, key: int, flags: int, creds: Credentials, make: Any, check: Any, limit: int) -> int:
        """msgget(2), semget(2), shmget(2): the id for `key`. ENOSPC for more than `limit` objects."""
        found = self.keys.get(key) if key != IPC_PRIVATE else None
        if found is not None:
            if flags & IPC_CREAT and flags & IPC_EXCL:
                raise Errno(errno.EEXIST)
            check(found)
            found.permit((flags >> 6 | flags >> 3 | flags) & 6, creds)
            return int(found.id)
        if key != IPC_PRIVATE and not flags & IPC_CREAT:
            raise Errno(errno.ENOENT)
        if len(self.objects) >= limit:
            raise Errno(errno.ENOSPC)
        made = make()
        made.user_ns = self.user_ns
        wanted, self.next_id = self.next_id, -1
        if wanted < 0:
            index = self._free_index()
            if index <= self._last:
                self._seq = (self._seq + 1) % MAX_SEQ
            self._last, made.seq = index, self._seq
        else:
            index, made.seq = wanted & (MAX_IDS - 1), wanted >> SEQ_SHIFT
            while index in self.objects:
                index += 1
            if index >= MAX_IDS:
                raise Errno(errno.ENOSPC)
        made.id = made.seq << SEQ_SHIFT | index
        self.objects[index] = made
        self.used += made.units
        if key != IPC_PRIVATE:
            self.keys[key] = made
        return int(made.id)

    def _free_index(self) -> int:
        """The next free one round the circle, so that an id does not come again soon (ipc_idr_alloc)."""
        end = min(max(len(self.objects) * 3 // 2, MIN_CYCLE), MAX_IDS)
        for index in chain(range(self._last + 1, end), range(end)):
            if index not in self.objects:
                return index
        raise Errno(errno.ENOSPC)

    def find(self, number: int) -> Any:
        """The object with that id; EINVAL (ipc_obtain_object_check). EIDRM is for those who slept when it went."""
        found = self.objects.get(number & (MAX_IDS - 1)) if number >= 0 else None
        if found is None or found.id != number:
            raise Errno(errno.EINVAL)
        return found

    def remove(self, victim: Any) -> None:
        """IPC_RMID: the id and the key are free again."""
        victim.removed = True
        del self.objects[victim.id & (MAX_IDS - 1)]
        self.used -= victim.units
        self._forget(victim)

    def make_private(self, victim: Any) -> None:
        """Nobody finds it by its key any more (ipc_set_key_private)."""
        self._forget(victim)
        victim.key = IPC_PRIVATE

    def _forget(self, victim: Any) -> None:
        key: int = victim.key
        if self.keys.get(key) is victim:
            del self.keys[key]


class Message:
    """One message of a queue."""

    __slots__ = ("kind", "text")

    def __init__(self, kind: int, text: bytes) -> None:
        self.kind, self.text = kind, text


class MessageQueue(IpcObject):
    """msgget(2)."""

    def __init__(self, key: int, mode: int, creds: Credentials, max_bytes: int) -> None:
        super().__init__(key, mode, creds)
        self.messages: list[Message] = []
        self.bytes = 0
        self.max_bytes = max_bytes
        self.stime = self.rtime = self.lspid = self.lrpid = 0
        self.senders, self.receivers = WaitQueue(), WaitQueue()

    def select(self, kind: int, except_: bool) -> int:
        """Index of the message that msgrcv(2) would take for `kind`; -1 when there is none."""
        best = -1
        for index, message in enumerate(self.messages):
            if kind == 0 or (kind > 0 and (message.kind != kind) == except_):
                return index
            if kind < 0 and message.kind <= -kind and (best < 0 or message.kind < self.messages[best].kind):
                best = index
        return best


class SemaphoreSet(IpcObject):
    """semget(2)."""

    def __init__(self, key: int, mode: int, creds: Credentials, count: int) -> None:
        super().__init__(key, mode, creds)
        self.values, self.units = [0] * count, count
        self.pids = [0] * count
        self.otime = 0
        self.sleepers: list[tuple[int, bool]] = []  # (semaphore, waits for zero) of each sleeping semop
        self.changed = WaitQueue()
        self.undo: dict[Process, list[int]] = {}

    def attempt(self, operations: list[tuple[int, int, int]], process: Process) -> int:
        """Do all of [(number, operation, flags)] or nothing; returns -1 when done, else the index of the one that would
        sleep. EFBIG, ERANGE."""
        values = list(self.values)
        undo = list(self.undo.get(process, [0] * len(values)))
        for index, (number, operation, flags) in enumerate(operations):
            if number >= len(values):
                raise Errno(errno.EFBIG)
            if operation == 0:
                if values[number]:
                    return index
                continue
            if values[number] + operation < 0:
                return index
            if values[number] + operation > SEMVMX:
                raise Errno(errno.ERANGE)
            values[number] += operation
            if flags & SEM_UNDO:
                undo[number] -= operation
                if not -SEMVMX - 1 <= undo[number] <= SEMVMX:
                    raise Errno(errno.ERANGE)
        for number, _, _ in operations:
            self.pids[number] = process.pid
        self.otime = int(time.time())
        if values != self.values:
            self.values = values
            self.changed.wake()
        if any(flags & SEM_UNDO for _, _, flags in operations):
            self.undo[process] = undo
        return -1

    async def wait(self, task: Task, operations: list[tuple[int, int, int]], deadline: int | None) -> int:
        """semtimedop(2) once it was found that it would sleep."""
        while True:
            blocked = self.attempt(operations, task.process)
            if blocked < 0:
                return 0
            number, operation, flags = operations[blocked]
            if flags & IPC_NOWAIT or (deadline is not None and task.kernel.now() >= deadline):
                return -errno.EAGAIN
            sleeper = (number, operation == 0)
            self.sleepers.append(sleeper)
            try:
                await park(task, "semop", self.changed, deadline=deadline)
            except Errno:
                raise Errno(errno.EINTR) from None  # semop(2): never restarted
            finally:
                self.sleepers.remove(sleeper)
            if self.removed:
                return -errno.EIDRM


class Segment(IpcObject):
    """shmget(2); the memory is held by the segment itself and by every mapping."""

    def __init__(self, ipc: IpcNamespace, key: int, mode: int, task: Task, size: int) -> None:
        super().__init__(key, mode, task.creds)
        self.size, self.units, self.ipc = size, size + PAGE - 1 >> 12, ipc
        self.creator: Process | None = task.process  # None once it is gone
        self.memory = ShmMemory(task.kernel.frames, size, self)
        self.memory.hold()
        self.atime = self.dtime = self.lpid = 0
        self.cpid = task.process.pid
        self.locker = 0  # the user whom SHM_LOCKED counts against

    def remove(self) -> None:
        """IPC_RMID. One that is attached only loses its key: it can be used by its id until the last mapping goes
        (do_shm_rmid)."""
        if self.attached:
            self.ipc.segments.make_private(self)
            self.mode |= SHM_DEST
            return
        self.ipc.segments.remove(self)
        self.memory.drop()

    @property
    def resident(self) -> int:
        """Pages that exist."""
        return len(self.memory.pages)

    @property
    def attached(self) -> int:
        """shm_nattch."""
        return self.memory.holds - (0 if self.removed else 1)


class ShmMemory(SharedMemory):
    """The pages of a segment."""

    apart = True  # Linux joins no mappings of it either: shm_nattch counts them

    def __init__(self, frames: Any, size: int, segment: Segment) -> None:
        super().__init__(frames, size, b"/SYSV%08x (deleted)" % (segment.key & 0xFFFFFFFF))
        self.segment = segment

    def drop(self) -> None:
        """The last detach removes a segment that IPC_RMID has marked, and any where the namespace says so
        (shm_may_destroy)."""
        super().drop()
        segment = self.segment
        if self.holds != 1 or segment.removed:
            return
        if segment.mode & SHM_DEST or segment.ipc.limits["shm_rmid_forced"]:
            segment.remove()


class IpcNamespace:
    """All System V objects of an IPC namespace (ipc_namespaces(7))."""

    kind = b"ipc"

    def __init__(self, user_ns: UserNamespace = ROOT) -> None:
        self.messages, self.semaphores, self.segments = IpcTable(user_ns), IpcTable(user_ns), IpcTable(user_ns)
        self.limits = dict(LIMITS)  # by name in /proc/sys/kernel
        self.sem = SEM_LIMITS  # semmsl, semmns, semopm, semmni
        self.user_ns = user_ns
        self.ns_ino = 0

    def orphans(self, creator: Process | None = None) -> None:
        """kernel.shm_rmid_forced: segments that nobody has attached go, of `creator` or of those who have gone."""
        for segment in list(self.segments.objects.values()):
            if segment.creator is creator and not segment.attached:
                segment.remove()


def namespace(task: Task) -> IpcNamespace:
    """The namespace of `task`, made on first use."""
    own: IpcNamespace | None = task.ns.ipc
    return own if own is not None else first(task.kernel)


def first(kernel: Any) -> IpcNamespace:
    """The namespace that the sandbox boots with, made on first use."""
    found: IpcNamespace | None = getattr(kernel, "ipc", None)
    if found is None:
        found = kernel.ipc = IpcNamespace()
        found.ns_ino = 0xEFFFFFFF  # PROC_IPC_INIT_INO, include/linux/proc_ns.h
    return found


def shown_pid(task: Task, pid: int) -> int:
    """A kept pid as `task` knows it: 0 for one that its namespace does not see."""
    space = task.process.pid_ns
    return space.pid_of(task.kernel.processes.get(pid)) if space.level else pid


def _of(process: Process) -> IpcNamespace | None:
    """The namespace of a process that may be about to go; None when nobody has used the first one yet."""
    own: IpcNamespace | None = process.leader.ns.ipc
    return own if own is not None else getattr(process.kernel, "ipc", None)


def has_undo(process: Process) -> bool:
    """Whether `process` has used SEM_UNDO."""
    ipc = _of(process)
    return ipc is not None and any(process in semaphores.undo for semaphores in ipc.semaphores.objects.values())


def end_process(process: Process) -> None:
    """Called when the last thread of `process` is gone, and when it leaves the namespace for a new one."""
    end_undo(process)
    ipc = _of(process)
    if ipc is None or not ipc.segments.objects:
        return
    if ipc.limits["shm_rmid_forced"]:
        ipc.orphans(process)
    for segment in ipc.segments.objects.values():
        if segment.creator is process:
            segment.creator = None


def end_undo(process: Process) -> None:
    """SEM_UNDO: what `process` would give back at its end it gives back now."""
    ipc = _of(process)
    if ipc is None:
        return
    for semaphores in list(ipc.semaphores.objects.values()):
        undo = semaphores.undo.pop(process, None)
        if undo and any(undo):
            semaphores.values = [
                min(max(value + change, 0), SEMVMX) for value, change in zip(semaphores.values, undo, strict=True)
            ]
            semaphores.changed.wake()
