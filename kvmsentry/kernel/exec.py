"""execve(2): another program in the same task.

    open, `#!` --> parse --> new AddressSpace, filled --> other threads die --> the switch (nothing can fail any more)

The old address space is whole until the switch, so that what is wrong with a file is an errno to the caller. What
Linux finds out only after its own point of no return (a segment that can't be mapped) kills here as there.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from kvmsentry.errors import Errno
from kvmsentry.fs.inotify import executed
from kvmsentry.fs.vfs import (
    FOLLOW,
    MAY_EXEC,
    MAY_READ,
    MS_NOEXEC,
    MS_NOSUID,
    O_RDONLY,
    WATCHES,
    File,
    Inode,
    Path,
    permission,
    walk,
)
from kvmsentry.kernel import cap, exit, filecaps, pidns, ptrace, signals, timens, userns
from kvmsentry.kernel.coredump import after_new_ids
from kvmsentry.kernel.task import (
    RLIMIT_AS,
    RLIMIT_DATA,
    RLIMIT_MEMLOCK,
    RLIMIT_STACK,
    Credentials,
    Process,
    SigInfo,
    Task,
)
from kvmsentry.kernel.traps import park
from kvmsentry.mm import elf
from kvmsentry.mm.space import AddressSpace
from kvmsentry.mm.stack import MAX_ARG_STRLEN
from kvmsentry.syscall.abi_signal import FRAME_SIZE, SI_KERNEL, SIGCHLD, SIGSEGV, SS_DISABLE
from kvmsentry.syscall.table import RELOAD
from kvmsentry.vcpu.layout import FS_BASE, GS_BASE, NREGS, RFLAGS, RFLAGS_FIXED, RIP, RSP, USER_TOP

AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH = -100, 0x100, 0x1000  # uapi/linux/fcntl.h
BINPRM_BUF_SIZE = 256  # uapi/linux/binfmts.h
MAX_INTERPRETERS = 5  # rewrites by `#!` that Linux makes, exec_binprm in fs/exec.c
MAX_STRINGS_BYTES = 6 << 20  # _STK_LIM / 4 * 3: no argument list is longer, whatever RLIMIT_STACK says
S_ISUID, S_ISGID, S_IXGRP = 0o4000, 0o2000, 0o010
_FATAL = frozenset((errno.ENOMEM, errno.EINVAL, errno.EPERM, errno.EFAULT))
PER_CLEAR_ON_SETID = 0x00400000 | 0x00040000 | 0x00200000 | 0x00100000  # uapi/linux/personality.h
ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC = 0x0040000, 0x0400000  # uapi/linux/personality.h


class FileReader:
    """A File as the ELF loader reads it."""

    def __init__(self, file: File) -> None:
        self.file = file

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.file.inode.size

    def pread(self, offset: int, n: int) -> bytes:
        """Up to `n` bytes at `offset`; fewer only at the end."""
        buffer = bytearray(n)
        view = memoryview(buffer)
        done = 0
        while done < n:
            got = self.file.pread([view[done:]], offset + done)
            if got < 0:
                raise Errno(-got)
            if not got:
                break
            done += got
        return bytes(view[:done])


class Opened:
    """A program file that may be executed: its place, inode and an open file."""

    __slots__ = ("path", "inode", "file", "reader")

    def __init__(self, path: Path, inode: Inode, file: File) -> None:
        self.path, self.inode, self.file = path, inode, file
        self.reader = FileReader(file)


def _open(task: Task, place: Path) -> Opened:
    """EACCES for what is no regular file, may not be executed or lies on a noexec mount; ETXTBSY when it is being
    written."""
    inode = place.inode
    inode.refresh()
    if inode.mode & 0o170000 != 0o100000:
        raise Errno(errno.EACCES)
    if place.mount.flags & MS_NOEXEC:
        raise Errno(errno.EACCES)
    permission(inode, MAY_EXEC, task.creds)
    if inode.writers > 0:
        raise Errno(errno.ETXTBSY)
    file = inode.open(task, place, O_RDONLY)
    if WATCHES:
        executed(file)
    return Opened(place, inode, file)


# -- argument strings --
def read_strings(mm: Any, address: int) -> list[bytes]:
    """The strings of a NULL-terminated array of pointers; NULL is an empty array. EFAULT, E2BIG."""
    strings: list[bytes] = []
    if not address:
        return strings
    total = 0
    while True:
        chunk = 4096 - (address & 4095) & ~7 or 8
        for pointer in memoryview(mm.read(address, chunk)).cast("Q"):
            if not pointer:
                return strings
            try:
                string = mm.read_cstring(pointer, MAX_ARG_STRLEN)
            except Errno as error:
                raise Errno(errno.E2BIG if error.errno == errno.ENAMETOOLONG else error.errno) from None
            total += len(string) + 9
            if total > MAX_STRINGS_BYTES:
                raise Errno(errno.E2BIG)
            strings.append(string)
        address += chunk


def parse_script(head: bytes) -> tuple[bytes, bytes | None]:
    """(interpreter, its one argument) of the first line after `#!`; ENOEXEC (load_script in fs/binfmt_script.c)."""
    end = head.find(b"\n")
    if end < 0:
        line = head[2:].split(b"\0", 1)[0]
        # The line is cut off: the interpreter's name at least must be whole.
        if len(head) >= BINPRM_BUF_SIZE and not any(c in b" \t" for c in line.lstrip(b" \t")):
            raise Errno(errno.ENOEXEC)
    else:
        line = head[2:end]
    line = line.split(b"\0", 1)[0].strip(b" \t")
    if not line:
        raise Errno(errno.ENOEXEC)
    for index, char in enumerate(line):
        if char in b" \t":
            return line[:index], line[index:].lstrip(b" \t") or None
    return line, None


# -- the call --
def execve(task: Task, dirfd: int, path: bytes, argv: int, envp: int, flags: int) -> Any:
    """execveat(2) with the strings still in user memory; see `do_exec`."""
    if not path and not flags & AT_EMPTY_PATH:
        raise Errno(errno.ENOENT)
    if flags & ~(AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW):
        raise Errno(errno.EINVAL)
    arguments = read_strings(task.mm, argv)
    environment = read_strings(task.mm, envp)
    return do_exec(task, path, arguments, environment, dirfd, flags)


def do_exec(
    task: Task, path: bytes, argv: Sequence[bytes], envp: Sequence[bytes], dirfd: int = AT_FDCWD, flags: int = 0
) -> Any:
    """Run the program at `path`; returns RELOAD, or a coroutine when other threads must die first. Raises Errno as
    execve(2) does, with the task as it was."""
    process = task.process
    if process.exec_task is not None or process.exiting:
        raise Errno(errno.EAGAIN)
    start, name, inaccessible = _start_of(task, path, dirfd, flags)
    try:
        new = _prepare(task, path, start, name, argv, envp, flags, inaccessible)
    except _Killed:
        signals.force(task, SigInfo(SIGSEGV, SI_KERNEL, pid=0, uid=0))
        exit.exit_group(process, SIGSEGV)
        return -errno.ENOMEM
    if len(process.threads) > 1:
        return _alone_then_switch(task, new)
    _switch(task, new)
    return RELOAD


def exec_first(task: Task, path: bytes, argv: Sequence[bytes], envp: Sequence[bytes]) -> None:
    """For a task that has no program yet: as `do_exec`, and it gets its context. The caller lets it run."""
    try:
        new = _prepare(task, path, None, path, argv, envp, 0, False)
    except _Killed as killed:
        raise Errno(killed.errno) from None
    try:
        task.ctx = task.kernel.platform.new_context(new.mm.mmu)
    except BaseException:
        new.discard()
        raise
    task.ctx.owner = task
    _switch(task, new)


class _Killed(Exception):
    """The program failed where Linux can't return any more."""

    def __init__(self, number: int) -> None:
        self.errno = number
        super().__init__(number)


class _New:
    """All that the switch needs."""

    __slots__ = ("mm", "image", "opened", "creds", "secure", "comm")

    def __init__(
        self, mm: Any, image: elf.Image, opened: Opened, creds: Credentials, secure: bool, comm: bytes
    ) -> None:
        self.mm, self.image, self.opened, self.creds, self.secure, self.comm = mm, image, opened, creds, secure, comm

    def discard(self) -> None:
        """It was not used."""
        self.mm.destroy()
        self.opened.inode.writers += 1


def _start_of(task: Task, path: bytes, dirfd: int, flags: int) -> tuple[Path | None, bytes, bool]:
    """Where the walk starts, AT_EXECFN, and whether the program can't be named once descriptors are closed."""
    if path[:1] == b"/" or (dirfd == AT_FDCWD and path):
        return None, path, False
    if dirfd == AT_FDCWD:
        return task.fs.cwd, b".", False
    file = task.files.get(dirfd)
    place = file.path
    if place is None:
        from kvmsentry.fs import anon

        place = anon.place_of(file)
    name = b"/dev/fd/%d" % dirfd + (b"/" + path if path else b"")
    return place, name, dirfd in task.files.cloexec


def _prepare(
    task: Task,
    path: bytes,
    start: Path | None,
    execfn: bytes,
    argv: Sequence[bytes],
    envp: Sequence[bytes],
    flags: int,
    inaccessible: bool,
) -> _New:
    """Everything that may fail, into a new address space."""
    if start is not None and not path:
        place = start
    else:
        place = walk(task, path, start, 0 if flags & AT_SYMLINK_NOFOLLOW else FOLLOW)
        if flags & AT_SYMLINK_NOFOLLOW and place.inode.mode & 0o170000 == 0o120000:
            raise Errno(errno.ELOOP)
    argv = list(argv) or [b""]
    script = execfn
    rewrites = 0
    while True:
        opened = _open(task, place)
        try:
            head = opened.reader.pread(0, BINPRM_BUF_SIZE)
            if head[:2] != b"#!":
                break
            interpreter, argument = parse_script(head)
        except BaseException:
            opened.file.put()
            raise
        opened.file.put()
        if inaccessible:
            raise Errno(errno.ENOENT)
        rewrites += 1
        if rewrites > MAX_INTERPRETERS:
            raise Errno(errno.ELOOP)
        argv = [interpreter, *([argument] if argument is not None else []), script, *argv[1:]]
        script = interpreter
        place = walk(task, interpreter)
    try:
        return _load(task, opened, execfn, argv, envp)
    finally:
        opened.file.put()


def _load(task: Task, opened: Opened, execfn: bytes, argv: Sequence[bytes], envp: Sequence[bytes]) -> _New:
    kernel = task.kernel
    user_top = getattr(kernel.platform, "user_top", USER_TOP)  # a platform may keep the end for itself
    program = elf.parse(opened.reader, user_top)
    if task.ctx is not None:
        task.ctx.park()  # it leaves the old address space while the new one is built: the switch need not wait
    creds, secure = new_credentials(task, opened.path, opened.inode)
    mm = AddressSpace(kernel.platform.mmu_factory, kernel.frames, user_top)
    loading = False
    interpreters: list[Opened] = []

    def open_interpreter(name: bytes) -> tuple[FileReader, Any]:
        other = _open(task, walk(task, name))
        interpreters.append(other)
        backing = other.file.backing()
        return other.reader, backing

    try:
        set_limits(mm, task.process.rlimits)
        aux = elf.Aux(
            uid=userns.shown_uid(creds.user_ns, creds.uid), euid=userns.shown_uid(creds.user_ns, creds.euid),
            gid=userns.shown_gid(creds.user_ns, creds.gid), egid=userns.shown_gid(creds.user_ns, creds.egid),
            secure=secure,
            minsigstksz=(FRAME_SIZE + kernel.platform.xsave_size + 4 + 64 + 15) & ~15,
        )  # fmt: skip
        if task.process.personality & ADDR_NO_RANDOMIZE:
            mm.set_layout(False)  # for the vDSO too
        if kernel.vdso is not None:
            aux.sysinfo_ehdr = kernel.vdso.map(mm, task.ns.time_for_children)
        backing = opened.file.backing()
        loading = True
        image = elf.load(mm, opened.reader, backing, argv, envp, execfn, open_interpreter, aux,
                         randomize=not task.process.personality & ADDR_NO_RANDOMIZE, program=program)  # fmt: skip
    except Errno as error:
        mm.destroy()
        if loading and error.errno in _FATAL:
            raise _Killed(error.errno) from None
        raise
    except BaseException:
        mm.destroy()
        raise
    finally:
        for other in interpreters:
            other.file.put()
    opened.inode.writers -= 1
    comm = execfn.rstrip(b"/").rsplit(b"/", 1)[-1][:15]
    return _New(mm, image, opened, creds, secure, comm)


def set_limits(mm: Any, rlimits: list[tuple[int, int]]) -> None:
    """The address space looks at its soft limits itself."""
    mm.rlimit_as = rlimits[RLIMIT_AS][0]
    mm.rlimit_data = rlimits[RLIMIT_DATA][0]
    mm.rlimit_stack = rlimits[RLIMIT_STACK][0]
    mm.rlimit_memlock = rlimits[RLIMIT_MEMLOCK][0]


def new_credentials(task: Task, place: Path, inode: Inode) -> tuple[Credentials, bool]:
    """Credentials after exec of `inode`, and AT_SECURE (capabilities(7), cap_bprm_creds_from_file in
    security/commoncap.c). EPERM when the file's capabilities can't all be had."""
    old, process = task.creds, task.process
    euid, egid = old.euid, old.egid
    mode = inode.mode
    ns = old.user_ns
    root = userns.root_uid(ns)
    mount = place.mount  # mnt_may_suid: one of another namespace does not count
    suid_counts = not mount.flags & MS_NOSUID and mount.namespace is task.fs.namespace and ns.below(mount.sb.user_ns)
    if mode & (S_ISUID | S_ISGID) and suid_counts and not process.no_new_privs and userns.maps_inode(ns, inode):
        if mode & S_ISUID:
            euid = inode.uid
        if mode & (S_ISGID | S_IXGRP) == S_ISGID | S_IXGRP:
            egid = inode.gid
    permitted = 0
    effective = False
    caps = filecaps.of(inode) if suid_counts else None
    if caps is not None:
        permitted, effective = filecaps.granted(caps, old.bounding, old.inheritable), caps.effective
    if not old.securebits & cap.SECBIT_NOROOT and (caps is None or old.uid == root or euid != root):
        if euid == root or old.uid == root:
            permitted = old.bounding | old.inheritable
        effective = effective or euid == root
    setid = euid != old.euid or egid != old.egid
    if setid or permitted & ~old.permitted:
        shared = task.fs.users > len(process.threads)
        if process.no_new_privs or (shared and not old.holds(cap.SETUID)) or ptrace.unsafe(task):
            if process.no_new_privs or not old.holds(cap.SETUID):
                euid, egid = old.uid, old.gid
            permitted &= old.permitted
    ambient = 0 if setid or caps is not None else old.ambient
    permitted |= ambient
    new_effective = permitted if effective else ambient
    secure = setid or (old.uid != root and (effective or bool(permitted & ~ambient)))
    if (
        euid == old.euid == old.suid == old.fsuid
        and egid == old.egid == old.sgid == old.fsgid
        and permitted == old.permitted
        and new_effective == old.effective
        and not old.securebits & cap.SECBIT_KEEP_CAPS
    ):
        return old, secure
    new = old.replace(
        euid=euid, suid=euid, fsuid=euid, egid=egid, sgid=egid, fsgid=egid, permitted=permitted,
        effective=new_effective, ambient=ambient, securebits=old.securebits & ~cap.SECBIT_KEEP_CAPS,
    )  # fmt: skip
    return new, secure


# -- the switch --
async def _alone_then_switch(task: Task, new: _New) -> Any:
    """de_thread in fs/exec.c: the other threads die; whoever calls gets the leader's place and tid."""
    process = task.process
    process.exec_task = task
    try:
        for other in list(process.threads.values()):
            if other is not task:
                signals.kill_task(other)
        while len(process.threads) > 1:
            await park(task, "exec", process.exec_wait, restart=0)
    except BaseException:
        new.discard()
        raise
    finally:
        process.exec_task = None
    if process.exiting:
        new.discard()
        return -errno.EINTR
    _switch(task, new)
    return RELOAD


def _become_leader(task: Task, process: Process) -> None:
    kernel = task.kernel
    old = process.leader
    if old.ptrace is not None:  # it ends unseen: this thread is it from now on
        tracer = old.ptrace.tracer
        ptrace.unlink(old)
        tracer.process.child_events.wake()
    kernel.tasks.pop(task.tid, None)
    process.threads.pop(task.tid, None)
    task.tid = process.pid
    task.vtid = process.vpid
    if process.numbers:
        pidns.become_leader(task, process)
    process.threads[task.tid] = kernel.tasks[task.tid] = task
    process.leader = task


def _switch(task: Task, new: _New) -> None:
    """Nothing in here can fail: from now on the task is the new program."""
    kernel, process, ctx = task.kernel, task.process, task.ctx
    if process.leader is not task:
        _become_leader(task, process)
    old_mm = task.mm
    if old_mm is not None:
        exit.release_mm(task)
        process.peak_pages = max(process.peak_pages, old_mm.peak_pages)
        old_mm.users -= 1
        if not old_mm.users:
            # The vCPU leaves the old tables only with the reload that follows this call.
            kernel.deferred.append(old_mm.destroy)
    task.mm = new.mm
    ctx.switch(new.mm.mmu)
    _reset(task, process, new)
    regs = ctx.regs
    for index in range(NREGS):
        regs[index] = 0
    regs[RIP], regs[RSP], regs[RFLAGS] = new.image.entry, new.image.stack_pointer, RFLAGS_FIXED
    regs[FS_BASE] = regs[GS_BASE] = 0
    ctx.set_xsave(None)
    task.orig_rax = -1
    signals.recompute(task)


def _reset(task: Task, process: Process, new: _New) -> None:
    """What execve(2) says is not preserved."""
    files = task.files
    if files.users > 1:
        files.users -= 1
        task.files = files = files.copy()
    if files.cloexec:
        files.close_on_exec()
    if task.ns.time is not task.ns.time_for_children:
        task.ns = task.ns.replace(time=task.ns.time_for_children)
        timens.join(task.ns.time, task.mm, task.kernel)
    sighand = task.sighand
    if sighand.users > 1:
        sighand.users -= 1
        task.sighand = sighand = sighand.copy()
    sighand.reset()
    for timer in list(process.timers.values()):
        timer.delete()
    process.timers.clear()
    task.altstack = (0, SS_DISABLE, 0)
    task.rseq = None
    task.thread_keyring = process.keyring = None
    task.restart = None
    task.trap = (0, 0, 0)
    task.comm = new.comm
    opened = new.opened
    process.exe = opened.path
    release_exe(process)
    process.exe_inode = opened.inode
    process.personality &= ~READ_IMPLIES_EXEC  # set_personality_64bit
    process.execed = True
    process.exit_signal = SIGCHLD
    _set_credentials(task, process, new)


def _set_credentials(task: Task, process: Process, new: _New) -> None:
    old, creds = task.creds, new.creds
    task.creds = creds
    dumpable = 1
    if (
        creds.euid != creds.uid
        or creds.egid != creds.gid
        or (creds.euid, creds.egid, creds.fsuid, creds.fsgid) != (old.euid, old.egid, old.fsuid, old.fsgid)
        or creds.permitted & ~old.permitted  # commit_creds
    ):
        dumpable = after_new_ids(task)
    else:
        try:
            permission(new.opened.inode, MAY_READ, creds)
        except Errno:
            dumpable = after_new_ids(task)
    process.dumpable = dumpable
    if new.secure:
        task.pdeath_signal = 0
        process.personality &= ~PER_CLEAR_ON_SETID


def release_exe(process: Process) -> None:
    """The process no longer runs from its program file: it may be written to again."""
    inode, process.exe_inode = process.exe_inode, None
    if inode is not None:
        inode.writers += 1


__all__ = ["do_exec", "exec_first", "execve", "new_credentials", "parse_script", "read_strings", "set_limits"]
