"""A KVM machine for each test; skips loudly where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import platform_bench
import pytest


@pytest.fixture
def bench() -> Iterator[platform_bench.KvmBench]:
    yield from platform_bench.kvm()
