"""What a request must be answered, whatever else goes on: one token after the other, nothing kept but the chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tenfold.engine.engine import Engine
from tenfold.engine.request import Request, Update
from tenfold.engine.sampler import Sampler, SamplingParams
from tests.engine.fake_model import START, link_logits, mix


def answer(request: Request, vocab_size: int, context: int, eos: int | None) -> tuple[list[int], str]:
    """The tokens, and how it ended."""
    params = request.params
    sampler = Sampler(params, request.prompt_ids, [] if eos is None else [eos])
    link = chain(tuple(request.prompt_ids))
    tokens: list[int] = []
    while len(tokens) < params.max_tokens and len(request.prompt_ids) + len(tokens) < context:
        token = sampler.sample(link_logits(link, vocab_size), len(tokens), tokens)
        if token == eos or token in params.stop_ids:
            return tokens, "stop"
        tokens.append(token)
        link = mix(link, token)
    return tokens, "length"


@cache
def chain(tokens: tuple[int, ...]) -> int:
    link = START
    for token in tokens:
        link = mix(link, token)
    return link


def run(engine: Engine, requests: Sequence[Request]) -> dict[int, list[Update]]:
    """Runs requests to their ends, with all checks after each step."""
    updates: dict[int, list[Update]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(100_000):
        if not engine.has_work:
            break
        for update in engine.step():
            updates[update.request_id].append(update)
        engine.check_integrity()
    return updates


def tokens_of(updates: Sequence[Update]) -> list[int]:
    return [token for update in updates for token in update.tokens]


def request(
    prompt: Sequence[int], max_tokens: int = 8, seed: int = 0, temperature: float = 0.0, **more: object
) -> Request:
    return Request(
        prompt_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, seed=seed, temperature=temperature),
        **more,  # pyright: ignore[reportArgumentType]
    )
