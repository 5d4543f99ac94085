"""What the benchmarks share: cases that take turns, medians with their spread, the machine's limits, tables.

A case is checked before it is timed (`check`). Turns alternate, A B A B, and in reversed order every other round, so
that a neighbour's load falls on all cases; what is compared is compared turn by turn (`ratio`), since a machine's speed
drifts by more than what is worth telling apart.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tenfold import __version__
from tenfold.engine.bench import spread
from tenfold.kernels import cpu
from tenfold.ops.precision import matmul_gflops
from tenfold.study.twins import machine_name

SECONDS_A_TURN = 0.05  # short cases are repeated, so that the clock and the first call do not count
PROBES = 5  # of memory, of which the best counts
WIDEST = 200  # characters of a line


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to be timed, and what it has to do at the least."""

    group: str  # the cases of a group do the same work, and are compared with its first
    name: str
    run: Callable[[int], object]  # takes a number that grows with every call of a turn, and from turn to turn
    operations: float = 0.0
    nbytes: float = 0.0  # read and written
    isa: str | None = None  # of the native kernels, where it matters
    seconds: list[float] = field(default_factory=list)  # of a call, one for each turn

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of two things that were measured in turns."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Turn by turn. Raises ValueError where the turns are not as many, or none."""
    values = [a / b for a, b in zip(numerators, denominators, strict=True)]
    if not values:
        raise ValueError("no turns to compare")
    return Ratio(median=statistics.median(values), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the machine reached in the same run: reading memory, and torch's fp32 product."""

    read_gb_s: float
    product_gflops: float

    @classmethod
    def measure(cls, threads: int) -> Limits:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        matmul_gflops.cache_clear()
        product = matmul_gflops(torch.float32)
        torch.set_num_threads(before)
        return cls(read_gb_s=max(cpu.memory_read_gb_s() for _ in range(PROBES)), product_gflops=product)

    def at_best(self, other: Limits) -> Limits:
        """Of two measurements, before and after, the better one: neighbours only ever lower them."""
        read, product = max(self.read_gb_s, other.read_gb_s), max(self.product_gflops, other.product_gflops)
        return Limits(read_gb_s=read, product_gflops=product)

    def __str__(self) -> str:
        return f"limits: memory read {self.read_gb_s:.1f} GB/s, torch's fp32 product {self.product_gflops:.0f} GFLOP/s"


def check(name: str, y: Tensor, expected: Tensor, largest: float) -> None:
    """Ends the benchmark where the relative difference is too large: figures of wrong results mean nothing."""
    error = ((y - expected).norm() / expected.norm()).item()
    if not error < largest:
        sys.exit(f"{name}: relative difference {error:.3g}, {largest:g} allowed")


def clock(threads: int) -> Callable[[], float]:
    """The thread's own time where there is one thread, which leaves neighbours out; else the wall's."""
    return time.thread_time if threads == 1 else time.perf_counter


def take_turns(
    cases: Sequence[Case], rounds: int, now: Callable[[], float] = time.perf_counter, calls: int | None = None
) -> None:
    """Times all cases, after one call of each to warm up; calls of a turn: without it as many as fill it."""
    warm = [_turn(case, 0, 1, now) for case in cases]
    counts = [calls or max(1, int(SECONDS_A_TURN / max(seconds, 1e-9))) for seconds in warm]
    order = list(zip(cases, counts, strict=True))
    for i in range(1, rounds + 1):
        for case, count in order if i % 2 else reversed(order):
            case.seconds.append(_turn(case, i, count, now))


def _turn(case: Case, number: int, calls: int, now: Callable[[], float]) -> float:
    if case.isa:
        cpu.use_isa(case.isa)
    start = now()
    for i in range(calls):
        case.run(number + i)
    return (now() - start) / calls


def machine_lines(threads: int) -> str:
    """Versions, processor, instruction sets and threads, for the head of a report."""
    versions = f"tenfold {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}\n{machine_name()}, kernels {cpu.isa()} of {', '.join(cpu.isas())}; {threads} threads"


def duration(seconds: float) -> str:
    """With the unit that suits it."""
    scale, unit = next((x for x in ((1, "s"), (1e3, "ms")) if seconds * x[0] >= 1), (1e6, "us"))
    return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"


def report(cases: Sequence[Case], limits: Limits) -> None:
    """Prints each case's speed, the shares of both limits, and how it compares with the first of its group."""
    print(limits)
    header = ("", "", "median", "spread", "GOP/s", "of product", "GB/s", "of read", "of first")
    groups = groupby(cases, lambda case: case.group)
    print_table(header, [row for _, group in groups for row in _rows(group, limits)])


def _rows(group: Iterator[Case], limits: Limits) -> Iterator[tuple[str, ...]]:
    first = None
    for case in group:
        first = first or case
        speed, rate = case.operations / case.median / 1e9, case.nbytes / case.median / 1e9
        yield (
            case.group,
            case.name,
            duration(case.median),
            f"{spread(case.seconds):.0%}",
            *([f"{speed:.1f}", f"{speed / limits.product_gflops:.2f}"] if speed else ["", ""]),
            *([f"{rate:.1f}", f"{rate / limits.read_gb_s:.2f}"] if rate else ["", ""]),
            "" if case is first else str(ratio(first.seconds, case.seconds)),
        )


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 2) -> None:
    """The first columns hold labels, the rest figures; as wide as it takes, also where no terminal says its width."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < labels else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=WIDEST).print(table)
