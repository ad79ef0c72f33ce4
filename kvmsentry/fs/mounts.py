"""The types of file systems that can be mounted, and the sandbox's first tree of mounts.

    rootfs --> Mount(/) --> Mount(/proc)  Mount(/dev) --> Mount(/dev/pts) ...

As on Linux there is an empty root at the very bottom, which nobody sees: so the tree's / is a mount like others, that
pivot_root(2) can take away. All mounts are private to begin with, which is what a container's are.
"""

from __future__ import annotations

import errno
import importlib
import stat as st
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno, UserError
from kvmsentry.fs.mounttree import MountNamespace, attach, new_mount, summit
from kvmsentry.fs.vfs import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    FsContext,
    Path,
    SuperBlock,
    lookup_child,
    walk,
)
from kvmsentry.kernel.task import Credentials
from kvmsentry.kernel.userns import ROOT, capable, kgid, kuid

if TYPE_CHECKING:
    from kvmsentry.gofer.client import Client
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

CAP_SYS_ADMIN = 21  # uapi/linux/capability.h
S_IFMT, S_IFDIR = 0o170000, 0o040000

Constructor = Callable[["Kernel", dict[str, str]], SuperBlock]


# -- file system types
def _tmpfs(kernel: Kernel, options: dict[str, str]) -> SuperBlock:
    from kvmsentry.fs.tmpfs import TmpSuper, default_inodes

    sb = TmpSuper(kernel)
    sb.pool.limit = kernel.frames.limit_pages // 2  # tmpfs(5): half of RAM unless told
    sb.inode_limit = default_inodes(kernel)
    sb.configure(options)
    return sb


def _ramfs(kernel: Kernel, options: dict[str, str]) -> SuperBlock:
    from kvmsentry.fs.tmpfs import TmpSuper

    sb = TmpSuper(kernel, mode=0o755)
    sb.fstype, sb.magic = "ramfs", 0x858458F6  # RAMFS_MAGIC
    sb.configure({name: value for name, value in options.items() if name == "mode"})
    return sb


def _mqueue(kernel: Kernel, options: dict[str, str]) -> SuperBlock:
    """The message queues of the first IPC namespace; see mount_new for others."""
    from kvmsentry.fs.mqueue import first_space

    return first_space(kernel).super


def _proc(kernel: Kernel, options: dict[str, str]) -> SuperBlock:
    """The processes of the first PID namespace; see new_super for others."""
    from kvmsentry.fs.procfs import ProcSuper

    sb = ProcSuper(kernel)
    sb.configure(options)
    return sb


def _lazily(module: str, name: str, shared: bool = False) -> Constructor:
    """A type whose class is found in another module when it is first mounted; `shared`: one super block a kernel."""

    def construct(kernel: Kernel, options: dict[str, str]) -> SuperBlock:
        key = f"super:{module}.{name}"
        if shared and key in kernel.__dict__:
            kept: SuperBlock = kernel.__dict__[key]
            return kept
        sb: SuperBlock = getattr(importlib.import_module(module), name)(kernel)
        if shared:
            kernel.__dict__[key] = sb
        return sb

    return construct


fstypes: dict[str, Constructor] = {
    "tmpfs": _tmpfs,
    "ramfs": _ramfs,
    "devtmpfs": _lazily("kvmsentry.fs.devfs", "DevSuper", shared=True),
    "devpts": _lazily("kvmsentry.fs.devfs", "pts_super"),
    "proc": _proc,
    "mqueue": _mqueue,
    "sysfs": _lazily("kvmsentry.fs.sysfs", "SysSuper", shared=True),
    "cgroup2": _lazily("kvmsentry.fs.sysfs", "CgroupSuper", shared=True),
}


def register(fstype: str, constructor: Constructor) -> None:
    """Make `fstype` known to mount(2)."""
    fstypes[fstype] = constructor


def make_super(kernel: Kernel, fstype: str, options: dict[str, str] | None = None) -> SuperBlock:
    """A file system of that type; ENODEV when it is not known, EINVAL for its options."""
    constructor = fstypes.get(fstype)
    if constructor is None:
        raise Errno(errno.ENODEV)
    return constructor(kernel, options or {})


def new_super(task: Task, fstype: str, options: dict[str, str]) -> SuperBlock:
    """`make_super` for what depends on who mounts: a mqueue shows the queues of the task's IPC namespace, proc the
    processes of its PID namespace, and a tmpfs belongs to it. EPERM: see _may_mount_type."""
    _may_mount_type(task, fstype)
    if fstype == "proc" and task.process.numbers:
        return _proc_of(task, own_options(task, fstype, options))
    if fstype == "mqueue":
        from kvmsentry.fs.mqueue import space_of

        return space_of(task).super
    sb = make_super(task.kernel, fstype, own_options(task, fstype, options))
    if not sb.active:
        sb.user_ns = task.creds.user_ns  # whose root may change its options
    return sb


# -- the first tree
class _Builder:
    """Enough of a task to walk with, before there is one: root, with every capability."""

    def __init__(self, kernel: Kernel, root: Path) -> None:
        self.kernel, self.fs, self.creds = kernel, FsContext(root, root), Credentials()


def first_namespace(kernel: Kernel, sb: SuperBlock) -> MountNamespace:
    """A namespace that shows `sb` at /, and lives as long as the kernel."""
    bottom = _ramfs(kernel, {"mode": "755"})
    bottom.fstype = bottom.source = "rootfs"
    namespace = MountNamespace(new_mount(bottom))
    namespace.permanent = True
    attach(new_mount(sb), namespace.top())
    return namespace


def build(
    kernel: Kernel,
    client: Client,
    *,
    readonly_root: bool = False,
    overlay: bool = True,
    volumes: list[tuple[str, bytes, bool]] | None = None,
    size: int = 0,
    owners: Any = None,
) -> MountNamespace:
    """The sandbox's first mount namespace: the Gofer's tree `root` (below an overlay of at most `size` bytes, 0 = guest
    RAM), /proc, /sys, /dev, /dev/pts, /dev/shm, and `volumes`: (the Gofer's tree, where the application sees it,
    read-only). Mount points that the image lacks are made. UserError names a volume that cannot be mounted."""
    from kvmsentry.fs.goferfs import GoferSuper
    from kvmsentry.fs.overlay import OverlaySuper

    lower = GoferSuper(kernel, client.attach("root"), private=True, readonly=overlay or readonly_root, owners=owners)
    sb: SuperBlock = OverlaySuper(kernel, lower, size) if overlay else lower
    sb.source = "overlay" if overlay else "root"
    namespace = first_namespace(kernel, sb)
    top = namespace.top()
    builder = _Builder(kernel, top)
    for target, fstype, flags, options in (
        (b"/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, {}),
        (b"/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, {}),
        (b"/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, {}),
        (b"/dev", "devtmpfs", MS_NOSUID, {}),
        (b"/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, {}),
        (b"/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, {"mode": "1777"}),
        (b"/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, {}),
    ):
        try:
            mounted = make_super(kernel, fstype, options)
            if fstype == "tmpfs":
                mounted.source = "shm"
            attach(new_mount(mounted, flags=flags), mountpoint(builder, target, S_IFDIR))
        except Errno as error:
            if error.errno != errno.EROFS:
                raise
            # An image without the directory, and nothing may be written: the application does without it.
    for tree, guest, readonly in volumes or ():
        shown = guest.decode(errors="backslashreplace")
        try:
            node = client.attach(tree)
            volume = GoferSuper(kernel, node, private=False, readonly=readonly)
            volume.source = tree
            place = summit(mountpoint(builder, guest, node.attr.mode & S_IFMT))
            attach(new_mount(volume, flags=MS_NOSUID | MS_NODEV | (MS_RDONLY if readonly else 0)), place)
        except Errno as error:
            raise UserError(f"volume at {shown!r}: {error}") from None
    if readonly_root:
        top.mount.flags |= MS_RDONLY
    return namespace


def mountpoint(builder: Any, target: bytes, kind: int) -> Path:
    """The place `target`, made with its parents where missing: a directory, or an empty file for a file's mount."""
    place: Path = builder.fs.root
    names = [name for name in target.split(b"/") if name]
    done = b""
    for index, name in enumerate(names):
        last = index == len(names) - 1
        done += b"/" + name
        try:
            place = walk(builder, done)
        except Errno as error:
            if error.errno != errno.ENOENT:
                raise
            dentry = lookup_child(builder, place, name)
            if dentry.inode is not None:
                raise  # a symbolic link that leads nowhere
            directory = place.inode
            if last and kind != S_IFDIR:
                inode = directory.create(name, st.S_IFREG | 0o644, builder.creds)
            else:
                inode = directory.mkdir(name, S_IFDIR | 0o755, builder.creds)
            place = Path(place.mount, place.dentry.add(name, inode))
    if (place.inode.mode & S_IFMT == S_IFDIR) != (kind == S_IFDIR):
        raise Errno(errno.ENOTDIR if kind == S_IFDIR else errno.EISDIR)
    return place


# -- options and who may mount
def parse_options(data: bytes) -> dict[str, str]:
    """`a=1,b` as {"a": "1", "b": ""}."""
    options = {}
    for part in data.decode(errors="surrogateescape").split(","):
        name, _, value = part.partition("=")
        if name:
            options[name] = value
    return options


USER_MOUNTABLE = {"tmpfs", "ramfs", "proc", "sysfs", "devpts", "mqueue", "cgroup2"}  # FS_USERNS_MOUNT


def _may_mount_type(task: Task, fstype: str) -> None:
    """EPERM unless CAP_SYS_ADMIN is held where the type asks for it (mount_capable in fs/super.c): proc in the user
    namespace of the PID namespace, sysfs in that of the network, others in any."""
    creds = task.creds
    if creds.user_ns is ROOT or fstype not in fstypes:
        return  # the caller has looked at CAP_SYS_ADMIN
    if fstype not in USER_MOUNTABLE:
        raise Errno(errno.EPERM)
    from kvmsentry.kernel.sysvipc import namespace

    owners = {"proc": task.process.pid_ns, "sysfs": task.ns.net, "cgroup2": task.ns.cgroup, "mqueue": namespace(task)}
    owner = owners[fstype].user_ns if fstype in owners else creds.user_ns
    if not capable(creds, owner, CAP_SYS_ADMIN):
        raise Errno(errno.EPERM)


def own_options(task: Task, fstype: str, options: dict[str, str]) -> dict[str, str]:
    """The options of a tmpfs or procfs with ids of the first user namespace. A tmpfs' root belongs to whoever mounts
    it (shmem_get_inode)."""
    creds = task.creds
    if fstype == "proc" and creds.user_ns is not ROOT and options.get("gid", "").isdigit():
        return {**options, "gid": str(kgid(creds, int(options["gid"])))}
    if fstype != "tmpfs" or (creds.user_ns is ROOT and not creds.fsuid and not creds.fsgid):
        return options
    made = {"uid": str(creds.fsuid), "gid": str(creds.fsgid)}
    for name, translate in (("uid", kuid), ("gid", kgid)):
        if name in options:
            if not options[name].isdigit():
                raise Errno(errno.EINVAL)
            made[name] = str(translate(creds, int(options[name])))
    return {**options, **made}


def _proc_of(task: Task, options: dict[str, str]) -> SuperBlock:
    """A procfs of the task's PID namespace, which is not the first."""
    from kvmsentry.fs.procfs import ProcSuper

    sb = ProcSuper(task.kernel, task.process.pid_ns)
    sb.configure(options)
    return sb
