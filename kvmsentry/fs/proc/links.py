"""The magic links of /proc/PID: exe, cwd, root, fd/N, ns/NAME. They lead to the thing itself, whatever its name says
now."""

from __future__ import annotations

import errno
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
from kvmsentry.kernel import namespaces
from kvmsentry.kernel.task import RLIMIT_NOFILE
from kvmsentry.kernel.userns import shown_uid

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

NS_GET_USERNS, NS_GET_PARENT, NS_GET_NSTYPE, NS_GET_OWNER_UID = 0xB701, 0xB702, 0xB703, 0xB704  # uapi/linux/nsfs.h
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
NAMES = (b"cgroup", b"ipc", b"mnt", b"net", b"pid", b"pid_for_children", b"time", b"time_for_children", b"user", b"uts")


class NsInode(Inode):
    """A namespace, as a file to be compared by (device, inode), mounted somewhere and handed to setns(2)."""

    def __init__(self, namespace: Any) -> None:
        super().__init__(_nsfs, st.S_IFREG | 0o444, ino=namespaces.inode_number(namespace))
        self.namespace = namespace

    def open(self, task: Task, path: Path, flags: int) -> File:
        """A file that setns(2) takes."""
        return NsFile(self, path, flags)

    def text(self) -> bytes:
        """`uts:[4026531838]`."""
        return b"%s:[%d]" % (self.namespace.kind, self.ino)


def ns_path(namespace: Any) -> Path:
    """A place for a namespace's inode. Made anew each time, so that nothing here keeps the namespace alive."""
    dentry = Dentry(b"", None, NsInode(namespace))
    return Path(Mount(_nsfs, dentry), dentry)


class NsFile(File):
    """An open namespace."""

    def __init__(self, inode: Inode, path: Path | None, flags: int) -> None:
        super().__init__(inode, path, flags)
        if self.namespace.kind == b"mnt":
            self.namespace.users += 1

    def release(self) -> None:
        """A mount namespace without tasks may go now."""
        if self.namespace.kind == b"mnt":
            self.namespace.put()

    @property
    def namespace(self) -> Any:
        """The namespace itself."""
        return self.inode.namespace  # type: ignore[attr-defined]

    def label(self) -> bytes:
        """As the link that led here."""
        text: bytes = self.inode.text()  # type: ignore[attr-defined]
        return text

    def ioctl(self, task: Task, request: int, argument: int) -> int:
        """NS_GET_*, ioctl_ns(2)."""
        namespace = self.namespace
        if request == NS_GET_NSTYPE:
            return namespaces.FLAGS[namespace.kind]
        if request == NS_GET_OWNER_UID:
            if namespace.kind != b"user":
                raise Errno(errno.EINVAL)
            task.mm.write_u32(argument, shown_uid(task.creds.user_ns, namespace.owner))
            return 0
        if request == NS_GET_USERNS:
            related = namespace.user_ns if namespace.kind != b"user" else namespace.parent
        elif request == NS_GET_PARENT:
            if namespace.kind not in (b"user", b"pid"):
                raise Errno(errno.EINVAL)
            related = namespace.parent
        else:
            raise Errno(errno.ENOTTY)
        if related is None or not _in_sight(task, related):
            raise Errno(errno.EPERM)
        file = NsInode(related).open(task, ns_path(related), 0)
        try:
            return task.files.install(file, task.rlimit(RLIMIT_NOFILE), cloexec=True)
        except Errno:
            file.put()
            raise


def _in_sight(task: Task, namespace: Any) -> bool:
    """Does `task` live in it or above (ns_get_owner, pidns_get_parent)?"""
    if namespace.kind == b"user":
        return bool(namespace.below(task.creds.user_ns))
    return task.process.pid_ns.sees(namespace)


class NsLink(Inode):
    """/proc/PID/ns/NAME."""

    def __init__(self, sb: SuperBlock, target: Target, name: bytes) -> None:
        super().__init__(sb, st.S_IFLNK | 0o777)
        self.target, self.name = target, name

    def follow(self, task: Task) -> Path:
        """The namespace's inode."""
        return ns_path(namespaces.of_task(_seen(task, self.target), self.name))

    def readlink(self, task: Task | None = None) -> bytes:
        """`uts:[4026531838]`."""
        assert task is not None
        namespace = namespaces.of_task(_seen(task, self.target), self.name)
        return b"%s:[%d]" % (namespace.kind, namespaces.inode_number(namespace))
