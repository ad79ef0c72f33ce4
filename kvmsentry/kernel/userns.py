"""User namespaces (user_namespaces(7)): who an id means, and which capabilities count where.

    ROOT --parent-- UserNamespace(owner, uid_map, gid_map) --parent-- ...

Credentials and inodes hold ids of the first namespace (Linux's kuid_t), so comparisons need no namespace. An id is
translated where it crosses the border: `to_kernel` on the way in, `shown` on the way out. In the first namespace both
are the identity, and callers on hot paths test `creds.user_ns is ROOT` before they ask.
"""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Credentials, Task

OVERFLOW = 65534  # /proc/sys/kernel/overflowuid: what an id without a name in the namespace is shown as
INVALID = 0xFFFFFFFF  # (uid_t)-1
MAX_LEVEL = 32  # create_user_ns in kernel/user_namespace.c
MAX_EXTENTS = 340  # UID_GID_MAP_MAX_EXTENTS

Map = list[tuple[int, int, int]]  # (first id inside, first id of the first namespace, how many)


class UserNamespace:
    """One namespace. A map is None until it is written, and then never changes."""

    kind = b"user"

    def __init__(self, parent: UserNamespace | None, owner: int, group: int) -> None:
        self.parent, self.owner, self.group = parent, owner, group
        self.level: int = parent.level + 1 if parent is not None else 0
        self.uid_map: Map | None = None
        self.gid_map: Map | None = None
        self.projid_map: Map | None = None
        self.setgroups: bool = parent.setgroups if parent is not None else True
        self.parent_could_setfcap = False  # its creator had CAP_SETFCAP: it may map the parent's root
        self.ns_ino: int = 0

    @property
    def user_ns(self) -> UserNamespace:
        """The namespace whose capabilities count for it (NS_GET_USERNS): its parent."""
        return self.parent if self.parent is not None else self

    def below(self, other: UserNamespace) -> bool:
        """Is it `other` or a descendant (in_userns)?"""
        ns: UserNamespace | None = self
        while ns is not None and ns.level >= other.level:
            if ns is other:
                return True
            ns = ns.parent
        return False


ROOT = UserNamespace(None, 0, 0)
ROOT.uid_map = ROOT.gid_map = ROOT.projid_map = [(0, 0, INVALID)]
ROOT.ns_ino = 0xEFFFFFFD  # PROC_USER_INIT_INO, include/linux/proc_ns.h


def to_kernel(mapping: Map | None, number: int) -> int:
    """The first namespace's id for `number`; INVALID when it has none (make_kuid)."""
    for first, lower, count in mapping or ():
        if first <= number < first + count:
            return lower + number - first
    return INVALID


def from_kernel(mapping: Map | None, number: int) -> int:
    """The other way round (from_kuid)."""
    for first, lower, count in mapping or ():
        if lower <= number < lower + count:
            return first + number - lower
    return INVALID


def _to_kernel(creds: Credentials, table: Map | None, number: int) -> int:
    if creds.user_ns is ROOT or number == INVALID:
        return number
    found = to_kernel(table, number)
    if found == INVALID:
        raise Errno(errno.EINVAL)
    return found


def kuid(creds: Credentials, uid: int) -> int:
    """A uid that the application passed; EINVAL when it means nobody in its namespace. -1 is passed on."""
    return _to_kernel(creds, creds.user_ns.uid_map, uid)


def kgid(creds: Credentials, gid: int) -> int:
    """As `kuid`."""
    return _to_kernel(creds, creds.user_ns.gid_map, gid)


def _shown(ns: UserNamespace, table: Map | None, number: int) -> int:
    if ns is ROOT:
        return number
    found = from_kernel(table, number)
    return OVERFLOW if found == INVALID else found


def shown_uid(ns: UserNamespace, uid: int) -> int:
    """What a kernel uid is called in `ns`: 65534 when it has no name there (from_kuid_munged)."""
    return _shown(ns, ns.uid_map, uid)


def shown_gid(ns: UserNamespace, gid: int) -> int:
    """As `shown_uid`."""
    return _shown(ns, ns.gid_map, gid)


def root_uid(ns: UserNamespace) -> int:
    """Who is uid 0 in `ns`; INVALID when nobody is."""
    return 0 if ns is ROOT else to_kernel(ns.uid_map, 0)


def capable(creds: Credentials, ns: UserNamespace, capability: int) -> bool:
    """Has `creds` the capability towards what `ns` owns (ns_capable, cap_capable in security/commoncap.c)?"""
    mine = creds.user_ns
    while ns is not mine:
        if ns.level <= mine.level or ns.parent is None:
            return False
        if ns.parent is mine and ns.owner == creds.euid:
            return True  # whoever made a namespace has all capabilities in it
        ns = ns.parent
    return bool(creds.effective >> capability & 1)


def maps_inode(ns: UserNamespace, inode: Any) -> bool:
    """Do owner and group have names in `ns`? Only then its capabilities count (privileged_wrt_inode_uidgid)."""
    return ns is ROOT or (
        from_kernel(ns.uid_map, inode.uid) != INVALID and from_kernel(ns.gid_map, inode.gid) != INVALID
    )


def inode_capable(creds: Credentials, inode: Any, capability: int) -> bool:
    """capable_wrt_inode_uidgid: the capability, and the inode is the namespace's."""
    return bool(creds.effective >> capability & 1) and maps_inode(creds.user_ns, inode)


# -- making
def create(task: Task) -> Credentials:
    """CLONE_NEWUSER: credentials with every capability in a new namespace that `task` owns. ENOSPC (nesting, limit),
    EPERM (chroot, ids without a name here)."""
    old = task.creds
    parent = old.user_ns
    if parent.level > MAX_LEVEL:
        raise Errno(errno.ENOSPC)
    if task.fs.namespace is not None and task.fs.root != task.fs.namespace.top():
        raise Errno(errno.EPERM)  # current_chrooted: a namespace must not be the way out
    if from_kernel(parent.uid_map, old.euid) == INVALID or from_kernel(parent.gid_map, old.egid) == INVALID:
        raise Errno(errno.EPERM)
    ns = UserNamespace(parent, old.euid, old.egid)
    ns.parent_could_setfcap = bool(old.effective >> cap.SETFCAP & 1)
    count(task.kernel, "user", ns)
    return entered(old, ns)


def entered(old: Credentials, ns: UserNamespace) -> Credentials:
    """Credentials in `ns` with all of its capabilities (set_cred_user_ns)."""
    every = (1 << (cap.LAST + 1)) - 1
    return old.replace(user_ns=ns, effective=every, permitted=every, inheritable=0, bounding=every, ambient=0,
                       securebits=0)  # fmt: skip


def count(kernel: Any, kind: str, namespace: Any) -> None:
    """One namespace more; ENOSPC over /proc/sys/user/max_KIND_namespaces."""
    from kvmsentry.fs.proc.sysctl import sysctl

    living = kernel.__dict__.setdefault("living_namespaces", {}).setdefault(kind, weakref.WeakSet())
    if len(living) >= sysctl(kernel).number(f"user/max_{kind}_namespaces"):
        raise Errno(errno.ENOSPC)
    living.add(namespace)


# -- uid_map, gid_map, projid_map, setgroups
def map_text(reader: Credentials, ns: UserNamespace, mapping: Map | None, which: str) -> str:
    """The file's lines. The second column is in the reader's namespace, the parent's when it reads its own."""
    lower_ns = reader.user_ns
    if lower_ns is ns and ns.parent is not None:
        lower_ns = ns.parent
    lower_map = getattr(lower_ns, which)
    return "".join(
        f"{first:10d} {from_kernel(lower_map, lower):10d} {count:10d}\n" for first, lower, count in mapping or ()
    )


def _parse(data: bytes) -> Map:
    lines = data.split(b"\0")[0].split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    extents: Map = []
    for line in lines:
        words = line.split()
        if len(words) != 3 or not all(word.isdigit() and len(word) <= 10 for word in words):
            raise Errno(errno.EINVAL)
        first, lower, count = map(int, words)
        if max(first, lower) >= INVALID or not count or max(first, lower) + count > INVALID:
            raise Errno(errno.EINVAL)
        for other_first, other_lower, other_count in extents:
            if first < other_first + other_count and other_first < first + count:
                raise Errno(errno.EINVAL)
            if lower < other_lower + other_count and other_lower < lower + count:
                raise Errno(errno.EINVAL)
        extents.append((first, lower, count))
        if len(extents) > MAX_EXTENTS:
            raise Errno(errno.EINVAL)
    if not extents:
        raise Errno(errno.EINVAL)
    return extents


def write_map(writer: Task, opener: Credentials, ns: UserNamespace, which: str, data: bytes) -> None:
    """A map is set, once (map_write in kernel/user_namespace.c): EPERM, EINVAL. `opener` are the credentials that
    the file was opened with."""
    creds = writer.creds
    capability = {"uid_map": cap.SETUID, "gid_map": cap.SETGID}.get(which)
    parent = ns.parent
    if parent is None or (opener.user_ns is not ns and opener.user_ns is not parent):
        raise Errno(errno.EPERM)
    if getattr(ns, which) is not None:
        raise Errno(errno.EPERM)
    if capability is not None and not capable(opener, ns, cap.SYS_ADMIN):
        raise Errno(errno.EPERM)
    extents = _parse(data)
    if which == "uid_map" and any(lower == 0 for _, lower, _ in extents):  # verify_root_map
        if opener.user_ns is ns:
            allowed = ns.parent_could_setfcap
        else:
            allowed = capable(opener, parent, cap.SETFCAP)
        if not allowed:
            raise Errno(errno.EPERM)
    if not _permitted(creds, opener, ns, parent, capability, extents):
        raise Errno(errno.EPERM)
    lower_map = getattr(parent, which)
    made: Map = []
    for first, lower, count in extents:
        kernel_first = to_kernel(lower_map, lower)
        if kernel_first == INVALID or to_kernel(lower_map, lower + count - 1) != kernel_first + count - 1:
            raise Errno(errno.EPERM)
        made.append((first, kernel_first, count))
    setattr(ns, which, made)


def _permitted(
    creds: Credentials, opener: Credentials, ns: UserNamespace, parent: UserNamespace, capability: int | None,
    extents: Map,
) -> bool:  # fmt: skip
    """new_idmap_permitted: one may always map oneself; else it takes the parent's CAP_SETUID or CAP_SETGID."""
    if len(extents) == 1 and extents[0][2] == 1 and ns.owner == creds.euid and creds.euid == opener.euid:
        lower = extents[0][1]
        if capability == cap.SETUID and to_kernel(parent.uid_map, lower) == creds.euid:
            return True
        if capability == cap.SETGID and not ns.setgroups and to_kernel(parent.gid_map, lower) == creds.egid:
            return True
    if capability is None:
        return True
    return capable(creds, parent, capability) and capable(opener, parent, capability)


def write_setgroups(opener: Credentials, ns: UserNamespace, data: bytes) -> None:
    """/proc/PID/setgroups: `allow` or `deny`; EPERM once it is too late, EINVAL."""
    if not capable(opener, ns, cap.SYS_ADMIN):
        raise Errno(errno.EACCES)
    word = data.split(b"\0")[0].strip()
    if len(data) >= 8 or word not in (b"allow", b"deny"):
        raise Errno(errno.EINVAL)
    if word == b"allow":
        if not ns.setgroups:
            raise Errno(errno.EPERM)
    elif ns.setgroups and ns.gid_map is not None:
        raise Errno(errno.EPERM)
    else:
        ns.setgroups = False


def may_setgroups(creds: Credentials) -> bool:
    """setgroups(2): CAP_SETGID, a gid_map, and nobody said `deny`."""
    ns = creds.user_ns
    return bool(creds.effective >> cap.SETGID & 1) and ns.gid_map is not None and ns.setgroups
