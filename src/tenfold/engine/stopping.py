"""Where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a token does to the answer."""

    tokens: Sequence[int] = ()  # that are certain to be part of the answer, and have not been let out before
    stopped_by: str | int | None = None


class Stopping:
    """Watches the tokens of one answer for its end."""

    def __init__(self, stop_ids: frozenset[int]) -> None:
        self._stop_ids = stop_ids

    def push(self, token: int) -> Verdict:
        if token in self._stop_ids:
            return Verdict(stopped_by=token)
        return Verdict(tokens=(token,))
