"""What gdb says of a core file inside is what it says natively."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

PROGRAM = r"""
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>
static volatile int ready;
__attribute__((noinline)) static int deeper(int n) { if (!n) *(volatile int *)0x1238 = 1; return deeper(n - 1) + n; }
static void *sleeps(void *argument) { ready = 1; pause(); return argument; }
int main(void)
{
	struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };
	pthread_t thread;

	setrlimit(RLIMIT_CORE, &all);
	pthread_create(&thread, NULL, sleeps, NULL);
	while (!ready)
		usleep(1000);
	usleep(20000);
	return deeper(3);
}
"""
GDB = (
    "gdb -q -nx -batch -ex 'thread apply all backtrace' -ex 'print $_siginfo._sifields._sigfault.si_addr'"
    " -ex 'info registers rip eflags cs' -ex 'info auxv'"
)


def _seen(text: str) -> tuple[list[str], list[str], bool]:
    """Function names of the backtraces, what $_siginfo and the registers say, and whether there was an auxv."""
    names = re.findall(r"^#\d+ .*?(\w+) \(", text, re.MULTILINE)
    values = re.findall(r"^(?:\$1 = .*|rip .*<.*>|cs .*)$", text, re.MULTILINE)
    return names, [re.sub(r"0x[0-9a-f]{6,}", "ADDRESS", value) for value in values], "AT_RANDOM" in text


def test_gdb_reads_it_alike(tmp_path: pathlib.Path, kvmsentry_do: list[str]) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("no gdb here")
    source, program = tmp_path / "crash.c", tmp_path / "crash"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-O0", "-g", "-pthread", "-o", program, source], check=True)

    def look(prefix: list[str], script: str) -> str:
        return subprocess.run(
            [*prefix, "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, errors="replace"
        ).stdout

    command = f"{GDB} {program} core"
    native = _seen(look([], f"rm -f core; {program}; {command}"))
    if "deeper" not in native[0]:
        pytest.skip("core_pattern is not `core` here")
    assert native[0].count("deeper") >= 4 and "pause" in " ".join(native[0]), native
    text = look(kvmsentry_do, f"cd {tmp_path}; rm -f core; {program}; {command}")
    assert _seen(text) == native, text
