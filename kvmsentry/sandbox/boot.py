"""What the Sentry process does: builds the kernel, mounts, starts the first process, serves it to its end.

Order, and why: the control socket's other end dies with us, so die with it first; everything that is found by path
(KVM's device, Python's modules) is opened before the process is locked into an empty root; vCPU threads start after
that."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import traceback
from typing import Any

from kvmsentry import log
from kvmsentry.errors import BrokenInvariant, Errno, HostError, UserError
from kvmsentry.sandbox import hostfiles, lockdown
from kvmsentry.sandbox.network import Network
from kvmsentry.sandbox.spec import SandboxSpec
from kvmsentry.sandbox.supervisor import NUMBER, WINDOW, window_size

DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FALLBACK = "going on with the ptrace platform, which is slower"
PAGE = 4096
SI_USER = 0
GUEST_SHARE = 4  # without --memory the application may use 3/4 of what the host has


def main(spec: SandboxSpec, gofer_socket: socket.socket, control: socket.socket, network: Network) -> int:
    """The Sentry from fork to end; returns the process's own exit status. Reports to the supervisor on `control`."""
    try:
        lockdown.leave_session()
        log.mark("fork")
        if spec.log_fd >= 0:
            log.open_log(spec.log_fd)
        sandbox = Sandbox(spec, gofer_socket, control, network)
        status = sandbox.run()
    except UserError as error:
        return _complain(control, error.status, str(error))
    except HostError as error:
        return _complain(control, 125, str(error))
    except MemoryError:
        return _complain(control, 125, "the host is out of memory")
    except BaseException as error:
        log.log(traceback.format_exc())
        if os.environ.get("KVMSENTRY_DEBUG"):
            traceback.print_exc()
        kind = "" if isinstance(error, BrokenInvariant) else f"{type(error).__name__}: "
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        return _complain(control, 125, f"a bug of the sentry's own stopped the sandbox: {kind}{error} ({place})")
    control.send(b"X" + NUMBER.pack(status))
    return 0


def _complain(control: socket.socket, status: int, text: str) -> int:
    log.log(text)
    control.send(b"E" + NUMBER.pack(status) + text.encode(errors="backslashreplace")[:60000])
    return 1


def memory_limit(spec: SandboxSpec) -> int:
    """Bytes of guest RAM the application may use."""
    if spec.memory_limit:
        return spec.memory_limit
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(total - total // GUEST_SHARE, 256 << 20)


def make_platform(name: str) -> tuple[Any, Any]:
    """The platform, "kvm" or "ptrace", and the class of its Mmus; "auto" is kvm, ptrace where the host's KVM won't."""
    from kvmsentry.mm.pagetables import PageTables

    if name != "ptrace":
        from kvmsentry.vcpu.machine import Machine

        try:
            return Machine(), PageTables
        except HostError as error:
            if name != "auto":
                raise
            log.complain(f"{error}; {FALLBACK}")

    from kvmsentry.ptrace.space import StubTables
    from kvmsentry.ptrace.tracer import Tracer

    class Tables(StubTables, PageTables):
        """mm's tables, mirrored in a stub process."""

    return Tracer(), Tables


def preload() -> None:
    """Import every module that a handler might import while it serves: once locked in, no file can be read."""
    import importlib
    import pkgutil

    for name in ("kernel", "fs", "fs.proc", "net", "mm"):
        package = importlib.import_module(f"kvmsentry.{name}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"kvmsentry.{name}.{module.name}")


class Sandbox:
    """One sandbox, from the Sentry's side."""

    def __init__(
        self, spec: SandboxSpec, gofer_socket: socket.socket, control: socket.socket, network: Network
    ) -> None:
        from kvmsentry.gofer.client import Client
        from kvmsentry.kernel import vdso
        from kvmsentry.kernel.kernel import Kernel
        from kvmsentry.mm.frames import FrameAllocator
        from kvmsentry.syscall import table

        self.spec, self.control, self.network = spec, control, network
        limit = memory_limit(spec)
        log.mark("modules")
        self.platform, tables = make_platform(spec.platform)
        log.mark("machine")
        self.frames = FrameAllocator(self.platform.memory, limit_pages=limit // PAGE)
        self.platform.mmu_factory = lambda: tables(self.platform, self.frames)
        self.kernel = Kernel(self.platform, self.frames, spec.hostname)
        if self.platform.traits.get("tsc_is_hosts") and vdso.counter_is_steady():
            image = self.platform.vdso_image()
            self.kernel.vdso = vdso.Vdso(
                self.kernel, image, self.platform.ticks, self.platform.traits.get("tsc_khz", 0)
            )
        table.load()
        preload()
        log.mark("handlers")
        if spec.strace_fd >= 0:
            from kvmsentry.syscall.strace import Strace

            self.kernel.strace = Strace(spec.strace_fd)
        self.client = Client(gofer_socket)
        self.terminal: Any = None

    def run(self) -> int:
        """Start the first process, lock down, serve; returns its wait status."""
        from kvmsentry.fs import mounts
        from kvmsentry.kernel import fork
        from kvmsentry.kernel.task import Credentials

        spec, kernel = self.spec, self.kernel
        namespace = mounts.build(
            kernel,
            self.client,
            readonly_root=spec.readonly_root,
            overlay=spec.overlay,
            owners=image_owners(spec.rootfs_owners),
            volumes=[(f"volume{n}", os.fsencode(v.guest), v.readonly) for n, v in enumerate(spec.volumes)],
        )
        root = namespace.top()
        creds = Credentials(spec.uid, spec.gid, frozenset(spec.groups))
        log.mark("mounts")
        lookup = Lookup(kernel, root, creds)
        profiler = Profiler() if os.environ.get("KVMSENTRY_PROFILE") else None
        cwd = lookup.directory(spec.cwd, spec.uid, spec.gid)
        files = self._standard_files(lookup, creds)
        path = lookup.command(spec.argv[0], cwd, search_path(spec.env))
        hostfiles.write(kernel, root, spec, self.network)
        if not lockdown.enter(self.network):
            kernel.__dict__["inet_refused"] = True
        log.mark("lockdown")
        try:
            fork.create_init(
                kernel,
                path=path,
                argv=spec.argv,
                envp=spec.env,
                root=root,
                cwd=cwd,
                creds=creds,
                files=files,
                umask=spec.umask,
                tty=self.terminal,
            )
        except Errno as error:
            raise cannot_run(spec.argv[0], error.errno) from None
        log.mark("exec")
        self.platform.watch(self.control.fileno(), 1, self._on_control)
        signal.signal(signal.SIGUSR1, lambda *_: self.kernel.dump_to_stderr())
        try:
            gc.freeze()  # all this lives to the end
            gc.set_threshold(20_000, 20, 50)
            gc.enable()
            return profiler.run(kernel) if profiler is not None else kernel.run()
        finally:
            log.mark("run")
            log.log(f"counters: {self.platform.counters}")
            log.log(f"times: {log.marks}")
            if self.terminal is not None:
                self.terminal.close()  # what the screen has not taken yet

    # -- standard input, output, error -------------------------------------------------------------
    def _standard_files(self, lookup: Lookup, creds: Any) -> Any:
        from kvmsentry.fs import hostfile
        from kvmsentry.fs.fdtable import FdTable

        spec, kernel = self.spec, self.kernel
        files = FdTable()
        if spec.tty:
            from kvmsentry.fs import hostterm

            source = 0 if spec.interactive else os.open(os.devnull, os.O_RDONLY)
            self.terminal, file = hostterm.open_terminal(kernel, source, 1, creds.uid, lookup.root)
            self.terminal.resize(*window_size(1))
            for fd in (0, 1, 2):
                files.replace(fd, file if fd == 0 else file.get())
            return files
        for fd in (0, 1, 2):
            source = fd
            if fd == 0 and not spec.interactive:
                source = os.open(os.devnull, os.O_RDONLY)
            files.replace(fd, hostfile.open_host(kernel, source, creds.uid, creds.gid))
        return files

    # -- the supervisor ----------------------------------------------------------------------------
    def _on_control(self, events: int) -> None:
        from kvmsentry.kernel import signals
        from kvmsentry.kernel.task import SigInfo

        message = self.control.recv(64)
        if not message:
            os._exit(1)  # the supervisor is gone, and so is everybody who could be told
        if message[:1] == b"S" and self.kernel.init is not None:
            signo = NUMBER.unpack_from(message, 1)[0]
            signals.send_process(self.kernel.init, SigInfo(signo, SI_USER, pid=0, uid=0), force=True)
        elif message[:1] == b"W" and self.terminal is not None:
            self.terminal.resize(*WINDOW.unpack_from(message, 1))


def search_path(env: list[bytes]) -> bytes:
    """PATH of the environment, or what a login would have."""
    for entry in env:
        if entry.startswith(b"PATH="):
            return entry[5:]
    return DEFAULT_PATH


def cannot_run(name: bytes, number: int) -> UserError:
    """The one line and the conventional status for a command that could not be started."""
    shown = name.decode(errors="backslashreplace")
    if number in (errno.ENOENT, errno.ENOTDIR):
        return UserError(
            f"cannot run {shown!r}: no such file or directory in the image (or its interpreter is missing)", 127
        )
    return UserError(f"cannot run {shown!r}: {os.strerror(number)}", 126)


def image_owners(path: str) -> Any:
    """For an image in an ordinary user's store: the function (path) -> (mode or None, uid, gid) or None that
    tells whom files really belong to; None where the files on disk tell it themselves."""
    if not path:
        return None
    from kvmsentry.image.owners import load_owners

    owners = load_owners(path)
    nobody_else = (None, 0, 0) if owners.everyone else None

    def owner(name: bytes) -> tuple[int | None, int, int] | None:
        entry = owners.entries.get(name)
        return (entry.mode, entry.uid, entry.gid) if entry is not None else nobody_else

    owner.__dict__["xattrs"] = {name: entry.xattrs for name, entry in owners.entries.items() if entry.xattrs}
    return owner


class Profiler:
    """KVMSENTRY_PROFILE=1: where the Sentry's Python spends its time, as a table in the debug log at the end."""

    def __init__(self) -> None:
        import cProfile
        import io
        import pstats

        self.profile, self.stats, self.buffer = cProfile.Profile(), pstats.Stats, io.StringIO()

    def run(self, kernel: Any) -> int:
        """kernel.run(), measured."""
        try:
            status: int = self.profile.runcall(kernel.run)
        finally:
            self.stats(self.profile, stream=self.buffer).sort_stats("tottime").print_stats(40)
            log.log(self.buffer.getvalue())
        return status


class Lookup:
    """Path look-ups before there is a task: walks as the first process would."""

    def __init__(self, kernel: Any, root: Any, creds: Any) -> None:
        from kvmsentry.fs.vfs import FsContext

        self.kernel, self.root, self.creds = kernel, root, creds
        self.fs = FsContext(root, root)
        self.mm = self.files = self.process = None

    def directory(self, path: bytes, uid: int, gid: int) -> Any:
        """The working directory, made when it is missing (as container engines do)."""
        from kvmsentry.fs import ops, vfs

        done = b""
        for name in [n for n in path.split(b"/") if n]:
            done += b"/" + name
            try:
                place = vfs.walk(self, done)  # type: ignore[arg-type]
            except Errno as error:
                if error.errno != errno.ENOENT:
                    raise UserError(f"working directory {path.decode(errors='replace')}: {error}") from None
                ops.mkdir_at(self, None, done, 0o755)  # type: ignore[arg-type]
        try:
            place = vfs.walk(self, path or b"/")  # type: ignore[arg-type]
        except Errno as error:
            raise UserError(f"working directory {path.decode(errors='replace')}: {error}") from None
        if place.inode.mode & 0o170000 != 0o040000:
            raise UserError(f"working directory {path.decode(errors='replace')}: not a directory")
        return place

    def command(self, name: bytes, cwd: Any, path: bytes) -> bytes:
        """The file that `name` means: itself with a slash in it, else the first executable along `path` (execvp(3))."""
        from kvmsentry.fs import vfs

        if not name:
            raise UserError("cannot run '': no command", 127)
        self.fs.cwd = cwd
        if b"/" in name:
            return name
        refused = errno.ENOENT
        for directory in path.split(b":"):
            candidate = (directory or b".") + b"/" + name
            try:
                place = vfs.walk(self, candidate)  # type: ignore[arg-type]
                if place.inode.mode & 0o170000 != 0o100000:
                    raise Errno(errno.EACCES)
                vfs.permission(place.inode, vfs.MAY_EXEC, self.creds)
            except Errno as error:
                if error.errno == errno.EACCES:
                    refused = error.errno
                continue
            return candidate
        if refused == errno.ENOENT:
            raise UserError(f"cannot run {name.decode(errors='backslashreplace')!r}: command not found in PATH", 127)
        raise cannot_run(name, refused)
