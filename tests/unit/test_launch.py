"""Starting a sandbox: what is left when one of its processes does not come up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvmsentry.cli.main import STATUS_OURS

SCRIPT = """
import os, sys
from kvmsentry.gofer import process
def child(trees, namespaces, sock, status, parent):
    os.write(status, b"1 mount of /")
    return 1
process._child = child
from kvmsentry.cli.main import call
status = call(["do", "--platform", sys.argv[1], "true"])
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child is left")
sys.exit(status)
"""


@pytest.mark.parametrize("platform", ["ptrace", "kvm"])
def test_a_gofer_that_cannot_start(platform: str) -> None:
    if platform == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm")
    done = subprocess.run([sys.executable, "-c", SCRIPT, platform], capture_output=True, text=True, timeout=60)
    assert done.returncode == STATUS_OURS, done.stderr
    assert done.stdout == "no child is left\n"
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("kvmsentry: gofer: mount of /"), done.stderr
