"""Models that run in this process."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Protocol, Self

from tenfold.chat.backend import ChatBackend, Cost, Message, Options
from tenfold.engine import engine as engines
from tenfold.engine.llm import LLM, generate, require_tokenizer, start_native
from tenfold.engine.reasoning import Piece, ReasoningSplitter, begins_in_reasoning
from tenfold.engine.request import Request, Update, Usage
from tenfold.engine.sampler import SamplingParams
from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.tokenizer import TURN_END, Tokenizer

SEEDS = 1 << 31


def open_local(path_or_name: str, dtype: str | None, device: str, quantization: str | None) -> ChatBackend:
    """Loads a model to talk with: on the native kernels, where they are and no dtype or GPU is asked for.

    quantization: as `start_native`'s format. Raises ValueError or OSError.
    """
    name = Path(path_or_name).name
    if dtype or device != "cpu" or not cpu.available():
        return LLMBackend(name, LLM.load(path_or_name, dtype or "float32", device, quantization))
    model, tokenizer = start_native(path_or_name, quantization)
    engine = engines.Engine(model, engines.EngineSettings(max_batch=1))
    return EngineBackend(name, engine, require_tokenizer(tokenizer, path_or_name), model.config)


class LLMBackend:
    """A model alone, which reads the whole conversation for every answer."""

    def __init__(self, name: str, llm: LLM) -> None:
        self.name = name
        self._llm = llm

    def answer(self, messages: Sequence[Message], options: Options) -> Generator[Piece | Cost, None, None]:
        model, tokenizer = self._llm.model, self._llm.tokenizer
        prompt = tokenizer.apply_chat_template(messages)
        ids, written = tokenizer.encode(prompt), 0
        text = Text(tokenizer, prompt)
        for token in generate(model, ids, sampling(options, model.config, tokenizer)):
            written += 1
            yield from text.push(token)
        yield from text.finish()
        yield Cost(prompt_tokens=len(ids), completion_tokens=written)


class Engine(Protocol):
    """What a chat needs of the engine."""

    def add(self, request: Request) -> None:
        """Raises ValueError for what can never be answered."""
        ...

    def step(self) -> Sequence[Update]: ...

    def cancel(self, request_id: int) -> None: ...


class EngineBackend:
    """The engine, which keeps what it has read: an answer starts where the conversation has changed."""

    def __init__(self, name: str, engine: Engine, tokenizer: Tokenizer, config: Config) -> None:
        self.name = name
        self._engine, self._tokenizer, self._config = engine, tokenizer, config

    def answer(self, messages: Sequence[Message], options: Options) -> Generator[Piece | Cost, None, None]:
        prompt = self._tokenizer.apply_chat_template(messages)
        ids = self._tokenizer.encode(prompt)
        turn_end = self._tokenizer.token_id(TURN_END)
        borders = [i + 1 for i, token in enumerate(ids) if token == turn_end]
        params = sampling(options, self._config, self._tokenizer)
        text = Text(self._tokenizer, prompt)
        for update in self._updates(Request(prompt_ids=ids, params=params, borders=borders)):
            for token in update.tokens:
                yield from text.push(token)
            if update.finish == "error":
                raise ValueError(update.error or "the engine failed")
            if update.finish:
                yield from text.finish()
                yield cost(update.usage)

    def _updates(self, request: Request) -> Iterator[Update]:
        """The request's updates; cancels it where nobody listens any more."""
        self._engine.add(request)
        ended = False
        try:
            while not ended:
                with HeldInterrupt():  # an engine that is left within a step is of no use any more
                    updates = [update for update in self._engine.step() if update.request_id == request.id]
                for update in updates:
                    ended = update.finish is not None
                    yield update
        finally:
            if not ended:
                self._engine.cancel(request.id)
                self._engine.step()  # in which it is let go


class HeldInterrupt:
    """Holds Ctrl-C back until the block is done."""

    def __enter__(self) -> Self:
        self._came = False
        self._before = signal.signal(signal.SIGINT, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._came:
            raise KeyboardInterrupt


class Text:
    """Tokens to pieces."""

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self._decoder = tokenizer.stream(skip_special_tokens=True)
        self._reasoning = ReasoningSplitter(begins_in_reasoning(prompt))

    def push(self, token: int) -> Iterator[Piece]:
        yield from self._reasoning.push(self._decoder.push(token))

    def finish(self) -> Iterator[Piece]:
        yield from self._reasoning.push(self._decoder.finish())
        yield from self._reasoning.finish()


def sampling(options: Options, config: Config, tokenizer: Tokenizer) -> SamplingParams:
    """What is not asked for: as long as there is room, and another seed for every answer."""
    params = SamplingParams(
        max_tokens=config.max_position_embeddings if options.max_tokens is None else options.max_tokens,
        seed=secrets.randbelow(SEEDS) if options.seed is None else options.seed,
        stop_ids=tokenizer.stop_ids,
    )
    temperature = params.temperature if options.temperature is None else options.temperature
    return replace(params, temperature=temperature, top_p=params.top_p if options.top_p is None else options.top_p)


def cost(usage: Usage) -> Cost:
    return Cost(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )
