"""add_key(2), request_key(2), keyctl(2)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap, keys
from kvmsentry.kernel.keys import LINK, READ, SEARCH, SETATTR, VIEW, WRITE, Key
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.table import Int, Size, ULong, UserPtr, syscall

PAYLOAD_MOST = (1 << 20) - 1
NO_CHANGE = 0xFFFFFFFF
KEYCTL_MOVE_EXCL = 1
# uapi/linux/keyctl.h: KEYCTL_CAPS0_INVALIDATE, _RESTRICT_KEYRING, _MOVE; of the second byte none
CAPABILITIES = bytes((0x20 | 0x40 | 0x80, 0))


def _type(task: Task, pointer: int) -> str:
    """key_get_type_from_user: EINVAL for an empty or long name, EPERM for one with a dot in front."""
    try:
        name = task.mm.read_cstring(pointer, 32)
    except Errno as error:
        raise Errno(errno.EINVAL if error.errno == errno.ENAMETOOLONG else error.errno) from None
    if not name:
        raise Errno(errno.EINVAL)
    if name[:1] == b".":
        raise Errno(errno.EPERM)
    return name.decode(errors="replace")


def _description(task: Task, pointer: int) -> bytes:
    try:
        return bytes(task.mm.read_cstring(pointer, keys.DESCRIPTION_MOST))
    except Errno as error:
        raise Errno(errno.EINVAL if error.errno == errno.ENAMETOOLONG else error.errno) from None


def _payload(task: Task, pointer: int, length: int) -> bytes:
    if length > PAYLOAD_MOST:
        raise Errno(errno.EINVAL)
    return task.mm.read(pointer, length) if length else b""


@syscall(248, note="types user, logon and keyring")
def add_key(task: Task, type: UserPtr, description: UserPtr, payload: UserPtr, length: Size, ringid: Int) -> int:
    """add_key(2)."""
    if length > PAYLOAD_MOST:
        return -errno.EINVAL
    kind = _type(task, type)
    text = _description(task, description) if description else b""
    if kind == "keyring" and text[:1] == b".":
        return -errno.EPERM
    data = _payload(task, payload, length)
    ring, mine = keys.lookup(task, ringid, WRITE, create=True)
    if kind not in ("user", "logon", "keyring"):
        return -errno.ENODEV
    links = ring.ring()
    if not text:
        return -errno.EINVAL
    keys.check_payload(kind, text, data)
    found = links.get((kind, text))
    if found is not None and kind != "keyring" and not found.revoked and not found.invalid:
        found.check(task.creds, mine, WRITE)
        _update(found, data)
        return found.serial
    key = Key(keys.table_of(task.kernel), kind, text, task.creds, keys.default_permission(kind), data)
    ring.link(key)
    return key.serial


def _update(key: Key, data: bytes) -> None:
    key.charge(len(key.description) + 1 + len(data))
    key.payload = data
    key.expiry = 0


@syscall(249, note="no helper is called to make a key that is not there: ENOKEY")
def request_key(task: Task, type: UserPtr, description: UserPtr, callout: UserPtr, ringid: Int) -> int:
    """request_key(2)."""
    kind = _type(task, type)
    text = _description(task, description)
    if callout:
        task.mm.read_cstring(callout, 4096)
    ring = keys.lookup(task, ringid, WRITE, create=True)[0] if ringid else None
    if kind not in ("user", "logon", "keyring"):
        return -errno.ENOKEY
    try:
        key = keys.search(task, lambda key: key.kind == kind and key.description == text)
    except Errno as error:
        if error.errno == errno.ENOKEY and callout and ring is None:
            _check_destination(task)  # before it is found that nobody can make one
        raise
    if ring is not None:
        key.check(task.creds, True, LINK)
        ring.link(key)
    return key.serial


def _check_destination(task: Task) -> None:
    """EACCES when a key that was made for request_key(2) could not go where KEYCTL_SET_REQKEY_KEYRING says
    (construct_get_dest_keyring). Where a keyring does not exist, the next one is meant."""
    chosen = task.reqkey
    chain = (keys.THREAD, keys.PROCESS, keys.SESSION, keys.USER_SESSION)
    for number in {4: (keys.USER_RING,), 5: chain[3:]}.get(chosen, chain[max(chosen, 1) - 1 :]):
        try:
            keys.lookup(task, number, WRITE)
            return
        except Errno as error:
            if error.errno != errno.ENOKEY:
                raise


# -- keyctl
def _get_keyring_id(task: Task, number: int, create: int, *_: int) -> int:
    return keys.lookup(task, number, SEARCH, create=bool(create & 0xFFFFFFFF))[0].serial


def _join(task: Task, name: int) -> int:
    text = _description(task, name) if name else None
    if text is not None and text[:1] == b".":
        return -errno.EPERM
    return keys.join_session(task, text).serial


def _update_key(task: Task, number: int, payload: int, length: int, *_: int) -> int:
    if length > 4096:
        return -errno.EINVAL
    data = _payload(task, payload, length)
    key, _mine = keys.lookup(task, number, WRITE)
    if key.links is not None:
        return -errno.EOPNOTSUPP
    keys.check_payload(key.kind, key.description, data)
    _update(key, data)
    return 0


def _revoke(task: Task, number: int, *_: int) -> int:
    try:
        key, _mine = keys.lookup(task, number, WRITE)
    except Errno as error:
        if error.errno != errno.EACCES:
            raise
        key, _mine = keys.lookup(task, number, SETATTR)
    key.revoked = True
    if key.links is not None:
        key.clear()
    key.payload = b""
    return 0


def _chown(task: Task, number: int, uid: int, gid: int, *_: int) -> int:
    uid, gid = uid & 0xFFFFFFFF, gid & 0xFFFFFFFF
    if uid == gid == NO_CHANGE:
        return 0
    key, _mine = keys.lookup(task, number, SETATTR)
    creds = task.creds
    if not creds.capable(cap.SYS_ADMIN):
        if uid not in (NO_CHANGE, key.uid):
            return -errno.EACCES
        if gid not in (NO_CHANGE, key.gid, creds.fsgid) and gid not in creds.groups:
            return -errno.EACCES
    if uid not in (NO_CHANGE, key.uid):
        cost, user = key.cost, keys.table_of(task.kernel).user(uid)
        key.user.keys -= 1
        key.user.bytes -= cost
        user.keys += 1
        user.bytes += cost
        key.user, key.uid = user, uid
    if gid != NO_CHANGE:
        key.gid = gid
    return 0


def _setperm(task: Task, number: int, permission: int, *_: int) -> int:
    permission &= 0xFFFFFFFF
    if permission & ~0x3F3F3F3F:
        return -errno.EINVAL
    key, _mine = keys.lookup(task, number, SETATTR)
    if not keys.may_change(key, task.creds):
        return -errno.EACCES
    key.permission = permission
    return 0


def _out(task: Task, data: bytes, buffer: int, length: int) -> int:
    """The whole length, and the data where it fits."""
    if buffer and length >= len(data):
        task.mm.write(buffer, data)
    return len(data)


def _describe(task: Task, number: int, buffer: int, length: int, *_: int) -> int:
    key, _mine = keys.lookup(task, number, VIEW)
    head = f"{key.kind};{key.uid};{key.gid};{key.permission:08x};".encode()
    return _out(task, head + key.description + b"\0", buffer, length)


def _clear(task: Task, number: int, *_: int) -> int:
    keys.lookup(task, number, WRITE, create=True)[0].clear()
    return 0


def _link(task: Task, number: int, ring: int, *_: int) -> int:
    target = keys.lookup(task, ring, WRITE, create=True)[0]
    key = keys.lookup(task, number, LINK, create=True)[0]
    target.link(key)
    return 0


def _unlink(task: Task, number: int, ring: int, *_: int) -> int:
    target = keys.lookup(task, ring, WRITE)[0]
    key = keys.lookup(task, number, 0, unlink=True)[0]
    target.unlink(key)
    return 0


def _search(task: Task, number: int, type: int, description: int, destination: int) -> int:
    kind = _type(task, type)
    text = _description(task, description)
    ring, mine = keys.lookup(task, number, SEARCH)
    destination = _signed(destination)
    target = keys.lookup(task, destination, WRITE, create=True)[0] if destination else None
    if kind not in ("user", "logon", "keyring"):
        return -errno.ENOKEY
    ring.ring()
    problem = errno.ENOKEY
    for key in ring.search(task.creds, lambda key: key.kind == kind and key.description == text):
        try:
            key.validate()
            key.check(task.creds, mine, SEARCH)
        except Errno as error:
            problem = error.errno
            continue
        if target is not None:
            key.check(task.creds, mine, LINK)
            target.link(key)
        return key.serial
    return -problem


def _read(task: Task, number: int, buffer: int, length: int, *_: int) -> int:
    key, mine = keys.lookup(task, number, 0)
    if not key.rights(task.creds, mine) & READ and not mine:
        return -errno.EACCES
    if key.kind == "logon":
        return -errno.EOPNOTSUPP
    if key.links is not None:
        data = b"".join(linked.serial.to_bytes(4, "little") for linked in key.links.values())
    else:
        data = key.payload
    if buffer and length:
        task.mm.write(buffer, data[:length] if key.links is None else data[: length & ~3])
    return len(data)


def _no_authority(task: Task, *_: int) -> int:
    """Nobody is ever asked to make a key, so nobody has the authority to."""
    return -errno.EPERM


def _reqkey_keyring(task: Task, number: int, *_: int) -> int:
    """KEYCTL_SET_REQKEY_KEYRING: -1 reads, 0..5 and 7 are keyrings that a made key would go to."""
    old = task.reqkey
    if number == -1:
        return old
    if number not in (0, 1, 2, 3, 4, 5, 7):
        return -errno.EINVAL
    if number in (1, 2, 3):
        keys.lookup(task, -number, 0, create=True)
    task.reqkey = number
    return old


def _timeout(task: Task, number: int, seconds: int, *_: int) -> int:
    key, _mine = keys.lookup(task, number, SETATTR, create=True)
    seconds &= 0xFFFFFFFF
    key.expiry = task.kernel.now() + seconds * 1_000_000_000 if seconds else 0
    return 0


def _assume(task: Task, number: int, *_: int) -> int:
    if number < 0:
        return -errno.EINVAL
    return -errno.ENOKEY if number else 0


def _security(task: Task, number: int, buffer: int, length: int, *_: int) -> int:
    keys.lookup(task, number, VIEW)
    return _out(task, b"\0", buffer, length)


def _session_to_parent(task: Task, *_: int) -> int:
    parent = task.process.parent
    ring = task.session_keyring
    if ring is None:
        ring = keys.lookup(task, keys.SESSION, LINK)[0]
    ring.check(task.creds, True, LINK)
    if parent is None or parent.pid == 1 or len(parent.threads) != 1:
        return -errno.EPERM
    mine, theirs = task.creds, parent.leader.creds
    if (theirs.uid, theirs.euid, theirs.suid) != (mine.euid,) * 3:
        return -errno.EPERM
    if (theirs.gid, theirs.egid, theirs.sgid) != (mine.egid,) * 3:
        return -errno.EPERM
    parent.leader.session_keyring = ring
    return 0


def _invalidate(task: Task, number: int, *_: int) -> int:
    key, _mine = keys.lookup(task, number, SEARCH)
    key.invalid = True
    for ring in list(keys.table_of(task.kernel).keys.values()):  # the garbage collector's work
        if ring.links and ring.links.get((key.kind, key.description)) is key:
            ring.unlink(key)
    return 0


def _restrict(task: Task, number: int, type: int, restriction: int, *_: int) -> int:
    ring, _mine = keys.lookup(task, number, SETATTR)
    if type:
        _type(task, type)
        return -errno.ENOENT  # no type here knows restrictions
    if restriction:
        return -errno.EINVAL
    ring.ring()
    if ring.restricted:
        return -errno.EEXIST
    ring.restricted = True
    return 0


def _move(task: Task, number: int, source: int, target: int, flags: int) -> int:
    if flags & 0xFFFFFFFF & ~KEYCTL_MOVE_EXCL:
        return -errno.EINVAL
    key = keys.lookup(task, number, LINK, create=True)[0]
    old = keys.lookup(task, _signed(source), WRITE)[0]
    new = keys.lookup(task, _signed(target), WRITE, create=True)[0]
    if old is new:
        return 0
    if old.ring().get((key.kind, key.description)) is not key:
        return -errno.ENOENT
    if flags & KEYCTL_MOVE_EXCL and (key.kind, key.description) in new.ring():
        return -errno.EEXIST
    new.link(key)
    old.unlink(key)
    return 0


def _capabilities(task: Task, buffer: int, length: int) -> int:
    task.mm.write(buffer, CAPABILITIES[:length].ljust(min(length, 4096), b"\0"))
    return len(CAPABILITIES)


def _signed(value: int) -> int:
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


OPERATIONS: dict[int, Callable[..., Any]] = {
    0: _get_keyring_id, 2: _update_key, 3: _revoke, 4: _chown, 5: _setperm, 6: _describe, 7: _clear, 10: _search,
    11: _read, 12: _no_authority, 13: _no_authority, 14: _reqkey_keyring, 15: _timeout, 16: _assume, 17: _security,
    18: _session_to_parent, 19: _no_authority, 20: _no_authority, 21: _invalidate, 29: _restrict, 30: _move,
}  # fmt: skip


@syscall(250, note="no persistent keyrings, no Diffie-Hellman, no public keys, no watches: EOPNOTSUPP")
def keyctl(task: Task, operation: Int, arg2: ULong, arg3: ULong, arg4: ULong, arg5: ULong) -> Any:
    """keyctl(2)."""
    if operation == 1:
        return _join(task, arg2)
    if operation == 31:
        return _capabilities(task, arg2, arg3)
    if operation in (8, 9):
        return (_link if operation == 8 else _unlink)(task, _signed(arg2), _signed(arg3))
    handler = OPERATIONS.get(operation)
    if handler is None:
        return -errno.EOPNOTSUPP
    return handler(task, _signed(arg2), arg3, arg4, arg5)
