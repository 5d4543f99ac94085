"""Every answer and every event is what the official clients declare, to the letter: no type bent, no field unknown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anthropic.types
import httpx
import openai.types.chat
import openai.types.responses
import pytest
from pydantic import BaseModel, TypeAdapter

if TYPE_CHECKING:
    from tests.server.conftest import Running

HTTP = httpx.Client(timeout=20)
USER = {"role": "user", "content": "weather?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA}
ANSWER = '<think>\nhm\n</think>\n\nSo.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
KNOWN = {"reasoning_content", "frequency_penalty", "presence_penalty", "store"}  # the last three of Open Responses
CASES: list[tuple[str, Any, Any, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        openai.types.chat.ChatCompletion,
        openai.types.chat.ChatCompletionChunk,
        {
            "messages": [USER],
            "tools": [{"type": "function", "function": FUNCTION}],
            "logprobs": True,
            "top_logprobs": 2,
            "n": 2,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/completions",
        openai.types.Completion,
        openai.types.Completion,
        {"prompt": ["weather?", "b"], "logprobs": 1, "max_tokens": 99, "stream_options": {"include_usage": True}},
    ),
    (
        "/v1/responses",
        openai.types.responses.Response,
        openai.types.responses.ResponseStreamEvent,
        {"input": "weather?", "instructions": "Be brief.", "tools": [{"type": "function", **FUNCTION}]},
    ),
    (
        "/v1/messages",
        anthropic.types.Message,
        anthropic.types.RawMessageStreamEvent,
        {
            "max_tokens": 99,
            "messages": [USER],
            "tools": [{"name": "weather", "input_schema": SCHEMA}],
        },
    ),
]


def unknown_fields(value: object, where: str = "") -> Iterator[str]:
    """Names of fields that a client's model holds without knowing them."""
    if isinstance(value, BaseModel):
        yield from (f"{where}.{name}" for name in value.model_extra or () if name not in KNOWN)
        for name in type(value).model_fields:
            yield from unknown_fields(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from unknown_fields(item, f"{where}[]")


def check(kind: Any, data: dict[str, Any]) -> None:
    value = TypeAdapter(kind).validate_python(data, strict=True)
    assert not list(unknown_fields(value))


@pytest.mark.parametrize(("path", "whole", "event", "body"), CASES, ids=[case[0] for case in CASES])
def test_answers_are_of_the_clients_types(
    server: Running, path: str, whole: Any, event: Any, body: dict[str, Any]
) -> None:
    server.engine.answers["weather?"] = ANSWER
    server.engine.prefill_seconds = 0.12  # two heartbeats
    check(whole, HTTP.post(f"{server.url}{path}", json={"model": "fake", **body}).json())
    response = HTTP.post(f"{server.url}{path}", json={"model": "fake", "stream": True, **body})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert len(events) > 20
    for data in events:
        if path == "/v1/completions":  # its type is that of whole answers, which have an end
            data["choices"] = [
                choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in data["choices"]
            ]
        if data != {"type": "ping"}:
            check(event, data)
