"""Reasoning that a model writes between `<think>` and `</think>` before it answers."""

from __future__ import annotations

from collections.abc import Sequence

from tenfold.server.parts import Part, Reader, Reasoning, held_back

OPEN, CLOSE = "<think>", "</think>"


def begins_in_reasoning(prompt: str) -> bool:
    """Whether the prompt has opened the reasoning that the answer goes on with."""
    return prompt.rfind(OPEN) > max(prompt.rfind(CLOSE), prompt.rfind("<|im_end|>"))


class ReasoningReader:
    """Takes reasoning off the beginning of an answer, and leaves the rest to another reader.

    Line breaks around the tags belong to neither.
    """

    def __init__(self, rest: Reader, inside: bool) -> None:
        self._rest = rest
        self._state = "inside" if inside else "before"
        self._begun = False  # some reasoning has been passed on
        self._buffer = ""

    @property
    def reasoning(self) -> bool:
        return self._state == "inside"

    def push(self, text: str) -> Sequence[Part]:
        self._buffer += text
        parts: list[Part] = []
        if self._state == "before":
            self._look_for_opening()
        if self._state == "inside":
            parts += self._inside()
        if self._state == "breaks":
            self._skip_breaks()
        if self._state == "after":
            parts += self._rest.push(self._take(len(self._buffer)))
        return parts

    def finish(self) -> Sequence[Part]:
        left = self._take(len(self._buffer))
        if self._state == "inside":
            return self._told(left.rstrip("\n"))
        return [*self._rest.push(left if self._state == "before" else ""), *self._rest.finish()]

    def _look_for_opening(self) -> None:
        stripped = self._buffer.lstrip()
        if stripped.startswith(OPEN):
            self._buffer, self._state = stripped[len(OPEN) :], "inside"
        elif not OPEN.startswith(stripped):
            self._state = "after"

    def _inside(self) -> list[Part]:
        end = self._buffer.find(CLOSE)
        if end >= 0:
            told = self._told(self._take(end).rstrip("\n"))
            self._take(len(CLOSE))
            self._state = "breaks"
            return told
        keep = held_back(self._buffer, [CLOSE])
        body = self._buffer[: len(self._buffer) - keep]
        return self._told(self._take(len(body.rstrip("\n"))))

    def _told(self, text: str) -> list[Part]:
        text = text if self._begun else text.lstrip("\n")
        self._begun = self._begun or bool(text)
        return [Reasoning(text)] if text else []

    def _skip_breaks(self) -> None:
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer:
            self._state = "after"

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken
