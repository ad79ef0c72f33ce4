"""What both platforms share: a context's attributes, which contexts there are, what wait() got, host descriptors in the
wait's epoll, and the vDSO."""

from __future__ import annotations

import errno
import os
import select
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from kvmsentry.errors import BrokenInvariant, HostError

from ._kvm import ffi, lib
from .layout import EV_EXCEPTION, EV_FAULT, EV_HOST_ERROR, EV_SYSCALL, NEVER, NREGS

# What the C wait returns beside event << 16 | id: the same numbers in both api.h.
HOST: int = lib.KS_HOST  # host descriptors are ready
FAILED: int = lib.KS_FAILED  # below -FAILED: -FAILED - 1 - errno


class ContextState:
    """What an event left, and whose processor this is: `c` is the platform's C structure, `regs` and `call` are its
    memory. The attributes of an event hold until the context is answered."""

    __slots__ = ("_call", "_c", "error_code", "event", "fault_address", "id", "mmu", "next_mmu", "owner", "regs",
                 "vector")  # fmt: skip

    regs: memoryview
    event: int

    def __init__(self, c: Any, number: int, regs: Any, call: Any) -> None:
        self._c = c
        self.id = number
        self.regs = memoryview(regs).cast("B").cast("Q")
        self._call = memoryview(call).cast("B").cast("Q")
        self.mmu: Any = None
        self.next_mmu: Any = None
        self.owner: Any = None
        self.event = EV_SYSCALL
        self.fault_address = self.error_code = self.vector = 0

    def _forget(self) -> None:
        """Before the C structure is freed."""
        self.regs.release()
        self._call.release()
        self._c = None

    @property
    def nr(self) -> int:
        """EV_SYSCALL: the number, RAX."""
        return self._call[0]

    @property
    def args(self) -> tuple[int, ...]:
        """EV_SYSCALL: the six arguments."""
        return tuple(self._call[1:])


REGS_SIZE, CALL_SIZE = NREGS * 8, 7 * 8


class HostSide(ABC):
    """A platform's half that does not depend on what runs the guest. The rest: the C wait, `_explain`,
    `_host_event`."""

    def __init__(self) -> None:
        self._contexts: dict[int, Any] = {}  # by id, from new_context to release
        self._watched: dict[int, Callable[[int], None]] = {}

    def _sleep_on(self, epoll: int) -> None:
        """The epoll that the platform's wait sleeps on."""
        self._epoll = select.epoll.fromfd(os.dup(epoll))

    @abstractmethod
    def _explain(self, ctx: Any) -> bool:
        """Fills fault_address, error_code and vector in for the event of ctx. False: it was none after all, the context
        has gone on."""

    @abstractmethod
    def _host_event(self, i: int) -> int:
        """Ready events << 32 | descriptor of the i-th that the last wait found; 0: there are no more."""

    # Contexts.

    def _keep(self, ctx: Any) -> None:
        self._contexts[ctx.id] = ctx

    def _drop(self, ctx: Any) -> None:
        if self._contexts.pop(ctx.id, None) is not ctx:
            raise BrokenInvariant("a context is released twice")

    # The wait.

    @abstractmethod
    def wait(self, timeout_ns: int) -> Any:
        """The next context with an event. None: the time is over, host descriptors were served, or wake().
        timeout_ns < 0 waits for ever, 0 looks once."""

    def server(self, kernel: Any, rows: list[Any], task_type: type) -> Callable[[], Any]:
        """What kernel.run() calls for its next event: here wait() until the next timer, nothing more. None also when a
        timer is due; it is told so at most every other time, so that guests have their turn where one always is. `rows`
        is the table of system calls."""
        wait, timers, now = self.wait, kernel.timers, kernel.now
        looked = False

        def serve() -> Any:
            nonlocal looked
            if timers.deadline == NEVER:
                return wait(-1)
            left = timers.deadline - now()
            if left > 0 or not looked:
                looked = left <= 0
                return wait(max(left, 0))
            looked = False
            return None

        return serve

    def _event(self, n: int) -> Any:
        """What the C wait returned, as wait() does."""
        if 0 <= n <= 0xFFFF:  # EV_SYSCALL << 16 | id
            ctx = self._contexts[n]
            ctx.event = EV_SYSCALL
            return ctx
        return self._other(n)

    def _other(self, n: int) -> Any:
        """What wait() does with all but system calls: the context, or None."""
        if n >= 0:
            ctx: Any = self._contexts.get(n & 0xFFFF)
            if ctx is None:
                raise BrokenInvariant(f"an event of context {n & 0xFFFF}, which is none")
            event = ctx.event = n >> 16
            if event in (EV_FAULT, EV_EXCEPTION, EV_HOST_ERROR) and not self._explain(ctx):
                return None
            return ctx
        if n == HOST:
            # All of them are read before the first callback runs: a callback may wait in turn.
            ready: list[tuple[int, int]] = []
            while (packed := self._host_event(len(ready))) != 0:
                ready.append((packed & 0xFFFFFFFF, packed >> 32))
            for fd, events in ready:
                callback = self._watched.get(fd)
                if callback is not None:
                    callback(events)
        elif n < -FAILED:
            raise HostError("epoll_wait", -n - FAILED - 1)
        return None

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls callback(ready events) inside wait() when the host's descriptor is ready: as often as it looks while it
        is, once an edge with EPOLLET. Watching it again replaces events and callback. HostError when epoll cannot watch
        it."""
        try:
            if fd in self._watched:
                self._epoll.modify(fd, events)
            else:
                self._epoll.register(fd, events)
        except OSError as error:
            raise HostError(f"epoll_ctl of descriptor {fd}", error.errno or errno.EIO) from None
        self._watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Ends watch(); before the descriptor is closed."""
        if self._watched.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError as error:
                raise HostError(f"epoll_ctl of descriptor {fd}", error.errno or errno.EIO) from None

    def _close_host_side(self) -> None:
        epoll = getattr(self, "_epoll", None)
        if epoll is not None:
            epoll.close()

    def vdso_image(self) -> bytes:
        """The vDSO, an ELF image to be mapped behind its page of parameters (guest_stub/vdso.c)."""
        length = ffi.new("uint64_t *")
        return bytes(ffi.buffer(lib.ks_vdso(length), length[0]))

    def ticks(self) -> int:
        """The host's time-stamp counter: the application's too where traits["tsc_is_hosts"]."""
        count: int = lib.ks_host_ticks()
        return count
