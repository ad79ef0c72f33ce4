"""A few vCPU tests and an image on real hardware KVM, in an emulated machine: what hack/nested-kvm --quick does."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.nested
@pytest.mark.timeout(400)  # the machine's own limits end it before: two boots of 60 s, 160 s for the command
@pytest.mark.parametrize("npt", [1, 0], ids=["nested paging", "shadow paging"])
def test_kvm_amd(npt: int, exercised: Callable[[str], None]) -> None:
    argv = [ROOT / "hack/nested-kvm", "--quick"]
    environment = {**os.environ, "NPT": str(npt)}
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment, timeout=390
    )
    if done.returncode == 3:
        why = done.stderr.strip().splitlines()[-1].partition("NOTHING WAS TESTED: ")[2]
        exercised(f"nested kvm_amd npt={npt}: NOT EXERCISED: {why}")
        pytest.skip(why)
    said = re.search(r"^\d+ passed.*$", done.stdout, re.MULTILINE)
    what = f"{said[0]}; a busybox image" if done.returncode == 0 and said else "FAILED"
    exercised(f"nested kvm_amd npt={npt} (QEMU's TCG): {what}")
    assert done.returncode == 0 and said, done.stdout + done.stderr
