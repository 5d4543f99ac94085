"""What peak memory promises: it sees what was held, even if only for a moment, and forgets what was before."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tenfold import memory
from tenfold.memory import available_memory, peak_memory_gb, reset_peak_memory

BYTES = 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin anew")
def test_a_moment_is_remembered_until_the_next_beginning() -> None:
    reset_peak_memory()
    before = peak_memory_gb()
    np.ones(BYTES, np.uint8)  # held no longer than this line
    peak = peak_memory_gb()
    assert before + 0.9 * BYTES / 1e9 < peak < before + 1.5 * BYTES / 1e9
    reset_peak_memory()
    assert peak_memory_gb() < peak - 0.9 * BYTES / 1e9


def test_where_there_is_no_status_file_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", memory.Path("/dev/null/nowhere"))
    monkeypatch.setattr(memory, "RESET", memory.Path("/dev/null/nowhere"))
    reset_peak_memory()
    assert 0.05 < peak_memory_gb() < 1000


def test_what_is_available_is_the_least_that_the_system_and_the_container_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert available_memory() is None
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:  3000 kB\n")
    assert available_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory() == 4000
    (tmp_path / "memory.max").write_text("500\n")
    assert available_memory() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_this_machine_has_some_left() -> None:
    available = available_memory()
    assert available and 1e6 < available < 1e15
