"""User and group ids, supplementary groups, capability sets: setuid(2), setresuid(2), setgroups(2), capset(2).

Credentials are never changed in place: every call makes a copy with changes and gives it to the calling thread (glibc
makes all threads call; so does Linux's rule: ids belong to threads).
"""

from __future__ import annotations

import errno
from struct import Struct

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap, userns
from kvmsentry.kernel.coredump import after_new_ids
from kvmsentry.kernel.task import Credentials, Task
from kvmsentry.kernel.userns import ROOT, kgid, kuid, shown_gid, shown_uid
from kvmsentry.syscall.table import Int, UInt, UserPtr, syscall

NO_CHANGE = 0xFFFFFFFF
NGROUPS_MAX = 65536
CAP_HEADER = Struct("<Ii")  # struct __user_cap_header_struct: version, pid
CAP_DATA = Struct("<3I")  # effective, permitted, inheritable; twice for version 3
VERSION_1, VERSION_2, VERSION_3 = 0x19980330, 0x20071026, 0x20080522  # uapi/linux/capability.h


@syscall(102)
def getuid(task: Task) -> int:
    creds = task.creds
    return creds.uid if creds.user_ns is ROOT else shown_uid(creds.user_ns, creds.uid)


@syscall(104)
def getgid(task: Task) -> int:
    creds = task.creds
    return creds.gid if creds.user_ns is ROOT else shown_gid(creds.user_ns, creds.gid)


@syscall(107)
def geteuid(task: Task) -> int:
    creds = task.creds
    return creds.euid if creds.user_ns is ROOT else shown_uid(creds.user_ns, creds.euid)


@syscall(108)
def getegid(task: Task) -> int:
    creds = task.creds
    return creds.egid if creds.user_ns is ROOT else shown_gid(creds.user_ns, creds.egid)


def _commit(task: Task, **changes: int) -> int:
    """Give the thread changed ids, with what follows for capabilities (cap_task_fix_setuid) and dumpability."""
    old = task.creds
    new = old.replace(**changes)
    if not old.securebits & cap.SECBIT_NO_SETUID_FIXUP:
        _fix_capabilities(old, new)
    if (old.euid, old.egid, old.fsuid, old.fsgid) != (new.euid, new.egid, new.fsuid, new.fsgid):
        task.process.dumpable = after_new_ids(task)
        task.pdeath_signal = 0
    task.creds = new
    return 0


def _fix_capabilities(old: Credentials, new: Credentials) -> None:
    """cap_emulate_setxuid in security/commoncap.c."""
    root = userns.root_uid(old.user_ns)
    had_root = root in (old.uid, old.euid, old.suid)
    if had_root and root not in (new.uid, new.euid, new.suid):
        if not old.securebits & cap.SECBIT_KEEP_CAPS:
            new.permitted = new.effective = 0
        new.ambient = 0
    if old.euid == root and new.euid != root:
        new.effective = 0
    if old.euid != root and new.euid == root:
        new.effective = new.permitted


@syscall(105)
def setuid(task: Task, uid: UInt) -> int:
    creds = task.creds
    if uid == NO_CHANGE:
        return -errno.EINVAL
    uid = kuid(creds, uid)
    if creds.holds(cap.SETUID):
        return _commit(task, uid=uid, euid=uid, suid=uid, fsuid=uid)
    if uid not in (creds.uid, creds.suid):
        return -errno.EPERM
    return _commit(task, euid=uid, fsuid=uid)


@syscall(106)
def setgid(task: Task, gid: UInt) -> int:
    creds = task.creds
    if gid == NO_CHANGE:
        return -errno.EINVAL
    gid = kgid(creds, gid)
    if creds.holds(cap.SETGID):
        return _commit(task, gid=gid, egid=gid, sgid=gid, fsgid=gid)
    if gid not in (creds.gid, creds.sgid):
        return -errno.EPERM
    return _commit(task, egid=gid, fsgid=gid)


@syscall(113)
def setreuid(task: Task, ruid: UInt, euid: UInt) -> int:
    creds = task.creds
    ruid, euid = kuid(creds, ruid), kuid(creds, euid)
    if not creds.holds(cap.SETUID):
        if ruid not in (NO_CHANGE, creds.uid, creds.euid) or euid not in (NO_CHANGE, creds.uid, creds.euid, creds.suid):
            return -errno.EPERM
    new_ruid = creds.uid if ruid == NO_CHANGE else ruid
    new_euid = creds.euid if euid == NO_CHANGE else euid
    suid = creds.suid
    if ruid != NO_CHANGE or (euid != NO_CHANGE and euid != creds.uid):
        suid = new_euid
    return _commit(task, uid=new_ruid, euid=new_euid, suid=suid, fsuid=new_euid)


@syscall(114)
def setregid(task: Task, rgid: UInt, egid: UInt) -> int:
    creds = task.creds
    rgid, egid = kgid(creds, rgid), kgid(creds, egid)
    if not creds.holds(cap.SETGID):
        if rgid not in (NO_CHANGE, creds.gid, creds.egid) or egid not in (NO_CHANGE, creds.gid, creds.egid, creds.sgid):
            return -errno.EPERM
    new_rgid = creds.gid if rgid == NO_CHANGE else rgid
    new_egid = creds.egid if egid == NO_CHANGE else egid
    sgid = creds.sgid
    if rgid != NO_CHANGE or (egid != NO_CHANGE and egid != creds.gid):
        sgid = new_egid
    return _commit(task, gid=new_rgid, egid=new_egid, sgid=sgid, fsgid=new_egid)


@syscall(117)
def setresuid(task: Task, ruid: UInt, euid: UInt, suid: UInt) -> int:
    creds = task.creds
    ruid, euid, suid = kuid(creds, ruid), kuid(creds, euid), kuid(creds, suid)
    allowed = (NO_CHANGE, creds.uid, creds.euid, creds.suid)
    if not (ruid in allowed and euid in allowed and suid in allowed) and not creds.holds(cap.SETUID):
        return -errno.EPERM
    new_euid = creds.euid if euid == NO_CHANGE else euid
    return _commit(
        task,
        uid=creds.uid if ruid == NO_CHANGE else ruid,
        euid=new_euid,
        suid=creds.suid if suid == NO_CHANGE else suid,
        fsuid=new_euid,
    )


@syscall(119)
def setresgid(task: Task, rgid: UInt, egid: UInt, sgid: UInt) -> int:
    creds = task.creds
    rgid, egid, sgid = kgid(creds, rgid), kgid(creds, egid), kgid(creds, sgid)
    allowed = (NO_CHANGE, creds.gid, creds.egid, creds.sgid)
    if not (rgid in allowed and egid in allowed and sgid in allowed) and not creds.holds(cap.SETGID):
        return -errno.EPERM
    new_egid = creds.egid if egid == NO_CHANGE else egid
    return _commit(
        task,
        gid=creds.gid if rgid == NO_CHANGE else rgid,
        egid=new_egid,
        sgid=creds.sgid if sgid == NO_CHANGE else sgid,
        fsgid=new_egid,
    )


@syscall(118)
def getresuid(task: Task, ruid: UserPtr, euid: UserPtr, suid: UserPtr) -> int:
    creds, mm = task.creds, task.mm
    ns = creds.user_ns
    mm.write_u32(ruid, shown_uid(ns, creds.uid))
    mm.write_u32(euid, shown_uid(ns, creds.euid))
    mm.write_u32(suid, shown_uid(ns, creds.suid))
    return 0


@syscall(120)
def getresgid(task: Task, rgid: UserPtr, egid: UserPtr, sgid: UserPtr) -> int:
    creds, mm = task.creds, task.mm
    ns = creds.user_ns
    mm.write_u32(rgid, shown_gid(ns, creds.gid))
    mm.write_u32(egid, shown_gid(ns, creds.egid))
    mm.write_u32(sgid, shown_gid(ns, creds.sgid))
    return 0


@syscall(122)
def setfsuid(task: Task, uid: UInt) -> int:
    creds = task.creds
    old = creds.fsuid
    shown = shown_uid(creds.user_ns, old)
    uid = _fs_id(creds.user_ns, creds.user_ns.uid_map, uid)
    if uid != old and uid != NO_CHANGE and (uid in (creds.uid, creds.euid, creds.suid) or creds.holds(cap.SETUID)):
        effective = creds.effective
        if not creds.securebits & cap.SECBIT_NO_SETUID_FIXUP:  # cap_task_fix_setuid, LSM_SETID_FS
            root = userns.root_uid(creds.user_ns)
            if old == root:
                effective &= ~cap.FS_MASK
            elif uid == root:
                effective |= creds.permitted & cap.FS_MASK
        task.creds = creds.replace(fsuid=uid, effective=effective)
    return shown


def _fs_id(ns: userns.UserNamespace, mapping: userns.Map | None, number: int) -> int:
    return number if ns is ROOT else userns.to_kernel(mapping, number)


@syscall(123)
def setfsgid(task: Task, gid: UInt) -> int:
    creds = task.creds
    old = creds.fsgid
    shown = shown_gid(creds.user_ns, old)
    gid = _fs_id(creds.user_ns, creds.user_ns.gid_map, gid)
    if gid != old and gid != NO_CHANGE and (gid in (creds.gid, creds.egid, creds.sgid) or creds.holds(cap.SETGID)):
        task.creds = creds.replace(fsgid=gid)
    return shown


@syscall(115)
def getgroups(task: Task, size: Int, groups: UserPtr) -> int:
    mine = sorted(shown_gid(task.creds.user_ns, gid) for gid in task.creds.groups)
    if size < 0:
        return -errno.EINVAL
    if size:
        if len(mine) > size:
            return -errno.EINVAL
        task.mm.write(groups, b"".join(gid.to_bytes(4, "little") for gid in mine))
    return len(mine)


@syscall(116)
def setgroups(task: Task, size: Int, groups: UserPtr) -> int:
    if not userns.may_setgroups(task.creds):
        return -errno.EPERM
    if not 0 <= size <= NGROUPS_MAX:
        return -errno.EINVAL
    wanted = memoryview(task.mm.read(groups, 4 * size)).cast("I") if size else ()
    task.creds = task.creds.replace(groups=frozenset(kgid(task.creds, gid) for gid in wanted))
    return 0


# -- capabilities --
def _cap_version(task: Task, header: int) -> tuple[int, int]:
    """(how many 32-bit halves, pid); EINVAL with our version written for one that we don't know."""
    version, pid = CAP_HEADER.unpack(task.mm.read(header, CAP_HEADER.size))
    if version == VERSION_1:
        return 1, pid
    if version in (VERSION_2, VERSION_3):
        return 2, pid
    task.mm.write_u32(header, VERSION_3)
    raise Errno(errno.EINVAL)


@syscall(125)
def capget(task: Task, header: UserPtr, data: UserPtr) -> int:
    try:
        halves, pid = _cap_version(task, header)
    except Errno as error:
        return 0 if error.errno == errno.EINVAL and not data else -error.errno
    if pid < 0:
        return -errno.EINVAL
    other = task if pid in (0, task.vtid) else task.process.pid_ns.tasks.get(pid)
    if other is None:
        return -errno.ESRCH
    creds = other.creds
    sets = (creds.effective, creds.permitted, creds.inheritable)
    for half in range(halves):
        task.mm.write(data + 12 * half, CAP_DATA.pack(*(s >> 32 * half & 0xFFFFFFFF for s in sets)))
    return 0


@syscall(126)
def capset(task: Task, header: UserPtr, data: UserPtr) -> int:
    halves, pid = _cap_version(task, header)
    if pid not in (0, task.vtid):
        return -errno.EPERM
    effective = permitted = inheritable = 0
    for half in range(halves):
        e, p, i = CAP_DATA.unpack(task.mm.read(data + 12 * half, CAP_DATA.size))
        effective |= e << 32 * half
        permitted |= p << 32 * half
        inheritable |= i << 32 * half
    known = (1 << (cap.LAST + 1)) - 1
    effective, permitted, inheritable = effective & known, permitted & known, inheritable & known
    old = task.creds
    if not old.holds(cap.SETPCAP) and inheritable & ~(old.inheritable | old.permitted):
        return -errno.EPERM
    if inheritable & ~(old.inheritable | old.bounding) or permitted & ~old.permitted or effective & ~permitted:
        return -errno.EPERM
    ambient = old.ambient & permitted & inheritable
    task.creds = old.replace(effective=effective, permitted=permitted, inheritable=inheritable, ambient=ambient)
    return 0
