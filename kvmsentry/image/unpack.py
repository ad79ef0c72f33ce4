"""Applying layers to a directory: the image's files as they shall be, whoever wrote the tar.

OCI image-spec, layer.md: entries in order, `.wh.NAME` hides NAME of the layers below, `.wh..wh..opq` everything in its
directory. A layer is hostile until it is unpacked:

- A file is only ever created with openat(2) and its family in a directory descriptor that was reached component by
  component without following links outside the root (`beneath.open_directory`), with O_EXCL | O_NOFOLLOW.
- No device node is made; they are listed in `Unpacker.devices`.
- Directories stay 0700 and ours until the last layer is in; their modes, owners and times are set at the end.
- What the file system cannot hold (an ordinary user's owners and modes, a capability) is kept in `Unpacker.owners`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from kvmsentry.image import tar
from kvmsentry.image.beneath import MAX_DEPTH, Escape, open_directory, remove_tree
from kvmsentry.image.faults import ImageFault, Limits
from kvmsentry.image.owners import sees_all_ids

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CACHED = 64  # parent directories kept open
_XATTR_ERRORS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.ERANGE)
_CAPABILITY = b"security.capability"


class Unpacker:
    """One root filesystem under construction in directory descriptor `root`, which stays the caller's.

    `owners` maps a path to {"uid", "gid", "mode"} (and "xattrs": {name: hex}) where the file on disk differs from the
    image; `devices` lists the device nodes left out. `bytes` and `entries` count what was written.
    """

    def __init__(self, root: int, limits: Limits) -> None:
        self._root, self._limits = root, limits
        self.privileged = sees_all_ids()
        self.entries = self.bytes = 0
        self.devices: dict[bytes, dict[str, Any]] = {}
        self.owners: dict[bytes, dict[str, Any]] = {}
        self._folders: dict[bytes, tar.Entry] = {}  # attributes to set at the end
        self._parents: dict[bytes, tuple[int, bytes]] = {}
        self._written: set[bytes] = set()  # by this layer, with the directories above
        self._lowest = True
        self._implied(b"", None)

    # --------------------------------------------------------------------------------------------------- layers

    def apply(self, reader: tar.TarReader, after: Callable[[], None] | None = None) -> None:
        """Unpack one layer over what is there; `after()` is called after each entry."""
        self._written.clear()
        umask = os.umask(0)
        try:
            while (entry := reader.next()) is not None:
                self.entries += 1
                if self.entries > self._limits.max_entries:
                    raise ImageFault(f"more than {self._limits.max_entries} files")
                self._entry(reader, entry)
                if after is not None:
                    after()
        finally:
            os.umask(umask)
        self._lowest = False

    def finish(self) -> None:
        """Set the directories' modes, owners and times, deepest first. Ends the unpacking."""
        self._forget_parents()
        for path in sorted(self._folders, key=lambda path: path.count(b"/"), reverse=True):
            self._finish_folder(path, self._folders[path])

    def close(self) -> None:
        self._forget_parents()

    def _entry(self, reader: tar.TarReader, entry: tar.Entry) -> None:
        path = _checked(entry.name)
        if not path:
            if entry.kind == tar.DIRECTORY:
                self._folders[b""] = entry
                return
            raise ImageFault(f"the tar entry {tar.shown(entry.name)} is the root, but no directory")
        directory, _, name = path.rpartition(b"/")
        try:
            parent, real = self._parent(directory, child=entry)
            if name.startswith(WHITEOUT):
                self._whiteout(parent, real, name)
                return
            path = real + b"/" + name if real else name
            self._written.add(path)
            if self.devices or self.owners:
                self.devices.pop(path, None)
                self.owners.pop(path, None)
            self._make(reader, entry, parent, name, path)
        except Escape:
            raise ImageFault(f"the path {tar.shown(entry.name)} leads out of the root filesystem") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE):
                raise
            raise ImageFault(f"cannot unpack {tar.shown(entry.name)}: {error.strerror}") from None

    def _make(self, reader: tar.TarReader, entry: tar.Entry, parent: int, name: bytes, path: bytes) -> None:
        kind = entry.kind
        if kind == tar.REGULAR:
            mode = entry.mode if self.privileged else (entry.mode & 0o777) | 0o600
            try:
                fd = os.open(name, _CREATE, mode, dir_fd=parent)
            except FileExistsError:
                self._clear(parent, name, path)
                fd = os.open(name, _CREATE, mode, dir_fd=parent)
            try:
                self._fill(reader, entry, fd)
                self._attributes(entry, fd, path, mode)
            finally:
                os.close(fd)
        elif kind == tar.DIRECTORY:
            self._make_folder(entry, parent, name, path)
        elif kind == tar.SYMLINK:
            if not entry.link:
                raise ImageFault(f"the link {tar.shown(entry.name)} leads nowhere")
            self._create(os.symlink, entry.link, name, parent=parent, path=path)
            self._attributes_at(entry, parent, name, path)
        elif kind == tar.HARDLINK:
            self._make_link(entry, parent, name, path)
        elif kind == tar.FIFO:
            mode = entry.mode if self.privileged else (entry.mode & 0o777) | 0o600
            try:
                os.mkfifo(name, mode, dir_fd=parent)
            except FileExistsError:
                self._clear(parent, name, path)
                os.mkfifo(name, mode, dir_fd=parent)
            self._attributes_at(entry, parent, name, path)
        else:
            self._clear(parent, name, path)
            self.devices[path] = {
                "type": "c" if kind == tar.CHARACTER else "b",
                "major": entry.major,
                "minor": entry.minor,
                "mode": entry.mode,
                "uid": entry.uid,
                "gid": entry.gid,
            }

    def _create(self, make: Callable[..., None], target: bytes, name: bytes, *, parent: int, path: bytes) -> None:
        try:
            make(target, name, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, name, path)
            make(target, name, dir_fd=parent)

    def _fill(self, reader: tar.TarReader, entry: tar.Entry, fd: int) -> None:
        if entry.size > self._limits.max_bytes:
            raise ImageFault(f"{tar.shown(entry.name)} is longer than {self._limits.max_bytes} bytes")
        if entry.runs is not None:
            self.bytes += reader.copy_sparse(fd, entry)
        elif entry.size:
            if self.bytes + entry.size > self._limits.max_bytes:
                raise ImageFault(f"unpacks to more than {self._limits.max_bytes} bytes")
            self.bytes += reader.copy(fd)
        if self.bytes > self._limits.max_bytes:
            raise ImageFault(f"unpacks to more than {self._limits.max_bytes} bytes")

    def _make_folder(self, entry: tar.Entry, parent: int, name: bytes, path: bytes) -> None:
        if path.count(b"/") >= MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} directories deep")
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            # A directory of a lower layer stays with what is in it; anything else makes room.
            if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                self._clear(parent, name, path)
                os.mkdir(name, 0o700, dir_fd=parent)
        self._folders[path] = entry

    def _make_link(self, entry: tar.Entry, parent: int, name: bytes, path: bytes) -> None:
        target = _checked(entry.link)
        directory, _, last = target.rpartition(b"/")
        source, real = self._parent(directory, keep=parent)
        real_target = real + b"/" + last if real else last
        if not last or real_target == path:
            raise ImageFault(f"the hard link {tar.shown(entry.name)} leads to itself")
        if (device := self.devices.get(real_target)) is not None:
            self._clear(parent, name, path)
            self.devices[path] = device
            return
        try:
            os.link(last, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            # The target may lie below what is in the way, so look again after clearing it.
            self._clear(parent, name, path)
            source, _ = self._parent(directory, keep=parent)
            os.link(last, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        if real_target in self.owners:
            self.owners[path] = self.owners[real_target]

    # ----------------------------------------------------------------------------------------------- attributes

    def _attributes(self, entry: tar.Entry, fd: int, path: bytes, mode: int) -> None:
        """Owner before mode before xattrs: chown(2) clears set-id bits and capabilities, writes clear both."""
        uid, gid = entry.uid, entry.gid
        if not self.privileged:
            if uid or gid or mode != entry.mode:
                self.owners[path] = {"uid": uid, "gid": gid, "mode": entry.mode}
        else:
            if uid or gid:
                try:
                    os.chown(fd, uid, gid)
                except OSError as error:
                    self._keep_owner(error, entry, path)
            if entry.mode & 0o7000:
                os.chmod(fd, entry.mode)
        if entry.xattrs:
            self._xattrs(entry, fd, path)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _attributes_at(self, entry: tar.Entry, parent: int, name: bytes, path: bytes) -> None:
        """The same for what is not opened: links and FIFOs. A link's mode means nothing."""
        uid, gid = entry.uid, entry.gid
        link = entry.kind == tar.SYMLINK
        if not self.privileged:
            if uid or gid or (not link and entry.mode != (entry.mode & 0o777) | 0o600):
                self.owners[path] = {"uid": uid, "gid": gid, "mode": 0o777 if link else entry.mode}
        elif uid or gid:
            try:
                os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
            except OSError as error:
                self._keep_owner(error, entry, path)
        if entry.mode & 0o7000 and not link and self.privileged:
            os.chmod(name, entry.mode, dir_fd=parent)  # a FIFO that we have just made in a directory of ours
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _finish_folder(self, path: bytes, entry: tar.Entry) -> None:
        directory, _, name = path.rpartition(b"/")
        try:
            parent, real = open_directory(self._root, directory)
        except (FileNotFoundError, NotADirectoryError):
            return  # a later entry took its place
        try:
            if real != directory:
                return
            fd = os.open(name or b".", _FOLDER, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return
        finally:
            os.close(parent)
        try:
            mode = entry.mode if self.privileged else (entry.mode & 0o777) | 0o700
            self._attributes(entry, fd, path, mode)
            if not self.privileged or not entry.mode & 0o7000:  # else _attributes has set it
                os.chmod(fd, mode)
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _keep_owner(self, error: OSError, entry: tar.Entry, path: bytes) -> None:
        """In a user namespace not every owner exists (EINVAL), and a container's root may lack CAP_CHOWN (EPERM)."""
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise error
        self.owners[path] = {"uid": entry.uid, "gid": entry.gid, "mode": entry.mode}

    def _xattrs(self, entry: tar.Entry, fd: int, path: bytes) -> None:
        """Capabilities and user.*; others (POSIX ACLs, SELinux labels, trusted.*) mean nothing in the sandbox."""
        assert entry.xattrs is not None
        for name, value in entry.xattrs.items():
            if name != _CAPABILITY and not name.startswith(b"user."):
                continue
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno not in _XATTR_ERRORS:
                    raise
                kept = self.owners.setdefault(path, {"uid": entry.uid, "gid": entry.gid, "mode": entry.mode})
                kept.setdefault("xattrs", {})[os.fsdecode(name)] = value.hex()

    # -------------------------------------------------------------------------------------------------- removal

    def _whiteout(self, parent: int, real: bytes, name: bytes) -> None:
        if name == OPAQUE:
            if not self._lowest:
                self._empty(parent, real)
            return
        if name.startswith(b".wh..wh."):
            return  # aufs' own files
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise ImageFault(f"the whiteout {tar.shown(name)} hides nothing that may be hidden")
        path = real + b"/" + hidden if real else hidden
        if path not in self._written:
            self._clear(parent, hidden, path)
        elif not self._lowest:  # hides what lower layers had, not what this one has put there
            self._empty_below(parent, hidden, path)

    def _empty(self, parent: int, real: bytes) -> None:
        """Remove what lower layers left in a directory, keeping what this layer has written."""
        fd = os.open(b".", _FOLDER, dir_fd=parent)
        try:
            with os.scandir(fd) as found:
                names = [os.fsencode(item.name) for item in found]
            for name in names:
                path = real + b"/" + name if real else name
                if path in self._written:
                    self._empty_below(fd, name, path)
                else:
                    self._clear(fd, name, path)
        finally:
            os.close(fd)
        prefix = real + b"/" if real else b""
        for path in [path for path in self.devices if path.startswith(prefix) and path not in self._written]:
            del self.devices[path]

    def _empty_below(self, parent: int, name: bytes, path: bytes) -> None:
        try:
            fd = os.open(name, _FOLDER, dir_fd=parent)
        except (NotADirectoryError, FileNotFoundError):
            return
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                return
            raise
        try:
            self._empty(fd, path)
        finally:
            os.close(fd)

    def _clear(self, parent: int, name: bytes, path: bytes) -> None:
        """Remove whatever is at `path`, and what was remembered about it."""
        try:
            status = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            self.devices.pop(path, None)
            return
        if stat.S_ISDIR(status.st_mode):
            self._forget_parents(but=parent)
            below = path + b"/"
            for key in [key for key in self.devices if key.startswith(below)]:
                del self.devices[key]
        elif stat.S_ISLNK(status.st_mode):
            self._forget_parents(but=parent)
        written = path in self._written
        remove_tree(parent, name, path, self._forget)
        self.devices.pop(path, None)
        if written:
            self._written.add(path)

    def _forget(self, path: bytes) -> None:
        self._folders.pop(path, None)
        self.owners.pop(path, None)
        self._written.discard(path)

    # -------------------------------------------------------------------------------------------------- parents

    def _parent(self, directory: bytes, keep: int = -1, child: tar.Entry | None = None) -> tuple[int, bytes]:
        """An open descriptor of a directory and its path without links; the descriptor `keep` stays open.

        What is missing is made for the entry `child`, whose time the new directories get.
        """
        found = self._parents.get(directory)
        if found is None:
            made: list[bytes] | None = None if child is None else []
            found = open_directory(self._root, directory, made)
            for path in made or ():
                self._implied(path, child)
            if len(self._parents) >= _CACHED:
                for old in list(self._parents)[: _CACHED // 2]:
                    if self._parents[old][0] != keep:
                        os.close(self._parents.pop(old)[0])
            self._parents[directory] = found
        real = found[1]
        if child is not None and real not in self._written:
            while real and real not in self._written:
                self._written.add(real)
                real = real.rpartition(b"/")[0]
        return found

    def _implied(self, path: bytes, child: tar.Entry | None) -> None:
        """A directory that no entry of its own describes: 0755, root's."""
        entry = tar.Entry()
        entry.name, entry.kind, entry.link = path, tar.DIRECTORY, b""
        entry.mode, entry.uid, entry.gid, entry.size, entry.major, entry.minor = 0o755, 0, 0, 0, 0, 0
        entry.mtime_ns = 0 if child is None else child.mtime_ns
        entry.xattrs = entry.runs = None
        self._folders[path] = entry

    def _forget_parents(self, but: int = -1) -> None:
        for directory, (fd, _) in list(self._parents.items()):
            if fd != but:
                os.close(fd)
                del self._parents[directory]


def _checked(name: bytes) -> bytes:
    """A tar's path made relative to the root, as chroot would read it; ImageFault when it climbs."""
    path = name
    if path.startswith((b"./", b"/")) or path.endswith(b"/") or b"//" in path or b"/./" in path or path in (b".", b""):
        path = b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
        if not name:
            raise ImageFault("a tar entry has no name")
    elif path.endswith(b"/."):
        path = path[:-2]
    if b".." in path and b".." in path.split(b"/"):
        raise ImageFault(f"the path {tar.shown(name)} leads out of the root filesystem")
    return path
