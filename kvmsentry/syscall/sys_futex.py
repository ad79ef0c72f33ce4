"""futex(2), futex_waitv(2) and membarrier(2)."""

from __future__ import annotations

import errno
import struct
from typing import Any

from kvmsentry.kernel import futex as futexes
from kvmsentry.kernel.task import Task
from kvmsentry.syscall.abi_time import CLOCK_MONOTONIC, read_timespec
from kvmsentry.syscall.table import Int, UInt, UserPtr, syscall

# uapi/linux/futex.h
FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME, FUTEX_CMD_MASK = 128, 256, ~384
(
    WAIT,
    WAKE,
    FD,
    REQUEUE,
    CMP_REQUEUE,
    WAKE_OP,
    LOCK_PI,
    UNLOCK_PI,
    TRYLOCK_PI,
    WAIT_BITSET,
    WAKE_BITSET,
    WAIT_REQUEUE_PI,
    CMP_REQUEUE_PI,
    LOCK_PI2,
) = range(14)
FUTEX_WAITV = struct.Struct("<QQII")  # struct futex_waitv: val, uaddr, flags, reserved
FUTEX2_SIZE_U32, FUTEX2_PRIVATE = 2, 128


def _s32(value: int) -> int:
    return (value & 0x7FFFFFFF) - (value & 0x80000000)


@syscall(202, note="priorities are not inherited: there is no scheduler of ours to tell")
def futex(task: Task, uaddr: UserPtr, op: Int, val: UInt, timeout: UserPtr, uaddr2: UserPtr, val3: UInt) -> Any:
    command = op & FUTEX_CMD_MASK
    private = bool(op & FUTEX_PRIVATE_FLAG)
    mm = task.mm
    if command == WAKE:
        return futexes.wake(mm, uaddr, max(_s32(val), 1), private)
    if op & FUTEX_CLOCK_REALTIME and command not in (WAIT, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2):
        return -errno.ENOSYS
    deadline = None
    if timeout and command in (WAIT, WAIT_BITSET, LOCK_PI, WAIT_REQUEUE_PI, LOCK_PI2):
        deadline = read_timespec(mm, timeout)
        if command == WAIT:
            deadline += task.kernel.now()
        elif op & FUTEX_CLOCK_REALTIME or command == LOCK_PI:
            deadline -= task.kernel.monotonic_to_real()
        else:
            deadline = task.ns.time.to_kernel(CLOCK_MONOTONIC, deadline)
    if command == WAIT:
        return futexes.wait(task, uaddr, private, val, futexes.BITSET_ALL, deadline)
    if command == WAIT_BITSET:
        return futexes.wait(task, uaddr, private, val, val3, deadline)
    if command == WAKE_BITSET:
        if not val3:
            return -errno.EINVAL
        return futexes.wake(mm, uaddr, max(_s32(val), 1), private, val3)
    if command in (REQUEUE, CMP_REQUEUE):
        woken, moved = futexes.requeue(
            mm, uaddr, uaddr2, private, _s32(val), _s32(timeout & 0xFFFFFFFF), val3 if command == CMP_REQUEUE else None
        )
        return woken + moved if command == CMP_REQUEUE else woken
    if command == WAKE_OP:
        return futexes.wake_op(mm, uaddr, uaddr2, private, max(_s32(val), 1), max(_s32(timeout & 0xFFFFFFFF), 1), val3)
    if command in (LOCK_PI, LOCK_PI2):
        return futexes.lock_pi(task, uaddr, private, deadline)
    if command == TRYLOCK_PI:
        return futexes.lock_pi(task, uaddr, private, None, try_only=True)
    if command == UNLOCK_PI:
        return futexes.unlock_pi(task, uaddr, private)
    if command == WAIT_REQUEUE_PI:
        if uaddr == uaddr2:
            return -errno.EINVAL
        return futexes.wait_requeue_pi(task, uaddr, uaddr2, private, val, val3 or futexes.BITSET_ALL, deadline)
    if command == CMP_REQUEUE_PI:
        if val != 1 or uaddr == uaddr2:
            return -errno.EINVAL
        return futexes.cmp_requeue_pi(mm, task.kernel, uaddr, uaddr2, private, _s32(timeout & 0xFFFFFFFF), val3)
    return -errno.ENOSYS


@syscall(449)
def futex_waitv(task: Task, waiters: UserPtr, nr_futexes: UInt, flags: UInt, timeout: UserPtr, clockid: Int) -> Any:
    if flags or not 0 < nr_futexes <= 128 or not waiters:
        return -errno.EINVAL
    deadline = None
    if timeout:
        if clockid not in (0, 1):
            return -errno.EINVAL
        deadline = read_timespec(task.mm, timeout)
        if clockid == 0:
            deadline -= task.kernel.monotonic_to_real()
        else:
            deadline = task.ns.time.to_kernel(CLOCK_MONOTONIC, deadline)
    words = []
    for value, address, word_flags, reserved in FUTEX_WAITV.iter_unpack(
        task.mm.read(waiters, nr_futexes * FUTEX_WAITV.size)
    ):
        if word_flags & ~(FUTEX2_SIZE_U32 | FUTEX2_PRIVATE) or not word_flags & FUTEX2_SIZE_U32 or reserved:
            return -errno.EINVAL
        words.append((address, bool(word_flags & FUTEX2_PRIVATE), value & 0xFFFFFFFF))
    return futexes.wait_many(task, words, deadline)


# uapi/linux/membarrier.h
CMD_GLOBAL, CMD_GLOBAL_EXPEDITED, CMD_REGISTER_GLOBAL_EXPEDITED = 1, 2, 4
CMD_PRIVATE_EXPEDITED, CMD_REGISTER_PRIVATE_EXPEDITED = 8, 16
CMD_PRIVATE_EXPEDITED_SYNC_CORE, CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE = 32, 64
SUPPORTED = (
    CMD_GLOBAL
    | CMD_GLOBAL_EXPEDITED
    | CMD_REGISTER_GLOBAL_EXPEDITED
    | CMD_PRIVATE_EXPEDITED
    | CMD_REGISTER_PRIVATE_EXPEDITED
    | CMD_PRIVATE_EXPEDITED_SYNC_CORE
    | CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE
)
REGISTERING = (
    CMD_REGISTER_GLOBAL_EXPEDITED | CMD_REGISTER_PRIVATE_EXPEDITED | CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE
)


@syscall(324, note="no rseq commands, as without CONFIG_RSEQ")
def membarrier(task: Task, cmd: Int, flags: UInt, cpu_id: Int) -> int:
    if flags:
        return -errno.EINVAL
    if cmd == 0:
        return SUPPORTED
    if cmd & ~SUPPORTED or cmd & (cmd - 1):
        return -errno.EINVAL
    if cmd & REGISTERING:
        task.process.membarrier = getattr(task.process, "membarrier", 0) | cmd  # type: ignore[attr-defined]
        return 0
    if cmd in (CMD_PRIVATE_EXPEDITED, CMD_PRIVATE_EXPEDITED_SYNC_CORE):
        if not getattr(task.process, "membarrier", 0) & cmd << 1:  # each command's registration is the next bit
            return -errno.EPERM
    # A host-wide barrier orders the runner threads, which are where our tasks' memory accesses happen. It interrupts
    # those that run, and the way back into application code (IRET, a VM entry) serialises the core.
    task.kernel.platform.memory_barrier()
    return 0
