"""sysfs and the empty cgroup2 in it: what run-times look at to learn how many processors and how much memory there
is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmsentry.fs.proc.nodes import KernelSuper, TreeInode, constant, cpu_list, cpu_mask, link, text
from kvmsentry.fs.vfs import Inode

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel

SYSFS_MAGIC, CGROUP2_SUPER_MAGIC = 0x62656572, 0x63677270  # uapi/linux/magic.h
PAGE = 4096


def _cpus(tree: TreeInode, kernel: Kernel) -> None:
    """/sys/devices/system/cpu."""
    cpus = sorted(kernel.all_cpus)
    everybody = cpu_list(cpus) + "\n"
    mask = cpu_mask(cpus) + "\n"
    base = b"devices/system/cpu/"
    for name in (b"online", b"possible", b"present"):
        tree.put(base + name, constant(everybody))
    for name in (b"offline", b"isolated", b"nohz_full"):
        tree.put(base + name, constant("\n"))
    tree.put(base + b"kernel_max", constant("8191\n"))
    tree.put(base + b"modalias", constant("cpu:type:x86\n"))
    tree.put(base + b"smt/active", constant("0\n"))
    tree.put(base + b"smt/control", constant("notsupported\n"))
    for hole in (
        b"meltdown",
        b"spectre_v1",
        b"spectre_v2",
        b"spec_store_bypass",
        b"l1tf",
        b"mds",
        b"srbds",
        b"retbleed",
    ):
        tree.put(base + b"vulnerabilities/" + hole, constant("Not affected\n"))
    caches = ((0, 1, "Data", "32K", 64), (1, 1, "Instruction", "32K", 64), (2, 2, "Unified", "1024K", 1024),
              (3, 3, "Unified", "16384K", 16384))  # fmt: skip
    for cpu in cpus:
        here = base + b"cpu%d/" % cpu
        if cpu:
            tree.put(here + b"online", constant("1\n"))
        alone, alone_mask = f"{cpu}\n", cpu_mask([cpu]) + "\n"
        topology = {
            b"physical_package_id": "0\n", b"core_id": alone, b"die_id": "0\n", b"cluster_id": "-1\n",
            b"thread_siblings": alone_mask, b"thread_siblings_list": alone, b"core_cpus": alone_mask,
            b"core_cpus_list": alone,
            b"core_siblings": mask, b"core_siblings_list": everybody, b"package_cpus": mask,
            b"package_cpus_list": everybody,
            b"die_cpus": mask, b"die_cpus_list": everybody,
        }  # fmt: skip
        for name, value in topology.items():
            tree.put(here + b"topology/" + name, constant(value))
        for index, level, kind, size, sets in caches:
            cache = here + b"cache/index%d/" % index
            shared = index == 3
            rows = {
                b"level": f"{level}\n", b"type": f"{kind}\n", b"size": f"{size}\n", b"coherency_line_size": "64\n",
                b"number_of_sets": f"{sets}\n", b"ways_of_associativity": "8\n" if level < 2 else "16\n", b"id": alone,
                b"physical_line_partition": "1\n", b"shared_cpu_list": everybody if shared else alone,
                b"shared_cpu_map": mask if shared else alone_mask,
            }  # fmt: skip
            for name, value in rows.items():
                tree.put(cache + name, constant(value))
        tree.put(b"bus/cpu/devices/cpu%d" % cpu, link(b"../../../devices/system/cpu/cpu%d" % cpu))


def _node(tree: TreeInode, kernel: Kernel) -> None:
    """/sys/devices/system/node: all memory and all processors in node 0."""
    base = b"devices/system/node/"
    for name in (b"online", b"possible", b"has_cpu", b"has_memory", b"has_normal_memory"):
        tree.put(base + name, constant("0\n"))
    tree.put(base + b"node0/cpulist", constant(cpu_list(kernel.all_cpus) + "\n"))
    tree.put(base + b"node0/cpumap", constant(cpu_mask(kernel.all_cpus) + "\n"))
    tree.put(base + b"node0/distance", constant("10\n"))

    def meminfo(task: Any) -> str:
        frames = kernel.frames
        total, used = frames.limit_pages * 4, frames.used_pages * 4
        rows = (("MemTotal", total), ("MemFree", max(0, total - used)), ("MemUsed", used))
        return "".join(f"Node 0 {name + ':':<15}{value:8d} kB\n" for name, value in rows)

    tree.put(base + b"node0/meminfo", text(meminfo))
    tree.put(base + b"node0/numastat", constant("numa_hit 0\nnuma_miss 0\nnuma_foreign 0\ninterleave_hit "
    "0\nlocal_node 0\n"
                                                "other_node 0\n"))  # fmt: skip
    for cpu in sorted(kernel.all_cpus):
        tree.put(base + b"node0/cpu%d" % cpu, link(b"../../cpu/cpu%d" % cpu))


def _net(tree: TreeInode) -> None:
    """/sys/class/net: the loopback device."""
    base = b"devices/virtual/net/lo/"
    rows = {
        b"address": "00:00:00:00:00:00\n", b"broadcast": "00:00:00:00:00:00\n", b"addr_len": "6\n", b"carrier": "1\n",
        b"flags": "0x9\n", b"ifindex": "1\n", b"iflink": "1\n", b"mtu": "65536\n", b"operstate": "unknown\n",
        b"tx_queue_len": "1000\n", b"type": "772\n", b"dev_id": "0x0\n", b"uevent": "INTERFACE=lo\nIFINDEX=1\n",
    }  # fmt: skip
    for name, value in rows.items():
        tree.put(base + name, constant(value))
    for counter in ("rx_bytes", "rx_packets", "rx_errors", "rx_dropped", "tx_bytes", "tx_packets", "tx_errors",
    "tx_dropped",
                 "collisions", "multicast"):  # fmt: skip
        tree.put(base + b"statistics/" + counter.encode(), constant("0\n"))
    tree.put(b"class/net/lo", link(b"../../devices/virtual/net/lo"))


def _rest(tree: TreeInode, kernel: Kernel) -> None:
    huge = b"kernel/mm/transparent_hugepage/"
    tree.put(huge + b"enabled", constant("always [madvise] never\n"))
    tree.put(huge + b"defrag", constant("always defer defer+madvise [madvise] never\n"))
    tree.put(huge + b"shmem_enabled", constant("always within_size advise [never] deny force\n"))
    tree.put(huge + b"hpage_pmd_size", constant("2097152\n"))
    tree.put(huge + b"use_zero_page", constant("1\n"))
    tree.put(huge + b"khugepaged/defrag", constant("1\n"))
    pages = b"kernel/mm/hugepages/hugepages-2048kB/"
    for name in (
        b"nr_hugepages",
        b"free_hugepages",
        b"resv_hugepages",
        b"surplus_hugepages",
        b"nr_overcommit_hugepages",
    ):
        tree.put(pages + name, constant("0\n"))
    tree.put(b"kernel/mm/ksm/run", constant("0\n"))
    tree.put(b"kernel/profiling", constant("0\n"))
    tree.put(b"kernel/uevent_seqnum", constant("1\n"))
    tree.put(b"kernel/fscaps", constant("1\n"))
    tree.put(b"kernel/kexec_loaded", constant("0\n"))
    tree.put(b"kernel/security", lambda sb: TreeInode(sb, {}))
    tree.put(b"kernel/debug", lambda sb: TreeInode(sb, {}, 0o700))
    tree.put(b"kernel/tracing", lambda sb: TreeInode(sb, {}, 0o700))
    for name, dev, path in ((b"tty", "5:0", b"tty"), (b"console", "5:1", b"tty"), (b"ptmx", "5:2", b"tty"),
                            (b"null", "1:3", b"mem"), (b"zero", "1:5", b"mem"), (b"full", "1:7", b"mem"),
                            (b"random", "1:8", b"mem"), (b"urandom", "1:9", b"mem"), (b"kmsg", "1:11",
                            b"mem")):  # fmt: skip
        here = b"devices/virtual/" + path + b"/" + name
        major, minor = dev.split(":")
        tree.put(here + b"/dev", constant(dev + "\n"))
        tree.put(here + b"/uevent", constant(f"MAJOR={major}\nMINOR={minor}\nDEVNAME={name.decode()}\n"))
        tree.put(b"class/" + path + b"/" + name, link(b"../../devices/virtual/" + path + b"/" + name))
        tree.put(b"dev/char/" + dev.encode(), link(b"../../devices/virtual/" + path + b"/" + name))
    for empty in (b"block", b"class/block", b"class/input", b"class/graphics", b"class/drm", b"class/dmi",
    b"class/hwmon",
                  b"class/powercap", b"class/thermal", b"class/power_supply", b"dev/block", b"bus/pci/devices",
                  b"bus/usb/devices", b"bus/platform/devices", b"bus/node/devices", b"firmware", b"power", b"module",
                  b"hypervisor", b"fs/cgroup"):  # fmt: skip
        tree.put(empty, lambda sb: TreeInode(sb, {}))
    tree.put(b"module/kernel/parameters/panic", constant("-1\n"))
    tree.put(b"hypervisor/type", constant("kvmsentry\n"))


class SysSuper(KernelSuper):
    """sysfs, read-only."""

    magic = SYSFS_MAGIC
    fstype = "sysfs"
    readonly = unchangeable = True

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        tree = TreeInode(self, {}, 0o755)
        tree.ino = 1
        _rest(tree, kernel)
        _cpus(tree, kernel)
        _node(tree, kernel)
        _net(tree)
        self.root: Inode = tree


class CgroupSuper(KernelSuper):
    """cgroup2 as the root of a container sees it: limits, usage, no children."""

    magic = CGROUP2_SUPER_MAGIC
    fstype = "cgroup2"
    readonly = unchangeable = True

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.source = "cgroup"
        self.options = "nsdelegate,memory_recursiveprot"
        frames = kernel.frames

        def procs(task: Any) -> str:
            return "".join(f"{pid}\n" for pid in sorted(kernel.processes))

        def threads(task: Any) -> str:
            return "".join(f"{tid}\n" for tid in sorted(kernel.tasks))

        def memory_stat(task: Any) -> str:
            used = frames.used_pages * PAGE
            rows = (("anon", used), ("file", 0), ("kernel", 0), ("shmem", 0), ("inactive_anon", 0), ("active_anon",
            used),
                    ("inactive_file", 0), ("active_file", 0), ("unevictable", 0), ("pgfault", 0), ("pgmajfault",
                    0))  # fmt: skip
            return "".join(f"{name} {value}\n" for name, value in rows)

        def cpu_stat(task: Any) -> str:
            from kvmsentry.fs.proc.system import busy_ns

            used = busy_ns(kernel) // 1000
            return (
                f"usage_usec {used}\nuser_usec {used}\nsystem_usec 0\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0\n"
            )

        cpus = cpu_list(kernel.all_cpus) + "\n"
        self.root: Inode = TreeInode(self, {
            b"cgroup.controllers": constant("cpuset cpu memory pids\n"), b"cgroup.subtree_control": constant(""),
            b"cgroup.procs": text(procs), b"cgroup.threads": text(threads), b"cgroup.type": constant("domain\n"),
            b"cgroup.events": constant("populated 1\nfrozen 0\n"), b"cgroup.freeze": constant("0\n"),
            b"cgroup.max.depth": constant("max\n"), b"cgroup.max.descendants": constant("max\n"),
            b"cgroup.stat": constant("nr_descendants 0\nnr_dying_descendants 0\n"),
            b"cpu.max": constant("max 100000\n"), b"cpu.weight": constant("100\n"), b"cpu.stat": text(cpu_stat),
            b"cpuset.cpus": constant(cpus), b"cpuset.cpus.effective": constant(cpus), b"cpuset.mems": constant("0\n"),
            b"cpuset.mems.effective": constant("0\n"),
            b"memory.max": text(lambda task: f"{frames.limit_pages * PAGE}\n"), b"memory.high": constant("max\n"),
            b"memory.low": constant("0\n"), b"memory.min": constant("0\n"),
            b"memory.current": text(lambda task: f"{frames.used_pages * PAGE}\n"),
            b"memory.peak": text(lambda task: f"{frames.used_pages * PAGE}\n"),
            b"memory.swap.max": constant("0\n"), b"memory.swap.current": constant("0\n"),
            b"memory.stat": text(memory_stat),
            b"memory.events": constant("low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n"),
            b"memory.oom.group": constant("0\n"),
            b"pids.max": text(lambda task: f"{kernel.max_tasks}\n"),
            b"pids.current": text(lambda task: f"{len(kernel.tasks)}\n"), b"pids.events": constant("max 0\n"),
        })  # fmt: skip
        self.root.ino = 1
