"""OpenAI's responses. Nothing is stored: a request carries its whole conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field

from tenfold.engine.request import Update, Usage
from tenfold.engine.sampler import SamplingParams
from tenfold.engine.structure import Structure
from tenfold.server.chat import Conversation
from tenfold.server.errors import ApiError, invalid
from tenfold.server.generation import Generation, Step
from tenfold.server.openai_chat import ContentPart, ToolName, plain_text
from tenfold.server.parts import Block, BlockEvent, Blocks
from tenfold.server.sampling import Fields, SamplingFields
from tenfold.server.service import ANY_TOOL, ChatJob
from tenfold.server.stream import HEARTBEAT, event
from tenfold.server.structures import json_object, json_schema


class InputItem(Fields):
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[ContentPart] | None = None


class ResponsesTool(Fields):
    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        if self.type != "function" or self.name is None:
            raise invalid(f"tools: type {self.type!r} is not known here, only functions with a name", param="tools")
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"type"})}


class NamedChoice(Fields):
    type: Literal["function"]
    name: str


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    def structure(self) -> Structure | None:
        if self.type != "json_schema":
            return json_object() if self.type == "json_object" else None
        if self.schema_ is None:
            raise invalid("text.format: schema is missing", param="text")
        return json_schema(self.schema_)


class TextOptions(Fields):
    format: TextFormat | None = None


class ReasoningOptions(Fields):
    effort: str | None = None


class ResponsesRequest(Fields):
    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None

    def conversation(self) -> Conversation:
        """Raises ApiError."""
        if self.previous_response_id is not None:
            raise invalid("previous_response_id: nothing is stored here; send the conversation as input")
        if self.background:
            raise invalid("background: answers are given while the client waits, or streams", param="background")
        begin = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        tools = [] if self.tool_choice == "none" else [tool.plain() for tool in self.tools or ()]
        thinks = {"enable_thinking": False} if self.reasoning and self.reasoning.effort == "none" else {}
        return Conversation(messages=[*begin, *_messages(items)], tools=tools, options=thinks)

    def job(self) -> ChatJob:
        """Raises ApiError."""
        choice = self.tool_choice
        named = choice.name if isinstance(choice, NamedChoice) else None
        return ChatJob(
            model=self.model,
            conversation=self.conversation(),
            fields=SamplingFields(temperature=self.temperature, top_p=self.top_p),
            max_tokens=self.max_output_tokens,
            tool=ANY_TOOL if choice == "required" else named,
            parallel=self.parallel_tool_calls is not False and named is None,
            form=self.text.format.structure() if self.text and self.text.format else None,
        )


def _messages(items: list[InputItem]) -> Iterator[dict[str, Any]]:
    """For the chat template. What an assistant thought, said and called is one message."""
    turn: dict[str, Any] = {}
    for item in items:
        if item.role != "assistant" and item.type not in ("function_call", "reasoning") and turn:
            yield turn
            turn = {}
        if item.type == "message" and item.role is not None and item.role != "assistant":
            role = "system" if item.role == "developer" else item.role
            yield {"role": role, "content": plain_text(item.content)}
        elif item.type == "function_call_output":
            yield {"role": "tool", "content": plain_text(item.output), "tool_call_id": item.call_id}
        elif item.type in ("message", "function_call", "reasoning") and (item.role or item.type != "message"):
            turn = _grown(turn, item)
        else:
            raise invalid(f"input: an item of type {item.type!r} is not known here, or has no role", param="input")
    if turn:
        yield turn


def _grown(turn: dict[str, Any], item: InputItem) -> dict[str, Any]:
    turn = {"role": "assistant", "content": "", **turn}
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        return turn | {"tool_calls": [*turn.get("tool_calls", []), call]}
    if item.type == "reasoning":
        thoughts = "" if isinstance(item.content, str) else "".join(part.text for part in item.content or ())
        return turn | {"reasoning_content": thoughts}
    return turn | {"content": turn["content"] + plain_text(item.content)}


# ---- answers -----------------------------------------------------------------------------------------------


class ResponseAnswer:
    """A response as it grows, whole or as a stream."""

    def __init__(self, request: ResponsesRequest, generation: Generation) -> None:
        self._generation = generation
        self._blocks = Blocks()
        self._ids: dict[int, str] = {}
        self._last = Step(choice=0, update=Update(request_id=-1))
        self._sequence = 0
        self._id, self._created = f"resp_{uuid4().hex}", int(time.time())
        self._asked = _asked(request, generation.params[0])

    async def whole(self) -> dict[str, Any]:
        async for step in self._generation.steps():
            if step is not None:
                self._last = step
                for part in step.parts:
                    list(self._blocks.push(part))
        return self._response()

    async def events(self) -> AsyncIterator[str]:
        yield self._event("response.created", {"response": self._response("in_progress")})
        yield self._event("response.in_progress", {"response": self._response("in_progress")})
        async for step in self._generation.steps():
            if step is None:
                yield HEARTBEAT
                continue
            self._last = step
            for happened in [e for part in step.parts for e in self._blocks.push(part)]:
                for text in self._block_events(happened):
                    yield text
        for happened in self._blocks.finish():
            for text in self._block_events(happened):
                yield text
        response = self._response()
        yield self._event(f"response.{response['status']}", {"response": response})

    def failure(self, error: ApiError) -> str:
        """The end of a stream that fails."""
        code = getattr(error, "code", None) or "server_error"
        response = self._response("failed") | {"error": {"code": code, "message": str(error.detail)}}
        return self._event("response.failed", {"response": response})

    def _block_events(self, happened: BlockEvent) -> Iterator[str]:
        block, place = happened.block, self._place(happened.block)
        if happened.what == "open":
            item = {"output_index": block.index, "item": self._item(block, "in_progress")}
            yield self._event("response.output_item.added", item)
            if block.kind == "text":
                yield self._event("response.content_part.added", place | {"part": _text_part("")})
        elif happened.what == "grow":
            extra = {"logprobs": []} if block.kind == "text" else {}
            yield self._event(f"response.{_STREAMS[block.kind]}.delta", {**place, "delta": happened.text, **extra})
        else:
            yield from self._closing(block, place)

    def _closing(self, block: Block, place: dict[str, Any]) -> Iterator[str]:
        told: dict[str, Any] = {"text": block.text}
        if block.kind == "call":
            told = {"arguments": block.text}
        elif block.kind == "text":
            told["logprobs"] = []
        yield self._event(f"response.{_STREAMS[block.kind]}.done", place | told)
        if block.kind == "text":
            yield self._event("response.content_part.done", place | {"part": _text_part(block.text)})
        item = {"output_index": block.index, "item": self._item(block, "completed")}
        yield self._event("response.output_item.done", item)

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._item_id(block), "output_index": block.index}
        return place if block.kind == "call" else place | {"content_index": 0}

    def _item_id(self, block: Block) -> str:
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[block.kind]
        return self._ids.setdefault(block.index, f"{prefix}_{uuid4().hex[:24]}")

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        done, item_id = status != "in_progress", self._item_id(block)
        if block.kind == "call":
            called = {"call_id": block.id, "name": block.name, "arguments": block.text if done else ""}
            return {"id": item_id, "type": "function_call", "status": status, **called}
        if block.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": block.text}] if done else []
            return {"id": item_id, "type": "reasoning", "status": status, "summary": [], "content": content}
        content = [_text_part(block.text)] if done else []
        return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str | None = None) -> dict[str, Any]:
        cut = self._last.update.finish == "length"
        status = status or ("incomplete" if cut else "completed")
        finished = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if finished and cut else None,
            "output": [self._item(block, "completed") for block in self._blocks.all] if finished else [],
            "usage": _usage(self._last.update.usage, self._last.reasoning_tokens) if finished else None,
            **self._asked,
        }

    def _event(self, kind: str, fields: dict[str, Any]) -> str:
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event(data, kind)


def _asked(request: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What a response repeats of its request, with what was not said there; the rest is never otherwise here."""
    return {
        "model": request.model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        "temperature": params.temperature,
        "text": {"format": _format(request.text.format if request.text else None)},
        "tool_choice": "auto" if request.tool_choice is None else request.model_dump()["tool_choice"],
        "tools": [_tool(tool) for tool in request.tools or ()],
        "top_p": params.top_p,
        "background": False,
        "frequency_penalty": 0.0,
        "max_tool_calls": None,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "top_logprobs": 0,
        "truncation": "disabled",
    }


def _format(form: TextFormat | None) -> dict[str, Any]:
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def _tool(tool: ResponsesTool) -> dict[str, Any]:
    return {**tool.model_dump(), "strict": False}


_STREAMS = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
