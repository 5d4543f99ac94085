"""Where an answer ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What has become final."""

    tokens: Sequence[int] = ()
    text: str = ""
    finish: Literal["stop", "length"] | None = None
    stopped_by: str | int | None = None  # the stop string or the stop token


class Stopping:
    """Watches the tokens of one answer for its end."""

    def __init__(self, stop_ids: Collection[int]) -> None:
        self._stop_ids = stop_ids

    def push(self, token: int) -> Verdict:
        if token in self._stop_ids:
            return Verdict(finish="stop", stopped_by=token)
        return Verdict(tokens=(token,))

    def finish(self) -> Verdict:
        return Verdict()
