"""The most memory that this process has held, and what the machine has left."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

MEMINFO, OWN_GROUPS, CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class GroupVersion(NamedTuple):
    """Where one of the two versions of Linux's control groups tells of memory."""

    controller: str  # in /proc/self/cgroup; the second version names none
    folder: str  # below /sys/fs/cgroup
    limit: str
    usage: str
    prefix: str  # in memory.stat, of numbers that include the groups within


GROUP_VERSIONS = (
    GroupVersion("", "", "memory.max", "memory.current", ""),
    GroupVersion("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def reset_peak_memory() -> None:
    """Begins to measure anew, where the system can: Linux, and GPUs."""
    with suppress(OSError):
        RESET.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gb() -> float:
    """10^9 bytes: resident ones on a CPU; on a GPU those that torch has allocated there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    with suppress(OSError, StopIteration):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    kilobytes = 1 if sys.platform == "darwin" else 1024  # macOS tells bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes / 1e9


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within what control groups allow; None where the system does not tell.

    Groups are those of this process and all that these are in: containers and services are limited by them.
    """
    counts = [*_left_on_the_machine(), *_left_in_groups()]
    return max(0, min(counts)) if counts else None


def _left_on_the_machine() -> Iterator[int]:
    with suppress(OSError, StopIteration):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        yield int(line.split()[1]) * 1024


def _left_in_groups() -> Iterator[int]:
    for version, path in _own_groups():
        for group in (path, *path.parents):
            folder = CGROUP / version.folder / group
            with suppress(OSError, ValueError):  # none in this place, or "max", which is no limit
                limit, used = (int((folder / name).read_text()) for name in (version.limit, version.usage))
                yield limit - used + _reclaimable(folder, version)


def _own_groups() -> Iterator[tuple[GroupVersion, Path]]:
    """This process's group in each hierarchy, relative to its root; in a container that may be a path outside of it."""
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for version in GROUP_VERSIONS:
                if version.controller in controllers.split(","):
                    yield version, Path(path.lstrip("/"))


def _reclaimable(folder: Path, version: GroupVersion) -> int:
    """Bytes of cached files, which count as used: reading a model fills a group with them up to its limit."""
    names = {f"{version.prefix}{kind}_file" for kind in ("active", "inactive")}
    with suppress(OSError):
        fields = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(value) for name, value in fields if name in names)
    return 0
