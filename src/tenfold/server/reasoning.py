"""Reasoning as a part of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tenfold.engine.reasoning import Piece, ReasoningSplitter
from tenfold.server.parts import Part, Reader, Reasoning


class ReasoningReader:
    """Takes reasoning off the beginning of an answer, and leaves the rest to another reader."""

    def __init__(self, rest: Reader, inside: bool) -> None:
        self._rest, self._splitter = rest, ReasoningSplitter(inside)

    @property
    def reasoning(self) -> bool:
        return self._splitter.inside

    def push(self, text: str) -> Sequence[Part]:
        return [part for piece in self._splitter.push(text) for part in self._parts(piece)]

    def finish(self) -> Sequence[Part]:
        return [*(part for piece in self._splitter.finish() for part in self._parts(piece)), *self._rest.finish()]

    def _parts(self, piece: Piece) -> Iterator[Part]:
        if piece.reasoning:
            yield Reasoning(piece.text)
        else:
            yield from self._rest.push(piece.text)
