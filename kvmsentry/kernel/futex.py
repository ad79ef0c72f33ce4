"""Futexes: who sleeps on which word of memory (futex(2), Documentation/locking/futex in Linux's tree).

A word is named by `AddressSpace.futex_key`, so that processes which share memory meet. Between reading the word and
registering the waiter nothing can slip in: the only one who wakes is this thread, on the application's FUTEX_WAKE.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterable
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel.task import SCHED_DEADLINE, Task
from kvmsentry.kernel.traps import ERESTART_RESTARTBLOCK, ERESTARTNOINTR, ERESTARTSYS, WaitQueue, park

FUTEX_WAITERS = 0x80000000  # uapi/linux/futex.h
FUTEX_OWNER_DIED = 0x40000000
FUTEX_TID_MASK = 0x3FFFFFFF
BITSET_ALL = 0xFFFFFFFF
MAX_RT_PRIO = 100  # include/linux/sched/prio.h


class Waiter:
    """One sleeper: it may be moved from word to word (requeue) while it sleeps."""

    __slots__ = ("task", "key", "bitset", "queue", "woken", "pi", "target", "address", "owner", "index", "rank")

    def __init__(
        self, task: Task, key: Hashable, bitset: int, pi: bool = False, target: Hashable = None, address: int = 0
    ) -> None:
        self.task, self.key, self.bitset, self.pi = task, key, bitset, pi
        self.target = target  # FUTEX_WAIT_REQUEUE_PI: the word it expects to be moved to
        self.address = address  # of the PI word that will be its own
        self.owner: Task | None = None  # who holds that word
        self.queue = WaitQueue()
        self.woken = False
        self.index = 0
        policy, priority = task.policy  # who is woken first: __futex_queue, kernel/futex/core.c
        self.rank = MAX_RT_PRIO - 1 - priority if priority else -1 if policy == SCHED_DEADLINE else MAX_RT_PRIO

    def wake(self) -> None:
        """End the sleep; the waiter was taken off its word by the caller."""
        self.woken = True
        self.queue.wake()


_waiters: dict[Hashable, dict[Waiter, None]] = {}  # those of one word by rank, then by arrival
_owned: dict[Task, dict[Hashable, None]] = {}  # PI words that somebody sleeps for, or did, by who holds them


def census() -> int:
    """How many sleep on futexes: 0 once every task is gone."""
    return sum(len(words) for words in _waiters.values())


def _add(waiter: Waiter) -> None:
    words = _waiters.setdefault(waiter.key, {})
    words[waiter] = None
    if waiter.rank != MAX_RT_PRIO and len(words) > 1:
        ranked = sorted(words, key=lambda each: each.rank)
        words.clear()
        words.update(dict.fromkeys(ranked))


def _remove(waiter: Waiter) -> None:
    words = _waiters.get(waiter.key)
    if words is not None:
        words.pop(waiter, None)
        if not words:
            del _waiters[waiter.key]


def wait(task: Task, address: int, private: bool, expected: int, bitset: int, deadline: int | None) -> Any:
    """FUTEX_WAIT_BITSET: a coroutine unless the word differs (EAGAIN). `deadline` in ns of kernel.now()."""
    if not bitset:
        raise Errno(errno.EINVAL)
    if address & 3:
        raise Errno(errno.EINVAL)
    mm = task.mm
    if mm.read_u32(address) != expected:
        return -errno.EAGAIN
    waiter = Waiter(task, mm.futex_key(address, private), bitset)
    _add(waiter)
    return _sleep(task, waiter, address, private, expected, bitset, deadline)


async def _sleep(
    task: Task, waiter: Waiter, address: int, private: bool, expected: int, bitset: int, deadline: int | None
) -> int:
    restart = ERESTARTSYS if deadline is None else ERESTART_RESTARTBLOCK
    try:
        await park(task, "futex", waiter.queue, deadline=deadline, restart=restart)
    except Errno:
        if waiter.woken:
            return 0
        if deadline is not None:
            task.restart = lambda t: wait(t, address, private, expected, bitset, deadline)
        raise
    finally:
        if not waiter.woken:
            _remove(waiter)
    return 0 if waiter.woken else -errno.ETIMEDOUT


def wake(mm: Any, address: int, count: int, private: bool = False, bitset: int = BITSET_ALL) -> int:
    """FUTEX_WAKE_BITSET: wake up to `count` waiters whose bitset meets `bitset`; returns how many."""
    if address & 3:
        raise Errno(errno.EINVAL)
    return _wake_key(mm.futex_key(address, private), count, bitset)


def _wake_key(key: Hashable, count: int, bitset: int = BITSET_ALL) -> int:
    words = _waiters.get(key)
    if words is None:
        return 0
    woken = 0
    for waiter in list(words):
        if woken >= count:
            break
        if waiter.pi:
            raise Errno(errno.EINVAL)
        if waiter.bitset & bitset:
            del words[waiter]
            waiter.wake()
            woken += 1
    if not words:
        _waiters.pop(key, None)
    return woken


def requeue(
    mm: Any, address: int, address2: int, private: bool, wake_count: int, move_count: int, expected: int | None
) -> tuple[int, int]:
    """FUTEX_REQUEUE and FUTEX_CMP_REQUEUE: returns (woken, moved)."""
    if (address | address2) & 3 or wake_count < 0 or move_count < 0:
        raise Errno(errno.EINVAL)
    key, key2 = mm.futex_key(address, private), mm.futex_key(address2, private)
    if expected is not None and mm.read_u32(address) != expected:
        raise Errno(errno.EAGAIN)
    woken = _wake_key(key, wake_count)
    return woken, _move(key, key2, move_count)


def _move(key: Hashable, key2: Hashable, count: int, pi: bool = False) -> int:
    words = _waiters.get(key)
    moved = 0
    if words is None or key == key2:
        return min(count, len(words)) if words else 0
    for waiter in list(words):
        if moved >= count:
            break
        if waiter.target != key2 if pi else waiter.pi:
            raise Errno(errno.EINVAL)  # both sides must agree on the kind and on the word
        del words[waiter]
        waiter.key = key2
        _add(waiter)
        moved += 1
    if not words:
        _waiters.pop(key, None)
    return moved


def wake_op(mm: Any, address: int, address2: int, private: bool, count: int, count2: int, operation: int) -> int:
    """FUTEX_WAKE_OP: change the second word atomically, wake waiters of the first and, if the old value compares, the
    second."""
    op, cmp_ = operation >> 28 & 15, operation >> 24 & 15
    oparg, cmparg = _s12(operation >> 12 & 0xFFF), _s12(operation & 0xFFF)
    if op & 8:
        oparg = 1 << (oparg & 31)
    key, key2 = mm.futex_key(address, private), mm.futex_key(address2, private)
    while True:
        old = mm.read_u32(address2)
        match op & 7:
            case 0:
                new = oparg
            case 1:
                new = old + oparg
            case 2:
                new = old | oparg
            case 3:
                new = old & ~oparg
            case 4:
                new = old ^ oparg
            case _:
                raise Errno(errno.ENOSYS)
        if mm.cmpxchg_u32(address2, old, new & 0xFFFFFFFF) == old:
            break
    signed = old - ((old & 0x80000000) << 1)
    match cmp_:
        case 0:
            holds = signed == cmparg
        case 1:
            holds = signed != cmparg
        case 2:
            holds = signed < cmparg
        case 3:
            holds = signed <= cmparg
        case 4:
            holds = signed > cmparg
        case 5:
            holds = signed >= cmparg
        case _:
            raise Errno(errno.ENOSYS)
    woken = _wake_key(key, count)
    return woken + (_wake_key(key2, count2) if holds else 0)


def _s12(value: int) -> int:
    return value - ((value & 0x800) << 1)


# -- priority inheritance: the kernel keeps the word's owner right; there is no priority of ours to inherit
def lock_pi(task: Task, address: int, private: bool, deadline: int | None, try_only: bool = False) -> Any:
    """FUTEX_LOCK_PI, FUTEX_LOCK_PI2, FUTEX_TRYLOCK_PI: 0 once the word holds our tid."""
    if address & 3:
        raise Errno(errno.EINVAL)
    mm, tid = task.mm, task.vtid
    key = mm.futex_key(address, private)
    while True:
        word = mm.read_u32(address)
        owner = word & FUTEX_TID_MASK
        if owner == tid:
            raise Errno(errno.EDEADLK)
        if owner == 0:
            waiting = FUTEX_WAITERS if _waiters.get(key) else 0
            if mm.cmpxchg_u32(address, word, tid | waiting | (word & FUTEX_OWNER_DIED)) == word:
                return 0
            continue
        if try_only:
            return -errno.EAGAIN
        holder = task.process.pid_ns.tasks.get(owner)
        if holder is None or holder.dead:
            raise Errno(errno.ESRCH)
        if word & FUTEX_WAITERS or mm.cmpxchg_u32(address, word, word | FUTEX_WAITERS) == word:
            break
    waiter = Waiter(task, key, BITSET_ALL, pi=True, address=address)
    _owns(holder, key, [waiter])
    _add(waiter)
    return _sleep_pi(task, waiter, deadline)


def _owns(owner: Task, key: Hashable, waiters: Iterable[Waiter]) -> None:
    """`waiters` sleep until `owner` gives them the word of `key`, or dies."""
    _owned.setdefault(owner, {})[key] = None
    for waiter in waiters:
        waiter.owner = owner


def owner_gone(task: Task) -> None:
    """A thread ends: words on which others sleep and that it has neither given back nor on its robust list go to the
    next of them, marked, whatever they hold (exit_pi_state_list, kernel/futex/core.c)."""
    for key in _owned.pop(task, ()):
        first = next(iter(_waiters.get(key, ())), None)
        if first is not None and first.owner is task:
            try:
                hand_over(task, first.task.mm, first.address, key, FUTEX_OWNER_DIED)
            except Errno:
                pass  # no word there any more: its waiters sleep on, as long as they like


async def _sleep_pi(task: Task, waiter: Waiter, deadline: int | None) -> int:
    try:
        await park(task, "futex_pi", waiter.queue, deadline=deadline, restart=ERESTARTNOINTR)
    except Errno:
        if waiter.woken:
            return 0
        if waiter.target is not None and waiter.key == waiter.target:
            return -errno.EWOULDBLOCK  # moved already: the first word is no longer what to wait for
        raise
    finally:
        if not waiter.woken:
            _remove(waiter)
    return 0 if waiter.woken else -errno.ETIMEDOUT


def unlock_pi(task: Task, address: int, private: bool) -> int:
    """FUTEX_UNLOCK_PI: hand the word to the next waiter; EPERM when it is not ours."""
    mm = task.mm
    word = mm.read_u32(address)
    if word & FUTEX_TID_MASK != task.vtid:
        return -errno.EPERM
    hand_over(task, mm, address, mm.futex_key(address, private), 0)
    return 0


def hand_over(task: Task, mm: Any, address: int, key: Hashable, died: int) -> None:
    """Give the word at `address`, which was `task`'s, to the next PI waiter (or to nobody), with FUTEX_OWNER_DIED in
    `died` when its owner died."""
    if task in _owned:
        _owned[task].pop(key, None)
    words = _waiters.get(key)
    heir = None
    if words:
        for waiter in words:
            if waiter.pi:
                heir = waiter
                break
    while True:
        word = mm.read_u32(address)
        if heir is None:
            new = died
        else:
            assert words is not None
            new = heir.task.vtid | died | (FUTEX_WAITERS if len(words) > 1 else 0)
        if mm.cmpxchg_u32(address, word, new) == word:
            break
    if heir is not None:
        _remove(heir)
        heir.wake()
        if words:
            _owns(heir.task, key, words)


def wait_requeue_pi(
    task: Task, address: int, address2: int, private: bool, expected: int, bitset: int, deadline: int | None
) -> Any:
    """FUTEX_WAIT_REQUEUE_PI: sleep on the first word, to be moved to the second, which is ours when we return 0."""
    if not bitset or (address | address2) & 3:
        raise Errno(errno.EINVAL)
    mm = task.mm
    if mm.read_u32(address) != expected:
        return -errno.EAGAIN
    target = mm.futex_key(address2, private)
    waiter = Waiter(task, mm.futex_key(address, private), bitset, pi=True, target=target, address=address2)
    _add(waiter)
    return _sleep_pi(task, waiter, deadline)


def cmp_requeue_pi(
    mm: Any, kernel: Any, address: int, address2: int, private: bool, move_count: int, expected: int
) -> int:
    """FUTEX_CMP_REQUEUE_PI: give the second word to one waiter if it is free, move the others; returns woken +
    moved."""
    if (address | address2) & 3:
        raise Errno(errno.EINVAL)
    key, key2 = mm.futex_key(address, private), mm.futex_key(address2, private)
    if mm.read_u32(address) != expected:
        return -errno.EAGAIN
    words = _waiters.get(key)
    if not words:
        return 0
    first = next(iter(words))
    if first.target != key2:
        return -errno.EINVAL
    done = 0
    word = mm.read_u32(address2)
    while word & FUTEX_TID_MASK == 0:
        seen = mm.cmpxchg_u32(
            address2, word, first.task.vtid | (FUTEX_WAITERS if len(words) > 1 or _waiters.get(key2) else 0)
        )
        if seen == word:
            _remove(first)
            first.wake()
            done = 1
            break
        word = seen
    moved = _move(key, key2, move_count if done else move_count + 1, pi=True)
    while moved:
        word = mm.read_u32(address2)
        if word & FUTEX_WAITERS or mm.cmpxchg_u32(address2, word, word | FUTEX_WAITERS) == word:
            holder = first.task.process.pid_ns.tasks.get(word & FUTEX_TID_MASK)
            if holder is not None:
                _owns(holder, key2, _waiters[key2])
            break
    return done + moved


# -- futex_waitv(2) --------------------------------------------------------------------------------
async def wait_many(task: Task, words: list[tuple[int, bool, int]], deadline: int | None) -> int:
    """Sleep on several words [(address, private, expected)]; returns the index of one that was woken."""
    mm = task.mm
    waiters = []
    try:
        for index, (address, private, expected) in enumerate(words):
            if address & 3:
                raise Errno(errno.EINVAL)
            if mm.read_u32(address) != expected:
                return -errno.EAGAIN
            waiter = Waiter(task, mm.futex_key(address, private), BITSET_ALL)
            waiter.index = index
            _add(waiter)
            waiters.append(waiter)
        try:
            await park(task, "futex_waitv", *[w.queue for w in waiters], deadline=deadline, restart=ERESTARTSYS)
        except Errno:
            for waiter in waiters:
                if waiter.woken:
                    return waiter.index
            raise
        for waiter in waiters:
            if waiter.woken:
                return waiter.index
        return -errno.ETIMEDOUT
    finally:
        for waiter in waiters:
            if not waiter.woken:
                _remove(waiter)
