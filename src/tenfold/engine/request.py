"""What the engine is asked, and what it answers: tokens as they come, then how it ended."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tenfold.engine.sampler import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]
_ids = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    borders: Sequence[int] = ()  # lengths of the prompt where another one is likely to part from it, as ends of turns
    isolation: str = ""  # requests share cached prefixes only with those of the same word
    id: int = field(default_factory=lambda: next(_ids))


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the logarithm of its probability, of the model's own distribution, before any sampling filter."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Usage:
    """What a request has cost so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that were not computed
    completion_tokens: int = 0
    drafted_tokens: int = 0  # proposed by multi-token prediction
    accepted_tokens: int = 0  # of those


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a step did for one request: new tokens, in order, and on the last update why it ended.

    A stop token or what lies behind a stop string is not among the tokens.
    """

    request_id: int
    tokens: Sequence[int] = ()
    text: str = ""  # of these tokens, if the engine has a tokenizer; before a stop string that begins within one
    logprobs: Sequence[Sequence[TokenLogprob]] = ()  # if asked for: per token itself first, then the likeliest
    prompt_logprobs: Sequence[Sequence[TokenLogprob]] | None = None  # on the first update, if asked for
    usage: Usage = Usage()
    finish: FinishReason | None = None
    stopped_by: str | int | None = None  # the stop string or the stop token
    stop_logprobs: Sequence[TokenLogprob] = ()  # of that stop token, as those of the others
    error: str | None = None  # one line, where finish is "error"
