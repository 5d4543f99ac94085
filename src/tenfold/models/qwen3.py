"""Qwen3, the dense predecessor: softmax attention and one feed-forward in every layer.

Parameter names are Hugging Face's. Shape letters as in `qwen3_next`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tenfold.models.cache import FULL_ATTENTION, AttentionMemory, Cache
from tenfold.models.hf_config import check_fields, hf_fields, known_fields
from tenfold.models.init import init_tensor
from tenfold.models.qwen3_next import FeedForward, Rotation, check_input
from tenfold.models.rope import inverse_frequencies
from tenfold.ops.attention import attention
from tenfold.ops.moe import RouterLoad
from tenfold.ops.norm import rms_norm
from tenfold.ops.rotary import rotary, rotary_table
from tenfold.ops.sequences import positions, sequence_bounds


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Hugging Face's fields under their names; the defaults are Qwen3-32B."""

    model_type: Literal["qwen3"] = "qwen3"
    vocab_size: int = 151_936
    hidden_size: int = 5120
    intermediate_size: int = 25_600
    num_hidden_layers: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 40_960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 1_000_000.0
    rope_scaling: dict[str, object] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    hidden_act: str = field(default="silu", repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_act != "silu":
            raise ValueError(f"Qwen3 configuration: hidden_act {self.hidden_act!r} is not 'silu'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"Qwen3 configuration: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, object]) -> Qwen3Config:
        """From the object in a `config.json`; sliding windows, which no released model uses, are refused."""
        if values.get("use_sliding_window"):
            raise ValueError("config.json: use_sliding_window true is not supported, expected false")
        return cls(**known_fields(cls, values))

    def to_hf(self) -> dict[str, object]:
        """The object for a `config.json` that transformers 4 and 5 both read."""
        return hf_fields(self, "Qwen3ForCausalLM")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Every layer attends."""
        return (FULL_ATTENTION,) * self.num_hidden_layers

    def is_sparse(self, layer: int) -> bool:
        """No layer has experts."""
        return False

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Nothing recurs."""
        raise AssertionError("Qwen3 has no recurrent layers")


class RMSNorm(nn.Module):
    """RMSNorm with a plain weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Softmax attention with normalised queries and keys, RoPE over the whole head."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: Rotation, memory: AttentionMemory | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary(self.q_norm(q), *rotation), rotary(self.k_norm(k), *rotation)
        if memory is not None:
            k, v = memory.append(k, v)
        return self.o_proj(attention(q, k, v, cu_seqlens).flatten(-2))


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rotation: Rotation, memory: AttentionMemory | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, memory, cu_seqlens)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)  # unlike others it draws no numbers
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """The language model, with the same face as `Qwen3Next`."""

    mtp = None

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies, self.rope_factor = inverse_frequencies(
            config.rope_theta, config.head_dim, config.rope_scaling
        )

    def forward(self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits fp32 `[B, T, vocab]` of int64 `[B, T]` tokens; cache and cu_seqlens as in `Qwen3Next`."""
        hidden, _ = self.hidden_states(input_ids, cache, cu_seqlens)
        return F.linear(hidden, self.output_weight).float()

    def hidden_states(
        self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[RouterLoad]]:
        """What the head reads, `[B, T, D]`; the list of router loads is empty."""
        check_input(input_ids, self.config.vocab_size, cache, cu_seqlens)
        batch, length = input_ids.shape
        at = positions(sequence_bounds(cu_seqlens, batch, length), input_ids.device).view(batch, length)
        rotation = rotary_table(at + (0 if cache is None else cache.length), self.frequencies, self.rope_factor)
        x = self.model.embed_tokens(input_ids)
        for i, layer in enumerate(self.model.layers):
            memory = None if cache is None else cache.layers[i]
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, memory, cu_seqlens, use_reentrant=False)
            else:
                x = layer(x, rotation, memory, cu_seqlens)
        if cache is not None:
            cache.length += length
        return self.model.norm(x), []

    def new_cache(self) -> Cache:
        """An empty cache for one sequence, of the head's dtype and device."""
        return Cache(self.config, 1, self.output_weight.dtype, self.output_weight.device)

    def next_logits(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """Logits `[vocab]` after tokens that follow those in the cache; the head runs on the last one alone."""
        hidden, _ = self.hidden_states(torch.tensor([tokens], device=self.output_weight.device), cache)
        return F.linear(hidden[0, -1], self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """The head's matrix `[vocab, D]`."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, the same for the same generator state (see `models.init`)."""
        for name, parameter in self.named_parameters():
            std = self.config.initializer_range
            parameter.copy_(init_tensor(name, parameter.shape, generator, std, zero_centered=False))
