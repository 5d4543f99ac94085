"""What the engine needs of a model: several sequences a step, over pages and slots that the engine hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tenfold.models import Config


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens of one sequence that follow `past` earlier ones.

    slot: where its recurrent state lies, which is advanced; a new sequence's has been cleared. pages: those that hold
    the past and will hold the new tokens, in order, `model.page_tokens` each. saves: where the state after each of
    the last `len(saves)` tokens is written as well, the last may be `slot` (how drafts are taken back).
    """

    tokens: Sequence[int]
    slot: int
    past: int
    pages: Sequence[int]
    saves: Sequence[int] = ()


class EngineModel(Protocol):
    """Results for a token have the same bits whatever else is in the step and however a sequence is cut into spans."""

    config: Config
    page_tokens: int  # tokens of a page of keys and values
    thrifty_tokens: int  # of a step that makes good use of the weights it reads; smaller ones are slower in all
    page_bytes: int  # of all layers together
    state_bytes: int  # of a slot, all layers together
    can_draft: bool  # has a module for multi-token prediction
    fingerprint: str  # changes with the weights and with whatever changes a bit of what is cached

    def allocate(self, pages: int, slots: int) -> None:
        """Makes the memory, once. Raises MemoryError."""
        ...

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Hidden states after each token, fp32 `[T, D]`, span after span."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 `[T, vocab]` of hidden states `[T, D]`."""
        ...

    def draft(self, spans: Sequence[Span], hidden: Tensor) -> Tensor:
        """One step of multi-token prediction: the hidden states `[T, D]` of its own, whose logits are `logits`.

        The token at i of a span goes with the hidden state of the token before it, row i of `hidden` `[T, D]`;
        `past` counts from the second token of the sequence. The same pages hold its keys and values.
        """
        ...

    def follow(self, spans: Sequence[Span], hidden: Tensor) -> None:
        """As `draft`, where no token is guessed behind these: keys and values are all that it leaves."""
        ...

    def clear_state(self, slot: int) -> None:
        """As before the first token."""
        ...

    def copy_state(self, source: int, target: int) -> None: ...

    def copy_page(self, source: int, target: int) -> None: ...

    def read_state(self, slot: int) -> Tensor:
        """A copy, uint8 `[state_bytes]`."""
        ...

    def write_state(self, slot: int, state: Tensor) -> None: ...

    def read_page(self, page: int) -> Tensor:
        """A copy, uint8 `[page_bytes]`."""
        ...

    def write_page(self, page: int, content: Tensor) -> None: ...
