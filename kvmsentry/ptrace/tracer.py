"""The tracer: stub processes as address spaces, their traced threads as contexts. The Platform of hosts without KVM.

A context is one guest thread's processor, as with KVM; here it is a thread of a stub process, and an event is a ptrace
stop. Whatever touches a stub's threads is C (trace.c, events.c), called by the one Sentry thread.
"""

from __future__ import annotations

import errno
import socket
from array import array
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import BrokenInvariant, Errno, HostError
from kvmsentry.vcpu import layout
from kvmsentry.vcpu.common import CALL_SIZE, REGS_SIZE, ContextState, HostSide
from kvmsentry.vcpu.layout import EV_FAULT, EVENT_NAMES, RIP

from ._ptrace import ffi, lib
from .decode import stores
from .memory import GPA_LIST, GuestMemory
from .space import MAX_FDS, NX, PAGE, SYS_CLOSE, SYS_MMAP, SYS_MUNMAP, SYS_RECVMSG, P, W

POOL = 8  # stub processes kept for the next address space
POOL_THREADS = 4  # ... that have no more threads than this
OPS, WORDS = lib.PT_OPS, lib.PT_OP_WORDS
MSG_DONTWAIT, MSG_CMSG_CLOEXEC = 0x40, 0x40000000
MEND_PTRACE = (
    "the host forbids ptrace: see /proc/sys/kernel/yama/ptrace_scope (2 and 3 forbid it), or the seccomp "
    "profile of the container that this runs in"
)


class Stub:
    """A stub process: pid, its threads (cdata), those that belong to no context."""

    __slots__ = ("broken", "free", "pid", "threads", "used")

    def __init__(self, thread: Any) -> None:
        self.pid: int = lib.pt_tid(thread)
        self.threads = [thread]
        self.free = [thread]
        self.used = False  # something was mapped in it
        self.broken = False  # the host killed a thread of it, and with that all


class Context(ContextState):
    """One guest thread's processor, a thread of a stub process."""

    __slots__ = ("_debugged", "_m", "_retried", "_tracer")

    def __init__(self, tracer: Tracer, c: Any) -> None:
        super().__init__(c, lib.pt_id(c), ffi.buffer(lib.pt_regs(c), REGS_SIZE), ffi.buffer(lib.pt_call(c), CALL_SIZE))
        self._tracer, self._m = tracer, tracer._m
        self._retried: tuple[int, int] | None = None
        self._debugged = False

    def reply(self, result: int, _reply: Any = lib.pt_reply) -> None:
        """CONTINUE: RAX = result, all else as it was. Also ends a park."""
        if (self.mmu.changed or self.next_mmu is not None) and not self._tracer.prepare(self):
            return
        _reply(self._m, self._c, result)

    def reload(self) -> None:
        """All 20 registers were rewritten in `regs` (perhaps state and address space too): go on with them."""
        if (self.mmu.changed or self.next_mmu is not None) and not self._tracer.prepare(self):
            return
        lib.pt_reload(self._m, self._c)

    def park(self) -> None:
        """The answer comes later. Nothing to do: the thread is stopped."""

    def kick(self) -> None:
        """Makes a context that is with the guest produce an event soon: EV_KICKED, unless another comes first."""
        lib.pt_kick(self._m, self._c)

    def xsave(self) -> bytes:
        """FPU, SSE, AVX state in XSAVE's standard format (SDM vol. 1, 13.4), xsave_size bytes; while stopped."""
        size = self._tracer.xsave_size
        area = bytearray(size)
        rc = lib.pt_xsave(self._m, self._c, ffi.from_buffer(area), size)
        if rc < 0 and rc != -errno.ESRCH:  # killed by the host: its next event says so
            raise HostError("PTRACE_GETREGSET", -rc)
        return bytes(area)

    def set_xsave(self, data: bytes | None) -> None:
        """Processor state for the next reload(); None is the initial one. What the processor would refuse is masked."""
        if data is None:
            lib.pt_xinit(self._m, self._c)
        else:
            lib.pt_set_xsave(self._m, self._c, ffi.from_buffer(data), len(data))

    def set_debug(self, registers: list[int]) -> bool:
        """Debug registers DR0 to DR7 while stopped (SDM vol. 3, 17.2). False: the host refuses them."""
        self._debugged = bool(registers[7] & 0xFF)
        return bool(lib.pt_set_debug(self._c, ffi.new("uint64_t[8]", registers)) == 0)

    def debug_status(self) -> int:
        """DR6 since it was last asked for; while stopped in an event of vector 1."""
        return max(0, int(lib.pt_debug_status(self._c)))

    def switch(self, mmu: Any) -> None:
        """exec: the next reload() starts in this address space, with the processor state initial."""
        self.next_mmu = mmu
        lib.pt_xinit(self._m, self._c)

    def cpu_ns(self) -> int:
        """ns that the application had this context's thread; wall time, see README.md."""
        used: int = lib.pt_cpu_ns(self._c)
        return used

    def release(self) -> None:
        """The thread ended: what ran it serves the next one."""
        self._tracer._release(self)


class Tracer(HostSide):
    """The ptrace platform. HostError when the host refuses, with what helps."""

    def __init__(self, mmu_factory: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.name = "ptrace"
        self.mmu_factory = mmu_factory
        self.user_top: int = lib.pt_stub_base()  # the stub's own pages lie above
        self.ring0, self.nested = False, True
        self._m: Any = None
        self._zygote: Any = None
        self._lend: socket.socket | None = None
        out, failed = ffi.new("struct pt_tracer **"), ffi.new("char **")
        rc = lib.pt_tracer_new(layout.XCR0_MASK, out, failed)
        if out[0] != ffi.NULL:
            self._m = out[0]
        try:
            if rc < 0:
                raise HostError(ffi.string(failed[0]).decode(), -rc)
            self.memory = GuestMemory()
        except BaseException:
            self.close()
            raise
        self.xcr0: int = lib.pt_xcr0(self._m)
        self.xsave_size: int = lib.pt_xsave_size(self._m)
        self.traits: dict[str, Any] = {"entry": "ptrace", "paging": "host", "xcr0": self.xcr0, "tsc_is_hosts": True}
        self._pool: list[Stub] = []
        self._sleep_on(lib.pt_epoll_fd(self._m))
        self._ops = self.memory.words[GPA_LIST >> 3 : (GPA_LIST >> 3) + OPS * WORDS]

    @property
    def counters(self) -> dict[str, int]:
        """Events and sleeps of the wait, threads made, runs of the executor and their calls; and why threads stopped:
        stop_syscall, stop_fault, ... by the event's kind, stop_spurious for what concerned nobody."""
        names = ("events", "sleeps", "threads", "runs", "calls", "stop_spurious")
        counts = {name: lib.pt_counter(self._m, i) for i, name in enumerate(names)}
        kinds = {f"stop_{name}": lib.pt_kind_counter(self._m, i) for i, name in enumerate(EVENT_NAMES)}
        spurious = counts.pop("stop_spurious")
        return {**counts, **kinds, "stop_spurious": spurious}

    def kernel_pml4_entries(self) -> dict[int, int]:
        """Nothing: no processor walks these tables."""
        return {}

    # -- stub processes

    def _start(self) -> None:
        """The first stub, which only ever gives birth. Late, so that it is born into the Sentry's namespaces."""
        lend, borrow = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lend.shutdown(socket.SHUT_RD)
        out, failed = ffi.new("struct pt_thread **"), ffi.new("char **")
        ops = ffi.cast("void *", self.memory.base + GPA_LIST)
        rc = lib.pt_start(self._m, self.memory.memfd, borrow.fileno(), GPA_LIST, ops, out, failed)
        borrow.close()
        if rc < 0:
            lend.close()
            raise HostError(ffi.string(failed[0]).decode(), -rc, MEND_PTRACE if rc == -errno.EPERM else "")
        self._zygote, self._lend = out[0], lend

    def _adopt(self, mmu: Any) -> Stub:
        """A stub for an address space that has none; Errno(EAGAIN) when the host gives no process."""
        if self._pool:
            stub = self._pool.pop()
        else:
            if self._zygote is None:
                self._start()
            stub = Stub(self._clone(self._zygote, False))
        mmu.stub = stub
        mmu.changed = [(0, self.user_top)]
        return stub

    def _clone(self, thread: Any, same: bool) -> Any:
        out = ffi.new("struct pt_thread **")
        rc = lib.pt_clone(self._m, thread, same, out)
        if rc < 0:
            if -rc in (errno.EAGAIN, errno.ENOMEM, errno.ESRCH):
                raise Errno(errno.EAGAIN)
            raise HostError("clone in a stub process", -rc)
        return out[0]

    def _stopped(self, mmu: Any) -> tuple[Any, Context | None]:
        """A thread of the address space that can execute a list; the context to let go on afterwards, if any."""
        if mmu.stub.free:
            return mmu.stub.free[-1], None
        for ctx in mmu.contexts:
            if not lib.pt_running(ctx._c):
                return lib.pt_thread_of(ctx._c), None
        ctx = next(iter(mmu.contexts))
        halted = lib.pt_stop(self._m, ctx._c) == 0
        return lib.pt_thread_of(ctx._c), ctx if halted else None

    def _enter(self, ctx: Context, mmu: Any) -> None:
        stub = mmu.stub or self._adopt(mmu)
        if stub.broken:
            raise Errno(errno.EAGAIN)
        if stub.free:
            thread = stub.free.pop()
        else:
            helper, halted = self._stopped(mmu)
            try:
                thread = self._clone(helper, True)
            finally:
                if halted is not None:
                    lib.pt_go(self._m, halted._c)
            stub.threads.append(thread)
        lib.pt_attach(self._m, ctx._c, thread)
        mmu.contexts.add(ctx)
        ctx.mmu = mmu

    def _leave(self, ctx: Context) -> None:
        mmu = ctx.mmu
        mmu.contexts.discard(ctx)
        thread = lib.pt_thread_of(ctx._c)
        lib.pt_detach(self._m, ctx._c)
        if thread != ffi.NULL and mmu.stub is not None:
            if lib.pt_dead(thread):
                mmu.stub.broken = True
            else:
                mmu.stub.free.append(thread)

    def retire(self, mmu: Any) -> None:
        """The address space is no more: its stub waits for the next one, or ends."""
        stub, mmu.stub = mmu.stub, None
        mmu.changed = []
        if stub is None:
            return
        for ctx in mmu.contexts:
            if lib.pt_running(ctx._c):
                raise BrokenInvariant("an address space went away under a running context")
            thread = lib.pt_thread_of(ctx._c)
            lib.pt_detach(self._m, ctx._c)
            if thread != ffi.NULL:
                stub.free.append(thread)
        mmu.contexts.clear()
        alive = not stub.broken and not any(lib.pt_dead(thread) for thread in stub.threads)
        if alive and len(self._pool) < POOL and len(stub.threads) <= POOL_THREADS:
            self._pool.append(stub)
            return
        if not lib.pt_dead(stub.threads[0]):  # else the pid may be somebody else's
            lib.pt_kill(self._m, stub.pid)
        for thread in stub.threads:
            lib.pt_forsake(thread)

    def forget(self, mmu: Any) -> None:
        """As with KVM; retire() has done it."""

    # -- making a stub equal to its tables

    def prepare(self, ctx: Context) -> bool:
        """Before ctx runs: it is where it belongs, and its stub is up to date. False: an event of it says why not."""
        mmu = ctx.mmu
        if ctx.next_mmu is not None:
            new, ctx.next_mmu = ctx.next_mmu, None
            if new is not mmu:
                self._leave(ctx)
                try:
                    self._enter(ctx, new)
                except Errno as error:
                    ctx.mmu = new
                    lib.pt_fail(self._m, ctx._c, error.errno)
                    return False
                mmu = new
        if mmu.changed:
            rc = self._update(mmu, lib.pt_thread_of(ctx._c))
            if rc < 0:
                lib.pt_fail(self._m, ctx._c, -rc)
                return False
        return True

    def invalidate(self, mmu: Any, places: list[int]) -> None:
        """Makes what changed in the tables of mmu hold before it returns, for threads that run; what stands still
        catches up before it runs again."""
        if not mmu.changed or mmu.stub is None:
            return
        if not any(lib.pt_running(ctx._c) for ctx in mmu.contexts):
            return
        thread, halted = self._stopped(mmu)
        rc = self._update(mmu, thread)
        if rc < 0 and not lib.pt_dead(mmu.stub.threads[0]):
            lib.pt_kill(self._m, mmu.stub.pid)  # threads that see what they must not: none may go on
        elif halted is not None:
            lib.pt_go(self._m, halted._c)

    def _update(self, mmu: Any, thread: Any) -> int:
        """Executes what makes the stub equal to the tables; 0 or -errno."""
        stub = mmu.stub
        if thread == ffi.NULL or stub is None:
            return -errno.ESRCH
        everything = self.user_top if mmu.changed[0] == (0, self.user_top) else 0
        if everything and stub.used:
            rc = self._execute(thread, [SYS_MUNMAP, 0, self.user_top, 0, 0, 0, 0], [])
            if rc < 0:
                return rc
        try:
            ops, lent = mmu.operations(everything)
        except OSError as error:  # a file whose code cannot be read
            return -(error.errno or errno.EIO)
        stub.used = True
        rc = self._execute(thread, ops, lent) if ops else 0
        if rc == -errno.ENOMEM:
            # More mappings than vm.max_map_count: all go, and faults bring back what is used.
            mmu.partial = True
            rc = self._execute(thread, [SYS_MUNMAP, 0, self.user_top, 0, 0, 0, 0], [])
        return rc

    def _execute(self, thread: Any, ops: list[int], lent: list[int]) -> int:
        """Runs the calls in a stub. `lent`: descriptors that they use as 2, 3, ...; at most MAX_FDS of them."""
        at = ffi.new("uint32_t *")
        if len(lent) > MAX_FDS:
            return self._execute_in_parts(thread, ops, lent)
        if lent:
            if self._lend is None:
                raise BrokenInvariant("descriptors are lent before there is a stub")
            rc = lib.pt_send_fds(self._lend.fileno(), lent, len(lent))
            if rc < 0:
                return int(rc)
            ops[:0] = (SYS_RECVMSG, 1, self.user_top + PAGE, MSG_DONTWAIT | MSG_CMSG_CLOEXEC, 0, 0, 0)
            for number in range(len(lent)):
                ops += (SYS_CLOSE, 2 + number, 0, 0, 0, 0, 0)
        words = array("Q", ops)
        step = OPS * WORDS
        rc = 0
        for start in range(0, len(words), step):
            part = words[start : start + step]
            self._ops[: len(part)] = part
            rc = lib.pt_run(self._m, thread, len(part) // WORDS, at)
            if rc < 0:
                break
        if rc < 0 and lent:
            for number in range(len(lent)):  # those that were lent go back, wherever it failed
                self._ops[:WORDS] = array("Q", (SYS_CLOSE, 2 + number, 0, 0, 0, 0, 0))
                lib.pt_run(self._m, thread, 1, at)
        return int(rc)

    def _execute_in_parts(self, thread: Any, ops: list[int], lent: list[int]) -> int:
        """The same with more descriptors than one message carries."""
        for start in range(0, len(ops), WORDS):
            op = ops[start : start + WORDS]
            fds = []
            if op[0] == SYS_MMAP and op[5] >= 2:
                fds = [lent[op[5] - 2]]
                op[5] = 2
            rc = self._execute(thread, op, fds)
            if rc < 0:
                return rc
        return 0

    # -- contexts

    def new_context(self, mmu: Any, regs: bytes | None = None) -> Context:
        """A stopped context in mmu, registers zero or `regs` (20 words), processor state initial; reload() starts it.
        Errno(EAGAIN) when the host gives no thread."""
        out = ffi.new("struct pt_ctx **")
        rc = lib.pt_ctx_new(self._m, out)
        if rc < 0:
            raise Errno(errno.EAGAIN)
        ctx = Context(self, out[0])
        try:
            self._enter(ctx, mmu)
        except BaseException:
            lib.pt_ctx_free(self._m, out[0])
            raise
        if regs is not None:
            ctx.regs.cast("B")[:] = regs
        self._keep(ctx)
        return ctx

    def _release(self, ctx: Context) -> None:
        self._drop(ctx)
        if lib.pt_running(ctx._c):
            lib.pt_stop(self._m, ctx._c)
        if ctx._debugged:
            ctx.set_debug([0] * 8)
        self._leave(ctx)
        c = ctx._c
        ctx._forget()
        lib.pt_ctx_free(self._m, c)

    # -- events

    def wait(self, timeout_ns: int, _wait: Any = lib.pt_wait) -> Context | None:
        """The next context with an event. None: the time is over, host descriptors were served, or wake().
        timeout_ns < 0 waits for ever, 0 looks once."""
        ctx: Context | None = self._event(_wait(self._m, timeout_ns))
        return ctx

    def _explain(self, ctx: Context) -> bool:
        c = ctx._c
        ctx.fault_address = lib.pt_fault_address(c)
        ctx.error_code = lib.pt_error_code(c)
        ctx.vector = lib.pt_vector(c)
        return ctx.event != EV_FAULT or not self._mended(ctx)

    def _host_event(self, i: int) -> int:
        packed: int = lib.pt_host_event(self._m, i)
        return packed

    def _mended(self, ctx: Context) -> bool:
        """Completes a fault's error code from the tables. True: the tables grant what was asked for, or may do by now;
        the context has gone on."""
        va, rip, mmu = ctx.fault_address, ctx.regs[RIP], ctx.mmu
        if ctx.error_code & 0x10:
            return False
        entry = mmu.entry(va & -PAGE) if va < self.user_top else 0
        if entry & P and (mmu.partial or len(mmu.contexts) > 1) and ctx._retried != (va, rip):
            # Another thread had the page filled meanwhile, or the stub lost it: once more, and then it is a fault.
            ctx._retried = (va, rip)
            if mmu.partial:
                mmu.changed.append((va & -0x10000, (va & -0x10000) + 0x10000))
            ctx.reload()
            return True
        ctx._retried = None
        if va == rip or (not va & PAGE - 1 and 0 < va - rip < 15 and entry & NX):  # 15: an instruction's longest
            ctx.error_code = 0x14 | entry & P
        elif entry & P:
            ctx.error_code = 5 | (0 if entry & W else 2)
        else:
            ctx.error_code = 4 | (2 if stores(self._code(mmu, rip)) else 0)
        return False

    def _code(self, mmu: Any, rip: int) -> bytes:
        """Up to 15 bytes of the instruction at rip, from RAM or a file window."""
        if rip >= self.user_top - 16:
            return b""
        entry = mmu.entry(rip & -PAGE)
        if not entry & P:
            return b""
        gpa = (entry & 0x000F_FFFF_FFFF_F000) + (rip & PAGE - 1)
        try:
            return self.memory.safe_read(gpa, min(15, PAGE - (rip & PAGE - 1)))
        except Errno:
            return b""

    def wake(self) -> None:
        """From any thread: makes wait() return."""
        lib.pt_wake(self._m)

    def memory_barrier(self) -> None:
        """membarrier(2) of every kind: all processors that run stubs pass a barrier before it returns."""
        rc = lib.pt_memory_barrier()
        if rc < 0:
            raise HostError("membarrier", -rc)

    def close(self) -> None:
        """Ends every stub, then the memory."""
        self._close_host_side()
        if self._lend is not None:
            self._lend.close()
            self._lend = None
        if self._m is not None:
            lib.pt_tracer_free(self._m)
            self._m = None
        memory = getattr(self, "memory", None)
        if memory is not None:
            if getattr(self, "_ops", None) is not None:
                self._ops.release()
            memory.close()
            del self.memory
