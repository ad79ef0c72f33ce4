"""/proc read through system calls, and by the parsers of psutil and procps on a copy of the tree."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess

import psutil
import pytest
from dev_world import CLOSE, FORK, GETDENTS, LSEEK, READLINK, SETUID, DevWorld
from kernel_fakes import BASE, SCRATCH

from kvmsentry.errors import Errno
from kvmsentry.fs import procfs
from kvmsentry.fs.proc import net, sysctl, system
from kvmsentry.fs.vfs import NO_MAGICLINKS
from kvmsentry.mm.shared import SharedMemory


@pytest.fixture
def world() -> DevWorld:
    return DevWorld()


@pytest.fixture
def init(world):
    return world.init()


def test_every_file_can_be_read_and_listed(world, init):
    """No name that readdir tells is a lie, and no text function fails on an ordinary process."""
    refused = {b"attr/current": errno.EINVAL}
    seen = 0

    def visit(path: bytes, depth: int) -> None:
        nonlocal seen
        names = list(world.place(init, path).inode.readdir())
        assert len({name for name, _, _ in names}) == len(names)
        for name, ino, kind in names:
            here = path + b"/" + name
            place = world.place(init, here, 0)
            mode = place.inode.mode
            assert kind == mode >> 12 & 15, here
            mounted = place.dentry is place.mount.root
            assert ino == place.inode.ino or mounted or b"/fd" in path, here
            if kind == 4 and depth:
                visit(here, depth - 1)
            elif kind == 8 and mode & 0o444 and name not in (b"mem", b"pagemap"):
                seen += 1
                content = world.whole(init, here)
                want = next((-number for end, number in refused.items() if here.endswith(end)), None)
                assert isinstance(content, bytes) or content == want, (here, content)
            elif kind == 10:
                place.inode.readlink(init)

    visit(b"/proc", 5)
    visit(b"/sys", 8)
    assert seen > 500


def test_self_and_thread_self(world, init):
    child = world.child(init)
    for task in (init, child):
        n = world.call(task, READLINK, world.put(task, b"/proc/self\0"), SCRATCH + 0x2000, 100)
        assert task.mm.read(SCRATCH + 0x2000, n) == b"%d" % task.tid
        assert world.whole(task, b"/proc/self/stat").startswith(b"%d (a) R " % task.tid)
        assert world.whole(task, b"/proc/thread-self/comm") == b"a\n"


def test_look_ups_keep_their_inodes(world, init):
    first = world.place(init, b"/proc/self/status")
    again = world.place(init, b"/proc/self/status")
    assert first.dentry is again.dentry and first.inode is again.inode


def test_a_process_that_is_gone(world, init):
    child = world.child(init)
    pid = child.tid
    fd = world.open(init, b"/proc/%d/stat" % pid)
    world.call(child, 60, 0)
    assert b") Z " in world.whole(init, b"/proc/%d/stat" % pid)
    assert world.whole(init, b"/proc/%d/cmdline" % pid) == b""
    assert world.call(init, 61, pid, 0, 0, 0) == pid  # wait4
    assert world.whole(init, b"/proc/%d/stat" % pid) == -errno.ENOENT
    assert world.read(init, fd) == -errno.ESRCH
    assert b"%d" % pid not in [name for name, _, _ in world.place(init, b"/proc").inode.readdir()]


def test_stat_has_52_fields_that_mean_what_they_should(world, init):
    child = world.child(init)
    text = world.whole(init, b"/proc/%d/stat" % child.tid).decode()
    head, tail = text.rsplit(") ", 1)
    fields = tail.split()
    assert head == f"{child.tid} (a" and len(fields) == 50
    state, ppid, pgrp, session, tty, tpgid = fields[:6]
    assert (state, ppid, pgrp, session, tty, tpgid) == ("R", "1", "1", "1", "0", "-1")
    assert int(fields[17]) == 1 and int(fields[20]) == child.mm.total_pages * 4096


def test_names_that_try_to_break_lines(world, init):
    init.comm = b"a) R 1\n\xff("
    text = world.whole(init, b"/proc/self/stat")
    assert text.count(b"\n") == 1 and text.startswith(b"1 (a) R 1\\n\xff() R 0 ")
    assert b"Name:\ta) R 1\\n\xff(\n" in world.whole(init, b"/proc/self/status")
    assert world.store(init, b"/proc/self/comm", b"sixteen-letters-long\nx") == 22
    assert init.comm == b"sixteen-letters"


def test_status_parses(world, init):
    rows = dict(line.split(":\t", 1) for line in world.whole(init, b"/proc/self/status").decode().splitlines())
    host = {line.split(":")[0] for line in open("/proc/self/status", encoding="utf-8")}
    missing = host - rows.keys() - {"x86_Thread_features", "x86_Thread_features_locked", "Speculation_Store_Bypass"}
    assert not {name for name in missing if not name.startswith("Speculation")}
    assert rows["Uid"] == "0\t0\t0\t0" and rows["CapEff"] == "000001ffffffffff"
    assert int(rows["VmRSS"].split()[0]) == init.mm.rss_pages * 4


def test_maps_look_like_linux_maps(world, init):
    text = world.whole(init, b"/proc/self/maps").decode()
    pattern = re.compile(
        r"^[0-9a-f]{8,}-[0-9a-f]{8,} [r-][w-][x-][sp] [0-9a-f]{8} [0-9a-f]{2,}:[0-9a-f]{2} \d+ *(\S.*)?$"
    )
    lines = text.splitlines()
    assert lines and all(pattern.match(line) for line in lines)
    assert any(
        line.startswith(f"{BASE + 0x1000:08x}-") and " r-xp " in line and line.endswith("/bin/a") for line in lines
    )
    named = next(line for line in lines if line.endswith("[stack]"))
    assert named.index("[stack]") == 73
    rollup = world.whole(init, b"/proc/self/smaps_rollup").decode()
    total = sum(int(m) for m in re.findall(r"^Rss: +(\d+) kB", world.whole(init, b"/proc/self/smaps").decode(), re.M))
    assert f"Rss:            {total:8d} kB" in rollup


def test_arguments_environment_auxv(world, init):
    assert world.whole(init, b"/proc/self/cmdline") == b"/bin/a\0"
    assert world.whole(init, b"/proc/self/environ") == b"A=1\0"
    auxv = memoryview(world.whole(init, b"/proc/self/auxv")).cast("Q")
    pairs = dict(zip(auxv[::2], auxv[1::2], strict=True))
    assert pairs[6] == 4096 and pairs[9] == BASE + 0x1000 and 0 in pairs
    image = init.mm.image
    init.mm.write(image.arg_start, b"retitled")  # setproctitle(3): the last argument's NUL is overwritten
    assert world.whole(init, b"/proc/self/cmdline") == b"retitled=1\0"


def test_mem_reads_and_writes_memory(world, init):
    child = world.child(init)
    world.put(child, b"child's")
    fd = world.open(init, b"/proc/%d/mem" % child.tid, 2)
    assert world.call(init, LSEEK, fd, SCRATCH, 0) == SCRATCH
    assert world.read(init, fd, 7) == b"child's"
    world.call(init, LSEEK, fd, SCRATCH, 0)
    assert world.write(init, fd, b"init's!") == 7
    assert child.mm.read(SCRATCH, 7) == b"init's!"
    world.call(init, LSEEK, fd, 0x1000, 0)
    assert world.read(init, fd, 7) == -errno.EIO


def test_links(world, init):
    assert world.place(init, b"/proc/self/exe").inode is world.place(init, b"/bin/a").inode
    assert world.place(init, b"/proc/self/root/bin/b").inode is world.place(init, b"/bin/b").inode
    assert world.place(init, b"/proc/self/exe", 0).inode.readlink(init) == b"/bin/a"
    with pytest.raises(Errno):
        world.place(init, b"/proc/self/exe", 1 | NO_MAGICLINKS)
    fd = world.open(init, b"/bin/b")
    link = b"/proc/self/fd/%d" % fd
    assert world.place(init, link, 0).inode.readlink(init) == b"/bin/b"
    assert world.place(init, link, 0).inode.mode == 0o120500
    world.call(init, 87, world.put(init, b"/bin/b\0"))  # unlink
    assert world.place(init, link, 0).inode.readlink(init) == b"/bin/b (deleted)"
    assert world.open(init, link) == fd + 1  # the file itself, not its name
    assert world.whole(init, b"/proc/self/fdinfo/%d" % fd).startswith(b"pos:\t0\nflags:\t0100000\nmnt_id:\t")
    world.call(init, CLOSE, fd)
    assert world.open(init, link) == -errno.ENOENT


def test_pipes_open_again_through_fd(world, init):
    assert world.call(init, 293, SCRATCH + 64, 0) == 0  # pipe2
    near, far = init.mm.read_u32(SCRATCH + 64), init.mm.read_u32(SCRATCH + 68)
    text = world.place(init, b"/proc/self/fd/%d" % near, 0).inode.readlink(init)
    assert re.fullmatch(rb"pipe:\[\d+\]", text)
    again = world.open(init, b"/proc/self/fd/%d" % far, 1)
    assert again > far and world.write(init, again, b"x") == 1 and world.read(init, near) == b"x"


def test_namespaces(world, init):
    child = world.child(init)
    paths = [b"/proc/%d/ns/uts" % task.tid for task in (init, child)]
    assert world.place(init, paths[0], 0).inode.readlink(init) == b"uts:[4026531838]"
    assert world.place(init, paths[0]).inode.ino == world.place(init, paths[1]).inode.ino
    assert world.call(child, 272, 0x04000000) == 0  # unshare(CLONE_NEWUTS)
    assert world.place(init, paths[0]).inode is not world.place(init, paths[1]).inode


def test_strangers_see_what_strangers_may(world, init):
    child = world.child(init)
    assert world.call(child, SETUID, 1000) == 0
    for name in (b"environ", b"auxv", b"maps", b"mem", b"io", b"syscall", b"personality"):
        assert world.whole(child, b"/proc/1/" + name) == -errno.EACCES, name
    for name in (b"stat", b"status", b"cmdline", b"comm", b"statm", b"limits", b"mounts"):
        assert isinstance(world.whole(child, b"/proc/1/" + name), bytes), name
    for link in (b"exe", b"cwd", b"root", b"fd/0", b"ns/uts"):
        assert world.open(child, b"/proc/1/" + link) == -errno.EACCES
    assert world.whole(child, b"/proc/1/wchan") == b"0"
    assert b" 1 1 0 0 0 " in world.whole(child, b"/proc/1/stat")  # addresses are hidden
    assert world.store(child, b"/proc/sys/kernel/pid_max", b"1000") == -errno.EACCES


def test_oom_score_adj(world, init):
    child = world.child(init)
    assert world.store(child, b"/proc/self/oom_score_adj", b"500\n") == 4
    assert world.whole(child, b"/proc/self/oom_score_adj") == b"500\n"
    world.call(child, SETUID, 1000)
    for refused, number in ((b"499", errno.EACCES), (b"1001", errno.EINVAL), (b"x", errno.EINVAL)):
        with pytest.raises(Errno) as error:
            procfs.FILES[b"oom_score_adj"][2](child, child, refused)
        assert error.value.errno == number


def test_a_snapshot_is_consistent_and_seek_makes_a_new_one(world, init):
    fd = world.open(init, b"/proc/sys/kernel/hostname")
    assert world.read(init, fd, 4) == b"kvms"
    world.store(init, b"/proc/sys/kernel/hostname", b"other-name\n")
    assert world.read(init, fd) == b"entry\n"
    assert world.call(init, LSEEK, fd, 0, 0) == 0
    assert world.read(init, fd) == b"other-name\n"
    assert world.kernel.uts.nodename == "other-name"


def test_sysctls(world, init):
    base = b"/proc/sys/"
    assert world.store(init, base + b"vm/swappiness", b" 10 \n") == 5
    assert world.whole(init, base + b"vm/swappiness") == b"10\n"
    for bad in (b"-1", b"201", b"ten", b""):
        assert world.store(init, base + b"vm/swappiness", bad) in (-errno.EINVAL, 0)
    assert world.whole(init, base + b"vm/swappiness") == b"10\n"
    assert world.store(init, base + b"net/ipv4/ip_local_port_range", b"2000 3000") == 9
    assert world.whole(init, base + b"net/ipv4/ip_local_port_range") == b"2000\t3000\n"
    assert world.store(init, base + b"kernel/core_pattern", b"core.%p\n") == 8
    assert world.whole(init, base + b"kernel/core_pattern") == b"core.%p\n"
    assert world.store(init, base + b"kernel/osrelease", b"x") in (-errno.EACCES, -errno.EIO, -errno.EPERM)
    one, two = (world.whole(init, base + b"kernel/random/uuid") for _ in range(2))
    assert one != two and re.fullmatch(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\n", one)
    boot = base + b"kernel/random/boot_id"
    assert world.whole(init, boot) == world.whole(init, boot)
    assert sysctl.sysctl(world.kernel).number("vm/swappiness") == 10


def test_getdents_walks_the_root(world, init):
    fd = world.open(init, b"/proc")
    names = set()
    while n := world.call(init, GETDENTS, fd, SCRATCH + 0x2000, 512):
        assert n > 0
        data, at = init.mm.read(SCRATCH + 0x2000, n), 0
        while at < n:
            length = int.from_bytes(data[at + 16 : at + 18], "little")
            names.add(bytes(data[at + 19 : at + length]).split(b"\0")[0])
            at += length
    assert {b"1", b"self", b"meminfo", b"sys", b"net"} <= names


def test_many_processes_leave_no_directories_behind(world, init):
    root = world.place(init, b"/proc").inode
    for _ in range(80):
        child = world.child(init)
        world.whole(init, b"/proc/%d/stat" % child.tid)
        world.call(child, 60, 0)
        world.call(init, 61, child.tid, 0, 0, 0)
    assert len(root._processes) <= 2 * len(world.kernel.processes) + 65


def test_net_tables_come_from_the_stack_where_there_is_one(world, init):
    assert world.whole(init, b"/proc/net/tcp") == net.DEFAULTS["tcp"].encode()
    world.kernel.net = type("Stack", (), {"proc": staticmethod(lambda name: "rows\n" if name == "tcp" else None)})
    assert world.whole(init, b"/proc/self/net/tcp") == b"rows\n"
    assert world.whole(init, b"/proc/net/udp") == net.DEFAULTS["udp"].encode()


def test_psutil_understands_it(world, init, tmp_path, monkeypatch):
    child = world.child(init)
    world.open(child, b"/bin/b")
    copy = str(tmp_path / "proc")
    world.dump(init, b"/proc", copy, 4)
    monkeypatch.setattr(psutil, "PROCFS_PATH", copy)
    memory = psutil.virtual_memory()
    assert memory.total == world.kernel.frames.limit_pages * 4096 and memory.available <= memory.total
    assert psutil.swap_memory().total == 0
    assert psutil.cpu_times().idle >= 0 and len(psutil.cpu_times(percpu=True)) == len(world.kernel.all_cpus)
    assert abs(psutil.boot_time() - world.kernel.boot_time / 1e9) <= 1
    assert set(psutil.pids()) == {1, child.tid}
    process = psutil.Process(child.tid)
    assert (process.name(), process.ppid(), process.status()) == ("a", 1, "running")
    assert process.cmdline() == ["/bin/a"] and process.exe() == "/bin/a" and process.cwd() == "/"
    assert process.memory_info().rss == child.mm.rss_pages * 4096
    assert process.uids().real == 0 and process.num_threads() == 1 and process.nice() is not None
    assert process.environ() == {"A": "1"}
    assert any(m.path == "/bin/a" for m in process.memory_maps())
    assert process.io_counters().read_count == 0 and process.num_fds() == 1
    assert [f.fd for f in process.open_files()] in ([0], [])  # /bin/b is not on the host
    assert process.threads()[0].id == child.tid
    assert psutil.net_io_counters(pernic=True)["lo"].bytes_sent == 0
    assert {p.mountpoint for p in psutil.disk_partitions(all=True)} >= {"/proc", "/sys", "/dev"}


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs to mount over /proc")
def test_procps_understands_it(world, init, tmp_path):
    """ps, top, free, uptime, pgrep, nproc on a copy of our /proc, in a mount namespace of the host."""
    child = world.child(init)
    world.store(child, b"/proc/self/comm", b"worker")
    copy = str(tmp_path / "proc")
    world.dump(init, b"/proc", copy, 4)
    if subprocess.run(["unshare", "-mpf", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")

    def tool(command: str) -> str:
        script = f"mount --bind {copy} /proc && exec {command}"  # as pid 1, which the copy knows
        done = subprocess.run(["unshare", "-mpf", "sh", "-c", script], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    if shutil.which("ps"):
        rows = {line.split()[1]: line.split() for line in tool("ps aux").splitlines()[1:]}
        assert rows[str(child.tid)][0] == "root" and rows[str(child.tid)][-1] == "/bin/a"
        assert [str(child.tid), "worker"] in [
            line.split()[:2] for line in tool("ps -eo pid,comm,stat,wchan").splitlines()
        ]
    if shutil.which("free"):
        assert int(tool("free -k").splitlines()[1].split()[1]) == world.kernel.frames.limit_pages * 4
    if shutil.which("top"):
        assert "worker" in tool("env TERM=dumb top -b -n1 -w 200")
    if shutil.which("uptime"):
        assert "load average" in tool("uptime")
    if shutil.which("pgrep"):
        assert tool("pgrep worker").strip() == str(child.tid)


def test_forks_see_one_table(world, init):
    assert world.call(init, FORK) == 2
    assert world.whole(init, b"/proc/1/task/1/children") == b"2 "


def test_time_begins_with_this_kernel(world, init):
    """uptime, start times and CLOCK_BOOTTIME count from the same moment, which is not the host's boot."""
    clock = [0]
    world.kernel.now = lambda: clock[0]
    clock[0] = 100_000_000_000
    child = world.child(init)
    clock[0] = 250_000_000_000
    assert world.whole(init, b"/proc/uptime").split()[0] == b"250.00"
    assert world.whole(init, b"/proc/%d/stat" % child.tid).rsplit(b") ", 1)[1].split()[19] == b"10000"
    assert world.call(init, 228, 7, SCRATCH) == 0  # clock_gettime(CLOCK_BOOTTIME)
    assert init.mm.read_u64(SCRATCH) == 250


def test_idle_time_never_goes_back(world, init, monkeypatch):
    """What a process has used is known only some time after."""
    monkeypatch.setattr(world.kernel, "now", lambda: 100 * 10**9)
    before = float(world.whole(init, b"/proc/uptime").split()[1])
    monkeypatch.setattr(system, "busy_ns", lambda kernel: 10 * 10**9)
    assert float(world.whole(init, b"/proc/uptime").split()[1]) == before > 0


def test_pages_that_nobody_else_maps_are_not_shared(world, init):
    """Pss counts a file's page whole where only one address space maps the file."""

    def sums() -> tuple[int, int, int]:
        text = world.whole(init, b"/proc/self/smaps_rollup").decode()
        return tuple(int(re.search(rf"^{name}: +(\d+) kB", text, re.M)[1]) for name in ("Rss", "Pss", "Shared_Clean"))

    backing = SharedMemory(world.kernel.frames, 8 * 4096)
    address = init.mm.mmap(0, 8 * 4096, 3, 1, backing, 0)
    init.mm.write(address, bytes(8 * 4096))
    rss, pss, shared = sums()
    assert rss == pss and not shared
    child = world.kernel.tasks[world.call(init, FORK)]
    child.mm.read(address, 8 * 4096)
    assert sums()[1] <= pss - 16 and sums()[2] >= 32  # and what fork left to both
