"""Inference on the compiled kernels: Qwen3-Next and Qwen3 from packed weights, about one call a block of a layer.

Read from the bottom up, as in `qwen3_next`: the two mixers, the two feed-forwards, a layer, the model. Activations are
fp32. A token's results have the same bits whether it is decoded or prefilled, in chunks of any size, on any number of
threads. Modules for multi-token prediction are left out.

Shape letters: T tokens, D hidden, H heads, G key/value heads, HV value heads, K and V head dims, E experts.
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


class Attention:
    """Softmax attention of either architecture; Qwen3-Next's has a gate on its output."""

    def __init__(self, config: Config, packed: Packed) -> None:
        self.gated = isinstance(config, Qwen3NextConfig)
        self.inputs = [packed.matrices[f"self_attn.{x}_proj.weight"] for x in "qkv"]
        self.output = packed.matrices["self_attn.o_proj.weight"]
        self.q_norm, self.k_norm = (norm_weight(config, packed.tensors[f"self_attn.{x}_norm.weight"]) for x in "qk")

    def __call__(self, x: Tensor, memory: KeyValueMemory, batch: cpu.Batch) -> Tensor:
        q, k, v = cpu.linear(x, self.inputs)
        y = cpu.attention(q, k, v, self.q_norm, self.k_norm, memory.handle, batch, self.gated)
        return cpu.linear(y, [self.output])[0]

    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return sum(weight.nbytes for weight in (*self.inputs, self.output))


class GatedDeltaNet:
    """Linear attention: a short conv, the gated delta rule, and a gated norm."""

    def __init__(self, config: Qwen3NextConfig, packed: Packed) -> None:
        self.inputs = [packed.matrices[f"linear_attn.in_proj_{x}.weight"] for x in ("qkvz", "ba")]
        self.output = packed.matrices["linear_attn.out_proj.weight"]
        self.weights = cpu.delta_net_weights(
            packed.tensors["linear_attn.conv1d.weight"][:, 0],
            packed.tensors["linear_attn.A_log"],
            packed.tensors["linear_attn.dt_bias"],
            packed.tensors["linear_attn.norm.weight"],
            config.linear_num_key_heads,
            config.rms_norm_eps,
        )

    def __call__(self, x: Tensor, memory: RecurrentMemory, batch: cpu.Batch) -> Tensor:
        qkvz, ba = cpu.linear(x, self.inputs)
        return cpu.linear(cpu.gated_delta_net(qkvz, ba, self.weights, memory.handle, batch), [self.output])[0]

    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return sum(weight.nbytes for weight in (*self.inputs, self.output))


class FeedForward:
    """SwiGLU."""

    def __init__(self, packed: Packed) -> None:
        self.inputs = [packed.matrices[f"mlp.{x}_proj.weight"] for x in ("gate", "up")]
        self.output = packed.matrices["mlp.down_proj.weight"]

    def __call__(self, x: Tensor) -> Tensor:
        return cpu.linear(cpu.swiglu(*cpu.linear(x, self.inputs)), [self.output])[0]

    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return sum(weight.nbytes for weight in (*self.inputs, self.output))

    def bytes_per_token(self) -> int:
        """Those that one token reads."""
        return self.nbytes()


class SparseMoE:
    """k of E experts for each token. The shared expert is further ones, from number E, which all tokens choose."""

    def __init__(self, config: Qwen3NextConfig, packed: Packed) -> None:
        self.k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        assert packed.experts is not None
        self.router = [packed.matrices[f"mlp.{x}.weight"] for x in ("gate", "shared_expert_gate")]
        self.experts = packed.experts
        self.more_shared = torch.arange(1, self.experts.shape[0] - config.num_experts, dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        logits, shared_gate = cpu.linear(x, self.router)
        weights, chosen = cpu.route(logits, self.k, self.normalize, shared_gate)
        if more := len(self.more_shared):
            chosen = torch.cat((chosen, chosen[:, -1:] + self.more_shared), 1)
            weights = torch.cat((weights, weights[:, -1:].expand(-1, more)), 1)
        return cpu.expert_layer(x, self.experts, chosen, weights)

    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return self.experts.nbytes + sum(weight.nbytes for weight in self.router)

    def bytes_per_token(self) -> int:
        """Those that one token reads: of the experts, the chosen and the shared ones."""
        expert = self.experts.nbytes // self.experts.shape[0]
        return self.nbytes() - self.experts.nbytes + (self.k + 1 + len(self.more_shared)) * expert


def mixer(config: Config, packed: Packed) -> Attention | GatedDeltaNet:
    """The mixer that a layer's weights belong to."""
    if "linear_attn.out_proj.weight" in packed.matrices:
        assert isinstance(config, Qwen3NextConfig)
        return GatedDeltaNet(config, packed)
    return Attention(config, packed)


def feed_forward(config: Config, packed: Packed) -> FeedForward | SparseMoE:
    """The feed-forward that a layer's weights belong to."""
    if packed.experts:
        assert isinstance(config, Qwen3NextConfig)
        return SparseMoE(config, packed)
    return FeedForward(packed)


class DecoderLayer:
    """A mixer over tokens, then a feed-forward, each behind a norm."""

    def __init__(self, config: Config, packed: Packed) -> None:
        self.mixer_norm = norm_weight(config, packed.tensors["input_layernorm.weight"])
        self.mlp_norm = norm_weight(config, packed.tensors["post_attention_layernorm.weight"])
        self.mixer = mixer(config, packed)
        self.mlp = feed_forward(config, packed)

    def __call__(
        self, x: Tensor, delta: Tensor | None, memory: KeyValueMemory | RecurrentMemory, batch: cpu.Batch
    ) -> Tensor:
        """What is to be added to the residual stream x `[T, D]`, after delta, which is added to x itself."""
        normed = cpu.rms_norm(x, self.mixer_norm, delta)
        if isinstance(self.mixer, Attention):
            assert isinstance(memory, KeyValueMemory)
            mixed = self.mixer(normed, memory, batch)
        else:
            assert isinstance(memory, RecurrentMemory)
            mixed = self.mixer(normed, memory, batch)
        return self.mlp(cpu.rms_norm(x, self.mlp_norm, mixed))


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
        packed = sum(layer.mixer.nbytes() + layer.mlp.nbytes() for layer in self.layers)
        return sum(part.nbytes for part in vocabulary.values()) + packed

    def bytes_per_token(self) -> int:
        """Bytes of packed weights that one token reads."""
        head = sum(part.nbytes for part in self.head)
        return head + sum(layer.mixer.nbytes() + layer.mlp.bytes_per_token() for layer in self.layers)


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
