"""Inference on the compiled kernels: Qwen3-Next and Qwen3 from packed weights.

A layer is two calls; what happens in them is in csrc/blocks.cpp. Activations are fp32. A token's results have the same
bits whether it is decoded or prefilled, in chunks of any size, in any company, on any number of threads.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.fingerprint import weights_digest
from tenfold.models.native_cache import KV_FORMATS, PAGE, KeyValueMemory, NativeCache, Pool, RecurrentMemory
from tenfold.models.packed_file import is_packed, open_packed, read_owners
from tenfold.models.packing import complete_owners, owner_by_owner, pack_owner, planned_bytes
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.room import packing_bytes, require_room, smaller_formats
from tenfold.models.rope import RotaryTable
from tenfold.models.weights import (
    build_on_meta,
    load_tokenizer,
    open_checkpoint,
    packing_dtype,
    read_parameters,
    resolve_path,
)
from tenfold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tenfold.models.packing import Packed

NUMERICS = 2  # goes up with whatever changes a bit of what is cached: kernels, their order of summation, layouts
EXPERT_TOKENS = 16  # for which it is well worth reading an expert; of 5, each takes a third longer than of 10
LEAST_STEP = 160  # tokens for which other weights are
PREFILL_TOKENS = 512  # that pass the layers at once, so that a long prompt needs no more memory than a short one


class DecoderLayer:
    """A mixer over tokens, then a feed-forward, each behind a norm: two calls."""

    def __init__(self, config: Config, packed: Packed) -> None:
        self.packed, self._config = packed, config
        self._mixer = mixer(config, packed)
        self._feed_forward = feed_forward(config, packed)

    def __call__(self, residual: cpu.Residual, memory: KeyValueMemory | RecurrentMemory, batch: cpu.Batch) -> None:
        """Adds what it computes to the residual stream."""
        cpu.mix(self._mixer, residual, memory.handle, batch)
        cpu.feed_forward(self._feed_forward, residual)

    def remember(self, residual: cpu.Residual, memory: KeyValueMemory | RecurrentMemory, batch: cpu.Batch) -> None:
        """Leaves what the call leaves in the memory of a layer that attends, and nothing else."""
        cpu.remember(self._mixer, residual, memory.handle, batch)  # type: ignore[arg-type]

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


def thrifty_tokens(config: Config) -> int:
    """Tokens that are worth reading the weights for: in a step of fewer they are read for too few at a time."""
    if not isinstance(config, Qwen3NextConfig):
        return LEAST_STEP
    return max(LEAST_STEP, EXPERT_TOKENS * config.num_experts // config.num_experts_per_tok)


class MultiTokenPrediction:
    """From the embedding of a token and the hidden state before it, a hidden state that predicts the token after it."""

    def __init__(self, config: Config, packed: Packed, layer: DecoderLayer) -> None:
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        embedding, hidden, self._norm = (norm_weight(config, packed.tensors[f"{name}.weight"]) for name in names)
        weight = packed.matrices["fc.weight"]
        self._input, self._layer = cpu.draft_input(embedding, hidden, weight), layer
        self.nbytes = weight.nbytes + layer.packed.nbytes()  # of packed weights

    def __call__(
        self,
        embedding: Sequence[cpu.PackedLinear],
        tokens: Sequence[int],
        hidden: Tensor,
        memory: KeyValueMemory | RecurrentMemory,
        batch: cpu.Batch,
    ) -> Tensor:
        """For tokens, of which these are the embeddings, and hidden states `[T, D]`; `[T, D]`."""
        residual = cpu.embed_drafts(self._input, embedding, tokens, hidden)
        self._layer(residual, memory, batch)
        return cpu.normalized(residual, self._norm)

    def follow(
        self,
        embedding: Sequence[cpu.PackedLinear],
        tokens: Sequence[int],
        hidden: Tensor,
        memory: KeyValueMemory | RecurrentMemory,
        batch: cpu.Batch,
    ) -> None:
        """Leaves what the call leaves in the memory, and predicts nothing."""
        self._layer.remember(cpu.embed_drafts(self._input, embedding, tokens, hidden), memory, batch)


class Span(Protocol):
    """Tokens of one sequence, and where its memory lies: the engine's `Span`."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def slot(self) -> int: ...
    @property
    def past(self) -> int: ...
    @property
    def pages(self) -> Sequence[int]: ...
    @property
    def saves(self) -> Sequence[int]: ...


class NativeModel:
    """The language model with packed weights: for one sequence with its cache, or for many in a pool, as the engine
    asks (`EngineModel`).
    """

    page_tokens = PAGE

    def __init__(self, config: Config, owners: Iterable[tuple[str, Packed]], kv_format: str = "bf16") -> None:
        """Takes the packed weights of all owners, in any order. kv_format: of keys and values, one of KV_FORMATS.

        Raises ValueError for a shape or a format that the kernels lack.
        """
        if kv_format not in KV_FORMATS:
            raise ValueError(f"unknown format of keys and values {kv_format!r}: {', '.join(KV_FORMATS)}")
        self.config, self.kv_format = config, kv_format
        skeleton = build_on_meta(config)
        self._rotary = RotaryTable(skeleton.frequencies, skeleton.rope_factor)
        packed = dict(owners)
        told = f"{weights_digest(config, packed)} {kv_format} {cpu.isa()} {NUMERICS}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()  # of what decides the bits of what is cached
        self.embedding = list(packed["model"].matrices.values())
        self.head = self.embedding if config.tie_word_embeddings else list(packed["lm_head"].matrices.values())
        self.norm = norm_weight(config, packed["model"].tensors["norm.weight"])
        self.layers = [DecoderLayer(config, packed[f"model.layers.{i}"]) for i in range(config.num_hidden_layers)]
        self.mtp = None
        if "mtp" in packed:
            self.mtp = MultiTokenPrediction(config, packed["mtp"], DecoderLayer(config, packed["mtp.layers.0"]))
        self.can_draft = self.mtp is not None
        self.thrifty_tokens = thrifty_tokens(config)
        self._pool = Pool(config, KV_FORMATS[kv_format], self.can_draft)
        self.page_bytes, self.state_bytes = self._pool.pages.block_bytes, self._pool.states.block_bytes

    @classmethod
    def pack(
        cls, config: Config, parameters: Iterable[tuple[str, Tensor]], format: str, kv_format: str = "bf16"
    ) -> Self:
        """Takes parameters, fp32 or bf16, as they come, and keeps none: an owner is packed once it is complete.

        format: of the large matrices, `bf16`, `int8` or `int4`. Raises ValueError for a shape that the kernels lack.
        """
        owners = complete_owners(build_on_meta(config), parameters)
        packed = ((owner, pack_owner(config, owner, weights, format)) for owner, weights in owners)
        return cls(config, packed, kv_format)

    # ---- one sequence --------------------------------------------------------------------------------------

    def new_cache(self, room: int = 0) -> NativeCache:
        """An empty cache for one sequence, with room for so many tokens; it grows beyond."""
        return NativeCache(self.config, KV_FORMATS[self.kv_format], room)

    def next_logits(self, tokens: Sequence[int], cache: NativeCache) -> Tensor:
        """Logits fp32 `[vocab]` after tokens that follow those in the cache, which is advanced."""
        hidden = torch.empty(0)
        for first in range(0, len(tokens), PREFILL_TOKENS):
            hidden = self.hidden_states(tokens[first : first + PREFILL_TOKENS], cache)
        return self.logits(hidden[-1:])[0]

    def hidden_states(self, tokens: Sequence[int], cache: NativeCache) -> Tensor:
        """What the head reads, fp32 `[T, D]`, for tokens that follow those in the cache."""
        end = cache.length + len(tokens)
        hidden = self._body(tokens, cache.pool, cache.next_batch(len(tokens), self._rotary.up_to(end)))
        cache.length = end
        return hidden

    def _body(self, tokens: Sequence[int], pool: Pool, batch: cpu.Batch) -> Tensor:
        residual = cpu.embed(self.embedding, tokens)
        for layer, memory in zip(self.layers, pool.layers, strict=False):  # drafting has a memory of its own
            layer(residual, memory, batch)
        return cpu.normalized(residual, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 `[T, vocab]` of hidden states `[T, D]`."""
        return cpu.linear_stacked(hidden, self.head)

    # ---- many sequences ------------------------------------------------------------------------------------

    def allocate(self, pages: int, slots: int) -> None:
        """Makes the memory, once. Raises MemoryError."""
        self._pool.grow(pages, slots)

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Hidden states after each token, fp32 `[T, D]`, span after span; the spans' memory advances."""
        return self._body(tokens_of(spans), self._pool, self._batch(spans))

    def draft(self, spans: Sequence[Span], hidden: Tensor) -> Tensor:
        """One step of multi-token prediction: hidden states `[T, D]` of its own, which may be its next input.

        The token at i of a span goes with the hidden state of the token before it, row i of `hidden` `[T, D]`;
        `past` counts from the second token of the sequence, as do the positions.
        """
        assert self.mtp is not None, "the configuration has no MTP module"
        memory, batch = self._pool.layers[-1], self._batch(spans)
        return self.mtp(self.embedding, tokens_of(spans), hidden, memory, batch)

    def follow(self, spans: Sequence[Span], hidden: Tensor) -> None:
        """As `draft`, where no token is guessed behind these: keys and values are all that it leaves."""
        assert self.mtp is not None, "the configuration has no MTP module"
        self.mtp.follow(self.embedding, tokens_of(spans), hidden, self._pool.layers[-1], self._batch(spans))

    def _batch(self, spans: Sequence[Span]) -> cpu.Batch:
        ends = [span.past + len(span.tokens) for span in spans]
        return cpu.batch(
            list(accumulate((len(span.tokens) for span in spans), initial=0)),
            slots=[span.slot for span in spans],
            past=[span.past for span in spans],
            pages=[span.pages for span in spans],
            rotation=self._rotary.up_to(max(ends)),
            saves=[span.saves for span in spans],
        )

    def clear_state(self, slot: int) -> None:
        """As before the first token."""
        self._pool.states.clear(slot)

    def copy_state(self, source: int, target: int) -> None:
        self._pool.states.copy(source, target)

    def copy_page(self, source: int, target: int) -> None:
        self._pool.pages.copy(source, target)

    def read_state(self, slot: int) -> Tensor:
        """A copy, uint8 `[state_bytes]`."""
        return self._pool.states.read(slot)

    def write_state(self, slot: int, state: Tensor) -> None:
        """Takes what `read_state` gave. Raises ValueError for another size."""
        self._pool.states.write(slot, state)

    def read_page(self, page: int) -> Tensor:
        """A copy, uint8 `[page_bytes]`."""
        return self._pool.pages.read(page)

    def write_page(self, page: int, content: Tensor) -> None:
        """Takes what `read_page` gave. Raises ValueError for another size."""
        self._pool.pages.write(page, content)

    # ---- sizes ---------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of the embedding and of packed weights."""
        vocabulary = {id(part): part for part in (*self.embedding, *self.head)}
        packed = sum(layer.packed.nbytes() for layer in self.layers) + (self.mtp.nbytes if self.mtp else 0)
        return sum(part.nbytes for part in vocabulary.values()) + packed

    def bytes_per_token(self) -> int:
        """Bytes of packed weights that one token reads, without drafting."""
        head = sum(part.nbytes for part in self.head)
        return head + sum(layer.bytes_per_token() for layer in self.layers)

    def memory_bytes_per_token(self, context: int) -> int:
        """Bytes that a token after so many reads and writes of what the model remembers: states both ways, and keys and
        values (of drafting too, where it could).
        """
        return 2 * self.state_bytes + context * self.page_bytes // PAGE


def tokens_of(spans: Sequence[Span]) -> list[int]:
    """Span after span."""
    return list(chain.from_iterable(span.tokens for span in spans))


def norm_weight(config: Config, weight: Tensor) -> cpu.NormWeight:
    """The weight of one of the architecture's norms."""
    return cpu.norm_weight(weight, config.rms_norm_eps, zero_centered=isinstance(config, Qwen3NextConfig))


def load_native(
    path_or_name: str | Path, format: str | None = None, kv_format: str = "bf16"
) -> tuple[NativeModel, Tokenizer | None]:
    """A model, packed while it is read or packed already, and its tokenizer where there is one.

    path_or_name: as for `weights.load`, or a folder of `tenfold quantize`, which is read as it is. format: of the large
    matrices; without it bf16, or the packed file's own. In memory, while packing: the packed model, and a layer or two
    as they are in the files. Raises ValueError or OSError, in one line, where the checkpoint cannot be read or is too
    large for the memory, or the kernels cannot run.
    """
    cpu.require()
    path = resolve_path(path_or_name)
    model = (
        _read_packed(path, format, kv_format)
        if is_packed(path)
        else _pack_checkpoint(path, format or "bf16", kv_format)
    )
    return model, load_tokenizer(path)


def _read_packed(folder: Path, format: str | None, kv_format: str) -> NativeModel:
    file = open_packed(folder)
    if format not in (None, file.format):
        raise ValueError(
            f"{folder}: packed as {file.format}, not {format}; leave out --quantization, or quantize again"
        )
    smaller = cpu.FORMATS[cpu.FORMATS.index(file.format) + 1 :]
    skeleton = build_on_meta(file.config)
    require_room(folder, file.size, {f"quantize --to {x}": planned_bytes(skeleton, x) for x in smaller})
    return NativeModel(file.config, read_owners(file, progress=True), kv_format)


def _pack_checkpoint(path: Path, format: str, kv_format: str) -> NativeModel:
    checkpoint = open_checkpoint(path)
    dtype = packing_dtype(checkpoint)
    skeleton = build_on_meta(checkpoint.config)
    if format in cpu.FORMATS:
        smaller = smaller_formats(skeleton, dtype.itemsize, format)
        require_room(path, packing_bytes(skeleton, format, dtype.itemsize), smaller)
    parameters = read_parameters(checkpoint, dtype, progress=True, names=owner_by_owner(skeleton))
    return NativeModel.pack(checkpoint.config, parameters, format, kv_format)
