"""What both platforms share: host descriptors in the wait's epoll, and the vDSO."""

from __future__ import annotations

import errno
import select
from collections.abc import Callable

from kvmsentry.errors import HostError

from ._kvm import ffi, lib


class HostSide:
    """`_epoll` is the epoll that the platform's wait sleeps on, `_watched` the callbacks by descriptor."""

    _epoll: select.epoll
    _watched: dict[int, Callable[[int], None]]

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

    def vdso_image(self) -> bytes:
        """The vDSO, an ELF image to be mapped behind its page of parameters (guest_stub/vdso.c)."""
        length = ffi.new("uint64_t *")
        return bytes(ffi.buffer(lib.ks_vdso(length), length[0]))

    def ticks(self) -> int:
        """The host's time-stamp counter: the application's too where traits["tsc_is_hosts"]."""
        count: int = lib.ks_host_ticks()
        return count
