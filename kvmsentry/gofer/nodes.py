"""Names to host files: trees, nodes, and the few descriptors that are kept open for them.

A fid of the Sentry stands for a `Node`: (parent node, name, device, inode). Nodes hold no descriptor; what needs the
host looks the name up in the parent's O_PATH directory descriptor, with O_NOFOLLOW, and checks device and inode.
Directory descriptors are opened when first needed and kept in an LRU of bounded length, so 100,000 fids need a few
hundred descriptors. A node whose name no longer leads to it is ESTALE, unless it was pinned before the name went away
(`pin`).

What must hold:
- every host lookup is of one component (checked by `check_name`) relative to a directory descriptor, never followed:
  a name cannot leave the directory, wherever other host processes move things meanwhile. /proc is never used.
- only regular files and directories are opened for I/O, and only after their type was seen; mounts of the trees are
  nodev where the Gofer has its own mount namespace, so a name swapped for a device in between opens nothing either.
- `refs` counts fids and child nodes; at 0 the node leaves its parent's `children` and its descriptor is closed.
"""

from __future__ import annotations

import os
import stat
from errno import EACCES, ELOOP, EMFILE, ENFILE, ENOSYS, ENOTDIR, ENXIO, EOPNOTSUPP, EROFS, ESTALE

from kvmsentry.errors import Errno
from kvmsentry.gofer import hostcalls, p9

DIRECTORIES_KEPT = 512
PINNED_MOST = 4096

_O_DIR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_O_ANY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# Never hang on a FIFO or take a terminal that was swapped in for a file.
_O_ALWAYS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
O_TMPFILE_BIT = 0o20000000
# Flags a peer may set; the rest is dropped (open(2), asm-generic/fcntl.h values).
_O_ALLOWED = os.O_ACCMODE | os.O_APPEND | os.O_DSYNC | os.O_SYNC | os.O_DIRECT | os.O_NOATIME

_stat, _fstat, _open = os.stat, os.fstat, os.open


def check_name(name: bytes) -> None:
    """Errno unless `name` is one plain component; the only gate between the peer's bytes and the host's lookups."""
    problem = p9.name_errno(name)
    if problem:
        raise Errno(problem)


def writes(flags: int) -> bool:
    """Whether open(2) with `flags` can change the file."""
    return flags & (os.O_ACCMODE | os.O_TRUNC) != 0


class Tree:
    """One served tree. `root_fd`: O_PATH descriptor of its root directory, owned from now on.

    `only`: the tree is the single non-directory of that name in `root_fd` (a bind mount of one file).
    """

    __slots__ = ("name", "root_fd", "read_only", "only", "root")

    def __init__(self, name: bytes, root_fd: int, read_only: bool, only: bytes | None = None) -> None:
        self.name, self.root_fd, self.read_only, self.only = name, root_fd, read_only, only
        status = os.fstat(root_fd)
        top = Node(self, None, b"", status)
        top.fd, top.pinned, top.refs = root_fd, True, 1
        if only is None:
            self.root = top
            return
        check_name(only)
        self.root = Node(self, top, only, os.stat(only, dir_fd=root_fd, follow_symlinks=False))
        self.root.refs = 1


class Node:
    """One name under one directory of a tree, with the object it led to when it was walked."""

    __slots__ = ("tree", "parent", "name", "dev", "ino", "kind", "fd", "pinned", "real", "refs", "children")

    def __init__(self, tree: Tree, parent: Node | None, name: bytes, status: os.stat_result) -> None:
        self.tree, self.parent, self.name = tree, parent, name
        self.dev, self.ino, self.kind = status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)
        self.fd = -1
        self.pinned = False  # fd stays open until the node goes (tree roots, removed files)
        self.real = -1  # pinned regular file: open(2) flags that `fd` was opened with; -1: O_PATH
        self.refs = 0
        self.children: dict[bytes, Node] | None = None


class Nodes:
    """All nodes of a server and the descriptors they hold."""

    def __init__(self, directories_kept: int = DIRECTORIES_KEPT) -> None:
        self._kept: dict[Node, None] = {}  # directories with an open O_PATH descriptor, least recently used first
        self._kept_most = max(directories_kept, 4)
        self.pins = 0

    # --- the life of a node ---

    def child(self, parent: Node, name: bytes, status: os.stat_result) -> Node:
        """The node for `name` under `parent`, which lstat just showed as `status`. Not referenced yet."""
        children = parent.children
        if children is None:
            children = parent.children = {}
        node = children.get(name)
        if node is not None:
            if node.ino == status.st_ino and node.dev == status.st_dev and not node.pinned:
                return node
            self.forget(node)
        node = children[name] = Node(parent.tree, parent, name, status)
        parent.refs += 1
        return node

    def forget(self, node: Node) -> None:
        """The name no longer leads to `node`; whoever still refers to it finds ESTALE, or its pinned descriptor."""
        parent = node.parent
        if parent is not None and parent.children is not None and parent.children.get(node.name) is node:
            del parent.children[node.name]

    def release(self, node: Node | None) -> None:
        """One reference less; nodes that nobody needs go, up the tree."""
        while node is not None:
            node.refs -= 1
            if node.refs:
                return
            self._close(node)
            self.forget(node)
            node = node.parent

    def drop_unused(self, node: Node) -> None:
        """Undo `child` for a node that got no reference after all."""
        node.refs += 1
        self.release(node)

    def _close(self, node: Node) -> None:
        if node.fd >= 0:
            os.close(node.fd)
            node.fd = -1
            if node.pinned:
                self.pins -= 1
                node.pinned = False
            else:
                self._kept.pop(node, None)

    def _evict(self) -> bool:
        for node in self._kept:
            self._close(node)
            return True
        return False

    # --- descriptors ---

    def open_at(self, name: bytes, flags: int, directory: int, mode: int = 0) -> int:
        """openat(2), giving up kept directories when descriptors run out."""
        while True:
            try:
                return _open(name, flags, mode, dir_fd=directory)
            except OSError as problem:
                if problem.errno not in (EMFILE, ENFILE) or not self._spare(directory):
                    raise

    def _spare(self, directory: int) -> bool:
        """Close the least recently used directory, but never the one being looked in."""
        for node in self._kept:
            if node.fd != directory:
                self._close(node)
                return True
        return False

    def directory(self, node: Node) -> int:
        """An O_PATH descriptor of a directory node, valid until the next call that may open another one.

        Errno ENOTDIR, ESTALE when its name leads elsewhere by now; OSError of openat(2).
        """
        fd = node.fd
        if fd >= 0:
            if not node.pinned:
                kept = self._kept
                del kept[node]
                kept[node] = None
            if node.kind != stat.S_IFDIR:
                raise Errno(ENOTDIR)
            return fd
        if node.kind != stat.S_IFDIR:
            raise Errno(ENOTDIR)
        path = [node]
        above = node.parent
        while above is not None and above.fd < 0:
            path.append(above)
            above = above.parent
        if above is None:
            raise Errno(ESTALE)
        for step in reversed(path):
            parent = step.parent
            assert parent is not None
            fd = self._open_verified(step, _O_DIR, parent.fd)
            step.fd = fd
            self._kept[step] = None
            if len(self._kept) > self._kept_most:
                self._evict()
        return fd

    def _open_verified(self, node: Node, flags: int, directory: int) -> int:
        try:
            fd = self.open_at(node.name, flags, directory)
        except (FileNotFoundError, NotADirectoryError):
            raise Errno(ESTALE) from None
        status = _fstat(fd)
        if status.st_ino != node.ino or status.st_dev != node.dev:
            os.close(fd)
            raise Errno(ESTALE)
        return fd

    def path_fd(self, node: Node) -> tuple[int, bool]:
        """An O_PATH (or pinned) descriptor of any node, and whether the caller has to close it."""
        if node.fd >= 0:
            return node.fd, False
        if node.kind == stat.S_IFDIR:
            return self.directory(node), False
        assert node.parent is not None
        return self._open_verified(node, _O_ANY, self.directory(node.parent)), True

    def lstat(self, node: Node) -> os.stat_result:
        """The node's attributes now. Errno ESTALE when the name leads to another object."""
        if node.fd >= 0:
            return _fstat(node.fd)
        assert node.parent is not None
        try:
            status = _stat(node.name, dir_fd=self.directory(node.parent), follow_symlinks=False)
        except FileNotFoundError:
            raise Errno(ESTALE) from None
        if status.st_ino != node.ino or status.st_dev != node.dev:
            raise Errno(ESTALE)
        return status

    def open(self, node: Node, flags: int) -> int:
        """A descriptor for I/O on a regular file or directory; the caller owns it.

        Errno EROFS, ELOOP for a symlink, ENXIO for a socket, EACCES for devices and FIFOs (the host's are not for the
        guest), ESTALE; OSError of openat(2). O_TRUNC is done only after device and inode were checked.
        """
        if writes(flags) and node.tree.read_only:
            raise Errno(EROFS)
        kind = node.kind
        if kind != stat.S_IFREG and kind != stat.S_IFDIR:
            raise Errno(ELOOP if kind == stat.S_IFLNK else ENXIO if kind == stat.S_IFSOCK else EACCES)
        host_flags = flags & _O_ALLOWED | _O_ALWAYS
        if kind == stat.S_IFDIR:
            host_flags |= os.O_DIRECTORY
        if node.pinned and kind == stat.S_IFREG:
            fd = self._again(node, flags)
        elif node.parent is None:
            fd = self.open_at(b".", host_flags, node.fd)
        elif node.pinned:
            raise Errno(ESTALE)  # a removed directory: nothing in it, and no way back in without /proc
        else:
            fd = self._open_verified(node, host_flags, self.directory(node.parent))
        if flags & os.O_TRUNC:
            try:
                os.ftruncate(fd, 0)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _again(self, node: Node, flags: int) -> int:
        """Another descriptor for a removed file: a duplicate of the pinned one, if that can do what is asked."""
        have, want = node.real & os.O_ACCMODE, flags & os.O_ACCMODE
        if node.real < 0 or flags & os.O_APPEND or have not in (want, os.O_RDWR):
            raise Errno(ESTALE)
        return os.dup(node.fd)

    def pin(self, node: Node) -> None:
        """Called before the node's name is removed: keeps the object reachable for the fids that refer to it.

        Best effort: past PINNED_MOST, or when the host refuses, those fids become ESTALE.
        """
        if node.pinned or self.pins >= PINNED_MOST or node.parent is None:
            return
        tries = [-1]
        if node.kind == stat.S_IFREG:
            tries = [os.O_RDONLY, -1] if node.tree.read_only else [os.O_RDWR, os.O_RDONLY, -1]
        for real in tries:
            try:
                flags = _O_ANY if real < 0 else real | _O_ALWAYS
                fd = self._open_verified(node, flags, self.directory(node.parent))
            except (OSError, Errno):
                continue
            self._close(node)
            node.fd, node.pinned, node.real = fd, True, real
            self.pins += 1
            return

    def unpin(self, node: Node) -> None:
        """The name stayed after all: back to finding the node by it."""
        if node.pinned and node.parent is not None:
            self._close(node)
            node.real = -1

    def moved(self, node: Node, new_parent: Node, new_name: bytes) -> None:
        """A rename made by us: the node's fids and those beneath follow it."""
        self.forget(node)
        old_parent = node.parent
        node.parent, node.name = new_parent, new_name
        new_parent.refs += 1
        if new_parent.children is None:
            new_parent.children = {}
        new_parent.children[new_name] = node
        self.release(old_parent)

    def known(self, parent: Node, name: bytes) -> Node | None:
        """The node that `name` under `parent` was last walked to, if some fid still needs it."""
        return parent.children.get(name) if parent.children is not None else None

    def enter(self, node: Node) -> bytes:
        """Make `node`'s directory the working directory and return its name there.

        For the calls that take a path only (the xattr family). This process has one thread and uses the working
        directory for nothing else. Errno ESTALE for a removed object.
        """
        if node.parent is None:
            os.fchdir(node.fd)
            return b"."
        if node.pinned:
            raise Errno(ESTALE)
        self.lstat(node)
        os.fchdir(self.directory(node.parent))
        return node.name


def chmod(nodes: Nodes, fd: int, node: Node, mode: int) -> None:
    """chmod of a node through its O_PATH (or pinned) descriptor `fd`.

    Before Linux 6.6, files and directories are opened for it (EACCES when we may not read them), others are EOPNOTSUPP.
    """
    if node.real >= 0:
        os.fchmod(fd, mode)
        return
    try:
        hostcalls.fchmod_path(fd, mode)
    except OSError as problem:
        if problem.errno != ENOSYS:
            raise
        if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise Errno(EOPNOTSUPP) from None
        opened = nodes.open(node, os.O_RDONLY)
        try:
            os.fchmod(opened, mode)
        finally:
            os.close(opened)
