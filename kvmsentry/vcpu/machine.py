"""The machine: one KVM VM, its vCPUs as contexts, and the wait. This is the Platform of kernel and mm.

A context is one guest thread's processor. It is with the guest, or stopped in an event that the Sentry answers with
exactly one of reply, reload, park or release. Everything that must be fast is in C (sentry.c, runner.c); this module
gives it names.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import BrokenInvariant, Errno, HostError

from . import layout
from ._dispatch import dispatcher
from ._kvm import ffi, lib
from .common import CALL_SIZE, REGS_SIZE, ContextState, HostSide
from .layout import EV_SYSCALL, EXIT_NAMES, LINEAR_PML4, STUB_PML4
from .memory import PAGE, GuestMemory
from .traits import open_kvm, refusal, traits

_reply = lib.ks_reply
_reload = lib.ks_reload

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
TABLE = 3  # present, writable, supervisor


class Window:
    """What the machine has mapped into one Mmu: the ring 3 entry's pages and a channel page for every thread."""

    __slots__ = ("frames", "free", "used")

    def __init__(self) -> None:
        self.frames: list[int] = []  # slot -> GPA of its channel
        self.free: list[int] = []
        self.used = 0


class Context(ContextState):
    """One guest thread's processor, a vCPU."""

    __slots__ = ("_cpu_before", "_machine", "_slot")

    def __init__(self, machine: Machine, v: Any) -> None:
        super().__init__(v, lib.ks_id(v), ffi.buffer(lib.ks_regs(v), REGS_SIZE), ffi.buffer(lib.ks_call(v), CALL_SIZE))
        self._machine = machine
        self._slot = -1
        self._cpu_before: int = lib.ks_cpu_ns(v)  # used by earlier contexts

    def reply(self, result: int) -> None:
        """CONTINUE: RAX = result, all else as it was. Also ends a park."""
        _reply(self._c, result)

    def reload(self) -> None:
        """All 20 registers were rewritten in `regs` (perhaps state and address space too): go on with them."""
        if self.next_mmu is not None:
            self._machine._move(self)
        _reload(self._c)

    def park(self) -> None:
        """The answer comes later: the guest leaves its processor, its thread sleeps until reply() or reload()."""
        lib.ks_park(self._c)

    def kick(self) -> None:
        """Makes a context that is with the guest produce an event soon: EV_KICKED, unless another comes first. Nothing
        happens when it is stopped already. From the Sentry thread."""
        lib.ks_kick(self._c)

    def xsave(self) -> bytes:
        """FPU, SSE, AVX state in XSAVE's standard format (SDM vol. 1, 13.4), xsave_size bytes; while stopped."""
        size = self._machine.xsave_size
        area = bytearray(size)
        rc = lib.ks_xsave(self._c, ffi.from_buffer(area), size)
        if rc < 0:
            raise HostError("KVM_GET_XSAVE", -rc)
        return bytes(area)

    def set_xsave(self, data: bytes | None) -> None:
        """Processor state for the next reload(); None is the initial one. What the processor would refuse is masked."""
        if data is None:
            lib.ks_xinit(self._c)
        else:
            lib.ks_set_xsave(self._c, ffi.from_buffer(data), len(data))

    def set_debug(self, registers: list[int]) -> bool:
        """Debug registers DR0 to DR7 while stopped (SDM vol. 3, 17.2). False: there are none to give. Some hosts
        take them, by KVM_SET_DEBUGREGS and by KVM_SET_GUEST_DEBUG, and never stop at them: nobody is promised any."""
        return not registers[7] & 0xFF

    def debug_status(self) -> int:
        """DR6 since it was last asked for."""
        return 0

    def switch(self, mmu: Any) -> None:
        """exec: the next reload() starts in this address space, with the processor state initial."""
        self.next_mmu = mmu
        lib.ks_xinit(self._c)

    def cpu_ns(self) -> int:
        """ns of processor time that the vCPU's thread has used for this context."""
        used: int = lib.ks_cpu_ns(self._c) - self._cpu_before
        return used

    def release(self) -> None:
        """The thread ended: its vCPU has left the guest when this returns, and serves the next context."""
        self._machine._release(self)


class Machine(HostSide):
    """A KVM virtual machine as a Platform. HostError when the host refuses, with what helps."""

    def __init__(self, mmu_factory: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.name = "kvm"
        self.mmu_factory = mmu_factory
        self._m: Any = None
        self._kvm = open_kvm()
        self.memory: GuestMemory
        try:
            self.traits: dict[str, Any] = traits(self._kvm)
            self.ring0: bool = self.traits["entry"] == "ring0"
            self.nested: bool = self.traits["paging"] == "nested"
            self.xcr0: int = self.traits["xcr0"]
            self.xsave_size: int = self.traits["xsave_size"]
            self.memory = GuestMemory(self.traits["phys_bits"] or layout.GPA_BITS, self.traits["virtual"])
            self._make()
        except BaseException:
            self.close()
            raise
        self.tsc_khz: int = lib.ks_counter(self._m, 7)
        self._vcpus: dict[int, Any] = {}
        self._pool: list[Any] = []
        self._windows: dict[int, Window] = {}
        channels = range(layout.GPA_CHANNELS, layout.GPA_CHANNELS + layout.CHANNEL_FRAMES * PAGE, PAGE)
        self._frames = list(reversed(channels))
        self._sleep_on(lib.ks_epoll_fd(self._m))

    def _make(self) -> None:
        out = ffi.new("struct ks_machine **")
        failed = ffi.new("char **")
        rc = lib.ks_machine_new(self._kvm, self.ring0, self.xcr0, self.memory.at(0), out, failed)
        self._m = out[0] if out[0] != ffi.NULL else None
        if rc < 0:
            raise refusal(ffi.string(failed[0]).decode() if failed[0] else "KVM", -rc)
        self.memory.attach(self._set_slot)

    def _set_slot(self, slot: int, gpa: int, length: int, file: bool) -> None:
        rc = lib.ks_set_memslot(self._m, slot, gpa, length, file)
        if rc < 0:
            raise refusal(f"KVM_SET_USER_MEMORY_REGION of {length >> 20} MiB", -rc)

    @property
    def counters(self) -> dict[str, int]:
        """Events and sleeps of the wait, spins, doorbell rings, vCPUs made, runs of the service vCPU (invalidations),
        hand-overs inside the guest; the vCPUs' exits, and as exit_park, exit_fault, ... how many for which reason
        (layout.EXIT_*)."""
        names = ("events", "sleeps", "spins", "doorbells", "vcpus", "services", "trades")
        counts = {name: lib.ks_counter(self._m, i) for i, name in enumerate(names)}
        vcpus = self._vcpus.values()
        exits = {f"exit_{n}": sum(lib.ks_vcpu_counter(v, i) for v in vcpus) for i, n in enumerate(EXIT_NAMES)}
        return {**counts, "exits": sum(exits.values()), **exits}

    def kernel_pml4_entries(self) -> dict[int, int]:
        """{index: entry} that every PML4 must hold: the linear map and the stub, ring 0 only."""
        return {LINEAR_PML4: layout.GPA_LINEAR_PDPT | 0x20 | TABLE, STUB_PML4: layout.GPA_KERNEL_PDPT | 0x20 | TABLE}

    # Address spaces and channels.

    def _window(self, mmu: Any) -> Window:
        window = self._windows.get(id(mmu))
        if window is None:
            window = self._windows[id(mmu)] = Window()
            weakref.finalize(mmu, self._forget, id(mmu)).atexit = False
            if not self.ring0:
                mmu.map(layout.WINDOW_CODE, layout.GPA_ENTRY, PAGE, PROT_READ | PROT_EXEC)
                mmu.map(layout.WINDOW_SHARED, layout.GPA_SHARED, PAGE, PROT_READ)
        return window

    def forget(self, mmu: Any) -> None:
        """The address space is gone (or will never run again): its channel frames may serve others. Called by itself
        when the Mmu object is collected."""
        self._forget(id(mmu))

    def _forget(self, key: int) -> None:
        window = self._windows.pop(key, None)
        if window is not None:
            if window.used:
                raise BrokenInvariant(f"an address space went away under {window.used} contexts")
            self._frames.extend(window.frames)

    def _enter(self, ctx: Context, mmu: Any) -> None:
        """A channel in mmu for ctx, whose vCPU is out of the guest; the next reload starts there."""
        window = self._window(mmu)
        if window.free:
            slot = window.free.pop()
        else:
            slot = len(window.frames)
            if not self._frames or slot >= layout.WINDOW_SLOTS:
                raise Errno(errno.EAGAIN)
            gpa = self._frames[-1]
            if not self.ring0:
                mmu.map(layout.WINDOW_CHANNELS + slot * PAGE, gpa, PAGE, PROT_READ | PROT_WRITE)
            self._frames.pop()
            window.frames.append(gpa)
        window.used += 1
        gpa = window.frames[slot]
        base = layout.LINEAR_BASE + gpa if self.ring0 else layout.WINDOW_CHANNELS + slot * PAGE
        lib.ks_fresh(ctx._c, mmu.cr3, gpa, base)
        ctx.mmu, ctx._slot = mmu, slot

    def _leave(self, ctx: Context) -> None:
        window = self._windows[id(ctx.mmu)]
        window.free.append(ctx._slot)
        window.used -= 1
        ctx.mmu, ctx._slot = None, -1

    def _move(self, ctx: Context) -> None:
        mmu, ctx.next_mmu = ctx.next_mmu, None
        if mmu is ctx.mmu:
            return
        lib.ks_halt(ctx._c)
        self._leave(ctx)
        self._enter(ctx, mmu)

    def new_context(self, mmu: Any, regs: bytes | None = None) -> Context:
        """A stopped context in mmu, registers zero or `regs` (20 words), processor state initial; reload() starts it.
        Errno(EAGAIN) when no vCPU is left."""
        if self._pool:
            v = self._pool.pop()
        else:
            v = self._new_vcpu()
        lib.ks_claim(v)
        ctx = Context(self, v)
        try:
            self._enter(ctx, mmu)
        except BaseException:
            lib.ks_release(v)
            self._pool.append(v)
            raise
        if regs is not None:
            ctx.regs.cast("B")[:] = regs
        self._keep(ctx)
        return ctx

    def _new_vcpu(self) -> Any:
        out = ffi.new("struct ks_vcpu **")
        failed = ffi.new("char **")
        rc = lib.ks_vcpu_new(self._m, out, failed)
        if rc < 0:
            if -rc in (errno.EAGAIN, errno.EINVAL, errno.ENOSPC, errno.EMFILE, errno.ENFILE):
                raise Errno(errno.EAGAIN)
            raise refusal(ffi.string(failed[0]).decode() if failed[0] else "KVM_CREATE_VCPU", -rc)
        self._vcpus[lib.ks_id(out[0])] = out[0]
        return out[0]

    def _release(self, ctx: Context) -> None:
        self._drop(ctx)
        lib.ks_release(ctx._c)
        self._leave(ctx)
        self._pool.append(ctx._c)

    # Events.

    def wait(self, timeout_ns: int) -> Context | None:
        """The next context with an event. None: the time is over, host descriptors were served, or wake().
        timeout_ns < 0 waits for ever, 0 looks once."""
        ctx: Context | None = self._event(lib.ks_wait(self._m, timeout_ns))
        return ctx

    def server(self, kernel: Any, rows: list[Any], task_type: type) -> Callable[[], Any]:
        """What kernel.run() calls for its next event. System calls of `rows` that nothing stands in the way of are made
        and answered in it (dispatch.c). A context with an event, (task, result) for a call that was made and is yet to
        be answered, or None when something else is to do."""
        if kernel.strace is not None:
            return super().server(kernel, rows, task_type)
        dispatch = dispatcher(
            int(ffi.cast("uintptr_t", lib.ks_doors())), int(ffi.cast("uintptr_t", self._m)), rows, self._contexts,
            kernel.ready, kernel.deferred, kernel.timers, kernel.boot_monotonic, Errno, EV_SYSCALL, Context, task_type,
        )  # fmt: skip

        def serve() -> Any:
            got = dispatch()
            return self._event(got) if got.__class__ is int else got

        return serve

    def _explain(self, ctx: Context) -> bool:
        v = ctx._c
        ctx.fault_address = lib.ks_fault_address(v)
        ctx.error_code = lib.ks_error_code(v)
        ctx.vector = lib.ks_vector(v)
        return True

    def _host_event(self, i: int) -> int:
        packed: int = lib.ks_host_event(self._m, i)
        return packed

    def wake(self) -> None:
        """From any thread: makes wait() return."""
        lib.ks_wake(self._m)

    # Page tables.

    def invalidate(self, mmu: Any, places: list[int]) -> None:
        """Makes removed and narrowed entries hold on every vCPU before it returns. `places`: GPAs of such entries in
        the tables of mmu, or of whole tables plus 4 (mm.pagetables.WHOLE), for many entries or before reuse."""
        if self.nested:
            rc = lib.ks_flush_tlbs(self._m)
        elif places:
            rc = lib.ks_touch(self._m, mmu.cr3, ffi.new("uint64_t[]", places), len(places))
        else:
            return
        if rc < 0:
            raise HostError("invalidation by the service vCPU", -rc)

    def memory_barrier(self) -> None:
        """Every guest thread passes a full memory barrier before this returns (membarrier(2) for the runner
        threads)."""
        rc = lib.ks_memory_barrier()
        if rc < 0:
            raise HostError("membarrier", -rc)

    def close(self) -> None:
        """Ends every vCPU, then the machine and its memory."""
        self._close_host_side()
        if self._m is not None:
            lib.ks_machine_free(self._m)
            self._m = None
        if self._kvm >= 0:
            os.close(self._kvm)
            self._kvm = -1
        memory = getattr(self, "memory", None)
        if memory is not None:
            memory.close()
            del self.memory
