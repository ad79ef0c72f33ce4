"""Core dumps: who gets a core file, what it is called, and everybody else's wait for it (core(5), fs/coredump.c).

    exit_to_user --signal that dumps--> dump --other threads die--> hold ... hold
                                          | opens and writes the file, by pieces
                                          `--> exit_code |= 0x80, all go on to do_exit

While a dump is under way `process.core` is a `Core` and no thread of the process runs. SIGKILL cuts it short. What the
file consists of is in corefile.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs import ops
from kvmsentry.fs.proc.sysctl import sysctl
from kvmsentry.fs.vfs import (
    O_CREAT,
    O_EXCL,
    O_LARGEFILE,
    O_NOFOLLOW,
    O_WRONLY,
    WATCHES,
    File,
    path_of,
)
from kvmsentry.kernel import corefile, userns
from kvmsentry.kernel.task import RLIMIT_CORE, RLIMIT_FSIZE
from kvmsentry.kernel.traps import Pace, WaitQueue, park

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Process, SigInfo, Task

PAGE = 4096
PIECE = 256 << 10  # written at a time
MIN_CORE = PAGE  # a limit below this: no file (binfmt->min_coredump)
SUID_DUMP_DISABLE, SUID_DUMP_USER, SUID_DUMP_ROOT = 0, 1, 2  # process.dumpable, fs.suid_dumpable


def after_new_ids(task: Task) -> int:
    """`dumpable` of a process that got other ids or a set-id program: fs.suid_dumpable."""
    return sysctl(task.kernel).number("fs/suid_dumpable")


class Core:
    """A dump that is under way."""

    __slots__ = ("arrived", "done", "holding", "interrupted")

    def __init__(self) -> None:
        self.holding: set[Task] = set()  # threads that have come to a stop
        self.arrived = WaitQueue()  # the dumping thread waits here for the others
        self.done = WaitQueue()  # and they here for it
        self.interrupted = False  # SIGKILL


async def hold(task: Task, core: Core) -> None:
    """A thread of a process that dumps: it stays as it is until the file is written (coredump_task_exit)."""
    core.holding.add(task)
    core.arrived.wake()
    while task.process.core is core:
        try:
            await park(task, "coredump", core.done, restart=0)
        except Errno:
            pass  # it dies anyway, and soon


async def dump(task: Task, info: SigInfo) -> None:
    """`task` takes a signal that ends its process with a core dump: end the process, and write the file if there is to
    be one. The task's registers lie in its context as they shall be shown."""
    from kvmsentry.fs.proc.process import state
    from kvmsentry.kernel import exit as exit_

    process = task.process
    limit = process.rlimits[RLIMIT_CORE][0]
    pattern = sysctl(task.kernel).values["kernel/core_pattern"]
    if (
        process.dumpable == SUID_DUMP_DISABLE
        or (limit < MIN_CORE and pattern[:1] != "|")
        or process.exec_task is not None
        or process.exiting
    ):
        exit_.exit_group(process, info.signo)
        return
    core = process.core = Core()
    letter = state(task)
    exit_.exit_group(process, info.signo)
    try:
        while any(thread not in core.holding for thread in process.threads.values() if thread is not task):
            await park(task, "coredump", core.arrived, restart=0)
        if await _write_core(task, info, pattern, limit, letter.encode()):
            process.exit_code |= 0x80
    except Errno:
        pass  # the name, the file or its disk: Linux says no more than that there is no core
    finally:
        process.core = None
        core.done.wake()


async def _write_core(task: Task, info: SigInfo, pattern: str, limit: int, letter: bytes) -> bool:
    """Was there a file to write to? Errno where it could not be had."""
    if pattern[:1] == "|":
        _complain(task, f"Core dump to {pattern} pipe failed: programs are not started for dumps")
        return False
    name = file_name(task, pattern, info.signo, limit)
    file = await _open(task, name)
    if file is None:
        return False
    try:
        return await _write(task, file, info, limit, letter)
    finally:
        file.put()


def _complain(task: Task, text: str) -> None:
    task.kernel.say(6, f"{task.process.pid}({task.comm.decode(errors='replace')}): {text}")


# -- its name --
def _escaped(text: bytes) -> bytes:
    """What a user chose, as part of a file name (cn_vprintf): it leads nowhere else."""
    if text in (b".", b".."):
        text = b"!" + text[1:]
    return text.replace(b"/", b"!")


def file_name(task: Task, pattern: str, signo: int, limit: int) -> bytes:
    """core_pattern with its specifiers replaced; core(5), format_corename."""
    process, creds = task.process, task.creds
    named = False  # a pid is in it
    out = b""
    wanted = False
    for letter in pattern.encode("utf-8", "surrogateescape"):
        char = chr(letter)
        if not wanted:
            if char == "%":
                wanted = True
            else:
                out += bytes((letter,))
            continue
        wanted = False
        if char == "%":
            out += b"%"
        elif char in "pP":
            named = True
            out += b"%d" % (process.vpid if char == "p" else process.pid)
        elif char in "iI":
            out += b"%d" % (task.vtid if char == "i" else task.tid)
        elif char == "u":
            out += b"%d" % creds.uid
        elif char == "g":
            out += b"%d" % creds.gid
        elif char == "d":
            out += b"%d" % process.dumpable
        elif char == "s":
            out += b"%d" % signo
        elif char == "t":
            out += b"%d" % ((task.kernel.now() + task.kernel.monotonic_to_real()) // 1_000_000_000)
        elif char == "h":
            out += _escaped(task.uts.nodename.encode("utf-8", "surrogateescape"))
        elif char == "e":
            out += _escaped(task.comm)
        elif char in "fE":
            path = path_of(process.exe, task.fs.root) if process.exe is not None else task.comm + b" (path unknown)"
            out += _escaped(path.rsplit(b"/", 1)[-1] if char == "f" else path)
        elif char == "c":
            out += b"%d" % limit
    if not named and sysctl(task.kernel).number("kernel/core_uses_pid"):
        out += b".%d" % process.vpid
    return out


# -- the file --
async def _open(task: Task, name: bytes) -> File | None:
    """A new file, its owner's alone. A process that gained privilege has it made as root and by an absolute path only,
    from the first root directory. Errno, or None for a place where none may be."""
    process, kernel = task.process, task.kernel
    creds, fs = task.creds, task.fs
    if process.dumpable == SUID_DUMP_ROOT:
        if name[:1] != b"/":
            _complain(task, "can only dump core to fully qualified path!")
            return None
        task.creds = creds.replace(fsuid=userns.root_uid(userns.ROOT))
        if kernel.init is not None and kernel.init.leader.fs is not None:
            task.fs = kernel.init.leader.fs
    try:
        if process.dumpable != SUID_DUMP_ROOT:
            try:
                ops.unlink_at(task, None, name)
            except Errno:
                pass  # whatever it is, opening meets it too
        opened: Any = ops.open_at(task, None, name, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_LARGEFILE, 0o600)
        file: File = opened if isinstance(opened, File) else await opened
        inode, owner = file.inode, task.creds.fsuid
    finally:
        task.creds, task.fs = creds, fs
    if inode.mode & 0o170000 == 0o100000 and inode.uid == owner and inode.mode & 0o677 == 0o600:
        return file
    _complain(task, "Core dump aborted: the file is not its owner's alone")
    file.put()
    return None


class _Full(Exception):
    """No more of the file is written: a limit, a full disk, or SIGKILL."""


class _Writer:
    """Positions in the file, and how much has been written to it; holes do not count."""

    def __init__(self, process: Process, file: File, limit: int) -> None:
        self.file, self.core = file, process.core
        self.left = limit
        self.end = process.rlimits[RLIMIT_FSIZE][0]

    def put(self, offset: int, data: Any, unit: int) -> None:
        """Write `data` at `offset`, cut to whole `unit`s where a limit is reached (_Full then)."""
        size = len(data)
        if self.core.interrupted:
            raise _Full
        fits = min(self.left, max(0, self.end - offset))
        if size > fits:
            size = fits - fits % unit
        if size:
            done = self.file.pwrite([memoryview(data)[:size]], offset)
            if done.__class__ is not int or done < size:
                raise _Full
            self.left -= size
        if size < len(data):
            raise _Full


async def _write(task: Task, file: File, info: SigInfo, limit: int, letter: bytes) -> bool:
    """The file's contents. True, also when a limit or a full disk cuts it: the beginning is worth having."""
    process, mm = task.process, task.mm
    chosen = process.coredump_filter
    parts = corefile.segments(mm, chosen)
    head = corefile.layout(parts, corefile.notes(task, info, letter))
    writer, pace = _Writer(process, file, limit), Pace(task)
    written = 0  # the end of what is there
    try:
        writer.put(0, head, 1)
        written = len(head)
        for part in parts:
            at, end = part.start, part.start + part.filesz
            while at < end:
                for va, data in corefile.pages(mm, part, at, PIECE):
                    offset = part.offset + va - part.start
                    writer.put(offset, data, PAGE)
                    at = va + len(data)
                    written = offset + len(data)
                    if pace.due():
                        break
                else:
                    break
                await pace.rest(restart=0)
        size = parts[-1].offset + parts[-1].filesz if parts else written
        if written < size:
            writer.put(size - 1, b"\0", 1)
    except (_Full, Errno):
        pass
    if WATCHES:
        ops.changed(file.path, file.inode, ops.IN_MODIFY)
    return True


__all__ = ["Core", "after_new_ids", "dump", "file_name", "hold"]
