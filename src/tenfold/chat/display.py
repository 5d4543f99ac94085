"""An answer on the screen: what is finished as Markdown, what is being written below it as it comes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from tenfold.chat.backend import Cost, Piece

FRAMES = 12  # a second
WIDEST = 100  # columns
THOUGHTS = 4  # lines of reasoning that are seen while it is written
FENCE = re.compile(r" {0,3}(```|~~~)")
CONTINUES = re.compile(r"\s|[-*+] |\d+[.)] ")  # a line that may belong to a list before it
CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), "") | {ord(kept): kept for kept in "\n\t"}
SHORTEST = 0.1  # seconds of writing that a speed can be told from


class AnswerDisplay:
    """Shows an answer while the block runs. On anything but a terminal it is the text itself, piece by piece."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(self, console=console, transient=True, refresh_per_second=FRAMES)
        self._asked = time.monotonic()
        self._first = self._content = self._last = 0.0
        self._reasoning = self._pending = ""
        self.text = ""

    def __enter__(self) -> AnswerDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        self._print(self._pending)
        self._pending = ""
        if not self._console.is_terminal:
            self._console.print()

    def push(self, piece: Piece) -> None:
        self._last = time.monotonic()
        self._first = self._first or self._last
        if piece.reasoning:
            self._reasoning += printable(piece.text)
            return
        if not self._content:
            self._begin_content()
        self.text += piece.text
        if self._console.is_terminal:
            self._pending += printable(piece.text)
            done, self._pending = finished(self._pending)
            self._print(done)
        else:
            self._console.out(piece.text, end="", highlight=False)

    def _begin_content(self) -> None:
        self._content = self._last
        if self._reasoning and self._console.is_terminal:
            self._console.print(f"thought for {self._content - self._first:.1f} s\n", style="dim", highlight=False)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(Markdown(text, code_theme="ansi_dark"), width=min(WIDEST, self._console.width))
            self._console.print()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The end of what is not finished yet; before there is any, a sign of life."""
        if self._pending:
            yield tail(self._pending, console, options, options.size.height - 2)
        elif self._reasoning and not self._content:
            yield Text(f"thinking, {time.monotonic() - self._first:.0f} s", style="dim")
            yield tail(self._reasoning, console, options, THOUGHTS, "dim italic")
        elif not self._first:
            yield Text(f"reading, {time.monotonic() - self._asked:.0f} s", style="dim")

    def told(self, cost: Cost) -> str:
        """Speed, first token, cache hits and drafts, in a line."""
        return " · ".join(facts(cost, self._first - self._asked if self._first else None, self._last - self._first))


def printable(text: str) -> str:
    """Without control characters: a model, or a server, could otherwise move about in the terminal."""
    return text.translate(CONTROLS)


def tail(text: str, console: Console, options: ConsoleOptions, height: int, style: str = "") -> Text:
    """The last lines of a text, as many as there is room for."""
    lines = Text("\n".join(text.splitlines()[-height:]), style=style).wrap(console, min(WIDEST, options.max_width))
    return Text("\n").join(lines[-height:])


def finished(text: str) -> tuple[str, str]:
    """Cuts Markdown where a block has surely ended: at an empty line outside of code, before one that begins anew."""
    end = at = 0
    fenced = empty = False
    for line in text.splitlines(keepends=True):
        if empty and not fenced and line.strip() and not CONTINUES.match(line):
            end = at
        fenced ^= bool(FENCE.match(line))
        empty = not line.strip()
        at += len(line)
    return text[:end], text[end:]


def facts(cost: Cost, first: float | None, writing: float) -> Iterator[str]:
    """first: seconds from asking to the first token; writing: from there to the last."""
    if cost.completion_tokens and cost.completion_tokens > 1 and writing >= SHORTEST:
        yield f"{(cost.completion_tokens - 1) / writing:.1f} tokens/s"
    if first is not None:
        yield f"first after {first:.2f} s"
    if cost.prompt_tokens and cost.cached_tokens is not None:
        yield f"{cost.cached_tokens:,} of {cost.prompt_tokens:,} cached"
    if cost.accepted_tokens:
        drafted = f" of {cost.drafted_tokens:,}" if cost.drafted_tokens else ""
        yield f"{cost.accepted_tokens:,}{drafted} drafts accepted"
