"""A Debian image, used as people use one: each script runs in the same root file system natively and inside, and
the two must say the same.

The image comes from `hack/mkimage debian` (built once, minutes); KVMSENTRY_DEBIAN names a ready one.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator

import pytest
from test_terminal import Person

pytestmark = pytest.mark.timeout(900)
MKIMAGE = pathlib.Path(__file__).parents[2] / "hack" / "mkimage"
PACKAGES = ["gcc", "git", "libc6-dev", "make", "perl", "procps", "python3", "sqlite3", "xz-utils"]

SCRIPTS = pathlib.Path(__file__).with_name("debian")
EXECUTE = {".sh": "bash", ".pl": "perl", ".py": "python3"}


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> str:
    if ready := os.environ.get("KVMSENTRY_DEBIAN"):
        return ready
    path = tmp_path_factory.mktemp("images") / "debian.tar"
    made = subprocess.run([sys.executable, MKIMAGE, "debian", path, *PACKAGES], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no Debian image can be made here: {made.stderr.strip()[-300:]}")
    return str(path)


@pytest.fixture(scope="module")
def rootfs(debian: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The image's files, for the native side; each run sees them through an overlay of its own."""
    if os.geteuid() != 0:
        pytest.skip("the native side needs chroot(2)")
    target = tmp_path_factory.mktemp("debian")
    with tarfile.open(debian) as image:
        for member in image.getmembers():
            if member.name.endswith("layer.tar") or member.name.startswith("blobs") or member.name.endswith(".tar"):
                layer = image.extractfile(member)
                assert layer is not None
                unpack = subprocess.Popen(["tar", "-x", "--numeric-owner", "-C", target], stdin=subprocess.PIPE)
                assert unpack.stdin is not None
                shutil.copyfileobj(layer, unpack.stdin, 1 << 20)
                unpack.stdin.close()
                assert unpack.wait() == 0
    yield target
    shutil.rmtree(target, ignore_errors=True)


NATIVE = """
mount -t tmpfs none $0 &&
mkdir $0/u $0/w $0/m && mount -t overlay -o lowerdir=$1,upperdir=$0/u,workdir=$0/w none $0/m &&
cd $0/m && mkdir -p proc dev tmp &&
mount -t proc proc proc && mount --rbind /dev dev && mount -t tmpfs none tmp && shift && exec chroot . "$@"
"""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


Beside = Callable[..., str]


@pytest.fixture
def beside(debian: str, rootfs: pathlib.Path, kvmsentry: list[str], tmp_path: pathlib.Path) -> Beside:
    """Runs a command natively and inside; both must end the same and say the same. Returns what they said."""

    def run(*argv: str, timeout: int = 120) -> str:
        def outcome(command: list[str], **how: object) -> tuple[int, str, str]:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                **how,
            )  # type: ignore[call-overload]
            return done.returncode, done.stdout, done.stderr

        alone = ["unshare", "-mpfu", "--kill-child", "sh", "-c", NATIVE, str(tmp_path), str(rootfs)]
        native = outcome([*alone, *argv], env={"PATH": PATH, "HOME": "/root"})
        inside = outcome([*kvmsentry, "run", debian, *argv])
        assert inside[:2] == native[:2], f"natively: {native[2]}\ninside: {inside[2]}"
        return native[1]

    return run


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.iterdir()))
def test_script(name: str, beside: Beside) -> None:
    script = SCRIPTS / name
    assert beside(
        "bash", "-c", f"cat >/tmp/{name} <<'~~~'\n{script.read_text()}~~~\nexec {EXECUTE[script.suffix]} /tmp/{name}"
    )


@pytest.mark.slow
def test_everything_listed(beside: Beside) -> None:
    """Every name, mode, owner and byte of the image but the files that a container gets."""
    script = r"""
        find /usr /etc /var /home /opt /srv -printf '%p %m %U %G %y %l\n' |
            grep -vE '^/etc/(hosts|hostname|resolv.conf) ' | sort | sha256sum
        find /usr -type f | sort | xargs sha256sum | sha256sum"""
    assert beside("bash", "-c", script, timeout=600)


@pytest.fixture(params=["native", "inside"])
def shell(request: pytest.FixtureRequest, kvmsentry: list[str], debian: str) -> Iterator[Person]:
    command = ["bash", "--norc", "--noediting", "-i"]
    native = ["env", "-u", "PS1", "HOME=/", *command]  # whoever runs the tests may have a prompt of his own
    person = Person([*kvmsentry, "run", "-it", debian, *command] if request.param == "inside" else native)
    person.see(r"# ")
    person.type("PS1='ready> '\r")
    person.see(r"\nready> ")
    yield person
    person.close()


def test_jobs_at_a_terminal(shell: Person) -> None:
    def command(text: str, *patterns: str) -> None:
        shell.type(text + "\r")
        for pattern in patterns:
            shell.see(pattern)
        shell.see(r"ready> ")

    command("tty; stty size", r"/dev/pts/\d+", "30 100")
    shell.type("sleep 100\r")
    time.sleep(0.4)
    shell.type("\x03")
    shell.see(r"ready> ")
    command("echo status $?", r"status 130")
    shell.type("sleep 101\r")
    time.sleep(0.4)
    shell.type("\x1a")
    shell.see(r"\[1\]\+\s+Stopped\s+sleep 101")
    shell.see(r"ready> ")
    command("jobs", r"\[1\]\+\s+Stopped\s+sleep 101\r")
    command("bg", r"\[1\]\+ sleep 101 &")
    command("jobs", r"\[1\]\+\s+Running\s+sleep 101 &")
    shell.type("fg\r")
    shell.see(r"sleep 101\r\n")
    time.sleep(0.4)
    shell.type("\x03")
    shell.see(r"ready> ")
    command("cat | cat &", r"\[1\] \d+")
    command("sleep 0.2; jobs", r"\[1\]\+\s+Stopped\s+cat \| cat")  # it read from the terminal: SIGTTIN
    shell.type("fg\r")
    shell.see(r"cat \| cat\r\n")
    shell.type("words\r")
    shell.see(r"words\r\nwords\r\n")
    shell.type("\x04")
    shell.see(r"ready> ")
    command(
        "(trap 'echo interrupted' INT; kill -INT $BASHPID; kill -STOP $BASHPID; echo resumed)", "interrupted", "Stopped"
    )
    command("kill %1; sleep 0.3; jobs", "Terminated")
    command("(sleep 0.2; exit 3) & wait $!; echo $?", r"\n3\r")
    shell.type("sleep 100 | sleep 100\r")
    time.sleep(0.4)
    shell.type("\x1c")
    shell.see(r"Quit.*\n")
    shell.see(r"ready> ")
    shell.type("exit 9\r")
    assert shell.process.wait(30) == 9
