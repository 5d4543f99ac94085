"""Models to begin with: named shapes, and `init_checkpoint`, which writes one with random weights.

A tensor's values depend on the seed and its name alone, so tensors are made one at a time while the files are
written: the 160 GB of the largest shape need a disk, not memory.
"""

from __future__ import annotations

import hashlib
import lzma
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tenfold.models import Config
from tenfold.models.init import init_tensor
from tenfold.models.layout import TensorSource, parameter_dtype, parse_dtype, pieces
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import STAGING, build_on_meta, dtype_name, write_checkpoint
from tenfold.tokenizer import Tokenizer

SHAPES: dict[str, Qwen3NextConfig] = {
    "tiny": Qwen3NextConfig(  # 9.9 million parameters, 5.2 active: trains on a laptop
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32_768,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    ),
    "mid": Qwen3NextConfig(num_hidden_layers=8, num_experts=64),  # the 80B's layers in 2.5 billion
    "80b-a3b": Qwen3NextConfig(num_nextn_predict_layers=1),
}


def init_checkpoint(
    shape: str,
    out: str | Path,
    seed: int = 0,
    dtype: str = "bfloat16",
    progress: bool = True,
    shard_bytes: float = 5e9,
) -> None:
    """Writes a model of a named shape with random weights and a tokenizer into the folder `out`.

    dtype: "float32", "bfloat16" or "float16" (A_log and dt_bias are float32). The same call takes up again
    what an interruption left. Raises ValueError for an unknown shape or a folder that is not empty, OSError
    where the disk has no room.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}, known are {', '.join(SHAPES)}")
    out, chosen = Path(out), parse_dtype(dtype)
    if out.is_dir() and any(path.name != STAGING for path in out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty; name a new one")
    tokenizer = shape_tokenizer(SHAPES[shape])
    config = replace(SHAPES[shape], eos_token_id=tokenizer.eos_id)
    sources = list(random_sources(config, seed, chosen))
    identity = f"random weights of {shape}, seed {seed}, {dtype_name(chosen)}"
    write_checkpoint(out, config, sources, chosen, tokenizer, shard_bytes, progress, identity)


def shape_tokenizer(config: Config) -> Tokenizer:
    """Qwen3's tokenizer where the vocabulary holds it, else one trained on the embedded text to fit."""
    embedded = Tokenizer.embedded()
    if embedded.vocab_size <= config.vocab_size:
        return embedded
    packed = pkgutil.get_data("tenfold", "data/valid.raw.xz")
    assert packed is not None, "the package lacks its text"
    return Tokenizer.train([lzma.decompress(packed).decode()], config.vocab_size)


def random_sources(config: Config, seed: int, dtype: torch.dtype) -> Iterator[TensorSource]:
    """Every tensor of the model's files, to be made when it is written."""
    for name, parameter in build_on_meta(config).named_parameters():
        for piece in pieces(name, parameter.shape, "separate"):
            kept = parameter_dtype(name, dtype)
            read = partial(_random_tensor, config, piece.name, piece.shape, seed, kept)
            yield TensorSource(name=piece.name, shape=piece.shape, dtype=kept, read=read)


def _random_tensor(config: Config, name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    zero_centered = isinstance(config, Qwen3NextConfig)
    return init_tensor(name, shape, generator, config.initializer_range, zero_centered).to(dtype)
