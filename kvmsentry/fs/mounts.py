"""Mount namespaces: the first tree, mounting and unmounting, and how /proc/mounts shows it all (mount_namespaces(7)).

    namespace.root --attach--> Mount(/proc)  Mount(/dev) --attach--> Mount(/dev/pts) ...

A mount knows its namespace; a task's namespace is that of its root. Propagation types are accepted and recorded
nowhere: every mount is private, which is what a container's are.
"""

from __future__ import annotations

import errno
import importlib
import stat as st
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno, UserError
from kvmsentry.fs.vfs import (
    FOLLOW,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    POLLERR,
    POLLPRI,
    Dentry,
    FsContext,
    Mount,
    Path,
    SuperBlock,
    lookup_child,
    path_of,
    walk,
)  # fmt: skip
from kvmsentry.kernel.task import Credentials
from kvmsentry.kernel.traps import WaitQueue
from kvmsentry.kernel.userns import ROOT, UserNamespace, capable, kgid, kuid

if TYPE_CHECKING:
    from kvmsentry.gofer.client import Client
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

MS_SYNCHRONOUS, MS_MANDLOCK, MS_DIRSYNC, MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME = 16, 64, 128, 256, 1024, 2048
MS_MOVE, MS_SILENT, MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 8192, 32768, 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25  # uapi/linux/mount.h
KEPT_FLAGS = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME | MS_NOSYMFOLLOW
PROPAGATION = MS_UNBINDABLE | MS_PRIVATE | MS_SLAVE | MS_SHARED
MNT_FORCE, MNT_DETACH, MNT_EXPIRE, UMOUNT_NOFOLLOW = 1, 2, 4, 8
CAP_SYS_ADMIN = 21  # uapi/linux/capability.h
LOCKABLE = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME
MNT_LOCKED = 1 << 30
MOUNTS_MOST = 100_000  # fs.mount-max

S_IFMT, S_IFDIR = 0o170000, 0o040000

_FLAG_NAMES = (
    (MS_NOSUID, "nosuid"), (MS_NODEV, "nodev"), (MS_NOEXEC, "noexec"), (MS_NOATIME, "noatime"),
    (MS_NODIRATIME, "nodiratime"), (MS_NOSYMFOLLOW, "nosymfollow"),
)  # fmt: skip

Constructor = Callable[["Kernel", dict[str, str]], SuperBlock]


class MountNamespace:
    """One tree of mounts. `root` is the mount that everything hangs below; `mounts` are all of them in order of
    mounting."""

    kind = b"mnt"

    def __init__(self, root: Mount, user_ns: UserNamespace = ROOT) -> None:
        self.root, self.user_ns, self.ns_ino = root, user_ns, 0
        self.users = 1  # tasks' FsContexts, and files that mean it
        self.permanent = False  # the first one: processes come to it from outside
        self.mounts: dict[Mount, None] = {}
        self.changes = 0
        self.queue = WaitQueue()  # who polls /proc/PID/mounts, fs/proc/mounttable.py
        self.add(root)

    def add(self, mount: Mount) -> None:
        """`mount` was attached below a mount of this namespace."""
        mount.namespace = self
        self.mounts[mount] = None
        self.changed()

    def changed(self) -> None:
        """The table of mounts looks different now (touch_mnt_namespace)."""
        self.changes += 1
        self.queue.wake(POLLERR | POLLPRI)

    def attach(self, mount: Mount, place: Path) -> None:
        """Show `mount` at `place`; ENOSPC when there are too many."""
        if len(self.mounts) >= MOUNTS_MOST:
            raise Errno(errno.ENOSPC)
        mount.attach(place.mount, place.dentry)
        self.add(mount)

    def put(self) -> None:
        """A user less: without any, everything is unmounted (put_mnt_ns)."""
        self.users -= 1
        if not self.users and not self.permanent:
            for child in list(self.root.children.values()):
                self.remove(child)
            self.mounts.clear()
            self.root.namespace = None
            _put_super(self.root.sb)

    def remove(self, mount: Mount) -> None:
        """Take `mount` and what hangs below it out of the tree."""
        for child in list(mount.children.values()):
            self.remove(child)
        mount.detach()
        self.mounts.pop(mount, None)
        mount.namespace = None
        self.changed()
        _put_super(mount.sb)


def _put_super(sb: SuperBlock) -> None:
    """A mount of `sb` is gone; with the last one the file system lets go of what it holds. Called after it was
    detached."""
    count = sb.__dict__["mount_count"] = sb.__dict__.get("mount_count", 1) - 1
    if count == 0:
        release = getattr(sb, "release", None)
        if release is not None:
            release()
            dentry = sb.__dict__.pop("root_dentry", None)
            if dentry is not None:
                dentry.children.clear()  # they hold inodes in cycles; memory must not wait for the collector


def new_mount(sb: SuperBlock, root: Dentry | None = None, flags: int = 0) -> Mount:
    """A mount of `sb`, not attached yet; `root` None shows all of it. All mounts of a super block share its
    dentries."""
    if root is None:
        root = sb.__dict__.get("root_dentry")
        if root is None:
            root = sb.__dict__["root_dentry"] = Dentry(b"", None, sb.root)
    sb.__dict__["mount_count"] = sb.__dict__.get("mount_count", 0) + 1
    return Mount(sb, root, flags & KEPT_FLAGS)


def namespace_of(task: Task) -> MountNamespace:
    """The mount namespace of `task`."""
    namespace: MountNamespace | None = task.fs.root.mount.namespace
    if namespace is None:  # the root was unmounted under it
        namespace = task.kernel.init.leader.fs.root.mount.namespace if task.kernel.init is not None else None
    if namespace is None:
        raise Errno(errno.EINVAL)
    return namespace


def all_mounts(task: Task) -> list[Mount]:
    """The mounts of `task`'s namespace in order of mounting."""
    return list(namespace_of(task).mounts)


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
    if not sb.__dict__.get("mount_count"):
        sb.__dict__["user_ns"] = task.creds.user_ns  # whose root may change its options
    return sb


# -- the first tree
class _Builder:
    """Enough of a task to walk with, before there is one: root, with every capability."""

    def __init__(self, kernel: Kernel, root: Path) -> None:
        self.kernel, self.fs, self.creds = kernel, FsContext(root, root), Credentials()


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
    root = new_mount(sb)
    namespace = MountNamespace(root)
    namespace.permanent = True
    builder = _Builder(kernel, Path(root, root.root))
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
            namespace.attach(new_mount(mounted, flags=flags), _mountpoint(builder, target, S_IFDIR))
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
            place = _mountpoint(builder, guest, node.attr.mode & S_IFMT)
            namespace.attach(new_mount(volume, flags=MS_NOSUID | MS_NODEV | (MS_RDONLY if readonly else 0)), place)
        except Errno as error:
            raise UserError(f"volume at {shown!r}: {error}") from None
    if readonly_root:
        root.flags |= MS_RDONLY
    return namespace


def _mountpoint(builder: Any, target: bytes, kind: int) -> Path:
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


# -- mount(2) and its kin
def parse_options(data: bytes) -> dict[str, str]:
    """`a=1,b` as {"a": "1", "b": ""}."""
    options = {}
    for part in data.decode(errors="surrogateescape").split(","):
        name, _, value = part.partition("=")
        if name:
            options[name] = value
    return options


def _matching(place: Path, root: Dentry) -> None:
    """ENOTDIR unless a directory goes on a directory and a file on a file."""
    assert root.inode is not None
    if (place.inode.mode & S_IFMT == S_IFDIR) != (root.inode.mode & S_IFMT == S_IFDIR):
        raise Errno(errno.ENOTDIR)


def mount_new(task: Task, place: Path, source: bytes, fstype: str, flags: int, data: bytes) -> None:
    """A file system of type `fstype` at `place`; ENODEV, EINVAL, ENOTDIR, EBUSY."""
    sb = new_super(task, fstype, parse_options(data))
    if not sb.__dict__.get("mount_count"):
        sb.source = source.decode(errors="backslashreplace") or "none"
    mount = new_mount(sb, flags=flags)
    _attach(task, mount, place)


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


def _attach(task: Task, mount: Mount, place: Path) -> None:
    _matching(place, mount.root)
    if place.dentry.unlinked:
        raise Errno(errno.ENOENT)
    namespace_of(task).attach(mount, place)


def attach_tree(task: Task, mount: Mount, place: Path) -> None:
    """Put a mount that is in no namespace, and what hangs below it, at `place` (move_mount(2))."""
    _attach(task, mount, place)
    namespace = namespace_of(task)
    for each in _tree(mount):
        if each is not mount:
            namespace.add(each)


def has_locked_children(source: Path) -> bool:
    """Is something mounted below that must go on covering what is there?"""
    return any(
        child.locked & MNT_LOCKED and _dentry_below(dentry, source.dentry)
        for dentry, child in source.mount.children.items()
    )


def mount_bind(task: Task, place: Path, source: Path, flags: int) -> None:
    """What is at `source` also at `place` (MS_BIND, with MS_REC what is mounted below it too)."""
    namespace = namespace_of(task)
    if place.mount.namespace is not namespace:
        raise Errno(errno.EINVAL)
    if source.mount.namespace is not namespace and source.mount.sb.fstype != "nsfs":
        raise Errno(errno.EINVAL)
    if not flags & MS_REC and has_locked_children(source):
        raise Errno(errno.EINVAL)
    mount = new_mount(source.mount.sb, source.dentry, source.mount.flags)
    mount.locked = source.mount.locked & ~MNT_LOCKED
    meant: Any = getattr(source.inode, "namespace", None) if mount.sb.fstype == "nsfs" else None
    if isinstance(meant, MountNamespace):
        meant.users += 1  # for good: nobody tells when this mount goes
    _attach(task, mount, place)
    if flags & MS_REC:
        _copy_children(source.mount, mount, source.dentry, namespace)


def _copy_children(old: Mount, new: Mount, below: Dentry | None, namespace: MountNamespace) -> None:
    for dentry, child in list(old.children.items()):
        if child is new or (below is not None and not _dentry_below(dentry, below)):
            continue
        copy = new_mount(child.sb, child.root, child.flags)
        copy.locked = child.locked
        namespace.attach(copy, Path(new, dentry))
        _copy_children(child, copy, None, namespace)


def _dentry_below(dentry: Dentry, top: Dentry) -> bool:
    while dentry is not top:
        if dentry.parent is dentry:
            return False
        dentry = dentry.parent
    return True


def remount(task: Task, place: Path, flags: int, data: bytes) -> None:
    """MS_REMOUNT: new flags for the mount, and new options for a tmpfs or procfs unless MS_BIND; EINVAL when `place` is
    no mount's root."""
    mount = place.mount
    if place.dentry is not mount.root:
        raise Errno(errno.EINVAL)
    if mount.locked & LOCKABLE & ~flags:
        raise Errno(errno.EPERM)  # can_change_locked_flags
    if not flags & MS_BIND and not capable(task.creds, mount.sb.__dict__.get("user_ns", ROOT), CAP_SYS_ADMIN):
        raise Errno(errno.EPERM)
    if not flags & MS_BIND and data and hasattr(mount.sb, "configure"):
        mount.sb.configure(own_options(task, mount.sb.fstype, parse_options(data)))
    mount.flags = flags & KEPT_FLAGS
    if mount.namespace is not None:
        mount.namespace.changed()


def move(task: Task, place: Path, source: Path) -> None:
    """MS_MOVE: EINVAL when `source` is no mount's root or is the root, ELOOP when `place` is below it."""
    mount = source.mount
    if source.dentry is not mount.root or mount.parent is None or mount.locked & MNT_LOCKED:
        raise Errno(errno.EINVAL)
    _matching(place, mount.root)
    above: Mount | None = place.mount
    while above is not None:
        if above is mount:
            raise Errno(errno.ELOOP)
        above = above.parent
    mount.detach()
    mount.attach(place.mount, place.dentry)
    namespace_of(task).changed()


def _users(task: Task, mount: Mount) -> Iterator[Path]:
    """Every place on `mount` that somebody holds: roots, working directories, open files, programs."""
    seen: set[int] = set()
    for other in task.kernel.tasks.values():
        for holder in (other.fs, other.files):
            if holder is None or id(holder) in seen:
                continue
            seen.add(id(holder))
            if holder is other.fs:
                yield from (p for p in (other.fs.root, other.fs.cwd) if p.mount is mount)
            else:
                yield from (f.path for f in other.files.files.values() if f.path is not None and f.path.mount is mount)
        exe = other.process.exe
        if exe is not None and exe.mount is mount:
            yield exe


def unmount(task: Task, place: Path, flags: int) -> None:
    """umount2(2): EINVAL, EBUSY, EAGAIN (MNT_EXPIRE)."""
    mount = place.mount
    if place.dentry is not mount.root or mount.parent is None or mount.namespace is not namespace_of(task):
        raise Errno(errno.EINVAL)
    if mount.locked & MNT_LOCKED:
        raise Errno(errno.EINVAL)
    if flags & MNT_EXPIRE:
        if flags & (MNT_FORCE | MNT_DETACH):
            raise Errno(errno.EINVAL)
        raise Errno(errno.EAGAIN)
    if not flags & MNT_DETACH and (mount.children or next(_users(task, mount), None) is not None):
        raise Errno(errno.EBUSY)
    namespace_of(task).remove(mount)


def pivot_root(task: Task, new: Path, old: Path) -> None:
    """pivot_root(2): `new` becomes the root of the namespace, the old root is shown at `old`; EBUSY, EINVAL,
    ENOTDIR."""
    namespace = namespace_of(task)
    root = task.fs.root
    if new.inode.mode & S_IFMT != S_IFDIR or old.inode.mode & S_IFMT != S_IFDIR:
        raise Errno(errno.ENOTDIR)
    if new.mount is root.mount or old.mount is root.mount:
        raise Errno(errno.EBUSY)
    if new.dentry is not new.mount.root or root.dentry is not root.mount.root or new.mount.parent is None:
        raise Errno(errno.EINVAL)
    above: Mount | None = old.mount
    while above is not None and above is not new.mount:
        above = above.parent
    if above is None:
        raise Errno(errno.EINVAL)
    old_root, new_root = root.mount, new.mount
    at = (old_root.parent, old_root.mountpoint)
    new_root.detach()
    if old_root.parent is not None:
        old_root.detach()
    if at[0] is not None and at[1] is not None:
        new_root.attach(at[0], at[1])
    else:
        namespace.root = new_root
    if old.dentry is new_root.root and old.mount is new_root:  # pivot_root(".", "."): the old root on top of the new
        old_root.attach(new_root, new_root.root)
    else:
        old_root.attach(old.mount, old.dentry)
    namespace.changed()
    for other in task.kernel.tasks.values():  # chroot_fs_refs
        fs = other.fs
        if fs is None:
            continue
        if fs.root.mount is old_root and fs.root.dentry is old_root.root:
            fs.root = Path(new_root, new_root.root)
        if fs.cwd.mount is old_root and fs.cwd.dentry is old_root.root:
            fs.cwd = Path(new_root, new_root.root)


def copy_namespace(fs: FsContext, user_ns: UserNamespace = ROOT) -> MountNamespace:
    """CLONE_NEWNS: a copy of the namespace in which `fs` (the new task's own) finds its paths from now on. One for a
    less privileged user namespace cannot take its mounts apart or undo their restrictions
    (mount_namespaces(7), "Restrictions on mount namespaces")."""
    namespace: MountNamespace | None = fs.root.mount.namespace
    if namespace is None:
        raise Errno(errno.EINVAL)
    copies: dict[Mount, Mount] = {}
    copy: MountNamespace | None = None
    for mount in _tree(namespace.root):
        twin = new_mount(mount.sb, mount.root, mount.flags)
        twin.locked = mount.locked
        if user_ns is not namespace.user_ns:
            twin.locked |= mount.flags & LOCKABLE | (MNT_LOCKED if copy is not None else 0)
        copies[mount] = twin
        if copy is None:
            copy = MountNamespace(twin, user_ns)
        else:
            assert mount.parent is not None and mount.mountpoint is not None
            twin.attach(copies[mount.parent], mount.mountpoint)
            copy.add(twin)
    assert copy is not None
    fs.root = Path(copies.get(fs.root.mount, copy.root), fs.root.dentry)
    fs.cwd = Path(copies.get(fs.cwd.mount, copy.root), fs.cwd.dentry)
    namespace.put()  # `fs` was one of its users
    return copy


def _tree(mount: Mount) -> Iterator[Mount]:
    yield mount
    for child in list(mount.children.values()):
        yield from _tree(child)


# -- what /proc shows
def _escaped(text: bytes) -> bytes:
    """mangle(), fs/proc_namespace.c: white space and backslashes in octal."""
    return text.replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011").replace(b"\n", b"\\012")


def _visible(task: Task) -> Iterator[tuple[Mount, bytes]]:
    """The mounts that `task` can reach, with their paths as it sees them."""
    root = task.fs.root
    for mount in all_mounts(task):
        path = path_of(Path(mount, mount.root), root)
        if not path.startswith(b"(unreachable)"):
            yield mount, path


def _options(mount: Mount) -> str:
    names = ["ro" if mount.flags & MS_RDONLY or mount.sb.readonly else "rw"]
    names += [name for flag, name in _FLAG_NAMES if mount.flags & flag]
    if not mount.flags & MS_NOATIME:
        names.append("relatime")
    return ",".join(names)


def mounts_text(task: Task) -> bytes:
    """/proc/PID/mounts (proc_pid_mounts(5)) for `task`."""
    lines = []
    for mount, path in _visible(task):
        options = _options(mount) + ("," + mount.sb.options if mount.sb.options else "")
        lines.append(b"%s %s %s %s 0 0\n" % (
            _escaped(mount.sb.source.encode()), _escaped(path), mount.sb.fstype.encode(), _escaped(options.encode())
        ))  # fmt: skip
    return b"".join(lines)


def mountinfo_text(task: Task) -> bytes:
    """/proc/PID/mountinfo (proc_pid_mountinfo(5)) for `task`."""
    lines = []
    for mount, path in _visible(task):
        sb = mount.sb
        top = mount
        shown = mount.root.inode.text() if sb.fstype == "nsfs" else (  # type: ignore[union-attr]
            path_of(Path(top, mount.root), Path(top, mount.root))
            if mount.root.parent is mount.root
            else _in_tree(mount.root)
        )
        dev = sb.dev
        sb_options = ("ro" if sb.readonly else "rw") + ("," + sb.options if sb.options else "")
        lines.append(b"%d %d %d:%d %s %s %s - %s %s %s\n" % (
            mount.id, mount.parent.id if mount.parent is not None else 1, dev >> 8 & 0xFFF, dev & 0xFF, _escaped(shown),
            _escaped(path), _options(mount).encode(), sb.fstype.encode(), _escaped(sb.source.encode()),
            _escaped(sb_options.encode()),
        ))  # fmt: skip
    return b"".join(lines)


def _in_tree(dentry: Dentry) -> bytes:
    names = []
    while dentry.parent is not dentry:
        names.append(dentry.name)
        dentry = dentry.parent
    return b"/" + b"/".join(reversed(names))


__all__ = [
    "FOLLOW",
    "MS_REMOUNT",
    "MountNamespace",
    "build",
    "copy_namespace",
    "mountinfo_text",
    "mounts_text",
    "register",
]
