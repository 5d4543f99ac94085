"""What a chat needs of a model, wherever that runs: pieces of an answer, and what it cost."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Message = Mapping[str, str]  # `role` and `content`


@dataclass(frozen=True)
class Piece:
    """Text of an answer, as it comes."""

    text: str
    reasoning: bool = False


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


class Reasoning:
    """Tells reasoning, between `<think>` and `</think>`, from the answer behind it, piece by piece."""

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, prompt: str) -> None:
        """A prompt may have opened the reasoning already."""
        self._state = "inside" if prompt.rstrip().endswith(self.OPEN) else "before"
        self._buffer = ""
        self._thinking = False  # some reasoning has been passed on

    def push(self, text: str) -> Iterator[Piece]:
        """What is certain by now; line breaks around the tags are left out."""
        self._buffer += text
        if self._state == "before":
            self._look_for_opening()
        if self._state == "inside":
            yield from self._inside()
        if self._state == "breaks":
            self._buffer = self._buffer.lstrip("\n")
            self._state = "after" if self._buffer else "breaks"
        if self._state == "after" and self._buffer:
            yield Piece(self._buffer)
            self._buffer = ""

    def finish(self) -> Iterator[Piece]:
        """What was held back, since a tag might have followed."""
        if self._buffer:
            yield Piece(self._buffer, reasoning=self._state == "inside")

    def _look_for_opening(self) -> None:
        begun = self._buffer.lstrip()
        if begun.startswith(self.OPEN):
            self._state, self._buffer = "inside", begun.removeprefix(self.OPEN)
        elif not self.OPEN.startswith(begun):
            self._state = "after"

    def _inside(self) -> Iterator[Piece]:
        if not self._thinking:
            self._buffer = self._buffer.lstrip("\n")
        thought, closing, rest = self._buffer.partition(self.CLOSE)
        held = (
            0
            if closing
            else next((n for n in range(len(self.CLOSE) - 1, 0, -1) if thought.endswith(self.CLOSE[:n])), 0)
        )
        sure, self._buffer = thought[: len(thought) - held], rest if closing else thought[len(thought) - held :]
        if sure:
            self._thinking = True
            yield Piece(sure, reasoning=True)
        if closing:
            self._state = "breaks"
