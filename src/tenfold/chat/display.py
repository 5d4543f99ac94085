"""An answer on the screen: what is finished as Markdown, what is being written below it as it comes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from threading import Event, Lock, Thread

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from tenfold.chat.backend import Cost
from tenfold.engine.reasoning import Piece

FRAME = 0.08  # seconds
WIDEST = 100  # columns
THOUGHTS = 4  # lines of reasoning that are seen while it is written
FENCE = re.compile(r" {0,3}(```|~~~)")
CONTINUES = re.compile(r"\s|[-*+] |\d+[.)] ")  # a line that may belong to a list before it
CODE_OR_MATHS = re.compile(
    r"(?P<code>^ *(```|~~~).*?(^ *\2|\Z)|`[^`]+`)|\$\$.+?\$\$|\$(?! )[^$\n]+(?<! )\$|\\\(.+?\\\)|\\\[.+?\\\]",
    re.DOTALL | re.MULTILINE,
)
MARKS = re.compile(r"[\\*_<\[\]~&]")  # that Markdown would take from a formula
CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), "") | {ord(kept): kept for kept in "\n\t"}
SHORTEST = 0.1  # seconds of writing that a speed can be told from


class AnswerDisplay:
    """Shows an answer while the block runs. On anything but a terminal it is the text itself, piece by piece."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(self, console=console, transient=True, auto_refresh=False)
        self._writing = Lock()  # or a frame would miss a block that is on its way from the lower part to the upper
        self._ended = Event()
        self._ticker = Thread(target=self._tick, daemon=True)
        self._asked = time.monotonic()
        self._first = self._content = self._last = 0.0
        self._reasoning = self._pending = ""
        self.text = ""

    def __enter__(self) -> AnswerDisplay:
        if self._console.is_terminal:
            self._console.print()
            self._live.start()
            self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._console.is_terminal:
            self._console.print()
            return
        self._ended.set()
        self._ticker.join()
        self._live.stop()
        self._print(self._pending)

    def _tick(self) -> None:
        while not self._ended.wait(FRAME):
            with self._writing:
                self._live.refresh()

    def push(self, piece: Piece) -> None:
        self._last = time.monotonic()
        self._first = self._first or self._last
        self.text += "" if piece.reasoning else piece.text
        if self._console.is_terminal:
            with self._writing:
                self._show(printable(piece.text), piece.reasoning)
        elif not piece.reasoning:
            self._console.out(piece.text, end="", highlight=False)

    def _show(self, text: str, reasoning: bool) -> None:
        if reasoning:
            self._reasoning += text
            return
        if not self._content:
            self._content = self._last
            if self._reasoning:
                self._console.print(f"thought for {self._content - self._first:.1f} s\n", style="dim", highlight=False)
        done, self._pending = finished(self._pending + text)
        self._print(done)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(Segments(block(text, self._console)), end="")

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


def block(markdown: str, console: Console) -> Iterator[Segment]:
    """A block of Markdown and one empty line, without the spaces at the end of lines that would be copied along."""
    options = console.options.update(width=min(WIDEST, console.width))
    lines = console.render_lines(Markdown(keep_maths(markdown), code_theme="ansi_dark"), options, pad=False)
    for line in lines:
        while line and not line[-1].text.strip():
            line.pop()
    filled = [place for place, line in enumerate(lines) if line]
    for line in lines[filled[0] : filled[-1] + 1] if filled else []:
        yield from (*line, Segment.line())
    yield Segment.line()


def keep_maths(markdown: str) -> str:
    """Formulas outside of code with their marks escaped: a terminal shows them as they are written."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found["code"] else MARKS.sub(r"\\\g<0>", found[0])

    return CODE_OR_MATHS.sub(escaped, markdown)


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
