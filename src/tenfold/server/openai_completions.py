"""OpenAI's completions: text or tokens go on, as harnesses that score texts want it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any
from uuid import uuid4

from pydantic import Field

from tenfold.engine.request import TokenLogprob
from tenfold.server.callers import Caller
from tenfold.server.errors import invalid
from tenfold.server.generation import Asked, Generation, Step
from tenfold.server.openai_chat import LOWEST_LOGPROB, StreamOptions, guided, usage_body
from tenfold.server.parts import PlainReader, Text
from tenfold.server.sampling import SamplingFields
from tenfold.server.service import Service
from tenfold.server.stream import HEARTBEAT, event
from tenfold.tokenizer import Tokenizer

DEFAULT_TOKENS = 16  # OpenAI's
Ranked = Sequence[TokenLogprob]


class CompletionRequest(SamplingFields):
    model: str
    prompt: str | list[int] | list[str] | list[list[int]] = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raises ApiError."""
        if self.suffix:
            raise invalid("suffix: this model only goes on with a text", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of: all answers are given; ask for as many with n", param="best_of")
        if self.echo and self.stream:
            raise invalid("echo: the prompt is not repeated in a stream", param="echo")

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


async def start_completion(service: Service, request: CompletionRequest, caller: Caller | None) -> Generation:
    """From a request to answers on their way. Raises ApiError."""
    service.check_model(request.model)
    request.check()
    forms = [form for form in guided(request) if form is not None]
    if len(forms) > 1:
        raise invalid("more than one form of the answer is asked for: choose one")
    prompts, count = request.prompts(), request.n or 1
    if not 0 < len(prompts) * count <= service.settings.max_choices:
        limit = service.settings.max_choices
        raise invalid(f"{len(prompts) * count} answers are asked for, 1 to {limit} are given", param="prompt")
    wanted = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    asked: list[Asked] = []
    for prompt in prompts:
        ids = await _ids(service, prompt)
        for choice in range(count):
            params = request.sampling(
                service.settings,
                max_tokens=service.max_tokens(wanted, ids),
                logprobs=request.logprobs,
                prompt_logprobs=request.logprobs if request.echo else None,
                structure=forms[0] if forms else None,
                choice=choice,
            )
            asked.append(Asked(prompt_ids=ids, params=params, reader=PlainReader()))
    return await service.start(asked, caller)


async def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    """An empty prompt begins a new document."""
    if isinstance(prompt, str):
        return await service.encode(prompt) if prompt else [service.tokenizer.eos_id]
    return service.check_ids(prompt)


class Logprobs:
    """The lists of the old form: a token is its text, or where it is no whole character, its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []
        self._length = 0  # characters

    def prompt(self, ids: Sequence[int], ranked: Sequence[Ranked]) -> None:
        """The first token of a prompt has no logprob, as nothing comes before it."""
        own = ranked[1:] if len(ranked) == len(ids) else ranked
        self._add(ids[0], None)
        for token, ranks in zip(ids[1:], own, strict=True):
            self._add(token, ranks)

    def answer(self, step: Step) -> None:
        """A stop token is in the lists, though not in the text: harnesses count on one entry for each token drawn."""
        for token, ranks in zip(step.update.tokens, step.update.logprobs, strict=True):
            self._add(token, ranks)
        if stop := step.update.stop_logprobs:
            self._add(stop[0].token, stop)

    def _add(self, token: int, ranked: Ranked | None) -> None:
        text = self._name(token)
        self._tokens.append(text)
        self._offsets.append(self._length)
        self._length += len(text)
        self._logprobs.append(_finite(ranked[0]) if ranked else None)
        self._tops.append({self._name(one.token): _finite(one) for one in reversed(ranked)} if ranked else None)

    def _name(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def take(self) -> dict[str, Any]:
        """What has come since it was asked last."""
        told = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
        self._tokens, self._logprobs, self._tops, self._offsets = [], [], [], []
        return told


def _finite(one: TokenLogprob) -> float:
    return max(one.logprob, LOWEST_LOGPROB)


class Completions:
    """All choices of a request, whole or as a stream."""

    def __init__(self, service: Service, request: CompletionRequest, generation: Generation) -> None:
        self._request, self._generation, self._tokenizer = request, generation, service.tokenizer
        self._logprobs = [Logprobs(service.tokenizer) for _ in generation.prompt_ids]
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    async def whole(self) -> dict[str, Any]:
        texts = ["" if not self._request.echo else self._tokenizer.decode(ids) for ids in self._generation.prompt_ids]
        finishes: list[str | None] = [None] * len(texts)
        async for step in self._generation.steps():
            if step is not None:
                texts[step.choice] += self._take(step)
                finishes[step.choice] = step.update.finish
        choices = [self._choice(i, text, finishes[i]) for i, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": usage_body(*self._generation.usage())}

    async def events(self) -> AsyncIterator[str]:
        options = self._request.stream_options
        extra = {"usage": None} if options and options.include_usage else {}
        async for step in self._generation.steps():
            if step is None:
                yield HEARTBEAT
                continue
            text = self._take(step)
            if text or step.update.finish or (step.update.tokens and self._request.logprobs is not None):
                yield event({**self._head, "choices": [self._choice(step.choice, text, step.update.finish)], **extra})
        if extra:
            yield event({**self._head, "choices": [], "usage": usage_body(*self._generation.usage())})
        yield event("[DONE]")

    def _take(self, step: Step) -> str:
        if step.update.prompt_logprobs is not None:
            self._logprobs[step.choice].prompt(self._generation.prompt_ids[step.choice], step.update.prompt_logprobs)
        if self._request.logprobs is not None:
            self._logprobs[step.choice].answer(step)
        return "".join(part.text for part in step.parts if isinstance(part, Text))

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        logprobs = None if self._request.logprobs is None else self._logprobs[index].take()
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
