"""What is in a core file: which memory, which notes, in the order of fs/binfmt_elf.c (elf_core_dump).

    ELF header, program headers      one PT_NOTE, then a PT_LOAD for each mapping
    notes                            the first thread's PRSTATUS, PRPSINFO, SIGINFO, AUXV, FILE, FPREGSET, XSTATE;
                                     PRSTATUS, FPREGSET, XSTATE of each other thread
    to the next page: memory         `filesz` bytes of each mapping; pages that were never made are holes

Headers and notes are small and built at once; memory is written from where it lies, a piece at a time (coredump.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cputime, regsets, userns
from kvmsentry.kernel.regsets import NT_PRFPREG, NT_PRSTATUS, NT_X86_XSTATE
from kvmsentry.mm.shared import SharedMemory
from kvmsentry.mm.vma import PROT_EXEC, PROT_READ, PROT_WRITE, VM_DONTDUMP, VM_SHARED
from kvmsentry.syscall.abi_signal import pack_siginfo

if TYPE_CHECKING:
    from kvmsentry.kernel.task import SigInfo, Task

PAGE = 4096
# bits of /proc/PID/coredump_filter, core(5); those of huge pages and DAX have nothing to select here
ANON_PRIVATE, ANON_SHARED, FILE_PRIVATE, FILE_SHARED, ELF_HEADERS = 1, 2, 4, 8, 16
DEFAULT_FILTER, ALL_FILTERS = 0x33, 0x1FF
NT_PRPSINFO, NT_AUXV, NT_SIGINFO, NT_FILE = 3, 6, 0x53494749, 0x46494C45  # uapi/linux/elf.h
FILE_NOTE_MAX = 4 << 20  # MAX_FILE_NOTE_SIZE
PSARGS = 80  # ELF_PRARGSZ
_ZERO_PAGE = bytes(PAGE)
_EHDR = Struct("<16sHHIQQQIHHHHHH")
_PHDR = Struct("<IIQQQQQQ")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE = 4, 62, 1, 4
_IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)
_NHDR = Struct("<III")
# struct elf_prstatus before and after the registers: pr_info, cursig, sigpend, sighold, pids, times; fpvalid
_STATUS = Struct("<iii hxx QQ iiii 8q")
_FPVALID = Struct("<ixxxx")
_PSINFO = Struct("<bsbb xxxx Q II iiii 16s 80s")  # struct elf_prpsinfo


class Segment:
    """A mapping in the core file: [start, end), of which the first `filesz` bytes are written at `offset`."""

    __slots__ = ("start", "end", "prot", "filesz", "offset", "backing", "at")

    def __init__(self, vma: Any, filesz: int) -> None:
        self.start, self.end, self.prot, self.filesz = vma.start, vma.end, vma.prot, filesz
        self.backing, self.at = vma.backing, vma.offset
        self.offset = 0


def _inode(backing: Any) -> Any:
    """The file behind a mapping; None for memory that has no name."""
    inode = getattr(backing, "inode", None)
    return inode if inode is not None else getattr(getattr(backing, "map", None), "inode", None)


def _wanted(mm: Any, vma: Any, chosen: int) -> int:
    """How many bytes of a mapping are written (vma_dump_size)."""
    length: int = vma.end - vma.start
    if vma.name in (b"[vdso]", b"[vvar]"):
        return length
    if vma.flags & VM_DONTDUMP:
        return 0
    inode = _inode(vma.backing)
    if vma.flags & VM_SHARED:
        kind = ANON_SHARED if inode is None or not inode.nlink else FILE_SHARED
        return length if chosen & kind else 0
    if chosen & ANON_PRIVATE:
        present, own = mm.vma_rss(vma)
        if own or (present and vma.backing is None):
            return length
    if vma.backing is None:
        return 0
    if chosen & FILE_PRIVATE:
        return length
    if chosen & ELF_HEADERS and not vma.offset and vma.prot & PROT_READ:
        if inode is not None and inode.mode & 0o111:
            return PAGE
        try:
            return PAGE if mm.read_force(vma.start, 4) == b"\x7fELF" else 0
        except Errno:
            return 0  # the file is shorter by now
    return 0


def segments(mm: Any, chosen: int) -> list[Segment]:
    """All mappings, with how much of each `chosen` (the coredump_filter) selects."""
    return [Segment(vma, _wanted(mm, vma, chosen)) for vma in mm.maps()]


# -- notes --
def _note(kind: int, data: bytes, name: bytes = b"CORE") -> bytes:
    name += b"\0"
    head = _NHDR.pack(len(name), len(data), kind)
    return head + name + bytes(-len(name) % 4) + data + bytes(-len(data) % 4)


def _time(ns: int) -> tuple[int, int]:
    return ns // 1_000_000_000, ns % 1_000_000_000 // 1000


def _pids(task: Task, tid: int) -> tuple[int, int, int, int]:
    """The task's number, its parent's, its group's and its session's, as in its own PID namespace."""
    process = task.process
    ns, parent = process.pid_ns, process.parent
    above = ns.pid_of(parent)
    return tid, above, ns.pgid_of(process.group), ns.sid_of(process.session)


def _status(task: Task, signo: int) -> bytes:
    """NT_PRSTATUS."""
    process = task.process
    used = cputime.of_process(process) if task is process.leader else cputime.of_task(task)
    return (
        _STATUS.pack(
            signo, 0, 0, signo, task.pending.mask, task.blocked, *_pids(task, task.vtid),
            *_time(used), 0, 0, *_time(process.children_user), *_time(process.children_system),
        )
        + regsets.general(task)
        + _FPVALID.pack(1)
    )  # fmt: skip


def _psinfo(task: Task, letter: bytes) -> bytes:
    """NT_PRPSINFO."""
    creds, image, mm = task.creds, task.mm.image, task.mm
    arguments = b""
    if image is not None:
        try:
            arguments = mm.read(image.arg_start, min(image.arg_end - image.arg_start, PSARGS - 1))
        except Errno:
            pass  # the program has unmapped its stack
    uid, gid = userns.shown_uid(creds.user_ns, creds.uid), userns.shown_gid(creds.user_ns, creds.gid)
    arguments = arguments.replace(b"\0", b" ")
    return _PSINFO.pack(b"RSDTZW".index(letter), letter, letter == b"Z", task.nice, 0, uid, gid,
                        *_pids(task, task.process.vpid), task.comm, arguments)  # fmt: skip


def _files(mm: Any) -> bytes:
    """NT_FILE: which part of which file lies where. Empty when the names are too long together."""
    rows, names = [], []
    for vma in mm.maps():
        name = vma.name
        if vma.backing is not None and name[:1] not in (b"", b"["):
            rows.append((vma.start, vma.end, vma.offset // PAGE))
            names.append(name + b"\0")
    words = [len(rows), PAGE, *(word for row in rows for word in row)]
    data = Struct(f"<{len(words)}Q").pack(*words) + b"".join(names)
    return data if len(data) <= FILE_NOTE_MAX else b""


def notes(task: Task, info: SigInfo, letter: bytes) -> bytes:
    """All notes. `task` dies of `info`; the other threads of its process have stopped. `letter`: its state, as ps(1)
    has it."""
    image = task.mm.image
    threads = [task, *(other for other in task.process.threads.values() if other is not task)]
    parts = []
    for thread in threads:
        parts.append(_note(NT_PRSTATUS, _status(thread, info.signo)))
        if thread is task:
            files = _files(task.mm)
            parts += [
                _note(NT_PRPSINFO, _psinfo(task, letter)),
                _note(NT_SIGINFO, pack_siginfo(info)),
                _note(NT_AUXV, image.auxv if image is not None else bytes(16)),
                _note(NT_FILE, files) if files else b"",
            ]
        state = regsets.extended(thread)
        parts.append(_note(NT_PRFPREG, regsets.floating(state)))
        parts.append(_note(NT_X86_XSTATE, state, b"LINUX"))
    return b"".join(parts)


def layout(parts: list[Segment], described: bytes) -> bytes:
    """The file up to its memory, with the offsets of `parts` filled in. There are fewer mappings than PN_XNUM."""
    start = _EHDR.size + _PHDR.size * (1 + len(parts))
    offset = start + len(described) + PAGE - 1 & -PAGE
    rows = [
        _EHDR.pack(_IDENT, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, 1 + len(parts), 0, 0,
                   0),
        _PHDR.pack(_PT_NOTE, 0, start, 0, 0, len(described), 0, 4),
    ]  # fmt: skip
    for part in parts:
        part.offset = offset
        prot = part.prot
        flags = (4 if prot & PROT_READ else 0) | (2 if prot & PROT_WRITE else 0) | (1 if prot & PROT_EXEC else 0)
        length = part.end - part.start
        rows.append(_PHDR.pack(_PT_LOAD, flags, offset, part.start, 0, part.filesz, length, PAGE))
        offset += part.filesz
    return b"".join(rows) + described


# -- memory --
def _not_zero(data: memoryview) -> Iterator[tuple[int, int]]:
    """Where the pages lie that have something in them: mappings are filled before they are touched, and Linux writes
    only what was."""
    first = -1
    for at in range(0, len(data), PAGE):
        if data[at : at + PAGE].tobytes() != _ZERO_PAGE:
            if first < 0:
                first = at
        elif first >= 0:
            yield first, at
            first = -1
    if first >= 0:
        yield first, len(data)


def pages(mm: Any, part: Segment, start: int, piece: int) -> Iterator[tuple[int, Any]]:
    """(address, bytes or view of them) of the pages that there are in what is written of `part`, from `start` on, in
    order and up to `piece` bytes at a time. Every value must be used before the next is asked for."""
    end = part.start + part.filesz
    if part.backing is None:
        view, ram = mm.frames.memory.view, mm.frames.is_ram
        for va, entry, count in mm.mmu.runs(start, end - start):
            gpa = entry & 0x000F_FFFF_FFFF_F000
            assert ram(gpa), "anonymous memory lies in RAM"
            for at in range(0, count * PAGE, piece):
                for first, last in _not_zero(view[gpa + at : gpa + min(at + piece, count * PAGE)]):
                    yield va + at + first, view[gpa + at + first : gpa + at + last]
        return
    memory = part.backing if isinstance(part.backing, SharedMemory) else None
    while start < end:
        stop = min(end, start + piece)
        if memory is None or memory.present(part.at + start - part.start, stop - start) == stop - start >> 12:
            try:
                yield start, mm.read_force(start, stop - start)
                start = stop
                continue
            except Errno:
                pass  # one of the pages is not to be had
        for va in range(start, stop, PAGE):
            if memory is None or memory.present(part.at + va - part.start, PAGE):
                try:
                    yield va, mm.read_force(va, PAGE)
                except Errno:
                    pass  # past the end of its file: a hole
        start = stop


__all__ = ["ALL_FILTERS", "DEFAULT_FILTER", "Segment", "layout", "notes", "pages", "segments"]
