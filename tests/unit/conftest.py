"""What several modules of unit tests use."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with a neighbour, `outside`, that must never be reached."""
    inside = tmp_path / "tree"
    inside.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (inside / "file").write_text("hello")
    (inside / "dir").mkdir()
    (inside / "dir" / "deep").mkdir()
    (inside / "dir" / "deep" / "leaf").write_text("leaf")
    os.symlink("dir/deep", inside / "short")
    os.symlink("../outside", inside / "up")
    os.symlink(outside, inside / "absolute")
    os.symlink("/proc/self/root", inside / "magic")
    os.mkfifo(inside / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(inside)  # a socket's path has 108 bytes
        sock.bind("socket")
        os.chdir(here)
    return inside
