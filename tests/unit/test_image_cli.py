"""The command line: words to a SandboxSpec, faults to one line and a status. The launcher is a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from image_factory import config, docker_archive, folder, item, layer

import kvmsentry.sandbox
from kvmsentry.cli import options
from kvmsentry.cli.main import call
from kvmsentry.errors import HostError, UserError
from kvmsentry.sandbox.spec import Publish, SandboxSpec

PASSWD = b"root:x:0:0::/root:\nweb:x:33:44::/var/www:\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[SandboxSpec]:
    monkeypatch.setenv("KVMSENTRY_STORE", str(tmp_path / "store"))
    specs: list[SandboxSpec] = []

    def run(spec: SandboxSpec) -> int:
        specs.append(spec)
        return 42

    stand_in = types.ModuleType("kvmsentry.sandbox.launch")
    stand_in.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvmsentry.sandbox.launch", stand_in)
    monkeypatch.setattr(kvmsentry.sandbox, "launch", stand_in, raising=False)
    return specs


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., str]:
    def make(**inner: object) -> str:
        layers = [layer(folder("etc"), item("etc/passwd", PASSWD))]
        path = docker_archive(tmp_path / "my_image.tar", layers, document=config(layers, inner))
        return str(path)

    return make


def environment(spec: SandboxSpec) -> dict[str, str]:
    return dict(setting.decode().split("=", 1) for setting in spec.env)


def test_image_settings(started: list[SandboxSpec], image: Callable[..., str]) -> None:
    path = image(Entrypoint=["/init"], Cmd=["a", "b"], Env=["A=1", "PATH=/bin"], WorkingDir="/w", User="web")
    assert call(["run", path]) == 42
    spec = started[0]
    assert (spec.argv, spec.cwd) == ([b"/init", b"a", b"b"], b"/w")
    assert (spec.uid, spec.gid, spec.groups) == (33, 44, [])
    assert environment(spec) == {"A": "1", "PATH": "/bin", "HOSTNAME": "my-image", "HOME": "/var/www"}
    assert (spec.hostname, spec.name, spec.overlay, spec.readonly_root) == ("my-image", "my_image", True, False)
    assert (spec.tty, spec.interactive, spec.platform, spec.network, spec.strace_fd) == (
        False,
        False,
        "auto",
        "none",
        -1,
    )
    assert os.path.isfile(os.path.join(spec.rootfs, "etc/passwd"))


def test_options_override_the_image(
    started: list[SandboxSpec], image: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSED", "through")
    monkeypatch.delenv("ABSENT", raising=False)
    env_file = tmp_path / "env"
    env_file.write_text("# comment\n\nB=from file\nC=c\nPASSED\n")
    words = [
        "run", "-i", "-e", "B=2", "-e", "ABSENT", "-e", "EMPTY=", "--env-file", str(env_file), "-w", "/x", "-u", "5:6",
        "-v", f"{tmp_path}:/data:ro", "--entrypoint", "sh -c", "--hostname", "box", "--memory", "2g",
        "--read-only", "--platform", "kvm", "--network", "host", "-p", "8080:80",
        image(Entrypoint=["/init"], Cmd=["a"]),
        "echo", "-e", "--help",
    ]  # fmt: skip
    assert call(words) == 42
    spec = started[0]
    assert spec.argv == [b"sh", b"-c", b"echo", b"-e", b"--help"]
    found = environment(spec)
    assert (found["B"], found["C"], found["PASSED"], found["EMPTY"]) == (
        "2",
        "c",
        "through",
        "",
    ) and "ABSENT" not in found
    assert (spec.cwd, spec.uid, spec.gid, spec.hostname, spec.memory_limit) == (b"/x", 5, 6, "box", 2 << 30)
    volume = spec.volumes[0]
    assert (volume.host, volume.guest, volume.readonly) == (str(tmp_path), "/data", True)
    assert spec.readonly_root and spec.interactive and spec.platform == "kvm" and spec.network == "host"
    assert spec.publish == [Publish("", 8080, 80)]


def test_new_entrypoint_drops_the_images_command(started: list[SandboxSpec], image: Callable[..., str]) -> None:
    call(["run", "--entrypoint", "id", image(Entrypoint=["/init"], Cmd=["a"])])
    assert started[0].argv == [b"id"]


def test_do_takes_the_host_as_it_is(
    started: list[SandboxSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEPT", "1")
    assert call(["do", "--strace", "ls", "-l", "--color"]) == 42
    spec = started[0]
    assert (spec.argv, spec.rootfs, spec.overlay) == ([b"ls", b"-l", b"--color"], "/", True)
    assert spec.cwd == os.fsencode(tmp_path) and environment(spec)["KEPT"] == "1" and spec.strace_fd > 2
    assert (spec.uid, spec.gid) == (os.getuid(), os.getgid())
    os.close(spec.strace_fd)


def test_nothing_of_an_image_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = docker_archive(tmp_path / "a.tar", [], tags=("evil\x1b[2J:1",))
    assert call(["run", "--image-ref", "other", str(path)]) == 125
    assert "evil\\x1b[2J:1" in capsys.readouterr().err


def test_debug_log_takes_the_strace(started: list[SandboxSpec], tmp_path: Path) -> None:
    call(["do", "--strace", "--debug-log", str(tmp_path / "log"), "true"])
    assert started[0].strace_fd == started[0].log_fd > 2
    os.close(started[0].log_fd)


@pytest.mark.parametrize(
    "words",
    [
        ["run"], ["run", "/nowhere.tar"], ["run", "--bogus", "IMAGE"], ["nonsense"], ["run", "-m", "12x", "IMAGE"],
        ["run", "-m", "1", "IMAGE"], ["run", "-v", "/tmp", "IMAGE"], ["run", "-v", "/nowhere:/x", "IMAGE"],
        ["run", "-v", "/tmp:x", "IMAGE"], ["run", "-v", "/tmp:/", "IMAGE"], ["run", "-v", "/tmp:/x:rx", "IMAGE"],
        ["run", "-e", "=x", "IMAGE"], ["run", "--env-file", "/nowhere", "IMAGE"], ["run", "-u", "ghost", "IMAGE"],
        ["run", "-w", "relative", "IMAGE"],
        ["run", "--network", "token-ring", "IMAGE"], ["run", "-p", "80:99999", "IMAGE"],
        ["run", "--network", "host", "-p", "0:80", "IMAGE"], ["run", "--platform", "xen", "IMAGE"],
        ["run", "--hostname", "a b", "IMAGE"], ["run", "--entrypoint", "'", "IMAGE"],
        ["run", "--image-ref", "x", "IMAGE"], ["run", "-i", "-t", "IMAGE"],
        ["run", "--debug-log", "/nowhere/log", "IMAGE"], ["run", "--entrypoint", "", "IMAGE"],
        ["do"], ["images", "rm", "ghost"], ["images", "nonsense"], ["help", "nonsense"],
    ],
    ids=lambda words: " ".join(words),
)  # fmt: skip
def test_faults_are_one_line(
    words: list[str], started: list[SandboxSpec], image: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = image(Cmd=["a"])
    assert call([path if word == "IMAGE" else word for word in words]) == 125
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("kvmsentry: ") and captured.err.count("\n") == 1
    assert started == []


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("x: not found", 127), 127, "x: not found"),
        (HostError("open /dev/kvm", 13, "join the group"), 125, "open /dev/kvm: Permission denied (join the group)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_launcher_raises(
    error: BaseException, status: int, line: str, started: list[SandboxSpec],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(spec: SandboxSpec) -> int:
        raise error

    monkeypatch.setattr(sys.modules["kvmsentry.sandbox.launch"], "run", run)
    assert call(["do", "true"]) == status
    assert capsys.readouterr().err.lstrip("\n") == f"kvmsentry: {line}\n"  # click ends the line of the ^C


@pytest.mark.parametrize(
    "text, size", [("512m", 512 << 20), ("2g", 2 << 30), ("16777216", 16 << 20), ("1GiB", 1 << 30), ("64Mb", 64 << 20)]
)
def test_memory_size(text: str, size: int) -> None:
    assert options.memory_size(text) == size


@pytest.mark.parametrize("text", ["", "m", "-1g", "1.5g", "1gg", "1e9", "٣g", "999999t", "1bb", "5ib"])
def test_memory_nonsense(text: str) -> None:
    with pytest.raises(UserError):
        options.memory_size(text)


def test_publish() -> None:
    assert options.publish("127.0.0.1:8080:80/udp") == Publish("127.0.0.1", 8080, 80, "udp")
    assert options.publish("[::1]:8080:80") == Publish("::1", 8080, 80)
    assert options.publish("80") == Publish("", 80, 80)
    for text in ("", "a:b", "1:2:3:4", "[::1:80", "80/icmp", "65536", ":80"):
        with pytest.raises(UserError):
            options.publish(text)


def test_images_command(
    image: Callable[..., str], started: list[SandboxSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    call(["run", image(Cmd=["a"])])
    assert call(["images"]) == 0
    assert "test:latest" in capsys.readouterr().out
    os_holds = [fd for fd in os.listdir("/proc/self/fd") if "rootfs" in _target(fd)]
    for fd in os_holds:
        os.close(int(fd))
    assert call(["images", "rm", "test"]) == 0 and call(["images", "list"]) == 0
    assert "test:latest" not in capsys.readouterr().out


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from kvmsentry.cli import doctor

    monkeypatch.setattr(doctor, "DEVICE", "/dev/no-such-kvm")
    assert call(["doctor"]) == 1
    assert "NOT usable: /dev/no-such-kvm is missing (" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "device_fault", lambda: "")
    monkeypatch.setattr(doctor, "measured_traits", lambda: {"paging": "shadow", "fsgsbase": True, "new_one": 7})
    assert call(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "FSGSBASE                  yes" in out and "could be better" in out and "new one" in out


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["do", "--help"], ["images", "-h"], ["doctor", "-h"],
                                   ["help"], ["help", "run"], ["--version"]])  # fmt: skip
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(words) == 0
    assert len(capsys.readouterr().out) > 15


def test_module_entry_and_light_start() -> None:
    code = "import sys, kvmsentry.cli.main, kvmsentry.cli.run; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {
        "construct",
        "capstone",
        "psutil",
        "zstandard",
        "tarfile",
        "hashlib",
        "kvmsentry.image",
        "kvmsentry.kernel",
    }
    assert heavy & set(modules) == set()
    result = subprocess.run([sys.executable, "-m", "kvmsentry", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and "kvmsentry" in result.stdout


def test_a_closed_pipe_is_no_traceback() -> None:
    result = subprocess.run(
        f"{sys.executable} -m kvmsentry help run | true", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in result.stderr
