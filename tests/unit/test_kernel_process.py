"""fork, vfork, clone, exec, exit and wait, driven through the real loop with fake processors."""

from __future__ import annotations

import errno
import struct

import pytest
from kernel_fakes import BASE, SCRATCH, KernelWorld, tiny_elf

from kvmsentry.errors import Errno
from kvmsentry.kernel import exec as exec_
from kvmsentry.kernel.task import Credentials, SigAction
from kvmsentry.vcpu.layout import FS_BASE, RAX, RIP, RSP

GETPID, FORK, VFORK, CLONE, EXECVE, EXIT, WAIT4, KILL, EXIT_GROUP, WAITID = 39, 57, 58, 56, 59, 60, 61, 62, 231, 247
GETPPID, SETPGID, SETSID, CLONE3, EXECVEAT, PRCTL, PIDFD_OPEN = 110, 109, 112, 435, 322, 157, 434
CLONE_THREAD = 0x3D0F00  # what pthread_create asks for, with CLONE_CHILD_CLEARTID and both SETTIDs
WNOHANG = 1


@pytest.fixture
def world() -> KernelWorld:
    return KernelWorld()


def status_at(task, address=SCRATCH) -> int:
    return task.mm.read_u32(address)


def test_init_runs_and_its_exit_ends_the_kernel(world):
    init = world.init()
    assert (init.tid, init.ctx.regs[RIP], init.ctx.where) == (1, BASE + 0x1000, "guest")
    sp = init.ctx.regs[RSP]
    assert sp % 16 == 0 and init.mm.read_u64(sp) == 1
    assert init.comm == b"a"
    assert world.call(init, GETPID) == 1
    world.post(init, EXIT_GROUP, 3)
    assert world.kernel.run() == 3 << 8
    assert not world.platform.contexts and not world.kernel.tasks and not world.kernel.processes
    assert not world.kernel.sessions


def test_no_frames_are_lost(world):
    init = world.init()
    world.call(init, GETPID)
    before = world.world.census()
    for _ in range(3):
        pid = world.call(init, FORK)
        child = world.kernel.tasks[pid]
        world.call(child, EXECVE, world.put(child, b"/bin/b\0"), 0, 0)
        world.call(child, EXIT, 0)
        assert world.call(init, WAIT4, pid, 0, 0, 0) == pid
    assert world.world.census() == before
    assert world.kernel.processes.keys() == {1}


def test_fork_copies_and_wait_reaps(world):
    init = world.init()
    world.put(init, b"before")
    init.ctx.regs[RSP] = 0x1234560
    pid = world.call(init, FORK)
    child = world.kernel.tasks[pid]
    assert child.ctx.regs[RAX] == 0 and child.ctx.regs[RSP] == 0x1234560
    assert child.ctx.regs[RIP] == init.ctx.regs[RIP]
    world.put(child, b"after!")
    assert init.mm.read(SCRATCH, 6) == b"before"
    assert world.call(child, GETPPID) == 1
    assert world.call(init, WAIT4, -1, SCRATCH, WNOHANG, 0) == 0
    world.call(child, EXIT, 7)
    assert world.call(init, WAIT4, -1, SCRATCH, 0, 0) == pid
    assert status_at(init) == 7 << 8
    assert world.call(init, WAIT4, -1, SCRATCH, 0, 0) == -errno.ECHILD


def test_wait_sleeps_until_the_child_exits(world):
    init = world.init()
    pid = world.call(init, FORK)
    child = world.kernel.tasks[pid]
    assert world.call(init, WAIT4, pid, SCRATCH, 0, 0) is None
    assert init.ctx.where == "parked"
    world.call(child, EXIT_GROUP, 1)
    assert init.ctx.log[-1] == pid and init.ctx.where == "guest"
    assert status_at(init) == 1 << 8


def test_vfork_parent_sleeps_until_exec_or_exit(world):
    init = world.init()
    assert world.call(init, VFORK) is None
    child = world.children(init)[0]
    assert init.ctx.where == "parked" and child.mm is init.mm
    assert world.call(child, EXECVE, world.put(child, b"/bin/b\0"), 0, 0) is None
    assert child.mm is not init.mm and init.ctx.log[-1] == child.tid
    assert child.comm == b"b"
    assert world.call(init, VFORK) is None
    other = world.kernel.tasks[max(world.kernel.tasks)]
    world.call(other, EXIT, 0)
    assert init.ctx.where == "guest" and init.ctx.log[-1] == other.tid


def test_failed_fork_leaves_nothing(world):
    init = world.init()
    census = world.world.census()
    world.platform.fail_context = Errno(errno.EAGAIN)
    assert world.call(init, FORK) == -errno.EAGAIN
    assert world.world.census() == census
    assert world.kernel.processes.keys() == {1} and init.mm.users == 1 and init.files.users == 1


@pytest.mark.parametrize("flags", [0x10000, 0x800, 0x20200, 0x10000800, 0x10000000 | 0x200])
def test_bad_flag_combinations(world, flags):
    init = world.init()
    assert world.call(init, CLONE, flags, 0, 0, 0, 0) == -errno.EINVAL


def test_threads_share_and_clear_their_tid(world):
    init = world.init()
    tid_at = SCRATCH + 64
    tid = world.call(init, CLONE, CLONE_THREAD, 0x700000, tid_at, tid_at, 0x11110000)
    thread = world.kernel.tasks[tid]
    assert thread.process is init.process and thread.mm is init.mm and thread.files is init.files
    assert thread.ctx.regs[RSP] == 0x700000 and thread.ctx.regs[FS_BASE] == 0x11110000
    assert init.mm.read_u32(tid_at) == tid
    assert world.call(thread, GETPID) == 1
    world.call(thread, EXIT, 0)
    assert init.mm.read_u32(tid_at) == 0 and init.mm.users == 1
    assert tid not in world.kernel.tasks


def test_exit_group_kills_other_threads_wherever_they_are(world):
    init = world.init()
    pid = world.call(init, FORK)
    leader = world.kernel.tasks[pid]
    tids = [world.call(leader, CLONE, CLONE_THREAD, 0x700000, 0, 0, 0) for _ in range(3)]
    assert world.call(world.kernel.tasks[tids[0]], 34) is None  # pause
    assert world.call(world.kernel.tasks[tids[1]], VFORK) is None
    grandchild = max(world.kernel.tasks)
    world.call(world.kernel.tasks[tids[2]], EXIT_GROUP, 5)
    assert set(world.kernel.tasks) == {1, grandchild}
    assert world.call(init, WAIT4, pid, SCRATCH, 0, 0) == pid and status_at(init) == 5 << 8
    assert world.kernel.tasks[grandchild].process.parent is init.process


def test_leader_may_go_first(world):
    init = world.init()
    pid = world.call(init, FORK)
    leader = world.kernel.tasks[pid]
    tid = world.call(leader, CLONE, CLONE_THREAD, 0x700000, 0, 0, 0)
    world.call(leader, EXIT, 1)
    assert world.call(init, WAIT4, pid, SCRATCH, WNOHANG, 0) == 0
    world.call(world.kernel.tasks[tid], EXIT, 2)
    assert world.call(init, WAIT4, pid, SCRATCH, 0, 0) == pid


def test_exec_from_a_thread_takes_the_leaders_place(world):
    init = world.init()
    pid = world.call(init, FORK)
    leader = world.kernel.tasks[pid]
    tid = world.call(leader, CLONE, CLONE_THREAD, 0x700000, 0, 0, 0)
    thread = world.kernel.tasks[tid]
    world.call(thread, EXECVE, world.put(thread, b"/bin/b\0"), world.strings(thread, b"x", b"yy"), 0)
    assert thread.tid == pid and world.kernel.tasks[pid] is thread and leader.dead
    assert list(thread.process.threads) == [pid] and thread.process.leader is thread
    assert thread.ctx.where == "guest" and thread.ctx.log[-1] == "reload"
    assert thread.mm.read_u64(thread.ctx.regs[RSP]) == 2
    assert world.call(thread, GETPID) == pid


def test_orphans_go_to_init_or_the_subreaper(world):
    init = world.init()
    middle = world.kernel.tasks[world.call(init, FORK)]
    assert world.call(middle, PRCTL, 36, 1, 0, 0, 0) == 0
    child = world.kernel.tasks[world.call(middle, FORK)]
    grandchild = world.kernel.tasks[world.call(child, FORK)]
    world.call(child, EXIT, 0)
    assert grandchild.process.parent is middle.process
    world.call(middle, EXIT, 0)
    assert grandchild.process.parent is init.process
    assert set(init.process.children) == {middle.tid, child.tid, grandchild.tid}  # zombies go along


def test_init_takes_everybody_along(world):
    init = world.init()
    for _ in range(3):
        world.call(world.kernel.tasks[world.call(init, FORK)], 34)
    world.post(init, EXIT_GROUP, 0)
    assert world.kernel.run() == 0
    assert not world.platform.contexts


def test_ignored_sigchld_reaps(world):
    init = world.init()
    init.sighand.actions[17] = SigAction(1)
    pid = world.call(init, FORK)
    world.call(world.kernel.tasks[pid], EXIT, 0)
    assert pid not in world.kernel.processes
    assert world.call(init, WAIT4, -1, 0, 0, 0) == -errno.ECHILD


def test_waitid_fills_siginfo_and_may_leave_the_zombie(world):
    init = world.init()
    pid = world.call(init, FORK)
    world.call(world.kernel.tasks[pid], EXIT, 9)
    for options, left in ((4 | 0x01000000, True), (4, False)):
        assert world.call(init, WAITID, 1, pid, SCRATCH, options, 0) == 0
        signo, _, code, child, uid, status = struct.unpack("<iii4xiIi", init.mm.read(SCRATCH, 28))
        assert (signo, code, child, uid, status) == (17, 1, pid, 0, 9)
        assert (pid in world.kernel.processes) is left
    assert world.call(init, WAITID, 1, pid, SCRATCH, 0, 0) == -errno.EINVAL


def test_clone3(world):
    init = world.init()
    args = struct.pack("<11Q", 0x1000, SCRATCH + 512, 0, 0, 17, 0, 0, 0, 0, 0, 0)  # CLONE_PIDFD
    pid = world.call(init, CLONE3, world.put(init, args), 88)
    fd = init.mm.read_u32(SCRATCH + 512)
    assert init.files.get(fd).process.pid == pid and fd in init.files.cloexec
    assert init.files.get(fd).poll() == 0
    world.call(world.kernel.tasks[pid], EXIT, 0)
    assert init.files.get(fd).poll() & 1
    assert world.call(init, WAITID, 3, fd, 0, 4, 0) == 0
    assert world.call(init, CLONE3, SCRATCH, 63) == -errno.EINVAL
    assert world.call(init, CLONE3, world.put(init, args + b"\1" * 8), 96) == -errno.E2BIG
    stacked = struct.pack("<11Q", 0, 0, 0, 0, 17, 0x700000, 0, 0, 0, 0, 0)
    assert world.call(init, CLONE3, world.put(init, stacked), 88) == -errno.EINVAL


def exec_error(world, task, path, argv=0) -> int | None:
    return world.call(task, EXECVE, world.put(task, path + b"\0"), argv, 0)


def test_exec_look_up_errors(world):
    init = world.init()
    world.file(b"bin/text", b"hello\n")
    world.file(b"bin/empty", b"")
    world.file(b"bin/plain", tiny_elf(), mode=0o644)
    world.file(b"bin/lost", b"#!/bin/nothing\n")
    world.file(b"bin/loop", b"#!/bin/loop\n")
    for path, number in [
        (b"/bin/none", errno.ENOENT), (b"/bin/a/b", errno.ENOTDIR), (b"/bin", errno.EACCES), (b"", errno.ENOENT),
        (b"/bin/text", errno.ENOEXEC), (b"/bin/empty", errno.ENOEXEC), (b"/bin/plain", errno.EACCES),
        (b"/bin/lost", errno.ENOENT), (b"/bin/loop", errno.ELOOP),
    ]:  # fmt: skip
        assert exec_error(world, init, path) == -number, path
    assert world.call(init, EXECVE, 0x10, 0, 0) == -errno.EFAULT
    assert world.call(init, EXECVE, world.put(init, b"/bin/b\0"), 0x10, 0) == -errno.EFAULT
    assert init.comm == b"a" and world.call(init, GETPID) == 1


def arguments(task) -> list[bytes]:
    sp = task.ctx.regs[RSP]
    return [task.mm.read_cstring(task.mm.read_u64(sp + 8 + 8 * i), 4096) for i in range(task.mm.read_u64(sp))]


def test_scripts(world):
    init = world.init()
    world.file(b"bin/s", b"#! /bin/b  -x y \nrest\n")
    world.file(b"bin/t", b"#!/bin/s\n")
    world.call(init, EXECVE, world.put(init, b"/bin/t\0"), world.strings(init, b"name", b"1", b"2"), 0)
    assert arguments(init) == [b"/bin/b", b"-x y", b"/bin/s", b"/bin/t", b"1", b"2"]
    assert init.comm == b"t"


@pytest.mark.parametrize(
    "head, expected",
    [
        (b"#!/bin/sh\n", (b"/bin/sh", None)),
        (b"#!/bin/sh", (b"/bin/sh", None)),
        (b"#! \t/bin/sh -e  \n", (b"/bin/sh", b"-e")),
        (b"#!/bin/sh -a -b\nx", (b"/bin/sh", b"-a -b")),
        (b"#!\n", None),
        (b"#!   \n", None),
        (b"#!/" + b"x" * 253, None),
        (b"#!/" + b"x" * 200 + b" " + b"y" * 52, (b"/" + b"x" * 200, b"y" * 52)),
    ],
)
def test_parse_script(head, expected):
    if expected is None:
        with pytest.raises(Errno) as caught:
            exec_.parse_script(head)
        assert caught.value.errno == errno.ENOEXEC
    else:
        assert exec_.parse_script(head) == expected


def test_exec_resets_and_keeps(world):
    init = world.init()
    init.sighand.actions[10], init.sighand.actions[12] = SigAction(0x4444), SigAction(1)
    init.blocked = 1 << 9
    init.altstack = (0x1000, 0, 8192)
    init.clear_child_tid = SCRATCH
    assert exec_error(world, init, b"/bin/b") is None
    assert [init.sighand.actions[n].handler for n in (10, 12)] == [0, 1]
    assert init.blocked == 1 << 9 and init.altstack == (0, 2, 0) and init.clear_child_tid == 0
    assert init.process.exe.dentry.name == b"b"
    assert world.root.dentry.children[b"bin"].children[b"b"].inode.writers == -1
    assert world.root.dentry.children[b"bin"].children[b"a"].inode.writers == 0


def test_text_file_busy(world):
    init = world.init()
    inode = world.sb.root.lookup(b"bin").lookup(b"b")
    inode.writers = 1
    assert exec_error(world, init, b"/bin/b") == -errno.ETXTBSY


def test_set_user_id(world):
    inode = world.file(b"bin/su", tiny_elf(), mode=0o4755)
    init = world.init(creds=Credentials(1000, 1000))
    assert init.creds.effective == 0
    assert exec_error(world, init, b"/bin/su") is None
    creds = init.creds
    assert (creds.uid, creds.euid, creds.suid, creds.fsuid) == (1000, 0, 0, 0)
    assert creds.effective == creds.permitted == creds.bounding and init.process.dumpable == 0
    assert inode.uid == 0


def test_no_new_privs_and_nosuid(world):
    world.file(b"bin/su", tiny_elf(), mode=0o4755)
    init = world.init(creds=Credentials(1000, 1000))
    assert world.call(init, PRCTL, 38, 1, 0, 0, 0) == 0
    assert exec_error(world, init, b"/bin/su") is None
    assert init.creds.euid == 1000 and init.creds.permitted == 0


def test_root_that_becomes_somebody_loses_capabilities(world):
    init = world.init()
    assert world.call(init, 105, 1000) == 0
    creds = init.creds
    assert (creds.uid, creds.euid, creds.suid) == (1000,) * 3 and creds.permitted == creds.effective == 0
    assert world.call(init, 105, 0) == -errno.EPERM


def test_setpgid_and_setsid(world):
    init = world.init()
    child = world.kernel.tasks[world.call(init, FORK)]
    assert world.call(init, SETPGID, child.tid, child.tid) == 0
    assert child.process.group.pgid == child.tid
    assert world.call(child, SETSID) == -errno.EPERM
    other = world.kernel.tasks[world.call(init, FORK)]
    assert world.call(other, SETSID) == other.tid
    assert world.call(init, SETPGID, other.tid, child.tid) == -errno.EPERM
    assert world.call(init, SETPGID, 1, 0) == -errno.EPERM
    assert world.call(init, SETPGID, child.tid, 999) == -errno.EPERM
