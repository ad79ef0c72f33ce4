#!/usr/bin/env python3
"""Runs a command of this checkout on a machine whose /dev/kvm is Linux's own kvm_amd.

The machine is emulated: QEMU's TCG has processors with SVM, so nothing is asked of the host's KVM. All it holds is made
here, as one initramfs: busybox, a kernel's KVM modules, this checkout with its .venv, and the Python that it stands on,
each at its own path. There is no network; what the command writes is lost; its output and exit status come out.

    hack/nested_vm.py check                           what this host lacks; exit status 3 if anything
    hack/nested_vm.py [--npt 0] [options] -- COMMAND

Kernel: $NESTED_KERNEL (a directory with boot/vmlinuz-* and lib/modules), else the distribution's package, which is
downloaded and unpacked under build/, not installed. Exit status: the command's; 124 its time limit ran out; 125 the
machine did not boot, or ended too early; 3 this host cannot make it. Why is on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import glob
import gzip
import lzma
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "nested"
QEMU = "qemu-system-x86_64"
# Small kernels for virtual machines: Debian's, Ubuntu's.
KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")
MODULE = "kvm-amd"
CHECKOUT = ("kvmsentry", "guest_stub", "tests", "hack", "pyproject.toml", "build/vcpu-tests",
            "build/busybox.tar", ".venv")  # fmt: skip
LEFT_OUT = {"site-packages", "test", "idlelib", "tkinter", "ensurepip", "lib2to3", "config-3.11-x86_64-linux-gnu"}
LEFT_OUT_OF_VENV = {"pip", "setuptools", "ruff", "mypy", "mypyc", "include"}
NOT_TESTED, TIMED_OUT, DIED = 3, 124, 125
BOOT_LIMIT = 60.0  # it takes 4 s on quiet processors
BOOTS = 2
STATUS = re.compile(rb"\x00status (\d+)\n")

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /tmp /run; mount -t tmpfs shm /dev/shm; mount -t devpts pts /dev/pts
ln -sf /proc/self/fd /dev/fd
ip link set lo up
stty -F /dev/ttyS1 raw -echo 115200
exec >/dev/ttyS1 2>&1
printf '\\0up\\n'
while read -r module parameters; do
    insmod "$module" $parameters || { echo "cannot load $module"; printf '\\0status 3\\n'; poweroff -f; }
done </modules
# Not the initramfs itself: nobody can pivot_root(2) away from that.
mount --bind / /mnt; cd /mnt
mount --move /proc proc; mount --move /sys sys; mount --move /dev dev
chroot . /bin/sh /command
printf '\\0status %d\\n' $?
poweroff -f
"""

# A VM with a vCPU, held while the machine lives. Without it each first VM and last VM switches static keys in the
# kernel (preempt_notifier_key in __schedule, kvm_has_noapic_vcpu), which means rewriting code that the other processor
# runs; and QEMU's TCG (7.2) now and then keeps a translation of the breakpoint that stands there meanwhile: that
# processor takes #BP for ever, and the machine is frozen. docs/hosts.md.
HOLD = """
import fcntl, os, signal
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
vcpu = fcntl.ioctl(vm, 0xAE41, 0)  # KVM_CREATE_VCPU
os.close(os.open("/held", os.O_CREAT))
signal.pause()
"""


class Untested(Exception):
    """This host cannot make the machine."""


class Died(Exception):
    """The machine ended before its command did."""


class NotBooted(Died):
    """It hung or ended before it began the command."""


# -- the kernel


def kernel() -> Path:
    """A directory with boot/vmlinuz-* and lib/modules/*."""
    named = os.environ.get("NESTED_KERNEL")
    if named:
        return Path(named)
    kept = BUILD / "kernel"
    if kept.exists():
        return kept
    for package in KERNEL_PACKAGES:
        files = _dependencies(package)
        if files:
            break
    else:
        raise Untested(f"apt knows none of {', '.join(KERNEL_PACKAGES)} (apt-get update?)")
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        _tool(["apt-get", "-o", "APT::Sandbox::User=root", "download", *files], cwd=work)
        for archive in glob.glob(f"{work}/*.deb"):
            _tool(["dpkg-deb", "-x", archive, f"{work}/tree"])
        os.rename(f"{work}/tree", kept)
    return kept


def _dependencies(package: str) -> list[str]:
    """The packages that a kernel's meta package stands for: image and modules."""
    found: list[str] = []
    queue = [package]
    while queue:
        asked = subprocess.run(["apt-cache", "depends", queue.pop()], capture_output=True, text=True)
        for name in re.findall(r"^ *\|?Depends: (linux-(?:image|modules)-\S+)", asked.stdout, re.MULTILINE):
            if name not in found:
                found.append(name)
                queue.append(name)
    return found


def _tool(argv: list[str], **options: str) -> bytes:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise Untested(f"{argv[0]}: {done.stderr.decode(errors='replace').strip().splitlines()[-1:]}")
    return bytes(done.stdout)


def modules(tree: Path, wanted: str) -> dict[str, bytes]:
    """{name: contents} of a module and, before it, of those it needs."""
    found: dict[str, bytes] = {}
    folder = next(iter(sorted(tree.glob("lib/modules/*"))), None) or next(iter(tree.glob("usr/lib/modules/*")), None)
    if folder is None:
        raise Untested(f"{tree} has no lib/modules")
    paths = {re.sub(r"\.ko.*", "", path.name).replace("-", "_"): path for path in folder.rglob("*.ko*")}
    builtin = {Path(line).stem.replace("-", "_") for line in (folder / "modules.builtin").read_text().split()}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in found or name in builtin or not name:
            return
        if name not in paths:
            raise Untested(f"the kernel {folder.name} has no module {name}")
        data = _unpacked(paths[name])
        needs = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in needs[1].decode().split(",") if needs else ():
            add(other)
        found[name] = data

    add(wanted)
    return found


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return _tool(["zstd", "-dcq", str(path)]) if path.suffix == ".zst" else data


# -- the initramfs


class Archive:
    """A cpio archive ("newc", the kernel's early-userspace/buffer-format.rst); parents come by themselves."""

    def __init__(self, file: object) -> None:
        self.write = file.write  # type: ignore[attr-defined]
        self.names: set[str] = set()

    def _entry(self, name: str, mode: int, mtime: int, data: bytes) -> None:
        encoded = name.encode() + b"\0"
        fields = (len(self.names) + 1, mode, 0, 0, 1, mtime, len(data), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    def add(self, name: str, data: bytes = b"", mode: int = stat.S_IFREG | 0o755, mtime: int = 0) -> None:
        name = name.strip("/")
        if not name or name in self.names:
            return
        parent = os.path.dirname(name)
        if parent:
            self.add(parent, mode=stat.S_IFDIR | 0o755)
        self.names.add(name)
        self._entry(name, mode, mtime, data)

    def copy(self, path: str, name: str = "") -> None:
        """A file, a symbolic link, or a directory without what is in it, at its own path."""
        status = os.lstat(path)
        data = b""
        if stat.S_ISLNK(status.st_mode):
            data = os.readlink(path).encode()
        elif stat.S_ISREG(status.st_mode):
            data = Path(path).read_bytes()
        elif not stat.S_ISDIR(status.st_mode):
            return
        self.add(name or path, data, status.st_mode, int(status.st_mtime))

    def close(self) -> None:
        self._entry("TRAILER!!!", 0, 0, b"")


def tree(top: Path, left_out: set[str]) -> Iterator[str]:
    """Every path under top, and top."""
    yield str(top)
    if top.is_dir() and not top.is_symlink():
        for folder, names, files in os.walk(top):
            names[:] = [name for name in names if name not in left_out]
            yield from (os.path.join(folder, name) for name in (*names, *files))


def python_files() -> Iterator[str]:
    """What the interpreter of this checkout's .venv consists of, but for shared libraries."""
    asked = "import sys, sysconfig as s; print(sys._base_executable, s.get_path('stdlib'), s.get_path('platstdlib'))"
    executable, *folders = _tool([str(ROOT / ".venv/bin/python"), "-c", asked]).decode().split()
    yield from {executable, os.path.realpath(executable), *_links(str(ROOT / ".venv/bin/python"))}
    for folder in folders:
        if not folder.startswith(str(ROOT / ".venv")):
            yield from tree(Path(folder), LEFT_OUT)


def _links(path: str) -> Iterator[str]:
    """Each path of a chain of symbolic links."""
    yield path
    while os.path.islink(path):
        path = os.path.join(os.path.dirname(path), os.readlink(path))
        yield path


def libraries(paths: list[str]) -> set[str]:
    """The shared libraries that programs and extensions are linked with, and the dynamic loader."""
    found: set[str] = set()
    for start in range(0, len(paths), 100):
        said = subprocess.run(["ldd", *paths[start : start + 100]], capture_output=True, text=True).stdout
        found |= set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", said, re.MULTILINE))
    return found


def make_initramfs(to: Path, tree_of_kernel: Path, npt: int, command: list[str]) -> None:
    """Everything that is in the machine, in one file."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise Untested("no busybox (busybox-static)")
    paths = list(python_files())
    for name in CHECKOUT:
        if (ROOT / name).exists():
            paths += tree(ROOT / name, LEFT_OUT_OF_VENV if name == ".venv" else set())
    programs = [p for p in paths if p.endswith(".so") or ".so." in p or re.search(r"/bin/python[\d.]*$", p)]
    wanted = libraries([os.path.realpath(p) for p in programs])
    path = f"{ROOT}/.venv/bin:/usr/local/bin:/usr/bin:/bin"
    environment = {"HOME": "/root", "LANG": "C.UTF-8", "PATH": path, "PYTHONUNBUFFERED": "1", "TERM": "dumb",
                   "NESTED_KVM": f"amd npt={npt}"}  # fmt: skip
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += ["python /hold &", "until [ -e /held ]; do sleep 0.05; done"]
    lines += [f"cd {shlex.quote(str(ROOT))}", f"exec {shlex.join(command)} </dev/null"]
    with open(to, "wb") as file:
        archive = Archive(file)
        for folder in ("dev", "mnt", "proc", "root", "sys", "tmp"):
            archive.add(folder, mode=stat.S_IFDIR | 0o755)
        archive.add("init", INIT.encode())
        archive.copy(os.path.realpath(busybox), "bin/busybox")
        archive.add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", stat.S_IFREG | 0o644)
        archive.add("etc/group", b"root:x:0:\n", stat.S_IFREG | 0o644)
        archive.add("hold", HOLD.encode())
        archive.add("command", "\n".join(lines).encode())
        parameters = {"kvm_amd": f"npt={npt}"}
        listed = ""
        for name, data in modules(tree_of_kernel, MODULE).items():
            archive.add(f"lib/{name}.ko", data)
            listed += f"/lib/{name}.ko {parameters.get(name, '')}\n"
        archive.add("modules", listed.encode())
        for library in sorted(wanted):
            archive.copy(os.path.realpath(library), library)
        for each in dict.fromkeys(paths):
            archive.copy(each)
        archive.close()


# -- the machine


def check() -> None:
    """Untested with what is missing."""
    missing = {"busybox": "busybox-static", QEMU: "qemu-system-x86", "ldd": "libc-bin", "dpkg-deb": "dpkg"}
    lacking = [package for program, package in missing.items() if shutil.which(program) is None]
    if lacking:
        raise Untested(f"this host has no {', '.join(lacking)} (apt-get install --no-install-recommends)")
    if not (ROOT / ".venv/bin/python").exists():
        raise Untested("this checkout has no .venv (hack/setup)")
    kernel()


def run(args: argparse.Namespace) -> int:
    """The command's status."""
    check()
    where = kernel()
    image = next(iter(sorted(where.glob("boot/vmlinuz-*"))), None)
    if image is None:
        raise Untested(f"{where} has no boot/vmlinuz-*")
    with tempfile.TemporaryDirectory(prefix="nested-", dir=args.scratch) as work:
        initramfs = Path(work) / "initramfs"
        console = args.console or os.path.join(work, "console")
        make_initramfs(initramfs, where, args.npt, args.command)
        argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35",
                "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm", "-smp", str(args.cpus), "-m", str(args.memory),
                "-kernel", str(image), "-initrd", str(initramfs), "-serial", f"file:{console}", "-serial", "stdio",
                # Steady as the emulator's counter is, Linux would distrust it; and nothing is to be mitigated.
                "-append", "console=ttyS0 panic=-1 tsc=reliable mitigations=off quiet"]  # fmt: skip
        if args.monitor:
            argv += ["-qmp", f"unix:{args.monitor},server=on,wait=off", "-name", "nested,debug-threads=on"]
        for left in reversed(range(BOOTS)):
            try:
                return _attend(argv, args.timeout, console)
            except NotBooted as error:
                if not left:
                    raise
                print(f"nested_vm: once more, for {error}", file=sys.stderr)
    raise AssertionError("no boot was tried")


def _attend(argv: list[str], limit: float, console: str) -> int:
    """Passes output on until the status comes."""
    libc = ctypes.CDLL(None)
    machine = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: libc.prctl(1, signal.SIGKILL))  # fmt: skip
    assert machine.stdout is not None
    fd = machine.stdout.fileno()
    up, seen, end = False, b"", time.monotonic() + BOOT_LIMIT
    try:
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                if up:
                    print(f"nested_vm: the command ran longer than {limit:g} s", file=sys.stderr)
                    return TIMED_OUT
                raise NotBooted(f"the machine did not boot in {BOOT_LIMIT:g} s\n{_end_of(console)}")
            data = os.read(fd, 65536)
            seen += data
            if not up and b"\0up\n" in seen:
                up, end = True, time.monotonic() + limit
                seen = seen.partition(b"\0up\n")[2]
            status = STATUS.search(seen)
            if up:  # all but what may be the beginning of a status
                keep = len(seen) if b"\0" not in seen[-32:] else seen.rindex(b"\0")
                sys.stdout.buffer.write(seen[: status.start() if status else keep])
                sys.stdout.buffer.flush()
                seen = seen[keep:] if not status else b""
            if status:
                return int(status[1])
            if not data:
                if up:
                    raise Died(f"the machine ended while the command ran\n{_end_of(console)}")
                raise NotBooted(f"the machine ended as it booted: {seen.decode(errors='replace')}\n{_end_of(console)}")
    finally:
        machine.kill()
        machine.wait()


def _end_of(console: str) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(Path(console).read_text(errors="replace").splitlines()[-25:])
    return ""


def main() -> int:
    """See the module's docstring."""
    if sys.argv[1:] == ["check"]:
        check()
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npt", type=int, choices=(0, 1), default=1, help="1: nested paging, 0: shadow paging")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="for the command, from when it starts")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=3072, metavar="MB")
    parser.add_argument("--console", metavar="FILE", help="keep what the machine's kernel printed")
    parser.add_argument("--monitor", metavar="SOCKET", help="QEMU's QMP: to look at a machine that hangs")
    parser.add_argument("--scratch", metavar="DIR", help="for the initramfs, 150 MB (the system's temporary directory)")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    return run(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Untested, Died) as error:
        print(f"nested_vm: {error}", file=sys.stderr)
        sys.exit(NOT_TESTED if isinstance(error, Untested) else DIED)
