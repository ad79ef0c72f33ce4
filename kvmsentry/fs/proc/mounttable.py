"""/proc/PID/mounts, mountinfo and mountstats: text as elsewhere, and poll(2) tells when the mounts have changed since
it last told (mounts_poll in fs/proc_namespace.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.mount import Mount, PeerGroup
from kvmsentry.fs.mounttree import (
    all_mounts,
    below,
    namespace_of,
    reachable,
)
from kvmsentry.fs.proc.nodes import TextFile, TextInode
from kvmsentry.fs.vfs import (
    MS_NOATIME,
    MS_NODEV,
    MS_NODIRATIME,
    MS_NOEXEC,
    MS_NOSUID,
    MS_NOSYMFOLLOW,
    MS_RDONLY,
    MS_STRICTATIME,
    POLLERR,
    POLLIN,
    POLLPRI,
    POLLRDNORM,
    Dentry,
    Path,
    SuperBlock,
)
from kvmsentry.kernel.traps import WaitQueue

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

_FLAG_NAMES = (
    (MS_NOSUID, "nosuid"), (MS_NODEV, "nodev"), (MS_NOEXEC, "noexec"), (MS_NOATIME, "noatime"),
    (MS_NODIRATIME, "nodiratime"),
)  # fmt: skip


def _escaped(text: bytes) -> bytes:
    """mangle(), fs/proc_namespace.c: white space and backslashes in octal."""
    return text.replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011").replace(b"\n", b"\\012")


def _visible(task: Task) -> Iterator[tuple[Mount, bytes]]:
    """The mounts that `task` can reach, with their paths as it sees them. Each path is made from the one of the mount
    below it: mounts may be piled up by the thousand."""
    root = task.fs.root
    paths: dict[Mount, bytes | None] = {root.mount: b"" if root.dentry is root.mount.root else None}
    for mount in all_mounts(task):
        climb = [mount]
        while climb[-1] not in paths:
            parent = climb[-1].parent
            if parent is None:
                paths[climb[-1]] = None
                break
            climb.append(parent)
        base = climb.pop()
        for each in reversed(climb):
            at = each.mountpoint
            assert at is not None
            if base is root.mount:
                paths[each] = _shown(at, root.dentry) if below(at, root.dentry) else None
            else:
                before = paths[base]
                paths[each] = None if before is None else before + _shown(at, base.root)
            base = each
        path = paths[mount]
        if path is not None:
            yield mount, path or b"/"


def _shown(dentry: Dentry, top: Dentry | None) -> bytes:
    """The path of `dentry` below `top`, None for its file system's; nothing for `top` itself."""
    names = []
    while dentry is not top and dentry.parent is not dentry:
        names.append(dentry.name)
        dentry = dentry.parent
    return b"".join(b"/" + name for name in reversed(names))


def _options(mount: Mount) -> str:
    flags = mount.flags
    names = [name for flag, name in _FLAG_NAMES if flags & flag]
    if not flags & (MS_NOATIME | MS_STRICTATIME):
        names.append("relatime")
    if flags & MS_NOSYMFOLLOW:
        names.append("nosymfollow")
    return "".join("," + name for name in names)


def mounts_text(task: Task) -> bytes:
    """/proc/PID/mounts (proc_pid_mounts(5)) for `task`."""
    lines = []
    for mount, path in _visible(task):
        sb = mount.sb
        options = ("ro" if mount.flags & MS_RDONLY or sb.readonly else "rw") + _options(mount)
        if sb.options:
            options += "," + sb.options
        lines.append(b"%s %s %s %s 0 0\n" % (
            _escaped(sb.source.encode()), _escaped(path), sb.fstype.encode(), _escaped(options.encode())
        ))  # fmt: skip
    return b"".join(lines)


def _dominating(mount: Mount, root: Path) -> PeerGroup | None:
    """The nearest group that `mount` receives from of which `root` shows a member (get_dominating_id)."""
    group = mount.master
    while group is not None:
        for peer in group.members:
            if peer.namespace is mount.namespace and reachable(Path(peer, peer.root), root):
                return group
        group = group.master
    return None


def _peers(mount: Mount, root: Path) -> str:
    """The optional fields of mountinfo."""
    text = f" shared:{mount.group.id}" if mount.group is not None else ""
    master = mount.master
    if master is not None:
        text += f" master:{master.id}"
        shown = _dominating(mount, root)
        if shown is not None and shown is not master:
            text += f" propagate_from:{shown.id}"
    return text + (" unbindable" if mount.unbindable else "")


def _in_super(dentry: Dentry) -> bytes:
    """What of its file system a mount shows whose root is `dentry`."""
    return (_shown(dentry, None) or b"/") + (b"//deleted" if dentry.unlinked else b"")


def mountinfo_text(task: Task) -> bytes:
    """/proc/PID/mountinfo (proc_pid_mountinfo(5)) for `task`."""
    lines = []
    root = task.fs.root
    for mount, path in _visible(task):
        sb = mount.sb
        shown = mount.root.inode.text() if sb.fstype == "nsfs" else _in_super(mount.root)  # type: ignore[union-attr]
        dev = sb.dev
        sb_options = ("ro" if sb.readonly else "rw") + ("," + sb.options if sb.options else "")
        options = ("ro" if mount.flags & MS_RDONLY else "rw") + _options(mount) + _peers(mount, root)
        lines.append(b"%d %d %d:%d %s %s %s - %s %s %s\n" % (
            mount.id, (mount.parent or mount).id, dev >> 8 & 0xFFF, dev & 0xFF, _escaped(shown), _escaped(path),
            options.encode(), sb.fstype.encode(), _escaped(sb.source.encode()), _escaped(sb_options.encode()),
        ))  # fmt: skip
    return b"".join(lines)


class MountsFile(TextFile):
    """An open table of the mounts of one namespace."""

    def __init__(self, inode: MountsInode, path: Path | None, flags: int, task: Task) -> None:
        super().__init__(inode, path, flags, task)
        target = inode.target()
        if target.fs is None:
            raise Errno(errno.EINVAL)  # a zombie has no mounts (mounts_open_common)
        self.namespace = namespace_of(target)
        self.queue: WaitQueue = self.namespace.queue
        self.told = self.namespace.changes

    def poll(self) -> int:
        """Always readable; POLLERR and POLLPRI, once, after each change."""
        changes = self.namespace.changes
        if changes == self.told:
            return POLLIN | POLLRDNORM
        self.told = changes
        return POLLIN | POLLRDNORM | POLLERR | POLLPRI


class MountsInode(TextInode):
    """One of the tables; `target()` is the task whose mounts it shows."""

    def __init__(self, sb: SuperBlock, target: Callable[[], Task], show: Callable[[Any, Any], Any], mode: int) -> None:
        super().__init__(sb, lambda reader: show(reader, target()), mode)
        self.target = target

    def open(self, task: Task, path: Path, flags: int) -> MountsFile:
        """Knows the mounts of this moment."""
        return MountsFile(self, path, flags, task)
