"""What image tests share: the factory of the unit tests, and a Debian image that is also run natively."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "unit"))
sys.path.insert(0, str(HERE.parents[1] / "hack"))

import debian_image  # noqa: E402


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Debian image with real programs in it; made once, which takes minutes. KVMSENTRY_DEBIAN names a ready one."""
    path = tmp_path_factory.mktemp("images") / "debian.tar"
    try:
        yield debian_image.make(path)
    except debian_image.NoImage as why:
        pytest.skip(f"NOT TESTED: {why}")
    path.unlink(missing_ok=True)  # pytest keeps directories of earlier runs


@pytest.fixture(scope="session")
def rootfs(debian: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The image's files, for the native side; each run sees them through an overlay of its own."""
    if os.geteuid() != 0:
        pytest.skip("the native side needs chroot(2)")
    target = tmp_path_factory.mktemp("debian")
    debian_image.unpack(debian, target)
    yield target
    subprocess.run(["rm", "-rf", target])  # quicker than shutil


@pytest.fixture
def beside(debian: str, rootfs: pathlib.Path, kvmsentry: list[str], tmp_path: pathlib.Path) -> debian_image.Beside:
    """Runs a command natively and inside; both must end the same and say the same. Returns what they said."""

    def run(*argv: str, timeout: int = 120) -> str:
        def outcome(prefix: list[str], **how: object) -> tuple[int, str, str]:
            done = subprocess.run(
                [*prefix, *argv],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                **how,
            )  # type: ignore[call-overload]
            return done.returncode, done.stdout, done.stderr

        native = outcome(debian_image.natively(rootfs, tmp_path), env=debian_image.ENVIRONMENT)
        inside = outcome(debian_image.inside(kvmsentry, debian))
        assert inside[:2] == native[:2], f"natively: {native[2]}\ninside: {inside[2]}"
        return native[1]

    return run
