"""Inference on the compiled kernels: Qwen3-Next and Qwen3 from packed weights.

A layer is two calls; what happens in them is in csrc/blocks.cpp. Activations are fp32. A token's results have the same
bits whether it is decoded or prefilled, in chunks of any size, on any number of threads.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.native_cache import KeyValueMemory, NativeCache, RecurrentMemory
from tenfold.models.packing import complete_owners, pack_owner
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import build_on_meta, load_tokenizer, open_checkpoint, read_parameters, resolve_path
from tenfold.ops.rotary import rotary_table
from tenfold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tenfold.models.packing import Packed

PREFILL_TOKENS = 512  # that pass the layers at once, so that a long prompt needs no more memory than a short one


class DecoderLayer:
    """A mixer over tokens, then a feed-forward, each behind a norm: two calls."""

    def __init__(self, config: Config, packed: Packed) -> None:
        self.packed, self._config = packed, config
        self._mixer = mixer(config, packed)
        self._feed_forward = feed_forward(config, packed)

    def __call__(
        self, x: Tensor, delta: Tensor | None, memory: KeyValueMemory | RecurrentMemory, batch: cpu.Batch
    ) -> Tensor:
        """What is to be added to the residual stream x `[T, D]`, after delta, which is added to x itself."""
        mixed = cpu.mix(self._mixer, x, delta, memory.handle, batch)
        return cpu.feed_forward(self._feed_forward, x, mixed)

    def bytes_per_token(self) -> int:
        """Bytes of weights that one token reads: of the experts, the chosen and the shared ones."""
        experts, config = self.packed.experts, self._config
        if experts is None:
            return self.packed.nbytes()
        assert isinstance(config, Qwen3NextConfig)
        idle = config.num_experts - config.num_experts_per_tok
        return self.packed.nbytes() - idle * (experts.nbytes // experts.shape[0])


def mixer(config: Config, packed: Packed) -> cpu.AttentionBlock | cpu.DeltaNetBlock:
    """The mixer that a layer's weights make: Gated DeltaNet, or attention, which in Qwen3-Next has an output gate."""
    norm = norm_weight(config, packed.tensors["input_layernorm.weight"])
    if "linear_attn.A_log" in packed.tensors:
        qkvz, ba, output = (
            packed.matrices[f"linear_attn.{x}.weight"] for x in ("in_proj_qkvz", "in_proj_ba", "out_proj")
        )
        return cpu.delta_net_block(norm, qkvz, ba, delta_net_weights(config, packed), output)
    q, k, v, output = (packed.matrices[f"self_attn.{x}_proj.weight"] for x in "qkvo")
    q_norm, k_norm = (norm_weight(config, packed.tensors[f"self_attn.{x}_norm.weight"]) for x in "qk")
    gated = isinstance(config, Qwen3NextConfig)
    return cpu.attention_block(norm, q, k, v, q_norm, k_norm, output, gated)


def delta_net_weights(config: Config, packed: Packed) -> cpu.DeltaNetWeights:
    """What a Gated DeltaNet has besides its projections."""
    assert isinstance(config, Qwen3NextConfig)
    conv, A_log, dt_bias, norm = (
        packed.tensors[f"linear_attn.{x}"] for x in ("conv1d.weight", "A_log", "dt_bias", "norm.weight")
    )
    return cpu.delta_net_weights(conv[:, 0], A_log, dt_bias, norm, config.linear_num_key_heads, config.rms_norm_eps)


def feed_forward(config: Config, packed: Packed) -> cpu.SparseBlock | cpu.DenseBlock:
    """The feed-forward that a layer's weights make: experts, or one SwiGLU."""
    norm = norm_weight(config, packed.tensors["post_attention_layernorm.weight"])
    if packed.experts is None:
        return cpu.dense_block(norm, *(packed.matrices[f"mlp.{x}_proj.weight"] for x in ("gate", "up", "down")))
    assert isinstance(config, Qwen3NextConfig)
    router, shared_gate = (packed.matrices[f"mlp.{x}.weight"] for x in ("gate", "shared_expert_gate"))
    k, normalize = config.num_experts_per_tok, config.norm_topk_prob
    return cpu.sparse_block(norm, router, shared_gate, packed.experts, k, normalize)


class NativeModel:
    """The language model with packed weights, for one sequence at a time."""

    def __init__(self, config: Config, owners: Iterable[tuple[str, Packed]]) -> None:
        """Takes the packed weights of all owners, in any order. Raises ValueError for a shape that the kernels lack."""
        self.config = config
        skeleton = build_on_meta(config)
        self._frequencies, self._rope_factor = skeleton.frequencies, skeleton.rope_factor
        layers: dict[int, DecoderLayer] = {}
        for owner, packed in owners:
            if owner == "model":
                self._take_trunk(packed)
            elif owner == "lm_head":
                self.head = list(packed.matrices.values())
            elif owner.startswith("model.layers."):
                layers[int(owner.removeprefix("model.layers."))] = DecoderLayer(config, packed)
        self.layers = [layers[i] for i in range(config.num_hidden_layers)]

    @classmethod
    def pack(cls, config: Config, parameters: Iterable[tuple[str, Tensor]], format: str) -> Self:
        """Takes parameters, fp32 or bf16, as they come, and keeps none: an owner is packed once it is complete.

        format: of the large matrices, `bf16`, `int8` or `int4`. Raises ValueError for a shape that the kernels lack.
        """
        owners = complete_owners(build_on_meta(config), parameters)
        return cls(config, ((owner, pack_owner(config, owner, weights, format)) for owner, weights in owners))

    def _take_trunk(self, packed: Packed) -> None:
        self.embedding = list(packed.matrices.values())
        self.norm = norm_weight(self.config, packed.tensors["norm.weight"])
        if self.config.tie_word_embeddings:
            self.head = self.embedding

    def new_cache(self) -> NativeCache:
        """An empty cache for one sequence."""
        return NativeCache(self.config)

    def next_logits(self, tokens: Sequence[int], cache: NativeCache) -> Tensor:
        """Logits fp32 `[vocab]` after tokens that follow those in the cache, which is advanced."""
        hidden = torch.empty(0)
        for chunk in torch.tensor(tokens).split(PREFILL_TOKENS):
            hidden = self.hidden_states(chunk, cache)
        return self.logits(hidden[-1:])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 `[T, vocab]` of hidden states `[T, D]`."""
        return cpu.linear_stacked(hidden, self.head)

    def hidden_states(self, input_ids: Tensor, cache: NativeCache) -> Tensor:
        """What the head reads, fp32 `[T, D]`, for int64 `[T]` tokens that follow those in the cache."""
        count = len(input_ids)
        positions = torch.arange(cache.length, cache.length + count)
        batch = cache.next_batch(count, rotary_table(positions, self._frequencies, self._rope_factor))
        x, delta = cpu.take_rows(self.embedding, input_ids), None
        for layer, memory in zip(self.layers, cache.layers, strict=True):
            delta = layer(x, delta, memory, batch)
        cache.length += count
        return cpu.rms_norm(x, self.norm, delta)

    def nbytes(self) -> int:
        """Bytes of the embedding and of packed weights."""
        vocabulary = {id(part): part for part in (*self.embedding, *self.head)}
        return sum(part.nbytes for part in vocabulary.values()) + sum(x.packed.nbytes() for x in self.layers)

    def bytes_per_token(self) -> int:
        """Bytes of packed weights that one token reads."""
        head = sum(part.nbytes for part in self.head)
        return head + sum(layer.bytes_per_token() for layer in self.layers)


def norm_weight(config: Config, weight: Tensor) -> cpu.NormWeight:
    """The weight of one of the architecture's norms."""
    return cpu.norm_weight(weight, config.rms_norm_eps, zero_centered=isinstance(config, Qwen3NextConfig))


def load_native(path_or_name: str | Path, format: str) -> tuple[NativeModel, Tokenizer | None]:
    """A model packed while it is read, and its tokenizer where there is one; path_or_name as for `weights.load`.

    In memory: the packed model, and a layer or two as they are in the files. Raises ValueError or OSError, in one
    line, where the checkpoint cannot be read, or the kernels cannot run.
    """
    cpu.require()
    path = resolve_path(path_or_name)
    checkpoint = open_checkpoint(path)
    matrices = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    dtype = torch.bfloat16 if matrices == {"BF16"} else torch.float32
    model = NativeModel.pack(checkpoint.config, read_parameters(checkpoint, dtype, progress=True), format)
    return model, load_tokenizer(path)
