"""What /proc shows of System V IPC, always that of the reader's IPC namespace: /proc/sysvipc/{msg,sem,shm} (ipc/util.c)
and the limits in /proc/sys/kernel (ipc/ipc_sysctl.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.nodes import INT, TextInode, numbers, text
from kvmsentry.fs.vfs import File, Path, SuperBlock
from kvmsentry.kernel import cap
from kvmsentry.kernel.sysvipc import MAX_IDS, IpcObject, IpcTable, namespace, shown_pid
from kvmsentry.kernel.userns import capable, shown_gid, shown_uid

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

PAGE = 4096
RANGES = {"shmmax": (1 << 64) - 1, "shmall": (1 << 64) - 1, "shmmni": MAX_IDS, "shm_rmid_forced": 1, "msgmax": INT[1],
          "msgmnb": INT[1], "msgmni": MAX_IDS}  # fmt: skip
TABLES = {"msg": "messages", "sem": "semaphores", "shm": "segments"}
MSG = (
    "       key      msqid perms      cbytes       qnum lspid lrpid   uid   gid  cuid  cgid      stime      rtime      "
    "ctime\n"
)
SEM = "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n"
SHM = (
    "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime"
    "      ctime                   rss                  swap\n"
)


# -- /proc/sysvipc
def _owners(task: Task, thing: IpcObject) -> str:
    ns = task.creds.user_ns
    ids = shown_uid(ns, thing.uid), shown_gid(ns, thing.gid), shown_uid(ns, thing.cuid), shown_gid(ns, thing.cgid)
    return "{:5} {:5} {:5} {:5}".format(*ids)


def _sorted(table: IpcTable) -> list[Any]:
    return [table.objects[index] for index in sorted(table.objects)]


def msg(task: Task) -> str:
    """/proc/sysvipc/msg."""
    return MSG + "".join(
        f"{q.key:10} {q.id:10}  {q.mode:4o}  {q.bytes:10} {len(q.messages):10} {shown_pid(task, q.lspid):5} "
        f"{shown_pid(task, q.lrpid):5} {_owners(task, q)} {q.stime:10} {q.rtime:10} {q.ctime:10}\n"
        for q in _sorted(namespace(task).messages)
    )


def sem(task: Task) -> str:
    """/proc/sysvipc/sem."""
    return SEM + "".join(
        f"{s.key:10} {s.id:10}  {s.mode:4o} {len(s.values):10} {_owners(task, s)} {s.otime:10} {s.ctime:10}\n"
        for s in _sorted(namespace(task).semaphores)
    )


def shm(task: Task) -> str:
    """/proc/sysvipc/shm."""
    return SHM + "".join(
        f"{s.key:10} {s.id:10}  {s.mode:4o} {s.size:21} {shown_pid(task, s.cpid):5} {shown_pid(task, s.lpid):5}  "
        f"{s.attached:5} {_owners(task, s)} {s.atime:10} {s.dtime:10} {s.ctime:10} {s.resident * PAGE:21} {0:21}\n"
        for s in _sorted(namespace(task).segments)
    )


def tables() -> dict[bytes, Any]:
    """The entries of /proc/sysvipc."""
    return {b"msg": text(msg), b"sem": text(sem), b"shm": text(shm)}


# -- /proc/sys/kernel
class _NextId(TextInode):
    """The id for the next object; only who restores programs may write it (ipc_permissions)."""

    def __init__(self, sb: SuperBlock, table: str) -> None:
        def store(task: Task, data: bytes) -> None:
            own: IpcTable = getattr(namespace(task), table)
            own.next_id = numbers(data, [own.next_id], (0, INT[1]))[0]

        super().__init__(sb, lambda task: f"{getattr(namespace(task), table).next_id}\n", 0o444, store)

    def open(self, task: Task, path: Path, flags: int) -> File:
        """EACCES."""
        owner = namespace(task).user_ns
        may = capable(task.creds, owner, cap.CHECKPOINT_RESTORE) or capable(task.creds, owner, cap.SYS_ADMIN)
        if flags & 3 and not may:
            raise Errno(errno.EACCES)
        return super().open(task, path, flags)


def _limit(sb: SuperBlock, name: str, most: int) -> TextInode:
    def store(task: Task, data: bytes) -> None:
        ipc = namespace(task)
        ipc.limits[name] = numbers(data, [ipc.limits[name]], (0, most))[0]
        if name == "shm_rmid_forced" and ipc.limits[name]:
            ipc.orphans()

    return TextInode(sb, lambda task: f"{namespace(task).limits[name]}\n", 0o644, store)


def _sem(sb: SuperBlock) -> TextInode:
    def store(task: Task, data: bytes) -> None:
        ipc = namespace(task)
        semmsl, semmns, semopm, semmni = numbers(data, list(ipc.sem), INT)
        fine = 0 <= semmni <= MAX_IDS
        ipc.sem = semmsl, semmns, semopm, semmni if fine else ipc.sem[3]
        if not fine:
            raise Errno(errno.ERANGE)  # sem_check_semmni: the others are set

    return TextInode(sb, lambda task: "\t".join(map(str, namespace(task).sem)) + "\n", 0o644, store)


def limits(sb: SuperBlock) -> dict[bytes, TextInode]:
    """The files of /proc/sys/kernel."""
    files: dict[bytes, TextInode] = {name.encode(): _limit(sb, name, most) for name, most in RANGES.items()}
    files[b"sem"] = _sem(sb)
    for kind, table in TABLES.items():
        files[f"{kind}_next_id".encode()] = _NextId(sb, table)
    return files
