"""Keys and keyrings (keyrings(7), security/keys): small secrets that the kernel keeps for programs.

    thread keyring -> process keyring -> session keyring     the order of searches; what they reach is *possessed*
    user keyring, user session keyring                        one each a user, made when first asked for

A key lives while a keyring links to it or a task holds it: Python's references count that. Nobody is called to make a
key that is not there (/sbin/request-key): request_key(2) then fails with ENOKEY, as where no such program is.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Credentials, Task

VIEW, READ, WRITE, SEARCH, LINK, SETATTR = 1, 2, 4, 8, 16, 32  # include/linux/key.h, shifted down
ALL = 63
POSSESSOR, USER, GROUP = 24, 16, 8  # where a permission's bits stand
THREAD, PROCESS, SESSION, USER_RING, USER_SESSION, GROUP_RING, AUTH, REQUESTOR = range(-1, -9, -1)
DEPTH_MOST = 6  # KEYRING_SEARCH_MAX_DEPTH
USER_DATA_MOST, DESCRIPTION_MOST = 32767, 4096
KEYS_MOST, BYTES_MOST = 20_000, 25_000_000  # of one user, whatever the limits in /proc/sys say
ENOKEY, EKEYEXPIRED, EKEYREVOKED = errno.ENOKEY, errno.EKEYEXPIRED, errno.EKEYREVOKED


class KeyUser:
    """What one user's keys count for (/proc/key-users), and the two keyrings of the user."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.keys = self.bytes = 0
        self.ring: Key | None = None
        self.session: Key | None = None


class Key:
    """A key; a keyring has `links` (by type and description), others a `payload`."""

    def __init__(
        self, ring: KeyTable, kind: str, description: bytes, creds: Credentials, permission: int, payload: bytes = b"",
        quota: bool = True,
    ) -> None:  # fmt: skip
        self.serial = 0
        self.table, self.kind, self.description = ring, kind, description
        self.uid, self.gid, self.permission = creds.fsuid, creds.fsgid, permission
        self.user = ring.user(self.uid)
        self.links: dict[tuple[str, bytes], Key] | None = {} if kind == "keyring" else None
        self.payload = payload
        self.cost = 0
        self.expiry = 0  # ns of kernel.now(), 0: never
        self.revoked = self.invalid = self.restricted = False
        self.of_user = False  # a user's own keyring: not joined for more than looking
        self.charge(len(description) + 1 + len(payload), quota)
        self.user.keys += 1
        ring.add(self)

    def __del__(self) -> None:
        if self.serial:
            self.user.keys -= 1
            self.user.bytes -= self.cost

    def charge(self, cost: int, quota: bool = True) -> None:
        """Count `cost` bytes instead of what was counted before; EDQUOT."""
        table, user = self.table, self.user
        if quota:
            prefix = "root_" if user.uid == 0 else ""
            if not self.serial and user.keys + 1 > table.number(f"{prefix}maxkeys"):
                raise Errno(errno.EDQUOT)
            if user.bytes - self.cost + cost > table.number(f"{prefix}maxbytes"):
                raise Errno(errno.EDQUOT)
        user.bytes += cost - self.cost
        self.cost = cost

    def validate(self) -> None:
        """ENOKEY, EKEYREVOKED, EKEYEXPIRED (key_validate)."""
        if self.invalid:
            raise Errno(ENOKEY)
        if self.revoked:
            raise Errno(EKEYREVOKED)
        if self.expiry and self.table.kernel.now() >= self.expiry:
            raise Errno(EKEYEXPIRED)

    def rights(self, creds: Credentials, possessed: bool) -> int:
        """What `creds` may do (key_task_permission)."""
        if self.uid == creds.fsuid:
            bits = self.permission >> USER
        elif self.gid == creds.fsgid or self.gid in creds.groups:
            bits = self.permission >> GROUP
        else:
            bits = self.permission
        if possessed:
            bits |= self.permission >> POSSESSOR
        return bits & ALL

    def check(self, creds: Credentials, possessed: bool, need: int) -> None:
        """EACCES."""
        if need & ~self.rights(creds, possessed):
            raise Errno(errno.EACCES)

    # -- keyrings
    def ring(self) -> dict[tuple[str, bytes], Key]:
        """The links; ENOTDIR."""
        if self.links is None:
            raise Errno(errno.ENOTDIR)
        return self.links

    def link(self, key: Key) -> None:
        """Show `key` here, instead of one of the same type and description; EDEADLK for a ring in itself, ELOOP for
        rings nested too deep, EPERM where nothing may be added."""
        links = self.ring()
        if self.restricted:
            raise Errno(errno.EPERM)
        if key.links is not None:
            if key is self or key.reaches(self, 0):
                raise Errno(errno.EDEADLK)
        name = key.kind, key.description
        if name not in links:
            self.charge(self.cost + 8)
        links[name] = key

    def unlink(self, key: Key) -> None:
        """ENOENT when it is not here."""
        links = self.ring()
        name = key.kind, key.description
        if links.get(name) is not key:
            raise Errno(errno.ENOENT)
        del links[name]
        self.charge(self.cost - 8, False)

    def clear(self) -> None:
        """No link is left."""
        links = self.ring()
        self.charge(self.cost - 8 * len(links), False)
        links.clear()

    def reaches(self, target: Key, depth: int) -> bool:
        """Is `target` below this keyring?"""
        if self.links is None:
            return False
        if depth > DEPTH_MOST:
            raise Errno(errno.ELOOP)
        return any(key is target or key.reaches(target, depth + 1) for key in self.links.values())

    def search(self, creds: Credentials, match: Callable[[Key], bool], depth: int = 0) -> Iterator[Key]:
        """The keys below that match, breadth first, through keyrings that may be searched."""
        if self.links is None or depth > DEPTH_MOST or not self.rights(creds, True) & SEARCH:
            return
        rings = []
        for key in list(self.links.values()):
            if key.invalid:
                continue
            if match(key):
                yield key
            if key.links is not None:
                rings.append(key)
        for ring in rings:
            yield from ring.search(creds, match, depth + 1)


class KeyTable:
    """All keys of a sandbox."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.keys: WeakValueDictionary[int, Key] = WeakValueDictionary()
        self.users: dict[int, KeyUser] = {}

    def number(self, name: str) -> int:
        """A value of /proc/sys/kernel/keys; the application's root may raise it only so far, since keys are in our own
        memory."""
        from kvmsentry.fs.proc.sysctl import sysctl

        return min(sysctl(self.kernel).number(f"kernel/keys/{name}"), KEYS_MOST if "keys" in name else BYTES_MOST)

    def user(self, uid: int) -> KeyUser:
        """The accounts of `uid`."""
        found = self.users.get(uid)
        if found is None:
            found = self.users[uid] = KeyUser(uid)
        return found

    def add(self, key: Key) -> None:
        """Give `key` a serial number, which can't be guessed (key_alloc_serial)."""
        while True:
            serial = 3 + int.from_bytes(os.urandom(8), "little") % ((1 << 30) - 3)
            if serial not in self.keys:
                break
        key.serial = serial
        self.keys[serial] = key

    def user_rings(self, creds: Credentials) -> tuple[Key, Key]:
        """The user keyring and the user session keyring (look_up_user_keyrings)."""
        user = self.user(creds.uid)
        if user.ring is None or user.session is None:
            permission = (ALL & ~SETATTR) << POSSESSOR | ALL << USER
            owner = creds.replace(fsuid=creds.uid, fsgid=65534)  # no group: INVALID_GID
            user.ring = Key(self, "keyring", b"_uid.%d" % creds.uid, owner, permission, quota=False)
            user.session = Key(self, "keyring", b"_uid_ses.%d" % creds.uid, owner, permission, quota=False)
            user.session.links = {("keyring", user.ring.description): user.ring}
            user.ring.of_user = user.session.of_user = True
        return user.ring, user.session


def table_of(kernel: Kernel) -> KeyTable:
    """The keys of the sandbox, made on first use."""
    found: KeyTable | None = kernel.__dict__.get("keys")
    if found is None:
        found = kernel.__dict__["keys"] = KeyTable(kernel)
    return found


def rings_of(task: Task) -> list[Key]:
    """Where a search begins, in order (search_cred_keyrings_rcu)."""
    rings = [task.thread_keyring, task.process.keyring, task.session_keyring]
    if task.session_keyring is None:
        rings[2] = table_of(task.kernel).user_rings(task.creds)[1]
    return [ring for ring in rings if ring is not None]


def search(task: Task, match: Callable[[Key], bool]) -> Key:
    """The first valid possessed key that matches; else what was wrong with the ones that did, ENOKEY."""
    problem = Errno(ENOKEY)
    for ring in rings_of(task):
        if ring.revoked:
            continue
        for key in ring.search(task.creds, match):
            try:
                key.validate()
            except Errno as error:
                if error.errno != EKEYEXPIRED:  # KEYRING_SEARCH_SKIP_EXPIRED
                    problem = error
                continue
            if key.rights(task.creds, True) & SEARCH:
                return key
            problem = Errno(errno.EACCES)
    raise problem


def possessed(task: Task, key: Key) -> bool:
    """Do the task's own keyrings lead to `key`?"""
    if key.invalid:
        return False
    for ring in rings_of(task):
        if ring is key:
            return True
        for found in ring.search(task.creds, lambda other: other is key):
            if found.rights(task.creds, True) & SEARCH:
                return True
    return False


def join_session(task: Task, name: bytes | None) -> Key:
    """A new session keyring, or an existing one of that name that may be searched (join_session_keyring)."""
    table, creds = table_of(task.kernel), task.creds
    if name is None:
        permission = ALL << POSSESSOR | (VIEW | READ) << USER
        ring = Key(table, "keyring", b"_ses", creds, permission, quota=False)
    else:
        for found in list(table.keys.values()):
            if (
                found.kind == "keyring" and found.description == name and not found.revoked and not found.invalid
                and not found.of_user and found.rights(creds, False) & SEARCH
            ):  # fmt: skip
                task.session_keyring = found
                return found
        ring = Key(table, "keyring", name, creds, ALL << POSSESSOR | (VIEW | READ | LINK) << USER)
    task.session_keyring = ring
    return ring


def lookup(task: Task, number: int, need: int, create: bool = False, unlink: bool = False) -> tuple[Key, bool]:
    """The key that `number` means, a serial or KEY_SPEC_*, and whether it is possessed; EINVAL, ENOKEY, EACCES and why
    it is not valid (lookup_user_key)."""
    key, mine = _find(task, number, create)
    if not unlink:
        key.validate()
    if need:
        key.check(task.creds, mine, need)
    return key, mine


def _own(task: Task, holder: Any, field: str, name: bytes, create: bool) -> Key:
    ring: Key | None = getattr(holder, field)
    if ring is None:
        if not create:
            raise Errno(ENOKEY)
        permission = ALL << POSSESSOR | VIEW << USER
        ring = Key(table_of(task.kernel), "keyring", name, task.creds, permission, quota=False)
        setattr(holder, field, ring)
    return ring


def _find(task: Task, number: int, create: bool) -> tuple[Key, bool]:
    table = table_of(task.kernel)
    if number > 0:
        key = table.keys.get(number)
        if key is None:
            raise Errno(ENOKEY)
        return key, possessed(task, key)
    if number == THREAD:
        return _own(task, task, "thread_keyring", b"_tid", create), True
    if number == PROCESS:
        return _own(task, task.process, "keyring", b"_pid", create), True
    if number == SESSION:
        ring = task.session_keyring
        if ring is None and not create:
            ring = task.session_keyring = table.user_rings(task.creds)[1]
        elif ring is None or (ring.of_user and create):
            ring = join_session(task, None)
        return ring, True
    if number in (USER_RING, USER_SESSION):
        rings = table.user_rings(task.creds)
        return rings[0 if number == USER_RING else 1], True
    if number in (AUTH, REQUESTOR):
        raise Errno(ENOKEY)
    raise Errno(errno.EINVAL)


def check_payload(kind: str, description: bytes, payload: bytes) -> None:
    """ENODEV for a type that is not there, EINVAL for what it does not take."""
    if kind not in ("user", "logon", "keyring"):
        raise Errno(errno.ENODEV)
    if kind == "keyring":
        if payload:
            raise Errno(errno.EINVAL)
        return
    if kind == "logon" and b":" not in description[1:]:
        raise Errno(errno.EINVAL)
    if not 0 < len(payload) <= USER_DATA_MOST:
        raise Errno(errno.EINVAL)


def default_permission(kind: str) -> int:
    """What a new key allows (key_create_or_update)."""
    bits = VIEW | SEARCH | LINK | SETATTR | WRITE
    if kind != "logon":  # which the kernel alone reads
        bits |= READ
    return bits << POSSESSOR | VIEW << USER


def may_change(key: Key, creds: Credentials) -> bool:
    """Owner or CAP_SYS_ADMIN."""
    return creds.capable(cap.SYS_ADMIN) or key.uid == creds.fsuid


def _expiry(key: Key, now: int) -> str:
    if not key.expiry:
        return "perm"
    if now >= key.expiry:
        return "expd"
    left = (key.expiry - now) // 1_000_000_000
    for unit, seconds in (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60)):
        if left >= seconds:
            return f"{left // seconds}{unit}"
    return f"{left}s"


def keys_text(task: Task) -> str:
    """/proc/keys: what `task` may view (proc_keys_show)."""
    lines = []
    table = table_of(task.kernel)
    now = task.kernel.now()
    for serial, key in sorted(table.keys.items()):
        if not key.rights(task.creds, possessed(task, key)) & VIEW:
            continue
        text = key.description.decode(errors="replace")
        if key.links is not None:
            what = f"{text}: {len(key.links) if key.links else 'empty'}"
        else:
            what = f"{text}: {len(key.payload)}"
        flags = f"I{'R' if key.revoked else '-'}-Q--{'i' if key.invalid else '-'}"
        lines.append(
            f"{serial:08x} {flags} {1 + len(key.links or ()):5d} {_expiry(key, now):>4} {key.permission:08x} "
            f"{key.uid:5d} {key.gid:5d} {key.kind:9.9} {what}\n"
        )
    return "".join(lines)


def users_text(task: Task) -> str:
    """/proc/key-users."""
    table = table_of(task.kernel)
    lines = []
    for uid, user in sorted(table.users.items()):
        prefix = "root_" if uid == 0 else ""
        lines.append(
            f"{uid:5d}: {user.keys + 1:5d} {user.keys}/{user.keys} {user.keys}/{table.number(prefix + 'maxkeys')} "
            f"{user.bytes}/{table.number(prefix + 'maxbytes')}\n"
        )
    return "".join(lines)
