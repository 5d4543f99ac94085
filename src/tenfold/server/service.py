"""What the routes share: how a request becomes tokens, and enters the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tenfold.engine.engine import QueueFull
from tenfold.engine.request import Request
from tenfold.engine.structure import Structure
from tenfold.server.backend import Engine
from tenfold.server.callers import Caller
from tenfold.server.chat import ChatFormat, Conversation, check_length, encode
from tenfold.server.errors import ApiError, invalid
from tenfold.server.generation import Asked, Generation, Generations, stopping
from tenfold.server.metrics import Metrics
from tenfold.server.sampling import SamplingFields
from tenfold.server.settings import Settings
from tenfold.server.structures import answer_structure
from tenfold.tokenizer import Tokenizer

WORKERS = 2  # threads that read prompts, however many come; each keeps what memory its longest one took
ANY_TOOL = "any tool"  # no tool has a name like that


@dataclass(frozen=True, kw_only=True)
class ChatJob:
    """What the chat APIs ask for, whatever the words in which they do.

    tool: a name, or `any`, of the tool that must be called. logprobs: of as many likeliest tokens.
    """

    model: str
    conversation: Conversation
    fields: SamplingFields
    max_tokens: int | None
    tool: str | None = None
    parallel: bool = True  # several calls may be made at once
    form: Structure | None = None
    logprobs: int | None = None
    choices: int = 1

    def forced_tools(self) -> list[Mapping[str, Any]]:
        """Those of which one must be called. Raises ApiError where there are none."""
        if self.tool is None:
            return []
        tools = [tool for tool in self.conversation.tools if self.tool in (ANY_TOOL, tool["function"]["name"])]
        if not tools:
            raise invalid(f"tool_choice: there is no tool {self.tool!r} among the tools", param="tool_choice")
        return tools


class Service:
    """The engine behind the routes."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.tokenizer, self.settings, self.metrics = engine, tokenizer, settings, metrics
        self.generations = Generations(settings, metrics)
        self.chat = ChatFormat(tokenizer)
        self.began = int(time.time())
        self.draining = False
        self._workers = ThreadPoolExecutor(WORKERS, "prompts")

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not here."""
        if name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            message = f"model {name[:100]!r} is not served here, but {known}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str) -> list[int]:
        """A prompt as tokens, which leave room for one more. Raises ApiError."""
        limit = self.settings.context_length - 1
        return await asyncio.get_running_loop().run_in_executor(self._workers, encode, self.tokenizer, text, limit)

    def check_ids(self, ids: list[int]) -> list[int]:
        """A prompt that came as tokens. Raises ApiError."""
        check_length(ids, self.settings.context_length - 1)
        last = self.tokenizer.vocab_size - 1
        bad = next((token for token in ids if not 0 <= token <= last), None)
        if bad is not None:
            raise invalid(f"prompt: token {bad} is unknown, there are 0 to {last}", param="prompt")
        return ids

    def max_tokens(self, asked: int | None, prompt: Sequence[int]) -> int:
        """As many tokens as the request wants and the context has room for."""
        room = self.settings.context_length - len(prompt)
        wanted = self.settings.max_tokens if asked is None else asked
        return room if wanted is None else min(wanted, room)

    async def start(self, asked: Sequence[Asked], caller: Caller | None) -> Generation:
        """Hands requests to the engine. Raises ApiError, with none of them left in it."""
        if self.draining:
            raise stopping()
        if caller is not None:
            caller.take_tokens(sum(len(one.prompt_ids) for one in asked))
        generation = Generation(self.generations, asked, caller)
        try:
            for one in asked:
                generation.streams.append(await self.engine.submit(self._request(one, caller)))
        except QueueFull as error:
            await generation.close()
            self.metrics.refused.inc()
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from None
        except ValueError as error:
            await generation.close()
            raise invalid(str(error)) from None
        except BaseException:
            await generation.close()
            raise
        return generation

    async def start_chat(self, job: ChatJob, caller: Caller | None) -> Generation:
        """Answers to a conversation. Raises ApiError."""
        self.check_model(job.model)
        forced, tools = job.forced_tools(), job.conversation.tools
        if job.choices > self.settings.max_choices:
            limit = self.settings.max_choices
            raise invalid(f"n: {job.choices} answers are asked for, at most {limit} are given", param="n")
        prompt = self.chat.prompt(job.conversation)
        ids = await self.encode(prompt)
        structure = answer_structure(
            None if forced else job.form,
            forced or (tools if job.form else ()),
            self.chat.tools or "hermes",
            parallel=job.parallel,
            reasoning=self.chat.reader(prompt, tools).reasoning,
        )
        borders, limit = self.chat.borders(ids), self.max_tokens(job.max_tokens, ids)
        asked = [
            Asked(
                prompt_ids=ids,
                params=job.fields.sampling(
                    self.settings, max_tokens=limit, logprobs=job.logprobs, structure=structure, choice=choice
                ),
                reader=self.chat.reader(prompt, tools),
                borders=borders,
            )
            for choice in range(job.choices)
        ]
        return await self.start(asked, caller)

    def _request(self, asked: Asked, caller: Caller | None) -> Request:
        isolated = caller is not None and self.settings.isolate_cache
        return Request(
            prompt_ids=asked.prompt_ids,
            params=asked.params,
            borders=asked.borders,
            isolation=caller.isolation if caller is not None and isolated else "",
        )
