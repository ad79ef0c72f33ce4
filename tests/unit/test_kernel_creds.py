"""Ids, capabilities, prctl, limits, siginfo layouts: calls that only look and set."""

from __future__ import annotations

import errno
import struct

import pytest
from kernel_fakes import SCRATCH, KernelWorld, tiny_elf

from kvmsentry.kernel import cap
from kvmsentry.kernel.task import ALL_CAPABILITIES, Credentials, SigInfo
from kvmsentry.syscall import abi_signal as abi

SETUID, SETREUID, SETRESUID, SETFSUID, GETGROUPS, SETGROUPS, CAPGET, CAPSET = 105, 113, 117, 122, 115, 116, 125, 126
PRCTL, PRLIMIT, SETRLIMIT, GETRLIMIT, ARCH_PRCTL, SETPRIORITY, GETPRIORITY, EXECVE, UNSHARE = (
    157, 302, 160, 97, 158, 141, 140, 59, 272,
)  # fmt: skip
MINUS = 0xFFFFFFFF


@pytest.fixture
def world() -> KernelWorld:
    return KernelWorld()


def ids(task) -> tuple[int, int, int, int]:
    c = task.creds
    return c.uid, c.euid, c.suid, c.fsuid


@pytest.mark.parametrize(
    "start, call, arguments, result, after",
    [
        ((0, 0, 0), SETUID, (5,), 0, (5, 5, 5, 5)),
        ((5, 6, 7), SETUID, (7,), 0, (5, 7, 7, 7)),
        ((5, 6, 7), SETUID, (6,), -errno.EPERM, (5, 6, 7, 6)),
        ((5, 6, 7), SETREUID, (6, 5), 0, (6, 5, 5, 5)),
        ((5, 6, 7), SETREUID, (MINUS, 7), 0, (5, 7, 7, 7)),
        ((5, 6, 7), SETREUID, (MINUS, 5), 0, (5, 5, 7, 5)),
        ((5, 6, 7), SETREUID, (7, MINUS), -errno.EPERM, (5, 6, 7, 6)),
        ((5, 6, 7), SETRESUID, (7, 5, 6), 0, (7, 5, 6, 5)),
        ((5, 6, 7), SETRESUID, (8, MINUS, MINUS), -errno.EPERM, (5, 6, 7, 6)),
        ((5, 6, 7), SETFSUID, (7,), 6, (5, 6, 7, 7)),
        ((5, 6, 7), SETFSUID, (8,), 6, (5, 6, 7, 6)),
    ],
)
def test_ids(world, start, call, arguments, result, after):
    task = world.init()
    uid, euid, suid = start
    effective = ALL_CAPABILITIES if euid == 0 else 0
    task.creds = task.creds.replace(uid=uid, euid=euid, suid=suid, fsuid=euid, effective=effective)
    assert world.call(task, call, *arguments) == result
    assert ids(task) == after


def capset(world, task, effective, permitted, inheritable) -> int | None:
    words = [(s >> shift) & MINUS for shift in (0, 32) for s in (effective, permitted, inheritable)]
    world.put(task, struct.pack("<Ii6I", 0x20080522, 0, *words))
    return world.call(task, CAPSET, SCRATCH, SCRATCH + 8)


def test_capset_only_shrinks(world):
    task = world.init()
    few = 1 << cap.KILL | 1 << cap.CHECKPOINT_RESTORE
    assert capset(world, task, few, few, few) == 0
    assert task.creds.effective == task.creds.permitted == few
    assert capset(world, task, few, few | 1, 0) == -errno.EPERM
    assert capset(world, task, 0, 0, 1) == -errno.EPERM
    assert world.call(task, CAPGET, SCRATCH, SCRATCH + 8) == 0
    assert struct.unpack("<6I", task.mm.read(SCRATCH + 8, 24)) == (32, 32, 32, 256, 256, 256)
    world.put(task, struct.pack("<Ii", 0x1234, 0))
    assert world.call(task, CAPGET, SCRATCH, SCRATCH + 8) == -errno.EINVAL
    assert task.mm.read_u32(SCRATCH) == 0x20080522
    world.put(task, struct.pack("<Ii", 0x1234, 0))
    assert world.call(task, CAPGET, SCRATCH, 0) == 0


def test_ambient_capabilities_survive_exec(world):
    world.file(b"bin/su", tiny_elf(), mode=0o4755)
    task = world.init()
    mine = 1 << cap.NET_RAW
    assert world.call(task, PRCTL, 8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    assert world.call(task, SETRESUID, 1000, 1000, 1000) == 0
    assert task.creds.permitted == ALL_CAPABILITIES and task.creds.effective == 0
    assert capset(world, task, mine, mine, mine) == 0
    assert world.call(task, PRCTL, 47, 2, cap.NET_RAW, 0, 0) == 0
    assert world.call(task, EXECVE, world.put(task, b"/bin/b\0"), 0, 0) is None
    creds = task.creds
    assert (creds.effective, creds.permitted, creds.ambient) == (mine, mine, mine)
    assert not creds.securebits & cap.SECBIT_KEEP_CAPS
    assert world.call(task, EXECVE, world.put(task, b"/bin/su\0"), 0, 0) is None
    assert task.creds.ambient == 0 and task.creds.euid == 0


def test_root_exec_is_bounded(world):
    task = world.init()
    assert world.call(task, PRCTL, 24, cap.SYS_ADMIN, 0, 0, 0) == 0
    assert world.call(task, EXECVE, world.put(task, b"/bin/b\0"), 0, 0) is None
    assert task.creds.permitted == task.creds.effective == ALL_CAPABILITIES & ~(1 << cap.SYS_ADMIN)


def test_groups(world):
    task = world.init()
    world.put(task, struct.pack("<3I", 30, 10, 20))
    assert world.call(task, SETGROUPS, 3, SCRATCH) == 0
    assert world.call(task, GETGROUPS, 0, 0) == 3
    assert world.call(task, GETGROUPS, 8, SCRATCH) == 3
    assert struct.unpack("<3I", task.mm.read(SCRATCH, 12)) == (10, 20, 30)
    assert world.call(task, GETGROUPS, 2, SCRATCH) == -errno.EINVAL
    assert world.call(task, SETGROUPS, 1, 8) == -errno.EFAULT


def test_limits(world):
    task = world.init()
    world.put(task, struct.pack("<QQ", 100, 50))
    assert world.call(task, SETRLIMIT, 7, SCRATCH) == -errno.EINVAL
    world.put(task, struct.pack("<QQ", 4 << 20, 8 << 20))
    assert world.call(task, SETRLIMIT, 3, SCRATCH) == 0 and task.mm.rlimit_stack == 4 << 20
    task.creds = Credentials(1000)
    world.put(task, struct.pack("<QQ", 1 << 20, 16 << 20))
    assert world.call(task, PRLIMIT, 0, 3, SCRATCH, 0) == -errno.EPERM
    assert world.call(task, PRLIMIT, 0, 3, 0, SCRATCH) == 0
    assert struct.unpack("<QQ", task.mm.read(SCRATCH, 16)) == (4 << 20, 8 << 20)
    assert world.call(task, GETRLIMIT, 16, SCRATCH) == -errno.EINVAL
    assert world.call(task, PRLIMIT, 77, 3, 0, SCRATCH) == -errno.ESRCH


def test_priorities(world):
    task = world.init()
    assert world.call(task, GETPRIORITY, 0, 0) == 20
    assert world.call(task, SETPRIORITY, 0, 0, 7) == 0 and world.call(task, GETPRIORITY, 0, 0) == 13
    task.creds = Credentials(1000)
    assert world.call(task, SETPRIORITY, 0, 0, 3) == -errno.EACCES
    assert world.call(task, GETPRIORITY, 0, 99) == -errno.ESRCH
    assert world.call(task, GETPRIORITY, 3, 0) == -errno.EINVAL


def test_arch_prctl(world):
    task = world.init()
    assert world.call(task, ARCH_PRCTL, 0x1002, 0x7000) is None
    assert task.ctx.log[-1] == "reload" and task.ctx.regs[0] == 0
    assert world.call(task, ARCH_PRCTL, 0x1003, SCRATCH) == 0 and task.mm.read_u64(SCRATCH) == 0x7000
    assert world.call(task, ARCH_PRCTL, 0x1002, 1 << 63) == -errno.EPERM
    assert world.call(task, ARCH_PRCTL, 0x5001, 0) == -errno.EINVAL


def test_unshare_uts_and_files(world):
    task = world.init()
    child = world.kernel.tasks[world.call(task, 56, 0x600, 0, 0, 0, 0)]  # CLONE_FS | CLONE_FILES
    assert child.files is task.files and child.fs is task.fs
    assert world.call(child, UNSHARE, 0x600) == 0
    assert child.files is not task.files and child.fs is not task.fs and task.files.users == 1
    assert world.call(child, UNSHARE, 0x4000000) == 0
    child.uts.nodename = "other"
    assert task.uts.nodename != "other"
    assert world.call(child, UNSHARE, 0x80) == 0  # CLONE_NEWTIME: for the children
    assert child.ns.time is task.ns.time and child.ns.time_for_children is not child.ns.time
    child.creds = Credentials(1000)
    assert world.call(child, UNSHARE, 0x4000000) == -errno.EPERM


@pytest.mark.parametrize(
    "info, layout, values",
    [
        (SigInfo(10, 0, pid=3, uid=4), "<iii4xiI", (10, 0, 0, 3, 4)),
        (SigInfo(40, -1, pid=3, uid=4, value=-1), "<iii4xiIq", (40, 0, -1, 3, 4, -1)),
        (SigInfo(17, 1, pid=3, uid=4, status=9, utime=7, stime=8), "<iii4xiIi4xqq", (17, 0, 1, 3, 4, 9, 7, 8)),
        (SigInfo(11, 1, addr=0x7FFFFFFFF000), "<iii4xQ", (11, 0, 1, 0x7FFFFFFFF000)),
        (SigInfo(14, -2, timerid=2, overrun=5, value=6), "<iii4xiiQ", (14, 0, -2, 2, 5, 6)),
        (SigInfo(29, 1, band=65, fd=3), "<iii4xqi", (29, 0, 1, 65, 3)),
        (SigInfo(31, 1, 7, addr=0x4000, syscall=39, arch=0xC000003E), "<iii4xQiI", (31, 7, 1, 0x4000, 39, 0xC000003E)),
    ],
)
def test_siginfo_layouts(info, layout, values):
    data = abi.pack_siginfo(info)
    assert len(data) == 128 and struct.unpack(layout, data[: struct.calcsize(layout)]) == values
    again = abi.unpack_siginfo(data, info.signo)
    assert abi.pack_siginfo(again)[:48] == data[:48]
