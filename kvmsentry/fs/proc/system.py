"""Files of /proc that tell of the machine: proc(5). The machine is the sandbox; of the host's processor only what an
application could find out by executing cpuid."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc.nodes import constant, link, text
from kvmsentry.kernel import cputime, identity
from kvmsentry.syscall.abi_time import CLOCK_BOOTTIME

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.task import Task

TICK = 10_000_000  # ns of a clock tick: USER_HZ is 100
USER_FLAGS = frozenset(
    """fpu tsc cx8 cmov clflush mmx fxsr sse sse2 ht syscall nx pdpe1gb rdtscp lm constant_tsc rep_good nopl xtopology
    nonstop_tsc cpuid pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand hypervisor
    lahf_lm
    abm 3dnowprefetch sse4a misalignsse xop fma4 tbm fsgsbase bmi1 avx2 bmi2 erms rdseed adx clflushopt clwb sha_ni
    xsaveopt
    xsavec xgetbv1 avx_vnni vaes vpclmulqdq gfni rdpid fsrm fsrc fzrm movdiri movdir64b serialize clzero wbnoinvd
    avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg
    avx512_vpopcntdq avx512_bf16 avx512_fp16 avx512_vp2intersect amx_tile amx_int8 amx_bf16""".split()
)
MODEL_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "clflush size",
                "cache_alignment", "address sizes", "cpuid level", "bogomips")  # fmt: skip


@lru_cache(maxsize=1)
def host_processor() -> dict[str, str]:
    """What applications see of the processor. Read from the host's /proc/cpuinfo, so call it before the Sentry is
    locked
    into an empty root; without that file a plain x86-64 is described."""
    fields: dict[str, str] = {
        "vendor_id": "Sentry", "cpu family": "6", "model": "1", "model name": "kvmsentry vCPU", "stepping": "1",
        "cache size": "4096 KB", "clflush size": "64", "cache_alignment": "64", "cpuid level": "13",
        "address sizes": "40 bits physical, 48 bits virtual", "bogomips": "4000.00",
        "flags": "fpu tsc cx8 cmov mmx fxsr sse sse2 syscall nx lm",
    }  # fmt: skip
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as host:
            first = host.read(1 << 16).split("\n\n")[0]
    except OSError:
        return fields
    for line in first.splitlines():
        name, _, value = line.partition(":")
        name, value = name.strip(), value.strip()
        if name in MODEL_FIELDS:
            fields[name] = value
        elif name == "flags":
            fields["flags"] = value
    return fields


def flags_line(kernel: Kernel) -> str:
    """The features an application may use: those of user mode, whose state the platform saves."""
    xcr0 = getattr(kernel.platform, "xcr0", 7)
    names = [name for name in host_processor()["flags"].split() if name in USER_FLAGS]
    if xcr0 & 6 != 6:
        names = [
            n for n in names if not n.startswith(("avx", "amx")) and n not in ("fma", "f16c", "vaes", "vpclmulqdq")
        ]
    elif xcr0 & 0xE0 != 0xE0:
        names = [n for n in names if not n.startswith("avx512")]
    if xcr0 >> 17 & 3 != 3:
        names = [n for n in names if not n.startswith("amx")]
    if "hypervisor" not in names:
        names.append("hypervisor")
    return " ".join(names)


def cpuinfo(task: Task) -> str:
    """/proc/cpuinfo."""
    kernel, host = task.kernel, host_processor()
    flags, count = flags_line(kernel), len(kernel.all_cpus)
    khz = getattr(kernel.platform, "tsc_khz", 0) or int(float(host["bogomips"]) * 500)
    blocks = []
    for cpu in sorted(kernel.all_cpus):
        blocks.append(
            f"processor\t: {cpu}\nvendor_id\t: {host['vendor_id']}\ncpu family\t: {host['cpu family']}\n"
            f"model\t\t: {host['model']}\nmodel name\t: {host['model name']}\nstepping\t: {host['stepping']}\n"
            f"cpu MHz\t\t: {khz / 1000:.3f}\ncache size\t: {host['cache size']}\nphysical id\t: "
            "0\nsiblings\t: {count}\n"
            f"core id\t\t: {cpu}\ncpu cores\t: {count}\napicid\t\t: {cpu}\ninitial apicid\t: {cpu}\nfpu\t\t: yes\n"
            f"fpu_exception\t: yes\ncpuid level\t: {host['cpuid level']}\nwp\t\t: yes\nflags\t\t: {flags}\nbugs\t\t:\n"
            f"bogomips\t: {khz / 500:.2f}\nclflush size\t: {host['clflush size']}\n"
            f"cache_alignment\t: {host['cache_alignment']}\naddress sizes\t: {host['address sizes']}\n"
            "power management:\n\n"
        )
    return "".join(blocks)


def meminfo(task: Task) -> str:
    """/proc/meminfo, from the frame allocator."""
    kernel = task.kernel
    frames = kernel.frames
    total, used = frames.limit_pages * 4, frames.used_pages * 4
    free = max(0, total - used)
    mms = {id(t.mm): t.mm for t in kernel.tasks.values() if t.mm is not None}
    anonymous = min(used, 4 * sum(getattr(mm, "rss_pages", 0) for mm in mms.values()))
    committed = 4 * sum(getattr(mm, "data_pages", 0) for mm in mms.values())
    rows = (
        ("MemTotal", total), ("MemFree", free), ("MemAvailable", free), ("Buffers", 0), ("Cached", used - anonymous),
        ("SwapCached", 0), ("Active", used), ("Inactive", 0), ("Active(anon)", anonymous), ("Inactive(anon)", 0),
        ("Active(file)", used - anonymous), ("Inactive(file)", 0), ("Unevictable", 0), ("Mlocked", 0), ("SwapTotal", 0),
        ("SwapFree", 0), ("Zswap", 0), ("Zswapped", 0), ("Dirty", 0), ("Writeback", 0), ("AnonPages", anonymous),
        ("Mapped", 0), ("Shmem", used - anonymous), ("KReclaimable", 0), ("Slab", 0), ("SReclaimable", 0),
        ("SUnreclaim", 0),
        ("KernelStack", 16 * len(kernel.tasks)), ("PageTables", 0), ("SecPageTables", 0), ("NFS_Unstable", 0),
        ("Bounce", 0),
        ("WritebackTmp", 0), ("CommitLimit", total // 2), ("Committed_AS", committed), ("VmallocTotal", 34359738367),
        ("VmallocUsed", 0), ("VmallocChunk", 0), ("Percpu", 0), ("HardwareCorrupted", 0), ("AnonHugePages", 0),
        ("ShmemHugePages", 0), ("ShmemPmdMapped", 0), ("FileHugePages", 0), ("FilePmdMapped", 0),
    )  # fmt: skip
    lines = [f"{name + ':':<16}{value:8d} kB\n" for name, value in rows]
    lines += [
        f"{name + ':':<16}{0:8d}\n"
        for name in ("HugePages_Total", "HugePages_Free", "HugePages_Rsvd", "HugePages_Surp")
    ]
    lines += ["Hugepagesize:       2048 kB\n", "Hugetlb:               0 kB\n", f"DirectMap4k:    {total:8d} kB\n",
              "DirectMap2M:           0 kB\n", "DirectMap1G:           0 kB\n"]  # fmt: skip
    return "".join(lines)


def busy_ns(kernel: Kernel) -> int:
    """Processor time that the sandbox has used: living processes, and the dead that were waited for."""
    return sum(cputime.of_process(p) + p.children_user + p.children_system for p in kernel.processes.values())


def runnable(kernel: Kernel) -> int:
    """Tasks that run or could."""
    return sum(1 for task in kernel.tasks.values() if not task.dead and (task.in_guest or task.sleep is None))


def stat(task: Task) -> str:
    """/proc/stat."""
    kernel = task.kernel
    cpus = sorted(kernel.all_cpus)
    up = kernel.now() // TICK
    busy = busy_ns(kernel) // TICK
    each = busy // len(cpus)
    lines = [f"cpu  {busy} 0 0 {max(0, up * len(cpus) - busy)} 0 0 0 0 0 0"]
    lines += [f"cpu{cpu} {each} 0 0 {max(0, up - each)} 0 0 0 0 0 0" for cpu in cpus]
    last = kernel.pid_ns.last_pid
    boot = kernel.boot_time - task.ns.time.offsets[CLOCK_BOOTTIME]
    running = runnable(kernel)
    lines += [
        "intr 0", f"ctxt {kernel.task_events}", f"btime {boot // 1_000_000_000}", f"processes {last}",
        f"procs_running {max(1, running)}", "procs_blocked 0", "softirq 0 0 0 0 0 0 0 0 0 0 0\n",
    ]  # fmt: skip
    return "\n".join(lines)


class LoadAverage:
    """Decaying averages over 1, 5 and 15 minutes. Sampled when asked: a timer would wake an idle sandbox for nobody."""

    def __init__(self) -> None:
        self.values = [0.0, 0.0, 0.0]
        self.at = 0

    def sample(self, now: int, active: int) -> list[float]:
        """The averages, if `active` tasks were runnable since the last sample. `now` in ns."""
        if self.at:
            seconds = (now - self.at) / 1e9
            for index, minutes in enumerate((1, 5, 15)):
                decay = 0.5 ** (seconds / (minutes * 60 * 0.6931))
                self.values[index] = self.values[index] * decay + active * (1 - decay)
        self.at = now
        return self.values


def load(kernel: Kernel) -> list[float]:
    """The load averages now; also for sysinfo(2)."""
    average = kernel.__dict__.get("load_average")
    if average is None:
        average = kernel.__dict__["load_average"] = LoadAverage()
    values: list[float] = average.sample(kernel.now(), runnable(kernel))
    return values


def loadavg(task: Task) -> str:
    """/proc/loadavg."""
    kernel = task.kernel
    one, five, fifteen = load(kernel)
    last = task.process.pid_ns.last_pid
    return f"{one:.2f} {five:.2f} {fifteen:.2f} {max(1, runnable(kernel))}/{len(kernel.tasks)} {last}\n"


def uptime(task: Task) -> str:
    """/proc/uptime: seconds since boot, seconds that all processors were idle. These never go back, though what a
    process has used is known only some time after."""
    kernel = task.kernel
    up = kernel.now()
    idle = max(kernel.__dict__.get("idle_shown", 0), up * len(kernel.all_cpus) - busy_ns(kernel))
    kernel.__dict__["idle_shown"] = idle
    up += task.ns.time.offsets[CLOCK_BOOTTIME]
    return f"{up / 1e9:.2f} {idle / 1e9:.2f}\n"


def vmstat(task: Task) -> str:
    """/proc/vmstat: the counters we have."""
    frames = task.kernel.frames
    free = max(0, frames.limit_pages - frames.used_pages)
    rows = (
        ("nr_free_pages", free), ("nr_zone_inactive_anon", 0), ("nr_zone_active_anon", frames.used_pages),
        ("nr_mlock", 0),
        ("nr_anon_pages", frames.used_pages), ("nr_mapped", 0), ("nr_file_pages", 0), ("nr_dirty", 0),
        ("nr_writeback", 0),
        ("nr_shmem", 0), ("pgpgin", 0), ("pgpgout", 0), ("pswpin", 0), ("pswpout", 0), ("pgfault", 0), ("pgmajfault",
        0),
        ("oom_kill", 0),
    )  # fmt: skip
    return "".join(f"{name} {value}\n" for name, value in rows)


def zoneinfo(task: Task) -> str:
    """/proc/zoneinfo: one zone."""
    frames = task.kernel.frames
    free = max(0, frames.limit_pages - frames.used_pages)
    return (
        f"Node 0, zone   Normal\n  pages free     {free}\n        min      4096\n        low      5120\n"
        f"        high     6144\n        spanned  {frames.limit_pages}\n        present  {frames.limit_pages}\n"
        f"        managed  {frames.limit_pages}\n"
    )


def interrupts(task: Task) -> str:
    """/proc/interrupts: processors, and nothing that interrupts them."""
    return "     " + "".join(f"{f'CPU{cpu}':>11}" for cpu in sorted(task.kernel.all_cpus)) + "\n"


def locks(task: Task) -> str:
    """/proc/locks: what descriptors of any task hold."""
    seen: dict[int, Any] = {}
    for other in task.kernel.tasks.values():
        if other.files is not None:
            for file in other.files.files.values():
                if file.inode.locks is not None:
                    seen[id(file.inode)] = file.inode
    lines: list[str] = []
    for inode in seen.values():
        place = f"{inode.sb.dev >> 8 & 0xFFF:02x}:{inode.sb.dev & 0xFF:02x}:{inode.ino}"
        for kind, pid in inode.locks.flocks.values():
            word = "WRITE" if kind == 2 else "READ "
            lines.append(f"{len(lines) + 1}: FLOCK  ADVISORY  {word} {pid} {place} 0 EOF\n")
        for lease in inode.locks.leases.values():
            state = "BREAKING " if lease.shown() != lease.kind else "ACTIVE   "
            word = "WRITE" if lease.shown() == 1 else "UNLCK" if lease.shown() == 2 else "READ "
            lines.append(f"{len(lines) + 1}: LEASE  {state} {word} {lease.pid} {place} 0 EOF\n")
        for record in inode.locks.records:
            word = "WRITE" if record.kind == 1 else "READ "
            kind_of = "POSIX " if record.pid > 0 else "OFDLCK"
            end = "EOF" if record.end >= 1 << 63 else str(record.end - 1)
            lines.append(f"{len(lines) + 1}: {kind_of} ADVISORY  {word} {record.pid} {place} {record.start} {end}\n")
    return "".join(lines)


def consoles(task: Task) -> str:
    """/proc/consoles."""
    known = task.kernel.devices
    return "tty0                 -WU (EC p  )    5:1\n" if known is not None and known.console is not None else ""


def kmsg(task: Task) -> str:
    """/proc/kmsg, without the waiting for more."""
    if not task.creds.capable(34):  # CAP_SYSLOG
        raise Errno(1)
    return identity.dmesg(task.kernel)


FILESYSTEMS = "".join(
    f"nodev\t{name}\n"
    for name in (
        "sysfs",
        "tmpfs",
        "bdev",
        "proc",
        "cgroup2",
        "devtmpfs",
        "mqueue",
        "sockfs",
        "pipefs",
        "devpts",
        "ramfs",
        "mqueue",
        "overlay",
        "9p",
    )
)
DEVICES = (
    "Character devices:\n  1 mem\n  5 /dev/tty\n  5 /dev/console\n  5 /dev/ptmx\n 10 misc\n128 ptm\n136 pts\n\n"
    "Block devices:\n"
)
CGROUPS = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n" + "".join(
    f"{name}\t0\t1\t1\n" for name in ("cpuset", "cpu", "cpuacct", "memory", "pids")
)


def _keys(task: Any) -> str:
    from kvmsentry.kernel.keys import keys_text

    return keys_text(task)


def _key_users(task: Any) -> str:
    from kvmsentry.kernel.keys import users_text

    return users_text(task)


def entries() -> dict[bytes, Any]:
    """The files of this module, for the root of procfs."""
    return {
        b"cpuinfo": text(cpuinfo), b"meminfo": text(meminfo), b"stat": text(stat), b"loadavg": text(loadavg),
        b"uptime": text(uptime), b"version": text(lambda task: identity.proc_version() + "\n"),
        b"cmdline": text(lambda task: identity.command_line() + "\n"), b"filesystems": constant(FILESYSTEMS),
        b"devices": constant(DEVICES), b"cgroups": constant(CGROUPS), b"vmstat": text(vmstat),
        b"zoneinfo": text(zoneinfo),
        b"interrupts": text(interrupts), b"locks": text(locks), b"consoles": text(consoles), b"kmsg": text(kmsg, 0o400),
        b"swaps": constant("Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"), b"partitions": constant(""),
        b"diskstats": constant(""), b"misc": constant(""), b"modules": constant(""),
        b"execdomains": constant("0-0\tLinux\t"
        "[kernel]\n"), b"crypto": constant(""), b"iomem": constant("", 0o400), b"ioports": constant("", 0o400),
        b"keys": text(_keys), b"key-users": text(_key_users),
        b"mounts": link(b"self/mounts"), b"net": link(b"self/net"),
    }  # fmt: skip


__all__ = ["entries", "host_processor", "load"]
