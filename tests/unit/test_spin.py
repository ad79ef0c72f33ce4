"""The policy of spinning and sleeping (kvmsentry/vcpu/spin.c), driven with numbers: ticks are microseconds here."""

from __future__ import annotations

import ctypes
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAKE_OTHER, WAKE_SAME = 17, 35  # what it costs to wake the Sentry on another processor, and on the guest's own


class Spin(ctypes.Structure):
    """struct ks_spin."""

    _fields_ = [
        ("us", ctypes.c_uint64),
        ("gap", ctypes.c_uint64),
        ("cost", ctypes.c_uint64 * 2),
        *((name, ctypes.c_uint32) for name in ("way", "waits", "trial_gap", "trial_left", "trial_done")),
        ("trial_sum", ctypes.c_uint64),
    ]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("spin") / "spin.so"
    source = ROOT / "kvmsentry" / "vcpu" / "spin.c"
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", target, source], check=True)
    library = ctypes.CDLL(str(target))
    library.ks_spin_limit.restype = ctypes.c_uint64
    return library


class World:
    """Waits in a row; `gap()` is what the application computes between two requests."""

    def __init__(self, policy: ctypes.CDLL) -> None:
        self.policy, self.state = policy, Spin()
        policy.ks_spin_init(ctypes.byref(self.state), ctypes.c_uint64(1))

    def run(
        self, waits: int, gap: Callable[[], float], shared: bool, guests: int = 1, processors: int = 2
    ) -> tuple[float, float]:
        """(mean wait, share of the waits that spun). `shared`: guest and Sentry have one processor, so that the guest
        runs only while the Sentry sleeps."""
        total = spun = 0.0
        for _ in range(waits):
            limit = self.policy.ks_spin_limit(ctypes.byref(self.state), guests, processors)
            work = gap()
            wake = WAKE_SAME if shared else WAKE_OTHER
            if shared:
                wait = limit + work + wake
            elif work <= limit:
                wait = work
            else:
                wait = max(work, limit) + wake
            spun += limit > 0
            total += wait
            self.policy.ks_spin_learn(ctypes.byref(self.state), ctypes.c_uint64(int(wait)))
        return total / waits, spun / waits


def test_with_a_processor_each_it_spins(policy: ctypes.CDLL) -> None:
    mean, spun = World(policy).run(10_000, lambda: 2, shared=False)
    assert spun == 1 and mean < 3


def test_rare_long_gaps_do_not_end_the_spinning(policy: ctypes.CDLL) -> None:
    chance = random.Random(1)
    _mean, spun = World(policy).run(20_000, lambda: 5000 if chance.random() < 0.01 else 2, shared=False)
    assert spun > 0.98


def test_on_one_processor_it_sleeps(policy: ctypes.CDLL) -> None:
    world = World(policy)
    world.run(200, lambda: 2, shared=True)
    mean, spun = world.run(20_000, lambda: 2, shared=True)
    assert spun < 0.02 and mean < WAKE_SAME * 1.1


def test_it_spins_again_soon_after_the_neighbour_has_gone(policy: ctypes.CDLL) -> None:
    world = World(policy)
    for _ in range(3):
        world.run(20_000, lambda: 2, shared=True)
        world.run(2100, lambda: 2, shared=False)
        _mean, spun = world.run(1000, lambda: 2, shared=False)
        assert spun == 1


def test_a_computing_guest_is_not_kept_off_a_busy_host(policy: ctypes.CDLL) -> None:
    _mean, spun = World(policy).run(2000, lambda: 500, shared=False, guests=2)
    assert spun == 0, "requests so far apart are not waited for while guests could use the processor"


def test_nobody_to_wait_for(policy: ctypes.CDLL) -> None:
    world = World(policy)
    assert world.policy.ks_spin_limit(ctypes.byref(world.state), 0, 2, ctypes.byref(ctypes.c_int())) == 0
