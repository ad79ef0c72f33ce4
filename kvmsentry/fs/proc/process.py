"""Files of /proc/PID that tell of a process: stat, status, limits, and the small ones; proc(5). Each is a function of
the task
that reads and the task that is read about; what may not be seen by everybody calls `look`."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc import memory
from kvmsentry.fs.proc.access import look, may_look
from kvmsentry.fs.proc.nodes import cpu_list, cpu_mask
from kvmsentry.fs.proc.system import TICK
from kvmsentry.kernel import cputime
from kvmsentry.kernel.task import (
    NSIG,
    RLIM_INFINITY,
    SCHED_DEADLINE,
    SCHED_FIFO,
    SCHED_RESET_ON_FORK,
    SCHED_RR,
    SigHand,
)
from kvmsentry.kernel.userns import shown_gid, shown_uid
from kvmsentry.syscall.abi_time import CLOCK_BOOTTIME

if TYPE_CHECKING:
    from kvmsentry.kernel.pidns import PidNamespace
    from kvmsentry.kernel.task import Task

CAP_SYS_RESOURCE = 24
SIG_IGN = 1
_RLIMITS = (
    ("Max cpu time", "seconds"), ("Max file size", "bytes"), ("Max data size", "bytes"), ("Max stack size", "bytes"),
    ("Max core file size", "bytes"), ("Max resident set", "bytes"), ("Max processes", "processes"),
    ("Max open files", "files"), ("Max locked memory", "bytes"), ("Max address space", "bytes"), ("Max file locks",
    "locks"),
    ("Max pending signals", "signals"), ("Max msgqueue size", "bytes"), ("Max nice priority", ""),
    ("Max realtime priority", ""), ("Max realtime timeout", "us"),
)  # fmt: skip
_STATES = {
    "R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "tracing stop", "Z": "zombie", "X": "dead",
}  # fmt: skip


def state(task: Task) -> str:
    """One letter: R S D T t Z X."""
    process = task.process
    if task.dead or (process.zombie and task is process.leader):
        return "Z"
    if task.ptrace is not None and task.ptrace.code is not None:
        return "t"
    if process.stopped and (task.ptrace is None or not task.ptrace.released):
        return "T"
    sleep = task.sleep
    if task.in_guest or sleep is None or sleep.woken:
        return "R"
    return "S" if sleep.restart else "D"


def _signals(sighand: SigHand) -> tuple[int, int]:
    """Masks of what is ignored and what is caught."""
    ignored = caught = 0
    for signo in range(1, NSIG + 1):
        handler = sighand.actions[signo].handler
        if handler == SIG_IGN:
            ignored |= 1 << (signo - 1)
        elif handler:
            caught |= 1 << (signo - 1)
    return ignored, caught


def _policy(target: Task) -> tuple[int, int]:
    """Scheduling policy and priority, without SCHED_RESET_ON_FORK."""
    return target.policy[0] & ~SCHED_RESET_ON_FORK, target.policy[1]


def _name(task: Task) -> str:
    """comm with what would break lines escaped."""
    return task.comm.decode("utf-8", "surrogateescape").replace("\\", "\\\\").replace("\n", "\\n")


def stat(reader: Task, target: Task, ns: PidNamespace, thread: bool = False) -> str:
    """/proc/PID/stat, or with `thread` /proc/PID/task/TID/stat, with the numbers of `ns`."""
    process, mm = target.process, target.mm
    tty = process.session.tty
    foreground = tty.foreground if tty is not None else None
    ignored, caught = _signals(target.sighand) if target.sighand is not None else (0, 0)
    used = cputime.of_task(target) if thread else cputime.of_process(process)
    image = mm.image if mm is not None and may_look(reader, target) else None
    policy, priority = _policy(target)
    shown_priority = {SCHED_FIFO: -1 - priority, SCHED_RR: -1 - priority, SCHED_DEADLINE: -101}.get(
        policy, 20 + target.nice
    )
    fields: list[Any] = [
        ns.pid_of(process.parent), ns.pgid_of(process.group), ns.sid_of(process.session),
        tty.rdev if tty is not None else 0, ns.pgid_of(foreground) if foreground is not None else -1,
        0x400000 if mm is not None else 0x40400000,  # PF_RANDOMIZE
        0, 0, 0, 0, used // TICK, 0, process.children_user // TICK, process.children_system // TICK,
        shown_priority, target.nice, len(process.threads), 0,
        max(0, (target if thread else process).start_time + reader.ns.time.offsets[CLOCK_BOOTTIME]) // TICK,
        mm.total_pages * 4096 if mm is not None else 0, mm.rss_pages if mm is not None else 0, process.rlimits[5][0],
    ]  # fmt: skip
    if image is not None:
        fields += [image.start_code, image.end_code, image.start_stack]
    else:
        fields += [1, 1, 0] if mm is not None else [0, 0, 0]
    low = (1 << 31) - 1
    fields += [
        0, 0, target.pending.mask & low, target.blocked & low, ignored & low, caught & low,
        0 if target.in_guest or target.sleep is None else 1, 0, 0, process.exit_signal, target.cpu,
        priority, policy, 0, 0, 0,
    ]  # fmt: skip
    if image is not None:
        fields += [image.start_data, image.end_data, image.start_brk, image.arg_start, image.arg_end, image.env_start,
                   image.env_end]  # fmt: skip
    else:
        fields += [0] * 7
    fields.append(process.exit_code if may_look(reader, target) else 0)
    comm = target.comm.decode("utf-8", "surrogateescape").replace("\n", "\\n")
    return f"{ns.tid_of(target)} ({comm}) {state(target)} {' '.join(map(str, fields))}\n"


def _below(ns: PidNamespace, target: Task, numbers: dict[PidNamespace, int], first: int) -> str:
    """The numbers in `ns` and in those below it that the target is in, outermost first; 0 where it has none."""
    shown = [] if ns.level else [first]
    shown += [numbers.get(space, 0) for space in target.numbers if space.level >= ns.level]
    return "\t".join(map(str, shown))


def status(reader: Task, target: Task, ns: PidNamespace) -> str:
    """/proc/PID/status with the numbers of `ns`."""
    process, creds, mm = target.process, target.creds, target.mm
    letter = state(target)
    ignored, caught = _signals(target.sighand) if target.sighand is not None else (0, 0)
    files, seer = target.files, reader.creds.user_ns
    size = 64
    if files is not None:
        top = max(files.files, default=0)
        while size <= top:
            size *= 2
    lines = [f"Name:\t{_name(target)}"]
    if target.fs is not None:
        lines.append(f"Umask:\t{target.fs.umask:04o}")
    lines += [
        f"State:\t{letter} ({_STATES[letter]})", f"Tgid:\t{ns.pid_of(process)}", "Ngid:\t0",
        f"Pid:\t{ns.tid_of(target)}", f"PPid:\t{ns.pid_of(process.parent)}",
        f"TracerPid:\t{ns.tid_of(target.ptrace.tracer) if target.ptrace is not None else 0}",
        "Uid:\t" + "\t".join(str(shown_uid(seer, i)) for i in (creds.uid, creds.euid, creds.suid, creds.fsuid)),
        "Gid:\t" + "\t".join(str(shown_gid(seer, i)) for i in (creds.gid, creds.egid, creds.sgid, creds.fsgid)),
        f"FDSize:\t{size if files is not None else 0}",
        f"Groups:\t{''.join(f'{shown_gid(seer, g)} ' for g in sorted(creds.groups)) or ' '}",
        f"NStgid:\t{_below(ns, target, process.numbers, process.pid)}",
        f"NSpid:\t{_below(ns, target, target.numbers, target.tid)}",
        f"NSpgid:\t{_below(ns, target, process.group.numbers, process.group.pgid)}",
        f"NSsid:\t{_below(ns, target, process.session.numbers, process.session.sid)}",
        "Kthread:\t0",
    ]  # fmt: skip
    if mm is not None:
        sizes = memory.Sizes(mm)
        shared = memory.shared_pages(mm)
        rows = (
            ("VmPeak", sizes.total), ("VmSize", sizes.total), ("VmLck", sizes.locked), ("VmPin", 0), ("VmHWM",
            sizes.peak),
            ("VmRSS", sizes.resident), ("RssAnon", max(0, sizes.resident - shared)), ("RssFile", shared), ("RssShmem",
            0),
            ("VmData", sizes.data), ("VmStk", sizes.stack), ("VmExe", sizes.text), ("VmLib", sizes.library),
            ("VmPTE", sizes.resident // 512 + 4), ("VmSwap", 0),
        )  # fmt: skip
        lines += [f"{name}:\t{pages * 4:8d} kB" for name, pages in rows]
        lines += ["HugetlbPages:\t       0 kB", "CoreDumping:\t0", "THP_enabled:\t0", "untag_mask:\t0xffffffffffffffff"]
    queued = len(process.pending.queue) + sum(len(thread.pending.queue) for thread in process.threads.values())
    limit = process.rlimits[11][0]
    seccomp = target.seccomp.mode if target.seccomp is not None else 0
    lines += [
        f"Threads:\t{max(1, len(process.threads))}", f"SigQ:\t{queued}/{limit if limit != RLIM_INFINITY else 1 << 20}",
        f"SigPnd:\t{target.pending.mask:016x}", f"ShdPnd:\t{process.pending.mask:016x}",
        f"SigBlk:\t{target.blocked:016x}",
        f"SigIgn:\t{ignored:016x}", f"SigCgt:\t{caught:016x}", f"CapInh:\t{creds.inheritable:016x}",
        f"CapPrm:\t{creds.permitted:016x}", f"CapEff:\t{creds.effective:016x}", f"CapBnd:\t{creds.bounding:016x}",
        f"CapAmb:\t{creds.ambient:016x}", f"NoNewPrivs:\t{int(process.no_new_privs)}", f"Seccomp:\t{seccomp}",
        f"Seccomp_filters:\t{len(target.seccomp.filters) if seccomp else 0}",
        "Speculation_Store_Bypass:\tnot vulnerable", "SpeculationIndirectBranch:\tnot affected",
        f"Cpus_allowed:\t{cpu_mask(target.affinity)}", f"Cpus_allowed_list:\t{cpu_list(target.affinity)}",
        "Mems_allowed:\t1", "Mems_allowed_list:\t0", "voluntary_ctxt_switches:\t0", "nonvoluntary_ctxt_switches:\t0",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def limits(reader: Task, target: Task) -> str:
    """/proc/PID/limits."""
    lines = [f"{'Limit':<25} {'Soft Limit':<20} {'Hard Limit':<20} {'Units':<10}\n"]
    for (name, unit), pair in zip(_RLIMITS, target.process.rlimits, strict=True):
        soft, hard = ("unlimited" if value == RLIM_INFINITY else str(value) for value in pair)
        lines.append(f"{name:<25} {soft:<20} {hard:<20} {unit:<10}\n")
    return "".join(lines)


def comm(reader: Task, target: Task) -> bytes:
    """/proc/PID/comm."""
    return target.comm + b"\n"


def set_comm(writer: Task, target: Task, data: bytes) -> None:
    """Threads of the same process may."""
    if writer.process is not target.process:
        raise Errno(errno.EINVAL)
    target.comm = data.split(b"\0")[0].split(b"\n")[0][:15]


def io(reader: Task, target: Task) -> str:
    """/proc/PID/io: nothing is counted."""
    look(reader, target)
    names = ("rchar", "wchar", "syscr", "syscw", "read_bytes", "write_bytes", "cancelled_write_bytes")
    return "".join(f"{name}: 0\n" for name in names)


def _number(data: bytes, base: int = 10) -> int:
    try:
        return int(data.strip(b" \t\n\0"), base)
    except ValueError:
        raise Errno(errno.EINVAL) from None


def oom_score_adj(reader: Task, target: Task) -> str:
    """/proc/PID/oom_score_adj."""
    return f"{target.process.oom_score_adj}\n"


def set_oom_score_adj(writer: Task, target: Task, data: bytes) -> None:
    """-1000..1000; going below what it was needs CAP_SYS_RESOURCE."""
    value = _number(data)
    if not -1000 <= value <= 1000:
        raise Errno(errno.EINVAL)
    if value < target.process.oom_score_adj and not writer.creds.capable(CAP_SYS_RESOURCE):
        raise Errno(errno.EACCES)
    target.process.oom_score_adj = value


def oom_adj(reader: Task, target: Task) -> str:
    """/proc/PID/oom_adj: the old scale, -17..15."""
    value = target.process.oom_score_adj
    return f"{15 if value == 1000 else value * 17 // 1000 if value >= 0 else -(-value * 17 // 1000)}\n"


def set_oom_adj(writer: Task, target: Task, data: bytes) -> None:
    """On the old scale."""
    value = _number(data)
    if not -17 <= value <= 15:
        raise Errno(errno.EINVAL)
    set_oom_score_adj(writer, target, str(1000 if value == 15 else value * 1000 // 17).encode())


def oom_score(reader: Task, target: Task) -> str:
    """/proc/PID/oom_score: share of memory in thousandths, adjusted."""
    total = max(1, target.kernel.frames.limit_pages)
    pages = target.mm.rss_pages if target.mm is not None else 0
    adjusted = pages * 1000 // total + target.process.oom_score_adj
    return f"{max(0, (1000 + adjusted) * 2 // 3)}\n"


def personality(reader: Task, target: Task) -> str:
    """/proc/PID/personality."""
    look(reader, target)
    return f"{target.process.personality:08x}\n"


def wchan(reader: Task, target: Task) -> str:
    """/proc/PID/wchan: why it sleeps, 0 when it does not."""
    if target.in_guest or target.sleep is None or not may_look(reader, target):
        return "0"
    return target.sleep.reason.replace(" ", "_")


def syscall(reader: Task, target: Task) -> str:
    """/proc/PID/syscall."""
    look(reader, target)
    if target.in_guest or target.ctx is None or (target.sleep is None and target is not reader):
        return "running\n"
    regs = target.ctx.regs
    place = f"0x{regs[6]:x} 0x{regs[16]:x}"  # RSP, RIP of vcpu/layout.py
    if target.orig_rax < 0:
        return f"-1 {place}\n"
    arguments = " ".join(f"0x{value:x}" for value in target.ctx.args)
    return f"{target.orig_rax} {arguments} {place}\n"


def stack(reader: Task, target: Task) -> str:
    """/proc/PID/stack: the one frame we have to show."""
    if not reader.creds.capable(21):  # CAP_SYS_ADMIN
        raise Errno(errno.EACCES)
    return (
        f"[<0>] {target.sleep.reason.replace(' ', '_')}\n" if target.sleep is not None and not target.in_guest else ""
    )


def sched(reader: Task, target: Task) -> str:
    """/proc/PID/sched: the lines that tools look at."""
    used = cputime.of_task(target) / 1e6
    policy, priority = _policy(target)
    return (
        f"{_name(target)} ({reader.process.pid_ns.tid_of(target)}, #threads: {len(target.process.threads)})\n"
        + "-" * 67 + "\n"
        f"{'se.sum_exec_runtime':<45}:{used:>21.6f}\n{'nr_switches':<45}:{0:>21}\n{'policy':<45}:{policy:>21}\n"
        f"{'prio':<45}:{-1 if policy == SCHED_DEADLINE else 99 - priority if priority else 120 + target.nice:>21}\n"
    )


def schedstat(reader: Task, target: Task) -> str:
    """/proc/PID/schedstat: ns on a processor, ns waiting for one, times it got one."""
    return f"{cputime.of_task(target)} 0 0\n"


def timers(reader: Task, target: Task) -> str:
    """/proc/PID/timers."""
    parts = []
    for number, timer in sorted(target.process.timers.items()):
        signo = getattr(timer, "signo", 0)
        parts.append(
            f"ID: {number}\nsignal: {signo}/0000000000000000\nnotify: {'signal' if signo else 'none'}/pid."
            f"{reader.process.pid_ns.pid_of(target.process)}\nClockID: {getattr(timer, 'clock_id', 0)}\n"
        )
    return "".join(parts)


def timerslack(reader: Task, target: Task) -> str:
    """/proc/PID/timerslack_ns."""
    if reader.process is not target.process and not reader.creds.capable(23):  # CAP_SYS_NICE
        raise Errno(errno.EPERM)
    return f"{target.timerslack}\n"


def set_timerslack(writer: Task, target: Task, data: bytes) -> None:
    """0 means the default."""
    if writer.process is not target.process and not writer.creds.capable(23):
        raise Errno(errno.EPERM)
    target.timerslack = _number(data) or target.default_timerslack


def children(reader: Task, target: Task, ns: PidNamespace) -> str:
    """/proc/PID/task/TID/children with the numbers of `ns`."""
    if not target.is_leader:
        return ""
    return "".join(f"{pid} " for pid in sorted(map(ns.pid_of, target.process.children.values())))


def loginuid(reader: Task, target: Task) -> str:
    """/proc/PID/loginuid: unset unless something has set it."""
    return str(getattr(target.process, "loginuid", 0xFFFFFFFF))


def set_loginuid(writer: Task, target: Task, data: bytes) -> None:
    """Once, for oneself (pam_loginuid)."""
    if writer is not target:
        raise Errno(errno.EPERM)
    setattr(target.process, "loginuid", _number(data) & 0xFFFFFFFF)  # noqa: B010 a field that only /proc knows


def coredump_filter(reader: Task, target: Task) -> str:
    """/proc/PID/coredump_filter."""
    return f"{target.process.coredump_filter:08x}\n"


def set_coredump_filter(writer: Task, target: Task, data: bytes) -> None:
    """core(5): the bits that Linux knows."""
    look(writer, target)
    target.process.coredump_filter = _number(data, 0) & 0x1FF


def no_label(reader: Task, target: Task) -> str:
    """/proc/PID/attr/current without a security module."""
    raise Errno(errno.EINVAL)


def mounts(reader: Task, target: Task) -> bytes:
    """/proc/PID/mounts."""
    from kvmsentry.fs.proc.mounttable import mounts_text

    return mounts_text(target) if target.fs is not None else b""


def mountinfo(reader: Task, target: Task) -> bytes:
    """/proc/PID/mountinfo."""
    from kvmsentry.fs.proc.mounttable import mountinfo_text

    return mountinfo_text(target) if target.fs is not None else b""


def mountstats(reader: Task, target: Task) -> bytes:
    """/proc/PID/mountstats."""
    lines = []
    for line in mounts(reader, target).splitlines():
        source, place, fstype, *_ = line.split(b" ")
        lines.append(b"device " + source + b" mounted on " + place + b" with fstype " + fstype + b"\n")
    return b"".join(lines)
