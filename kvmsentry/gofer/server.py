"""The Gofer's messages about objects: attributes, open files, locks, extended attributes.

Only regular files and directories are opened, and no directory's descriptor is ever given away (see nodes.py).
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from errno import EBADF, EFBIG, EINVAL, EISDIR, EOPNOTSUPP, EROFS
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.gofer import hostcalls, p9
from kvmsentry.gofer.names import NameMessages
from kvmsentry.gofer.nodes import O_TMPFILE_BIT, Node, check_name, chmod, writes
from kvmsentry.gofer.session import MOST, Open

XATTR_MOST = 65536  # uapi/linux/limits.h XATTR_SIZE_MAX
_XATTRS_READABLE = (b"user.", b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default")
_XATTRS_WRITABLE = (b"user.",)
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37  # uapi asm-generic/fcntl.h
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock, x86-64


class Server(NameMessages):
    """What a Gofer process runs: `Server(trees).serve(sock)`."""

    # --- attributes ---

    def t_attr(self, tag: int, fid: int) -> bytes:
        return p9._HEAD.pack(87, 215, tag) + self._attr(self._status(fid))

    def _status(self, fid: int) -> os.stat_result:
        node = self._node(fid)
        opened = self.opens.get(fid)
        if opened is not None and opened.fd >= 0:
            return os.fstat(opened.fd)
        return self.nodes.lstat(node)

    def t_getattr(self, tag: int, fid: int, mask: int) -> bytes:
        a = self._as_attr(self._status(fid))
        times = []
        for ns in (a.atime_ns, a.mtime_ns, a.ctime_ns):
            times += [ns // 10**9 & 0xFFFFFFFFFFFFFFFF, ns % 10**9]
        return p9.R.getattr.encode(
            tag, mask & p9.GETATTR_BASIC, a.qid, a.mode, a.uid, a.gid, a.nlink, a.rdev, a.size, a.blksize, a.blocks,
            *times, 0, 0, 0, 0,
        )  # fmt: skip

    def t_setattr(self, tag: int, fid: int, *values: int) -> None:
        self._set_attributes(fid, *values)

    def t_setattrx(self, tag: int, fid: int, *values: int) -> bytes:
        self._set_attributes(fid, *values)
        return p9._HEAD.pack(87, 217, tag) + self._attr(self._status(fid))

    def _set_attributes(
        self, fid: int, valid: int, mode: int, uid: int, gid: int, size: int, at: int, at_ns: int, mt: int, mt_ns: int
    ) -> None:
        node = self._writable(fid)
        if valid & ~p9.SETATTR_ALL:
            raise Errno(EINVAL)
        if valid & p9.SETATTR_SIZE:
            self._truncate(fid, node, size)
        change = valid & ~(p9.SETATTR_SIZE | p9.SETATTR_CTIME)
        if not change:
            return
        opened = self.opens.get(fid)
        fd, mine = (opened.fd, False) if opened is not None and opened.fd >= 0 else self.nodes.path_fd(node)
        try:
            if valid & (p9.SETATTR_UID | p9.SETATTR_GID):
                uid = uid if valid & p9.SETATTR_UID else p9.NOID
                gid = gid if valid & p9.SETATTR_GID else p9.NOID
                hostcalls.fchown_path(fd, uid, gid)
            if valid & p9.SETATTR_MODE:
                if node.kind == stat.S_IFLNK:
                    raise Errno(EOPNOTSUPP)
                if opened is not None and opened.fd == fd:
                    os.fchmod(fd, mode & 0o7777)
                else:
                    chmod(self.nodes, fd, node, mode & 0o7777)
            if valid & (p9.SETATTR_ATIME | p9.SETATTR_MTIME):
                times = []
                for bit, bit_set, sec, nsec in (
                    (p9.SETATTR_ATIME, p9.SETATTR_ATIME_SET, at, at_ns),
                    (p9.SETATTR_MTIME, p9.SETATTR_MTIME_SET, mt, mt_ns),
                ):
                    if not valid & bit:
                        times.append((0, hostcalls.UTIME_OMIT))
                    elif not valid & bit_set:
                        times.append((0, hostcalls.UTIME_NOW))
                    elif nsec >= 10**9:
                        raise Errno(EINVAL)
                    else:
                        times.append((sec - (1 << 64) if sec >> 63 else sec, nsec))
                hostcalls.utimens_path(fd, times[0], times[1])
        finally:
            if mine:
                os.close(fd)

    def _truncate(self, fid: int, node: Node, size: int) -> None:
        if node.kind != stat.S_IFREG:
            raise Errno(EISDIR if node.kind == stat.S_IFDIR else EINVAL)
        if size > MOST:
            raise Errno(EFBIG)
        opened = self.opens.get(fid)
        if opened is not None and opened.fd >= 0 and fcntl.fcntl(opened.fd, fcntl.F_GETFL) & os.O_ACCMODE:
            os.ftruncate(opened.fd, size)
            return
        fd = self.nodes.open(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def t_statfs(self, tag: int, fid: int) -> bytes:
        fd, mine = self.nodes.path_fd(self._node(fid))
        try:
            kind, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen = hostcalls.fstatfs(fd)
        finally:
            if mine:
                os.close(fd)
        return p9.R.statfs.encode(
            tag, kind & 0xFFFFFFFF, bsize & 0xFFFFFFFF, blocks, bfree, bavail, files, ffree, 0, namelen & 0xFFFFFFFF
        )

    # --- open files ---

    def _check_open(self, flags: int) -> None:
        if flags & O_TMPFILE_BIT or flags & os.O_PATH:
            raise Errno(EOPNOTSUPP)

    def t_lopen(self, tag: int, fid: int, flags: int) -> bytes:
        node = self._node(fid)
        self._opening(fid)
        self._check_open(flags)
        fd = self.nodes.open(node, flags)
        self.opens[fid] = Open(fd)
        return p9.R.lopen.encode(tag, self._as_attr(os.fstat(fd)).qid, self.msize - 24)

    def t_openfd(self, tag: int, fid: int, newfid: int, flags: int, name: bytes) -> bytes:
        node = self._node(fid)
        self._check_open(flags)
        link = b""
        if name:
            self._vacant(newfid)
            node, status = self._child(node, name)
            if node.kind not in (stat.S_IFREG, stat.S_IFDIR):  # the Sentry wants to know what it is, not an error
                if node.kind == stat.S_IFLNK:
                    try:
                        link = self._readlink(node)
                    except (OSError, Errno):
                        self.nodes.drop_unused(node)
                        raise
                self._bind(newfid, node)
                return p9.R.openfd.encode(tag, p9.ATTR.unpack(self._attr(status)), link)
        try:
            if node.kind == stat.S_IFDIR:
                # Never given away: whoever holds a directory can walk out of it with "..".
                if writes(flags):
                    raise Errno(EISDIR)
                status = self.nodes.lstat(node)
            else:
                fd = self.give = self.nodes.open(node, flags)
                status = os.fstat(fd)
        except (OSError, Errno):
            if name:
                self.nodes.drop_unused(node)
            raise
        if name:
            self._bind(newfid, node)
        return p9.R.openfd.encode(tag, p9.ATTR.unpack(self._attr(status)), link)

    def _create(self, parent: Node, name: bytes, flags: int, mode: int, uid: int, gid: int) -> tuple[Node, int]:
        """Create (or, without O_EXCL, open) a regular file; the node is unreferenced, the descriptor the caller's."""
        check_name(name)
        self._check_open(flags)
        if parent.tree.read_only:
            raise Errno(EROFS)
        directory = self.nodes.directory(parent)
        host_flags = flags & (os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_DIRECT) | os.O_CLOEXEC
        host_flags |= os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK
        try:
            fd = self.nodes.open_at(name, host_flags | os.O_CREAT | os.O_EXCL, directory, mode & 0o7777)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            node, _ = self._child(parent, name)
            try:
                return node, self.nodes.open(node, flags)
            except (OSError, Errno):
                self.nodes.drop_unused(node)
                raise
        try:
            if self._give_to(fd, uid, gid) and mode & 0o6000:
                os.fchmod(fd, mode & 0o7777)
            return self.nodes.child(parent, name, os.fstat(fd)), fd
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=directory)
            raise

    def t_lcreate(self, tag: int, fid: int, name: bytes, flags: int, mode: int, gid: int) -> bytes:
        parent = self._node(fid)
        self._opening(fid)
        node, fd = self._create(parent, name, flags, mode, p9.NOID, gid)
        self._bind(fid, node)  # the fid now stands for the file
        self.nodes.release(parent)
        self.opens[fid] = Open(fd)
        return p9.R.lcreate.encode(tag, self._as_attr(os.fstat(fd)).qid, self.msize - 24)

    def t_createfd(
        self, tag: int, dfid: int, newfid: int, flags: int, mode: int, uid: int, gid: int, name: bytes
    ) -> bytes:
        parent = self._node(dfid)
        self._vacant(newfid)
        node, fd = self._create(parent, name, flags, mode, uid, gid)
        self._bind(newfid, node)
        if node.kind != stat.S_IFREG:
            os.close(fd)
            self._unbind(newfid)
            raise Errno(EISDIR)
        self.give = fd
        return p9.R.createfd.encode(tag, p9.ATTR.unpack(self._attr(os.fstat(fd))))

    def t_read(self, tag: int, fid: int, offset: int, count: int) -> bytes:
        opened = self.opens.get(fid)
        if opened is None:
            raise Errno(EBADF)
        count = min(count, self.msize - 24)
        if opened.value is not None:
            return p9.R.read.encode(tag, opened.value[offset : offset + count])
        if opened.fd < 0:
            raise Errno(EBADF)
        if offset > MOST - count:
            raise Errno(EINVAL)
        return p9.R.read.encode(tag, os.pread(opened.fd, count, offset))

    def t_write(self, tag: int, fid: int, offset: int, data: bytes) -> bytes:
        opened = self.opens.get(fid)
        if opened is None:
            raise Errno(EBADF)
        if opened.value is not None:
            if opened.xattr is None:
                raise Errno(EBADF)
            if offset != len(opened.value) or offset + len(data) > opened.xattr[1]:
                raise Errno(EINVAL)
            opened.value += data
            return p9.R.write.encode(tag, len(data))
        if offset > MOST - len(data):
            raise Errno(EFBIG)
        return p9.R.write.encode(tag, os.pwrite(self._file(fid), data, offset))

    def t_fsync(self, tag: int, fid: int, datasync: int) -> None:
        opened = self.opens.get(fid)
        if opened is not None and opened.fd >= 0:
            (os.fdatasync if datasync else os.fsync)(opened.fd)
            return
        node = self._node(fid)
        fd = self.nodes.open(node, os.O_RDONLY)
        try:
            (os.fdatasync if datasync else os.fsync)(fd)
        finally:
            os.close(fd)

    def t_lock(
        self, tag: int, fid: int, kind: int, flags: int, start: int, length: int, proc_id: int, client_id: bytes
    ) -> bytes:
        if kind > p9.LOCK_UNLCK or start > MOST or length > MOST:
            raise Errno(EINVAL)
        try:
            # Open file description locks: two fids of one peer are two owners, as they are to Linux.
            fcntl.fcntl(self._file(fid), _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        except (BlockingIOError, PermissionError):
            return p9.R.lock.encode(tag, p9.LOCK_BLOCKED)
        return p9.R.lock.encode(tag, p9.LOCK_SUCCESS)

    def t_getlock(
        self, tag: int, fid: int, kind: int, start: int, length: int, proc_id: int, client_id: bytes
    ) -> bytes:
        if kind > p9.LOCK_UNLCK or start > MOST or length > MOST:
            raise Errno(EINVAL)
        answer = fcntl.fcntl(self._file(fid), _F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        kind, _, start, length, _ = _FLOCK.unpack(answer)
        return p9.R.getlock.encode(tag, kind, start, length, proc_id, client_id)

    # --- extended attributes ---

    def _get_xattr(self, node: Node, name: bytes) -> bytes:
        """The value of `name`, or for b"" the names, each ended by NUL; only the namespaces that we serve."""
        if len(name) > 255 or b"\0" in name:
            raise Errno(EINVAL)
        if name and not name.startswith(_XATTRS_READABLE):
            raise Errno(EOPNOTSUPP)
        target: Any = node.fd if node.real >= 0 else self.nodes.enter(node)
        follow = node.real >= 0
        if name:
            return bytes(os.getxattr(target, name, follow_symlinks=follow))
        names = [os.fsencode(n) for n in os.listxattr(target, follow_symlinks=follow)]
        return b"".join([n + b"\0" for n in names if n.startswith(_XATTRS_READABLE)])

    def _set_xattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        if node.tree.read_only:
            raise Errno(EROFS)
        if not 0 < len(name) <= 255 or b"\0" in name or flags not in (0, 1, 2, p9.XATTR_REMOVE):
            raise Errno(EINVAL)
        if not name.startswith(_XATTRS_WRITABLE):
            raise Errno(EOPNOTSUPP)
        target: Any = node.fd if node.real >= 0 else self.nodes.enter(node)
        follow = node.real >= 0
        if flags == p9.XATTR_REMOVE:
            os.removexattr(target, name, follow_symlinks=follow)
        else:
            os.setxattr(target, name, value, flags, follow_symlinks=follow)

    def t_xattrget(self, tag: int, fid: int, name: bytes) -> bytes:
        return p9.R.xattrget.encode(tag, self._get_xattr(self._node(fid), name))

    def t_xattrset(self, tag: int, fid: int, flags: int, name: bytes, data: bytes) -> None:
        if len(data) > XATTR_MOST:
            raise Errno(EINVAL)
        self._set_xattr(self._node(fid), name, data, flags)

    def t_xattrwalk(self, tag: int, fid: int, newfid: int, name: bytes) -> bytes:
        node = self._node(fid)
        self._vacant(newfid)
        self._opening(newfid)
        value = self._get_xattr(node, name)
        self._bind(newfid, node)
        opened = self.opens[newfid] = Open()
        opened.value = bytearray(value)
        return p9.R.xattrwalk.encode(tag, len(value))

    def t_xattrcreate(self, tag: int, fid: int, name: bytes, size: int, flags: int) -> None:
        self._writable(fid)
        self._opening(fid)
        if size > XATTR_MOST:
            raise Errno(EINVAL)
        opened = self.opens[fid] = Open()
        opened.value, opened.xattr = bytearray(), (name, size, flags)

    def t_clunk(self, tag: int, fid: int) -> None:
        node = self._node(fid)
        opened = self.opens.get(fid)
        try:
            if opened is not None and opened.xattr is not None and opened.value is not None:
                name, size, flags = opened.xattr
                if len(opened.value) != size:
                    raise Errno(EINVAL)
                # v9fs removes an attribute by replacing it with nothing
                self._set_xattr(node, name, bytes(opened.value), p9.XATTR_REMOVE if flags == 2 and not size else flags)
        finally:
            self._unbind(fid)
