"""The claim of Qwen3-Next-80B-A3B against its dense predecessor, Qwen3-32B: the speed of prefill and of decoding.

    python benchmarks/predecessor.py --threads 2 --format int4

Both run on the native kernels at the same precision, with random weights. Of Qwen3-Next four layers are measured
together, three Gated DeltaNet and one of attention, with all 512 experts, and count twelve times; of Qwen3-32B one layer,
which counts 64 times. Both output heads are measured: decoding runs one a token, prefill one a prompt.

A long prompt is not run as a whole. The cache is filled with random content, one chunk is prefilled at several depths,
and the time in between is interpolated; the cost of a chunk grows linearly with its depth, so that is exact but for
noise. Decoding takes random tokens, whose experts are no others' before, so that they come from memory, not from a
processor's cache: the share of the memory's read speed, of bytes that a token needs, cannot be above 1.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import tyro
from timing import Case, Limits, Ratio, machine_lines, print_table, ratio, take_turns
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.cache import FULL_ATTENTION
from tenfold.models.flops import forward_flops, mean_context
from tenfold.models.init import init_tensor
from tenfold.models.native import NativeModel
from tenfold.models.native_cache import NativeCache
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import build_on_meta

PUBLISHED = {"prefill": {4096: "7x", 32768: ">10x"}, "decode": {4096: "4x", 32768: ">10x"}}
STEPS = 4  # tokens that are decoded in a turn
STATE = 0.02  # standard deviation of what fills a cache
Part = tuple[str, int]  # "prefill" at a depth, "decode" after a context, "head"


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
    model: NativeModel
    times: int
    cache: NativeCache
    tokens: Tensor  # random ones, int64


def make_arm(config: Config, layers: int, options: Options) -> Arm:
    """The first layers of a model at its full widths, with a cache for the longest context."""
    few = replace(config, num_hidden_layers=layers, max_position_embeddings=2 * max(options.contexts))
    model = NativeModel(few, random_parameters(few), options.format)
    cache = model.new_cache()
    tokens = torch.randint(config.vocab_size, (64 * options.chunk,), generator=torch.Generator().manual_seed(0))
    cache.length = max(options.contexts) + options.chunk
    model.hidden_states(tokens[:1], cache)  # makes room
    for tensor in cache.tensors():
        tensor.copy_(torch.empty(tensor.shape).normal_(0.0, STATE) if tensor.is_floating_point() else tensor.zero_())
    times = config.num_hidden_layers // layers
    return Arm(name=f"{layers} of {config.model_type}", model=model, times=times, cache=cache, tokens=tokens)


def random_parameters(config: Config) -> Iterator[tuple[str, Tensor]]:
    """In bf16. The experts of a layer are equal, each packed into memory of its own: that costs seconds, not minutes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in build_on_meta(config).named_parameters():
        shape = parameter.shape
        if ".experts." in name:
            yield name, init_tensor(name, shape[1:], generator).bfloat16().expand(shape)
        else:
            yield name, init_tensor(name, shape, generator).to(torch.bfloat16 if len(shape) > 1 else torch.float32)
