"""What a chat needs of a model, wherever that runs: pieces of an answer, and what it cost."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tenfold.engine.reasoning import Piece

Message = Mapping[str, str]  # `role` and `content`


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Tokens of a question with all before it, and of its answer; None where the backend doesn't tell."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt, that were not computed
    completion_tokens: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None  # of the drafted ones


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to answer; None leaves it to the backend."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


class ChatBackend(Protocol):
    """A model that answers."""

    name: str

    def answer(self, messages: Sequence[Message], options: Options) -> Generator[Piece | Cost, None, None]:
        """Pieces, then the cost. Closing the stream, or an interrupt in it, stops the work.

        Raises ValueError or OSError, with one line, where there is no answer or no rest of it.
        """
        ...
