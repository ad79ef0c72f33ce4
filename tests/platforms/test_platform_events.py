"""Faults, exceptions, kicks, processor state and page tables: the same on each platform."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from platform_bench import CODE, DATA, EXEC, READ, STACK, WRITE, Bench, spin

from kvmsentry.errors import Errno
from kvmsentry.vcpu.layout import EV_EXCEPTION, EV_FAULT, EV_KICKED, EV_SYSCALL, RAX, RBX, RFLAGS, RIP, RSP

TF = 0x100


def test_load_from_nowhere_then_resumed(bench: Bench) -> None:
    ctx = bench.run("p_load", rdi=0x900010, rbx=5)
    assert (ctx.event, ctx.fault_address, ctx.error_code) == (EV_FAULT, 0x900010, 4)  # user read, not present
    assert ctx.regs[RIP] == bench.address("p_load") and ctx.regs[RBX] == 5
    gpa = bench.take()
    bench.memory.words[(gpa + 0x10) >> 3] = 99
    bench.mmu.map(0x900000, gpa, 4096, READ)
    ctx.reload()
    assert bench.wait() is ctx and (ctx.nr, ctx.args[0], ctx.regs[RBX]) == (1003, 99, 5)
    ctx.release()


def test_store_to_nowhere_and_to_read_only(bench: Bench) -> None:
    ctx = bench.run("p_store", rdi=0x900008, rsi=33)
    assert (ctx.event, ctx.fault_address, ctx.error_code) == (EV_FAULT, 0x900008, 6)
    gpa = bench.take()
    bench.mmu.map(0x900000, gpa, 4096, READ)
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.error_code) == (EV_FAULT, 0x900008, 7)
    bench.mmu.map(0x900000, gpa, 4096, READ | WRITE)
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 1003
    assert bench.memory.words[(gpa + 8) >> 3] == 33
    ctx.release()


def test_fetch_from_a_data_page(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.regs[RIP] = DATA
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.error_code & 0x15) == (EV_FAULT, DATA, 0x15)  # present, user, fetch
    ctx.release()


def test_kernel_half_is_closed(bench: Bench) -> None:
    for address in (0xFFFF800000000000, 0xFFFFFFFF80002000):
        ctx = bench.run("p_load", rdi=address)
        assert (ctx.event, ctx.fault_address) == (EV_FAULT, address)
        assert ctx.error_code & 4
        ctx.release()


@pytest.mark.parametrize(
    ("program", "vector", "behind"), [("p_int3", 3, 1), ("p_ud2", 6, 0), ("p_div0", 0, 9), ("p_gp", 13, 0)]
)
def test_exceptions(bench: Bench, program: str, vector: int, behind: int) -> None:
    ctx = bench.run(program, rsi=8)
    assert (ctx.event, ctx.vector, ctx.error_code) == (EV_EXCEPTION, vector, 0)
    assert ctx.regs[RIP] == bench.address(program) + behind
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


def test_steps_and_calls_by_turns(bench: Bench) -> None:
    """TF of a reload is #DB behind the application's next instruction; without it a call is made (a tracer's step)."""
    ctx = bench.context("p_hello")
    at = ctx.regs[RIP]
    for length in (5, 5, 5, 5, 6, 6, 6):  # up to the system call
        ctx.regs[RFLAGS] |= TF
        ctx.reload()
        assert bench.wait() is ctx and (ctx.event, ctx.vector) == (EV_EXCEPTION, 1)
        at += length
        assert ctx.regs[RIP] == at
    ctx.regs[RFLAGS] &= ~TF
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.nr, ctx.args) == (EV_SYSCALL, 1001, (1, 2, 3, 4, 5, 6))
    ctx.regs[RAX] = 77
    ctx.regs[RFLAGS] |= TF
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.vector) == (EV_EXCEPTION, 1)
    assert ctx.regs[RIP] == at + 2 + 3 and ctx.regs[RBX] == 77
    ctx.release()


def test_single_step(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.regs[RFLAGS] = 0x302
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.vector) == (EV_EXCEPTION, 1)
    ctx.release()


def test_wild_return_address(bench: Bench) -> None:
    """sigreturn to an address that is none: the event comes with the registers that were asked for."""
    ctx = bench.run("p_loop", rbx=1)
    ctx.regs[RIP] = 0x900000
    ctx.reload()
    assert bench.wait() is ctx
    assert (ctx.event, ctx.fault_address, ctx.regs[RIP]) == (EV_FAULT, 0x900000, 0x900000)
    ctx.regs[RIP] = 1 << 62
    ctx.reload()
    assert bench.wait() is ctx and ctx.event in (EV_FAULT, EV_EXCEPTION)
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()


# Kicks.


def test_kick_of_a_computing_guest(bench: Bench) -> None:
    ctx = bench.context("p_spin")
    ctx.reload()
    last = moved = 0
    while moved < 5:  # a kick that comes before the guest ran again finds the same registers (K3)
        assert bench.platform.wait(2_000_000) is None
        ctx.kick()
        assert bench.wait() is ctx
        assert ctx.event == EV_KICKED and ctx.regs[RBX] >= last
        moved += ctx.regs[RBX] > last
        assert ctx.regs[RIP] - bench.address("p_spin") in (0, 3) and ctx.regs[RSP] == STACK + 0x3000
        last = ctx.regs[RBX]
        ctx.reload()
    ctx.kick()
    bench.wait().release()


def test_kick_of_a_stopped_context_is_nothing(bench: Bench) -> None:
    ctx = bench.run("p_loop", rbx=1)
    ctx.kick()
    ctx.reply(0)
    assert bench.wait() is ctx and (ctx.event, ctx.nr) == (EV_SYSCALL, 1003)
    ctx.release()


def storm(bench: Bench, calls: int, answer: Callable, often: int) -> tuple[int, int]:
    """Kicks a guest that makes calls, at every moment there is; (calls seen, kicks seen). K1 to K3."""
    ctx = bench.context("p_loop", rbx=calls, r12=0x1234)
    ctx.reload()
    seen = kicked = in_vain = 0
    while True:
        if not (seen * 7919 >> 3) % often:
            if bench.platform.name == "kvm":
                # At every distance from the answer, and further while the guest does not come to run at all.
                spin(kicked % 64 + 8 * in_vain)
            ctx.kick()
        assert bench.wait() is ctx
        if ctx.event == EV_KICKED:
            kicked += 1
            in_vain += 1
            left = ctx.regs[RBX]
            assert left in (calls - seen, calls - seen + 1), (left, calls - seen, hex(ctx.regs[RIP]))
            assert CODE <= ctx.regs[RIP] < CODE + 0x1000 and ctx.regs[RSP] == STACK + 0x3000
            assert ctx.regs[RFLAGS] & ~0x108D5 == 0x202  # RF: set when an interrupt came amid an instruction
            ctx.reload()
            continue
        assert ctx.event == EV_SYSCALL, (ctx.event, ctx.vector, hex(ctx.regs[RIP]))
        if ctx.nr != 39:
            break
        assert ctx.regs[RBX] == calls - seen
        seen += 1
        in_vain = 0
        answer(ctx)
    assert (ctx.nr, ctx.regs[12]) == (1003, 0x1234)
    ctx.release()
    return seen, kicked


def by_reply(ctx: object) -> None:
    ctx.reply(7)  # type: ignore[attr-defined]


def by_reload(ctx: object) -> None:
    ctx.regs[RAX] = 7  # type: ignore[attr-defined]
    ctx.reload()  # type: ignore[attr-defined]


def by_state(ctx: object) -> None:
    ctx.set_xsave(ctx.xsave())  # type: ignore[attr-defined]
    by_reload(ctx)


@pytest.mark.parametrize("answer", [by_reply, by_reload, by_state])
def test_kick_storm(bench: Bench, answer: Callable) -> None:
    calls, often = 700, 2
    if answer is by_reply and bench.platform.name == "kvm" and not os.environ.get("NESTED_KVM"):
        calls, often = 100_000, 32  # K1 to K3 are windows of nanoseconds
    seen, _ = storm(bench, calls, answer, often)
    assert seen == calls


# Processor state.


def avx512(bench: Bench) -> bool:
    return bench.platform.xcr0 & 0xE0 == 0xE0


@pytest.mark.parametrize("how", ["reply", "state", "initial"])
def test_avx_state(bench: Bench, how: str) -> None:
    if not bench.platform.xcr0 & 4:
        pytest.skip("no AVX here")
    data = bench.data
    bench.memory.view[data : data + 512] = bytes(range(1, 256)) * 2 + b"zz"
    ctx = bench.run("p_avx")
    if how == "state":
        image = ctx.xsave()
        assert len(image) == bench.platform.xsave_size
        assert image[160:176] == bytes(bench.memory.view[data : data + 16])  # xmm0
        assert image[576:592] == bytes(bench.memory.view[data + 16 : data + 32])  # the upper half of ymm0
        other = bytearray(image)
        other[160:176] = b"0123456789abcdef"
        ctx.set_xsave(bytes(other))
        ctx.reload()
    elif how == "initial":
        ctx.set_xsave(None)
        ctx.reload()
    else:
        ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003
    got, want = bytes(bench.memory.view[data + 1024 : data + 1088]), bytes(bench.memory.view[data : data + 64])
    if how == "state":
        want = b"0123456789abcdef" + want[16:]
    assert got == (bytes(64) if how == "initial" else want)
    ctx.release()


@pytest.mark.parametrize("how", ["reply", "state"])
def test_avx512_state(bench: Bench, how: str) -> None:
    if not avx512(bench):
        pytest.skip("no AVX-512 here")
    data = bench.data
    bench.memory.view[data : data + 256] = bytes(range(256))
    ctx = bench.run("p_avx512")
    if how == "state":
        image = ctx.xsave()
        ctx.set_xsave(None)
        ctx.set_xsave(image)
        ctx.reload()
    else:
        ctx.reply(0)
    assert bench.wait() is ctx and ctx.nr == 1003
    assert bytes(bench.memory.view[data + 1024 : data + 1160]) == bytes(range(136))
    ctx.release()


def test_state_moves_to_another_context(bench: Bench) -> None:
    """fork: the child's processor starts with the parent's state."""
    bench.memory.view[bench.data : bench.data + 512] = b"parent__" * 64
    parent = bench.run("p_avx")
    mmu, data = bench.space()
    child = bench.context("p_seen", mmu)
    child.set_xsave(parent.xsave())
    parent.reply(0)
    assert bench.wait() is parent
    child.reload()
    assert bench.wait() is child and child.nr == 1003
    assert bytes(bench.memory.view[data : data + 16]) == b"parent__" * 2
    parent.release()
    child.release()


def test_state_that_the_processor_refuses_is_masked(bench: Bench) -> None:
    ctx = bench.run("p_seen")
    ctx.set_xsave(b"\xff" * bench.platform.xsave_size)
    ctx.regs[RIP] = bench.address("p_seen")
    ctx.reload()
    assert bench.wait() is ctx and (ctx.event, ctx.nr) == (EV_SYSCALL, 1003)
    assert bytes(bench.memory.view[bench.data : bench.data + 16]) == b"\xff" * 16
    for junk in (b"\xff" * 512, b"\xff" * 700, bytes(512), os.urandom(bench.platform.xsave_size)):
        ctx.set_xsave(junk)  # 512 bytes: what FXSAVE writes, and no header
        ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 3
        ctx.reload()
        assert bench.wait() is ctx and (ctx.event, ctx.nr) == (EV_SYSCALL, 39)
    ctx.release()


# Memory.


def test_file_windows_are_placed_and_reused(bench: Bench, tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 8 << 20)
    memory = bench.memory
    gpa = memory.map_file(fd, 3 * 4096, 4 << 20, True)
    assert gpa % (2 << 20) == 3 * 4096
    memory.unmap_file(gpa, 4 << 20)
    assert memory.map_file(fd, 3 * 4096, 4 << 20, True) == gpa
    with pytest.raises(Errno) as refused:
        memory.map_file(fd, 5, 4096, True)
    assert refused.value.errno == errno.EINVAL
    os.close(fd)


def test_released_memory_reads_as_zero(bench: Bench) -> None:
    gpa, length = bench.memory.grow(2 << 20)
    assert gpa % (2 << 20) == 0 and length == 2 << 20
    bench.memory.view[gpa + 4096 : gpa + 4100] = b"data"
    bench.memory.copy(gpa, gpa + 4096, 4096)
    assert bytes(bench.memory.view[gpa : gpa + 4]) == b"data"
    bench.memory.release(gpa, length)
    assert bytes(bench.memory.view[gpa : gpa + 4]) == bytes(4)


def test_new_entries_need_no_flush(bench: Bench) -> None:
    ctx = bench.context("p_load")
    for i in range(50):
        address = 0xA00000 + i * 0x200000
        ctx.regs[7 - 2], ctx.regs[RIP] = address, bench.address("p_load")
        ctx.reload()
        assert bench.wait() is ctx and ctx.event == EV_FAULT
        gpa = bench.take()
        bench.memory.words[gpa >> 3] = i
        bench.mmu.map(address, gpa, 4096, READ | EXEC)
        ctx.reload()
        assert bench.wait() is ctx and (ctx.nr, ctx.args[0]) == (1003, i)
    ctx.release()


@pytest.mark.parametrize("change", ["unmap", "protect", "replace"])
def test_flush_holds_for_a_thread_that_runs(bench: Bench, change: str) -> None:
    """A computing thread stores to a page that is taken away: after flush() not one store arrives there."""
    page = bench.take()
    bench.mmu.map(0x900000, page, 4096, READ | WRITE)
    ctx = bench.context("p_stores", rdi=0x900000)
    ctx.reload()
    while not bench.memory.words[page >> 3]:
        assert bench.platform.wait(1_000_000) is None
    if change == "unmap":
        bench.mmu.unmap(0x900000, 4096)
    elif change == "protect":
        bench.mmu.protect(0x900000, 4096, READ)
    else:
        other = bench.take()
        bench.mmu.map(0x900000, other, 4096, READ | WRITE)
    bench.mmu.flush()
    seen = bench.memory.words[page >> 3]
    if change == "replace":
        while not bench.memory.words[other >> 3]:
            assert bench.platform.wait(1_000_000) is None
        ctx.kick()
        assert bench.wait() is ctx and ctx.event == EV_KICKED
    else:
        assert bench.wait() is ctx and ctx.event == EV_FAULT and ctx.fault_address == 0x900000
        assert ctx.error_code == (7 if change == "protect" else 6)
    assert bench.memory.words[page >> 3] == seen
    ctx.release()


def test_unmapped_page_faults_after_flush(bench: Bench) -> None:
    gpa = bench.take()
    bench.mmu.map(0x900000, gpa, 4096, READ | WRITE)
    writer = bench.context("p_stores", rdi=0x900000)
    writer.reload()
    assert bench.platform.wait(20_000_000) is None
    bench.mmu.unmap(0x900000, 4096)
    bench.mmu.flush()
    assert bench.wait() is writer and (writer.event, writer.fault_address) == (EV_FAULT, 0x900000)
    writer.release()
