"""Servers, databases, language runtimes and compilers in a Debian image: each script of tests/images/programs runs
natively and inside, and says the same. hack/programs has them print figures, for docs/programs.md.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader

import debian_image
import pytest
from debian_image import INSIDE_SCRIPTS, SCRIPTS, Beside

pytestmark = pytest.mark.timeout(900)

# hack/conformance runs suites over the host's root. Its judge says here what the image's own python3 passes.
_loader = SourceFileLoader("conformance", str(debian_image.ROOT / "hack" / "conformance"))
_spec = spec_from_loader("conformance", _loader)
assert _spec is not None
conformance = module_from_spec(_spec)
_loader.exec_module(conformance)


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.sh")))
def test_same_as_native(name: str, beside: Beside) -> None:
    assert beside("bash", f"{INSIDE_SCRIPTS}/{name}.sh", timeout=150)


# ------------------------------------------------------------------------------------------- Python's own test modules

QUICK = """
    test_fcntl test_mmap test_posix test_pty test_select test_selectors test_shutil test_tempfile test_threading
    test_time
""".split()
LONG = "test_asyncio test_multiprocessing_fork test_os test_signal test_socket test_subprocess test_zipfile".split()


@pytest.mark.parametrize("module", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_of_python(
    module: str, debian: str, rootfs: pathlib.Path, kvmsentry: list[str], tmp_path: pathlib.Path
) -> None:
    """Every case of the module that passes natively passes inside."""
    # Some cases make as many descriptors as they may: the same number on both sides.
    limited = ["sh", "-c", 'ulimit -n 4096 && exec "$@"', "sh"]
    command = ["env", "LANG=C.UTF-8", *limited, *conformance.cpython_command(module)]

    def cases(prefix: list[str], env: dict[str, str] | None = None) -> tuple[dict[str, str], str]:
        done = subprocess.run(
            [*prefix, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=400, env=env,
        )  # fmt: skip
        return conformance.junit(done.returncode, done.stdout), done.stdout

    natively, said = cases(debian_image.natively(rootfs, tmp_path), debian_image.ENVIRONMENT)
    passed = [case for case, verdict in natively.items() if verdict == "pass"]
    assert passed, f"nothing of {module} passes natively, so it can't judge us:\n{said[-3000:]}"
    inside, said = cases(debian_image.inside(kvmsentry, debian))
    lost = [case for case in passed if conformance.verdict_of(inside, case) != "pass"]
    assert not lost, said


# ------------------------------------------------------------------------------------------------ clients from outside


@pytest.fixture
def published(debian: str, kvmsentry: list[str]) -> Iterator[int]:
    """nginx in a sandbox; the host's port that leads to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prefix = debian_image.inside(kvmsentry, debian, "-p", f"127.0.0.1:{port}:80")
    with subprocess.Popen([*prefix, "nginx", "-c", f"{INSIDE_SCRIPTS}/nginx-published.conf"]) as server:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as client:
                client.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
                if client.recv(100).startswith(b"HTTP/1.1 200"):
                    break
            time.sleep(0.1)
        else:
            pytest.fail("nginx does not answer")
        yield port
        server.terminate()
        assert server.wait(30) in (0, 143)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("client", ["ab", "ab -k", "wrk"])
def test_published(client: str, seconds: int, published: int, rootfs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Twenty clients of the host's ask for as long as that; no request fails."""
    url = f"http://127.0.0.1:{published}/"
    command = f"wrk -c 20 -t 2 -d {seconds} {url}"
    if client != "wrk":
        command = f"{client} -q -n 100000000 -t {seconds} -c 20 {url}"
    done = subprocess.run(
        [*debian_image.natively(rootfs, tmp_path, "host"), *command.split()],
        env=debian_image.ENVIRONMENT, capture_output=True, text=True, timeout=seconds + 60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if client == "wrk":  # a line "Socket errors" or "Non-2xx" is there when it has anything to say
        counted = re.search(r"^ +(\d+) requests in", done.stdout, re.MULTILINE)
        assert "errors" not in done.stdout and "Non-2xx" not in done.stdout, done.stdout
    else:
        counted = re.search(r"^Complete requests: +(\d+)$", done.stdout, re.MULTILINE)
        assert re.search(r"^Failed requests: +0$", done.stdout, re.MULTILINE), done.stdout
        assert "Non-2xx" not in done.stdout and "Write errors" not in done.stdout, done.stdout
    assert counted and int(counted[1]) > 20, done.stdout


# ---------------------------------------------------------------------------------------------------------- stress-ng

# What has no device, protocol or setting to work on here, and says so by ending as if a resource were short.
ABSENT = "binderfs efivar loop netlink-proc netlink-task rawpkt tmpfs uprobe".split()
# handle wants file handles of an overlay, which has none. vm-segv has to see a child die within the time, and gets
# no turn at a processor beside sixty others. loadavg makes all the threads that there may be.
STARVED = "handle loadavg vm-segv".split()
# fallocate's handler jumps back into its function at every SIGALRM, also when that has returned: a second one that
# comes before the process has ended kills it, natively too. Later versions of stress-ng have no such handler.
ILL = ["fallocate"]
CLASSES = "cpu filesystem memory network os pipe scheduler".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_stress(name: str, debian: str, kvmsentry: list[str], tmp_path: pathlib.Path) -> None:
    """All stressors of a class of stress-ng at once, for 20 seconds. None fails, and the sandbox outlives them all."""
    log = tmp_path / "log"
    prefix = debian_image.inside(kvmsentry, debian, "--memory", "6g", "--debug-log", str(log))
    options = f"--class {name} --all 1 -t 20 --iomix-bytes 64m --temp-path /tmp -x {','.join(ABSENT + STARVED + ILL)}"
    done = subprocess.run(
        [*prefix, "stress-ng", *options.split()],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        timeout=300,
    )  # fmt: skip
    said = done.stdout + log.read_text(errors="replace")
    assert "Traceback" not in said and "BrokenInvariant" not in said, said
    assert "stress-ng: fail:" not in said and "terminated" not in said, said
    assert done.returncode in (0, 3), said  # 3: a stressor had not the memory that it wanted, stress-ng(1)
