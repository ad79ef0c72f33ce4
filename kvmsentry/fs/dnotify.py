"""F_NOTIFY: a signal for what happens in a directory (fs/notify/dnotify in Linux). It stands on inotify's marks.

Linux forgets the request when the process closes any descriptor of the directory; here when the last one goes.
"""

from __future__ import annotations

import errno
import stat as st
from collections.abc import Callable

from kvmsentry.errors import Errno
from kvmsentry.fs import inotify
from kvmsentry.fs.vfs import WATCHES, File

# uapi/linux/fcntl.h
DN_ACCESS, DN_MODIFY, DN_CREATE, DN_DELETE, DN_RENAME, DN_ATTRIB, DN_MULTISHOT = 1, 2, 4, 8, 16, 32, 0x80000000
_EVENTS = {
    DN_ACCESS: inotify.IN_ACCESS,
    DN_MODIFY: inotify.IN_MODIFY,
    DN_CREATE: inotify.IN_CREATE | inotify.IN_MOVED_TO,
    DN_DELETE: inotify.IN_DELETE | inotify.IN_MOVED_FROM,
    DN_RENAME: inotify.DN_RENAMED,
    DN_ATTRIB: inotify.IN_ATTRIB,
}


class Dnotify:
    """What one open directory has asked for; owns one mark. `tell()` sends the signal."""

    def __init__(self, file: File, tell: Callable[[], None]) -> None:
        self.wanted, self.tell = 0, tell
        self.mark = inotify.Mark(self, 1, file.inode, 0)
        self.marks = {1: self.mark}

    def ask(self, wanted: int) -> None:
        """More of the DN_ bits."""
        self.wanted |= wanted
        mark = self.mark
        for bit, events in _EVENTS.items():
            if self.wanted & bit:
                mark.mask |= events
        WATCHES[mark] = None
        if mark.inode.watches is None:
            mark.inode.watches = {}
        mark.inode.watches[mark] = None

    def end(self) -> None:
        """No more signals."""
        self.wanted = self.mark.mask = 0
        inotify.drop(self.mark)

    def post(self, wd: int, mask: int, cookie: int, name: bytes) -> None:
        """One of the events has come: the first ends the request, unless DN_MULTISHOT."""
        if not mask & self.mark.mask:
            return  # IN_IGNORED
        if not self.wanted & DN_MULTISHOT:
            self.end()
        self.tell()


def notify(file: File, wanted: int, tell: Callable[[], None]) -> None:
    """fcntl(F_NOTIFY): `wanted` are DN_ bits, 0 ends it. Errno(ENOTDIR, ENOSPC)."""
    request: Dnotify | None = file.__dict__.get("dnotify")
    if not wanted & ~DN_MULTISHOT:
        if request is not None:
            request.end()
        return
    if not st.S_ISDIR(file.inode.mode):
        raise Errno(errno.ENOTDIR)
    if request is None:
        if len(WATCHES) >= inotify.MAX_WATCHES:
            raise Errno(errno.ENOSPC)
        request = file.__dict__["dnotify"] = Dnotify(file, tell)
        if file.endings is None:
            file.endings = {}
        file.endings[_end] = None
    request.ask(wanted)


def _end(file: File) -> None:
    file.__dict__.pop("dnotify").end()
