"""What an answer is made of, as it comes: text, reasoning, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import uuid4


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool is called; its arguments follow."""

    name: str
    id: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON that the last call is given."""

    text: str


Part = Text | Reasoning | CallStart | CallArguments
Kind = Literal["text", "reasoning", "call"]


class Reader(Protocol):
    """Tells the parts of a text apart while it comes."""

    def push(self, text: str) -> Sequence[Part]: ...

    def finish(self) -> Sequence[Part]:
        """What was held back because it could have become something else."""
        ...


class PlainReader:
    """All is text."""

    def push(self, text: str) -> Sequence[Part]:
        return [Text(text)] if text else []

    def finish(self) -> Sequence[Part]:
        return []


def call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


@dataclass
class Block:
    """Neighbouring parts of one kind, which the APIs show as one."""

    index: int
    kind: Kind
    text: str = ""  # of a call: the JSON of its arguments
    name: str = ""
    id: str = ""


@dataclass(frozen=True)
class BlockEvent:
    """A block is opened, grows by `text`, or is closed."""

    what: Literal["open", "grow", "close"]
    block: Block
    text: str = ""


class Blocks:
    """Gathers parts into blocks, and says what happens to them."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def push(self, part: Part) -> Iterator[BlockEvent]:
        if isinstance(part, CallStart):
            yield from self._begin(Block(len(self.all), "call", name=part.name, id=part.id))
            return
        kind = _kind(part)
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Block(len(self.all), kind))
        assert self._open is not None
        self._open.text += part.text
        yield BlockEvent("grow", self._open, part.text)

    def finish(self) -> Iterator[BlockEvent]:
        if self._open is not None:
            yield BlockEvent("close", self._open)
            self._open = None

    def _begin(self, block: Block) -> Iterator[BlockEvent]:
        yield from self.finish()
        self._open = block
        self.all.append(block)
        yield BlockEvent("open", block)

    def text(self, kind: Kind) -> str:
        """All text of a kind."""
        return "".join(block.text for block in self.all if block.kind == kind)

    def calls(self) -> list[Block]:
        return [block for block in self.all if block.kind == "call"]


def _kind(part: Text | Reasoning | CallArguments) -> Kind:
    if isinstance(part, Text):
        return "text"
    return "reasoning" if isinstance(part, Reasoning) else "call"
