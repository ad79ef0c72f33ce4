"""A tracer for each test; skips loudly where the host forbids ptrace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ptrace_bench import Bench

from kvmsentry.errors import HostError
from kvmsentry.ptrace.tracer import Tracer


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    tracer = Tracer()
    try:
        tracer._start()
    except HostError as error:
        tracer.close()
        pytest.skip(f"NO PTRACE: nothing of this platform is tested ({error})")
    yield tracer
    tracer.close()


@pytest.fixture
def bench(tracer: Tracer) -> Bench:
    return Bench(tracer)
