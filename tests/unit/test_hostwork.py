"""Host calls on a thread of their own: the task sleeps meanwhile, errors come back as errnos."""

from __future__ import annotations

import errno
import select
import threading
from typing import Any

import pytest
from kernel_fakes import KernelWorld

from kvmsentry.errors import Errno
from kvmsentry.kernel.hostwork import on_host


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    world = KernelWorld()
    world.watched = []
    monkeypatch.setattr(
        world.kernel.platform, "watch", lambda fd, events, call: world.watched.append((fd, call)), raising=False
    )
    return world


def answer(world) -> None:
    """What the platform does when the thread has rung."""
    ((fd, call),) = world.watched
    assert select.select([fd], [], [], 10)[0] == [fd]
    call(select.EPOLLIN)


def test_the_task_sleeps_until_the_call_is_over(world):
    init = world.init()
    go, where = threading.Event(), []

    def call() -> None:
        go.wait(10)
        where.append(threading.current_thread())

    work = on_host(init, "fsync", call)
    sleep = work.send(None)
    assert sleep.reason == "fsync" and not sleep.interrupt()  # signals wait, as for a disk
    assert not where
    go.set()
    answer(world)
    assert sleep.woken
    with pytest.raises(StopIteration) as end:
        work.send(sleep.value)
    assert end.value.value == 0 and where[0] is not threading.current_thread()


def test_what_the_host_said(world):
    init = world.init()

    def call() -> None:
        raise OSError(errno.ENOSPC, "full")

    work = on_host(init, "fsync", call)
    sleep = work.send(None)
    answer(world)
    with pytest.raises(Errno) as error:
        work.send(sleep.value)
    assert error.value.errno == errno.ENOSPC
