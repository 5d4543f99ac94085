"""Anthropic's messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field

from tenfold.engine.request import Update, Usage
from tenfold.server.chat import Conversation
from tenfold.server.errors import invalid
from tenfold.server.generation import Generation, Step
from tenfold.server.openai_chat import ToolName
from tenfold.server.parts import Block, BlockEvent, Blocks
from tenfold.server.sampling import Fields, SamplingFields, Stop
from tenfold.server.service import ANY_TOOL, ChatJob, Service
from tenfold.server.stream import event
from tenfold.server.structures import json_schema

SIGNATURE = "unsigned"  # reasoning comes back as it was given; there is nothing to verify


class ContentBlock(Fields):
    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: str | list[ContentBlock] | None = None


class AnthropicMessage(Fields):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class AnthropicTool(Fields):
    name: ToolName
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        if self.input_schema is None:
            raise invalid(f"tools: {self.name!r} has no input_schema; tools that a server runs are not known here")
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.input_schema}}


class ToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Fields):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Fields):
    format: OutputFormat | None = None


class CountRequest(Fields):
    """What makes a prompt."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[ContentBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def conversation(self) -> Conversation:
        system = [{"role": "system", "content": _text(self.system)}] if self.system else []
        messages = [plain for message in self.messages for plain in _plain(message)]
        told = [] if self.tool_choice and self.tool_choice.type == "none" else self.tools or []
        thinks = {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        return Conversation(messages=system + messages, tools=[tool.plain() for tool in told], options=thinks)


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    output_config: OutputConfig | None = None

    def job(self) -> ChatJob:
        """Raises ApiError."""
        choice = self.tool_choice or ToolChoice(type="auto")
        form = self.output_config.format if self.output_config else None
        return ChatJob(
            model=self.model,
            conversation=self.conversation(),
            fields=SamplingFields(
                temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, stop=self.stop_sequences
            ),
            max_tokens=self.max_tokens,
            tool={"any": ANY_TOOL, "tool": choice.name or ""}.get(choice.type),
            parallel=not choice.disable_parallel_tool_use and choice.type != "tool",
            form=None if form is None else json_schema(form.schema_),
        )


def _plain(message: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """Messages for the chat template: results of tools are messages of their own."""
    blocks = message.content
    if isinstance(blocks, str):
        yield {"role": message.role, "content": blocks}
        return
    for block in blocks:
        if block.type == "tool_result":
            yield {"role": "tool", "content": _text(block.content), "tool_call_id": block.tool_use_id}
    rest = [b for b in blocks if b.type not in ("tool_result", "tool_use", "thinking", "redacted_thinking")]
    calls = [_call(block) for block in blocks if block.type == "tool_use"]
    thoughts = "".join(block.thinking for block in blocks if block.type == "thinking")
    if rest or calls or thoughts:
        plain: dict[str, Any] = {"role": message.role, "content": _text(rest)}
        yield plain | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thoughts} if thoughts else {})


def _call(block: ContentBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input or {}}}


def _text(content: str | list[ContentBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for block in content:
        if block.type != "text":
            raise invalid(f"content of type {block.type!r}: this model reads text alone")
    return "\n".join(block.text for block in content)


async def count_tokens(service: Service, request: CountRequest) -> dict[str, int]:
    service.check_model(request.model)
    return {"input_tokens": len(await service.encode(service.chat.prompt(request.conversation())))}


# ---- answers -----------------------------------------------------------------------------------------------


class MessageAnswer:
    """A message as it grows, whole or as a stream."""

    def __init__(self, request: MessagesRequest, generation: Generation) -> None:
        self._generation, self._stops = generation, request.stop_sequences or []
        self._blocks = Blocks()
        self._head = {"id": f"msg_{uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": request.model}
        self._last = Step(choice=0, update=Update(request_id=-1))

    async def whole(self) -> dict[str, Any]:
        async for step in self._generation.steps():
            if step is not None:
                self._last = step
                for part in step.parts:
                    list(self._blocks.push(part))
        content = [_block(block, whole=True) for block in self._blocks.all]
        return {**self._head, "content": content, **self._end(), **self._whole_usage()}

    async def events(self) -> AsyncIterator[str]:
        self._last = Step(choice=0, update=Update(request_id=-1, usage=Usage(len(self._generation.prompt_ids[0]))))
        begin = {"content": [], **_stopped(None), **self._whole_usage()}
        yield _named({"type": "message_start", "message": self._head | begin})
        async for step in self._generation.steps():
            if step is None:
                yield _named({"type": "ping"})
                continue
            self._last = step
            for happened in [e for part in step.parts for e in self._blocks.push(part)]:
                yield _block_event(happened)
        for happened in self._blocks.finish():
            yield _block_event(happened)
        yield _named({"type": "message_delta", "delta": self._end(), "usage": self._usage()})
        yield _named({"type": "message_stop"})

    def _end(self) -> dict[str, Any]:
        stop = self._last.update.stopped_by
        if self._last.update.finish == "length":
            return _stopped("max_tokens")
        if isinstance(stop, str) and stop in self._stops:
            return _stopped("stop_sequence", stop)
        return _stopped("tool_use" if self._blocks.calls() else "end_turn")

    def _usage(self) -> dict[str, Any]:
        """Input tokens are those that were computed, as Anthropic counts them."""
        usage = self._last.update.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._last.reasoning_tokens},
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "server_tool_use": None,
        }

    def _whole_usage(self) -> dict[str, Any]:
        """With what the last event of a stream leaves out."""
        where = {"cache_creation": None, "service_tier": "standard", "inference_geo": None}
        return {"usage": self._usage() | where, "container": None}


def _stopped(reason: str | None, sequence: str | None = None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def _block(block: Block, whole: bool) -> dict[str, Any]:
    text = block.text if whole else ""
    if block.kind == "text":
        return {"type": "text", "text": text, "citations": None}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": SIGNATURE if whole else ""}
    try:
        given = json.loads(text or "{}")
    except ValueError:
        given = None  # cut off by the limit of tokens
    named = {"type": "tool_use", "id": block.id, "name": block.name, "caller": {"type": "direct"}}
    return named | {"input": given if isinstance(given, dict) else {}}


def _block_event(happened: BlockEvent) -> str:
    block, index = happened.block, happened.block.index
    if happened.what == "open":
        return _named({"type": "content_block_start", "index": index, "content_block": _block(block, whole=False)})
    if happened.what == "grow":
        return _delta(index, _growth(block, happened.text))
    closing = _delta(index, {"type": "signature_delta", "signature": SIGNATURE}) if block.kind == "reasoning" else ""
    return closing + _named({"type": "content_block_stop", "index": index})


def _growth(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text_delta", "text": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "input_json_delta", "partial_json": text}


def _delta(index: int, delta: dict[str, Any]) -> str:
    return _named({"type": "content_block_delta", "index": index, "delta": delta})


def _named(data: dict[str, Any]) -> str:
    return event(data, data["type"])
