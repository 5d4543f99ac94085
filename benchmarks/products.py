"""Speed of the packed products and of the expert layer, each beside the limit that it has on this machine.

    python benchmarks/products.py --threads 2 --formats int4 int8 --tokens 1 512

Shapes are those of Qwen3-Next-80B-A3B. Few tokens are bound by memory: their share is of the read speed that
the same run measures. Results are compared with float64 before anything is timed. With one thread the time is the
thread's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import tyro
from timing import Case, Limits, check, clock, machine_lines, report, take_turns

from tenfold.kernels import cpu

HIDDEN, WIDTH, CHOICES, EXPERTS = 2048, 512, 11, 65  # ten of 64 routed experts, and the shared one
SHAPES = {"in_proj_qkvz": (12288, 2048), "out_proj": (2048, 4096)}
COLD_BYTES = 200e6  # copies of a weight that a case goes through in turn, so that none stays in a cache
ROUNDING = 0.03  # relative error of inputs in int8, through an expert


@dataclass(frozen=True, kw_only=True)
class Options:
    threads: int = 2
    isas: list[str] = field(default_factory=lambda: cpu.isas()[1:] or cpu.isas())
    formats: list[str] = field(default_factory=lambda: list(cpu.FORMATS))
    tokens: list[int] = field(default_factory=lambda: [1, 512])
    rounds: int = 15


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
            check(f"{label} {isa}", cpu.linear(x, copies[:1])[0][:8], expected, ROUNDING)
            run = partial(lambda x, i: cpu.linear(x, [copies[i % len(copies)]]), x)
            work = 2.0 * tokens * rows * cols
            yield Case(group=label, name=isa, isa=isa, run=run, operations=work, nbytes=copies[0].nbytes)


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
            check(f"{label} {isa}", y[:8], expected, ROUNDING)
            run = partial(lambda x, w, c, i: cpu.expert_layer(x, experts, c[i % 16], w), x, weights, choices)
            work = 2.0 * tokens * CHOICES * 3 * HIDDEN * WIDTH
            yield Case(group=label, name=isa, isa=isa, run=run, operations=work, nbytes=touched)


def choose(tokens: int) -> torch.Tensor:
    routed = torch.rand(tokens, EXPERTS - 1).argsort(-1)[:, : CHOICES - 1]
    return torch.cat([routed, torch.full((tokens, 1), EXPERTS - 1)], 1).int()


def main(options: Options) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cpu.set_threads(options.threads)
    print(machine_lines(options.threads))
    cases: list[Case] = []
    for format in options.formats:
        for name in SHAPES:
            cases += linear_cases(name, format, options)
        cases += expert_cases(format, options)
    limits = Limits.measure(options.threads)
    take_turns(cases, options.rounds, clock(options.threads))
    report(cases, limits.at_best(Limits.measure(options.threads)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
