"""procfs: the file system at /proc, proc(5).

    root --self--> "42"      --thread-self--> "42/task/43"      --sys, net, meminfo ...--> fs/proc/
      \\--42--> ProcessInode --status, fd, maps ...--> rows below     --task--> --43--> ProcessInode of a thread

Nothing is believed from the name cache, but the inodes stay the same as long as the process lives, so that a look-up
costs two
dictionary accesses and makes no garbage. What is inside is made when it is read.
"""

from __future__ import annotations

import errno
import stat as st
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs.proc import idmaps, links, mapfiles, memory, mounttable, net, process, sysctl, system, sysvipc
from kvmsentry.fs.proc.access import may_look
from kvmsentry.fs.proc.nodes import KernelSuper, LinkInode, TextInode, TreeInode
from kvmsentry.fs.vfs import DT_DIR, DT_LNK, DT_REG, File, Inode, Path, SuperBlock

if TYPE_CHECKING:
    from kvmsentry.kernel.kernel import Kernel
    from kvmsentry.kernel.pidns import PidNamespace
    from kvmsentry.kernel.task import Process, Task

PROC_SUPER_MAGIC = 0x9FA0  # uapi/linux/magic.h

Show = Callable[[Any, Any], "str | bytes"]
Take = Callable[[Any, Any, bytes], None]


def _fixed(value: str) -> Show:
    return lambda reader, target: value


# name: (mode, text(reader, target), store(writer, target, data))
FILES: dict[bytes, tuple[int, Show, Take | None]] = {
    b"auxv": (0o400, memory.auxv, None),
    b"cgroup": (0o444, _fixed("0::/\n"), None),
    b"clear_refs": (0o200, _fixed(""), memory.clear_refs),
    b"cmdline": (0o444, memory.cmdline, None),
    b"comm": (0o644, process.comm, process.set_comm),
    b"coredump_filter": (0o644, process.coredump_filter, process.set_coredump_filter),
    b"cpuset": (0o444, _fixed("/\n"), None),
    b"environ": (0o400, memory.environ, None),
    b"io": (0o400, process.io, None),
    b"limits": (0o444, process.limits, None),
    b"loginuid": (0o644, process.loginuid, process.set_loginuid),
    b"maps": (0o444, memory.maps, None),
    b"oom_adj": (0o644, process.oom_adj, process.set_oom_adj),
    b"oom_score": (0o444, process.oom_score, None),
    b"oom_score_adj": (0o644, process.oom_score_adj, process.set_oom_score_adj),
    b"personality": (0o400, process.personality, None),
    b"sched": (0o444, process.sched, None),
    b"schedstat": (0o444, process.schedstat, None),
    b"sessionid": (0o444, _fixed("4294967295"), None),
    b"smaps": (0o444, memory.smaps, None),
    b"smaps_rollup": (0o444, memory.smaps_rollup, None),
    b"stack": (0o400, process.stack, None),
    b"statm": (0o444, memory.statm, None),
    b"syscall": (0o400, process.syscall, None),
    b"timers": (0o444, process.timers, None),
    b"timerslack_ns": (0o666, process.timerslack, process.set_timerslack),
    b"wchan": (0o444, process.wchan, None),
}
_MOUNTS: dict[bytes, tuple[int, Show]] = {
    b"mountinfo": (0o444, process.mountinfo),
    b"mounts": (0o444, process.mounts),
    b"mountstats": (0o400, process.mountstats),
}
_NUMBERED = {b"stat": process.stat, b"status": process.status}  # they show pids: those of the mount's namespace
_ONLY_PROCESS = frozenset((b"mountstats", b"coredump_filter", b"timers", b"timerslack_ns"))
_LINKS: dict[bytes, Callable[[Any], Any]] = {
    b"cwd": lambda task: task.fs.cwd if task.fs is not None else None,
    b"exe": lambda task: task.process.exe if task.mm is not None else None,
    b"root": lambda task: task.fs.root if task.fs is not None else None,
}
_DIRECTORIES = (b"attr", b"fd", b"fdinfo", b"net", b"ns")


class ProcessInode(Inode):
    """/proc/PID, or with a `task` /proc/PID/task/TID."""

    sb: ProcSuper

    def __init__(self, sb: ProcSuper, process: Process, task: Task | None = None) -> None:
        super().__init__(sb, st.S_IFDIR | 0o555)
        self.process, self.task = process, task
        self._children: dict[bytes, Inode] = {}
        self.refresh()

    def open(self, task: Task, path: Path, flags: int) -> File:
        """EPERM or ENOENT when the mount hides it."""
        if self.sb.hides:
            self.sb.look(task, self, b"")
        return super().open(task, path, flags)

    def target(self) -> Task:
        """The thread it is about; ESRCH when it is no more."""
        task = self.task
        if task is None:
            process = self.process
            if self.sb.kernel.processes.get(process.pid) is not process:
                raise Errno(errno.ESRCH)
            return process.leader
        if self.process.threads.get(task.tid) is not task:
            raise Errno(errno.ESRCH)
        return task

    def refresh(self) -> None:
        """The owner is whose process it is; root's if it may not be looked into (task_dump_owner)."""
        process = self.process
        if process.dumpable == 1:
            creds = (self.task or process.leader).creds
            self.uid, self.gid = creds.euid, creds.egid
        else:
            self.uid = self.gid = 0

    def lookup(self, name: bytes) -> Inode:
        """One of the rows above."""
        self.target()
        child = self._children.get(name)
        if child is None:
            child = self._make(name)
            self._children[name] = child
        self.refresh()
        if child.uid != self.uid or child.gid != self.gid:
            if name != b"net":
                child.uid, child.gid = self.uid, self.gid
        return child

    def _make(self, name: bytes) -> Inode:
        sb, target = self.sb, self.target
        row = FILES.get(name)
        if row is not None and not (self.task is not None and name in _ONLY_PROCESS):
            return _text(sb, target, row)
        if name in _MOUNTS and not (self.task is not None and name in _ONLY_PROCESS):
            mode, show = _MOUNTS[name]
            return mounttable.MountsInode(sb, target, show, mode)
        if name in _NUMBERED:
            return _numbered(sb, target, _NUMBERED[name], name == b"stat" and self.task is not None)
        if name in idmaps.NAMES and self.task is None:
            return idmaps.IdMapInode(sb, target, name.decode())
        if name == b"timens_offsets" and self.task is None:
            return idmaps.OffsetsInode(sb, target)
        if name in _LINKS:
            return links.PlaceLink(sb, target, _LINKS[name])
        if name == b"mem":
            return memory.MemInode(sb, target)
        if name == b"pagemap":
            return memory.PagemapInode(sb, target)
        if name == b"fd" or name == b"fdinfo":
            return links.FdDirectory(sb, target, name == b"fdinfo")
        if name == b"map_files" and self.task is None:
            return mapfiles.MapDirectory(sb, target)
        if name == b"ns":
            return TreeInode(sb, {kind: links.NsLink(sb, target, kind) for kind in links.NAMES}, 0o511)
        if name == b"net":
            return sb.net
        if name == b"attr":
            return TreeInode(sb, {b"current": _text(sb, target, (0o444, process.no_label, None))})
        if name == b"task" and self.task is None:
            return ThreadsInode(sb, self.process)
        if name == b"children" and self.task is not None:
            return _numbered(sb, target, process.children, False)
        raise Errno(errno.ENOENT)

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """All rows."""
        names = [*((name, DT_DIR) for name in _DIRECTORIES), *((name, DT_LNK) for name in _LINKS)]
        names += [(b"mem", DT_REG), (b"pagemap", DT_REG)]
        if self.task is None:
            names += [(b"task", DT_DIR), (b"map_files", DT_DIR)]
            names += [(name, DT_REG) for name in (*FILES, *_MOUNTS, *_NUMBERED, *idmaps.NAMES, b"timens_offsets")]
        else:
            names.append((b"children", DT_REG))
            names += [(name, DT_REG) for name in (*FILES, *_MOUNTS, *_NUMBERED) if name not in _ONLY_PROCESS]
        for name, kind in names:
            yield name, self.lookup(name).ino, kind


def _text(sb: SuperBlock, target: Callable[[], Task], row: tuple[int, Show, Take | None]) -> Inode:
    mode, show, take = row

    def text(reader: Task) -> str | bytes:
        return show(reader, target())

    def store(writer: Task, data: bytes) -> None:
        assert take is not None
        take(writer, target(), data)

    return TextInode(sb, text, mode, store if take is not None else None)


def _numbered(sb: ProcSuper, target: Callable[[], Task], show: Callable[..., str], thread: bool) -> Inode:
    """A file that shows pids."""
    if thread:
        return TextInode(sb, lambda reader: show(reader, target(), sb.pid_ns, True))
    return TextInode(sb, lambda reader: show(reader, target(), sb.pid_ns))


class ThreadsInode(Inode):
    """/proc/PID/task."""

    sb: ProcSuper

    def __init__(self, sb: ProcSuper, process: Process) -> None:
        super().__init__(sb, st.S_IFDIR | 0o555)
        self.process = process
        self._children: dict[int, ProcessInode] = {}

    def lookup(self, name: bytes) -> Inode:
        """A living thread."""
        tid = _pid(name)
        task = self.sb.pid_ns.tasks.get(tid)
        if task is None or task.process is not self.process:
            self._children.pop(tid, None)
            raise Errno(errno.ENOENT)
        child = self._children.get(tid)
        if child is None or child.task is not task:
            child = self._children[tid] = ProcessInode(self.sb, self.process, task)
        child.refresh()
        return child

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """All threads."""
        for tid in sorted(map(self.sb.pid_ns.tid_of, self.process.threads.values())):
            name = b"%d" % tid
            try:
                yield name, self.lookup(name).ino, DT_DIR
            except Errno:
                continue

    def refresh(self) -> None:
        """One link for each thread."""
        self.nlink = 2 + len(self.process.threads)


def _pid(name: bytes) -> int:
    """A decimal number without leading zeros; ENOENT."""
    if not name.isdigit() or len(name) > 9 or name[0] == 48:
        raise Errno(errno.ENOENT)
    return int(name)


class RootInode(TreeInode):
    """/proc itself."""

    sb: ProcSuper

    def __init__(self, sb: ProcSuper, entries: dict[bytes, Any]) -> None:
        super().__init__(sb, entries)
        self.ino = 1
        self._processes: dict[int, ProcessInode] = {}

    def lookup(self, name: bytes) -> Inode:
        """A process, or one of the fixed names."""
        if name in self.entries:
            return super().lookup(name)
        pid = _pid(name)
        space = self.sb.pid_ns
        process, thread = space.processes.get(pid), None
        if process is None:  # the directory of a thread can be entered by its number, though it is not listed
            thread = space.tasks.get(pid)
            if thread is None:
                self._processes.pop(pid, None)
                raise Errno(errno.ENOENT)
            process = thread.process
        child = self._processes.get(pid)
        if child is None or child.process is not process:
            known = self._processes
            if len(known) > 2 * len(space.processes) + 64:
                self._processes = known = {p: i for p, i in known.items() if space.processes.get(p) is i.process}
            child = known[pid] = ProcessInode(self.sb, process)
        child.refresh()
        return child

    def readdir(self) -> Iterable[tuple[bytes, int, int]]:
        """The fixed names, then all processes by number."""
        yield from super().readdir()
        for pid in sorted(self.sb.pid_ns.processes):
            name = b"%d" % pid
            try:
                yield name, self.lookup(name).ino, DT_DIR
            except Errno:
                continue

    def refresh(self) -> None:
        """A link for each process, as Linux counts."""
        self.nlink = 2 + len(self.sb.pid_ns.processes)


def _self(task: Task | None, ns: PidNamespace) -> bytes:
    pid = ns.pid_of(task.process) if task is not None else 0
    if not pid:
        raise Errno(errno.ENOENT)
    return b"%d" % pid


def _thread_self(task: Task | None, ns: PidNamespace) -> bytes:
    pid = _self(task, ns)
    assert task is not None
    return b"%s/task/%d" % (pid, ns.tid_of(task))


HIDEPID = {"off": 0, "noaccess": 1, "invisible": 2, "ptraceable": 4, "0": 0, "1": 1, "2": 2, "4": 4}
NO_ACCESS, INVISIBLE, NOT_PTRACEABLE = 1, 2, 4  # include/linux/proc_fs.h
ALWAYS = (b"self", b"thread-self")  # with subset=pid


class ProcSuper(KernelSuper):
    """The file system, showing the processes of one PID namespace (the first one unless told). Make one before the
    Sentry is locked down: it looks once at the host's processor."""

    magic = PROC_SUPER_MAGIC
    fstype = "proc"
    hide_pid = gid = 0  # proc(5), mount options
    pid_only = False

    def __init__(self, kernel: Kernel, pid_ns: PidNamespace | None = None) -> None:
        super().__init__(kernel)
        self.pid_ns = pid_ns if pid_ns is not None else kernel.pid_ns
        system.host_processor()
        self.net = net.build(self)
        entries = system.entries()
        entries[b"self"] = LinkInode(self, lambda task: _self(task, self.pid_ns))
        entries[b"thread-self"] = LinkInode(self, lambda task: _thread_self(task, self.pid_ns))
        entries[b"sys"] = sysctl.build(self, kernel)
        entries[b"tty"] = TreeInode(self, {b"drivers": TextInode(self, lambda task: _TTY_DRIVERS),
                                           b"ldiscs": TextInode(self, lambda task: "n_tty       0\n")})  # fmt: skip
        entries[b"sysvipc"] = TreeInode(self, sysvipc.tables())
        entries[b"bus"] = TreeInode(self, {})
        entries[b"driver"] = TreeInode(self, {})
        entries[b"fs"] = TreeInode(self, {})
        entries[b"irq"] = TreeInode(self, {})
        self.root: RootInode = RootInode(self, entries)

    def configure(self, options: dict[str, str]) -> None:
        """Take mount options of proc(5): hidepid, gid, subset; EINVAL. What is not named stays."""
        hide_pid, gid, pid_only = self.hide_pid, self.gid, self.pid_only
        for name, value in options.items():
            if name == "gid" and value.isdigit():
                gid = int(value)
            elif name == "hidepid" and value in HIDEPID:
                hide_pid = HIDEPID[value]
            elif name == "subset" and not set(value.split(",")) - {"", "pid"}:
                pid_only = "pid" in value.split(",")
            else:
                raise Errno(errno.EINVAL)
        self.hide_pid, self.gid, self.pid_only = hide_pid, gid, pid_only
        self.hides = bool(hide_pid or pid_only)
        names = {number: name for name, number in HIDEPID.items() if not name.isdigit()}
        shown = [f"gid={gid}"] if gid else []
        shown += [f"hidepid={names[hide_pid]}"] if hide_pid else []
        self.options = ",".join([*shown, "subset=pid"] if pid_only else shown)

    def permitted(self, task: Task, process: Process, least: int) -> bool:
        """has_pid_permissions in fs/proc/base.c: may `task` do what hidepid=`least` and above keep from strangers?"""
        creds = task.creds
        if self.hide_pid != NOT_PTRACEABLE and (
            self.hide_pid < least or self.gid == creds.fsgid or self.gid in creds.groups
        ):
            return True
        return may_look(task, process.leader)

    def look(self, task: Task, directory: Inode, name: bytes) -> None:
        """ENOENT or EPERM: see `permitted`; proc_pid_permission."""
        if directory is self.root:
            if self.pid_only and name in self.root.entries and name not in ALWAYS:
                raise Errno(errno.ENOENT)
            if not name.isdigit() or self.hide_pid < INVISIBLE:
                return
            thread = self.pid_ns.tasks.get(_pid(name))
            if thread is not None and not self.permitted(task, thread.process, INVISIBLE):
                raise Errno(errno.ENOENT)
        elif directory.__class__ is ProcessInode and directory.task is None:
            if not self.permitted(task, directory.process, NO_ACCESS):
                raise Errno(errno.EPERM if self.hide_pid == NO_ACCESS else errno.ENOENT)

    def visible(self, task: Task, directory: Inode, entries: Iterable[tuple[bytes, int, int]]) -> Iterable[Any]:
        """The names in /proc that are left."""
        if directory is not self.root:
            if directory.__class__ is ProcessInode and directory.task is None:
                self.look(task, directory, b"")
            return entries
        seen = []
        for entry in entries:
            name = entry[0]
            if name.isdigit():
                process = self.pid_ns.processes.get(int(name))
                if process is None or not self.permitted(task, process, INVISIBLE):
                    continue
            elif self.pid_only and name not in ALWAYS:
                continue
            seen.append(entry)
        return seen


_TTY_DRIVERS = (
    "/dev/tty             /dev/tty        5       0 system:/dev/tty\n"
    "/dev/console         /dev/console    5       1 system:console\n"
    "/dev/ptmx            /dev/ptmx       5       2 system\n"
    "pty_slave            /dev/pts      136 0-1023 pty:slave\n"
    "pty_master           /dev/ptm      128 0-1023 pty:master\n"
)
