"""What is measured. A benchmark is a row here; one program may serve several rows in one run."""

from __future__ import annotations

import glob
import os
import shutil
from dataclasses import dataclass, field

from kvmsentry.errors import UserError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
GROUPS = {
    "calls": "system calls",
    "memory": "memory",
    "processes": "processes and hand-overs",
    "workloads": "workloads",
}
UNITS = {"µs": 1e3, "ms": 1e6}  # ns in one


@dataclass(frozen=True)
class Benchmark:
    """One figure. `program` names a C program of ours that measures inside and prints JSON; without one, `argv` is
    timed from outside, from its start to its end. In `argv`, {scratch} is a directory in memory, {port} a free port,
    {data} the directory of our sources."""

    name: str
    group: str
    unit: str
    what: str
    program: str = ""
    argv: tuple[str, ...] = ()
    needs: tuple[str, ...] = field(default=())
    limit: float = 60.0  # seconds for one run
    prints: bool = False  # `argv` prints its figure itself, as programs of ours do

    def missing(self) -> str:
        """What it needs and is not installed, "" when all is there."""
        absent = [name for name in self.needs if not present(name)]
        return f"{', '.join(absent)} not installed" if absent else ""


def present(name: str) -> bool:
    """An absolute path (may be a pattern), or a command along PATH."""
    return bool(glob.glob(name)) if name.startswith("/") else shutil.which(name, path=PATH) is not None


def _calls() -> list[Benchmark]:
    rows = {
        "getpid": "getpid, by syscall(2): into the kernel and back",
        "clock": "clock_gettime(CLOCK_MONOTONIC), as the C library asks it",
        "read-1": "pread of 1 byte of a file in memory",
        "read-4k": "pread of 4 KiB of a file in memory",
        "write-1": "pwrite of 1 byte to a file in memory",
        "write-4k": "pwrite of 4 KiB to a file in memory",
        "zero-1": "read of 1 byte of /dev/zero",
        "zero-4k": "read of 4 KiB of /dev/zero",
        "null-1": "write of 1 byte to /dev/null",
        "null-4k": "write of 4 KiB to /dev/null",
        "open": "open and close of a file in memory",
        "stat": "stat of a file in memory",
        "signal": "a signal to the thread itself: sent, handled, returned from",
    }
    return [Benchmark(name, "calls", "µs", what, "calls") for name, what in rows.items()]


def _micro() -> list[Benchmark]:
    return [
        *_calls(),
        Benchmark("mmap", "memory", "µs", "mmap of 64 KiB, its 16 pages touched, munmap", "memory"),
        Benchmark("touch", "memory", "µs", "first touch of a page, in a fresh mapping of 4 MiB", "memory"),
        Benchmark("fork", "processes", "µs", "fork, exit, wait", "process"),
        Benchmark("exec", "processes", "µs", "fork, exec of a small dynamic program, exit, wait", "process"),
        Benchmark("pipe", "processes", "µs", "a byte to another process and one back, through pipes", "pingpong"),
        Benchmark("futex", "processes", "µs", "a word handed to another thread and back, by futex", "pingpong"),
        Benchmark("socketpair", "processes", "µs", "a byte to another process and one back, AF_UNIX", "pingpong"),
    ]


LOOP = "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done"
NGINX_CONF = (
    "daemon off; master_process off; pid {scratch}/nginx.pid; error_log stderr crit; events { worker_connections 64; } "
    "http { access_log off; client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p; "
    "fastcgi_temp_path {scratch}/f; uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s; "
    "keepalive_requests 100000; server { listen 127.0.0.1:{port}; root {data}; index bench.h; } }"
)
NGINX_START = 'echo "$0" > {scratch}/nginx.conf; exec nginx -c {scratch}/nginx.conf -e stderr'
REDIS = ("redis-server", "--port", "{port}", "--bind", "127.0.0.1", "--save", "", "--dir", "{scratch}",
         "--loglevel", "warning")  # fmt: skip


def _workloads() -> list[Benchmark]:
    def timed(name: str, what: str, *argv: str, needs: tuple[str, ...] = ()) -> Benchmark:
        return Benchmark(name, "workloads", "ms", what, "", argv, needs or (argv[0],))

    def served(name: str, what: str, *needs: str) -> Benchmark:
        argv = ("sh", "{data}/servers.sh", name, "{port}", "{scratch}")
        return Benchmark(name, "workloads", "µs", what, "", argv, needs, prints=True)

    return [
        timed("true", "/bin/true, from shell to shell: a sandbox's whole life", "/bin/true"),
        timed("python", "python3 starts and prints", "python3", "-c", "print(1)"),
        timed("sh100", "a shell forks and executes /bin/true 100 times", "sh", "-c", LOOP),
        timed("find", "find over /usr/lib and /usr/share", "sh", "-c", "find /usr/lib /usr/share >/dev/null",
              needs=("find",)),
        timed("dd", "dd of 20,000 blocks of 4 KiB from /dev/zero to a file in memory",
              "dd", "if=/dev/zero", "of={scratch}/dd", "bs=4096", "count=20000", "status=none"),
        timed("tar", "tar of Python's library into a pipe", "sh", "-c", "cd /usr/lib; tar cf - python3.* | wc -c",
              needs=("tar", "/usr/lib/python3.*")),
        timed("compile", "gcc -O1 compiles and links one file of this benchmark",
              "gcc", "-O1", "-pthread", "-o", "{scratch}/compiled", "{data}/pingpong.c"),
        Benchmark("cpu", "workloads", "ms", "arithmetic, no system call: 10 million steps, timed inside", "cpu"),
        Benchmark("redis", "workloads", "µs", "a redis request (SET and GET in turn), 8 connections over loopback",
                  "serve", ("redis", "redis", "{port}", "8", "2000", "--", *REDIS), ("redis-server",)),
        Benchmark("nginx", "workloads", "µs", "a file from nginx over HTTP, 8 connections kept open over loopback",
                  "serve", ("nginx", "http", "{port}", "8", "1000", "--", "sh", "-c", NGINX_START, NGINX_CONF),
                  ("nginx",)),
        served("redis-50", "a redis request (mean of SET and GET), redis-benchmark with 50 connections", "redis-server",
               "redis-benchmark"),
        served("redis-pipe", "the same, 16 requests in a pipeline", "redis-server", "redis-benchmark"),
        served("nginx-wrk", "a page from nginx, wrk with 50 connections for a second", "nginx", "wrk"),
    ]  # fmt: skip


BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in (*_micro(), *_workloads())}
EXTRAS = {
    "startup": "what starting a sandbox consists of",
    "idle": "memory and processor time of a sandbox that sleeps",
}


def choose(names: list[str]) -> list[str]:
    """Names of benchmarks, groups and extras as names of benchmarks and extras, in the catalogue's order; all for none.
    UserError for an unknown one, which lists the known."""
    if not names:
        return [*BENCHMARKS, *EXTRAS]
    chosen = set()
    for name in names:
        if name in BENCHMARKS or name in EXTRAS:
            chosen.add(name)
        elif name in GROUPS:
            chosen |= {row.name for row in BENCHMARKS.values() if row.group == name}
        else:
            known = ", ".join([*BENCHMARKS, *EXTRAS])
            raise UserError(f"unknown benchmark {name!r} (known: {known}; groups: {', '.join(GROUPS)})", 125)
    return [name for name in (*BENCHMARKS, *EXTRAS) if name in chosen]


def fill(words: tuple[str, ...], values: dict[str, str]) -> list[str]:
    """`words` with what stands in braces put in."""
    filled = []
    for word in words:
        for key, value in values.items():
            word = word.replace("{" + key + "}", value)
        filled.append(word)
    return filled


SOURCES = os.path.dirname(os.path.abspath(__file__))
