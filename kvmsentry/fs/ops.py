"""What system calls do with paths: open, make, remove, rename, change, each with Linux's checks in Linux's order
(fs/namei.c).

The file systems below are told what to do only after these checks, and the name cache is kept true here after they did
it.
"""

from __future__ import annotations

import errno
import stat as st
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs import inotify
from kvmsentry.fs.inotify import (
    DN_RENAMED,
    IN_ACCESS,
    IN_ATTRIB,
    IN_CREATE,
    IN_DELETE,
    IN_ISDIR,
    IN_MODIFY,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_OPEN,
)
from kvmsentry.fs.leases import break_leases
from kvmsentry.fs.mounttree import is_mountpoint, name_gone
from kvmsentry.fs.vfs import (
    CAP_DAC_READ_SEARCH,
    CAP_FOWNER,
    FOLLOW,
    MAY_EXEC,
    MAY_READ,
    MAY_WRITE,
    MS_NODEV,
    MS_NOEXEC,
    MS_RDONLY,
    O_ACCMODE,
    O_CLOEXEC,
    O_CREAT,
    O_DIRECT,
    O_DIRECTORY,
    O_EXCL,
    O_NOATIME,
    O_NOFOLLOW,
    O_PATH,
    O_TMPFILE,
    O_TRUNC,
    O_WRONLY,
    WATCHES,
    Dentry,
    File,
    Inode,
    Mount,
    Path,
    absent,
    lookup_child,
    permission,
    place_or_hole,
    walk,
    walk_parent,
    without_set_id,
)  # fmt: skip
from kvmsentry.kernel import filecaps
from kvmsentry.kernel.userns import ROOT, inode_capable, kgid, kuid, maps_inode

if TYPE_CHECKING:
    from kvmsentry.kernel.task import Credentials, Task

S_IFMT, S_IFDIR, S_IFREG, S_IFLNK = 0o170000, 0o040000, 0o100000, 0o120000  # uapi/linux/stat.h
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # uapi/linux/fs.h
CAP_CHOWN, CAP_FSETID, CAP_MKNOD = 0, 4, 27  # uapi/linux/capability.h
_O_TMPFILE = O_TMPFILE & ~O_DIRECTORY

_move_cookie = 0


# -- small judgements
def want_write(mount: Mount) -> None:
    """EROFS when nothing may be changed through `mount`."""
    if mount.flags & MS_RDONLY or mount.sb.readonly:
        raise Errno(errno.EROFS)


def owner_or_capable(inode: Inode, creds: Credentials) -> bool:
    """inode_owner_or_capable: may `creds` do what only the owner may?"""
    return creds.fsuid == inode.uid or (bool(creds.effective & CAP_FOWNER) and maps_inode(creds.user_ns, inode))


def in_group(gid: int, creds: Credentials) -> bool:
    """Is `gid` the file system group of `creds` or among the others?"""
    return gid == creds.fsgid or gid in creds.groups


def _may_create(directory: Inode, creds: Credentials) -> None:
    directory.refresh()
    if directory.nlink == 0:
        raise Errno(errno.ENOENT)
    permission(directory, MAY_WRITE | MAY_EXEC, creds)


def _may_delete(directory: Inode, victim: Inode, creds: Credentials, as_directory: bool) -> None:
    """may_delete: EACCES, EPERM (sticky), ENOTDIR, EISDIR."""
    directory.refresh()
    permission(directory, MAY_WRITE | MAY_EXEC, creds)
    if (
        directory.mode & st.S_ISVTX
        and creds.fsuid != victim.uid
        and creds.fsuid != directory.uid
        and not (creds.effective & CAP_FOWNER and maps_inode(creds.user_ns, victim))
    ):
        raise Errno(errno.EPERM)
    if as_directory:
        if victim.mode & S_IFMT != S_IFDIR:
            raise Errno(errno.ENOTDIR)
    elif victim.mode & S_IFMT == S_IFDIR:
        raise Errno(errno.EISDIR)
    if directory.nlink == 0:
        raise Errno(errno.ENOENT)


def notify(inode: Inode, mask: int, name: bytes = b"", cookie: int = 0) -> None:
    """Tell the inotify watches of `inode`, if there are any."""
    if inode.watches is not None:
        inotify.notify(inode, mask, name, cookie)


def changed(place: Path | None, inode: Inode, mask: int) -> None:
    """Tell the inotify watches of `inode` and of the directory it was found in at `place`. Callers test WATCHES
    first."""
    inotify.notify_place(place, inode, mask)


def _entry_event(directory: Inode, name: bytes, inode: Inode, mask: int, cookie: int = 0) -> None:
    if directory.watches is not None:
        notify(directory, mask | (IN_ISDIR if inode.mode & S_IFMT == S_IFDIR else 0), name, cookie)


def forget(directory: Dentry, name: bytes) -> None:
    """The name is gone: the cache knows that it is not there. The old dentry lives on with who holds it, as
    unlinked."""
    absent(directory, name)


# -- opening
def open_at(task: Task, start: Path | None, path: bytes, flags: int, mode: int = 0, resolve: int = 0) -> Any:
    """open(2): a File, or a coroutine that returns one. `resolve` holds the walk's flags of openat2(2)."""
    if flags & O_PATH:
        flags &= O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC
        place = walk(task, path, start, resolve if flags & O_NOFOLLOW else resolve | FOLLOW)
        if flags & O_DIRECTORY and place.inode.mode & S_IFMT != S_IFDIR:
            raise Errno(errno.ENOTDIR)
        return File(place.inode, place, flags)
    if flags & _O_TMPFILE:
        if flags & O_TMPFILE != O_TMPFILE or flags & O_CREAT or not flags & O_ACCMODE:
            raise Errno(errno.EINVAL)
        return _open_tmpfile(task, walk(task, path, start, resolve | FOLLOW), flags, mode)
    if not flags & O_CREAT:
        if flags & O_NOFOLLOW:
            place = walk(task, path, start, resolve)
        else:
            place = walk(task, path, start, resolve | FOLLOW)
        return open_place(task, place, flags)
    if flags & O_DIRECTORY:
        raise Errno(errno.EINVAL)
    place = place_or_hole(task, path, start, resolve if flags & (O_EXCL | O_NOFOLLOW) else resolve | FOLLOW)
    dentry = place.dentry
    inode = dentry.inode
    if inode is not None:
        if flags & O_EXCL:
            raise Errno(errno.EEXIST)
        if inode.mode & S_IFMT == S_IFDIR:
            raise Errno(errno.EISDIR)
        return open_place(task, place, flags)
    parent = dentry.parent
    directory = parent.inode
    assert directory is not None
    want_write(place.mount)
    _may_create(directory, task.creds)
    inode = directory.create(dentry.name, _new_mode(task, directory, mode), task.creds)
    place = Path(place.mount, parent.add(dentry.name, inode))
    _entry_event(directory, dentry.name, inode, IN_CREATE)
    return _finish_open(task, place, inode, flags & ~O_TRUNC)


def _new_mode(task: Task, directory: Inode, mode: int) -> int:
    """The permissions of a new file that is no directory: a group that is the directory's, and not one of the
    caller's, is given nobody's set-group-id program, whatever the umask leaves of it (mode_strip_sgid)."""
    mode &= 0o7777
    if mode & 0o2010 == 0o2010 and directory.mode & st.S_ISGID:
        creds = task.creds
        if not in_group(directory.gid, creds) and not inode_capable(creds, directory, CAP_FSETID):
            mode &= ~st.S_ISGID
    return mode & ~task.fs.umask


def _open_tmpfile(task: Task, place: Path, flags: int, mode: int) -> Any:
    directory = place.inode
    if directory.mode & S_IFMT != S_IFDIR:
        raise Errno(errno.ENOTDIR)
    want_write(place.mount)
    permission(directory, MAY_WRITE | MAY_EXEC, task.creds)
    inode = directory.temporary(_new_mode(task, directory, mode), task.creds)
    # A dentry that its parent does not know: unlinked from the start, with the name Linux shows.
    dentry = Dentry(b"#%d" % inode.ino, place.dentry, inode)
    file = _finish_open(task, Path(place.mount, dentry), inode, flags)
    if not flags & O_EXCL:
        inode.__dict__["linkable"] = True
    return file


def open_place(task: Task, place: Path, flags: int) -> Any:
    """The rest of open(2) for an existing `place`: a File, or a coroutine that returns one."""
    inode = place.dentry.inode
    assert inode is not None
    kind = inode.mode & S_IFMT
    access = (MAY_READ, MAY_WRITE, MAY_READ | MAY_WRITE, MAY_READ | MAY_WRITE)[flags & O_ACCMODE]
    if flags & O_TRUNC:
        access |= MAY_WRITE
    if kind == S_IFLNK:
        raise Errno(errno.ENOTDIR if flags & O_DIRECTORY else errno.ELOOP)
    if kind == S_IFDIR:
        if access & MAY_WRITE:
            raise Errno(errno.EISDIR)
    elif flags & O_DIRECTORY:
        raise Errno(errno.ENOTDIR)
    if kind in (st.S_IFBLK, st.S_IFCHR) and place.mount.flags & MS_NODEV:
        raise Errno(errno.EACCES)
    creds = task.creds
    if inode.mode >> (6 if creds.fsuid == inode.uid else 3 if in_group(inode.gid, creds) else 0) & access != access:
        permission(inode, access, creds)
    if flags & (O_NOATIME | O_DIRECT):
        if flags & O_NOATIME and not owner_or_capable(inode, creds):
            raise Errno(errno.EPERM)
        if flags & O_DIRECT and kind == S_IFDIR:
            raise Errno(errno.EINVAL)  # no FMODE_CAN_ODIRECT (do_dentry_open)
    if access & MAY_WRITE and kind == S_IFREG:
        want_write(place.mount)
    return _finish_open(task, place, inode, flags)


def _finish_open(task: Task, place: Path, inode: Inode, flags: int) -> Any:
    if inode.mode & S_IFMT != S_IFREG:
        file = inode.open(task, place, flags)
        if WATCHES and isinstance(file, File):
            changed(place, inode, IN_OPEN)
        return file
    if inode.locks is not None:
        giving_way = break_leases(task, inode, flags)
        if giving_way is not None:
            return _open_later(giving_way, task, place, inode, flags)
    counted = bool(flags & 3)
    if counted or flags & O_TRUNC:
        if inode.writers < 0:
            raise Errno(errno.ETXTBSY)
        if flags & O_TRUNC:
            inode.truncate(0)
            strip_set_id(task, inode)
            if WATCHES:
                changed(place, inode, IN_MODIFY)
    file = inode.open(task, place, flags)
    if isinstance(file, File):
        if counted:
            inode.writers += 1
            file.counted = True
            if inode.mode & 0o6111 and (
                (inode.mode & 0o6000 and not inode_capable(task.creds, inode, CAP_FSETID))
                or filecaps.of(inode) is not None
            ):  # capabilities of a file that nobody can execute wait for chmod(2)
                file.strips = True
        if WATCHES:
            changed(place, inode, IN_OPEN)
        return file
    return _count_later(file, inode, counted)


async def _open_later(giving_way: Coroutine[Any, Any, None], task: Task, place: Path, inode: Inode, flags: int) -> File:
    await giving_way
    file: Any = _finish_open(task, place, inode, flags)
    return file if isinstance(file, File) else await file


async def _count_later(opening: Coroutine[Any, Any, File], inode: Inode, counted: bool) -> File:
    file = await opening
    if counted:
        inode.writers += 1
        file.counted = True
    return file


def open_exec(task: Task, place: Path) -> File:
    """A file to run a program from: EACCES unless it is regular, executable, and not on a noexec mount; ETXTBSY while
    it is open for writing. Whoever runs it calls `deny_write`, and `allow_write` when the program is gone."""
    inode = place.inode
    if inode.mode & S_IFMT != S_IFREG or place.mount.flags & MS_NOEXEC:
        raise Errno(errno.EACCES)
    permission(inode, MAY_EXEC, task.creds)
    if inode.writers > 0:
        raise Errno(errno.ETXTBSY)
    file: File = inode.open(task, place, 0)
    return file


def deny_write(inode: Inode) -> None:
    """A program runs from `inode`: ETXTBSY when somebody has it open for writing."""
    if inode.writers > 0:
        raise Errno(errno.ETXTBSY)
    inode.writers -= 1


def allow_write(inode: Inode) -> None:
    """Undoes `deny_write`."""
    assert inode.writers < 0
    inode.writers += 1


# -- making
def _new_name(
    task: Task, start: Path | None, path: bytes, directory: bool = False
) -> tuple[Path, Dentry, bytes, Inode]:
    """filename_create: the place of a name that must not be there yet: (directory, its dentry, name, its inode)."""
    parent, name, trailing = walk_parent(task, path, start)
    if name in (b"", b".", b".."):
        raise Errno(errno.EEXIST)
    dentry = lookup_child(task, parent, name)
    if dentry.inode is not None:
        raise Errno(errno.EEXIST)
    if trailing and not directory:
        raise Errno(errno.ENOENT)
    want_write(parent.mount)
    inode = parent.inode
    _may_create(inode, task.creds)
    return parent, parent.dentry, name, inode


def mkdir_at(task: Task, start: Path | None, path: bytes, mode: int) -> None:
    """mkdir(2)."""
    _, dentry, name, directory = _new_name(task, start, path, directory=True)
    inode = directory.mkdir(name, st.S_IFDIR | (mode & 0o1777 & ~task.fs.umask), task.creds)
    dentry.add(name, inode)
    _entry_event(directory, name, inode, IN_CREATE)


def check_kind(mode: int) -> None:
    """The kinds of files that mknod(2) makes: EPERM for directories, EINVAL for nonsense (may_mknod)."""
    kind = mode & S_IFMT
    if kind == S_IFDIR:
        raise Errno(errno.EPERM)
    if kind not in (0, S_IFREG, st.S_IFCHR, st.S_IFBLK, st.S_IFIFO, st.S_IFSOCK):
        raise Errno(errno.EINVAL)


def mknod_at(task: Task, start: Path | None, path: bytes, mode: int, rdev: int) -> Path:
    """mknod(2), and what bind(2) of a Unix socket does; returns the new place."""
    check_kind(mode)
    kind = mode & S_IFMT
    parent, dentry, name, directory = _new_name(task, start, path)
    # An overlay's whiteout (character device 0, 0) is no device that could do anything.
    if (
        kind in (st.S_IFCHR, st.S_IFBLK)
        and not task.creds.capable(CAP_MKNOD)
        and not (kind == st.S_IFCHR and rdev == 0)
    ):
        raise Errno(errno.EPERM)
    mode = kind | _new_mode(task, directory, mode)
    if kind in (0, S_IFREG):
        inode = directory.create(name, S_IFREG | mode, task.creds)
    else:
        inode = directory.mknod(name, mode, rdev if kind in (st.S_IFCHR, st.S_IFBLK) else 0, task.creds)
    child = dentry.add(name, inode)
    _entry_event(directory, name, inode, IN_CREATE)
    return Path(parent.mount, child)


def symlink_at(task: Task, target: bytes, start: Path | None, path: bytes) -> None:
    """symlink(2)."""
    if not target:
        raise Errno(errno.ENOENT)
    _, dentry, name, directory = _new_name(task, start, path)
    inode = directory.symlink(name, target, task.creds)
    dentry.add(name, inode)
    _entry_event(directory, name, inode, IN_CREATE)


def link_at(task: Task, old: Path, start: Path | None, path: bytes) -> None:
    """linkat(2) of the existing place `old`."""
    parent, name, trailing = walk_parent(task, path, start)
    if name in (b"", b".", b".."):
        raise Errno(errno.EEXIST)
    if lookup_child(task, parent, name).inode is not None:
        raise Errno(errno.EEXIST)
    if trailing:
        raise Errno(errno.ENOENT)
    want_write(parent.mount)
    if old.mount is not parent.mount:
        raise Errno(errno.EXDEV)
    inode, directory = old.inode, parent.inode
    _may_create(directory, task.creds)
    if inode.mode & S_IFMT == S_IFDIR:
        raise Errno(errno.EPERM)
    if inode.nlink == 0 and "linkable" not in inode.__dict__:
        raise Errno(errno.ENOENT)
    inode = directory.link(name, inode)
    parent.dentry.add(name, inode)
    if inode.watches is not None:
        notify(inode, IN_ATTRIB)
    _entry_event(directory, name, inode, IN_CREATE)


# -- removing
def unlink_at(task: Task, start: Path | None, path: bytes) -> None:
    """unlink(2)."""
    parent, name, trailing = walk_parent(task, path, start)
    if name in (b"", b".", b".."):
        raise Errno(errno.EISDIR)
    want_write(parent.mount)
    dentry = lookup_child(task, parent, name)
    victim = dentry.inode
    if victim is None:
        raise Errno(errno.ENOENT)
    if trailing:
        raise Errno(errno.EISDIR if victim.mode & S_IFMT == S_IFDIR else errno.ENOTDIR)
    directory = parent.inode
    _may_delete(directory, victim, task.creds, False)
    if dentry.mounted and is_mountpoint(dentry, task.fs.namespace):
        raise Errno(errno.EBUSY)
    directory.unlink(name, victim)
    forget(parent.dentry, name)
    if dentry.mounted:
        name_gone(dentry)
    if victim.watches is not None:
        notify(victim, IN_ATTRIB)  # its number of links
    _entry_event(directory, name, victim, IN_DELETE)
    if victim.watches is not None and not victim.nlink:
        inotify.orphaned(task.kernel, victim)


def rmdir_at(task: Task, start: Path | None, path: bytes) -> None:
    """rmdir(2)."""
    parent, name, _ = walk_parent(task, path, start)
    if name == b".":
        raise Errno(errno.EINVAL)
    if name == b"..":
        raise Errno(errno.ENOTEMPTY)
    if not name:
        raise Errno(errno.EBUSY)
    want_write(parent.mount)
    dentry = lookup_child(task, parent, name)
    victim = dentry.inode
    if victim is None:
        raise Errno(errno.ENOENT)
    directory = parent.inode
    _may_delete(directory, victim, task.creds, True)
    if dentry.mounted and is_mountpoint(dentry, task.fs.namespace):
        raise Errno(errno.EBUSY)
    directory.rmdir(name, victim)
    dentry.children.clear()
    forget(parent.dentry, name)
    if dentry.mounted:
        name_gone(dentry)
    if victim.watches is not None:
        inotify.orphaned(task.kernel, victim)
    _entry_event(directory, name, victim, IN_DELETE)


def _is_below(dentry: Dentry, ancestor: Dentry) -> bool:
    while True:
        if dentry is ancestor:
            return True
        if dentry.parent is dentry:
            return False
        dentry = dentry.parent


def check_rename_flags(flags: int) -> None:
    """EINVAL for RENAME_* flags that are unknown, exclude each other, or are not to be had."""
    if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
        raise Errno(errno.EINVAL)


def rename_at(task: Task, old_start: Path | None, old_path: bytes, new_start: Path | None, new_path: bytes,
              flags: int = 0) -> None:  # fmt: skip
    """renameat2(2)."""
    global _move_cookie
    check_rename_flags(flags)
    old_parent, old_name, old_trailing = walk_parent(task, old_path, old_start)
    new_parent, new_name, new_trailing = walk_parent(task, new_path, new_start)
    if old_parent.mount is not new_parent.mount:
        raise Errno(errno.EXDEV)
    if old_name in (b"", b".", b".."):
        raise Errno(errno.EBUSY)
    if new_name in (b"", b".", b".."):
        raise Errno(errno.EEXIST if flags & RENAME_NOREPLACE else errno.EBUSY)
    want_write(old_parent.mount)
    old_dentry = lookup_child(task, old_parent, old_name)
    inode = old_dentry.inode
    if inode is None:
        raise Errno(errno.ENOENT)
    new_dentry = lookup_child(task, new_parent, new_name)
    replaced = new_dentry.inode
    if flags & RENAME_NOREPLACE and replaced is not None:
        raise Errno(errno.EEXIST)
    exchange = bool(flags & RENAME_EXCHANGE)
    is_dir = inode.mode & S_IFMT == S_IFDIR
    if exchange:
        if replaced is None:
            raise Errno(errno.ENOENT)
        if replaced.mode & S_IFMT != S_IFDIR and new_trailing:
            raise Errno(errno.ENOTDIR)
    if not is_dir and (old_trailing or (new_trailing and not exchange)):
        raise Errno(errno.ENOTDIR)
    if is_dir and _is_below(new_parent.dentry, old_dentry):
        raise Errno(errno.EINVAL)
    if replaced is not None and replaced.mode & S_IFMT == S_IFDIR and _is_below(old_parent.dentry, new_dentry):
        raise Errno(errno.EINVAL if exchange else errno.ENOTEMPTY)
    if inode is replaced:
        return
    old_dir, new_dir, creds = old_parent.inode, new_parent.inode, task.creds
    _may_delete(old_dir, inode, creds, is_dir)
    if replaced is None:
        _may_create(new_dir, creds)
    else:
        _may_delete(new_dir, replaced, creds, replaced.mode & S_IFMT == S_IFDIR if exchange else is_dir)
    if old_dir is not new_dir:  # `..` of a directory that moves will be written
        if is_dir:
            permission(inode, MAY_WRITE, creds)
        if exchange and replaced is not None and replaced.mode & S_IFMT == S_IFDIR:
            permission(replaced, MAY_WRITE, creds)
    for each in (old_dentry, new_dentry):
        if each.mounted and is_mountpoint(each, task.fs.namespace):
            raise Errno(errno.EBUSY)
    old_dir.rename(old_name, inode, new_dir, new_name, replaced, RENAME_EXCHANGE if exchange else 0)
    if exchange:
        old_parent.dentry.children[old_name], new_parent.dentry.children[new_name] = new_dentry, old_dentry
        new_dentry.name, new_dentry.parent = old_name, old_parent.dentry
    else:
        forget(old_parent.dentry, old_name)
        new_parent.dentry.children[new_name] = old_dentry
    old_dentry.name, old_dentry.parent = new_name, new_parent.dentry
    if new_dentry.mounted and not exchange:
        name_gone(new_dentry)
    if old_dir.watches is not None or new_dir.watches is not None:
        _move_cookie += 1
        _entry_event(old_dir, old_name, inode, IN_MOVED_FROM, _move_cookie)
        _entry_event(new_dir, new_name, inode, IN_MOVED_TO, _move_cookie)
        if old_dir is new_dir:
            notify(old_dir, DN_RENAMED)
    lost = replaced if replaced is not None and not exchange and replaced.watches is not None else None
    if lost is not None:
        notify(lost, IN_ATTRIB | IN_ISDIR if is_dir else IN_ATTRIB)
    if inode.watches is not None:
        notify(inode, IN_MOVE_SELF)
    if lost is not None and (is_dir or not lost.nlink):
        inotify.orphaned(task.kernel, lost)


# -- changing
def chmod(task: Task, place: Path | None, inode: Inode, mode: int) -> None:
    """chmod(2): EROFS, EPERM."""
    if place is not None:
        want_write(place.mount)
    creds = task.creds
    if inode.mode & S_IFMT == S_IFLNK:
        raise Errno(errno.EOPNOTSUPP)
    if not owner_or_capable(inode, creds):
        raise Errno(errno.EPERM)
    mode &= 0o7777
    if mode & st.S_ISGID and not in_group(inode.gid, creds) and not inode_capable(creds, inode, CAP_FSETID):
        mode &= ~st.S_ISGID
    inode.setattr(mode=mode)
    if WATCHES:
        changed(place, inode, IN_ATTRIB)


def chown(task: Task, place: Path | None, inode: Inode, uid: int, gid: int) -> None:
    """chown(2); an id of 2**32 - 1 stays as it is. Set-id bits of files are cleared. EROFS, EPERM."""
    if place is not None:
        want_write(place.mount)
    creds = task.creds
    new_uid = None if uid == 0xFFFFFFFF else uid
    new_gid = None if gid == 0xFFFFFFFF else gid
    if creds.user_ns is not ROOT:
        new_uid = None if new_uid is None else kuid(creds, new_uid)
        new_gid = None if new_gid is None else kgid(creds, new_gid)
    if not inode_capable(creds, inode, CAP_CHOWN):
        if new_uid is not None and not (creds.fsuid == inode.uid == new_uid):
            raise Errno(errno.EPERM)
        if new_gid is not None and not (
            creds.fsuid == inode.uid and (in_group(new_gid, creds) or new_gid == inode.gid)
        ):
            raise Errno(errno.EPERM)
    mode = None
    if inode.mode & S_IFMT != S_IFDIR and inode.mode & 0o6000:
        mode = without_set_id(inode.mode)
    if inode.mode & S_IFMT == S_IFREG and filecaps.of(inode) is not None:
        filecaps.drop(inode)
    inode.setattr(mode=mode, uid=new_uid, gid=new_gid)
    if WATCHES:
        changed(place, inode, IN_ATTRIB)


def set_times(task: Task, place: Path | None, inode: Inode, times: tuple[int | None, int | None] | None) -> None:
    """utimensat(2): `times` are ns or None to leave one alone; None in all: both are set to now. EROFS, EACCES,
    EPERM."""
    creds = task.creds
    if place is not None:
        want_write(place.mount)
    if times is None:
        if not owner_or_capable(inode, creds):
            permission(inode, MAY_WRITE, creds)
        now = time.time_ns()
        inode.setattr(atime=now, mtime=now)
    else:
        if not owner_or_capable(inode, creds):
            raise Errno(errno.EPERM)
        inode.setattr(atime=times[0], mtime=times[1])
    if WATCHES:  # one time alone tells of the use that would have set it (fsnotify_change)
        both = times is None or (times[0] is None) == (times[1] is None)
        changed(place, inode, IN_ATTRIB if both else IN_ACCESS if times and times[0] is not None else IN_MODIFY)


def strip_set_id(task: Task, inode: Inode) -> None:
    """A change of data by one who is not privileged takes the set-id bits away (file_remove_privs)."""
    if inode.mode & 0o6000 and not inode_capable(task.creds, inode, CAP_FSETID):
        inode.setattr(mode=without_set_id(inode.mode))
    if inode.mode & 0o111:
        filecaps.drop(inode)


def truncate_at(task: Task, path: bytes, size: int) -> Any:
    """truncate(2): 0, or a coroutine while a lease is in the way."""
    if size < 0:
        raise Errno(errno.EINVAL)
    place = walk(task, path)
    inode = place.inode
    if inode.mode & S_IFMT == S_IFDIR:
        raise Errno(errno.EISDIR)
    if inode.mode & S_IFMT != S_IFREG:
        raise Errno(errno.EINVAL)
    want_write(place.mount)
    permission(inode, MAY_WRITE, task.creds)
    if inode.writers < 0:
        raise Errno(errno.ETXTBSY)
    if inode.locks is not None:
        giving_way = break_leases(task, inode, O_WRONLY)
        if giving_way is not None:
            return _truncate_later(giving_way, task, place, inode, size)
    return _truncate(task, place, inode, size)


async def _truncate_later(
    giving_way: Coroutine[Any, Any, None], task: Task, place: Path, inode: Inode, size: int
) -> int:
    await giving_way
    return _truncate(task, place, inode, size)


def _truncate(task: Task, place: Path, inode: Inode, size: int) -> int:
    inode.truncate(size)
    strip_set_id(task, inode)
    if WATCHES:
        changed(place, inode, IN_MODIFY)
    return 0


def access(task: Task, place: Path, mask: int, creds: Credentials) -> None:
    """access(2) of an existing place as `creds`: EROFS, EACCES."""
    inode = place.inode
    kind = inode.mode & S_IFMT
    if mask & MAY_EXEC and kind == S_IFREG and place.mount.flags & MS_NOEXEC:
        raise Errno(errno.EACCES)
    if mask & MAY_WRITE and kind in (S_IFREG, S_IFDIR, S_IFLNK) and place.mount.sb.readonly:
        raise Errno(errno.EROFS)
    if mask:
        permission(inode, mask, creds)
    if mask & MAY_WRITE and kind in (S_IFREG, S_IFDIR, S_IFLNK):
        want_write(place.mount)


def may_follow_empty(creds: Credentials) -> bool:
    """linkat(2) with AT_EMPTY_PATH asks for CAP_DAC_READ_SEARCH."""
    return bool(creds.effective & CAP_DAC_READ_SEARCH)
