"""Qwen3-Next: Gated DeltaNet and gated attention over sparse experts, with multi-token prediction.

Read from the bottom of the model up: norm, the two mixers, the two feed-forwards, a layer, the trunk, the head.
Parameter names are Hugging Face's; experts are stacked to `[E, ...]`. Source: the model `qwen3_next` of transformers
and the published configurations of Qwen3-Next-80B-A3B.

Shape letters: B batch, T tokens, D hidden, H query/key heads, HV value heads, G key/value heads of attention, K head
dim (key dim), V value dim, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tenfold.models.cache import FULL_ATTENTION, LINEAR_ATTENTION, AttentionMemory, Cache, RecurrentMemory
from tenfold.models.hf_config import check_fields, hf_fields, known_fields
from tenfold.models.init import init_tensor
from tenfold.models.rope import inverse_frequencies
from tenfold.ops.attention import attention
from tenfold.ops.causal_conv import causal_conv1d
from tenfold.ops.gated_delta_rule import gated_delta_rule
from tenfold.ops.linear import swiglu
from tenfold.ops.moe import RouterLoad, route, sparse_experts
from tenfold.ops.norm import gated_rms_norm, l2_norm, rms_norm
from tenfold.ops.rotary import rotary, rotary_table
from tenfold.ops.sequences import last_tokens, positions, sequence_bounds

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig:
    """Hugging Face's fields under their names; the defaults are Qwen3-Next-80B-A3B."""

    model_type: Literal["qwen3_next"] = "qwen3_next"
    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    max_position_embeddings: int = 262_144
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000_000.0
    partial_rotary_factor: float = 0.25
    rope_scaling: dict[str, object] | None = None
    full_attention_interval: int = 4
    layer_types: tuple[str, ...] = ()  # of each layer; without it every `full_attention_interval`th one attends
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 512
    num_experts_per_tok: int = 10
    norm_topk_prob: bool = True
    num_nextn_predict_layers: int = 0  # MTP modules: 0 or 1
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    hidden_act: str = field(default="silu", repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        experts, chosen = self.num_experts, self.num_experts_per_tok
        queries, keys = self.num_attention_heads, self.num_key_value_heads
        value_heads, key_heads = self.linear_num_value_heads, self.linear_num_key_heads
        kinds, layers, mtp = self.layer_types, self.num_hidden_layers, self.num_nextn_predict_layers
        wrong = (
            (self.hidden_act != "silu", f"hidden_act {self.hidden_act!r} is not 'silu'"),
            (kinds and len(kinds) != layers, f"layer_types has {len(kinds)} entries for {layers} layers"),
            (
                not {LINEAR_ATTENTION, FULL_ATTENTION}.issuperset(kinds),
                f"layer_types must be {LINEAR_ATTENTION!r} or {FULL_ATTENTION!r}",
            ),
            (self.full_attention_interval < 1, "full_attention_interval must be 1 at least"),
            (
                keys < 1 or queries % keys,
                f"num_attention_heads {queries} is no multiple of num_key_value_heads {keys}",
            ),
            (
                key_heads < 1 or value_heads % key_heads,
                f"linear_num_value_heads {value_heads} is no multiple of linear_num_key_heads {key_heads}",
            ),
            (0 < experts < chosen, f"num_experts_per_tok {chosen} exceeds num_experts {experts}"),
            (mtp not in (0, 1), f"num_nextn_predict_layers {mtp} is not 0 or 1"),
        )
        for present, problem in wrong:
            if present:
                raise ValueError(f"Qwen3-Next configuration: {problem}")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Each layer's mixer: LINEAR_ATTENTION or FULL_ATTENTION."""
        if self.layer_types:
            return self.layer_types
        every = self.full_attention_interval
        kinds = (LINEAR_ATTENTION, FULL_ATTENTION)
        return tuple(kinds[(i + 1) % every == 0] for i in range(self.num_hidden_layers))

    @classmethod
    def from_hf(cls, values: Mapping[str, object]) -> Qwen3NextConfig:
        """From the object in a `config.json`, as transformers 4 or 5 writes it; unknown fields are left out."""
        config = cls(**known_fields(cls, values))
        regular = replace(config, layer_types=())
        return regular if regular.layer_kinds == config.layer_kinds else config

    def to_hf(self) -> dict[str, object]:
        """The object for a `config.json` that transformers 4 and 5 both read."""
        return hf_fields(replace(self, layer_types=self.layer_kinds), "Qwen3NextForCausalLM")

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's feed-forward is experts."""
        sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse and layer not in self.mlp_only_layers

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a Gated DeltaNet layer's conv state `[C, W-1]` and recurrent state `[HV, V, K]`, per sequence."""
        recurrent = (self.linear_num_value_heads, self.linear_value_head_dim, self.linear_key_head_dim)
        return (self.conv_channels, self.linear_conv_kernel_dim - 1), recurrent

    @property
    def conv_channels(self) -> int:
        """Channels of the conv: queries, keys and values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm that multiplies by `1 + weight`, so that weight decay pulls it to the identity."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, zero_centered=True)


class GatedRMSNorm(nn.Module):
    """RMSNorm, then `silu(gate)`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)


class GatedAttention(nn.Module):
    """Softmax attention whose output passes a sigmoid gate; partial RoPE, normalised queries and keys."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, 2 * queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: Rotation, memory: AttentionMemory | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
        k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        q, k = rotary(self.q_norm(q), *rotation), rotary(self.k_norm(k), *rotation)
        if memory is not None:
            k, v = memory.append(k, v)
        return self.o_proj((attention(q, k, v, cu_seqlens) * torch.sigmoid(gate)).flatten(-2))


class GatedDeltaNet(nn.Module):
    """Linear attention: a short conv, the gated delta rule, and a gated norm. Its memory does not grow."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        values, channels = self.value_heads * self.value_dim, config.conv_channels
        self.in_proj_qkvz = nn.Linear(config.hidden_size, channels + values, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(self, x: Tensor, memory: RecurrentMemory | None, cu_seqlens: Tensor | None) -> Tensor:
        mixed, z, b, a = self._project(x)
        conv_state, state = (None, None) if memory is None else (memory.conv, memory.recurrent)
        mixed, conv_state = causal_conv1d(mixed, self.conv1d.weight[:, 0], conv_state, cu_seqlens)
        keys = self.key_heads * self.key_dim
        q, k, v = mixed.split((keys, keys, self.value_heads * self.value_dim), -1)
        q, k = (l2_norm(y.unflatten(-1, (self.key_heads, self.key_dim))) for y in (q, k))
        v = v.unflatten(-1, (self.value_heads, self.value_dim))
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        o, state = gated_delta_rule(q, k, v, g, b.float().sigmoid(), state, cu_seqlens)
        if memory is not None:
            memory.conv, memory.recurrent = conv_state.float(), state
        return self.out_proj(self.norm(o, z).flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The conv's input `[B, T, C]`, z `[B, T, HV, V]`, b and a `[B, T, HV]`, no longer interleaved by key head."""
        shared = self.value_heads // self.key_heads
        values = shared * self.value_dim
        qkvz = self.in_proj_qkvz(x).unflatten(-1, (self.key_heads, -1))
        q, k, v, z = qkvz.split((self.key_dim, self.key_dim, values, values), -1)
        b, a = self.in_proj_ba(x).unflatten(-1, (self.key_heads, -1)).split((shared, shared), -1)
        mixed = torch.cat((q.flatten(-2), k.flatten(-2), v.flatten(-2)), -1)
        return mixed, z.reshape(*x.shape[:-1], self.value_heads, self.value_dim), b.flatten(-2), a.flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """The stacked weights of all experts; gate rows first, then up rows."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return sparse_experts(x, weights, chosen, self.gate_up_proj, self.down_proj)


class SparseMoE(nn.Module):
    """k of E experts for each token, and one shared expert behind its own gate for all."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, RouterLoad]:
        tokens = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # the router decides in full precision
            logits = F.linear(tokens.to(self.gate.weight.dtype), self.gate.weight)
        weights, chosen, load = route(logits, self.k, self.normalize)
        shared = torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return (self.experts(tokens, weights, chosen) + shared).view_as(x), load


class DecoderLayer(nn.Module):
    """A mixer over tokens, then a feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: Qwen3NextConfig, kind: str, sparse: bool) -> None:
        super().__init__()
        self.recurs = kind == LINEAR_ATTENTION
        self.input_layernorm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.recurs:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = SparseMoE(config) if sparse else FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        memory: AttentionMemory | RecurrentMemory | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, RouterLoad | None]:
        normed = self.input_layernorm(x)
        if self.recurs:
            assert memory is None or isinstance(memory, RecurrentMemory)
            x = x + self.linear_attn(normed, memory, cu_seqlens)
        else:
            assert memory is None or isinstance(memory, AttentionMemory)
            x = x + self.self_attn(normed, rotation, memory, cu_seqlens)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SparseMoE):
            out, load = self.mlp(normed)
            return x + out, load
        return x + self.mlp(normed), None


class Trunk(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)  # unlike others it draws no numbers
        self.layers = nn.ModuleList(
            DecoderLayer(config, kind, config.is_sparse(i)) for i, kind in enumerate(config.layer_kinds)
        )
        self.norm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)


class MultiTokenPrediction(nn.Module):
    """From the hidden state at t and the embedding of token t+1, a hidden state that predicts token t+2.

    Fed its own output and the next embedding it looks one token further each time.
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config, FULL_ATTENTION, config.num_experts > 0)])
        self.norm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embedding: Tensor, hidden: Tensor, rotation: Rotation, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, RouterLoad | None]:
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)), -1))
        x, load = self.layers[0](x, rotation, None, cu_seqlens)
        return self.norm(x), load


class Qwen3Next(nn.Module):
    """The language model. `model(input_ids)` gives logits; the trainer takes hidden states and makes its own loss."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # drop a layer's activations in training and make them again in the backward pass
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MultiTokenPrediction(config) if config.num_nextn_predict_layers else None
        rotated = int(config.head_dim * config.partial_rotary_factor)
        self.frequencies, self.rope_factor = inverse_frequencies(config.rope_theta, rotated, config.rope_scaling)

    def forward(self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits fp32 `[B, T, vocab]` of int64 `[B, T]` tokens.

        With a cache the tokens follow those it has seen, and it is advanced. cu_seqlens packs several documents into
        the batch (see `ops.sequences`). Raises ValueError where the input is no such tensor.
        """
        hidden, _ = self.hidden_states(input_ids, cache, cu_seqlens)
        return F.linear(hidden, self.output_weight).float()

    def hidden_states(
        self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[RouterLoad]]:
        """What the head reads, `[B, T, D]`, and the load of each sparse layer."""
        check_input(input_ids, self.config.vocab_size, cache, cu_seqlens)
        rotation = self.rotation(input_ids, cache, cu_seqlens)
        x, loads = self.model.embed_tokens(input_ids), []
        for i, layer in enumerate(self.model.layers):
            memory = None if cache is None else cache.layers[i]
            if self.recompute and torch.is_grad_enabled():
                x, load = checkpoint(layer, x, rotation, memory, cu_seqlens, use_reentrant=False)
            else:
                x, load = layer(x, rotation, memory, cu_seqlens)
            loads += [load] if load is not None else []
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.model.norm(x), loads

    def new_cache(self) -> Cache:
        """An empty cache for one sequence, of the head's dtype and device."""
        return Cache(self.config, 1, self.output_weight.dtype, self.output_weight.device)

    def next_logits(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """Logits `[vocab]` after tokens that follow those in the cache; the head runs on the last one alone."""
        hidden, _ = self.hidden_states(torch.tensor([tokens], device=self.output_weight.device), cache)
        return F.linear(hidden[0, -1], self.output_weight)

    def draft_states(
        self, input_ids: Tensor, hidden: Tensor, steps: int, cu_seqlens: Tensor | None = None
    ) -> list[tuple[Tensor, RouterLoad | None]]:
        """MTP applied `steps` times: the s-th state `[B, T, D]` at t predicts token t + s + 1.

        The last s states of a sequence don't count; they read its last token, so that nothing depends on what follows.
        """
        assert self.mtp is not None, "the configuration has no MTP module"
        rotation = self.rotation(input_ids, None, cu_seqlens)
        last = last_tokens(sequence_bounds(cu_seqlens, *input_ids.shape), input_ids.device)
        places = torch.arange(input_ids.numel(), device=input_ids.device)
        states = []
        for step in range(1, steps + 1):
            ahead = input_ids.flatten()[torch.minimum(places + step, last)].view_as(input_ids)
            hidden, load = self.mtp(self.model.embed_tokens(ahead), hidden, rotation, cu_seqlens)
            states.append((hidden, load))
        return states

    def rotation(self, input_ids: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Rotation:
        """cos and sin for each token's position in its own sequence."""
        batch, length = input_ids.shape
        at = positions(sequence_bounds(cu_seqlens, batch, length), input_ids.device).view(batch, length)
        return rotary_table(at + (0 if cache is None else cache.length), self.frequencies, self.rope_factor)

    @property
    def output_weight(self) -> Tensor:
        """The head's matrix `[vocab, D]`."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights, the same for the same generator state (see `models.init`)."""
        for name, parameter in self.named_parameters():
            parameter.copy_(init_tensor(name, parameter.shape, generator, self.config.initializer_range))


def check_input(input_ids: Tensor, vocab_size: int, cache: Cache | None, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError unless input_ids are int64 `[B, T]` tokens of the vocabulary."""
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
        raise ValueError(
            f"input_ids must be int64 [batch, tokens] and not empty, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    low, high = input_ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids must lie in 0..{vocab_size - 1}, got {int(low)}..{int(high)}")
    if cache is not None and cu_seqlens is not None:
        raise ValueError("packed sequences (cu_seqlens) and a cache exclude each other: give one")
