"""The Debian image that tests/images and hack/programs run things in, and its files natively.

Natively is chroot(2) in namespaces of their own, without the capabilities that reach the machine: the nearest that the
host's Linux has to a sandbox. Both sides see the same files through an overlay whose changes are gone afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tests" / "images" / "programs"
# Where both sides see SCRIPTS.
INSIDE_SCRIPTS = "/programs"
PACKAGES = """
    apache2-utils curl gcc git golang-go libc6-dev libpython3.11-testsuite make musl-tools nginx-light nodejs
    openjdk-17-jdk-headless perl php-cli postgresql procps python3 redis-server redis-tools sqlite3 stress-ng wrk
    xz-utils
""".split()
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}

# $0 is an empty directory, $1 the root file system, $2 SCRIPTS; the command follows.
NATIVE = f"""
[ $3 = host ] || busybox ip link set lo up
mount -t tmpfs none $0 &&
mkdir $0/u $0/w $0/m && mount -t overlay -o lowerdir=$1,upperdir=$0/u,workdir=$0/w none $0/m &&
cd $0/m && mkdir -p proc dev tmp .{INSIDE_SCRIPTS} && mount --bind $2 .{INSIDE_SCRIPTS} &&
mount -t proc proc proc && mount --rbind /dev dev && mount -t tmpfs none tmp && shift 3 && exec chroot . "$@"
"""

# tests/images' fixture: runs a command natively and inside, and compares. What it said.
Beside = Callable[..., str]


class NoImage(Exception):
    """The image cannot be made here; the message says why."""


def make(path: Path) -> str:
    """Write the image to `path`, unless $KVMSENTRY_DEBIAN names a ready one. Its name; NoImage says what is missing.

    Takes two minutes the first time, and seconds when hack/mkimage has the layer in its cache.
    """
    if ready := os.environ.get("KVMSENTRY_DEBIAN"):
        return ready
    mkimage = [sys.executable, str(ROOT / "hack" / "mkimage"), "debian", str(path), *PACKAGES]
    made = subprocess.run(mkimage, capture_output=True, text=True)
    if made.returncode != 0:
        raise NoImage(f"no Debian image can be made here: {made.stderr.strip()[-300:]}")
    return str(path)


def unpack(image: str, target: Path) -> None:
    """The image's layers, by tar(1) and not by what is tested. Root only, for the owners."""
    with tarfile.open(image) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".tar") or member.name.startswith("blobs"):
                layer = archive.extractfile(member)
                assert layer is not None
                command = ["tar", "-x", "--numeric-owner", "-C", str(target)]
                with subprocess.Popen(command, stdin=subprocess.PIPE) as tar:
                    assert tar.stdin is not None
                    shutil.copyfileobj(layer, tar.stdin, 1 << 20)
                    tar.stdin.close()
                if tar.returncode != 0:
                    raise NoImage(f"tar ended with status {tar.returncode}")


def natively(root: Path, scratch: Path, network: str = "none") -> list[str]:
    """The prefix that runs a command in the unpacked image's files; ENVIRONMENT is what its environment should be.

    `scratch` is an empty directory, free again afterwards. Network: "none" is a loopback of its own, "host" the host's.
    """
    return [
        "setpriv", "--bounding-set=-sys_time,-sys_boot,-sys_module,-sys_rawio",
        "unshare", "-mpfui" + "n" * (network == "none"), "--kill-child",
        "sh", "-c", NATIVE, str(scratch), str(root), str(SCRIPTS), network,
    ]  # fmt: skip


def inside(kvmsentry: list[str], image: str, *options: str) -> list[str]:
    """The prefix that runs a command in a sandbox of the image."""
    return [*kvmsentry, "run", "-v", f"{SCRIPTS}:{INSIDE_SCRIPTS}:ro", *options, image]
