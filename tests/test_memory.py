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


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a system: `meminfo`, `own`, which is /proc/self/cgroup, and `groups`; all missing."""
    for name, file in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "own"), ("CGROUP", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / file)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def test_what_is_available_is_what_the_system_says_or_nothing_is_known(machine: Path) -> None:
    assert available_memory() is None
    write(machine, {"meminfo": "MemTotal:  4000 kB\nMemAvailable:  3000 kB"})
    assert available_memory() == 3000 * 1024
    write(machine, {"own": "0::/"})
    assert available_memory() == 3000 * 1024


def test_the_second_version_of_groups_limits_along_the_path(machine: Path) -> None:
    write(machine, {"meminfo": "MemAvailable:  3000 kB", "own": "0::/system.slice/tenfold.service"})
    root = machine / "groups"
    service = root / "system.slice" / "tenfold.service"
    write(service, {"memory.max": "max", "memory.current": "1000"})
    assert available_memory() == 3000 * 1024
    write(service, {"memory.max": "5000"})
    assert available_memory() == 4000
    write(service, {"memory.stat": "anon 300\nfile 700\ninactive_file 500\nactive_file 100\nshmem 100"})
    assert available_memory() == 4600
    write(service.parent, {"memory.max": "2500", "memory.current": "2000"})  # of all services together
    assert available_memory() == 500
    write(root, {"memory.max": "1500", "memory.current": "2000"})  # as a container sees its own
    assert available_memory() == 0


def test_the_first_version_of_groups_limits_too(machine: Path) -> None:
    own = "5:cpu,cpuacct:/\n4:memory:/docker/1f\n1:name=systemd:/docker/1f\n0::/"
    write(machine, {"meminfo": "MemAvailable:  3000 kB", "own": own})
    root = machine / "groups" / "memory"  # a container's own; its path is one of the host's, and not there
    write(root, {"memory.limit_in_bytes": str((1 << 63) - 4096), "memory.usage_in_bytes": "1000"})
    assert available_memory() == 3000 * 1024
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 200\ntotal_active_file 50"
    write(root, {"memory.limit_in_bytes": "9000", "memory.stat": stat})
    assert available_memory() == 8250
    write(root / "docker" / "1f", {"memory.limit_in_bytes": "700", "memory.usage_in_bytes": "600"})
    assert available_memory() == 100


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_this_machine_has_some_left() -> None:
    available = available_memory()
    assert available and 1e6 < available < 1e15
