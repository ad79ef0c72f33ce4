"""Files of /proc/PID that tell of memory: maps, smaps, statm, cmdline, environ, auxv and mem itself; proc(5)."""

from __future__ import annotations

import errno
import stat as st
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import gather, scatter
from kvmsentry.fs.proc.access import look
from kvmsentry.fs.vfs import File, Inode, Path, SuperBlock
from kvmsentry.mm.pagetables import GPA, OWNED

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

PAGE = 4096
VM_GROWSDOWN, VM_LOCKED, VM_NORESERVE, VM_DONTFORK, VM_WIPEONFORK, VM_STACK = 2, 4, 8, 16, 32, 256  # mm/vma.py
NAME_COLUMN = 73  # seq_setwidth(m, 25 + sizeof(void *) * 6 - 1), fs/proc/task_mmu.c
ARGUMENT_LIMIT = 1 << 20  # bytes of arguments or environment shown
PAGEMAP_LIMIT = 1 << 18  # bytes that a read of pagemap gives at most: what 128 MiB of addresses hold
PM_PRESENT, PM_FILE, PM_EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56  # fs/proc/task_mmu.c


def _line(vma: Any) -> bytes:
    prot, shared = vma.prot, vma.shared
    dev = vma.dev
    head = (
        f"{vma.start:08x}-{vma.end:08x} {'r' if prot & 1 else '-'}{'w' if prot & 2 else '-'}{'x' if prot & 4 else '-'}"
        f"{'s' if shared else 'p'} {vma.offset if vma.backing is not None else 0:08x} "
        f"{dev >> 8 & 0xFFF:02x}:{dev & 0xFF:02x} {vma.ino} "
    ).encode()
    name = vma.name
    if name:
        return head.ljust(NAME_COLUMN) + name.replace(b"\n", b"\\012") + b"\n"
    return head + b"\n"


def maps(reader: Task, target: Task) -> bytes:
    """/proc/PID/maps."""
    look(reader, target)
    mm = target.mm
    return b"".join(_line(vma) for vma in mm.maps()) if mm is not None else b""


def _flags(vma: Any) -> str:
    names = [name for bit, name in ((1, "rd"), (2, "wr"), (4, "ex")) if vma.prot & bit]
    if vma.shared:
        names.append("sh")
    names += [name for bit, name in ((1, "mr"), (2, "mw"), (4, "me")) if vma.max_prot & bit]
    flags = vma.flags
    for bit, name in ((VM_GROWSDOWN, "gd"), (VM_LOCKED, "lo"), (VM_DONTFORK, "dc"), (VM_NORESERVE, "nr"),
                      (VM_WIPEONFORK, "wf")):  # fmt: skip
        if flags & bit:
            names.append(name)
    return " ".join(names)


def _mappers(kernel: Kernel) -> Counter[int]:
    """How many address spaces map each backing, by its id()."""
    spaces = {id(task.mm): task.mm for task in kernel.tasks.values() if task.mm is not None}
    counts: Counter[int] = Counter()
    for mm in spaces.values():
        counts.update({id(vma.backing) for vma in mm.maps() if vma.backing is not None})
    return counts


def _counts(kernel: Kernel, mm: Any) -> Iterator[tuple[Any, dict[str, int]]]:
    """(VMA, kB by name) of each mapping. Private pages are ours alone; all others belong to the backing, and are taken
    to be mapped by every address space that maps it (without one: by a parent and a child, from fork on)."""
    mappers = _mappers(kernel)
    for vma in mm.maps():
        present, own = mm.vma_rss(vma)
        private, rest = own * 4, (present - own) * 4
        users = max(mappers[id(vma.backing)], 1) if vma.backing is not None else 2
        shared, alone = (rest, 0) if users > 1 else (0, rest)
        locked = private + rest if vma.flags & VM_LOCKED else 0
        yield vma, {
            "Rss": private + rest, "Pss": private + rest // users, "Pss_Dirty": private, "Shared_Clean": shared,
            "Shared_Dirty": 0, "Private_Clean": alone, "Private_Dirty": private, "Referenced": private + rest,
            "Anonymous": private, "LazyFree": 0, "AnonHugePages": 0, "ShmemPmdMapped": 0, "FilePmdMapped": 0,
            "Shared_Hugetlb": 0, "Private_Hugetlb": 0, "Swap": 0, "SwapPss": 0, "Locked": locked,
        }  # fmt: skip


def _table(values: dict[str, int]) -> str:
    return "".join(f"{name + ':':<16}{value:8d} kB\n" for name, value in values.items())


def smaps(reader: Task, target: Task) -> bytes:
    """/proc/PID/smaps."""
    look(reader, target)
    if target.mm is None:
        return b""
    parts = []
    for vma, values in _counts(target.kernel, target.mm):
        size = (vma.end - vma.start) // 1024
        rows = {"Size": size, "KernelPageSize": 4, "MMUPageSize": 4, **values}
        parts.append(_line(vma) + (_table(rows) + f"THPeligible:           0\nVmFlags: {_flags(vma)} \n").encode())
    return b"".join(parts)


def smaps_rollup(reader: Task, target: Task) -> bytes:
    """/proc/PID/smaps_rollup."""
    look(reader, target)
    if target.mm is None:
        raise Errno(errno.ESRCH)
    total: dict[str, int] = {}
    first, last = 0, 0
    for vma, values in _counts(target.kernel, target.mm):
        first, last = first or vma.start, vma.end
        for name, value in values.items():
            total[name] = total.get(name, 0) + value
    head = f"{first:08x}-{last:08x} ---p 00000000 00:00 0 ".encode().ljust(NAME_COLUMN) + b"[rollup]\n"
    return head + _table(total).encode()


class Sizes:
    """Pages by kind, as statm and status show them."""

    __slots__ = ("total", "resident", "peak", "shared", "text", "data", "stack", "library", "locked", "anonymous")

    def __init__(self, mm: Any) -> None:
        self.total, self.resident, self.locked = mm.total_pages, mm.rss_pages, mm.locked_pages
        self.peak = mm.peak_pages
        self.data = mm.data_pages
        self.text = self.stack = self.library = self.shared = 0
        image = mm.image
        if image is not None:
            self.text = (image.end_code + PAGE - 1) // PAGE - image.start_code // PAGE
        for vma in mm.maps():
            pages = (vma.end - vma.start) // PAGE
            if vma.flags & VM_STACK:
                self.stack += pages
            elif vma.prot & 4 and vma.backing is not None:
                self.library += pages
        self.library = max(0, self.library - self.text)
        self.anonymous = self.resident


def shared_pages(mm: Any) -> int:
    """Pages present that belong to files and shared memory. Costs a walk of the page tables."""
    return sum(present - own for present, own in (mm.vma_rss(vma) for vma in mm.maps() if vma.backing is not None))


def statm(reader: Task, target: Task) -> str:
    """/proc/PID/statm."""
    mm = target.mm
    if mm is None:
        return "0 0 0 0 0 0 0\n"
    sizes = Sizes(mm)
    shared = shared_pages(mm)
    return f"{sizes.total} {sizes.resident} {shared} {sizes.text} 0 {sizes.data + sizes.stack} 0\n"


def _read(mm: Any, start: int, end: int) -> bytes:
    """What is mapped of [start, end), whatever the protection (FOLL_FORCE), at most ARGUMENT_LIMIT; ends at the first
    page that is not there."""
    length = min(end - start, ARGUMENT_LIMIT)
    if length <= 0:
        return b""
    try:
        data: bytes = mm.read(start, length)
        return bytes(data)
    except Errno:
        pass
    parts = []
    at, end = start, start + length
    while at < end:
        n = min(end - at, PAGE - at % PAGE)
        try:
            parts.append(bytes(mm.read_force(at, n)))
        except Errno:
            break
        at += n
    return b"".join(parts)


def cmdline(reader: Task, target: Task) -> bytes:
    """/proc/PID/cmdline; what setproctitle(3) has made of it where the last argument's end was overwritten."""
    mm = target.mm
    image = mm.image if mm is not None else None
    if image is None:
        return b""
    data = _read(mm, image.arg_start, image.arg_end)
    if data and data[-1] and image.env_end > image.arg_end:
        data = _read(mm, image.arg_start, image.env_end).split(b"\0")[0] + b"\0"
    return data


def environ(reader: Task, target: Task) -> bytes:
    """/proc/PID/environ."""
    look(reader, target)
    mm = target.mm
    image = mm.image if mm is not None else None
    return _read(mm, image.env_start, image.env_end) if image is not None else b""


def auxv(reader: Task, target: Task) -> bytes:
    """/proc/PID/auxv."""
    look(reader, target)
    mm = target.mm
    image = mm.image if mm is not None else None
    return bytes(image.auxv) if image is not None else b""


class MemFile(File):
    """/proc/PID/mem, opened: positions are addresses."""

    seekable = True

    def __init__(self, inode: Inode, path: Path | None, flags: int, mm: Any) -> None:
        super().__init__(inode, path, flags)
        self.mm = mm

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_SET and SEEK_CUR only (mem_lseek)."""
        if whence not in (0, 1):
            raise Errno(errno.EINVAL)
        self.pos = offset + (self.pos if whence else 0)
        return self.pos

    def pread(self, views: list[memoryview], pos: int) -> int:
        """Bytes at address `pos`; EIO where nothing is."""
        if self.mm is None or not self.mm.users:
            return 0
        data = _read(self.mm, pos, pos + sum(map(len, views)))
        if not data and views:
            return -errno.EIO
        return scatter(views, data)

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """Store at address `pos`, also into read-only private mappings, which get a copy; EIO where nothing is."""
        if self.mm is None or not self.mm.users:
            return 0
        data = gather(views, ARGUMENT_LIMIT)
        done = 0
        while done < len(data):
            n = min(len(data) - done, PAGE - (pos + done) % PAGE)
            try:
                self.mm.write_force(pos + done, data[done : done + n])
            except Errno:
                return done or -errno.EIO
            done += n
        return done


class MemInode(Inode):
    """/proc/PID/mem."""

    def __init__(self, sb: SuperBlock, target: Any) -> None:
        super().__init__(sb, st.S_IFREG | 0o600)
        self.target = target

    def open(self, task: Task, path: Path, flags: int) -> File:
        """For those who may look."""
        target = self.target()
        look(task, target)
        return MemFile(self, path, flags, target.mm)


class PagemapFile(MemFile):
    """/proc/PID/pagemap, opened: eight bytes a page, at page number times eight. Frame numbers are 0, as Linux shows
    them to the unprivileged; nobody tracks which pages are soft-dirty (Documentation/admin-guide/mm/pagemap.rst)."""

    def pread(self, views: list[memoryview], pos: int) -> int:
        """Words of the pages from `pos` on; EINVAL unless position and length are whole words; 0 at the end."""
        length = sum(map(len, views))
        if pos % 8 or length % 8:
            raise Errno(errno.EINVAL)
        mm = self.mm
        if mm is None or not mm.users:
            return 0
        start = pos // 8 * PAGE
        end = min(start + min(length, PAGEMAP_LIMIT) // 8 * PAGE, mm.user_top + PAGE - 1 & -PAGE)
        if end <= start:
            return 0
        words = array("Q", bytes((end - start) // PAGE * 8))
        for vma in mm.tree.range(start, end):
            first, last = max(start, vma.start), min(end, vma.end)
            for va, entry, pages in mm.mmu.runs(first, last - first):
                word = PM_PRESENT
                if vma.shared or (vma.backing is not None and not entry & OWNED):
                    word |= PM_FILE
                elif entry & OWNED and mm.frames.sole(entry & GPA, pages):
                    word |= PM_EXCLUSIVE
                at = (va - start) // PAGE
                words[at : at + pages] = array("Q", [word]) * pages
        return scatter(views, memoryview(words).cast("B"))

    def pwrite(self, views: list[memoryview], pos: int) -> int:
        """EINVAL: it has no such operation."""
        raise Errno(errno.EINVAL)


class PagemapInode(MemInode):
    """/proc/PID/pagemap."""

    def __init__(self, sb: SuperBlock, target: Any) -> None:
        super().__init__(sb, target)
        self.mode = st.S_IFREG | 0o400

    def open(self, task: Task, path: Path, flags: int) -> File:
        """For those who may look."""
        target = self.target()
        look(task, target)
        return PagemapFile(self, path, flags, target.mm)


def clear_refs(writer: Task, target: Task, data: bytes) -> None:
    """/proc/PID/clear_refs: 1 to 4 forget which pages were used or written, which nobody tracks; 5 makes the largest
    resident size the present one. EINVAL."""
    look(writer, target)
    try:
        kind = int(data.strip(b" \t\n\0"), 10)
    except ValueError:
        raise Errno(errno.EINVAL) from None
    if not 1 <= kind <= 5:
        raise Errno(errno.EINVAL)
    mm = target.mm
    if kind == 5 and mm is not None:
        mm.forget_peak()
