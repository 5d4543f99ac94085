"""The most memory that this process has held, and what the machine has left."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
    """Bytes that can be had without swapping, within a container's limit; None where the system does not tell."""
    counts = []
    with suppress(OSError, StopIteration):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        counts.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max" is no limit
        counts.append(int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()))
    return max(0, min(counts)) if counts else None
