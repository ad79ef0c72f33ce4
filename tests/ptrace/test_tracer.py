"""What is special to the ptrace platform: stub processes, signals, gates that are not ours. See tests/platforms too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kvmsentry.ptrace._ptrace import ffi
from platform_bench import CODE, DATA, EXEC, READ, STACK, WRITE
from platform_bench import PtraceBench as Bench

from kvmsentry.errors import Errno, HostError
from kvmsentry.ptrace.tracer import Tracer, lib
from kvmsentry.vcpu import layout
from kvmsentry.vcpu.layout import (
    EV_EXCEPTION,
    EV_FAULT,
    EV_HOST_ERROR,
    EV_KICKED,
    EV_SYSCALL,
    RAX,
    RBX,
    RCX,
    RIP,
    RSP,
)

NAMES = ("rbx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r12", "r13", "r14", "r15")


# Calls and registers.


def test_avx_survives_calls_and_the_executor(bench: Bench) -> None:
    pattern = os.urandom(512)
    bench.memory.view[bench.data : bench.data + 512] = pattern
    ctx = bench.run("p_avx")
    state = ctx.xsave()
    assert len(state) == bench.platform.xsave_size and state[160:176] == pattern[:16]
    bench.mmu.map(0x900000, bench.take(), 4096, READ)  # the list is executed by this thread
    ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003
    stored = bytes(bench.memory.view[bench.data + 1024 : bench.data + 1024 + 512])
    assert stored[:64] == pattern[:64] and stored[480:512] == pattern[480:512]
    # A fork's child begins with the parent's state, another thread with the initial one.
    child = bench.context("p_seen")
    child.set_xsave(state)
    child.reload()
    assert bench.wait() is child
    assert bytes(bench.memory.view[bench.data : bench.data + 16]) == pattern[:16]
    fresh = bench.context("p_seen")
    fresh.reload()
    assert bench.wait() is fresh
    seen = bytes(bench.memory.view[bench.data : bench.data + 48])
    assert seen[:16] == bytes(16) and seen[32:48] == bytes(16)
    assert int.from_bytes(seen[16:20], "little") == 0x1F80 and int.from_bytes(seen[20:22], "little") == 0x37F
    for each in (ctx, child, fresh):
        each.release()


# Faults and exceptions.


def test_vsyscall_page_does_not_answer(bench: Bench) -> None:
    """The host's page cannot be unmapped; a call into it is a fault at its address, with nothing done."""
    stack = STACK + 0x2FF0
    gpa = bench.mmu.entry(STACK + 0x2000) & 0x000F_FFFF_FFFF_F000
    bench.memory.words[(gpa + 0xFF0) >> 3] = bench.address("p_ud2")
    ctx = bench.context("p_spin")
    ctx.regs[RIP], ctx.regs[RSP] = 0xFFFFFFFFFF600000, stack
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.regs[RIP]) == (EV_FAULT, 0xFFFFFFFFFF600000, 0xFFFFFFFFFF600000)
    assert ctx.regs[RSP] == stack
    ctx.release()


def plant(bench: Bench, code: bytes) -> int:
    """Code of the test's own, behind the programs; its address."""
    at = 3 * 4096
    bench.memory.view[bench.code_gpa + at : bench.code_gpa + at + len(code)] = code
    return CODE + at


def test_int80_is_no_gate(bench: Bench) -> None:
    ctx = bench.context("p_spin", rax=20, rcx=0x1234, rbx=9)
    ctx.regs[RIP] = plant(bench, b"\xcd\x80\x0f\x0b")
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.vector) == (EV_EXCEPTION, 13)
    assert ctx.regs[RIP] == CODE + 3 * 4096 and ctx.regs[RAX] == 20 and ctx.regs[RCX] == 0x1234
    ctx.release()


def test_compatibility_mode_is_refused(bench: Bench) -> None:
    """A far return to the host's 32-bit code segment: nothing runs there that we would answer."""
    # push 0x23; push rbx; lretq
    ctx = bench.context("p_spin", rbx=CODE + 3 * 4096 + 16)
    ctx.regs[RIP] = plant(bench, b"\x6a\x23\x53\x48\xcb".ljust(16, b"\x90") + b"\xb8\x14\0\0\0\xcd\x80\x0f\x0b")
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.vector) == (EV_EXCEPTION, 13)
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


# Kicks, waiting.


def test_signals_from_the_host_do_not_reach_the_application(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    pid = bench.mmu.stub.pid
    for signo in (signal.SIGUSR1, signal.SIGTERM, signal.SIGSEGV, signal.SIGTRAP, signal.SIGSTOP, signal.SIGCONT):
        os.kill(pid, signo)
        assert bench.platform.wait(5_000_000) is None
    ctx.kick()
    assert bench.wait() is ctx and ctx.event == EV_KICKED
    ctx.release()


def test_a_stub_killed_by_the_host_is_a_host_error(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    os.kill(bench.mmu.stub.pid, signal.SIGKILL)
    assert bench.wait() is ctx and (ctx.event, ctx.error_code) == (EV_HOST_ERROR, errno.ESRCH)
    ctx.release()
    mmu, _ = bench.space()
    ctx = bench.context("p_loop", mmu, rbx=1)
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    os.kill(mmu.stub.pid, signal.SIGKILL)  # while it is stopped: the answer finds nobody
    ctx.reply(0)
    assert bench.wait() is ctx and (ctx.event, ctx.error_code) == (EV_HOST_ERROR, errno.ESRCH)
    with pytest.raises(Errno):
        bench.platform.new_context(mmu)
    ctx.release()
    mmu.destroy()
    mmu, _ = bench.space()
    ctx = bench.context("p_loop", mmu, rbx=1)  # not with what is left of the dead one
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


# Threads and address spaces.


def test_a_thread_is_made_while_all_others_compute(bench: Bench) -> None:
    first = bench.context("p_spin")
    first.reload()
    second = bench.context("p_loop", rbx=1)  # stops the first for the clone, and lets it go on
    second.reload()
    assert bench.wait() is second and second.nr == 39
    first.kick()
    assert bench.wait() is first and first.event == EV_KICKED and first.regs[RBX] > 0
    first.release()
    second.release()


def test_switch_is_exec_and_the_old_stub_serves_again(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=1)
    pid = bench.mmu.stub.pid
    mmu, data = bench.space()
    bench.memory.words[data >> 3] = 4711
    ctx.switch(mmu)
    for i in range(20):
        ctx.regs[i] = 0
    ctx.regs[layout.RDI], ctx.regs[RIP] = DATA, bench.address("p_load")
    ctx.reload()
    bench.mmu.map(0xA00000, bench.take(), 4096, READ)
    bench.mmu.destroy()
    assert bench.wait() is ctx and (ctx.nr, ctx.args[0]) == (1003, 4711)
    third, _ = bench.space()
    again = bench.context("p_load", third, rdi=0xA00000)
    assert third.stub.pid == pid, "the pool gave another stub: nothing is shown by this test"
    again.reload()
    assert bench.wait() is again and (again.event, again.fault_address) == (EV_FAULT, 0xA00000)
    again.release()
    ctx.release()


def test_more_mappings_than_the_host_allows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses the next mapping: all go, and come back as they are used."""
    frame = bench.take()
    bench.memory.words[frame >> 3] = 77
    bench.mmu.map(0x900000, frame, 4096, READ | WRITE)
    ctx = bench.run("p_loop", rbx=1)
    bench.mmu.map(0xA00000, bench.take(), 4096, READ)
    real = bench.platform._execute
    calls = []

    def short_of_room(thread: object, ops: list[int], lent: list[int]) -> int:
        calls.append(ops[0])
        return -errno.ENOMEM if len(calls) == 1 else real(thread, ops, lent)

    monkeypatch.setattr(bench.platform, "_execute", short_of_room)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0x900000
    ctx.reload()
    assert bench.wait() is ctx and (ctx.nr, ctx.args[0]) == (1003, 77)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0xB00000
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.fault_address) == (EV_FAULT, 0xB00000)
    ctx.release()


# Files.


def test_file_windows_are_the_file(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    gpa = bench.memory.map_file(fd, 0, 8192, True)
    bench.mmu.map(0x900000, gpa, 8192, READ | WRITE)
    ctx = bench.run("p_store", rdi=0x901000, rsi=0x1122334455667788)
    assert ctx.nr == 1003
    assert path.read_bytes()[4096:4104] == bytes.fromhex("8877665544332211")
    os.pwrite(fd, (5150).to_bytes(8, "little"), 8)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0x900008
    ctx.reload()
    assert bench.wait() is ctx and ctx.args[0] == 5150
    os.ftruncate(fd, 0)
    ctx.regs[RIP], ctx.regs[layout.RDI] = bench.address("p_load"), 0x901000
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.vector) == (EV_EXCEPTION, 12)  # SIGBUS
    bench.mmu.unmap(0x900000, 8192)
    bench.mmu.flush()
    bench.memory.unmap_file(gpa, 8192)
    ctx.release()
    os.close(fd)


def test_code_of_a_file(bench: Bench, tmp_path: Path) -> None:
    """Code is executed from the file, and from a copy where the file's mount says noexec."""
    path = tmp_path / "code"
    path.write_bytes(bench.code.ljust(16384, b"\0"))
    fd = os.open(path, os.O_RDONLY)
    gpa = bench.memory.map_file(fd, 0, 16384, False)
    bench.mmu.map(0x900000, gpa, 16384, READ | EXEC)
    for noexec in (False, True):
        bench.memory.window(gpa).noexec = noexec
        bench.mmu.mark(0x900000 + (bench.symbols["p_hello"] & -4096))
        ctx = bench.context("p_hello")
        ctx.regs[RIP] = 0x900000 + bench.symbols["p_hello"]
        ctx.reload()
        assert bench.wait() is ctx and (ctx.event, ctx.nr) == (EV_SYSCALL, 1001), noexec
        ctx.release()
    os.close(fd)


# What a stub is.


def test_a_stub_holds_nothing_of_ours(bench: Bench, tmp_path: Path) -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    ctx = bench.run("p_loop", rbx=1)
    pid = bench.mmu.stub.pid
    open_files = {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    assert sorted(open_files) == [0, 1]
    assert "memfd:kvmsentry" in open_files[0] and open_files[1].startswith("socket:")
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) > 5}
    assert names <= {"/memfd:kvmsentry (deleted)", "[vsyscall]"}, names
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert int(status["TracerPid"]) == os.getpid() and int(status["PPid"]) == os.getpid()
    ctx.release()
    os.close(fd)


def test_stubs_die_with_the_tracer(bench: Bench) -> None:
    """A tracer that is killed leaves nobody behind."""
    tests = Path(__file__).parent.parent
    program = (
        f"import sys; sys.path.insert(0, {str(tests)!r}); import platform_bench as c, kvmsentry.ptrace.tracer as p\n"
        "t = p.Tracer(); b = c.PtraceBench(t); x = b.context('p_spin'); x.reload(); t.wait(1000000)\n"
        "print(p.lib.pt_tid(t._zygote), b.mmu.stub.pid, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = [int(word) for word in child.stdout.readline().split()]
    assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    child.kill()
    child.wait()
    for _ in range(200):
        left = [pid for pid in pids if _alive(pid)]
        if not left:
            break
        threading.Event().wait(0.01)
    assert not left
    child.stdout.close()
    assert child.stdin is not None
    child.stdin.close()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_refused_ptrace_says_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr("kvmsentry.ptrace.tracer.lib", _Refusing())
    with pytest.raises(HostError, match="yama"):
        tracer._start()
    monkeypatch.undo()
    tracer.close()


_WORD = ffi.new("char[]", b"PTRACE_SEIZE")


class _Refusing:
    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)

    def pt_start(self, *args: object) -> int:
        args[6][0] = _WORD  # type: ignore[index]
        return -errno.EPERM
