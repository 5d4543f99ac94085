"""What all tests share: one thread, poisoned memory, reproducible examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("tenfold", deadline=None, derandomize=True)
settings.load_profile("tenfold")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run beside each other; and a sum over threads is another sum on another machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> None:
    """`torch.empty` and its kin give NaN, or the largest integer: a read before the first write shows.

    Deterministic algorithms bring this with them (`torch.utils.deterministic.fill_uninitialized_memory`).
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
