"""Gated DeltaNet as one kernel: right against float64, and the same bits however a sequence is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cpu
from tenfold.ops.causal_conv import naive_causal_conv1d
from tenfold.ops.gated_delta_rule import naive_gated_delta_rule
from tenfold.ops.norm import naive_l2_norm, naive_rms_norm

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

EPS = 1e-6
# Of the largest output: sums of 128 products in fp32, their error carried along by states that decay slowly.
TOLERANCE = 2e-5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Layer:
    """A Gated DeltaNet's shape, and weights drawn for it."""

    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 32
    value_dim: int = 16
    width: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads = self.value_heads
        conv = normal(self.channels, self.width, seed=1) / 2
        return conv, normal(heads, seed=2), normal(heads, seed=3) - 2, 1 + normal(self.value_dim, seed=4) / 4

    def weights(self) -> cpu.DeltaNetWeights:
        return cpu.delta_net_weights(*self.parameters(), self.key_heads, EPS)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        return normal(tokens, self.channels + self.values, seed=5), normal(tokens, 2 * self.value_heads, seed=6)

    def states(self, slots: int) -> tuple[Tensor, Tensor]:
        recurrent = normal(slots, self.value_heads, self.value_dim, self.key_dim, seed=8) / 8
        return normal(slots, self.channels, self.width - 1, seed=7), recurrent


LAYERS = [
    Layer(key_heads=1, value_heads=2, key_dim=128, value_dim=128),
    Layer(),
    Layer(key_heads=3, value_heads=3, key_dim=48, value_dim=80, width=2),
    Layer(key_heads=1, value_heads=4, key_dim=16, value_dim=16, width=8),
    Layer(width=1),
]


def run(layer: Layer, inputs: Sequence[Tensor], states: Sequence[Tensor], slot: int = 0) -> Tensor:
    """One sequence in one call; its state in the slot advances."""
    batch = cpu.batch([0, len(inputs[0])], [slot])
    (qkvz, ba), (conv, recurrent) = inputs, states
    return cpu.gated_delta_net(qkvz, ba, layer.weights(), cpu.recurrent_states(conv, recurrent), batch)


def expected(layer: Layer, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final states of one sequence, by the definitions in float64."""
    qkvz, ba = (x.double() for x in inputs)
    conv_weight, A_log, dt_bias, norm_weight = (x.double() for x in layer.parameters())
    keys, shared = layer.key_dim, layer.value_heads // layer.key_heads
    sizes = (keys, keys, shared * layer.value_dim, shared * layer.value_dim)
    q, k, v, z = qkvz.unflatten(-1, (layer.key_heads, -1)).split(sizes, -1)
    b, a = (x.flatten(-2) for x in ba.unflatten(-1, (layer.key_heads, -1)).chunk(2, -1))
    mixed = torch.cat([x.flatten(-2) for x in (q, k, v)], -1)[None]
    mixed, conv = naive_causal_conv1d(mixed, conv_weight, states[0].double())
    q, k, v = mixed.split((layer.key_heads * keys, layer.key_heads * keys, layer.values), -1)
    q, k = (naive_l2_norm(x.unflatten(-1, (layer.key_heads, keys))) for x in (q, k))
    v = v.unflatten(-1, (layer.value_heads, layer.value_dim))
    g = -A_log.exp() * F.softplus(a + dt_bias)
    o, recurrent = naive_gated_delta_rule(q, k, v, g[None], b.sigmoid()[None], states[1].double())
    y = naive_rms_norm(o[0], norm_weight, EPS) * F.silu(z.reshape(o[0].shape))
    return y.flatten(-2), conv, recurrent


def close(got: Tensor, right: Tensor) -> bool:
    return bool((got - right).abs().max() <= TOLERANCE * right.abs().max()) if right.numel() else True


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 65, 500])
def test_output_and_states_are_near_float64(isa: str, layer: Layer, tokens: int) -> None:
    if tokens == 500 and layer is LAYERS[0]:
        tokens = 130  # the definition takes its time
    inputs, states = layer.inputs(tokens), layer.states(1)
    y, conv, recurrent = expected(layer, inputs, states)
    assert close(run(layer, inputs, states), y)
    assert torch.equal(states[0].double(), conv)
    assert close(states[1], recurrent)


@pytest.mark.parametrize("layer", LAYERS[:3], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_sequence_has_the_same_bits_however_it_is_cut(isa: str, layer: Layer, threads: int) -> None:
    tokens = 70
    inputs, whole = layer.inputs(tokens), layer.states(1)
    cpu.set_threads(1)
    y = run(layer, inputs, whole)
    cpu.set_threads(threads)
    for sizes in ([tokens], [1] * tokens, [3, 16, 1, 50], [17, 53]):
        states = layer.states(1)
        pieces = zip(*(x.split(sizes) for x in inputs), strict=True)
        assert torch.equal(torch.cat([run(layer, piece, states) for piece in pieces]), y)
        assert all(torch.equal(a, b) for a, b in zip(states, whole, strict=True))


def test_company_and_slots_do_not_matter(isa: str) -> None:
    layer, lengths, slots = LAYERS[0], [5, 1, 33, 1], [4, 0, 3, 1]
    inputs, together, alone = layer.inputs(sum(lengths)), layer.states(6), layer.states(6)
    cpu.set_threads(2)
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    y = cpu.gated_delta_net(*inputs, layer.weights(), cpu.recurrent_states(*together), cpu.batch(bounds, slots))
    pieces = zip(*(x.split(lengths) for x in inputs), slots, strict=True)
    assert torch.equal(torch.cat([run(layer, piece, alone, slot) for *piece, slot in pieces]), y)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert all(torch.equal(a[[2, 5]], b[[2, 5]]) for a, b in zip(together, layer.states(6), strict=True))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_states_are_saved_after_each_of_the_last_tokens(isa: str, layer: Layer, threads: int) -> None:
    cpu.set_threads(threads)
    inputs, states, right = layer.inputs(22), layer.states(9), layer.states(9)
    batch = cpu.batch([0, 1, 20, 22], [4, 0, 3], saves=[[4], [8, 1, 6, 7, 2], []])  # 4 is that sequence's own
    y = cpu.gated_delta_net(*inputs, layer.weights(), cpu.recurrent_states(*states), batch)
    alone = [run(layer, [x[:1] for x in inputs], right, 4)]
    for first, last, slot in [(1, 16, 8), (16, 17, 1), (17, 18, 6), (18, 19, 7), (19, 20, 2)]:
        alone.append(run(layer, [x[first:last] for x in inputs], right, 0))
        for array in right:
            array[slot] = array[0]
    alone.append(run(layer, [x[20:] for x in inputs], right, 3))
    assert torch.equal(torch.cat(alone), y)
    assert all(torch.equal(a, b) for a, b in zip(states, right, strict=True))


def test_rows_may_be_far_apart(isa: str) -> None:
    layer, inputs = LAYERS[1], LAYERS[1].inputs(9)
    wide = [torch.cat((x, x), 1)[:, : x.shape[1]] for x in inputs]
    assert not wide[0].is_contiguous()
    assert torch.equal(run(layer, wide, layer.states(1)), run(layer, inputs, layer.states(1)))


def test_a_bad_token_spoils_its_own_sequence_alone(isa: str) -> None:
    layer, lengths = LAYERS[1], [4, 4]
    inputs, states = layer.inputs(8), layer.states(2)
    right = run(layer, [x[4:] for x in inputs], layer.states(2), 1)
    inputs[0][2] = float("nan")
    y = cpu.gated_delta_net(*inputs, layer.weights(), cpu.recurrent_states(*states), cpu.batch([0, 4, 8], [0, 1]))
    assert y[2:4].isnan().all() and not y[:2].isnan().any()
    assert torch.equal(y[4:], right) and sum(lengths) == len(y)


def test_extreme_gates_stay_finite(isa: str) -> None:
    layer = LAYERS[1]
    for value in (-200.0, 200.0):
        inputs, states = layer.inputs(3), layer.states(1)
        inputs[1].fill_(value)
        y, _, _ = expected(layer, inputs, states)
        assert close(run(layer, inputs, states), y)


def test_nothing_to_do(isa: str) -> None:
    layer = LAYERS[1]
    weights, states = layer.weights(), cpu.recurrent_states(*layer.states(1))
    assert cpu.gated_delta_net(*layer.inputs(0), weights, states, cpu.batch([0], [])).shape == (
        0,
        layer.values,
    )


def test_bad_arguments_are_refused() -> None:
    layer, other = LAYERS[1], LAYERS[2]
    inputs, weights, states = layer.inputs(3), layer.weights(), cpu.recurrent_states(*layer.states(2))
    batch = cpu.batch([0, 2, 3], [1, 0])
    refusals = [
        (
            "qkvz must be float32",
            lambda: cpu.gated_delta_net(inputs[0][:2], inputs[1], weights, states, batch),
        ),
        (
            "qkvz must be float32",
            lambda: cpu.gated_delta_net(inputs[0].bfloat16(), inputs[1], weights, states, batch),
        ),
        ("ba must be float32", lambda: cpu.gated_delta_net(inputs[0], inputs[0], weights, states, batch)),
        (
            "2 sequences and 0 slots",
            lambda: cpu.gated_delta_net(*inputs, weights, states, cpu.batch([0, 2, 3])),
        ),
        (
            "2 slots, got number 2",
            lambda: cpu.gated_delta_net(*inputs, weights, states, cpu.batch([0, 2, 3], [2, 0])),
        ),
        (
            "got number -1",
            lambda: cpu.gated_delta_net(*inputs, weights, states, cpu.batch([0, 2, 3], [-1, 0])),
        ),
        ("share slot 1", lambda: cpu.gated_delta_net(*inputs, weights, states, cpu.batch([0, 2, 3], [1, 1]))),
        ("share slot 0", lambda: cpu.gated_delta_net(*inputs, weights, states, saving([[0], []]))),
        ("2 slots, got number 5", lambda: cpu.gated_delta_net(*inputs, weights, states, saving([[5], []]))),
        ("saves must name every sequence", lambda: saving([[]])),
        ("sequence 1 of 1 tokens has no 2 states to save", lambda: saving([[], [2, 3]])),
        ("conv state must be", lambda: cpu.gated_delta_net(*inputs, weights, recurrent_of(other), batch)),
        ("bounds must rise strictly", lambda: cpu.batch([0, 2, 2], [0, 1])),
        ("bounds must rise", lambda: cpu.batch([1, 2], [0])),
        ("bounds must rise", lambda: cpu.batch([])),
        ("multiple of 16, got 24", lambda: Layer(key_dim=24).weights()),
        ("multiple of 16, got 8", lambda: Layer(value_dim=8).weights()),
        ("width must be 1 to 8, got 9", lambda: Layer(width=9).weights()),
        ("multiple of key heads, got 4 and 3", lambda: Layer(key_heads=3).weights()),
        (
            "no gradients",
            lambda: cpu.gated_delta_net(inputs[0].requires_grad_(), inputs[1], weights, states, batch),
        ),
    ]
    for message, call in refusals:
        with pytest.raises(ValueError, match=message):
            call()


def saving(saves: list[list[int]]) -> cpu.Batch:
    return cpu.batch([0, 2, 3], [1, 0], saves=saves)


def recurrent_of(layer: Layer) -> cpu.RecurrentStates:
    return cpu.recurrent_states(*layer.states(2))
