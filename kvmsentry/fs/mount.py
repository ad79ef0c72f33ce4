"""One mount, and the peer groups that mounts share what happens below them in (mount_namespaces(7), "SHARED SUBTREES").

    PeerGroup 1: Mount /a, Mount /b          what is mounted on one of them appears on all
        '-- slaves: Mount /c                 ... and on these, but not the other way round
                    PeerGroup 2: Mount /d, Mount /e      slave and shared: passes it on in turn

Linux ties a slave to one mount of its master's group; which one, nobody can tell from outside, so here it follows the
group. All members of a group have the same master: it is the group's.

A walk looks at `Dentry.mounted` and `Mount.children` and nothing else here.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmsentry.fs.vfs import Dentry, SuperBlock

MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20  # uapi/linux/mount.h

_groups = itertools.count(1)
_free_groups: list[int] = []  # a heap: as on Linux the smallest number that is free comes next
MOUNTPOINTS: dict[Dentry, dict[Mount, None]] = {}  # what stands on a dentry, in all namespaces; see Dentry.mounted


class PeerGroup:
    """Mounts that share propagation, the group that they are slaves of, and who is a slave of theirs."""

    __slots__ = ("id", "members", "master", "slaves")

    def __init__(self, master: PeerGroup | None) -> None:
        self.id = heapq.heappop(_free_groups) if _free_groups else next(_groups)
        self.members: dict[Mount, None] = {}
        self.master = master
        self.slaves: dict[Mount | PeerGroup, None] = {}

    def __iter__(self) -> Iterator[Mount]:
        """Every mount that receives what happens on a member: members, then slaves and whom they pass it on to."""
        groups = [self]
        for group in groups:  # chains may be long: no recursion
            yield from list(group.members)
            for slave in list(group.slaves):
                if isinstance(slave, PeerGroup):
                    groups.append(slave)
                else:
                    yield slave

    def follow(self, slave: Mount | PeerGroup) -> None:
        """`slave` receives from this group from now on."""
        self.slaves[slave] = None
        if isinstance(slave, PeerGroup):
            slave.master = self
        else:
            slave.upstream = self

    def leave(self, mount: Mount) -> None:
        """`mount` is a member no more; with the last one the group goes, and its slaves receive from its master."""
        del self.members[mount]
        mount.group = None
        if self.members:
            self.follow(mount)
            return
        heapq.heappush(_free_groups, self.id)
        master = self.master
        if master is not None:
            del master.slaves[self]
            master.follow(mount)
        for slave in self.slaves:
            if master is not None:
                master.follow(slave)
            elif isinstance(slave, PeerGroup):
                slave.master = None
            else:
                slave.upstream = None


class Mount:
    """One entry of a mount namespace: the tree below `root` of `sb` shown at `mountpoint` of `parent`."""

    __slots__ = (
        "id", "sb", "root", "parent", "mountpoint", "children", "flags", "namespace", "locked", "group", "upstream",
        "unbindable", "counted",
    )  # fmt: skip
    _next_id = 20

    def __init__(self, sb: SuperBlock, root: Dentry, flags: int = 0) -> None:
        Mount._next_id += 1
        self.id = Mount._next_id
        self.sb, self.root, self.flags = sb, root, flags
        self.parent: Mount | None = None
        self.mountpoint: Dentry | None = None
        self.children: dict[Dentry, Mount] = {}
        self.namespace: Any = None  # fs/mounttree.py: MountNamespace, None while in none
        self.locked = 0  # flags that must stay, and MNT_LOCKED: came from a more privileged namespace
        self.group: PeerGroup | None = None  # it is shared
        self.upstream: PeerGroup | None = None  # it is a slave and not shared; see `master`
        self.unbindable = False
        self.counted = False  # in sb.active

    def __del__(self) -> None:
        """Neither in a tree nor in use. With the last mount of a file system it lets go of what it holds."""
        if self.counted:
            sb = self.sb
            sb.active -= 1
            if not sb.active:
                sb.release()

    @property
    def master(self) -> PeerGroup | None:
        """The group that it is a slave of."""
        return self.upstream if self.group is None else self.group.master

    def attach(self, parent: Mount, mountpoint: Dentry) -> None:
        """Show this mount at `mountpoint` of `parent`, where nothing is mounted."""
        assert mountpoint not in parent.children
        self.parent, self.mountpoint = parent, mountpoint
        parent.children[mountpoint] = self
        mountpoint.mounted += 1
        MOUNTPOINTS.setdefault(mountpoint, {})[self] = None

    def detach(self) -> None:
        """Take the mount off its place; who uses it keeps it alive."""
        parent, mountpoint = self.parent, self.mountpoint
        assert parent is not None and mountpoint is not None
        del parent.children[mountpoint]
        mountpoint.mounted -= 1
        standing = MOUNTPOINTS[mountpoint]
        del standing[self]
        if not standing:
            del MOUNTPOINTS[mountpoint]
        self.parent = self.mountpoint = None

    def tree(self) -> Iterator[Mount]:
        """This mount and all below it, parents first."""
        stack = [self]
        while stack:
            mount = stack.pop()
            yield mount
            stack.extend(reversed(mount.children.values()))

    def top(self) -> Mount:
        """The mount that covers the root of this one, or what covers that; itself when nothing does."""
        mount = self
        while mount.root in mount.children:
            mount = mount.children[mount.root]
        return mount

    # -- propagation types
    def join(self, group: PeerGroup) -> None:
        """Become a peer of the group's members; for a mount that was private."""
        self.group = group
        group.members[self] = None

    def set_type(self, kind: int) -> None:
        """MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE, as mount(2) has them."""
        group = self.group
        if kind == MS_SHARED:
            if group is None:
                master = self.upstream
                group = PeerGroup(master)
                if master is not None:
                    del master.slaves[self]
                    master.follow(group)
                    self.upstream = None
                self.join(group)
            self.unbindable = False
            return
        if group is not None:
            group.leave(self)
        if kind != MS_SLAVE:
            if self.upstream is not None:
                del self.upstream.slaves[self]
                self.upstream = None
            self.unbindable = kind == MS_UNBINDABLE
