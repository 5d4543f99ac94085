"""Reasoning that a model writes between `<think>` and `</think>` before it answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tenfold.engine.stopping import held_back
from tenfold.tokenizer import TURN_END

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """Text of an answer, as it comes."""

    text: str
    reasoning: bool = False


def begins_in_reasoning(prompt: str) -> bool:
    """Whether the prompt has opened the reasoning that the answer goes on with."""
    return prompt.rfind(OPEN) > max(prompt.rfind(CLOSE), prompt.rfind(TURN_END))


class ReasoningSplitter:
    """Tells reasoning from the answer behind it, however the text is cut. Line breaks around the tags belong to
    neither."""

    def __init__(self, inside: bool) -> None:
        """inside: the prompt has opened the reasoning already."""
        self._state = "inside" if inside else "before"
        self._begun = False  # some reasoning has been passed on
        self._buffer = ""

    @property
    def inside(self) -> bool:
        return self._state == "inside"

    def push(self, text: str) -> Iterator[Piece]:
        """What is certain by now."""
        self._buffer += text
        if self._state == "before":
            self._look_for_opening()
        if self._state == "inside":
            yield from self._thoughts()
        if self._state == "breaks":
            self._skip_breaks()
        if self._state == "after" and self._buffer:
            yield Piece(self._take(len(self._buffer)))

    def finish(self) -> Iterator[Piece]:
        """What was held back, since a tag might have followed."""
        left = self._take(len(self._buffer))
        if self._state == "inside":
            yield from self._thought(left.rstrip("\n"))
        elif self._state == "before" and left:
            yield Piece(left)

    def _look_for_opening(self) -> None:
        stripped = self._buffer.lstrip()
        if stripped.startswith(OPEN):
            self._buffer, self._state = stripped[len(OPEN) :], "inside"
        elif not OPEN.startswith(stripped):
            self._state = "after"

    def _thoughts(self) -> Iterator[Piece]:
        end = self._buffer.find(CLOSE)
        if end >= 0:
            yield from self._thought(self._take(end).rstrip("\n"))
            self._take(len(CLOSE))
            self._state = "breaks"
            return
        sure = self._buffer[: len(self._buffer) - held_back(self._buffer, [CLOSE])]
        yield from self._thought(self._take(len(sure.rstrip("\n"))))

    def _thought(self, text: str) -> Iterator[Piece]:
        text = text if self._begun else text.lstrip("\n")
        self._begun = self._begun or bool(text)
        if text:
            yield Piece(text, reasoning=True)

    def _skip_breaks(self) -> None:
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer:
            self._state = "after"

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken
