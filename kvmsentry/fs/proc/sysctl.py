"""/proc/sys: the kernel's knobs; proc(5), Documentation/admin-guide/sysctl. Values live once per sandbox in `Sysctls`,
but for those below net/, of which each network namespace has its own.

A row says path, first value, and who may write what: nothing (read-only), a number in a range, or text. What other
parts of
the kernel want to know they read with `sysctl(kernel).number(b"net/core/somaxconn")`.
"""

from __future__ import annotations

import errno
import uuid
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc import sysvipc
from kvmsentry.fs.proc.nodes import INT, TextInode, TreeInode, numbers
from kvmsentry.kernel import cap, identity
from kvmsentry.kernel.pidns import PID_MAX
from kvmsentry.kernel.task import CAP_LAST
from kvmsentry.kernel.userns import capable

if TYPE_CHECKING:
    from kvmsentry.fs.vfs import SuperBlock
    from kvmsentry.kernel.kernel import Kernel

UNSIGNED = (0, (1 << 31) - 1)
ULONG = (0, (1 << 64) - 1)
BOOL = (0, 1)
TEXT = "text"
HOST_NAME_MAX = 64  # uapi/linux/limits.h
CAP_SYS_ADMIN = 21
MAX_NAMESPACES = 63432  # half of what threads-max is with 16 GiB, as Linux starts with (kernel/fork.c)

# net/ipv4/conf/DEVICE: per device, and what a namespace starts with (include/uapi/linux/ip.h); (all and default, lo)
_IPV4_CONF: dict[str, tuple[int, int]] = {
    "accept_local": (0, 0), "accept_redirects": (1, 1), "accept_source_route": (0, 0), "arp_accept": (0, 0),
    "arp_announce": (0, 0), "arp_evict_nocarrier": (1, 1), "arp_filter": (0, 0), "arp_ignore": (0, 0),
    "arp_notify": (0, 0), "bootp_relay": (0, 0), "disable_policy": (0, 1), "disable_xfrm": (0, 1),
    "drop_gratuitous_arp": (0, 0), "drop_unicast_in_l2_multicast": (0, 0), "force_igmp_version": (0, 0),
    "ignore_routes_with_linkdown": (0, 0), "log_martians": (0, 0), "medium_id": (0, 0), "promote_secondaries": (0, 0),
    "proxy_arp": (0, 0), "proxy_arp_pvlan": (0, 0), "route_localnet": (0, 0), "secure_redirects": (1, 1),
    "send_redirects": (1, 1), "shared_media": (1, 1), "src_valid_mark": (0, 0), "tag": (0, 0),
}  # fmt: skip

# path, value ({} in a value is filled in per sandbox), who may write: None, a (lowest, highest) pair, or TEXT
ROWS: tuple[tuple[str, Any, Any], ...] = (
    ("kernel/ostype", identity.SYSNAME, None),
    ("kernel/osrelease", identity.RELEASE, None),
    ("kernel/version", identity.VERSION, None),
    ("kernel/pid_max", 32768, (301, 4194304)),
    ("kernel/threads-max", 32767, (1, 1 << 30)),
    ("kernel/cap_last_cap", CAP_LAST, None),
    ("kernel/ngroups_max", 65536, None),
    ("kernel/overflowuid", 65534, (0, 65535)),
    ("kernel/overflowgid", 65534, (0, 65535)),
    ("kernel/random/entropy_avail", 256, None),
    ("kernel/random/poolsize", 256, None),
    ("kernel/random/write_wakeup_threshold", 256, UNSIGNED),
    ("kernel/random/urandom_min_reseed_secs", 60, UNSIGNED),
    ("kernel/core_pattern", "core", TEXT),
    ("kernel/core_uses_pid", 0, BOOL),
    ("kernel/core_pipe_limit", 0, UNSIGNED),
    ("kernel/auto_msgmni", 0, BOOL),
    ("kernel/sched_child_runs_first", 0, BOOL),
    ("kernel/sched_rt_period_us", 1000000, (1, INT[1])),
    ("kernel/sched_rt_runtime_us", 950000, (-1, INT[1])),
    ("kernel/sched_rr_timeslice_ms", 100, INT),
    ("kernel/sched_autogroup_enabled", 0, BOOL),
    ("kernel/yama/ptrace_scope", 1, (0, 3)),
    ("kernel/randomize_va_space", 2, (0, 2)),
    ("kernel/panic", -1, INT),
    ("kernel/panic_on_oops", 1, BOOL),
    ("kernel/printk", "4\t4\t1\t7", INT),
    ("kernel/printk_ratelimit", 5, UNSIGNED),
    ("kernel/dmesg_restrict", 0, BOOL),
    ("kernel/kptr_restrict", 1, (0, 2)),
    ("kernel/perf_event_paranoid", 2, INT),
    ("kernel/perf_event_max_sample_rate", 100000, UNSIGNED),
    ("kernel/unprivileged_bpf_disabled", 2, (0, 2)),
    ("kernel/seccomp/actions_avail", "kill_process kill_thread trap errno user_notif trace log allow", None),
    ("kernel/seccomp/actions_logged", "kill_process kill_thread trap errno user_notif trace log", TEXT),
    ("kernel/tainted", 0, None),
    ("kernel/modules_disabled", 1, None),
    ("kernel/kexec_load_disabled", 1, None),
    ("kernel/sysrq", 0, UNSIGNED),
    ("kernel/ctrl-alt-del", 0, UNSIGNED),
    ("kernel/hung_task_timeout_secs", 120, UNSIGNED),
    ("kernel/softlockup_panic", 0, BOOL),
    ("kernel/numa_balancing", 0, BOOL),
    ("kernel/max_lock_depth", 1024, UNSIGNED),
    ("kernel/io_uring_disabled", 2, (0, 2)),
    ("kernel/keys/maxkeys", 200, UNSIGNED),
    ("kernel/keys/maxbytes", 20000, UNSIGNED),
    ("kernel/keys/root_maxkeys", 1000000, UNSIGNED),
    ("kernel/keys/root_maxbytes", 25000000, UNSIGNED),
    ("kernel/pty/max", 1024, UNSIGNED),
    ("kernel/pty/reserve", 1024, UNSIGNED),
    ("kernel/unprivileged_userns_clone", 1, BOOL),
    ("fs/file-max", 9223372036854775807, ULONG),
    ("fs/nr_open", 1048576, (8, 1 << 30)),
    ("fs/inode-state", "0\t0\t0\t0\t0\t0\t0", None),
    ("fs/dentry-state", "0\t0\t45\t0\t0\t0", None),
    ("fs/pipe-max-size", 1048576, (4096, 1 << 31)),
    ("fs/pipe-user-pages-hard", 0, ULONG),
    ("fs/pipe-user-pages-soft", 16384, ULONG),
    ("fs/inotify/max_queued_events", 16384, UNSIGNED),
    ("fs/inotify/max_user_instances", 128, UNSIGNED),
    ("fs/inotify/max_user_watches", 65536, UNSIGNED),
    ("fs/epoll/max_user_watches", 1048576, ULONG),
    ("fs/aio-max-nr", 65536, ULONG),
    ("fs/aio-nr", 0, None),
    ("fs/leases-enable", 1, BOOL),
    ("fs/lease-break-time", 45, UNSIGNED),
    ("fs/dir-notify-enable", 1, BOOL),
    ("fs/mount-max", 100000, UNSIGNED),
    ("fs/overflowuid", 65534, (0, 65535)),
    ("fs/overflowgid", 65534, (0, 65535)),
    ("fs/protected_fifos", 1, (0, 2)),
    ("fs/protected_hardlinks", 1, BOOL),
    ("fs/protected_regular", 2, (0, 2)),
    ("fs/protected_symlinks", 1, BOOL),
    ("fs/suid_dumpable", 0, (0, 2)),
    ("fs/mqueue/msg_default", 10, (1, 65536)),
    ("fs/mqueue/msg_max", 10, (1, 65536)),
    ("fs/mqueue/msgsize_default", 8192, (128, 16 << 20)),
    ("fs/mqueue/msgsize_max", 8192, (128, 16 << 20)),
    ("fs/mqueue/queues_max", 256, INT),
    ("vm/overcommit_memory", 0, (0, 2)),
    ("vm/overcommit_ratio", 50, UNSIGNED),
    ("vm/overcommit_kbytes", 0, ULONG),
    ("vm/max_map_count", 65530, (0, INT[1])),
    ("vm/swappiness", 60, (0, 200)),
    ("vm/mmap_min_addr", 65536, ULONG),
    ("vm/mmap_rnd_bits", 28, (28, 32)),
    ("vm/min_free_kbytes", 16384, UNSIGNED),
    ("vm/dirty_ratio", 20, (0, 100)),
    ("vm/dirty_background_ratio", 10, (0, 100)),
    ("vm/dirty_bytes", 0, ULONG),
    ("vm/dirty_background_bytes", 0, ULONG),
    ("vm/dirty_expire_centisecs", 3000, UNSIGNED),
    ("vm/dirty_writeback_centisecs", 500, UNSIGNED),
    ("vm/drop_caches", 0, (1, 4)),
    ("vm/compact_memory", 0, UNSIGNED),
    ("vm/nr_hugepages", 0, ULONG),
    ("vm/nr_overcommit_hugepages", 0, ULONG),
    ("vm/hugetlb_shm_group", 0, UNSIGNED),
    ("vm/oom_dump_tasks", 1, BOOL),
    ("vm/oom_kill_allocating_task", 0, BOOL),
    ("vm/panic_on_oom", 0, (0, 2)),
    ("vm/page-cluster", 3, UNSIGNED),
    ("vm/vfs_cache_pressure", 100, UNSIGNED),
    ("vm/watermark_scale_factor", 10, (1, 3000)),
    ("vm/zone_reclaim_mode", 0, UNSIGNED),
    ("vm/user_reserve_kbytes", 131072, ULONG),
    ("vm/admin_reserve_kbytes", 8192, ULONG),
    ("vm/memfd_noexec", 0, (0, 2)),
    ("vm/unprivileged_userfaultfd", 0, BOOL),
    ("vm/legacy_va_layout", 0, BOOL),
    ("vm/stat_interval", 1, UNSIGNED),
    ("net/core/somaxconn", 4096, UNSIGNED),
    ("net/core/rmem_max", 212992, (2304, INT[1])),
    ("net/core/wmem_max", 212992, (4608, INT[1])),
    ("net/core/rmem_default", 212992, (2304, INT[1])),
    ("net/core/wmem_default", 212992, (4608, INT[1])),
    ("net/core/optmem_max", 20480, UNSIGNED),
    ("net/core/netdev_max_backlog", 1000, UNSIGNED),
    ("net/core/default_qdisc", "pfifo_fast", TEXT),
    ("net/core/bpf_jit_enable", 0, None),
    ("net/core/busy_poll", 0, UNSIGNED),
    ("net/core/busy_read", 0, UNSIGNED),
    ("net/ipv4/ip_local_port_range", "32768\t60999", (0, 65535)),
    ("net/ipv4/ip_local_reserved_ports", "", TEXT),
    ("net/ipv4/ip_unprivileged_port_start", 0, (0, 65535)),  # as sandbox/network.py sets the host's
    ("net/ipv4/ip_forward", 0, BOOL),
    ("net/ipv4/ip_default_ttl", 64, (1, 255)),
    ("net/ipv4/ip_nonlocal_bind", 0, BOOL),
    ("net/ipv4/ip_no_pmtu_disc", 0, (0, 3)),
    ("net/ipv4/ping_group_range", "1\t0", UNSIGNED),
    ("net/ipv4/icmp_echo_ignore_all", 0, BOOL),
    ("net/ipv4/icmp_echo_ignore_broadcasts", 1, BOOL),
    ("net/ipv4/tcp_available_congestion_control", "reno cubic", None),
    ("net/ipv4/tcp_allowed_congestion_control", "reno cubic", TEXT),
    ("net/ipv4/tcp_congestion_control", "cubic", TEXT),
    ("net/ipv4/tcp_fin_timeout", 60, UNSIGNED),
    ("net/ipv4/tcp_keepalive_intvl", 75, UNSIGNED),
    ("net/ipv4/tcp_keepalive_probes", 9, UNSIGNED),
    ("net/ipv4/tcp_keepalive_time", 7200, UNSIGNED),
    ("net/ipv4/tcp_max_syn_backlog", 4096, UNSIGNED),
    ("net/ipv4/tcp_max_tw_buckets", 65536, UNSIGNED),
    ("net/ipv4/tcp_max_orphans", 65536, UNSIGNED),
    ("net/ipv4/tcp_mem", "88560\t118080\t177120", ULONG),
    ("net/ipv4/udp_mem", "177120\t236160\t354240", ULONG),
    ("net/ipv4/tcp_rmem", "4096\t131072\t6291456", UNSIGNED),
    ("net/ipv4/tcp_wmem", "4096\t16384\t4194304", UNSIGNED),
    ("net/ipv4/tcp_moderate_rcvbuf", 1, BOOL),
    ("net/ipv4/tcp_no_metrics_save", 0, BOOL),
    ("net/ipv4/tcp_retries1", 3, (1, 255)),
    ("net/ipv4/tcp_retries2", 15, (1, 255)),
    ("net/ipv4/tcp_syn_retries", 6, (1, 127)),
    ("net/ipv4/tcp_synack_retries", 5, (0, 255)),
    ("net/ipv4/tcp_sack", 1, BOOL),
    ("net/ipv4/tcp_dsack", 1, BOOL),
    ("net/ipv4/tcp_ecn", 2, (0, 2)),
    ("net/ipv4/tcp_fastopen", 1, UNSIGNED),
    ("net/ipv4/tcp_slow_start_after_idle", 1, BOOL),
    ("net/ipv4/tcp_syncookies", 1, (0, 2)),
    ("net/ipv4/tcp_timestamps", 1, (0, 2)),
    ("net/ipv4/tcp_tw_reuse", 2, (0, 2)),
    ("net/ipv4/tcp_window_scaling", 1, BOOL),
    ("net/ipv4/tcp_mtu_probing", 0, (0, 2)),
    ("net/ipv4/conf/all/forwarding", 0, BOOL),
    ("net/ipv4/conf/all/rp_filter", 0, (0, 2)),
    ("net/ipv4/conf/default/forwarding", 0, BOOL),
    ("net/ipv4/conf/default/rp_filter", 0, (0, 2)),
    ("net/ipv4/conf/lo/forwarding", 0, BOOL),
    ("net/ipv6/bindv6only", 0, BOOL),
    ("net/ipv6/conf/all/disable_ipv6", 0, BOOL),
    ("net/ipv6/conf/all/forwarding", 0, BOOL),
    ("net/ipv6/conf/all/accept_dad", 0, INT),
    ("net/ipv6/conf/default/disable_ipv6", 0, BOOL),
    ("net/ipv6/conf/default/forwarding", 0, BOOL),
    ("net/ipv6/conf/lo/disable_ipv6", 0, BOOL),
    ("net/unix/max_dgram_qlen", 512, UNSIGNED),
    ("user/max_cgroup_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_ipc_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_mnt_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_net_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_pid_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_time_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_user_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_uts_namespaces", MAX_NAMESPACES, UNSIGNED),
    ("user/max_inotify_instances", 128, UNSIGNED),
    ("user/max_inotify_watches", 65536, UNSIGNED),
    *(
        (f"net/ipv4/conf/{device}/{name}", values[device == "lo"], INT)
        for device in ("all", "default", "lo")
        for name, values in _IPV4_CONF.items()
    ),
)
NETWORK = "net/"  # the paths that each network namespace has for itself


class Sysctls:
    """The values, by path: all, or those of the rows below `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self.values: dict[str, str] = {path: str(value) for path, value, _ in ROWS if path.startswith(prefix)}
        self.boot_id = str(uuid.uuid4())

    def number(self, path: str) -> int:
        """A value that is a number (the first one, where there are several)."""
        return int(self.values[path].split()[0])

    def write(self, path: str, rule: Any, data: bytes) -> None:
        """What was written to the file: EINVAL for no number or one out of range (proc_dointvec_minmax)."""
        if rule == TEXT:
            line = data.split(b"\n")[0].split(b"\0")[0]
            self.values[path] = line.decode("utf-8", "surrogateescape")[:128]
            return
        self.values[path] = "\t".join(map(str, numbers(data, [*map(int, self.values[path].split("\t"))], rule)))


def sysctl(kernel: Kernel) -> Sysctls:
    """The sandbox's values, made when first asked for."""
    if kernel.sysctl is None:
        kernel.sysctl = Sysctls()
    values: Sysctls = kernel.sysctl
    return values


def _row(sb: SuperBlock, values: Sysctls, path: str, rule: Any) -> TextInode:
    network = path.startswith(NETWORK)

    def of(task: Any) -> Sysctls:
        own: Sysctls | None = getattr(task.ns.net, "sysctls", None) if network else None
        return values if own is None else own

    def show(task: Any) -> str:
        return of(task).values[path] + "\n"

    def store(task: Any, data: bytes) -> None:
        of(task).write(path, rule, data)

    return TextInode(sb, show, 0o444 if rule is None else 0o644, None if rule is None else store)


def _uts(field: str) -> tuple[Any, Any]:
    def show(task: Any) -> str:
        return f"{getattr(task.uts, field)}\n"

    def store(task: Any, data: bytes) -> None:
        if not capable(task.creds, task.uts.user_ns, CAP_SYS_ADMIN):
            raise Errno(errno.EPERM)
        name = data.split(b"\n")[0].split(b"\0")[0][:HOST_NAME_MAX]
        setattr(task.uts, field, name.decode("utf-8", "surrogateescape"))

    return show, store


def _show_last_pid(task: Any) -> str:
    return f"{task.process.pid_ns.last_pid}\n"


def _store_last_pid(task: Any, data: bytes) -> None:
    """pid_ns_ctl_handler, kernel/pid_namespace.c: the next process is numbered from there."""
    space = task.process.pid_ns
    if not any(capable(task.creds, space.user_ns, each) for each in (cap.CHECKPOINT_RESTORE, CAP_SYS_ADMIN)):
        raise Errno(errno.EPERM)
    (space.last_pid,) = numbers(data, [space.last_pid], (0, PID_MAX))


def _file_nr(task: Any) -> str:
    tables = {id(t.files): t.files for t in task.kernel.tasks.values() if t.files is not None}
    count = len({id(file) for table in tables.values() for file in table.files.values()})
    return f"{count}\t0\t{sysctl(task.kernel).values['fs/file-max']}\n"


def build(sb: SuperBlock, kernel: Kernel) -> TreeInode:
    """The directory /proc/sys."""
    values = sysctl(kernel)
    tree = TreeInode(sb, {})
    for path, _, rule in ROWS:
        tree.put(path.encode(), _row(sb, values, path, rule))
    for field, name in (("nodename", b"kernel/hostname"), ("domainname", b"kernel/domainname")):
        show, store = _uts(field)
        tree.put(name, TextInode(sb, show, 0o644, store))
    tree.put(b"kernel/ns_last_pid", TextInode(sb, _show_last_pid, 0o666, _store_last_pid))
    for name, inode in sysvipc.limits(sb).items():
        tree.put(b"kernel/" + name, inode)
    tree.put(b"kernel/random/boot_id", TextInode(sb, lambda task: values.boot_id + "\n"))
    tree.put(b"kernel/random/uuid", TextInode(sb, lambda task: f"{uuid.uuid4()}\n"))
    tree.put(b"fs/file-nr", TextInode(sb, _file_nr))
    tree.put(b"fs/inode-nr", TextInode(sb, lambda task: "1024\t128\n"))
    tree.put(b"vm/lowmem_reserve_ratio", TextInode(sb, lambda task: "256\t256\t32\t0\t0\n"))
    tree.put(b"debug/exception-trace", TextInode(sb, lambda task: "1\n"))
    tree.put(b"dev/tty/legacy_tiocsti", TextInode(sb, lambda task: "0\n"))
    tree.put(b"abi/vsyscall32", TextInode(sb, lambda task: "0\n"))
    return tree
