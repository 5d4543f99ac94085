"""Analytic cost of a token: the products that a forward pass multiplies and adds, counted from a configuration.

One multiply-add is two FLOPs. Counted: projections, attention (each query over the keys it sees), the chunked gated
delta rule, the conv, router, experts, MTP and the output head. Not counted: norms, activations, softmax, sampling,
the embedding's look-up. A backward pass costs twice the forward one.
"""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.models.cache import FULL_ATTENTION
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.ops.gated_delta_rule import CHUNK

BACKWARD = 2.0  # times the forward pass: one product for the input's gradient, one for the weight's


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of one token's forward pass, by part."""

    projections: float = 0.0  # of attention and Gated DeltaNet
    attention: float = 0.0  # scores and weighted values
    recurrence: float = 0.0  # gated delta rule and conv
    feed_forward: float = 0.0  # dense ones, experts and router
    mtp: float = 0.0
    head: float = 0.0

    @property
    def layers(self) -> float:
        """Everything that recomputation would do again."""
        return self.projections + self.attention + self.recurrence + self.feed_forward

    @property
    def total(self) -> float:
        """Body, MTP and head."""
        return self.layers + self.mtp + self.head


def mean_context(sequence_length: int) -> float:
    """Keys that a token of a sequence sees on average, itself included."""
    return (sequence_length + 1) / 2


def forward_flops(config: Qwen3NextConfig | Qwen3Config, context: float, mtp_steps: int = 0) -> ForwardFlops:
    """Mean cost of a token whose attention sees `context` keys on average."""
    kinds, hidden = config.layer_kinds, config.hidden_size
    attending = [kind == FULL_ATTENTION for kind in kinds]
    feed_forward = sum(_feed_forward(config, config.is_sparse(i)) for i in range(len(kinds)))
    projections = sum(
        _attention_projections(config) if attends else _delta_projections(config) for attends in attending
    )
    head = 2.0 * hidden * config.vocab_size
    mtp_layer = 4.0 * hidden * hidden + _attention_projections(config) + _scores(config, context) + head
    if mtp_steps:
        assert isinstance(config, Qwen3NextConfig)
        mtp_layer += _feed_forward(config, config.num_experts > 0)
    return ForwardFlops(
        projections=projections,
        attention=sum(attending) * _scores(config, context),
        recurrence=sum(_recurrence(config) for attends in attending if not attends),
        feed_forward=feed_forward,
        mtp=mtp_steps * mtp_layer,
        head=head,
    )


def training_flops(
    config: Qwen3NextConfig | Qwen3Config,
    context: float,
    mtp_steps: int = 0,
    recompute: bool = False,
    counting_pass: bool = False,
) -> float:
    """FLOPs of a trained token: forward, backward, what recomputation does again, and the pass over layers that counts
    the router's choices before the first of several micro-batches."""
    forward = forward_flops(config, context, mtp_steps)
    counting = forward.layers + forward.mtp - mtp_steps * forward.head
    return forward.total * (1.0 + BACKWARD) + forward.layers * recompute + counting * counting_pass


def _attention_projections(config: Qwen3NextConfig | Qwen3Config) -> float:
    gates = 1 if isinstance(config, Qwen3NextConfig) else 0
    heads = (2 + gates) * config.num_attention_heads + 2 * config.num_key_value_heads
    return 2.0 * config.hidden_size * config.head_dim * heads


def _scores(config: Qwen3NextConfig | Qwen3Config, context: float) -> float:
    return 4.0 * config.num_attention_heads * config.head_dim * context


def _delta_projections(config: Qwen3NextConfig | Qwen3Config) -> float:
    assert isinstance(config, Qwen3NextConfig)
    values = config.linear_num_value_heads * config.linear_value_head_dim
    outputs = config.conv_channels + values + 2 * config.linear_num_value_heads
    return 2.0 * config.hidden_size * (outputs + values)


def _recurrence(config: Qwen3NextConfig | Qwen3Config) -> float:
    """The chunked form: q k^T and k k^T per key head; per value head the solve, two chunk products, three of states."""
    assert isinstance(config, Qwen3NextConfig)
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    per_key_head = 4.0 * CHUNK * keys
    per_value_head = CHUNK * CHUNK / 3 + 4.0 * CHUNK * values + 6.0 * keys * values
    conv = 2.0 * config.linear_conv_kernel_dim * config.conv_channels
    return config.linear_num_key_heads * per_key_head + config.linear_num_value_heads * per_value_head + conv


def _feed_forward(config: Qwen3NextConfig | Qwen3Config, sparse: bool) -> float:
    if not sparse:
        return 6.0 * config.hidden_size * config.intermediate_size
    assert isinstance(config, Qwen3NextConfig)
    width = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    return config.hidden_size * (6.0 * width + 2.0 * config.num_experts + 2.0)
