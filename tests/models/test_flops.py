"""What counting FLOPs promises: the published ratios, and the products that torch itself counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tenfold.models.flops import forward_flops, mean_context, training_flops
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tenfold.ops.gated_delta_rule import CHUNK

LENGTH = 128  # two chunks of the delta rule, so that nothing is padded
DENSE = Qwen3Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
SPARSE = Qwen3NextConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
)
ATTENTION_ONLY = replace(SPARSE, full_attention_interval=1)


def counted(model: Qwen3 | Qwen3Next, backward: bool = False) -> float:
    """FLOPs of a token that torch counts, attention written out: every token with all others, masked or not."""
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, 96, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(ids)
        if backward:
            out.sum().backward()
    return counter.get_total_flops() / LENGTH


@pytest.mark.parametrize(("length", "ratio"), [(4096, 8.9), (32_768, 9.3), (262_144, 10.2)])
def test_a_token_of_the_dense_predecessor_costs_what_is_published(length: int, ratio: float) -> None:
    old, new = (training_flops(config, mean_context(length)) for config in (Qwen3Config(), Qwen3NextConfig()))
    assert old / new == pytest.approx(ratio, abs=0.05)


def test_three_billion_parameters_are_active() -> None:
    products = replace(forward_flops(Qwen3NextConfig(), context=0), recurrence=0.0).total / 2
    assert products + 2048 * 151_936 == pytest.approx(
        3.9e9, rel=0.02
    )  # with the embedding; 3.3 without it and the head


@pytest.mark.parametrize("config", [DENSE, ATTENTION_ONLY], ids=["qwen3", "qwen3_next"])
def test_products_are_those_that_torch_counts(config: Qwen3Config | Qwen3NextConfig) -> None:
    model = Qwen3(config) if isinstance(config, Qwen3Config) else Qwen3Next(config)
    assert counted(model) == forward_flops(config, LENGTH).total
    assert counted(model, backward=True) == training_flops(config, LENGTH)


def test_the_delta_rule_takes_the_products_that_torch_counts() -> None:
    solve, conv = 4 * CHUNK**2 / 3, 2 * SPARSE.linear_conv_kernel_dim * SPARSE.conv_channels
    uncounted = SPARSE.layer_kinds.count("linear_attention") * (solve + conv)  # torch counts no solves, nor our conv
    assert counted(Qwen3Next(SPARSE)) + uncounted == pytest.approx(forward_flops(SPARSE, LENGTH).total)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["qwen3", "qwen3_next"])
def test_what_is_done_again_is_counted_again(config: Qwen3Config | Qwen3NextConfig) -> None:
    once, flops = training_flops(config, 50), forward_flops(config, 50)
    assert training_flops(config, 50, recompute=True) == once + flops.layers
    assert training_flops(config, 50, counting_pass=True) == once + flops.layers


def test_each_step_of_multi_token_prediction_costs_a_layer_and_a_head() -> None:
    config = replace(SPARSE, num_nextn_predict_layers=1)
    plain, one, two = (forward_flops(config, 50, steps) for steps in (0, 1, 2))
    layer = forward_flops(replace(config, num_hidden_layers=1, full_attention_interval=1), 50)
    assert plain.mtp == 0.0 and two.mtp == 2 * one.mtp
    assert one.mtp == layer.layers + layer.head + 4 * config.hidden_size**2
