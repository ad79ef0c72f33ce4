"""The magic links of /proc/PID: exe, cwd, root, fd/N, ns/NAME. They lead to the thing itself, whatever its name says
now."""

from __future__ import annotations

import errno
import itertools
import stat as st
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.anon import place_of
from kvmsentry.fs.proc.access import look
from kvmsentry.fs.proc.nodes import TextInode
from kvmsentry.fs.vfs import (
    DT_LNK,
    DT_REG,
    O_CLOEXEC,
    TASK_IO,
    Dentry,
    File,
    Inode,
    Mount,
    Path,
    SuperBlock,
    path_of,
)  # fmt: skip

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

Target = Callable[[], Any]  # the task that a directory is about; Errno(ESRCH) when it is no more


def shown(place: Path, root: Path) -> bytes:
    """A place as a link's text (d_path): ` (deleted)` when the name is gone."""
    text = path_of(place, root, mark=False)
    return text + b" (deleted)" if place.dentry.unlinked else text


def file_text(file: File, root: Path) -> bytes:
    """What readlink(2) of /proc/PID/fd/N says."""
    label = getattr(file, "label", None)
    if label is not None:
        text: bytes = label()
        return text
    if file.path is not None:
        return shown(file.path, root)
    kind = st.S_IFMT(file.inode.mode)
    if kind == st.S_IFSOCK:
        return b"socket:[%d]" % file.inode.ino
    if kind == st.S_IFIFO:
        return b"pipe:[%d]" % file.inode.ino
    return b"anon_inode:[unknown]"


class PlaceLink(Inode):
    """exe, cwd, root: `place(task)` says where it leads, None when there is nothing."""

    def __init__(self, sb: SuperBlock, target: Target, place: Callable[[Any], Path | None]) -> None:
        super().__init__(sb, st.S_IFLNK | 0o777)
        self.target, self.place = target, place

    def follow(self, task: Task) -> Path:
        """The place; EACCES for those who may not look, ENOENT without one."""
        target = self.target()
        look(task, target)
        place = self.place(target)
        if place is None:
            raise Errno(errno.ENOENT)
        return place

    def readlink(self, task: Task | None = None) -> bytes:
        """Its path as the reader sees it."""
        assert task is not None
        return shown(self.follow(task), task.fs.root)


class FdLink(Inode):
    """/proc/PID/fd/N."""

    def __init__(self, sb: SuperBlock, target: Target, fd: int, file: File) -> None:
        mode = (0o500 if file.readable else 0) | (0o300 if file.writable else 0)
        super().__init__(sb, st.S_IFLNK | mode)
        self.target, self.fd, self.size = target, fd, 64

    def _file(self, task: Task) -> File:
        target = self.target()
        look(task, target)
        file: File | None = target.files.files.get(self.fd) if target.files is not None else None
        if file is None:
            raise Errno(errno.ENOENT)
        return file

    def follow(self, task: Task) -> Path:
        """Where the open file is; for pipes and the like a place made for it."""
        return place_of(self._file(task))

    def readlink(self, task: Task | None = None) -> bytes:
        """A path, or `pipe:[N]` and the like."""
        assert task is not None
        return file_text(self._file(task), task.fs.root)


def _fdinfo(target: Task, fd: int) -> str:
    file = target.files.files.get(fd) if target.files is not None else None
    if file is None:
        raise Errno(errno.ENOENT)
    flags = file.flags & ~TASK_IO | (O_CLOEXEC if fd in target.files.cloexec else 0)
    mount = file.path.mount.id if file.path is not None else 15
    return f"pos:\t{file.pos}\nflags:\t0{flags:o}\nmnt_id:\t{mount}\nino:\t{file.inode.ino}\n{file.fdinfo()}"


class FdDirectory(Inode):
    """/proc/PID/fd, and with `info` /proc/PID/fdinfo."""

    def __init__(self, sb: SuperBlock, target: Target, info: bool = False) -> None:
        super().__init__(sb, st.S_IFDIR | (0o555 if info else 0o500))
        self.target, self.info = target, info
        self._nodes: dict[int, tuple[File, Inode]] = {}

    def lookup(self, name: bytes) -> Inode:
        """A descriptor that is open."""
        target = self.target()
        if not name.isdigit() or len(name) > 7 or (name[0] == 48 and name != b"0") or target.files is None:
            raise Errno(errno.ENOENT)
        fd = int(name)
        file = target.files.files.get(fd)
        if file is None:
            self._nodes.pop(fd, None)
            raise Errno(errno.ENOENT)
        known = self._nodes.get(fd)
        if known is not None and known[0] is file:
            node = known[1]
        else:
            if self.info:
                node = TextInode(self.sb, lambda reader: _fdinfo(_seen(reader, self.target), fd), 0o444)
            else:
                node = FdLink(self.sb, self.target, fd, file)
            if len(self._nodes) > 4096:
                self._nodes.clear()
            self._nodes[fd] = file, node
        node.uid, node.gid = self.uid, self.gid
        return node

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """Every open descriptor."""
        target = self.target()
        for fd in sorted(target.files.files) if target.files is not None else ():
            yield b"%d" % fd, self.ino + 1 + fd, DT_REG if self.info else DT_LNK


def _seen(reader: Task, target: Target) -> Any:
    task = target()
    look(reader, task)
    return task


# -- namespaces --------------------------------------------------------------------------------------------------------
class NsSuper(SuperBlock):
    """nsfs: an inode for each namespace."""

    magic = 0x6E736673  # NSFS_MAGIC
    fstype = "nsfs"


_nsfs = NsSuper()
_numbers = itertools.count(0xF0000010)
_SINGLE = {b"cgroup": 0xEFFFFFFB, b"ipc": 0xEFFFFFFF, b"net": 0xF0000000, b"pid": 0xEFFFFFFC, b"time": 0xEFFFFFFA,
           b"user": 0xEFFFFFFD}  # fmt: skip  # PROC_*_INIT_INO, include/linux/proc_ns.h
NAMES = (b"cgroup", b"ipc", b"mnt", b"net", b"pid", b"pid_for_children", b"time", b"time_for_children", b"user", b"uts")
_places: dict[int, Path] = {}


class NsInode(Inode):
    """A namespace, as a file to be compared by (device, inode) and handed to setns(2)."""

    def __init__(self, kind: bytes, ino: int, namespace: Any) -> None:
        super().__init__(_nsfs, st.S_IFREG | 0o444, ino=ino)
        self.kind, self.namespace = kind, namespace

    def open(self, task: Task, path: Path, flags: int) -> File:
        """A file that setns(2) takes."""
        return NsFile(self, path, flags)


class NsFile(File):
    """An open namespace: `inode.kind` and `inode.namespace`."""

    def label(self) -> bytes:
        """As the link that led here."""
        inode: Any = self.inode
        return b"%s:[%d]" % (inode.kind, inode.ino)


def _namespace(name: bytes, task: Task) -> tuple[int, Any]:
    """(inode number, object) of a task's namespace."""
    if name == b"uts":
        namespace: Any = task.uts
        if namespace is task.kernel.uts:
            return 0xEFFFFFFE, namespace
    elif name == b"mnt":
        from kvmsentry.fs.mounts import namespace_of

        namespace = namespace_of(task)
    else:
        return _SINGLE[name], None
    number = getattr(namespace, "ns_ino", 0)
    if not number:
        number = namespace.ns_ino = next(_numbers)
    return number, namespace


class NsLink(Inode):
    """/proc/PID/ns/NAME."""

    def __init__(self, sb: SuperBlock, target: Target, name: bytes) -> None:
        super().__init__(sb, st.S_IFLNK | 0o777)
        self.target, self.kind = target, name.removesuffix(b"_for_children")

    def _namespace(self, task: Task) -> tuple[int, Any]:
        return _namespace(self.kind, _seen(task, self.target))

    def follow(self, task: Task) -> Path:
        """The namespace's inode."""
        number, namespace = self._namespace(task)
        place = _places.get(number)
        if place is None or place.inode.namespace is not namespace:  # type: ignore[attr-defined]
            dentry = Dentry(b"", None, NsInode(self.kind, number, namespace))
            place = _places[number] = Path(Mount(_nsfs, dentry), dentry)
        return place

    def readlink(self, task: Task | None = None) -> bytes:
        """`uts:[4026531838]`."""
        assert task is not None
        return b"%s:[%d]" % (self.kind, self._namespace(task)[0])
