"""From messages to a prompt, and to a reader of the answer, as the model's chat template wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold.engine.reasoning import begins_in_reasoning
from tenfold.server.errors import ApiError, invalid
from tenfold.server.parts import PlainReader, Reader
from tenfold.server.reasoning import ReasoningReader
from tenfold.server.tools import Format, ToolReader, tool_format
from tenfold.tokenizer import TURN_START, Tokenizer, slices

LONGEST_PART = 1 << 18  # characters; a text that cannot be cut takes up to 260 times its bytes while it is read
Message = Mapping[str, Any]  # role, content, and as it may be reasoning_content, tool_calls, tool_call_id


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a chat template is given. Tools have the form of OpenAI's, `{"type": "function", "function": {...}}`."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # for the template, such as enable_thinking


class ChatFormat:
    """What a tokenizer's chat template says about prompts and answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.config.get("chat_template")
        self._template = template if isinstance(template, str) else ""
        self.tools: Format | None = tool_format(self._template)
        self._turn = tokenizer.token_id(TURN_START)

    def prompt(self, conversation: Conversation) -> str:
        """The text of a conversation, ready to be answered. Raises ApiError."""
        if conversation.tools and self.tools is None:
            raise invalid("this model's chat template knows no tools: ask without them", param="tools")
        messages = [self._message(message) for message in conversation.messages]
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=list(conversation.tools) or None, options=conversation.options
            )
        except (ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise invalid(str(error), param="messages") from error

    def reader(self, prompt: str, tools: Sequence[Mapping[str, Any]]) -> ReasoningReader:
        """Reads the answer to a prompt: reasoning, text and calls."""
        rest: Reader = PlainReader()
        if tools and self.tools:
            schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
            rest = ToolReader(self.tools, schemas)
        return ReasoningReader(rest, begins_in_reasoning(prompt))

    def borders(self, ids: Sequence[int]) -> list[int]:
        """Where turns begin, but the first: another conversation may part from this one there."""
        return [at for at, token in enumerate(ids) if at and token == self._turn]

    def _message(self, message: Message) -> dict[str, Any]:
        calls = [self._call(call) for call in message.get("tool_calls") or ()]
        return {**message, "content": message.get("content") or ""} | ({"tool_calls": calls} if calls else {})

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """With arguments as text where the template takes it, as the model wrote them; else as an object."""
        function = call["function"]
        arguments = function["arguments"] or "{}"
        if not isinstance(arguments, str) or "arguments is string" in self._template:
            return call
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise invalid(f"tool_calls: arguments must be a JSON object, got {arguments[:60]!r}", param="messages")
        return {**call, "function": {**function, "arguments": value}}


def encode(tokenizer: Tokenizer, text: str, limit: int) -> list[int]:
    """Token ids of a prompt; it is left off where more than `limit` come of it. Raises ApiError then."""
    ids: list[int] = []
    for part in slices(text):
        if len(part) > LONGEST_PART:
            message = (
                f"the prompt has a word of about {len(part)} characters, at most {LONGEST_PART} are read: add spaces"
            )
            raise invalid(message, param="messages")
        ids += tokenizer.encode(part)
        if len(ids) > limit:
            break
    return check_length(ids, limit)


def check_length(ids: list[int], limit: int) -> list[int]:
    """The same ids. Raises ApiError where they leave no room for an answer."""
    if len(ids) > limit:
        message = f"the prompt has {len(ids)} tokens or more, the context has room for {limit}: shorten it"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    if not ids:
        raise invalid("the prompt is empty: give at least one token")
    return ids
