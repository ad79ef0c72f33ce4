"""What the kernel tells of itself: uname, sysinfo, syslog, getrandom, and the privileged calls that no sandbox
grants."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.kernel import exit, identity, userns
from kvmsentry.kernel.task import Task
from kvmsentry.kernel.traps import Pace
from kvmsentry.syscall.abi_signal import SIGHUP, SIGINT
from kvmsentry.syscall.abi_time import CLOCK_BOOTTIME, NS
from kvmsentry.syscall.table import GONE, Int, Size, UInt, ULong, UserPtr, syscall

UTSNAME = struct.Struct("65s65s65s65s65s65s")  # struct new_utsname
SYSINFO = struct.Struct("<q3Q6QHH4xQQI4x")  # struct sysinfo, 112 bytes
UNAME26 = 0x0020000  # uapi/linux/personality.h
CAP_SYS_ADMIN, CAP_SYS_BOOT, CAP_SYS_TTY_CONFIG, CAP_SYSLOG = 21, 22, 26, 34
RANDOM_PIECE = 1 << 20
GRND_NONBLOCK, GRND_RANDOM, GRND_INSECURE = 1, 2, 4  # uapi/linux/random.h


def _release(task: Task) -> bytes:
    """The release; for programs that cannot read one after 2.6 in its terms (override_release in kernel/sys.c)."""
    release = identity.RELEASE
    if task.process.personality & UNAME26:
        number, dash, rest = release.partition("-")
        release = f"2.6.{int(number.split('.')[1]) + 60}{dash}{rest}"
    return release.encode()


@syscall(63)
def uname(task: Task, buf: UserPtr) -> int:
    uts = task.uts
    task.mm.write(
        buf,
        UTSNAME.pack(
            identity.SYSNAME.encode(),
            uts.nodename.encode(errors="surrogateescape")[:64],
            _release(task),
            identity.VERSION.encode()[:64],
            identity.MACHINE.encode(),
            uts.domainname.encode(errors="surrogateescape")[:64],
        ),
    )
    return 0


def _name(task: Task, name: int, length: int) -> str | int:
    if not userns.capable(task.creds, task.uts.user_ns, CAP_SYS_ADMIN):
        return -errno.EPERM
    if not 0 <= length <= 64:
        return -errno.EINVAL
    return task.mm.read(name, length).split(b"\0")[0].decode(errors="surrogateescape")


@syscall(170)
def sethostname(task: Task, name: UserPtr, length: Int) -> int:
    value = _name(task, name, length)
    if isinstance(value, int):
        return value
    task.uts.nodename = value
    return 0


@syscall(171)
def setdomainname(task: Task, name: UserPtr, length: Int) -> int:
    value = _name(task, name, length)
    if isinstance(value, int):
        return value
    task.uts.domainname = value
    return 0


@syscall(99)
def sysinfo(task: Task, info: UserPtr) -> int:
    kernel = task.kernel
    frames = kernel.frames
    total, used = frames.limit_pages * 4096, frames.used_pages * 4096
    task.mm.write(
        info,
        SYSINFO.pack(
            (kernel.now() + task.ns.time.offsets[CLOCK_BOOTTIME]) // NS,
            0,
            0,
            0,
            total,
            total - used,
            0,
            0,
            0,
            0,
            len(kernel.tasks) & 0xFFFF,
            0,
            0,
            0,
            1,
        ),
    )
    return 0


@syscall(318, note="one source for all flags: the host's urandom, which is ready")
def getrandom(task: Task, buf: UserPtr, count: Size, flags: UInt) -> Any:
    if flags & ~7 or flags & 6 == 6:
        return -errno.EINVAL
    count = min(count, 0x7FFFF000 if not flags & GRND_RANDOM else 512)
    if not count:
        return 0
    if count > RANDOM_PIECE:
        return _getrandom_long(task, buf, count)
    return _random(task, buf, count)


def _random(task: Task, buf: int, count: int) -> int:
    done = 0
    for view in task.mm.views(buf, count, True):
        view[:] = os.urandom(len(view))
        done += len(view)
    return done


async def _getrandom_long(task: Task, buf: int, count: int) -> int:
    """In pieces, between which others run and a signal ends it."""
    pace = Pace(task)
    done = 0
    while done < count:
        try:
            if pace.due():
                await pace.rest()
            n = _random(task, buf + done, min(RANDOM_PIECE, count - done))
        except Errno:
            if done:
                break
            raise
        done += n
        if n < RANDOM_PIECE:
            break
    return done


@syscall(103, partial="the log is read-only: it says how this kernel booted")
def syslog(task: Task, type: Int, bufp: UserPtr, length: Int) -> int:
    if not 0 <= type <= 10:
        return -errno.EINVAL
    if type not in (3, 10) and not task.creds.capable(CAP_SYSLOG):
        return -errno.EPERM
    text = identity.dmesg(task.kernel).encode()
    if type == 10:  # SYSLOG_ACTION_SIZE_BUFFER
        return 1 << 17
    if type == 9:  # SIZE_UNREAD
        return 0
    if type in (2, 3, 4):
        if not bufp or length < 0:
            return -errno.EINVAL
        if type == 2:
            return 0
        text = text[-length:] if length else b""
        task.mm.write(bufp, text)
        return len(text)
    if type == 8 and not 1 <= length <= 8:
        return -errno.EINVAL
    return 0


def _refuse(task: Task, capability: int) -> int:
    # With or without the capability: what these do would reach beyond the sandbox, so nobody in it may.
    return -errno.EPERM


# uapi/linux/reboot.h: RESTART, RESTART2, HALT, POWER_OFF, and the signals by which a PID namespace's end tells of them.
_REBOOTS = {0x01234567: SIGHUP, 0xA1B2C3D4: SIGHUP, 0xCDEF0123: SIGINT, 0x4321FEDC: SIGINT}


@syscall(169, partial="refused, but for the end of a PID namespace")
def reboot(task: Task, magic: UInt, magic2: UInt, command: UInt, argument: UserPtr) -> Any:
    space = task.process.pid_ns
    if not userns.capable(task.creds, space.user_ns, CAP_SYS_BOOT):
        return -errno.EPERM
    if magic != 0xFEE1DEAD or magic2 not in (672274793, 85072278, 369367448, 537993216):
        return -errno.EINVAL
    if not space.level or space.init is None:
        return _refuse(task, CAP_SYS_BOOT)
    signo = _REBOOTS.get(command)
    if signo is None:
        return -errno.EINVAL
    exit.exit_group(space.init, signo)  # its parent sees it killed by that (reboot_pid_ns), and it takes all with it
    exit.do_exit(task, 0 if task.process is not space.init else signo)
    return GONE


@syscall(163, partial="refused")
def acct(task: Task, name: UserPtr) -> int:
    return _refuse(task, 20)


@syscall(167, partial="refused")
def swapon(task: Task, path: UserPtr, flags: Int) -> int:
    return _refuse(task, CAP_SYS_ADMIN)


@syscall(168, partial="refused")
def swapoff(task: Task, path: UserPtr) -> int:
    return _refuse(task, CAP_SYS_ADMIN)


@syscall(175, partial="refused: there are no modules")
def init_module(task: Task, image: UserPtr, length: ULong, values: UserPtr) -> int:
    return _refuse(task, 16)


@syscall(313, partial="refused: there are no modules")
def finit_module(task: Task, fd: Int, values: UserPtr, flags: Int) -> int:
    return _refuse(task, 16)


@syscall(176, partial="refused: there are no modules")
def delete_module(task: Task, name: UserPtr, flags: UInt) -> int:
    return _refuse(task, 16)


@syscall(172, partial="refused")
def iopl(task: Task, level: UInt) -> int:
    return _refuse(task, 17)


@syscall(173, partial="refused")
def ioperm(task: Task, start: ULong, count: ULong, on: Int) -> int:
    return _refuse(task, 17)


@syscall(246, partial="refused")
def kexec_load(task: Task, entry: ULong, count: ULong, segments: UserPtr, flags: ULong) -> int:
    return _refuse(task, CAP_SYS_BOOT)


@syscall(320, partial="refused")
def kexec_file_load(task: Task, kernel: Int, initrd: Int, length: ULong, command: UserPtr, flags: ULong) -> int:
    return _refuse(task, CAP_SYS_BOOT)


@syscall(179, partial="refused")
def quotactl(task: Task, command: UInt, special: UserPtr, id: Int, address: UserPtr) -> int:
    return _refuse(task, CAP_SYS_ADMIN)


@syscall(153)
def vhangup(task: Task) -> int:
    if not task.creds.capable(CAP_SYS_TTY_CONFIG):
        return -errno.EPERM
    tty = task.process.session.tty
    if tty is not None:
        tty.hangup()
    return 0


@syscall(298, partial="refused: no performance counters")
def perf_event_open(task: Task, attr: UserPtr, pid: Int, cpu: Int, group: Int, flags: ULong) -> int:
    return _refuse(task, 38)


@syscall(321, partial="refused: no BPF")
def bpf(task: Task, command: Int, attr: UserPtr, size: UInt) -> int:
    return _refuse(task, 39)


@syscall(323, partial="refused: no userfaultfd")
def userfaultfd(task: Task, flags: Int) -> int:
    return _refuse(task, 19)
