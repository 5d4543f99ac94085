"""Inference on the compiled kernels: Qwen3-Next and Qwen3 from packed weights, about one call a block of a layer.

Read from the bottom up, as in `qwen3_next`: the two mixers, the two feed-forwards, a layer, the model. Activations are
fp32. A token's results have the same bits whether it is decoded or prefilled, in chunks of any size, on any number of
threads. Modules for multi-token prediction are left out.

Shape letters: T tokens, D hidden, H heads, G key/value heads, HV value heads, K and V head dims, E experts.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cpu
from tenfold.models import Config, Model
from tenfold.models.cache import FULL_ATTENTION
from tenfold.models.native_cache import KeyValueMemory, NativeCache, RecurrentMemory
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import build_on_meta, load_tokenizer, open_checkpoint, read_parameters, resolve_path
from tenfold.ops.rotary import rotary_table
from tenfold.tokenizer import Tokenizer

Weights = Mapping[str, Tensor]  # of a layer, under Hugging Face's names without the layer's
PREFILL_TOKENS = 512  # that pass the layers at once, so that a long prompt needs no more memory than a short one
SENSITIVE = {"bf16": "bf16", "int8": "int8", "int4": "int8"}  # formats of gates and head, never under 8 bits
ROUTER = "bf16"  # whose logits decide between experts that are nearly as good
OWNER = re.compile(r"(model\.layers\.\d+|\w+)\.(.+)")


class Attention:
    """Softmax attention of either architecture; Qwen3-Next's has a gate on its output."""

    def __init__(self, config: Config, weights: Weights, format: str) -> None:
        self.gated = isinstance(config, Qwen3NextConfig)
        self.inputs = [cpu.pack_linear(weights[f"self_attn.{x}_proj.weight"], format) for x in "qkv"]
        self.output = cpu.pack_linear(weights["self_attn.o_proj.weight"], format)
        self.q_norm, self.k_norm = (norm_weight(config, weights[f"self_attn.{x}_norm.weight"]) for x in "qk")

    def __call__(self, x: Tensor, memory: KeyValueMemory, batch: cpu.Batch) -> Tensor:
        q, k, v = cpu.linear(x, self.inputs)
        y = cpu.attention(q, k, v, self.q_norm, self.k_norm, memory.handle, batch, self.gated)
        return cpu.linear(y, [self.output])[0]

    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return sum(weight.nbytes for weight in (*self.inputs, self.output))


class GatedDeltaNet:
    """Linear attention: a short conv, the gated delta rule, and a gated norm."""

    def __init__(self, config: Qwen3NextConfig, weights: Weights, format: str) -> None:
        owner = "linear_attn"
        formats = {"qkvz": format, "ba": SENSITIVE[format]}
        self.inputs = [cpu.pack_linear(weights[f"{owner}.in_proj_{x}.weight"], f) for x, f in formats.items()]
        self.output = cpu.pack_linear(weights[f"{owner}.out_proj.weight"], format)
        self.weights = cpu.delta_net_weights(
            weights[f"{owner}.conv1d.weight"][:, 0],
            weights[f"{owner}.A_log"],
            weights[f"{owner}.dt_bias"],
            weights[f"{owner}.norm.weight"],
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

    def __init__(self, weights: Weights, format: str) -> None:
        self.inputs = [cpu.pack_linear(weights[f"mlp.{x}_proj.weight"], format) for x in ("gate", "up")]
        self.output = cpu.pack_linear(weights["mlp.down_proj.weight"], format)

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

    def __init__(self, config: Qwen3NextConfig, weights: Weights, format: str) -> None:
        self.k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.router = [cpu.pack_linear(weights[f"mlp.{x}.weight"], ROUTER) for x in ("gate", "shared_expert_gate")]
        self.experts = pack_experts(config, weights, format)
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


def pack_experts(config: Qwen3NextConfig, weights: Weights, format: str) -> cpu.PackedExperts:
    """A layer's experts; the shared one last, in as many parts of their width as it takes, the end zeros."""
    count, width = config.num_experts, config.moe_intermediate_size
    parts = max(1, math.ceil(config.shared_expert_intermediate_size / width))
    experts = cpu.empty_experts(format, count + parts, config.hidden_size, width)
    gate_up, down = weights["mlp.experts.gate_up_proj"], weights["mlp.experts.down_proj"]
    for e in range(count):
        gate, up = gate_up[e].chunk(2)
        experts.pack(e, gate, up, down[e])
    zeros = parts * width - config.shared_expert_intermediate_size
    gate, up = (F.pad(weights[f"mlp.shared_expert.{x}_proj.weight"], (0, 0, 0, zeros)) for x in ("gate", "up"))
    down = F.pad(weights["mlp.shared_expert.down_proj.weight"], (0, zeros))
    for i, part in enumerate(zip(gate.split(width), up.split(width), down.split(width, 1), strict=True)):
        experts.pack(count + i, *part)
    return experts


def pack_mixer(config: Config, layer: int, weights: Weights, format: str) -> Attention | GatedDeltaNet:
    """The mixer that the configuration has in this layer."""
    if isinstance(config, Qwen3NextConfig) and config.layer_kinds[layer] != FULL_ATTENTION:
        return GatedDeltaNet(config, weights, format)
    return Attention(config, weights, format)


def pack_feed_forward(config: Config, layer: int, weights: Weights, format: str) -> FeedForward | SparseMoE:
    """The feed-forward that the configuration has in this layer."""
    if isinstance(config, Qwen3NextConfig) and config.is_sparse(layer):
        return SparseMoE(config, weights, format)
    return FeedForward(weights, format)


class DecoderLayer:
    """A mixer over tokens, then a feed-forward, each behind a norm."""

    def __init__(self, config: Config, layer: int, weights: Weights, format: str) -> None:
        self.mixer_norm = norm_weight(config, weights["input_layernorm.weight"])
        self.mlp_norm = norm_weight(config, weights["post_attention_layernorm.weight"])
        self.mixer = pack_mixer(config, layer, weights, format)
        self.mlp = pack_feed_forward(config, layer, weights, format)

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

    def __init__(self, config: Config, parameters: Iterable[tuple[str, Tensor]], format: str) -> None:
        """Takes parameters, fp32 or bf16, as they come, and keeps none: a layer is packed once it is complete.

        format: of the large matrices, `bf16`, `int8` or `int4`. Raises ValueError for a shape that the kernels lack.
        """
        if format not in cpu.FORMATS:
            raise ValueError(f"unknown format {format!r}: {', '.join(cpu.FORMATS)}")
        self.config, self.format = config, format
        skeleton = build_on_meta(config)
        self._frequencies, self._rope_factor = skeleton.frequencies, skeleton.rope_factor
        layers: dict[int, DecoderLayer] = {}
        for owner, weights in complete_owners(skeleton, parameters):
            if owner == "model":
                self._take_trunk(weights)
            elif owner == "lm_head":
                self.head = cpu.pack_linear(weights["weight"], SENSITIVE[format])
            elif owner != "mtp":
                i = int(owner.removeprefix("model.layers."))
                layers[i] = DecoderLayer(config, i, weights, format)
        self.layers = [layers[i] for i in range(config.num_hidden_layers)]

    def _take_trunk(self, weights: Weights) -> None:
        self.embedding = weights["embed_tokens.weight"].bfloat16()
        self.norm = norm_weight(self.config, weights["norm.weight"])
        if self.config.tie_word_embeddings:
            self.head = cpu.pack_linear(weights["embed_tokens.weight"], SENSITIVE[self.format])

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
        return cpu.linear(hidden, [self.head])[0]

    def hidden_states(self, input_ids: Tensor, cache: NativeCache) -> Tensor:
        """What the head reads, fp32 `[T, D]`, for int64 `[T]` tokens that follow those in the cache."""
        count = len(input_ids)
        positions = torch.arange(cache.length, cache.length + count)
        batch = cache.next_batch(count, rotary_table(positions, self._frequencies, self._rope_factor))
        x, delta = self.embedding[input_ids].float(), None
        for layer, memory in zip(self.layers, cache.layers, strict=True):
            delta = layer(x, delta, memory, batch)
        cache.length += count
        return cpu.rms_norm(x, self.norm, delta)

    def nbytes(self) -> int:
        """Bytes of the embedding and of packed weights."""
        packed = sum(layer.mixer.nbytes() + layer.mlp.nbytes() for layer in self.layers)
        return self.embedding.nbytes + self.head.nbytes + packed

    def bytes_per_token(self) -> int:
        """Bytes of packed weights that one token reads."""
        return self.head.nbytes + sum(layer.mixer.nbytes() + layer.mlp.bytes_per_token() for layer in self.layers)


def complete_owners(
    skeleton: Model, parameters: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """`model.layers.N`, `model` for the rest of the trunk, `lm_head` and `mtp`, each once all its parameters came.

    The mapping that comes with an owner, of names without the owner's, is emptied when the next one is asked for.
    """
    expected = Counter(_owner(name)[0] for name, _ in skeleton.named_parameters())
    waiting: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in parameters:
        owner, rest = _owner(name)
        waiting[owner][rest] = parameter.detach()
        if len(waiting[owner]) == expected[owner]:
            yield owner, waiting[owner]
            del waiting[owner]


def _owner(name: str) -> tuple[str, str]:
    found = OWNER.fullmatch(name)
    assert found, name
    return found[1], found[2]


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
    model = NativeModel(checkpoint.config, read_parameters(checkpoint, dtype, progress=True), format)
    return model, load_tokenizer(path)
