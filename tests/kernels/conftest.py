"""Every table of kernels that this machine can run, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tenfold.kernels import cpu


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What a test sets holds for that test alone."""
    if not cpu.available():
        yield
        return
    before, threads = cpu.isa(), cpu.threads()
    yield
    cpu.use_isa(before)
    cpu.set_threads(threads)


@pytest.fixture(params=cpu.isas() if cpu.available() else [])
def isa(request: pytest.FixtureRequest, restored: None) -> str:
    """An instruction set, in use."""
    cpu.use_isa(request.param)
    return request.param
