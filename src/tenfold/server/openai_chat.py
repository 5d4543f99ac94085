"""OpenAI's chat completions."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field, field_validator

from tenfold.engine.request import TokenLogprob, Usage
from tenfold.engine.structure import Structure
from tenfold.server.chat import Conversation
from tenfold.server.errors import invalid
from tenfold.server.generation import Generation, Step
from tenfold.server.parts import Block, Blocks, CallArguments, CallStart, Reasoning, Text
from tenfold.server.sampling import Fields, SamplingFields
from tenfold.server.service import ANY_TOOL, ChatJob, Service
from tenfold.server.stream import HEARTBEAT, event
from tenfold.server.structures import choice, grammar, json_object, json_schema, regex
from tenfold.tokenizer import Tokenizer

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
LOWEST_LOGPROB = -9999.0  # JSON knows no infinity


class ContentPart(Fields):
    type: str
    text: str = ""


class CalledFunction(Fields):
    name: ToolName
    arguments: str | dict[str, Any] = ""


class CalledTool(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": plain_text(self.content),
        }
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message


def plain_text(content: str | Sequence[ContentPart] | None) -> str:
    """The text of a message. Raises ApiError for pictures and the like."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text"):
            raise invalid(f"content of type {part.type!r}: this model reads text alone", param="messages")
    return "\n".join(part.text for part in content)


class FunctionTool(Fields):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    type: Literal["function"]
    function: FunctionTool

    def plain(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class SchemaFormat(Fields):
    name: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    def structure(self) -> Structure | None:
        if self.type != "json_schema":
            return json_object() if self.type == "json_object" else None
        if self.json_schema is None:
            raise invalid("response_format: json_schema is missing", param="response_format")
        return json_schema(self.json_schema.schema_)


class StreamOptions(Fields):
    include_usage: bool | None = None


class ChatRequest(SamplingFields):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_words(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        if options and not all(re.fullmatch("[a-z][a-z_]*", name) for name in options):
            raise ValueError("names of template variables are small letters and _, such as enable_thinking")
        return options

    def conversation(self) -> Conversation:
        return Conversation(
            messages=[message.plain() for message in self.messages],
            tools=[] if self.tool_choice == "none" else [tool.plain() for tool in self.tools or ()],
            options=self.chat_template_kwargs or {},
        )

    def job(self) -> ChatJob:
        """Raises ApiError."""
        choice = self.tool_choice
        named = choice.function.name if isinstance(choice, NamedTool) else None
        return ChatJob(
            model=self.model,
            conversation=self.conversation(),
            fields=self,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            tool=ANY_TOOL if choice == "required" else named,
            parallel=self.parallel_tool_calls is not False and named is None,
            form=self.form(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            choices=self.n or 1,
        )

    def form(self) -> Structure | None:
        """Of the answer, where it is no call. Raises ApiError for more than one."""
        forms = [self.response_format.structure() if self.response_format else None, *guided(self)]
        given = [form for form in forms if form is not None]
        if len(given) > 1:
            raise invalid("more than one form of the answer is asked for: choose one", param="response_format")
        return given[0] if given else None


def guided(fields: SamplingFields) -> list[Structure | None]:
    """The forms that vLLM's fields ask for."""
    return [
        None if fields.guided_json is None else json_schema(fields.guided_json),
        None if fields.guided_regex is None else regex(fields.guided_regex),
        None if fields.guided_choice is None else choice(fields.guided_choice),
        None if fields.guided_grammar is None else grammar(fields.guided_grammar),
    ]


# ---- answers -----------------------------------------------------------------------------------------------


def usage_body(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    """Accepted and rejected predictions are those of the model's own drafts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
        },
    }


def finish_reason(step: Step, called: bool) -> str | None:
    return "tool_calls" if called and step.update.finish == "stop" else step.update.finish


def logprob_body(tokenizer: Tokenizer, ranked: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The token itself comes first, then the likeliest."""
    own, *others = [
        {
            "token": (data := tokenizer.token_bytes(one.token)).decode(errors="replace"),
            "logprob": max(one.logprob, LOWEST_LOGPROB),
            "bytes": list(data),
        }
        for one in ranked
    ]
    return own | {"top_logprobs": others}


class ChatAnswer:
    """One choice as it grows."""

    def __init__(self, index: int, tokenizer: Tokenizer, wants_logprobs: bool) -> None:
        self._index, self._tokenizer, self._wants_logprobs = index, tokenizer, wants_logprobs
        self._blocks = Blocks()
        self._logprobs: list[dict[str, Any]] = []
        self._finish: str | None = None

    def chunk(self, step: Step) -> dict[str, Any] | None:
        """What a step adds, as a choice of a stream; None where it adds nothing."""
        logprobs = self._take(step)
        delta = self._delta(step)
        if not delta and not logprobs and step.update.finish is None:
            return None
        told = {"content": logprobs} if self._wants_logprobs and logprobs else None
        return {"index": self._index, "delta": delta, "logprobs": told, "finish_reason": self._finish}

    def _take(self, step: Step) -> list[dict[str, Any]]:
        for part in step.parts:
            for _ in self._blocks.push(part):
                pass
        new = [logprob_body(self._tokenizer, ranked) for ranked in step.update.logprobs] if self._wants_logprobs else []
        self._logprobs += new
        self._finish = finish_reason(step, bool(self._blocks.calls()))
        return new

    def _delta(self, step: Step) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        index = len(self._blocks.calls()) - sum(isinstance(part, CallStart) for part in step.parts) - 1
        for part in step.parts:
            if isinstance(part, Text):
                delta["content"] = delta.get("content", "") + part.text
            elif isinstance(part, Reasoning):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
            elif isinstance(part, CallStart):
                index += 1
                function = {"name": part.name, "arguments": ""}
                calls.append({"index": index, "id": part.id, "type": "function", "function": function})
            elif isinstance(part, CallArguments):
                if not calls:
                    calls.append({"index": index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += part.text
        return delta | ({"tool_calls": calls} if calls else {})

    def add(self, step: Step) -> None:
        self._take(step)

    def whole(self) -> dict[str, Any]:
        """The choice of an answer in one piece."""
        calls = self._blocks.calls()
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self._blocks.text("text") or (None if calls else ""),
            "refusal": None,
            "annotations": [],
        }
        if reasoning := self._blocks.text("reasoning"):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        logprobs = {"content": self._logprobs} if self._wants_logprobs else None
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self._finish}


def _call(call: Block) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}


class ChatAnswers:
    """All choices of a request, whole or as a stream."""

    def __init__(self, service: Service, request: ChatRequest, generation: Generation) -> None:
        self._request, self._generation = request, generation
        self._choices = [ChatAnswer(i, service.tokenizer, bool(request.logprobs)) for i in range(request.n or 1)]
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": request.model}

    async def whole(self) -> dict[str, Any]:
        async for step in self._generation.steps():
            if step is not None:
                self._choices[step.choice].add(step)
        choices = [choice.whole() for choice in self._choices]
        usage = usage_body(*self._generation.usage())
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def events(self) -> AsyncIterator[str]:
        for index in range(len(self._choices)):
            delta = {"role": "assistant", "content": ""}
            yield self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        async for step in self._generation.steps():
            if step is None:
                yield HEARTBEAT
            elif chunk := self._choices[step.choice].chunk(step):
                yield self._event([chunk])
        if self._wants_usage:
            yield self._event([], usage_body(*self._generation.usage()))
        yield event("[DONE]")

    @property
    def _wants_usage(self) -> bool:
        options = self._request.stream_options
        return bool(options and options.include_usage)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return event(chunk | ({"usage": usage} if self._wants_usage else {}))
