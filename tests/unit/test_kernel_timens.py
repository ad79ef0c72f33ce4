"""Time namespaces without a running kernel: what may be written to timens_offsets, and the vDSO's pages."""

from __future__ import annotations

import errno
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from mm_fakes import PAGE, World

from kvmsentry.errors import Errno
from kvmsentry.kernel import timens
from kvmsentry.kernel.task import Credentials
from kvmsentry.kernel.userns import ROOT
from kvmsentry.kernel.vdso import VVAR, Vdso

NS = timens.NS


def a_task(space: timens.TimeNamespace, now: int = 100 * NS) -> Any:
    kernel = SimpleNamespace(now=lambda: now, vdso=None)
    return SimpleNamespace(ns=SimpleNamespace(time_for_children=space), kernel=kernel)


def test_offsets_are_written_and_shown() -> None:
    space = timens.TimeNamespace(ROOT)
    task = a_task(space)
    assert timens.write(task, Credentials(0), b"boottime -7 250\nmonotonic 3 4\nwhatever") == 30
    assert timens.show(task) == "monotonic           3         4\nboottime           -7       250\n"
    assert [space.offsets[clock] for clock in (0, 1, 4, 6, 11)] == [0, *[3 * NS + 4] * 3, 0]
    assert space.offsets[7] == space.offsets[9] == -7 * NS + 250
    assert timens.write(task, Credentials(0), b" 1 0 5 and more\0junk") == 16
    assert space.offsets[1] == 5


@pytest.mark.parametrize(
    "text, number",
    [
        (b"", errno.EINVAL), (b"\n", errno.EINVAL), (b"monotonic 1", errno.EINVAL), (b"monotonic a 1", errno.EINVAL),
        (b"0 1 1", errno.EINVAL), (b"monotonic 1 1000000000", errno.EINVAL), (b"monotonics 1 1", errno.EINVAL),
        (b"monotonic 1 -1", errno.EINVAL), (b"monotonic 1 1\n\nboottime 1 1", errno.EINVAL),
        (b"monotonic -101 0", errno.ERANGE), (b"boottime 9223372037 0", errno.ERANGE),
        (b"monotonic 9223372036854775807 0", errno.ERANGE),
    ],
)  # fmt: skip
def test_offsets_that_are_refused(text: bytes, number: int) -> None:
    space = timens.TimeNamespace(ROOT)
    with pytest.raises(Errno) as caught:
        timens.write(a_task(space), Credentials(0), text)
    assert caught.value.errno == number
    assert not any(space.offsets)


def test_offsets_stand_once_a_task_is_in() -> None:
    space = timens.TimeNamespace(ROOT)
    task = a_task(space)
    with pytest.raises(Errno) as caught:
        timens.write(task, Credentials(1000), b"1 1 0")
    assert caught.value.errno == errno.EPERM
    space.freeze(task.kernel)
    with pytest.raises(Errno) as caught:
        timens.write(task, Credentials(0), b"1 1 0")
    assert caught.value.errno == errno.EACCES


def test_absolute_times() -> None:
    space = timens.TimeNamespace(ROOT, (0, 50, *[0] * 5, -50, 0, -50, 0, 0))
    assert space.to_kernel(1, 70) == 20 and space.to_kernel(1, 20) == 0
    assert space.to_kernel(7, 70) == 120 and space.to_kernel(7, timens.KTIME_MAX) == timens.KTIME_MAX


def test_every_namespace_reads_its_own_page() -> None:
    """A page is filled when the namespace has its first task, kept true, and freed with its last mapping."""
    mm = World().space()
    frames, memory = mm.frames, mm.frames.memory
    ticks = iter(range(1000, 1 << 30, 1000))
    home = timens.first()
    kernel = SimpleNamespace(
        frames=frames, memory=memory, now=lambda: 5 * NS, ns=SimpleNamespace(time=home), monotonic_to_real=lambda: 0
    )
    kernel.vdso = vdso = Vdso(kernel, b"\x7fELF", lambda: next(ticks), 1_000_000)
    space = timens.TimeNamespace(ROOT, (0, 10 * NS, *[0] * 5, 20 * NS, 0, 20 * NS, 0, 0))

    def bases() -> tuple[int, int, int]:
        """(usable, monotonic, since boot) as a program in `mm` reads them."""
        words = struct.unpack("<II" + VVAR.format[1:], mm.read(where, 8 + VVAR.size))
        assert not words[0] & 1
        return words[1], words[5], words[7]

    where = vdso.map(mm, home) - PAGE
    assert bases() == (1, vdso.base, vdso.base)
    used = frames.used_pages
    timens.join(space, mm, kernel)  # type: ignore[arg-type]
    assert bases() == (1, vdso.base + 10 * NS, vdso.base + 20 * NS) and frames.used_pages == used + 1
    vdso.update()
    assert bases() == (1, vdso.base + 10 * NS, vdso.base + 20 * NS)
    timens.join(home, mm, kernel)  # type: ignore[arg-type]
    assert bases() == (1, vdso.base, vdso.base) and frames.used_pages == used
    where = vdso.map(mm, timens.TimeNamespace(ROOT)) - PAGE  # nobody is in yet: its offsets may change
    assert bases() == (0, 0, 0)
    mm.destroy()
