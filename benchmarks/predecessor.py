"""The claim of Qwen3-Next-80B-A3B against its dense predecessor, Qwen3-32B: the speed of prefill and of decoding.

    python benchmarks/predecessor.py --threads 2 --format int4

Both run on the native kernels at the same precision, with random weights. Of Qwen3-Next four layers are measured
together, three Gated DeltaNet and one of attention, with all 512 experts, and count twelve times; of Qwen3-32B one
layer, which counts 64 times. Both output heads are measured: decoding runs one a token, prefill one a prompt.

A long prompt is not run as a whole. The cache is filled with random content, one chunk is prefilled at several depths,
and the time in between is interpolated: a chunk's cost grows linearly with its depth. Decoding takes random tokens, and
so other experts at each step: a share of the memory's read speed above 1 would show that they came from a cache.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Literal

import torch
import tyro
from model_files import say
from timing import Case, Limits, machine_lines, print_table, ratio, report, take_turns
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.cache import FULL_ATTENTION
from tenfold.models.flops import forward_flops, mean_context
from tenfold.models.init import init_tensor
from tenfold.models.native import NativeModel
from tenfold.models.native_cache import NativeCache
from tenfold.models.packing import Packed, complete_owners, pack_owner
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import build_on_meta

if TYPE_CHECKING:
    from tenfold.kernels._native import PackedExperts

OURS, THEIRS = "Qwen3-Next-80B-A3B", "Qwen3-32B"
CLAIMS = {
    ("prefill", 4096): "7x",
    ("decode", 4096): "4x",
    ("prefill", 32768): "over 10x",
    ("decode", 32768): "over 10x",
}
PERIOD = 4  # layers of Qwen3-Next: three Gated DeltaNet, one of attention
CONTENT = 0.02  # standard deviation of what fills a cache
TOKENS = 1 << 15  # random ones
VOCABULARY_REPEATS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    format: Literal["int4", "int8", "bf16"] = "int4"
    contexts: tuple[int, ...] = (4096, 32768)
    chunk: int = 512  # tokens that pass the layers at once in prefill
    depths: int = 3  # at which a chunk is measured, from 0 to the end of each context
    rounds: int = 3  # of prefill
    decode_rounds: int = 9
    threads: int = os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A few layers of a model, and how often the whole has them."""

    name: str
    config: Config  # of the whole
    model: NativeModel
    cache: NativeCache
    tokens: Tensor  # random ones, int64

    @property
    def label(self) -> str:
        """What of it is measured."""
        return f"{self.model.config.num_hidden_layers} of {self.name}"

    @property
    def times(self) -> float:
        return self.config.num_hidden_layers / self.model.config.num_hidden_layers

    def layer_bytes(self, context: int) -> float:
        """What one token reads in the measured layers: weights, keys and values in 16 bits, states read and written."""
        config, kinds = self.config, self.model.config.layer_kinds
        attending = kinds.count(FULL_ATTENTION)
        keys = 4.0 * attending * context * config.num_key_value_heads * config.head_dim
        recurring = len(kinds) - attending
        states = 8.0 * recurring * sum(prod(shape) for shape in config.state_shapes()) if recurring else 0.0
        return sum(layer.bytes_per_token() for layer in self.model.layers) + keys + states


def make_arm(name: str, config: Config, layers: int, options: Options) -> Arm:
    """The first layers of a model at its full widths, with a cache for the longest context."""
    longest = max(options.contexts) + options.chunk
    few = replace(config, num_hidden_layers=layers, max_position_embeddings=longest)
    say(f"packing {layers} of {config.num_hidden_layers} layers of {name}, and its head")
    model = NativeModel(few, packed_owners(few, options.format))
    tokens = torch.randint(config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache()
    cache.length = longest - 1
    model.hidden_states(tokens[:1].tolist(), cache)  # makes room
    for held in (*cache.pool.pages.arrays, *cache.pool.states.arrays):
        held.normal_(0.0, CONTENT)
    return Arm(name=name, config=config, model=model, cache=cache, tokens=tokens)


def packed_owners(config: Config, format: str) -> Iterator[tuple[str, Packed]]:
    """Random weights. A layer's experts are equal, but lie in memory apart: one is packed, which saves minutes."""
    one = replace(config, num_experts=1, num_experts_per_tok=1) if isinstance(config, Qwen3NextConfig) else config
    for owner, weights in complete_owners(build_on_meta(config), random_parameters(config)):
        packed = pack_owner(one, owner, weights, format)
        if isinstance(config, Qwen3NextConfig) and packed.experts:
            packed.experts = repeated(packed.experts, config.num_experts + 1, format)
        yield owner, packed


def random_parameters(config: Config) -> Iterator[tuple[str, Tensor]]:
    """In bf16. Of experts, which are stacked, the first; a vocabulary repeats, which saves time and memory."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in build_on_meta(config).named_parameters():
        first, *rest = parameter.shape
        repeats = VOCABULARY_REPEATS if first == config.vocab_size else 1
        weight = init_tensor(name, (1 if ".experts." in name else first // repeats, *rest), generator)
        yield name, weight.bfloat16().repeat(repeats, 1) if repeats > 1 else weight.bfloat16() if rest else weight


def repeated(experts: PackedExperts, count: int, format: str) -> PackedExperts:
    """The first expert, so many times."""
    held, hidden, width = experts.shape
    first = torch.from_numpy(experts.bytes[: experts.nbytes // held].copy())
    return cpu.packed_experts(first.repeat(count), format, count, hidden, width)


# ---- what is timed -------------------------------------------------------------------------------------------


def head_case(arm: Arm) -> Case:
    """One token's logits."""
    hidden = torch.randn(1, arm.config.hidden_size)
    nbytes = arm.model.bytes_per_token() - sum(layer.bytes_per_token() for layer in arm.model.layers)
    return Case(group=f"head of {arm.name}", name="", run=lambda _: arm.model.logits(hidden), nbytes=nbytes)


def decode_case(arm: Arm, context: int) -> Case:
    """A token through the measured layers, after a context."""

    def run(i: int) -> None:
        arm.cache.length = context
        arm.model.hidden_states([int(arm.tokens[i % TOKENS])], arm.cache)

    return Case(group=f"{arm.label}, decode at {context:,}", name="", run=run, nbytes=arm.layer_bytes(context))


def prefill_case(arm: Arm, depth: int, chunk: int) -> Case:
    """A chunk through the measured layers, after a depth."""

    def run(i: int) -> None:
        arm.cache.length = depth
        start = i * chunk % (TOKENS - chunk)
        arm.model.hidden_states(arm.tokens[start : start + chunk].tolist(), arm.cache)

    operations = chunk * forward_flops(arm.model.config, depth + mean_context(chunk)).layers
    return Case(group=f"{arm.label}, prefill at {depth:,}", name="", run=run, operations=operations)


def depths_of(context: int, options: Options) -> list[int]:
    """Where chunks are measured: evenly from the first to the last of the context, on whole chunks."""
    last = context // options.chunk - 1
    return sorted({round(last * i / (options.depths - 1)) * options.chunk for i in range(options.depths)})


# ---- the whole models ----------------------------------------------------------------------------------------


def prefill_seconds(seconds: Mapping[int, float], context: int, chunk: int) -> float:
    """A whole context, from the seconds of a chunk at some depths between the first and the last (trapezoids)."""
    chunks = context // chunk
    if chunks == 1:
        return seconds[0]
    span = (chunks - 1) * chunk
    between = sum((b - a) * (seconds[a] + seconds[b]) / 2 for a, b in pairwise(sorted(seconds)))
    return chunks * between / span


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The cases of one arm."""

    arm: Arm
    head: Case
    decodes: dict[int, Case]  # by context
    prefills: dict[int, Case]  # by depth

    def whole(self, phase: str, context: int, options: Options) -> list[float]:
        """Seconds that the whole model takes, for a token or for a prompt, turn by turn."""
        times = self.arm.times
        if phase == "decode":
            return [times * a + b for a, b in zip(self.decodes[context].seconds, self.head.seconds, strict=True)]
        depths = depths_of(context, options)
        turns = zip(*(self.prefills[depth].seconds for depth in depths), strict=True)
        totals = (prefill_seconds(dict(zip(depths, turn, strict=True)), context, options.chunk) for turn in turns)
        return [times * total + self.head.median for total in totals]


def cases_of(arm: Arm, options: Options) -> Measured:
    depths = sorted({depth for context in options.contexts for depth in depths_of(context, options)})
    return Measured(
        arm=arm,
        head=head_case(arm),
        decodes={context: decode_case(arm, context) for context in options.contexts},
        prefills={depth: prefill_case(arm, depth, options.chunk) for depth in depths},
    )


def rows(ours: Measured, theirs: Measured, options: Options) -> Iterator[tuple[str, ...]]:
    """Tokens a second of both models, their ratio, and what was published."""
    for phase in ("prefill", "decode"):
        for context in options.contexts:
            fast, slow = (measured.whole(phase, context, options) for measured in (ours, theirs))
            tokens = context if phase == "prefill" else 1
            speeds = (f"{tokens / statistics.median(x):.2f}" for x in (fast, slow))
            yield f"{phase} at {context:,}", *speeds, str(ratio(slow, fast)), CLAIMS.get((phase, context), "")


def main(options: Options) -> None:
    if any(context % options.chunk for context in options.contexts) or options.depths < 2:
        sys.exit("contexts have to be whole chunks, and depths 2 or more")
    if not cpu.available():
        sys.exit("the native kernels are not available: install Tenfold again where there is a C++20 compiler")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    cpu.set_threads(options.threads)
    ours = cases_of(make_arm(OURS, Qwen3NextConfig(), PERIOD, options), options)
    theirs = cases_of(make_arm(THEIRS, Qwen3Config(), 1, options), options)
    before = Limits.measure(options.threads)
    pairs = [(ours.head, theirs.head), *zip(ours.decodes.values(), theirs.decodes.values(), strict=True)]
    decoding = [case for pair in pairs for case in pair]
    take_turns(decoding, options.decode_rounds)
    prefills = zip(ours.prefills.values(), theirs.prefills.values(), strict=True)
    prefilling = [case for pair in prefills for case in pair]
    take_turns(prefilling, options.rounds, calls=1)
    print(f"{machine_lines(options.threads)}; {options.format}")
    print(
        f"measured: {PERIOD} layers of {OURS} (x{ours.arm.times:.0f}), 1 of {THEIRS} (x{theirs.arm.times:.0f}); heads"
    )
    report([*decoding, *prefilling], before.at_best(Limits.measure(options.threads)))
    print(
        f"the whole models, tokens a second; prefill is interpolated between chunks of {options.chunk} at some depths"
    )
    print_table(("", OURS, THEIRS, "ratio", "published"), list(rows(ours, theirs, options)), labels=1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
