"""Speed of a layer's kernels other than products, beside the machine's limits and torch's ops.

    python benchmarks/layers.py --threads 1

Shapes are those of Qwen3-Next-80B-A3B. Decoding is bound by memory: its share is of the read speed that the
same run measures, for the bytes that are read and written. Prefill is bound by arithmetic: its share is of
what torch's fp32 product reaches. Each case is compared with torch before anything is timed. Cases and torch
take turns, so that a neighbour's load falls on all of them; with one thread the time is the thread's own.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import tyro
from products import processor
from torch import Tensor
from torch.nn import functional as F

from tenfold import __version__
from tenfold.kernels import cpu
from tenfold.ops.attention import attention
from tenfold.ops.causal_conv import causal_conv1d
from tenfold.ops.gated_delta_rule import gated_delta_rule
from tenfold.ops.norm import gated_rms_norm, l2_norm, rms_norm
from tenfold.ops.rotary import rotary, rotary_table

KEY_HEADS, VALUE_HEADS, DIM, WIDTH = 16, 32, 128, 4  # Gated DeltaNet
HEADS, KV_HEADS, HEAD_DIM, ROTATED, PAGE = 16, 2, 256, 64, 32  # gated attention
EPS = 1e-6
SECONDS_A_TURN = 0.03  # short cases are repeated, so that the clock and the first call do not count
SLOTS = 24  # states that decoding goes through in turn, so that none stays in a cache
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
ERRORS = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2, "int8": 2e-2}  # relative to torch in fp32


@dataclass(frozen=True, kw_only=True)
class Options:
    threads: int = 1
    isas: list[str] = field(default_factory=lambda: cpu.isas()[1:] or cpu.isas())
    tokens: list[int] = field(default_factory=lambda: [1, 512])
    past: list[int] = field(default_factory=lambda: [0, 8192])
    types: list[str] = field(default_factory=lambda: list(TYPES))
    rounds: int = 9


@dataclass(frozen=True)
class Case:
    name: str
    isa: str
    operations: float
    nbytes: float
    tokens: int
    run: Callable[[int], object]
    seconds: list[float] = field(default_factory=list)


def delta_net_cases(isas: list[str], tokens: int) -> list[Case]:
    keys, values = KEY_HEADS * DIM, VALUE_HEADS * DIM
    channels = 2 * keys + values
    conv_weight, norm = torch.randn(channels, WIDTH) / 2, torch.ones(DIM)
    A_log, dt_bias = torch.rand(VALUE_HEADS), torch.randn(VALUE_HEADS) - 2
    qkvz, ba = torch.randn(tokens, channels + values), torch.randn(tokens, 2 * VALUE_HEADS)
    states = torch.randn(SLOTS, channels, WIDTH - 1), torch.randn(SLOTS, VALUE_HEADS, DIM, DIM) / 8
    first = [x[:1].clone() for x in states]
    weights = cpu.delta_net_weights(conv_weight, A_log, dt_bias, norm, KEY_HEADS, EPS)
    handle, batches = cpu.recurrent_states(*states), [cpu.batch([0, tokens], [i]) for i in range(SLOTS)]

    def native(i: int) -> Tensor:
        return cpu.gated_delta_net(qkvz, ba, weights, handle, batches[i % SLOTS])

    def peer(_: int) -> Tensor:
        grouped = qkvz.unflatten(-1, (KEY_HEADS, -1)).split((DIM, DIM, 2 * DIM, 2 * DIM), -1)
        q, k, v, z = (x.flatten(-2) for x in grouped)
        b, a = (x.flatten(-2) for x in ba.unflatten(-1, (KEY_HEADS, -1)).chunk(2, -1))
        mixed, _conv = causal_conv1d(torch.cat((q, k, v), -1)[None], conv_weight, first[0])
        q, k, v = (x.unflatten(-1, (-1, DIM)) for x in mixed.split((keys, keys, values), -1))
        g = -A_log.exp() * F.softplus(a + dt_bias)
        o, _state = gated_delta_rule(l2_norm(q), l2_norm(k), v, g[None], b.sigmoid()[None], first[1])
        return gated_rms_norm(o[0], z.unflatten(-1, (-1, DIM)), norm, EPS).flatten(-2)

    operations = 7.0 * tokens * VALUE_HEADS * DIM * DIM
    nbytes = 2.0 * sum(x[0].nbytes for x in states)
    name = f"gated delta net x{tokens}"
    cases = [Case(name, "torch", operations, nbytes, tokens, peer)]
    right = peer(0)
    for isa in isas:
        cpu.use_isa(isa)
        for state, start in zip(states, first, strict=True):
            state[:1] = start
        check(name, native(0), right, ERRORS["fp32"])
        cases.append(Case(name, isa, operations, nbytes, tokens, native))
    return cases


def attention_cases(isas: list[str], tokens: int, past: int, types: list[str]) -> list[Case]:
    total, norm = past + tokens, torch.randn(HEAD_DIM) / 8
    weight = cpu.norm_weight(norm, EPS, zero_centered=True)
    q, k, v = (torch.randn(total, n * HEAD_DIM) for n in (2 * HEADS, KV_HEADS, KV_HEADS))
    rotation = rotary_table(torch.arange(total), 1e7 ** -torch.arange(0, 1, 2 / ROTATED))
    new_q, new_k, new_v = q[past:], k[past:], v[past:]
    new_rotation, old_rotation = ((rotation[0][s], rotation[1][s]) for s in (slice(past, None), slice(past)))
    cached = rotary(rms_norm(k.unflatten(-1, (-1, HEAD_DIM)), norm, EPS, True), *rotation)
    values = v.unflatten(-1, (-1, HEAD_DIM))

    def peer(_: int) -> Tensor:
        query, gate = new_q.unflatten(-1, (HEADS, -1)).chunk(2, -1)
        query = rotary(rms_norm(query, norm, EPS, True), *new_rotation)
        y = attention(query[None], cached[None], values[None])[0]
        return (y * gate.sigmoid()).flatten(-2)

    pairs = tokens * past + tokens * (tokens + 1) / 2
    operations = 4.0 * pairs * HEADS * HEAD_DIM
    name = f"attention x{tokens} after {past}"
    nbytes = 2.0 * total * KV_HEADS * HEAD_DIM
    cases, right = [Case(f"{name} fp32", "torch", operations, 4 * nbytes, tokens, peer)], peer(0)
    table = torch.randperm(-(-total // PAGE)).tolist()
    for type in types:
        arrays = cpu.empty_pages(len(table), KV_HEADS, HEAD_DIM, PAGE, TYPES[type])
        pages = cpu.key_value_pages(*arrays)
        batch = cpu.batch([0, tokens], past=[past], pages=[table], rotation=new_rotation)

        def native(
            _: int, pages: cpu.KeyValuePages = pages, batch: cpu.Batch = batch, arrays: object = arrays
        ) -> Tensor:
            return cpu.attention(new_q, new_k, new_v, weight, weight, pages, batch, gated=True)

        if past:
            before = cpu.batch([0, past], past=[0], pages=[table], rotation=old_rotation)
            cpu.attention(q[:past], k[:past], v[:past], weight, weight, pages, before, gated=True)
        for isa in isas:
            cpu.use_isa(isa)
            check(f"{name} {type}", native(0), right, ERRORS[type])
            size = arrays[0].element_size()
            cases.append(Case(f"{name} {type}", isa, operations, size * nbytes, tokens, native))
    return cases


def check(name: str, y: Tensor, expected: Tensor, largest: float) -> None:
    error = ((y - expected).norm() / expected.norm()).item()
    if not error < largest:
        sys.exit(f"{name}: relative difference {error:.3g} from torch")


def product_gflops(clock: Callable[[], float], size: int = 1024) -> float:
    """What torch's fp32 product reaches, the best of some runs."""
    a, best = torch.randn(size, size), float("inf")
    for _ in range(10):
        start = clock()
        torch.mm(a, a)
        best = min(best, clock() - start)
    return 2e-9 * size**3 / best


def measure(cases: list[Case], options: Options, clock: Callable[[], float]) -> None:
    for i in range(options.rounds + 1):
        for case in cases:
            if case.isa != "torch":
                cpu.use_isa(case.isa)
            calls = max(1, int(SECONDS_A_TURN / case.seconds[0])) if i else 1
            start = clock()
            for j in range(calls):
                case.run(i + j)
            case.seconds.append((clock() - start) / calls)
    for case in cases:
        del case.seconds[0]  # warmed up


def report(cases: list[Case], read_gb_s: float, gflops: float) -> None:
    print(
        f"{'':28} {'isa':9} {'median us':>10} {'spread':>7} {'GFLOP/s':>8} {'GB/s':>6} {'of limit':>9} {'of torch':>9}"
    )
    peer = 0.0
    for case in cases:
        median, quarters = statistics.median(case.seconds), statistics.quantiles(case.seconds, n=4)
        peer = median if case.isa == "torch" else peer
        speed, rate = case.operations / median / 1e9, case.nbytes / median / 1e9
        share = rate / read_gb_s if case.tokens == 1 else speed / gflops
        print(
            f"{case.name:28} {case.isa:9} {median * 1e6:10.0f} {(quarters[2] - quarters[0]) / median:7.0%} "
            f"{speed:8.1f} {rate:6.1f} {share:9.2f} {peer / median:8.1f}x"
        )


def main(options: Options) -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    cpu.set_threads(options.threads)
    print(f"tenfold {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{processor()}, {', '.join(cpu.isas())}; {options.threads} threads")
    cases: list[Case] = []
    for tokens in options.tokens:
        cases += delta_net_cases(options.isas, tokens)
        for past in options.past:
            if past or tokens > 1:
                cases += attention_cases(options.isas, tokens, past, options.types)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    read_gb_s, gflops = cpu.memory_read_gb_s(), product_gflops(clock)
    measure(cases, options, clock)
    read_gb_s, gflops = max(read_gb_s, cpu.memory_read_gb_s()), max(gflops, product_gflops(clock))
    print(f"limits: memory read {read_gb_s:.1f} GB/s, torch's fp32 product {gflops:.0f} GFLOP/s")
    report(cases, read_gb_s, gflops)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
