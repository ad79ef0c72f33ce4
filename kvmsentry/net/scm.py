"""Files in flight: what SCM_RIGHTS has put into the queues of Unix sockets (unix(7)).

A socket whose every reference is in flight, inside queues that only such sockets own, can never be received again. Such
cycles are found when a Unix socket is closed while files are in flight, as Linux does it (net/unix/garbage.c): sockets
held from outside are the roots, what their queues hold is alive, the rest is emptied. `MAX_IN_FLIGHT` bounds the rest.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap
from kvmsentry.kernel.task import RLIMIT_NOFILE

if TYPE_CHECKING:
    from kvmsentry.fs.vfs import File
    from kvmsentry.kernel.task import Task

in_flight: dict[Any, int] = {}  # Unix sockets to the references of theirs that are in flight
total = 0  # files of every kind in flight
_dropping: list[File] = []
_draining = False
_collecting = False


def depart(files: Iterable[File]) -> None:
    """These references enter a queue."""
    global total
    for file in files:
        total += 1
        if hasattr(file, "queued_files"):
            in_flight[file] = in_flight.get(file, 0) + 1


def arrive(files: Iterable[File]) -> None:
    """These references left a queue; the caller owns them now."""
    global total
    for file in files:
        total -= 1
        if file in in_flight:
            count = in_flight[file] - 1
            if count:
                in_flight[file] = count
            else:
                del in_flight[file]


def check_room(task: Task, count: int) -> None:
    """ETOOMANYREFS when more files are in flight than the sender may have open (too_many_unix_fds)."""
    if total + count > task.rlimit(RLIMIT_NOFILE) and not (
        task.creds.capable(cap.SYS_RESOURCE) or task.creds.capable(cap.SYS_ADMIN)
    ):
        raise Errno(errno.ETOOMANYREFS)
    if total + count > 1 << 20:
        raise Errno(errno.ETOOMANYREFS)


def drop(files: Iterable[File]) -> None:
    """Give references back, however deep sockets lie within sockets: no recursion."""
    global _draining
    _dropping.extend(files)
    if _draining:
        return
    _draining = True
    try:
        while _dropping:
            _dropping.pop().put()
    finally:
        _draining = False


def collect() -> None:
    """Empty the queues of sockets that only each other's queues hold."""
    global _collecting
    if not in_flight or _collecting:
        return
    candidates = {sock for sock, count in in_flight.items() if sock.refs == count}
    if not candidates:
        return
    inner: dict[Any, int] = dict.fromkeys(candidates, 0)
    for sock in candidates:
        for file in sock.queued_files():
            if file in inner:
                inner[file] += 1
    alive = [sock for sock in candidates if in_flight[sock] > inner[sock]]
    garbage = candidates.difference(alive)
    while alive:
        for file in alive.pop().queued_files():
            if file in garbage:
                garbage.discard(file)
                alive.append(file)
    if garbage:
        _collecting = True
        try:
            for sock in garbage:
                sock.purge()
        finally:
            _collecting = False
