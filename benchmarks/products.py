"""Speed of the packed products and of the expert layer, each beside the limit that it has on this machine.

    python benchmarks/products.py --threads 2 --formats int4 int8 --tokens 1 512

Shapes are those of Qwen3-Next-80B-A3B. Few tokens are bound by memory: their share is of the read speed that
the same run measures. Results are compared with float64 before anything is timed. The cases take turns, so
that a neighbour's load falls on all of them; with one thread the time is the thread's own.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import tyro

from tenfold import __version__
from tenfold.kernels import cpu

HIDDEN, WIDTH, CHOICES, EXPERTS = 2048, 512, 11, 65  # ten of 64 routed experts, and the shared one
SHAPES = {"in_proj_qkvz": (12288, 2048), "out_proj": (2048, 4096)}
SECONDS_A_TURN = 0.05  # short cases are repeated, so that the clock and the first call do not count
COLD_BYTES = 200e6  # copies of a weight that a case goes through in turn, so that none stays in a cache
ROUNDING = 0.03  # relative error of inputs in int8, through an expert


@dataclass(frozen=True, kw_only=True)
class Options:
    threads: int = 2
    isas: list[str] = field(default_factory=lambda: cpu.isas()[1:] or cpu.isas())
    formats: list[str] = field(default_factory=lambda: list(cpu.FORMATS))
    tokens: list[int] = field(default_factory=lambda: [1, 512])
    rounds: int = 15


@dataclass(frozen=True)
class Case:
    name: str
    isa: str
    operations: float
    bytes_read: float
    run: Callable[[int], object]
    seconds: list[float] = field(default_factory=list)


def copies_of(weight: cpu.PackedLinear) -> list[cpu.PackedLinear]:
    packed = torch.from_numpy(weight.bytes.copy())
    rest = int(COLD_BYTES / weight.nbytes)
    return [weight] + [cpu.packed_linear(packed.clone(), weight.format, *weight.shape) for _ in range(rest)]


def linear_cases(name: str, format: str, options: Options) -> Iterator[Case]:
    rows, cols = SHAPES[name]
    copies = copies_of(cpu.pack_linear(torch.randn(rows, cols), format))
    values = cpu.unpack(copies[0])
    for tokens in options.tokens:
        x = torch.randn(tokens, cols)
        expected = x[:8].double() @ values.double().T
        label = f"{name} {rows}x{cols} {format} x{tokens}"
        for isa in options.isas:
            cpu.use_isa(isa)
            check(f"{label} {isa}", cpu.linear(x, copies[:1])[0][:8], expected)
            run = partial(lambda x, i: cpu.linear(x, [copies[i % len(copies)]]), x)
            yield Case(label, isa, 2.0 * tokens * rows * cols, copies[0].nbytes, run)


def expert_cases(format: str, options: Options) -> Iterator[Case]:
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    one = cpu.empty_experts(format, 1, HIDDEN, WIDTH)
    one.pack(0, *(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes))
    packed = torch.from_numpy(one.bytes.copy()).repeat(EXPERTS)
    experts = cpu.packed_experts(packed, format, EXPERTS, HIDDEN, WIDTH)
    gate, up, down = (w.double() for w in cpu.unpack_expert(one, 0))
    for tokens in options.tokens:
        x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, CHOICES)
        choices = [choose(tokens) for _ in range(16)]
        h = torch.nn.functional.silu(x[:8].double() @ gate.T) * (x[:8].double() @ up.T)
        expected = h @ down.T * weights[:8].sum(1, True)
        touched = len(choices[0].unique()) * experts.nbytes / EXPERTS
        label = f"experts {format} x{tokens}"
        for isa in options.isas:
            cpu.use_isa(isa)
            y = cpu.expert_layer(x, experts, choices[0], weights)
            check(f"{label} {isa}", y[:8], expected)
            run = partial(lambda x, w, c, i: cpu.expert_layer(x, experts, c[i % 16], w), x, weights, choices)
            yield Case(label, isa, 2.0 * tokens * CHOICES * 3 * HIDDEN * WIDTH, touched, run)


def choose(tokens: int) -> torch.Tensor:
    routed = torch.rand(tokens, EXPERTS - 1).argsort(-1)[:, : CHOICES - 1]
    return torch.cat([routed, torch.full((tokens, 1), EXPERTS - 1)], 1).int()


def check(name: str, y: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((y - expected).norm() / expected.norm()).item()
    if not error < ROUNDING:
        sys.exit(f"{name}: relative error {error:.3g} against float64")


def measure(cases: list[Case], options: Options) -> None:
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for i in range(options.rounds + 1):
        for case in cases:
            cpu.use_isa(case.isa)
            calls = max(1, int(SECONDS_A_TURN / case.seconds[0])) if i else 1
            start = clock()
            for j in range(calls):
                case.run(i + j)
            case.seconds.append((clock() - start) / calls)
    for case in cases:
        del case.seconds[0]  # warmed up


def report(cases: list[Case], read_gb_s: float) -> None:
    print(f"{'':40} {'isa':9} {'median ms':>10} {'spread':>7} {'GOP/s':>8} {'GB/s':>7} {'of read speed':>14}")
    for case in cases:
        median = statistics.median(case.seconds)
        quarters = statistics.quantiles(case.seconds, n=4)
        speed = case.bytes_read / median / 1e9
        print(
            f"{case.name:40} {case.isa:9} {median * 1e3:10.3f} {(quarters[2] - quarters[0]) / median:7.0%} "
            f"{case.operations / median / 1e9:8.1f} {speed:7.2f} {speed / read_gb_s:14.2f}"
        )


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(options: Options) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cpu.set_threads(options.threads)
    print(f"tenfold {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{processor()}, {', '.join(cpu.isas())}; {options.threads} threads")
    cases = []
    for format in options.formats:
        for name in SHAPES:
            cases += linear_cases(name, format, options)
        cases += expert_cases(format, options)
    before = cpu.memory_read_gb_s()
    measure(cases, options)
    after = cpu.memory_read_gb_s()
    print(f"memory read: {before:.1f} GB/s before, {after:.1f} after")
    report(cases, max(before, after))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
