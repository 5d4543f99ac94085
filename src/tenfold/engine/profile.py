"""Where the time of a prefill and of a decode step goes, kernel by kernel, each beside the limit that it has here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tenfold.kernels import cpu
from tenfold.models.native import NativeModel

if TYPE_CHECKING:
    from rich.table import Table

NUMBERS = {"gated delta net": "fp32", "attention fp16": "fp32", "attention int8": "int16"}  # or in the name


@dataclass(frozen=True, kw_only=True)
class KernelShare:
    """One kernel's part of a run. A kernel can be no faster than memory gives it what it reads, nor than the processor
    multiplies; `limit_share` is the longer of the two times over the one it took, None where neither is the point.
    """

    kernel: str
    calls: int
    milliseconds: float
    share: float  # of the time of the whole run
    gb_s: float
    gop_s: float
    limit: str | None  # memory or arithmetic
    limit_share: float | None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A run of some tokens; what is left over is outside the kernels: Python, and what it does with torch."""

    name: str
    milliseconds: float
    kernels: Sequence[KernelShare]

    @property
    def outside(self) -> float:
        """The share of the time that is spent outside the kernels."""
        return 1 - sum(kernel.share for kernel in self.kernels)

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.name}: {self.milliseconds:.2f} ms")
        for column in ("kernel", "calls", "ms", "share", "GB/s", "GOP/s", "of its limit"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for k in self.kernels:
            limit = "" if k.limit_share is None else f"{k.limit_share:.2f} {k.limit}"
            cells = (f"{k.milliseconds:.2f}", f"{k.share:.1%}", f"{k.gb_s:.1f}", f"{k.gop_s:.0f}")
            table.add_row(k.kernel, str(k.calls), *cells, limit)
        table.add_row("outside the kernels", "", f"{self.outside * self.milliseconds:.2f}", f"{self.outside:.1%}")
        return table


class Limits:
    """What this machine allows the kernels, measured when asked for."""

    def __init__(self) -> None:
        self.read_gb_s = cpu.memory_read_gb_s()
        self._gop_s: dict[str, float] = {}

    def gop_s(self, kernel: str) -> float:
        """10^9 operations a second, in the numbers that a kernel multiplies."""
        numbers = NUMBERS.get(kernel) or kernel.rsplit(" ", 1)[-1]
        if numbers not in self._gop_s:
            self._gop_s[numbers] = cpu.multiply_gop_s(numbers)
        return self._gop_s[numbers]

    def of(self, use: cpu.Use) -> tuple[str | None, float | None]:
        """What bounds a kernel, and the share of it that was reached."""
        if not use.bytes:
            return None, None
        memory, arithmetic = use.bytes / self.read_gb_s / 1e9, use.operations / self.gop_s(use.kernel) / 1e9
        name = "memory" if memory > arithmetic else "arithmetic"
        return name, max(memory, arithmetic) / use.seconds


@torch.no_grad()
def profile(model: NativeModel, prompt: Sequence[int], answer: Sequence[int]) -> list[Profile]:
    """Profiles of a prefill and of the mean decode step after it, tokens given as in `bench.measure_round`.

    Noting times takes a little itself: some microseconds a layer.
    """
    limits, cache = Limits(), model.new_cache(len(prompt) + len(answer))

    def decode() -> None:
        for token in answer:
            model.next_logits([token], cache)

    prefill = measure(f"prefill of {len(prompt)} tokens", lambda: model.next_logits(prompt, cache), 1, limits)
    return [prefill, measure(f"a decode step after {len(prompt)} tokens", decode, len(answer), limits)]


def measure(name: str, run: Callable[[], object], times: int, limits: Limits) -> Profile:
    """Runs what does one thing so many times, and says what once takes."""
    with cpu.profile() as uses:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    kernels = [kernel_share(use, seconds, times, limits) for use in sorted(uses, key=lambda use: -use.seconds)]
    return Profile(name=name, milliseconds=1e3 * seconds / times, kernels=kernels)


def kernel_share(use: cpu.Use, seconds: float, times: int, limits: Limits) -> KernelShare:
    """One kernel's part of a run of so many seconds."""
    limit, limit_share = limits.of(use)
    return KernelShare(
        kernel=use.kernel,
        calls=use.calls // times,
        milliseconds=1e3 * use.seconds / times,
        share=use.seconds / seconds,
        gb_s=use.bytes / use.seconds / 1e9,
        gop_s=use.operations / use.seconds / 1e9,
        limit=limit,
        limit_share=limit_share,
    )
