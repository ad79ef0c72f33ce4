"""Whole programs and images on the ptrace platform, each judged by what it does natively."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
GUEST = HERE.parent / "guest"
PROGRAMS = ("edges", "exec", "fork_wait", "ids", "ptrace", "signals", "threads", "vfork")
COMMAND = [sys.executable, "-m", "kvmsentry"]
SCRIPTS = {
    "pipeline": "seq 1 1000 | grep 7 | sort -rn | head -n 5 | tr '\\n' ' '",
    "statuses": "true; echo $?; false; echo $?; sh -c 'exit 7'; echo $?; sh -c 'kill -9 $$'; echo $?",
    "files": "cd /tmp; mkdir -p a/b; echo x >a/b/c; ln -s b a/l; ln a/b/c a/d; cat a/l/c; rm -r a; ls",
    "gzip": "seq 1 100000 | gzip | gzip -d | md5sum",
    "background": "sleep 0.1 & p=$!; wait $p; echo $?; (sleep 5 & kill $!; wait $!; echo $?)",
    "trap": "trap 'echo got' USR1; kill -USR1 $$; echo after; trap 'echo bye' EXIT",
    "fifo": "cd /tmp; mkfifo p; (echo through >p) & cat p; wait; rm p",
    "hundred": "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done; echo $i",
    "sleepers": "i=0; while [ $i -lt 40 ]; do sleep 1 & i=$((i+1)); done; wait; echo done",
}


def run(argv: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, errors="replace"
    )


@pytest.fixture(scope="session")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A busybox image; needs no KVM, as the fixture of the other image tests does not either."""
    path = tmp_path_factory.mktemp("images") / "busybox.tar"
    hack = HERE.parent.parent / "hack" / "mkimage"
    subprocess.run([sys.executable, hack, "busybox", str(path)], check=True, capture_output=True)
    return str(path)


@pytest.mark.parametrize("name", PROGRAMS)
def test_guest_programs(name: str, tmp_path: pathlib.Path) -> None:
    program = tmp_path / name
    subprocess.run(["gcc", "-O1", "-g", "-pthread", "-o", program, GUEST / f"{name}.c"], check=True)
    native = run([str(program)])
    if native.returncode == 4:
        pytest.skip(f"{name} skips natively: {native.stdout.strip()}")
    assert native.returncode == 0, f"{name} fails natively, so it can't judge us:\n{native.stdout}{native.stderr}"
    inside = run([*COMMAND, "do", "--platform=ptrace", str(program)])
    assert (inside.returncode, inside.stdout) == (0, native.stdout), inside.stdout + inside.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_busybox_scripts_as_the_host_runs_them(name: str, busybox_tar: str) -> None:
    shell = "/bin/busybox" if os.path.exists("/bin/busybox") else "/bin/sh"
    native = run([shell, *(["sh"] if shell.endswith("busybox") else []), "-c", f"cd $(mktemp -d); {SCRIPTS[name]}"
                  .replace("cd /tmp", ":")])  # fmt: skip
    inside = run([*COMMAND, "run", "--platform=ptrace", busybox_tar, "sh", "-c", SCRIPTS[name]])
    assert (inside.returncode, inside.stdout) == (native.returncode, native.stdout), inside.stderr


def test_auto_falls_back_and_says_so(busybox_tar: str) -> None:
    code = (
        "import os, sys\n"
        "real, there = os.access, os.path.exists\n"
        "os.path.exists = lambda path: path != '/dev/kvm' and there(path)\n"
        "sys.argv[0] = 'kvmsentry'\n"
        "from kvmsentry.cli.main import main\n"
        "main()\n"
    )
    done = run([sys.executable, "-c", code, "run", busybox_tar, "echo", "hi"])
    assert (done.returncode, done.stdout) == (0, "hi\n"), done.stderr
    assert "/dev/kvm is not there" in done.stderr and "ptrace" in done.stderr
    refused = run([sys.executable, "-c", code, "run", "--platform=kvm", busybox_tar, "echo", "hi"])
    assert refused.returncode == 125 and "/dev/kvm is not there" in refused.stderr and not refused.stdout


def test_auto_falls_back_when_kvm_refuses_later(busybox_tar: str) -> None:
    """The device is there, but the machine cannot be made."""
    code = (
        "import sys\n"
        "sys.argv[0] = 'kvmsentry'\n"
        "import os\n"
        "os.path.exists = (lambda real: lambda path: path == '/dev/kvm' or real(path))(os.path.exists)\n"
        "os.access = (lambda real: lambda path, *a: path == '/dev/kvm' or real(path, *a))(os.access)\n"
        "import kvmsentry.vcpu.machine as machine\n"
        "from kvmsentry.errors import HostError\n"
        "def refuse():\n"
        "    raise HostError('KVM_CREATE_VM', 16)\n"
        "machine.Machine = refuse\n"
        "from kvmsentry.cli.main import main\n"
        "main()\n"
    )
    done = run([sys.executable, "-c", code, "run", busybox_tar, "echo", "hi"])
    assert (done.returncode, done.stdout) == (0, "hi\n"), done.stderr
    assert "KVM_CREATE_VM" in done.stderr and "ptrace" in done.stderr
    refused = run([sys.executable, "-c", code, "run", "--platform=kvm", busybox_tar, "echo", "hi"])
    assert refused.returncode == 125 and "KVM_CREATE_VM" in refused.stderr and not refused.stdout


def test_nothing_is_left_behind(busybox_tar: str) -> None:
    """A sandbox that is killed takes its stubs with it."""
    before = stubs()
    sandbox = subprocess.Popen(
        [*COMMAND, "run", "--platform=ptrace", busybox_tar, "sh", "-c", "sleep 100 & echo up; wait"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sandbox.stdout is not None and sandbox.stdout.readline() == "up\n"
    assert stubs() - before
    sandbox.kill()
    sandbox.wait()
    sandbox.stdout.close()
    for _ in range(100):
        if not stubs() - before:
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert not stubs() - before


def stubs() -> set[int]:
    """Host processes that have the stub's pages and nothing of Python."""
    found = set()
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                maps = (entry / "maps").read_text()
            except OSError:
                continue
            if "memfd:kvmsentry" in maps and "python" not in maps:
                found.add(int(entry.name))
    return found
