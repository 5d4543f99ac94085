"""Speed of a layer's kernels other than products, beside the machine's limits and torch's ops.

    python benchmarks/layers.py --threads 1

Shapes are those of Qwen3-Next-80B-A3B. Decoding is bound by memory: what counts is the share of the read speed, for
the bytes that are read and written. Prefill is bound by arithmetic: what counts is the share of torch's fp32 product.
Each case is compared with torch before anything is timed. With one thread the time is the thread's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import tyro
from timing import Case, Limits, check, clock, machine_lines, report, take_turns
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cpu
from tenfold.ops.attention import attention
from tenfold.ops.causal_conv import causal_conv1d
from tenfold.ops.gated_delta_rule import gated_delta_rule
from tenfold.ops.norm import gated_rms_norm, l2_norm, rms_norm
from tenfold.ops.rotary import rotary, rotary_table

KEY_HEADS, VALUE_HEADS, DIM, WIDTH = 16, 32, 128, 4  # Gated DeltaNet
HEADS, KV_HEADS, HEAD_DIM, ROTATED, PAGE = 16, 2, 256, 64, 32  # gated attention
EPS = 1e-6
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
    case = partial(Case, group=f"gated delta net x{tokens}", operations=operations, nbytes=nbytes)
    cases = [case(name="torch", run=peer)]
    right = peer(0)
    for isa in isas:
        cpu.use_isa(isa)
        for state, start in zip(states, first, strict=True):
            state[:1] = start
        check(f"gated delta net x{tokens} {isa}", native(0), right, ERRORS["fp32"])
        cases.append(case(name=isa, isa=isa, run=native))
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
    case = partial(Case, group=name, operations=operations)
    cases, right = [case(name="torch fp32", run=peer, nbytes=4 * nbytes)], peer(0)
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
            check(f"{name} {isa} {type}", native(0), right, ERRORS[type])
            size = arrays[0].element_size()
            cases.append(case(name=f"{isa} {type}", isa=isa, run=native, nbytes=size * nbytes))
    return cases


def main(options: Options) -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    cpu.set_threads(options.threads)
    print(machine_lines(options.threads))
    cases: list[Case] = []
    for tokens in options.tokens:
        cases += delta_net_cases(options.isas, tokens)
        for past in options.past:
            if past or tokens > 1:
                cases += attention_cases(options.isas, tokens, past, options.types)
    limits = Limits.measure(options.threads)
    take_turns(cases, options.rounds, clock(options.threads))
    report(cases, limits.at_best(Limits.measure(options.threads)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
