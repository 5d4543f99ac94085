"""What the optimizer promises: AdamW is torch's, Muon's steps are orthogonal, decay goes where it helps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold.models import ARCHITECTURES, Config, Model
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.train.optim import (
    NEWTON_SCHULZ_STEPS,
    OptimConfig,
    Optimizer,
    learning_rate_factor,
    muon_flops,
    orthogonalize,
)

EPSILON = torch.finfo(torch.float32).eps
KINDS: tuple[Literal["muon", "adamw"], ...] = ("muon", "adamw")
NOT_DECAYED = ("A_log", "dt_bias", "conv1d.weight", "linear_attn.norm.weight")


def fresh(config: Config) -> Model:
    """A model whose weights are all different from zero."""
    model = ARCHITECTURES[config.model_type][1](config)  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


def random_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Stack(nn.Module):
    """Two experts' gate and up matrices, and a matrix of the same shape as one of these."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 2 * 8, 16, generator=torch.Generator().manual_seed(0)))
        self.proj = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)))


# ---- AdamW -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_adamw_is_that_of_torch(kind: str, request: pytest.FixtureRequest) -> None:
    config: Config = request.getfixturevalue(kind)
    ours, theirs = fresh(config), fresh(config)
    optimizer = Optimizer(ours, OptimConfig(kind="adamw", adam_lr=0.01, weight_decay=0.3))
    kept = [p for name, p in theirs.named_parameters() if name not in optimizer.decayed]
    decayed = [p for name, p in theirs.named_parameters() if name in optimizer.decayed]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-10)
    for step, factor in enumerate((0.5, 1.0, 0.7, 0.1)):
        random_gradients(ours, step)
        random_gradients(theirs, step)
        optimizer.step(factor)
        for group in reference.param_groups:
            group["lr"] = 0.01 * factor
        reference.step()
    expected = weights(theirs)
    for name, found in weights(ours).items():
        # four steps of a few roundings each, relative to the largest weight
        assert (found - expected[name]).abs().max() <= 16 * EPSILON * expected[name].abs().max(), name


# ---- Muon --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(*shape, generator=generator)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = torch.logspace(0, -1.5, min(shape))
    found = left.T @ orthogonalize(((left * spectrum) @ right)[None])[0] @ right.T
    values = found.diagonal()
    assert values.min() > 0.65 and values.max() < 1.25
    # polynomials of a matrix keep its singular vectors; rounding of small values grows as these do
    assert (found - values.diag()).abs().max() < 3.4445**NEWTON_SCHULZ_STEPS * EPSILON


@pytest.mark.parametrize("rank", [1, 3, 31])
def test_a_gradient_of_few_directions_stays_within_them(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(32, rank, generator=generator) @ torch.randn(rank, 48, generator=generator)
    values = torch.linalg.svdvals(orthogonalize(matrix[None])[0])
    assert values[0] < 1.25 and values[rank - 1] > 0.1
    assert (values[rank:] < 10 * 3.4445**NEWTON_SCHULZ_STEPS * EPSILON).all()  # rounding, grown like a small value


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_a_gradient_does_not_matter(scale: float) -> None:
    matrix = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    tolerance = 1e-7 / (scale * float(matrix.norm())) + 3.4445**NEWTON_SCHULZ_STEPS * EPSILON
    found, expected = orthogonalize(matrix * scale), orthogonalize(matrix)
    if scale >= 1.0:
        assert (found - expected).abs().max() < tolerance
    else:
        assert found.norm() < expected.norm()  # below 1e-7 it fades: a gradient of zero stays zero
    assert not orthogonalize(torch.zeros(1, 8, 16)).any()


@given(count=st.integers(1, 4), rows=st.integers(8, 20), columns=st.integers(8, 20))
def test_a_stack_is_its_matrices_one_by_one(count: int, rows: int, columns: int) -> None:
    stack = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(count))
    each = torch.cat([orthogonalize(matrix[None]) for matrix in stack])
    assert (orthogonalize(stack) - each).abs().max() < 3.4445**NEWTON_SCHULZ_STEPS * EPSILON


def test_a_step_moves_each_matrix_orthogonally_gate_and_up_as_two() -> None:
    model = Stack()
    optimizer = Optimizer(model, OptimConfig(muon_lr=0.5, weight_decay=0.0))
    before = weights(model)
    random_gradients(model, 0)
    assert model.gate_up_proj.grad is not None and model.proj.grad is not None
    parts = torch.cat([model.gate_up_proj.grad.reshape(4, 8, 16), model.proj.grad[None]])
    expected = torch.cat([orthogonalize(part[None]) for part in parts]) * 0.5 * 0.25
    optimizer.step(0.25)
    moved = {name: before[name] - now for name, now in weights(model).items()}
    found = torch.cat([moved["gate_up_proj"].reshape(4, 8, 16), moved["proj"][None]])
    assert (found - expected).abs().max() < 1e-5


def test_tall_matrices_move_by_the_root_of_their_proportions() -> None:
    model = nn.Module()
    model.proj = nn.Parameter(torch.zeros(64, 16))
    optimizer = Optimizer(model, OptimConfig(muon_lr=1.0, weight_decay=0.0))
    random_gradients(model, 0)
    optimizer.step(1.0)
    values = torch.linalg.svdvals(model.proj.detach())
    assert values.min() > 0.65 * 2 and values.max() < 1.25 * 2


def test_momentum_looks_ahead() -> None:
    model = Stack()
    optimizer = Optimizer(model, OptimConfig(momentum=0.9, weight_decay=0.0, muon_lr=1.0))
    gradients = [torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    average = torch.zeros(8, 16)
    for gradient in gradients:
        before = model.proj.detach().clone()
        model.proj.grad, model.gate_up_proj.grad = gradient.clone(), None
        average = 0.9 * average + 0.1 * gradient
        optimizer.step(1.0)
        expected = orthogonalize((0.1 * gradient + 0.9 * average)[None])[0]
        assert (before - model.proj.detach() - expected).abs().max() < 1e-5


def test_muon_takes_the_matrices_of_the_layers(sparse: Qwen3NextConfig) -> None:
    optimizer = Optimizer(fresh(sparse), OptimConfig())
    taken, others = set(optimizer.matrices), set(optimizer.others)
    for part in ("q_proj", "in_proj_qkvz", "experts.gate_up_proj", "experts.down_proj", "shared_expert.up_proj", "fc"):
        assert any(part in name for name in taken), part
    for part in ("embed_tokens", "lm_head", "conv1d", "mlp.gate.weight", "norm", "A_log", "shared_expert_gate"):
        assert any(part in name for name in others), part
        assert not any(part in name for name in taken), part


def test_flops_are_those_that_torch_counts() -> None:
    stacks = [torch.ones(3, 16, 8), torch.ones(3, 8, 24), torch.ones(1, 12, 12)]
    with FlopCounterMode(display=False) as counter:
        for stack in stacks:
            orthogonalize(stack)
    assert muon_flops([stack.shape for stack in stacks]) == counter.get_total_flops()


# ---- weight decay ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["sparse", "dense"])
def test_what_decays(kind: Literal["muon", "adamw"], architecture: str, request: pytest.FixtureRequest) -> None:
    config: Config = request.getfixturevalue(architecture)
    model = fresh(config)
    optimizer = Optimizer(model, OptimConfig(kind=kind, adam_lr=0.1, muon_lr=0.1, weight_decay=0.5))
    before = weights(model)
    for parameter in model.parameters():  # an update of the weight's own sign, where decay is not cautious
        parameter.grad = parameter.detach().clone()
    plain = Optimizer(moving := fresh(config), OptimConfig(kind=kind, adam_lr=0.1, muon_lr=0.1, weight_decay=0.0))
    for parameter in moving.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step(1.0)
    plain.step(1.0)
    undecayed = weights(moving)
    for name, found in weights(model).items():
        zero_centred = name.endswith("norm.weight") or "pre_fc_norm" in name
        kept = name.endswith(NOT_DECAYED) or (zero_centred and isinstance(config, Qwen3Config))
        assert torch.equal(found, undecayed[name]) == kept, name
        if not kept:
            assert (found.abs() < before[name].abs()).any(), name


def test_decay_is_cautious_and_falls_with_the_learning_rate() -> None:
    model, still = Stack(), Stack()
    config = OptimConfig(muon_lr=0.2, weight_decay=0.5)
    decaying = Optimizer(model, config)
    plain = Optimizer(still, OptimConfig(muon_lr=0.2, weight_decay=0.0))
    before = model.proj.detach().clone()
    random_gradients(model, 0)
    random_gradients(still, 0)
    decaying.step(0.5)
    plain.step(0.5)
    update = before - still.proj.detach()
    shrunk = still.proj.detach() - model.proj.detach()
    towards_zero = update * before > 0
    assert 0 < towards_zero.sum() < towards_zero.numel()
    expected = before * (0.2 * 0.5) * (0.5 * 0.5) * towards_zero  # learning rate times decay, both at half
    assert (shrunk - expected).abs().max() < 4 * EPSILON * before.abs().max()


# ---- schedules ---------------------------------------------------------------------------------------------

schedules = st.builds(
    lambda schedule, warmup, decay, final: OptimConfig(
        schedule=schedule, warmup=warmup, decay=decay * (1.0 - warmup), final_lr=final
    ),
    st.sampled_from(["wsd", "cosine"]),
    st.floats(0.0, 0.9),
    st.floats(0.0, 1.0),
    st.floats(0.0, 0.9),
)


@given(config=schedules, steps=st.integers(1, 300))
def test_a_schedule_rises_to_one_then_falls_to_its_end_without_jumps(config: OptimConfig, steps: int) -> None:
    factors = [learning_rate_factor(config, step, steps) for step in range(steps)]
    warmup = max(1, round(config.warmup * steps))
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert factors[0] == pytest.approx(1.0 / warmup)
    assert all(a < b for a, b in pairwise(factors[:warmup])) and factors[warmup - 1 : warmup] in ([1.0], [])
    assert all(a >= b for a, b in pairwise(factors[max(0, warmup - 1) :]))
    falling = steps - warmup if config.schedule == "cosine" else max(1.0, config.decay * steps)
    steepest = (math.pi / 2 if config.schedule == "cosine" else 1.0) / max(1.0, falling)
    rounding = 0.5 / max(1.0, falling)  # of the warmup to whole steps, where it leaves the decay too little room
    assert all(abs(a - b) <= max(1.0 / warmup, steepest + rounding) + 1e-9 for a, b in pairwise(factors))
    if steps > warmup:
        left = (1.0 - config.final_lr) * steepest
        assert config.final_lr <= factors[-1] <= config.final_lr + left + 1e-9


def test_a_stable_phase_stands_between_warmup_and_decay() -> None:
    config = OptimConfig(warmup=0.1, decay=0.5)
    factors = [learning_rate_factor(config, step, 100) for step in range(100)]
    assert factors[9:51] == [1.0] * 42 and factors[51] < 1.0
    assert factors[75] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"warmup": 1.5}, "optim.warmup must be from 0 to 1, got 1.5"),
        ({"decay": -0.1}, "optim.decay must be from 0 to 1, got -0.1"),
        ({"warmup": 0.5, "decay": 0.6}, "optim.warmup 0.5 and optim.decay 0.6 exceed the training together"),
        ({"muon_lr": 0.0}, "optim.muon_lr must be above 0, got 0.0"),
        ({"adam_lr": -1.0}, "optim.adam_lr must be above 0, got -1.0"),
        ({"clip": 0.0}, "optim.clip must be above 0, got 0.0"),
        ({"momentum": 1.0}, "optim.momentum must be from 0 to below 1, got 1.0"),
        ({"adam_betas": (0.9, 1.0)}, "optim.adam_betas must be from 0 to below 1, got 1.0"),
    ],
)
def test_settings_that_cannot_train_are_told(values: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError) as caught:
        OptimConfig(**values)  # type: ignore[arg-type]
    assert str(caught.value).startswith(complaint)


# ---- state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_into_another_optimizer_and_on(kind: Literal["muon", "adamw"], sparse: Qwen3NextConfig) -> None:
    config = OptimConfig(kind=kind)
    first, second = fresh(sparse), fresh(sparse)
    one, other = Optimizer(first, config), Optimizer(second, config)
    for step in range(2):
        random_gradients(first, step)
        one.step(1.0)
    second.load_state_dict(first.state_dict())
    other.load_state_dict({name: x.clone() for name, x in one.state_dict().items()})
    for model, optimizer in ((first, one), (second, other)):
        random_gradients(model, 9)
        optimizer.step(0.5)
    assert all(torch.equal(x, weights(second)[name]) for name, x in weights(first).items())
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys() and states[0]["step_count"] == 3
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_the_state_of_another_optimizer_is_refused(sparse: Qwen3NextConfig) -> None:
    model = fresh(sparse)
    state = Optimizer(model, OptimConfig(kind="adamw")).state_dict()
    with pytest.raises(ValueError, match=r"optimizer state: \d+ buffers don't match this recipe, such as 'first\."):
        Optimizer(model, OptimConfig()).load_state_dict(state)


def test_without_gradients_adam_leaves_a_weight_alone() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    optimizer = Optimizer(model, OptimConfig())
    optimizer.step(1.0)
    assert torch.equal(model.scale, torch.ones(3))
    model.scale.grad = torch.ones(3)
    optimizer.zero_grad()
    assert model.scale.grad is None
