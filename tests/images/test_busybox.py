"""A busybox image, used as people use one. What can be compared is compared with the same root file system run
natively."""

from __future__ import annotations

import os
import pathlib
import subprocess
import tarfile
from collections.abc import Callable, Iterator

import pytest

Runner = Callable[..., subprocess.CompletedProcess[str]]

SCRIPTS = {
    "pipeline": "seq 1 1000 | grep 7 | sort -rn | head -n 5 | tr '\\n' ' '",
    "here-document": "cat <<E | tr a-z A-Z\nfirst $((6 * 7))\nsecond\nE",
    "statuses": "true; echo $?; false; echo $?; sh -c 'exit 7'; echo $?; nonsense 2>/dev/null; echo $?; "
    "sh -c 'kill -9 $$'; echo $?",
    "functions": "f() { echo $# $1; return 3; }; f a b; echo $?; x=abc; echo ${x#a} ${x%c} ${#x}",
    "substitution": "echo $(echo $(echo nested)) `echo back`",
    "files": "cd /tmp; mkdir -p a/b; echo x >a/b/c; ln -s b a/l; ln a/b/c a/d; cat a/l/c; "
    "stat -c '%h %s %F' a/d; rm -r a; ls",
    "append": "cd /tmp; for i in 1 2 3; do echo $i >>f; done; cat f; wc -c <f; truncate -s 1 f; cat f; rm f",
    "find": "find /bin /usr /var | sort | md5sum",
    "tar": "cd /tmp; mkdir t; cp /bin/busybox t/; seq 1 5000 >t/seq; tar czf t.tgz t; mkdir u; tar xzf t.tgz -C u; "
    "cd u/t; md5sum busybox seq; cmp seq ../../t/seq && echo same",
    "gzip": "seq 1 100000 | gzip | gzip -d | md5sum",
    "sort": "seq 1 20000 | awk '{print ($1 * 7919) % 20011}' | sort -n | md5sum",
    "background": "sleep 0.2 & p=$!; wait $p; echo $?; (sleep 5 & kill $!; wait $!; echo $?)",
    "trap": "trap 'echo got' USR1; kill -USR1 $$; echo after; trap 'echo bye' EXIT",
    "subshells": "(cd /bin; pwd); pwd; { echo a; echo b >&2; } 2>&1 | sort",
    "fifo": "cd /tmp; mkfifo p; (echo through >p) & cat p; wait; rm p",
    "read": "printf 'a b c\\nd\\n' | while read x y; do echo \"[$x] [$y]\"; done",
    "expr": "expr 3 \\* 4; test -f /etc/passwd && echo yes; [ -d /nope ] || echo no",
    "dd": "dd if=/dev/zero bs=4096 count=100 2>/dev/null | md5sum; "
    "dd if=/dev/zero of=/dev/full bs=1 count=1 2>&1 | grep -c 'No space'",
    "umask": "cd /tmp; umask 077; >f; stat -c %a f; umask 0; >g; stat -c %a g; rm f g",
    "thousand": "i=0; while [ $i -lt 1000 ]; do /bin/true; i=$((i+1)); done; echo $i",
    "two-hundred": "i=0; while [ $i -lt 200 ]; do sleep 1 & i=$((i+1)); done; wait; echo done",
    "vi-less": "echo abc | sed 's/b/B/'; echo 'a:b' | cut -d: -f2; printf '%03d\\n' 7; basename /a/b/c; dirname /a/b/c",
}


@pytest.fixture(scope="module")
def rootfs(busybox: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image's files, for the native side."""
    if os.geteuid() != 0:
        pytest.skip("the native side needs chroot(2)")
    target = tmp_path_factory.mktemp("rootfs")
    with tarfile.open(busybox) as image:
        for member in image.getmembers():
            if member.name.endswith("layer.tar") or member.name.startswith("blobs") or member.name.endswith(".tar"):
                layer = image.extractfile(member)
                assert layer is not None
                with tarfile.open(fileobj=layer) as files:
                    files.extractall(target, filter="tar")
    subprocess.run(["mount", "--bind", "/dev", target / "dev"], check=False)
    yield str(target)
    subprocess.run(["umount", target / "dev"], check=False)


def natively(rootfs: str, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-mpf", "--mount-proc", "chroot", rootfs, "/bin/sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/bin:/usr/bin:/sbin:/usr/sbin"},
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_same_as_native(name: str, rootfs: str, in_busybox: Runner) -> None:
    native = natively(rootfs, SCRIPTS[name])
    inside = in_busybox("sh", "-c", SCRIPTS[name], timeout=120)
    assert (inside.returncode, inside.stdout) == (native.returncode, native.stdout), inside.stderr


def test_big_file(in_busybox: Runner) -> None:
    script = "dd if=/dev/zero bs=1M count=500 2>/dev/null | tr '\\0' x >/tmp/big; wc -c </tmp/big; md5sum </tmp/big"
    expected = subprocess.run(
        ["sh", "-c", "dd if=/dev/zero bs=1M count=500 2>/dev/null | tr '\\0' x | md5sum"],
        capture_output=True,
        text=True,
    ).stdout
    done = in_busybox("sh", "-c", script, timeout=300)
    assert done.stdout.split() == ["524288000", *expected.split()], done.stderr


def test_process_listings(in_busybox: Runner) -> None:
    done = in_busybox("sh", "-c", "sleep 7 & ps; top -b -n1; free; df; mount; uptime")
    assert "sleep 7" in done.stdout and "overlay" in done.stdout and "Mem" in done.stdout
    assert done.returncode == 0, done.stderr


def test_list_everything(in_busybox: Runner) -> None:
    done = in_busybox("ls", "-laR", "/", timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    for name in ("/bin:", "/proc/1:", "/dev/pts:", "/sys/devices:", "busybox"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["true"], 0),
        (["false"], 1),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"], 143),
        (["nonsense"], 127),
        (["/etc/passwd"], 126),
        (["/nonsense"], 127),
        (["/etc"], 126),
    ],
)
def test_exit_status(argv: list[str], status: int, in_busybox: Runner) -> None:
    done = in_busybox(*argv)
    assert done.returncode == status
    if status in (126, 127):
        assert done.stderr.count("\n") == 1 and argv[0] in done.stderr


def test_settings(in_busybox: Runner, tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "given").write_text("from the host\n")
    done = in_busybox(
        "sh",
        "-c",
        "echo $X; pwd; id -u; hostname; cat /in/given; echo back >/out/made; touch /in/no 2>&1",
        options=[
            "-e",
            "X=y",
            "-w",
            "/tmp",
            "-u",
            "1000",
            "--hostname",
            "box",
            "-v",
            f"{tmp_path}:/in:ro",
            "-v",
            f"{tmp_path}:/out",
        ],
    )
    assert done.stdout.splitlines()[:5] == ["y", "/tmp", "1000", "box", "from the host"], done.stderr
    assert "Read-only" in done.stdout


def test_volume_is_written(in_busybox: Runner, tmp_path: pathlib.Path) -> None:
    done = in_busybox(
        "sh", "-c", "echo back >/out/made; mkdir /out/d; mv /out/made /out/d/", options=["-v", f"{tmp_path}:/out"]
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d" / "made").read_text() == "back\n"


def test_image_is_never_written(in_busybox: Runner) -> None:
    assert in_busybox("sh", "-c", "rm -r /bin /etc; ls /bin", timeout=60).returncode != 0
    assert in_busybox("sh", "-c", "ls /etc/passwd").returncode == 0


def test_read_only(in_busybox: Runner) -> None:
    done = in_busybox("sh", "-c", "touch /x; touch /tmp/x; echo $?", options=["--read-only"])
    assert "Read-only" in done.stderr and done.stdout == "1\n"


def test_memory_limit(in_busybox: Runner) -> None:
    """A process that asks for more than there is gets killed, says dmesg; a file gets ENOSPC; the sandbox goes on."""
    script = (
        "dd if=/dev/zero of=/tmp/x bs=1M count=100 2>&1 | grep -o 'No space'; rm /tmp/x; "
        "tail /dev/zero; echo $?; dmesg | grep -c 'Out of memory'; "
        "dd if=/dev/zero of=/dev/null bs=200M count=1; echo $?; dmesg | grep -c 'Out of memory'"  # amid one read(2)
    )
    done = in_busybox("sh", "-c", script, options=["--memory", "64m"])
    assert done.stdout.splitlines() == ["No space", "137", "1", "137", "2"], done.stderr


def test_stdin_and_signals(kvmsentry: list[str], busybox: str) -> None:
    process = subprocess.Popen(
        [
            *kvmsentry,
            "run",
            busybox,
            "sh",
            "-c",
            "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.read() == "caught\n"
    assert process.wait(30) == 5


def test_nothing_is_left(kvmsentry: list[str], busybox: str) -> None:
    """Processes, mounts and files after runs that end well and badly."""

    def census() -> tuple[list[str], str]:
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
        mounts = pathlib.Path("/proc/self/mounts").read_text()
        return [p for p in processes if busybox in p], mounts

    subprocess.run([*kvmsentry, "run", busybox, "true"], check=True)
    before = census()
    for argv in (["true"], ["false"], ["sh", "-c", "sleep 100 & sleep 100 & exit 1"], ["nonsense"]) * 3:
        subprocess.run([*kvmsentry, "run", busybox, *argv], capture_output=True, timeout=60)
    assert census() == before
