"""Muon for matrices, AdamW for the rest, and their schedules.

Muon (Jordan et al. 2024) replaces a matrix's averaged gradient by the nearest orthogonal matrix, so that every
direction moves by the same amount. A stack of experts is a stack of matrices: the last two dimensions are
orthogonalised, and matrices of one shape go through the iteration together, as one batch.

Weight decay is cautious (only where it points the way the update goes), decoupled, and falls with the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tenfold.models.init import is_norm, is_router

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest start that still settles in 0.7..1.2
NEWTON_SCHULZ_STEPS = 5
MIN_MATRIX_DIM = 8  # thinner than that a matrix is a few vectors: AdamW


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule. Learning rates are peaks; experts and dense matrices share `muon_lr`."""

    kind: Literal["muon", "adamw"] = "muon"
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    adam_betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0  # largest global gradient norm
    schedule: Literal["wsd", "cosine"] = "wsd"  # warmup-stable-decay (linear), or warmup-cosine
    warmup: float = 0.02  # share of the steps
    decay: float = 0.65  # share of the steps, of warmup-stable-decay
    final_lr: float = 0.0  # share of the peak that is left at the end

    def __post_init__(self) -> None:
        for name in ("muon_lr", "adam_lr", "clip"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"optim.{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup", "decay", "final_lr"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"optim.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name, value in (("momentum", self.momentum), *(("adam_betas", beta) for beta in self.adam_betas)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"optim.{name} must be from 0 to below 1, got {value}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1.0 + 1e-9:
            raise ValueError(f"optim.warmup {self.warmup} and optim.decay {self.decay} exceed the training together")


def learning_rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at step 0 .. steps-1."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)
    if config.schedule == "cosine":
        shape = 0.5 * (1.0 - math.cos(math.pi * left))
    else:
        shape = min(1.0, left * (steps - warmup) / max(1.0, config.decay * steps))
    return config.final_lr + (1.0 - config.final_lr) * shape


def orthogonalize(stack: Tensor) -> Tensor:
    """Each matrix of `[N, R, C]` with its singular values brought to about 1, by Newton-Schulz iteration.

    The iteration multiplies X by polynomials in its Gram matrix X X^T, which have the short side alone. So they are
    multiplied with each other, and X only once at the end: half of the work where the sides are 1 to 4.
    """
    a, b, c = NEWTON_SCHULZ
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / x.norm(dim=(1, 2), keepdim=True).add(1e-7)
    gram = x @ x.mT
    product = None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    x = product @ x
    return x.mT if tall else x


def muon_flops(shapes: Iterable[torch.Size]) -> float:
    """FLOPs of one Muon step over stacks of matrices `[N, R, C]`."""
    total = 0.0
    for count, rows, columns in shapes:
        short, long = min(rows, columns), max(rows, columns)
        square = 2.0 * short**3  # one product of two matrices of the short side
        total += count * (4.0 * short * short * long + square * (4 * NEWTON_SCHULZ_STEPS - 3))
    return total


class Optimizer:
    """Both optimizers behind one step; the state is a flat dictionary of tensors, so it saves like a model."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.step_count = 0
        self.matrices: dict[str, nn.Parameter] = {}
        self.others: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            chosen = self.matrices if config.kind == "muon" and is_muon_matrix(name, parameter) else self.others
            chosen[name] = parameter
        self.stacks: dict[torch.Size, list[str]] = {}
        for name, parameter in self.matrices.items():
            self.stacks.setdefault(matrix_stack(name, parameter).shape[1:], []).append(name)
        self.momentum = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.others.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.others.items()}
        self.decayed = {name for name, p in model.named_parameters() if decays(name, p, model)}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the parameters' gradients, at `factor` times the peak learning rates."""
        self.step_count += 1
        for names in self.stacks.values():
            self._muon(names, factor)
        for name, parameter in self.others.items():
            if parameter.grad is not None:
                self._adam(name, parameter, parameter.grad, factor)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in (*self.matrices.values(), *self.others.values()):
            parameter.grad = None

    def flops_per_step(self) -> float:
        """FLOPs of the orthogonalisation; everything else is elementwise."""
        return muon_flops(matrix_stack(name, p).shape for name, p in self.matrices.items())

    def state_dict(self) -> dict[str, Tensor]:
        """All buffers, by `kind.parameter`."""
        state = {f"momentum.{name}": x for name, x in self.momentum.items()}
        state |= {f"first.{name}": x for name, x in self.first.items()}
        state |= {f"second.{name}": x for name, x in self.second.items()}
        return state | {"step_count": torch.tensor(self.step_count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises ValueError where the state belongs to another model or optimizer."""
        own = self.state_dict()
        odd = sorted(own.keys() ^ state.keys())
        if odd:
            raise ValueError(
                f"optimizer state: {len(odd)} buffers don't match this recipe, such as {odd[0]!r}: "
                "resume with the recipe it was saved with"
            )
        for name, buffer in own.items():
            buffer.copy_(state[name])
        self.step_count = int(state["step_count"])

    def _muon(self, names: list[str], factor: float) -> None:
        gradients = {n: self.matrices[n].grad for n in names}
        updates = []
        for name, gradient in gradients.items():
            momentum = self.momentum[name]
            gradient = torch.zeros_like(momentum) if gradient is None else gradient
            momentum.lerp_(gradient, 1.0 - self.config.momentum)
            updates.append(matrix_stack(name, gradient.lerp(momentum, self.config.momentum)))
        stack = orthogonalize(torch.cat(updates))
        rows, columns = stack.shape[1:]
        lr = self.config.muon_lr * factor * max(1.0, rows / columns) ** 0.5
        for name, update in zip(names, stack.split([len(u) for u in updates]), strict=True):
            parameter = self.matrices[name]
            self._apply(name, parameter, update.reshape(parameter.shape), lr, factor)

    def _adam(self, name: str, parameter: nn.Parameter, gradient: Tensor, factor: float) -> None:
        beta1, beta2 = self.config.adam_betas
        first = self.first[name].lerp_(gradient, 1.0 - beta1)
        second = self.second[name].lerp_(gradient.square(), 1.0 - beta2)
        spread = (second / (1.0 - beta2**self.step_count)).sqrt_().add_(1e-10)
        update = (first / (1.0 - beta1**self.step_count)).div_(spread)
        self._apply(name, parameter, update, self.config.adam_lr * factor, factor)

    def _apply(self, name: str, parameter: nn.Parameter, update: Tensor, lr: float, factor: float) -> None:
        if name in self.decayed and self.config.weight_decay:
            decay = self.config.weight_decay * factor
            if self.config.kind == "muon":
                parameter.sub_(parameter * (update * parameter > 0), alpha=lr * decay)
            else:
                parameter.mul_(1.0 - lr * self.config.weight_decay)
        parameter.sub_(update, alpha=lr)


def matrix_stack(name: str, x: Tensor) -> Tensor:
    """A parameter (or its gradient) as the matrices it is made of, `[N, R, C]`: gate and up are two."""
    if name.endswith("gate_up_proj"):
        return x.reshape(-1, x.shape[-2] // 2, x.shape[-1])
    return x.reshape(-1, *x.shape[-2:])


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices of the layers; not the embedding, the head, routers, convs and what is too thin to be one."""
    if parameter.ndim < 2 or "embed_tokens" in name or "lm_head" in name or "conv1d" in name or is_router(name):
        return False
    return min(parameter.shape[-2:]) >= MIN_MATRIX_DIM


def decays(name: str, parameter: Tensor, model: nn.Module) -> bool:
    """Weight decay takes matrices, and norms where zero is their identity (zero-centred ones)."""
    if is_norm(name):
        owner = model.get_submodule(name.removesuffix(".weight"))
        return type(owner).__name__ == "ZeroCenteredRMSNorm"
    return parameter.ndim >= 2 and not name.endswith("conv1d.weight")
