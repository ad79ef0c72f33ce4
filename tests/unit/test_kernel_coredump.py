"""Core files: names, who may have one, and a dump that is cut short. What is in them: tests/guest/core_dumps.c."""

from __future__ import annotations

import struct

import pytest
from kernel_fakes import KernelWorld

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.sysctl import sysctl
from kvmsentry.fs.vfs import walk
from kvmsentry.kernel import coredump
from kvmsentry.kernel.task import Credentials
from kvmsentry.kernel.traps import Pace

FORK, KILL = 57, 62
CORE, FSIZE, UNLIMITED = 4, 1, (1 << 64) - 1


@pytest.fixture
def world(monkeypatch) -> KernelWorld:
    monkeypatch.setattr(Pace, "TURN", 1 << 62)  # however slow the machine: nobody lets timers run here
    return KernelWorld()


@pytest.fixture
def child(world):
    task = world.kernel.tasks[world.call(world.init(), FORK)]
    task.process.rlimits[CORE] = (UNLIMITED, UNLIMITED)
    return task


def size(world, name: bytes) -> int:
    """-1: there is no such file."""
    try:
        return walk(world.kernel.init.leader, name).inode.size
    except Errno:
        return -1


def abort(world, task) -> int:
    world.call(task, KILL, task.process.pid, 6)
    assert task.dead and task.process.core is None
    return task.process.exit_code


@pytest.mark.parametrize(
    "pattern, name",
    [
        ("core", b"core"),
        ("/tmp/%e.%p.%P.%i.%I", b"/tmp/a.2.2.2.2"),
        ("%u-%g-%s-%d-%c%%", b"7-8-6-1-4096%"),
        ("%f %E", b"a !bin!a"),
        ("c%", b"c"),
        ("%q%z", b""),
        ("%h", b"kvmsentry"),
    ],
)
def test_names(world, child, pattern, name):
    child.creds = Credentials(7, 8)
    assert coredump.file_name(child, pattern, 6, 4096) == name
    sysctl(world.kernel).values["kernel/core_uses_pid"] = "1"
    has_pid = "%p" in pattern
    assert coredump.file_name(child, pattern, 6, 4096) == name + (b"" if has_pid else b".2")


def test_what_users_choose_leads_nowhere(world, child):
    child.comm = b"../../etc/x"
    assert coredump.file_name(child, "core.%e", 6, 0) == b"core...!..!etc!x"
    child.comm = b".."
    assert coredump.file_name(child, "%e/core", 6, 0) == b"!./core"


def test_the_file_is_an_elf_core(world, child):
    assert abort(world, child) == 6 | 0x80
    inode = walk(world.kernel.init.leader, b"/core").inode
    head = bytearray(64)
    inode.open(world.kernel.init.leader, None, 0).pread([memoryview(head)], 0)
    assert head[:4] == b"\x7fELF" and struct.unpack_from("<HH", head, 16) == (4, 62)
    assert inode.mode == 0o100600


@pytest.mark.parametrize("limit", [(CORE, 0), (CORE, 4095)])
def test_no_room_no_file(world, child, limit):
    child.process.rlimits[limit[0]] = (limit[1], UNLIMITED)
    assert abort(world, child) == 6
    assert size(world, b"/core") == -1


def test_a_limit_cuts(world, child):
    child.process.rlimits[FSIZE] = (5000, 5000)
    assert abort(world, child) == 6 | 0x80
    assert 0 < size(world, b"/core") <= 5000


def test_pipes_are_not_started(world, child):
    sysctl(world.kernel).values["kernel/core_pattern"] = "|/bin/helper %p"
    assert abort(world, child) == 6
    assert "pipe failed" in world.kernel.messages[-1][2]


def test_gained_privilege(world, child):
    child.process.dumpable = coredump.after_new_ids(child)
    assert child.process.dumpable == 0
    assert abort(world, child) == 6


@pytest.mark.parametrize("pattern, status", [("core", 6), ("/core.%u", 6 | 0x80)])
def test_gained_privilege_dumps_as_root(world, child, pattern, status):
    values = sysctl(world.kernel).values
    values["fs/suid_dumpable"], values["kernel/core_pattern"] = "2", pattern
    child.creds = Credentials(7, 8)
    child.process.dumpable = coredump.after_new_ids(child)
    assert abort(world, child) == status
    if status & 0x80:
        assert walk(world.kernel.init.leader, b"/core.7").inode.uid == 0


def test_a_second_kill_cuts_it_short(world, child):
    child.process.core = core = coredump.Core()
    child.process.exiting = True
    world.call(world.kernel.init.leader, KILL, child.process.pid, 9)
    assert core.interrupted
    child.process.core, child.process.exiting = None, False
