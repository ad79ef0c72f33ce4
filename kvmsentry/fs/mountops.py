"""What mount(2) and its kin do to the tree: bind, move, remount, unmount, pivot_root(2), propagation types, copies of
the namespace. Each function checks in Linux's order (fs/namespace.c) and changes nothing when it refuses."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.fdtable import all_files
from kvmsentry.fs.mount import MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE, Mount
from kvmsentry.fs.mounts import new_super, own_options, parse_options
from kvmsentry.fs.mounttree import (
    ATIME_FLAGS,
    KEPT_FLAGS,
    LOCK_ATIME,
    LOCKABLE,
    MNT_LOCKED,
    MountNamespace,
    attach,
    below,
    busy,
    clone,
    copy_tree,
    has_locked_children,
    lock_tree,
    meant_namespace,
    nameless,
    namespace_of,
    new_mount,
    reachable,
    summit,
    unmount_tree,
)
from kvmsentry.fs.vfs import (
    MS_BIND,
    MS_NOATIME,
    MS_NODIRATIME,
    MS_RDONLY,
    MS_REC,
    MS_STRICTATIME,
    Dentry,
    FsContext,
    Path,
    SuperBlock,
)
from kvmsentry.kernel import cap
from kvmsentry.kernel.userns import ROOT, UserNamespace, capable

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

MS_MOVE, MS_SILENT, MS_RELATIME = 8192, 32768, 1 << 21  # uapi/linux/mount.h
PROPAGATION = MS_UNBINDABLE | MS_PRIVATE | MS_SLAVE | MS_SHARED
MNT_FORCE, MNT_DETACH, MNT_EXPIRE, UMOUNT_NOFOLLOW = 1, 2, 4, 8  # include/linux/fs.h
S_IFMT, S_IFDIR, S_IFREG = 0o170000, 0o040000, 0o100000


def may_mount(task: Task) -> None:
    """EPERM without CAP_SYS_ADMIN over the mount namespace."""
    if not capable(task.creds, namespace_of(task).user_ns, cap.SYS_ADMIN):
        raise Errno(errno.EPERM)


def _ours(task: Task, mount: Mount) -> bool:
    """check_mnt."""
    return mount.namespace is namespace_of(task)


def _usable(task: Task, mount: Mount) -> bool:
    """Ours, or in a descriptor's tree that was copied here or is new (may_use_mount)."""
    namespace: MountNamespace | None = mount.namespace
    if namespace is None:
        return False
    mine = namespace_of(task)
    return namespace is mine or (namespace.anonymous and namespace.origin in (None, mine))


def _root_of_nameless(mount: Mount) -> bool:
    namespace = mount.namespace
    return namespace is not None and namespace.anonymous and namespace.root is mount


def _is_directory(dentry: Dentry) -> bool:
    assert dentry.inode is not None
    return dentry.inode.mode & S_IFMT == S_IFDIR


def _loops(task: Task, mount: Mount) -> bool:
    """Is it a mount namespace's file, and not of a later one than ours (mnt_ns_loop)?"""
    meant = meant_namespace(mount)
    return meant is not None and namespace_of(task).sequence >= meant.sequence


def _target(place: Path) -> Path:
    """Where a mount at `place` goes; ENOENT when the name is gone."""
    place = summit(place)
    if place.dentry.unlinked:
        raise Errno(errno.ENOENT)
    return place


# -- who is there
def used_mounts(task: Task) -> set[Mount]:
    """Every mount on which somebody's root, working directory, open file or program is."""
    used = {file.path.mount for file in all_files(task.kernel) if file.path is not None}
    for other in task.kernel.tasks.values():
        if other.fs is not None:
            used.update((other.fs.root.mount, other.fs.cwd.mount))
        if other.process.exe is not None:
            used.add(other.process.exe.mount)
    return used


def _written(task: Task, mount: Mount | None, sb: SuperBlock) -> bool:
    """Is a file open for writing through `mount`, or with None anywhere on `sb`?"""
    return any(
        file.writable and file.path is not None and file.path.mount.sb is sb and mount in (None, file.path.mount)
        and file.inode.mode & S_IFMT == S_IFREG
        for file in all_files(task.kernel)
    )  # fmt: skip


# -- new ones
def mount_new(task: Task, place: Path, source: bytes, fstype: str, flags: int, data: bytes) -> None:
    """A file system of type `fstype` at `place`; ENODEV, EINVAL, ENOTDIR, EBUSY, EPERM."""
    sb = new_super(task, fstype, parse_options(data))
    if not sb.active:
        sb.source = source.decode(errors="backslashreplace") or "none"
        if flags & MS_RDONLY:
            sb.readonly = True
    mount = new_mount(sb, flags=flags)
    mount.locked = revealing(task, mount)
    covered, place = place, _target(place)
    if not _ours(task, place.mount):
        raise Errno(errno.EINVAL)
    if covered.mount.sb is sb and covered.dentry is covered.mount.root:
        raise Errno(errno.EBUSY)
    if not _is_directory(place.dentry):
        raise Errno(errno.ENOTDIR)
    attach(mount, place)


def revealing(task: Task, mount: Mount) -> int:
    """What of the new `mount` must be locked because the task's namespace shows procfs and sysfs so only. EPERM: it
    would show what a less privileged user namespace does not see of them yet (mount_too_revealing)."""
    namespace, sb = namespace_of(task), mount.sb
    if namespace.user_ns is ROOT or sb.fstype not in ("proc", "sysfs"):
        return 0
    for other in namespace.mounts:
        if other.sb.fstype != sb.fstype or other.root.parent is not other.root:
            continue
        kept = other.locked & (MS_RDONLY | LOCK_ATIME) | (MS_RDONLY if other.sb.readonly else 0)
        if kept & MS_RDONLY and not (mount.flags & MS_RDONLY or sb.readonly):
            continue
        if kept & LOCK_ATIME and (other.flags ^ mount.flags) & ATIME_FLAGS:
            continue
        if any(child.locked & MNT_LOCKED and _full(at) for at, child in other.children.items()):
            continue
        return kept
    raise Errno(errno.EPERM)


def _full(dentry: Dentry) -> bool:
    """Is it more than an empty directory, which a mount may cover without hiding a thing?"""
    inode = dentry.inode
    return inode is None or not _is_directory(dentry) or next(iter(inode.readdir()), None) is not None


def copy_of(task: Task, source: Path, recursive: bool) -> Mount:
    """What is at `source`, in no namespace yet: MS_BIND, open_tree(2). EINVAL, EPERM."""
    old = source.mount
    if old.unbindable:
        raise Errno(errno.EINVAL)
    if not _usable(task, old) and old.sb.fstype != "nsfs":
        raise Errno(errno.EINVAL)
    if recursive:
        made = copy_tree(old, source.dentry, namespaces=True)
    elif has_locked_children(old, source.dentry):
        raise Errno(errno.EINVAL)
    else:
        made = clone(old, source.dentry)
    made.locked &= ~MNT_LOCKED
    return made


def mount_bind(task: Task, place: Path, source: Path, flags: int) -> None:
    """What is at `source` also at `place` (MS_BIND, with MS_REC what is mounted below it too)."""
    if _loops(task, source.mount):
        raise Errno(errno.EINVAL)
    place = _target(place)
    if not _ours(task, place.mount):
        raise Errno(errno.EINVAL)
    mount = copy_of(task, source, bool(flags & MS_REC))
    try:
        if _is_directory(place.dentry) != _is_directory(mount.root):
            raise Errno(errno.ENOTDIR)
        attach(mount, place)
    except Errno:
        unmount_tree(mount, propagate=False)
        raise


def descriptor_tree(task: Task, root: Mount, origin: MountNamespace | None) -> MountNamespace:
    """A namespace for the tree that a descriptor holds."""
    if origin is not None and origin.anonymous:
        origin = origin.origin
    return nameless(root, namespace_of(task).user_ns, origin)


# -- changes
def set_type(task: Task, place: Path, flags: int) -> None:
    """MS_SHARED and its kin, with MS_REC for all below; EINVAL, EPERM."""
    kind = flags & ~(MS_REC | MS_SILENT)
    mount = place.mount
    if place.dentry is not mount.root or kind & ~PROPAGATION or kind & (kind - 1):
        raise Errno(errno.EINVAL)
    _may_propagate(task, mount)
    for each in mount.tree() if flags & MS_REC else (mount,):
        each.set_type(kind)


def _may_propagate(task: Task, mount: Mount) -> None:
    """may_change_propagation."""
    if mount.namespace is None:
        raise Errno(errno.EINVAL)
    if not capable(task.creds, mount.namespace.user_ns, cap.SYS_ADMIN):
        raise Errno(errno.EPERM)


def set_group(task: Task, source: Path, target: Path) -> None:
    """MOVE_MOUNT_SET_GROUP: the private mount `target` receives and passes on what `source` does (do_set_group)."""
    old, new = source.mount, target.mount
    _may_propagate(task, old)
    _may_propagate(task, new)
    if (
        source.dentry is not old.root
        or target.dentry is not new.root
        or old.sb is not new.sb
        or not below(new.root, old.root)
        or has_locked_children(old, new.root)
        or new.group is not None
        or new.upstream is not None
        or (old.group is None and old.upstream is None)
    ):
        raise Errno(errno.EINVAL)
    if old.group is not None:
        new.join(old.group)
        new.unbindable = False
    elif old.upstream is not None:
        old.upstream.follow(new)


def _locked_against(mount: Mount, flags: int) -> bool:
    """Would it with `flags` be less restricted than it must stay (can_change_locked_flags)?"""
    locked = mount.locked
    return bool(locked & LOCKABLE & ~flags or (locked & LOCK_ATIME and (mount.flags ^ flags) & ATIME_FLAGS))


def change_flags(task: Task, place: Path, add: int, remove: int, kind: int, recursive: bool) -> None:
    """mount_setattr(2): all mounts concerned or none. EINVAL, EPERM, EBUSY (files are open for writing)."""
    mount = place.mount
    if place.dentry is not mount.root or not (_ours(task, mount) or _root_of_nameless(mount)):
        raise Errno(errno.EINVAL)
    changed = list(mount.tree()) if recursive else [mount]
    for each in changed:
        flags = each.flags & ~remove | add
        if _locked_against(each, flags):
            raise Errno(errno.EPERM)
        if flags & ~each.flags & MS_RDONLY and _written(task, each, each.sb):
            raise Errno(errno.EBUSY)
    for each in changed:
        each.flags = each.flags & ~remove | add
        if kind:
            each.set_type(kind)
    mount.namespace.changed()


def remount(task: Task, place: Path, flags: int, data: bytes) -> None:
    """MS_REMOUNT: new flags for the mount; unless MS_BIND, also for the file system, and new options for a tmpfs or
    procfs. EINVAL when `place` is no mount's root, EBUSY when files are open for writing, EPERM."""
    mount, sb = place.mount, place.mount.sb
    if not flags & (MS_NOATIME | MS_NODIRATIME | MS_RELATIME | MS_STRICTATIME):
        flags |= mount.flags & ATIME_FLAGS  # they stay unless told
    if flags & MS_NOATIME:
        flags &= ~MS_STRICTATIME
    if not _ours(task, mount) or place.dentry is not mount.root:
        raise Errno(errno.EINVAL)
    if _locked_against(mount, flags):
        raise Errno(errno.EPERM)
    readonly = bool(flags & MS_RDONLY)
    if flags & MS_BIND:
        if readonly and not mount.flags & MS_RDONLY and _written(task, mount, sb):
            raise Errno(errno.EBUSY)
    else:
        if not capable(task.creds, sb.user_ns, cap.SYS_ADMIN):
            raise Errno(errno.EPERM)
        remount_super(task, sb, readonly)
        if data and hasattr(sb, "configure"):
            sb.configure(own_options(task, sb.fstype, parse_options(data)))
    mount.flags = flags & KEPT_FLAGS
    mount.namespace.changed()


def remount_super(task: Task, sb: SuperBlock, readonly: bool) -> None:
    """Make a whole file system read-only or writable; EBUSY when files are open for writing. One that is read-only by
    nature stays so."""
    if readonly == sb.readonly or sb.unchangeable:
        return
    if readonly and _written(task, None, sb):
        raise Errno(errno.EBUSY)
    sb.readonly = readonly


def move(task: Task, place: Path, source: Path) -> None:
    """MS_MOVE and move_mount(2): a mount, or a descriptor's tree, to `place`. EINVAL, ELOOP below itself, ENOENT."""
    place = _target(place)
    mount, onto = source.mount, place.mount
    if mount.namespace is None:
        raise Errno(errno.EINVAL)
    if _ours(task, mount):
        parent = mount.parent
        if parent is None or mount.locked & MNT_LOCKED or parent.group is not None or not _ours(task, onto):
            raise Errno(errno.EINVAL)
    elif not _root_of_nameless(mount) or onto.namespace is mount.namespace or not _usable(task, onto):
        raise Errno(errno.EINVAL)
    if source.dentry is not mount.root or _is_directory(place.dentry) != _is_directory(mount.root):
        raise Errno(errno.EINVAL)
    if onto.group is not None and any(each.unbindable for each in mount.tree()):
        raise Errno(errno.EINVAL)
    if any(_loops(task, each) for each in mount.tree()):
        raise Errno(errno.ELOOP)
    above: Mount | None = onto
    while above is not None:
        if above is mount:
            raise Errno(errno.ELOOP)
        above = above.parent
    attach(mount, place)


# -- unmounting
class _Marked(dict[Dentry, Mount]):
    """`Mount.children` of a mount below which MNT_EXPIRE has marked some: a walk into one of these takes its mark
    away. So walks elsewhere need not look for marks."""

    def __init__(self, parent: Mount) -> None:
        super().__init__(parent.children)
        self.parent = parent
        self.marked: set[Mount] = set()

    def __getitem__(self, dentry: Dentry) -> Mount:
        child = super().__getitem__(dentry)
        self.marked.discard(child)
        if not self.marked:
            self.parent.children = dict(self)
        return child


def expiring(mount: Mount) -> bool:
    """Has MNT_EXPIRE marked it, and nobody been there since? umount2(2) asks before its own walk, so to say."""
    children = mount.parent.children if mount.parent is not None else None
    return isinstance(children, _Marked) and mount in children.marked


def marks(task: Task) -> set[Mount]:
    """All that are marked in the task's namespace."""
    return {mount for mount in namespace_of(task).mounts if expiring(mount)}


def unmount(task: Task, place: Path, flags: int, marked: set[Mount]) -> None:
    """umount2(2): EINVAL, EPERM, EBUSY, EAGAIN (MNT_EXPIRE: it is marked now). `marked`: which were before the walk to
    `place`, see `marks`."""
    mount, sb = place.mount, place.mount.sb
    if place.dentry is not mount.root or not _ours(task, mount) or mount.locked & MNT_LOCKED:
        raise Errno(errno.EINVAL)
    if flags & MNT_FORCE and not capable(task.creds, sb.user_ns, cap.SYS_ADMIN):
        raise Errno(errno.EPERM)
    root = mount is task.fs.root.mount
    if flags & MNT_EXPIRE:
        if root or flags & (MNT_FORCE | MNT_DETACH) or mount.parent is None:
            raise Errno(errno.EINVAL)
        if mount.children or mount in used_mounts(task):
            raise Errno(errno.EBUSY)
        if mount not in marked:
            parent = mount.parent
            if not isinstance(parent.children, _Marked):
                parent.children = _Marked(parent)
            parent.children.marked.add(mount)
            raise Errno(errno.EAGAIN)
    if root and not flags & MNT_DETACH:
        if not capable(task.creds, sb.user_ns, cap.SYS_ADMIN):
            raise Errno(errno.EPERM)
        remount_super(task, sb, True)
        return
    if mount.parent is None:  # what is at the bottom of everything
        raise Errno(errno.EINVAL)
    if flags & MNT_DETACH:
        unmount_tree(mount)
        return
    if busy(mount, used_mounts(task)):
        raise Errno(errno.EBUSY)
    unmount_tree(mount, sync=True)


# -- roots and namespaces
def pivot_root(task: Task, new: Path, old: Path) -> None:
    """pivot_root(2): `new` becomes the root of the namespace, the old root is shown at `old`; EBUSY, EINVAL, ENOTDIR,
    ENOENT."""
    root = task.fs.root
    if not _is_directory(new.dentry) or not _is_directory(old.dentry):
        raise Errno(errno.ENOTDIR)
    old = _target(old)
    new_mount_, old_root = new.mount, root.mount
    if not _ours(task, old_root) or not _ours(task, new_mount_):
        raise Errno(errno.EINVAL)
    for each in (old.mount, new_mount_.parent, old_root.parent):
        if each is not None and each.group is not None:
            raise Errno(errno.EINVAL)
    if new_mount_.locked & MNT_LOCKED:
        raise Errno(errno.EINVAL)
    if new.dentry.unlinked:
        raise Errno(errno.ENOENT)
    if new_mount_ is old_root or old.mount is old_root:
        raise Errno(errno.EBUSY)
    parent, mountpoint = old_root.parent, old_root.mountpoint
    if root.dentry is not old_root.root or parent is None or mountpoint is None:
        raise Errno(errno.EINVAL)
    if new.dentry is not new_mount_.root or new_mount_.parent is None:
        raise Errno(errno.EINVAL)
    if not reachable(old, new) or not reachable(new, root):
        raise Errno(errno.EINVAL)
    new_mount_.detach()
    old_root.detach()
    if old_root.locked & MNT_LOCKED:  # the new one covers what it covered
        new_mount_.locked |= MNT_LOCKED
        old_root.locked &= ~MNT_LOCKED
    old_root.attach(old.mount, old.dentry)
    new_mount_.attach(parent, mountpoint)
    namespace_of(task).changed()
    for other in task.kernel.tasks.values():  # chroot_fs_refs
        fs = other.fs
        if fs is not None:
            if fs.root == root:
                fs.root = new
            if fs.cwd == root:
                fs.cwd = new


def copy_namespace(fs: FsContext, user_ns: UserNamespace = ROOT) -> MountNamespace:
    """CLONE_NEWNS: a copy of the namespace in which `fs` (the new task's own) finds its paths from now on. One for a
    less privileged user namespace receives from the mounts of this one and passes nothing on, and cannot take its
    mounts apart or undo their restrictions (mount_namespaces(7), "Restrictions on mount namespaces")."""
    namespace: MountNamespace = fs.namespace
    old = namespace.root
    crossing = user_ns is not namespace.user_ns
    new = copy_tree(old, old.root, unbindable=True, down=crossing)
    if crossing:
        lock_tree(new)
    copy = MountNamespace(new, user_ns)
    twins = {}
    pairs = [(old, new)]
    for mount, twin in pairs:
        twins[mount] = twin
        pairs += [(child, twin.children[at]) for at, child in mount.children.items() if at in twin.children]
    root, cwd = fs.root, fs.cwd
    if root.mount in twins:
        fs.root = Path(twins[root.mount], root.dentry)
    if cwd.mount in twins:
        fs.cwd = Path(twins[cwd.mount], cwd.dentry)
    fs.namespace = copy
    namespace.put()  # `fs` was one of its users
    return copy
