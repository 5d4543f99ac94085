"""Where an answer ends: at a stop token, at a stop string, or after as many tokens as were asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


class Decoder(Protocol):
    """Text of tokens that come one at a time, such as `Tokenizer.stream` gives."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What has become final: it is part of the answer whatever comes, and has not been told before.

    All texts together are the answer's text, without the stop string. The tokens are those whose text begins in it:
    where a stop string begins within a token, `text` alone tells where.
    """

    tokens: Sequence[int] = ()
    text: str = ""
    finish: Literal["stop", "length"] | None = None
    stopped_by: str | int | None = None  # the stop string or the stop token


class Stopping:
    """Watches the tokens of one answer for its end. Only tokens that stay are pushed, no drafts."""

    def __init__(
        self,
        stop_ids: Collection[int],
        *,
        strings: Sequence[str] = (),
        decoder: Decoder | None = None,
        min_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        """strings: texts that end the answer; they are looked for from token `min_tokens` on, and need a decoder.

        A stop token ends the answer whenever it comes: the sampler holds it back. Raises ValueError."""
        if strings and decoder is None:
            raise ValueError("stop strings need a tokenizer, and there is none: use stop_ids")
        self._stop_ids, self._strings, self._decoder = frozenset(stop_ids), tuple(strings), decoder
        self._min_tokens, self._max_tokens = min_tokens, max_tokens
        self._count = 0
        self._held = ""  # text that may yet turn out to be the beginning of a stop string
        self._waiting: deque[tuple[int, int]] = deque()  # tokens not yet told, and how much text was before each
        self._length = self._told = 0  # characters of the text so far, and of those told

    def push(self, token: int) -> Verdict:
        """The answer goes on with a token, which may be the one that ends it."""
        if token in self._stop_ids:
            return self._end("stop", token)
        self._count += 1
        self._waiting.append((token, self._length))
        fresh = self._decoder.push(token) if self._decoder else ""
        if found := self._take(fresh):
            return self._cut(found)
        if self._count == self._max_tokens:
            return self._end("length")
        return self._tell(len(self._held) - self._undecided())

    def finish(self) -> Verdict:
        """All that was held back: nothing more will come, for reasons of someone else's."""
        return self._end(None)

    def _end(self, finish: Literal["stop", "length"] | None, stopped_by: int | None = None) -> Verdict:
        if found := self._take(self._decoder.finish() if self._decoder else ""):
            return self._cut(found)
        told = self._tell(len(self._held))
        rest = [token for token, _ in self._waiting]
        self._waiting.clear()
        return Verdict(tokens=(*told.tokens, *rest), text=told.text, finish=finish, stopped_by=stopped_by)

    def _take(self, fresh: str) -> str | None:
        """Appends text up to where the first stop string is complete, and says which: the longest that ends there.

        Character by character, so that it doesn't matter how the text was cut into tokens."""
        self._length += len(fresh)
        if not self._strings or self._count < self._min_tokens:
            self._held += fresh
            return None
        before, text = len(self._held), self._held + fresh
        ends = ((text.find(s, max(0, before - len(s) + 1)) + len(s), -len(s), s) for s in self._strings if s in text)
        end, _, found = min(ends, default=(len(text), 0, None))
        self._held = text[:end]
        return found

    def _cut(self, found: str) -> Verdict:
        """Ends the answer before the stop string, with which the held text ends."""
        told = self._tell(len(self._held) - len(found))
        self._waiting.clear()
        return Verdict(tokens=told.tokens, text=told.text, finish="stop", stopped_by=found)

    def _undecided(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        if self._count < self._min_tokens:
            return 0
        return held_back(self._held, self._strings)

    def _tell(self, length: int) -> Verdict:
        """Lets out so much of the held text, and the tokens that begin in it."""
        text, self._held = self._held[:length], self._held[length:]
        self._told += length
        tokens = []
        while self._waiting and (self._waiting[0][1] < self._told or not self._held):
            tokens.append(self._waiting.popleft()[0])
        return Verdict(tokens=tokens, text=text)


def held_back(text: str, strings: Iterable[str]) -> int:
    """How many of the last characters may be the beginning of one of these strings."""
    longest = 0
    for string in strings:
        for size in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:size]):
                longest = size
                break
    return longest
