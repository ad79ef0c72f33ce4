"""Shared subtrees without a guest: what appears where, long piles, and nothing half done when it is refused."""

from __future__ import annotations

import errno

import pytest
from fs_world import FsWorld

from kvmsentry.errors import Errno
from kvmsentry.fs import mountops, mounttree
from kvmsentry.fs.mount import MOUNTPOINTS, MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE, Mount
from kvmsentry.fs.proc.mounttable import mountinfo_text, mounts_text
from kvmsentry.fs.tmpfs import TmpSuper
from kvmsentry.fs.vfs import FsContext, walk
from kvmsentry.kernel.userns import ROOT, UserNamespace


@pytest.fixture
def task():
    world = FsWorld()
    task = world.task(TmpSuper(world.kernel))
    for name in (b"/a", b"/a/x", b"/b", b"/c", b"/d"):
        task.call(83, name, 0o755)
    return task


def bind(task, source: bytes, target: bytes, flags: int = 0) -> Mount:
    mountops.mount_bind(task, walk(task, target), walk(task, source), flags)
    return walk(task, target).mount


def count(task) -> int:
    return len(mounttree.namespace_of(task).mounts)


def test_a_group_has_one_master(task):
    a = bind(task, b"/a", b"/a")
    a.set_type(MS_SHARED)
    b, c = bind(task, b"/a", b"/b"), bind(task, b"/a", b"/c")
    first = a.group
    assert a.group is b.group is c.group and list(first) == [a, b, c]
    b.set_type(MS_SLAVE)
    assert b.master is first and b.group is None and list(first) == [a, c, b]
    b.set_type(MS_SHARED)
    d = bind(task, b"/b", b"/d")
    assert b.group is d.group and d.master is first and list(first) == [a, c, b, d]
    d.set_type(MS_SLAVE)
    b.set_type(MS_PRIVATE)  # the last of its group: its slave follows the group's master
    assert d.master is first and list(first) == [a, c, d]
    a.set_type(MS_UNBINDABLE)
    c.set_type(MS_PRIVATE)
    assert d.master is None and d.group is None and a.unbindable
    c.set_type(MS_SHARED)
    assert c.group is not first and c.group.id <= first.id  # numbers are used again


def test_refused_propagation_leaves_nothing(task, monkeypatch):
    a = bind(task, b"/a", b"/a")
    a.set_type(MS_SHARED)
    bind(task, b"/a", b"/b")
    before, text, standing = count(task), mountinfo_text(task), len(MOUNTPOINTS)
    monkeypatch.setattr(mounttree, "MOUNTS_MOST", before + 1)
    with pytest.raises(Errno) as refused:
        bind(task, b"/c", b"/a/x")
    assert refused.value.errno == errno.ENOSPC
    assert (count(task), mountinfo_text(task), len(MOUNTPOINTS)) == (before, text, standing)
    assert list(a.group) == [a, walk(task, b"/b").mount]


def test_piles_are_not_recursed_into(task):
    a = bind(task, b"/a", b"/a")
    a.set_type(MS_SHARED)
    before = count(task)
    for _ in range(12):  # each time the group doubles, and all stand on each other
        bind(task, b"/a", b"/a")
    assert count(task) == before + 4095
    assert mounts_text(task).count(b" /a tmpfs") == 4096
    mountops.unmount(task, mounttree.summit(walk(task, b"/a")), mountops.MNT_DETACH, set())
    assert count(task) < before + 4095
    mounttree.unmount_tree(a)
    assert count(task) == before - 1 and a.namespace is None


def test_less_privileged_namespace_receives_only(task):
    a = bind(task, b"/a", b"/a")
    a.set_type(MS_SHARED)
    inner = bind(task, b"/c", b"/a/x")
    old = task.fs
    old.namespace.users += 1
    other = FsContext(old.root, old.cwd, 0o22, old.namespace)
    namespace = mountops.copy_namespace(other, UserNamespace(ROOT, 0, 0))
    task.fs = other
    twin = walk(task, b"/a/x").mount
    assert twin is not inner and twin.master is inner.group and twin.locked & mounttree.MNT_LOCKED
    with pytest.raises(Errno):
        mountops.unmount(task, walk(task, b"/a/x"), 0, set())
    task.fs = old
    mounttree.unmount_tree(inner)
    assert twin.namespace is None
    there = len(namespace.mounts)
    bind(task, b"/c", b"/a/x")
    assert len(namespace.mounts) == there + 1
    namespace.put()
    assert not namespace.mounts and list(a.group) == [a]
