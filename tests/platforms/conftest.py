"""Every test here runs on each platform of this host; select one with -k kvm or -k ptrace."""

from __future__ import annotations

from collections.abc import Iterator

import platform_bench
import pytest


@pytest.fixture(params=list(platform_bench.MAKERS))
def bench(request: pytest.FixtureRequest) -> Iterator[platform_bench.Bench]:
    yield from platform_bench.MAKERS[request.param]()
