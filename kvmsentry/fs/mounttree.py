"""Mount namespaces and what happens in them: copies of mounts, putting trees up and taking them down, and the
propagation of both (Documentation/filesystems/sharedsubtree, mount_namespaces(7)).

    attach(source, place): source goes to place; for every mount that receives from place's mount a copy of the source:
        a peer of the source on a peer of the place, a slave of it on a slave
    unmount_tree(mount):   mount and all below it go; so does what is mounted at the same place of every mount that
        receives from the parent, as far as nothing else hangs below it

A mount namespace without a name (`anonymous`) is the tree of a descriptor of open_tree(2) or fsmount(2).
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

from kvmsentry.errors import Errno
from kvmsentry.fs.mount import MOUNTPOINTS, MS_PRIVATE, MS_SHARED, MS_SLAVE, Mount, PeerGroup
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
    POLLPRI,
    Dentry,
    Path,
    SuperBlock,
)
from kvmsentry.kernel.traps import WaitQueue
from kvmsentry.kernel.userns import ROOT, UserNamespace

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Task

ATIME_FLAGS = MS_NOATIME | MS_NODIRATIME | MS_STRICTATIME  # without any: relatime
KEPT_FLAGS = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOSYMFOLLOW | ATIME_FLAGS
LOCKABLE = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
# Ours, in Mount.locked beside flags of LOCKABLE: the mount must go on covering what is below it; its atime flags stay.
MNT_LOCKED, LOCK_ATIME = 1 << 30, 1 << 29
MOUNTS_MOST = 100_000  # fs.mount-max

_sequence = itertools.count(1)


class MountNamespace:
    """One tree of mounts. `root` is the mount at the bottom of it; what tasks have as their root lies on top."""

    kind = b"mnt"

    def __init__(self, root: Mount, user_ns: UserNamespace = ROOT) -> None:
        self.root, self.user_ns, self.ns_ino = root, user_ns, 0
        self.sequence = next(_sequence)  # a namespace may hold only later ones (mnt_ns_loop in fs/namespace.c)
        self.users = 1  # tasks' FsContexts, and files that mean it
        self.permanent = False  # the first one: processes come to it from outside
        self.anonymous = False
        self.origin: MountNamespace | None = None  # where a nameless one was copied; only there it may be put up
        self.mounts: dict[Mount, None] = {}
        self.changes = 0
        self.queue = WaitQueue()  # who polls /proc/PID/mounts, fs/proc/mounttable.py
        self.add(root)

    def add(self, mount: Mount) -> None:
        """`mount` and what hangs below it are in this namespace now; the caller says `changed`."""
        for each in mount.tree():
            if each.namespace is not None:
                del each.namespace.mounts[each]
            each.namespace = self
            self.mounts[each] = None

    def changed(self) -> None:
        """The table of mounts looks different now (touch_mnt_namespace)."""
        self.changes += 1
        self.queue.wake(POLLERR | POLLPRI)

    def top(self) -> Path:
        """What a task that comes from outside has as its root."""
        mount = self.root.top()
        return Path(mount, mount.root)

    def put(self) -> None:
        """A user less: without any, everything is unmounted (put_mnt_ns)."""
        self.users -= 1
        if not self.users and not self.permanent:
            self.dissolve()

    def dissolve(self) -> None:
        """Unmount everything, here only."""
        if self.root.namespace is self:
            unmount_tree(self.root, propagate=False)


def nameless(root: Mount, user_ns: UserNamespace, origin: MountNamespace | None) -> MountNamespace:
    """A namespace for the tree of a descriptor."""
    namespace = MountNamespace(root, user_ns)
    namespace.anonymous, namespace.origin = True, origin
    return namespace


def namespace_of(task: Task) -> MountNamespace:
    """The mount namespace of `task`."""
    namespace: MountNamespace = task.fs.namespace
    return namespace


def all_mounts(task: Task) -> list[Mount]:
    """The mounts of `task`'s namespace in order of mounting."""
    return sorted(namespace_of(task).mounts, key=lambda mount: mount.id)


# -- mounts and copies of them
def new_mount(sb: SuperBlock, root: Dentry | None = None, flags: int = 0) -> Mount:
    """A mount of `sb`, not attached yet; `root` None shows all of it. All mounts of a super block share its
    dentries."""
    if root is None:
        root = sb.top
        if root is None:
            root = sb.top = Dentry(b"", None, sb.root)
    mount = Mount(sb, root, flags & KEPT_FLAGS)
    mount.counted = True
    sb.active += 1
    return mount


def meant_namespace(mount: Mount) -> MountNamespace | None:
    """The mount namespace whose file (/proc/PID/ns/mnt) `mount` shows."""
    meant = getattr(mount.root.inode, "namespace", None) if mount.sb.fstype == "nsfs" else None
    return meant if isinstance(meant, MountNamespace) else None


def clone(old: Mount, root: Dentry | None = None, *, slave: bool = False, down: bool = False) -> Mount:
    """A copy of `old`, or of what lies below `root` on it: its peer and its master's slave like it. `slave`: a slave of
    the shared `old`; `down`: that where it is shared, for a less privileged namespace."""
    mount = new_mount(old.sb, root if root is not None else old.root, old.flags)
    mount.locked, mount.unbindable = old.locked, old.unbindable
    group = old.group
    if group is not None and (slave or down):
        group.follow(mount)
    elif group is not None:
        mount.join(group)
    elif old.upstream is not None:
        old.upstream.follow(mount)
    meant = meant_namespace(mount)
    if meant is not None:
        meant.users += 1
    return mount


def below(dentry: Dentry, top: Dentry) -> bool:
    """Is `dentry` the same as `top` or beneath it (is_subdir)?"""
    while dentry is not top:
        if dentry.parent is dentry:
            return False
        dentry = dentry.parent
    return True


def reachable(place: Path, root: Path) -> bool:
    """Is `place` below `root`, over mounts too (is_path_reachable)?"""
    while place.mount is not root.mount:
        mount = place.mount
        if mount.parent is None or mount.mountpoint is None:
            return False
        place = Path(mount.parent, mount.mountpoint)
    return below(place.dentry, root.dentry)


def copy_tree(
    old: Mount, root: Dentry, *, unbindable: bool = False, namespaces: bool = False, shared: bool = False, **how: bool
) -> Mount:
    """A copy of `old` from `root` on with what is mounted below, in no namespace. Left out: unbindable mounts and files
    of mount namespaces, unless asked for; EINVAL when `old` itself is one. EPERM: what must stay covered by an
    unbindable mount would come to light. `shared`: copies become shared; `how`: see `clone`."""
    if (old.unbindable and not unbindable) or (meant_namespace(old) is not None and not namespaces):
        raise Errno(errno.EINVAL)

    def copied(mount: Mount, top: Dentry) -> Mount:
        twin = clone(mount, top, **how)
        if shared:
            twin.set_type(MS_SHARED)
        return twin

    new = copied(old, root)
    pairs = [(old, new)]
    for mount, twin in pairs:
        for mountpoint, child in mount.children.items():
            if mount is old and not below(mountpoint, root):
                continue
            if child.unbindable and not unbindable:
                if child.locked & MNT_LOCKED:
                    unmount_tree(new, propagate=False)
                    raise Errno(errno.EPERM)
                continue
            if meant_namespace(child) is not None and not namespaces:
                continue
            copy = copied(child, child.root)
            copy.attach(twin, mountpoint)
            pairs.append((child, copy))
    return new


def has_locked_children(mount: Mount, root: Dentry) -> bool:
    """Is something mounted below `root` that must go on covering what is there?"""
    return any(child.locked & MNT_LOCKED and below(at, root) for at, child in mount.children.items())


def lock_tree(mount: Mount) -> None:
    """From a more privileged namespace: what it restricts stays so, and it hides what it hides (lock_mnt_tree)."""
    for each in mount.tree():
        each.locked |= each.flags & LOCKABLE | LOCK_ATIME | MNT_LOCKED


# -- putting up
def summit(place: Path) -> Path:
    """`place`, or the root of what is mounted on it, which is where the next mount goes (lock_mount)."""
    child = place.mount.children.get(place.dentry)
    if child is None:
        return place
    top = child.top()
    return Path(top, top.root)


def receives(mount: Mount, mountpoint: Dentry) -> bool:
    """Does what is mounted at `mountpoint` of a mount that `mount` receives from appear on it? Not on what is being
    made just now."""
    namespace = mount.namespace
    return namespace is not None and not namespace.anonymous and below(mountpoint, mount.root)


class _Arrivals:
    """Copies that propagation makes, as (where it goes, copy); counts what namespaces are about to get."""

    def __init__(self) -> None:
        self.copies: list[tuple[Mount, Mount]] = []
        self.more: dict[MountNamespace, int] = {}

    def count(self, namespace: MountNamespace, tree: Mount) -> None:
        """ENOSPC when that would be too many mounts."""
        more = self.more[namespace] = self.more.get(namespace, 0) + sum(1 for _ in tree.tree())
        if len(namespace.mounts) + more > MOUNTS_MOST:
            raise Errno(errno.ENOSPC)

    def copy(self, of: Mount, to: Mount, *, slave: bool = False, shared: bool = False) -> Mount:
        """A copy of `of`, to be put on `to`."""
        made = copy_tree(of, of.root, slave=slave, shared=shared)
        self.copies.append((to, made))
        self.count(to.namespace, made)
        return made

    def propagate(self, source: Mount, place: Path) -> None:
        """Copies of the shared tree `source` for all that receive from `place`'s mount."""
        mountpoint, group = place.dentry, place.mount.group
        assert group is not None
        for mount in list(group.members):
            if mount is not place.mount and receives(mount, mountpoint):
                self.copy(source, mount)
        todo = [(group, source)]  # (slaves of this group, receive as slaves of this)
        for group, of in todo:
            for slave in list(group.slaves):
                if not isinstance(slave, PeerGroup):
                    if receives(slave, mountpoint):
                        self.copy(of, slave, slave=True)
                    continue
                first: Mount | None = None
                for mount in list(slave.members):
                    if not receives(mount, mountpoint):
                        continue
                    if first is None:
                        first = self.copy(of, mount, slave=True, shared=True)
                    else:
                        self.copy(first, mount)
                todo.append((slave, first if first is not None else of))


def attach(source: Mount, place: Path) -> None:
    """Put the tree `source` at `place`, the top there, which nothing covers, and copies of it wherever that propagates.
    It comes from another place of the namespace, from a descriptor's tree, or is new. ENOSPC, EINVAL; nothing has
    changed then."""
    dest, mountpoint = place.mount, place.dentry
    namespace: MountNamespace = dest.namespace
    arrivals = _Arrivals()
    made_shared: list[Mount] = []
    try:
        if source.namespace is not namespace:
            arrivals.count(namespace, source)
        if dest.group is not None:
            for each in source.tree():
                if each.group is None:
                    each.set_type(MS_SHARED)
                    made_shared.append(each)
            arrivals.propagate(source, place)
    except Errno:
        for _, copy in arrivals.copies:
            unmount_tree(copy, propagate=False)
        for each in made_shared:
            each.set_type(MS_SLAVE)  # as it was: a slave of its master, or private
        raise
    if source.parent is not None:
        source.detach()
    source.attach(dest, mountpoint)
    if source.namespace is not namespace:
        namespace.add(source)
    for to, copy in arrivals.copies:
        if to.namespace.user_ns is not namespace.user_ns:
            lock_tree(copy)
        copy.locked &= ~MNT_LOCKED
        to.namespace.add(copy)
        covering = to.children.get(mountpoint)
        if covering is not None:  # what was mounted there since stays on top
            covering.detach()
        copy.attach(to, mountpoint)
        if covering is not None:
            top = copy.top()
            covering.attach(top, top.root)
    for changed in {namespace, *arrivals.more}:
        changed.changed()


# -- taking down
def _twins(mount: Mount) -> list[Mount]:
    """What is mounted at `mount`'s place on the other mounts that receive from its parent."""
    parent, mountpoint = mount.parent, mount.mountpoint
    if parent is None or mountpoint is None or parent.group is None:
        return []
    return [
        other.children[mountpoint] for other in parent.group if other is not parent and mountpoint in other.children
    ]


def busy(mount: Mount, used: set[Mount]) -> bool:
    """May umount(2) not take `mount` away? `used` are the mounts that somebody holds. The copies that would go with it
    count too, where nothing hangs below them (propagate_mount_busy)."""
    if mount.children or mount in used:
        return True
    for twin in _twins(mount):
        if twin in used and not any(at is not twin.root for at in twin.children):
            return True
    return False


def _propagate_unmount(doomed: dict[Mount, None]) -> None:
    """Add to `doomed` what goes with them on other mounts: not what is locked to a mount that stays, nor what has
    something below it that stays, except one that covers all of it, which then takes its place."""
    more: dict[Mount, None] = {}
    seen: set[Mount] = set()  # whoever was met as a twin: its own twins were all met then
    for mount in doomed:
        if mount not in seen:
            twins = _twins(mount)
            seen.update(twins)
            more.update(dict.fromkeys(twin for twin in twins if twin not in doomed))
    shrunk = True
    while shrunk:
        shrunk = False
        for mount in list(more):
            stays = mount.locked & MNT_LOCKED and mount.parent not in more and mount.parent not in doomed
            if stays or any(
                at is not mount.root and child not in more and child not in doomed
                for at, child in mount.children.items()
            ):
                del more[mount]
                shrunk = True
    for mount in more:
        covering = mount.children.get(mount.root)
        if covering is None or covering in more or covering in doomed:
            continue
        bottom = mount
        while bottom.parent in more:
            bottom = bottom.parent
        parent, mountpoint = bottom.parent, bottom.mountpoint
        if parent is None or mountpoint is None or parent in doomed:
            continue
        covering.detach()
        if parent.children.get(mountpoint) is bottom:
            bottom.detach()
            covering.attach(parent, mountpoint)
        else:  # another one took this place already
            top = parent.children[mountpoint].top()
            covering.attach(top, top.root)
    doomed.update(more)


def unmount_tree(mount: Mount, *, propagate: bool = True, connected: bool = False, sync: bool = False) -> None:
    """Unmount `mount` and all below it, with what this takes away elsewhere if it is to `propagate`. What is still in
    use lives on by itself; mounts that were locked together, or all if `connected`, stay so, unless nobody can be
    there (`sync`)."""
    if propagate:
        for twin in _twins(mount):
            twin.locked &= ~MNT_LOCKED  # what it covers is to be seen (propagate_mount_unlock)
    doomed = dict.fromkeys(mount.tree())
    if propagate:
        _propagate_unmount(doomed)
    changed = {each.namespace for each in doomed if each.namespace is not None}
    for each in doomed:
        if each.namespace is not None:
            del each.namespace.mounts[each]
            each.namespace = None
        meant = meant_namespace(each)
        if meant is not None:
            meant.put()
    for each in doomed:
        keep = each.parent in doomed and not sync and (connected or each.locked & MNT_LOCKED)
        if each.parent is not None and not keep:
            each.detach()
        each.set_type(MS_PRIVATE)
    for namespace in changed:
        namespace.changed()


def is_mountpoint(dentry: Dentry, namespace: MountNamespace | None) -> bool:
    """Does something stand on `dentry` in that namespace (is_local_mountpoint)? What does in others must not be in
    anybody's way."""
    return any(mount.namespace is namespace for mount in MOUNTPOINTS.get(dentry, ()))


def name_gone(dentry: Dentry) -> None:
    """The name of `dentry` was removed: what is mounted there, in other namespaces, goes lazily (__detach_mounts)."""
    for mount in list(MOUNTPOINTS.get(dentry, ())):
        if mount.parent is None:
            continue  # went with another one
        if mount.namespace is None:
            mount.detach()
        else:
            unmount_tree(mount, propagate=False, connected=True)
