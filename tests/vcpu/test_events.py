"""Ports, files and invalidation: what only a virtual machine has. See tests/platforms too."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from platform_bench import DATA, READ, WRITE, spin
from platform_bench import KvmBench as Bench

from kvmsentry.errors import Errno
from kvmsentry.vcpu.layout import (
    EV_EXCEPTION,
    EV_FAULT,
    EV_HOST_ERROR,
    EV_KICKED,
    RBX,
    RIP,
)


def test_entry_and_shared_page_are_read_only(bench: Bench) -> None:
    from kvmsentry.vcpu import layout

    for address in (layout.WINDOW_CODE, layout.WINDOW_SHARED):
        ctx = bench.run("p_store", rdi=address, rsi=1)
        assert (ctx.event, ctx.fault_address) == (EV_FAULT, address)
        ctx.release()


def test_ports_are_closed(bench: Bench) -> None:
    ctx = bench.run("p_port")
    assert (ctx.event, ctx.vector) == (EV_EXCEPTION, 13)
    ctx.release()


def test_kick_storm_with_an_own_gs(bench: Bench) -> None:
    ctx = bench.context("p_loop", rbx=300, gs_base=DATA)
    ctx.reload()
    seen = kicks = in_vain = 0
    while True:
        spin(kicks % 64 + 8 * in_vain)
        kicks += 1
        ctx.kick()
        assert bench.wait() is ctx
        if ctx.event == EV_KICKED:
            in_vain += 1
            ctx.reload()
            continue
        if ctx.nr != 39:
            break
        seen += 1
        in_vain = 0
        ctx.reply(0)
    assert seen == 300
    ctx.release()


# Files.


def test_file_window(bench: Bench, tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, struct.pack("<Q", 321) + bytes(2 * 4096 - 8))
    gpa = bench.memory.map_file(fd, 0, 8192, True)
    bench.mmu.map(0x900000, gpa, 8192, READ | WRITE)
    ctx = bench.run("p_load", rdi=0x900000)
    assert (ctx.nr, ctx.args[0]) == (1003, 321)
    ctx.release()
    ctx = bench.run("p_store", rdi=0x901000, rsi=654)
    assert ctx.nr == 1003
    ctx.release()
    assert struct.unpack("<Q", os.pread(fd, 8, 4096))[0] == 654
    assert bench.memory.safe_read(gpa + 4096, 8) == struct.pack("<Q", 654)

    os.ftruncate(fd, 4096)
    with pytest.raises(Errno) as refused:
        bench.memory.safe_read(gpa + 4096, 8)
    assert refused.value.errno == errno.EFAULT
    with pytest.raises(Errno):
        bench.memory.safe_write(gpa + 4096, b"x")
    ctx = bench.run("p_load", rdi=0x901000)
    assert (ctx.event, ctx.error_code) == (EV_HOST_ERROR, errno.EFAULT)
    assert ctx.regs[RIP] == bench.address("p_load")
    ctx.regs[RIP], ctx.regs[RBX] = bench.address("p_loop"), 1  # SIGBUS with a handler: the context goes on
    ctx.reload()
    assert bench.wait() is ctx and ctx.nr == 39
    ctx.release()
    bench.memory.unmap_file(gpa, 8192)
    os.close(fd)


@pytest.mark.parametrize("warm", [False, True])
def test_stores_to_a_read_only_file_window_never_reach_the_file(bench: Bench, tmp_path: object, warm: bool) -> None:
    """Page tables that say writable (a mistake of ours) spoil this window, not the file and no other window of it."""
    path = os.path.join(str(tmp_path), "file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(4096))
    readonly = os.open(path, os.O_RDONLY)
    gpa, other = (bench.memory.map_file(readonly, 0, 4096, False) for _ in range(2))
    if warm:
        bench.memory.warm(gpa, 4096)
    bench.mmu.map(0x900000, gpa, 4096, READ | WRITE)
    ctx = bench.run("p_store", rdi=0x900000, rsi=1)
    assert ctx.nr == 1003
    ctx.release()
    assert os.pread(fd, 8, 0) == bytes(8) == bench.memory.safe_read(other, 8)
    os.close(fd)
    os.close(readonly)


# Invalidation.


@pytest.mark.parametrize("whole", [False, True], ids=["entry", "table"])
def test_no_stale_store_after_invalidate(bench: Bench, whole: bool) -> None:
    """Two guests store for ever through one page; it is pointed from frame to frame. After invalidate() returns, no
    store lands in the frame it left."""
    frames = [bench.take() for _ in range(2)]
    bench.mmu.map(0x900000, frames[0], 4096, READ | WRITE)
    writers = [bench.context("p_stores", rdi=0x900000 + 8 * i) for i in range(2)]
    for writer in writers:
        writer.reload()
    rounds = 60 if os.environ.get("NESTED_KVM") else 300
    words = bench.memory.words
    moved = 0
    for i in range(rounds):
        old, new = frames[i % 2], frames[(i + 1) % 2]
        for _ in range(2000):
            if words[old >> 3]:
                break
            bench.platform.wait(100_000)
        bench.mmu.map(0x900000, new, 4096, READ | WRITE)
        bench.mmu.flush(whole)
        words[old >> 3] = words[(old >> 3) + 1] = 0
        bench.platform.wait(100_000)
        assert words[old >> 3] == 0 and words[(old >> 3) + 1] == 0, f"stale store in round {i}"
        moved += 1
    assert moved == rounds
    for writer in writers:
        writer.kick()
        bench.wait().release()


