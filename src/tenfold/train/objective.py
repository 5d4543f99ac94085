"""The training loss: next token, multi-token prediction, and the balance of the experts over the global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.models import Model
from tenfold.models.qwen3_next import Qwen3Next
from tenfold.ops.cross_entropy import IGNORE, linear_cross_entropy
from tenfold.ops.moe import RouterLoad
from tenfold.ops.sequences import last_tokens, sequence_bounds


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the parts of the loss."""

    balance: float = 1e-3  # of the load-balancing loss
    mtp_steps: int = 0  # how many tokens ahead, beyond the next, the MTP module is trained to look
    mtp_weight: float = 0.1  # of the mean loss over MTP steps


class Forward(NamedTuple):
    """One micro-batch's sums; they add up over micro-batches and ranks."""

    loss: Tensor  # next-token cross-entropy, summed over labels
    mtp_loss: Tensor  # summed over the labels of all MTP steps
    loads: list[RouterLoad]


class LabelCounts(NamedTuple):
    """Over how many labels the sums of a micro-batch go."""

    next_token: int
    mtp: int


def forward(model: Model, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor, mtp_steps: int) -> Forward:
    """Losses and router loads of a micro-batch: input_ids and labels int64 `[B, T]`, -100 where there is no label."""
    hidden, loads = model.hidden_states(input_ids, cu_seqlens=cu_seqlens)
    head = model.output_weight
    loss = linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten())
    mtp_loss = loss.new_zeros(())
    for step, (state, load) in enumerate(draft_states(model, input_ids, hidden, mtp_steps, cu_seqlens), start=1):
        ahead = labels_ahead(labels, cu_seqlens, step)
        mtp_loss = mtp_loss + linear_cross_entropy(state.flatten(0, 1), head, ahead.flatten())
        loads += [load] if load is not None else []
    return Forward(loss, mtp_loss, loads)


def router_counts(model: Model, input_ids: Tensor, cu_seqlens: Tensor, mtp_steps: int) -> Tensor:
    """The choices int64 `[layers, E]` that `forward` would make, without its losses."""
    with torch.no_grad():
        hidden, loads = model.hidden_states(input_ids, cu_seqlens=cu_seqlens)
        loads += [load for _, load in draft_states(model, input_ids, hidden, mtp_steps, cu_seqlens) if load is not None]
    return stack_counts(loads)


def draft_states(
    model: Model, input_ids: Tensor, hidden: Tensor, steps: int, cu_seqlens: Tensor
) -> list[tuple[Tensor, RouterLoad | None]]:
    """What the MTP module makes of the body's hidden states, step by step; nothing for no steps."""
    if not steps:
        return []
    assert isinstance(model, Qwen3Next)
    return model.draft_states(input_ids, hidden, steps, cu_seqlens)


def count_labels(labels: Tensor, cu_seqlens: Tensor, mtp_steps: int) -> LabelCounts:
    """How many labels the losses of a micro-batch are summed over."""
    ahead = [labels_ahead(labels, cu_seqlens, step) for step in range(1, mtp_steps + 1)]
    return LabelCounts(int((labels != IGNORE).sum()), sum(int((x != IGNORE).sum()) for x in ahead))


def labels_ahead(labels: Tensor, cu_seqlens: Tensor, step: int) -> Tensor:
    """Labels `step` tokens further on, -100 where that leaves the sequence."""
    last = last_tokens(sequence_bounds(cu_seqlens, *labels.shape), labels.device)
    at = torch.arange(labels.numel(), device=labels.device)
    return labels.flatten().roll(-step).masked_fill(at + step > last, IGNORE).view_as(labels)


def stack_counts(loads: list[RouterLoad]) -> Tensor:
    """Choices int64 `[layers, E]`."""
    return torch.stack([load.counts for load in loads])


def balance_loss(loads: list[RouterLoad], counts: Tensor, tokens: int) -> Tensor:
    """The Switch loss (Fedus et al. 2021, eq. 4), `E sum_e f_e P_e`, mean over layers: 1 at perfect balance.

    `f_e` is an expert's share of the choices in the GLOBAL batch (`counts` `[layers, E]`, over `tokens` tokens),
    without gradient; `P_e` is its mean probability, of which this micro-batch's `loads` hold their part. So
    micro-batches and ranks add up to exactly the loss of one big batch.
    """
    share = counts / counts.sum(-1, keepdim=True)
    probability = torch.stack([load.probabilities for load in loads]) / tokens
    return counts.shape[-1] * (share.to(probability.dtype) * probability).sum(-1).mean()
