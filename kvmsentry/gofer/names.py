"""The Gofer's messages about names: walk, directories, making, linking, renaming, removing.

Nothing here follows a symlink or hands the host more than one name at a time (see nodes.py).
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from collections.abc import Iterator
from errno import EBADF, EBUSY, EINVAL, EIO, ENFILE, ENOENT, ENOTDIR, EOVERFLOW, EPERM, EROFS, ESTALE, EXDEV
from itertools import islice
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.gofer import hostcalls, p9
from kvmsentry.gofer._host import ffi, lib
from kvmsentry.gofer.nodes import Node, check_name, chmod
from kvmsentry.gofer.session import Open, Session, status_fields

_RENAME_FLAGS = 0x3  # RENAME_NOREPLACE | RENAME_EXCHANGE (uapi/linux/fs.h)
_FS_ENCODING = sys.getfilesystemencoding()
_stat = os.stat
_LISTING = struct.Struct("<IIH")  # tree: errno, length of the entries, of the path
TREE_DEPTH = 16


class NameMessages(Session):
    """walk to unlinkat."""

    # --- names ---

    def t_walk(self, tag: int, fid: int, newfid: int, names: list[bytes]) -> bytes:
        node = start = self._node(fid)
        if newfid != fid:
            self._vacant(newfid)  # walking away from an open fid is fine with Linux's peers, if not with walk(5)
        elif fid in self.opens:
            raise Errno(EBADF)
        qids: list[tuple[int, int, int]] = []
        start.refs += 1
        try:
            for name in names:
                try:
                    below, status = self._child(node, name)
                except (OSError, Errno):
                    if not qids:
                        raise
                    return p9.R.walk.encode(tag, qids)  # walk(5): part of the way is an answer, newfid stays unbound
                below.refs += 1
                self.nodes.release(node)
                node = below
                qids.append(self._as_attr(status).qid)
            if newfid == fid:
                self.fids.pop(fid)
                self.nodes.release(start)
            self._bind(newfid, node)
        finally:
            self.nodes.release(node)
        return p9.R.walk.encode(tag, qids)

    def t_walkattr(self, tag: int, fid: int, steps: list[tuple[int, bytes]]) -> bytes:
        fids, nodes = self.fids, self.nodes
        node = fids.get(fid)
        if node is None:
            raise Errno(EBADF)
        self._vacant(*[step[0] for step in steps])
        attrs, link, error = b"", b"", 0
        found = 0
        for newfid, name in steps:
            if node.kind != stat.S_IFDIR:
                error = ENOTDIR
                break
            try:
                if not 0 < len(name) < 256 or b"/" in name or b"\0" in name or name == b"." or name == b"..":
                    check_name(name)
                status = _stat(name, dir_fd=nodes.directory(node), follow_symlinks=False)
            except OSError as problem:
                error = problem.errno or EIO
                break
            except Errno as problem:
                error = problem.errno
                break
            node = nodes.child(node, name, status)
            node.refs += 1
            fids[newfid] = node
            attrs += self._attr(status)
            found += 1
        if found and node.kind == stat.S_IFLNK:
            try:
                assert node.parent is not None
                link = os.readlink(node.name, dir_fd=nodes.directory(node.parent))
            except OSError:
                link = b""  # replaced since: the Sentry asks with readlink, and gets the errno
        return (
            p9._HEAD.pack(p9.HEADER + 8 + len(link) + len(attrs), 201, tag)
            + struct.pack("<IH", error, len(link)) + link + struct.pack("<H", found) + attrs
        )  # fmt: skip

    def t_readlink(self, tag: int, fid: int) -> bytes:
        node = self._node(fid)
        if node.kind != stat.S_IFLNK:
            raise Errno(EINVAL)
        return p9.R.readlink.encode(tag, self._readlink(node))

    def _readlink(self, node: Node) -> bytes:
        fd, mine = self.nodes.path_fd(node)
        try:
            return bytes(os.readlink(b"", dir_fd=fd))
        finally:
            if mine:
                os.close(fd)

    # --- directories ---

    def _scan(self, fid: int, cookie: int, dots: bool) -> Open:
        """Directory `fid`'s reading position, put at entry number `cookie`; the caller takes entries with _entries."""
        opened = self.opens.get(fid)
        if opened is None:
            node = self._node(fid)
            if node.kind != stat.S_IFDIR:
                raise Errno(ENOTDIR)
            self._opening(fid)
            opened = self.opens[fid] = Open(self.nodes.open(node, os.O_RDONLY))
            opened.implicit = True
        if opened.fd < 0 or opened.value is not None:
            raise Errno(EBADF)
        if opened.scan is None or cookie != opened.cookie:
            if opened.scan is not None:
                opened.scan.close()  # type: ignore[attr-defined]
            opened.scan, opened.cookie, opened.pending = _entries(opened.fd, dots), 0, None
            while opened.cookie < cookie:
                if next(opened.scan, None) is None:
                    break
                opened.cookie += 1
        return opened

    def t_readdirattr(self, tag: int, fid: int, cookie: int, count: int) -> bytes:
        opened = self._scan(fid, cookie, False)
        room = min(count, self.msize - 32)
        parts: list[bytes] = []
        done, full = 0, False
        put, devices, fields = p9.ENTRY.pack, self.devices, status_fields
        if opened.pending is not None:
            entry = opened.pending[0]
            if len(entry) > room:
                raise Errno(EINVAL)
            parts.append(entry)
            done, opened.pending = 1, None
            room -= len(entry)
        assert opened.scan is not None
        for found in opened.scan:
            name = found.name.encode(_FS_ENCODING, "surrogateescape")
            try:
                status = found.stat(follow_symlinks=False)
                dev = devices.get(status.st_dev)
                if dev is None:
                    dev = devices[status.st_dev] = len(devices)
                entry = put(dev, *fields(status), len(name)) + name
            except struct.error:
                entry = self._attr(status) + struct.pack("<H", len(name)) + name
            except OSError:
                continue  # removed since it was listed
            room -= len(entry)
            if room < 0:
                opened.pending, full = (entry, name), True
                break
            parts.append(entry)
            done += 1
        opened.cookie += done
        if full and not parts:
            raise Errno(EINVAL)  # not even one entry fits
        if not full and opened.implicit:
            self.opens.pop(fid).close()
        data = b"".join(parts)
        return p9._HEAD.pack(p9.HEADER + 12 + len(data), 203, tag) + struct.pack(
            "<QI", opened.cookie if full else 0, len(data)
        ) + data  # fmt: skip

    def _list(self, fd: int, room: int) -> tuple[bytes, list[bytes]] | None:
        """(all entries of an open directory with their attributes, packed; names of the directories among them); None
        when they take more than `room` bytes. OSError."""
        devices, known = self.devices, self.known
        if known is None:
            known = self.known = ffi.new("struct kg_devices *")
            self.listed = ffi.new("uint8_t[]", self.msize), ffi.new("uint32_t[]", self.msize // lib.KG_ENTRY)
        if len(devices) > lib.KG_DEVICES:
            return None
        for dev in islice(devices, known.count, None):
            known.dev[known.count] = dev
            known.count += 1
        out, offsets = self.listed
        found = ffi.new("uint32_t *")
        n = lib.kg_list(fd, out, min(room, len(out)), known, offsets, len(offsets), found)
        for index in range(len(devices), known.count):
            devices[known.dev[index]] = index
        if n < 0:
            if n in (-EOVERFLOW, -ENFILE):
                return None
            raise OSError(-n, os.strerror(-n))
        data = ffi.buffer(out, n)[:]
        directories: list[bytes] = []
        for at in ffi.unpack(offsets, found[0]) if found[0] else ():
            name = at + lib.KG_ENTRY
            directories.append(data[name : name + (data[name - 2] | data[name - 1] << 8)])
        return data, directories

    def t_tree(self, tag: int, fid: int, count: int, depth: int, names: list[bytes]) -> bytes:
        """Directories are opened one name at a time beneath `fid`, without following links, read and closed."""
        node = self._node(fid)
        if node.kind != stat.S_IFDIR:
            raise Errno(ENOTDIR)
        for name in names:
            check_name(name)
        listings: list[bytes] = []
        room = min(count, self.msize - 32)
        directory = self.nodes.directory(node)
        for name in names:
            room = self._tree(directory, name, name, min(depth, TREE_DEPTH), room, listings)
            if room < 0:
                break
        return p9.R.tree.encode(tag, b"".join(listings))

    def _tree(self, directory: int, name: bytes, path: bytes, depth: int, room: int, listings: list[bytes]) -> int:
        """Appends the listing of `name` in `directory` and of those below; returns the room left, -1: it is used up."""
        room -= _LISTING.size + len(path)
        if room < 0:
            return -1
        try:
            fd = self.nodes.open_at(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, directory)
        except OSError as problem:
            if not listings:
                listings += (_LISTING.pack(problem.errno or EIO, 0, len(path)), path)
            return room
        try:
            packed = self._list(fd, room)
            if packed is None:
                if not listings:
                    listings += (_LISTING.pack(EOVERFLOW, 0, len(path)), path)
                return -1
            data, directories = packed
            listings += (_LISTING.pack(0, len(data), len(path)), path, data)
            room -= len(data)
            if depth:
                for below in directories:
                    room = self._tree(fd, below, path + b"/" + below, depth - 1, room, listings)
                    if room < 0:
                        break
            return room
        except OSError as problem:
            if not listings:
                listings += (_LISTING.pack(problem.errno or EIO, 0, len(path)), path)
            return room
        finally:
            os.close(fd)

    def t_readdir(self, tag: int, fid: int, offset: int, count: int) -> bytes:
        if fid not in self.opens:
            raise Errno(EBADF)
        opened = self._scan(fid, offset, True)
        room = min(count, self.msize - 24)
        parts: list[bytes] = []
        node = self.fids[fid]
        assert opened.scan is not None
        while True:
            if opened.pending is not None:
                entry, opened.pending = opened.pending[0], None
            else:
                found = next(opened.scan, None)
                if found is None:
                    break
                entry = self._dirent(node, opened.fd, found, opened.cookie + 1)
            if len(entry) > room:
                opened.pending = (entry, b"")
                if not parts:
                    raise Errno(EINVAL)
                break
            room -= len(entry)
            parts.append(entry)
            opened.cookie += 1
        return p9.R.readdir.encode(tag, b"".join(parts))

    def _dirent(self, node: Node, fd: int, found: Any, following: int) -> bytes:
        if found == "." or found == "..":
            # ".." of a tree's root is the root; any other has the qid its parent node was walked with
            name = found.encode()
            above = node.parent if found == ".." and node.parent is not None and node is not node.tree.root else node
            dev = self.devices.setdefault(above.dev, len(self.devices))
            return p9.DIRENT.pack(p9.QTDIR, 0, above.ino ^ (dev << 48), following, 4, len(name)) + name
        name = found.name.encode(_FS_ENCODING, "surrogateescape")
        kind = 4 if found.is_dir(follow_symlinks=False) else 10 if found.is_symlink() else 8
        qtype = p9.QTDIR if kind == 4 else p9.QTSYMLINK if kind == 10 else p9.QTFILE
        dev = self.devices.setdefault(node.dev, len(self.devices))
        if kind == 8 and not found.is_file(follow_symlinks=False):
            try:
                kind = stat.S_IFMT(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode) >> 12  # DT_* (dirent.h)
            except OSError:
                kind = 0
        return p9.DIRENT.pack(qtype, 0, found.inode() ^ (dev << 48), following, kind, len(name)) + name

    # --- making, linking and removing names ---

    def _make(
        self, dfid: int, name: bytes, mode: int, uid: int, gid: int, target: bytes
    ) -> tuple[Node, os.stat_result]:
        """mkdir, symlink, FIFO, socket or empty file; the node is unreferenced. Device nodes are EPERM."""
        parent = self._writable(dfid)
        check_name(name)
        directory = self.nodes.directory(parent)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, mode & 0o7777, dir_fd=directory)
        elif kind == stat.S_IFLNK:
            if not target or b"\0" in target:
                raise Errno(ENOENT if not target else EINVAL)
            os.symlink(target, name, dir_fd=directory)
        elif kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG, 0):
            os.mknod(name, mode & 0o7777 | (kind or stat.S_IFREG), dir_fd=directory)
        else:
            raise Errno(EPERM if kind in (stat.S_IFCHR, stat.S_IFBLK) else EINVAL)
        node, status = self._child(parent, name)
        try:
            if node.kind != (kind or stat.S_IFREG):
                raise Errno(ESTALE)  # somebody else on the host was faster
            fd, mine = self.nodes.path_fd(node)
            try:
                self._give_to(fd, uid, gid)
                if mode & 0o7000 and kind != stat.S_IFLNK:  # mkdir(2) and chown(2) drop set-id bits
                    chmod(self.nodes, fd, node, mode & 0o7777 | status.st_mode & stat.S_ISGID)
                status = os.fstat(fd)
            finally:
                if mine:
                    os.close(fd)
        except BaseException:
            self.nodes.drop_unused(node)
            (os.rmdir if kind == stat.S_IFDIR else os.unlink)(name, dir_fd=directory)
            raise
        return node, status

    def _made(self, dfid: int, name: bytes, mode: int, gid: int, target: bytes = b"") -> tuple[int, int, int]:
        node, status = self._make(dfid, name, mode, p9.NOID, gid, target)
        self.nodes.drop_unused(node)
        return self._as_attr(status).qid

    def t_make(
        self, tag: int, dfid: int, newfid: int, mode: int, uid: int, gid: int, major: int, minor: int, name: bytes,
        target: bytes,
    ) -> bytes:  # fmt: skip
        self._vacant(newfid)
        node, status = self._make(dfid, name, mode, uid, gid, target)
        self._bind(newfid, node)
        return p9._HEAD.pack(87, 209, tag) + self._attr(status)

    def t_mkdir(self, tag: int, dfid: int, name: bytes, mode: int, gid: int) -> bytes:
        return p9.R.mkdir.encode(tag, self._made(dfid, name, stat.S_IFDIR | mode & 0o7777, gid))

    def t_symlink(self, tag: int, dfid: int, name: bytes, target: bytes, gid: int) -> bytes:
        return p9.R.symlink.encode(tag, self._made(dfid, name, stat.S_IFLNK | 0o777, gid, target))

    def t_mknod(self, tag: int, dfid: int, name: bytes, mode: int, major: int, minor: int, gid: int) -> bytes:
        if stat.S_IFMT(mode) in (stat.S_IFDIR, stat.S_IFLNK):
            raise Errno(EPERM)
        return p9.R.mknod.encode(tag, self._made(dfid, name, mode, gid))

    def _link(self, dfid: int, fid: int, name: bytes) -> Node:
        parent, node = self._writable(dfid), self._writable(fid)
        check_name(name)
        if node.tree is not parent.tree or node.kind == stat.S_IFDIR:
            raise Errno(EPERM if node.kind == stat.S_IFDIR else EXDEV)
        if node.pinned or node.parent is None:
            raise Errno(ENOENT)
        self.nodes.lstat(node)
        target = os.dup(self.nodes.directory(parent))  # a duplicate: opening the other directory may push it out
        try:
            source = self.nodes.directory(node.parent)
            os.link(node.name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(target)
        return node

    def t_link(self, tag: int, dfid: int, fid: int, name: bytes) -> None:
        self._link(dfid, fid, name)

    def t_linkattr(self, tag: int, dfid: int, fid: int, name: bytes) -> bytes:
        node = self._link(dfid, fid, name)
        return p9._HEAD.pack(87, 223, tag) + self._attr(self.nodes.lstat(node))

    def t_renameat(self, tag: int, olddirfid: int, oldname: bytes, newdirfid: int, newname: bytes) -> None:
        self._rename(self._writable(olddirfid), oldname, self._writable(newdirfid), newname, 0)

    def t_renameat2(
        self, tag: int, olddirfid: int, newdirfid: int, flags: int, oldname: bytes, newname: bytes
    ) -> None:
        self._rename(self._writable(olddirfid), oldname, self._writable(newdirfid), newname, flags)

    def t_rename(self, tag: int, fid: int, dfid: int, name: bytes) -> None:
        node = self._writable(fid)
        if node.parent is None or node is node.tree.root:
            raise Errno(EBUSY)
        if node.pinned:
            raise Errno(ENOENT)
        self.nodes.lstat(node)
        self._rename(node.parent, node.name, self._writable(dfid), name, 0)

    def _rename(self, old: Node, old_name: bytes, new: Node, new_name: bytes, flags: int) -> None:
        check_name(old_name)
        check_name(new_name)
        if old.tree is not new.tree:
            raise Errno(EXDEV)
        if flags & ~_RENAME_FLAGS or flags == _RENAME_FLAGS:
            raise Errno(EINVAL)
        nodes = self.nodes
        moving, replaced = nodes.known(old, old_name), nodes.known(new, new_name)
        if moving is replaced and moving is not None:
            replaced = None
        exchange = flags & 2
        if replaced is not None and not exchange and not flags & 1:
            nodes.pin(replaced)
        try:
            new_fd = os.dup(nodes.directory(new))  # a duplicate: opening `old` may push `new` out
            try:
                old_fd = nodes.directory(old)
                if flags:
                    hostcalls.renameat2(old_fd, old_name, new_fd, new_name, flags)
                else:
                    os.rename(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
            finally:
                os.close(new_fd)
        except BaseException:
            if replaced is not None:
                nodes.unpin(replaced)
            raise
        if moving is not None and moving is nodes.known(new, new_name):
            return
        if replaced is not None:
            nodes.forget(replaced)
        if moving is not None:
            nodes.moved(moving, new, new_name)
        if exchange and replaced is not None:
            nodes.moved(replaced, old, old_name)

    def t_unlinkat(self, tag: int, dfid: int, name: bytes, flags: int) -> None:
        parent = self._writable(dfid)
        check_name(name)
        if flags & ~p9.AT_REMOVEDIR:
            raise Errno(EINVAL)
        self._remove(parent, name, flags & p9.AT_REMOVEDIR != 0)

    def _remove(self, parent: Node, name: bytes, directory: bool) -> None:
        nodes = self.nodes
        node = nodes.known(parent, name)
        if node is not None:
            nodes.pin(node)
        try:
            (os.rmdir if directory else os.unlink)(name, dir_fd=nodes.directory(parent))
        except BaseException:
            if node is not None:
                nodes.unpin(node)
            raise
        if node is not None:
            nodes.forget(node)

    def _give_to(self, fd: int, uid: int, gid: int) -> bool:
        """Owner of what was just created; clears set-id bits. False: we may not give files away, it stays ours."""
        if not self.owns or (uid == p9.NOID and gid == p9.NOID):
            return False
        hostcalls.fchown_path(fd, uid, gid)
        return True

    def t_remove(self, tag: int, fid: int) -> None:
        node = self._node(fid)
        try:
            if node.tree.read_only:
                raise Errno(EROFS)
            if node.parent is None or node is node.tree.root:
                raise Errno(EBUSY)
            if node.pinned:
                raise Errno(ENOENT)
            self.nodes.lstat(node)
            self._remove(node.parent, node.name, node.kind == stat.S_IFDIR)
        finally:
            self._unbind(fid)


def _entries(fd: int, dots: bool) -> Iterator[Any]:
    """os.scandir of an open directory from its start, after "." and ".." (as strings) if `dots`."""
    os.lseek(fd, 0, os.SEEK_SET)
    if dots:
        yield "."
        yield ".."
    with os.scandir(fd) as found:
        yield from found
