"""Forced calls and forms: what the grammars let a model write is what the readers read."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tenfold.engine.structure import Structure, StructureCompiler
from tenfold.server.parts import Blocks
from tenfold.server.structures import answer_structure, choice, grammar, json_object, json_schema, regex
from tenfold.server.tools import Format, ToolReader
from tenfold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tests.server.conftest import Running

HTTP = httpx.Client(timeout=20)  # one for all: each would load the certificates anew
ADD: dict[str, Any] = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "string"},
            "c": {"type": "string", "enum": ["x", "y"]},
            "d": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "now"}}]
CALLS: dict[Format, str] = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "z\\n", "d": [1.5]}}\n</tool_call>',
    "xml": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nz\n\n</parameter>\n"
    "<parameter=d>\n[1.5]\n</parameter>\n</function>\n</tool_call>",
}
NOW: dict[Format, str] = {
    "hermes": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "xml": "<tool_call>\n<function=now>\n</function>\n</tool_call>",
}


@cache
def compiler() -> StructureCompiler:
    return StructureCompiler(tokenizer())


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.embedded()


def allowed(structure: Structure | None, text: str) -> bool:
    """Whether a model may write just this text."""
    assert structure is not None
    constraint, ids = compiler().compile(structure), tokenizer().encode(text)
    if constraint.legal(ids) < len(ids):
        return False
    for token in ids:
        constraint.advance(token)
    return constraint.is_complete


def structure(
    format: Format, form: Structure | None = None, calls: Any = (), parallel: bool = True, reasoning: bool = False
) -> Structure | None:
    return answer_structure(form, calls, format, parallel=parallel, reasoning=reasoning)


@pytest.mark.parametrize("format", ["hermes", "xml"])
def test_a_forced_call_is_one_that_is_read(format: Format) -> None:
    forced = structure(format, calls=TOOLS)
    for text, count in [(CALLS[format], 1), (NOW[format], 1), (f"{CALLS[format]}\n{NOW[format]}", 2)]:
        assert allowed(forced, text)
        reader, blocks = ToolReader(format, {"add": ADD["parameters"]}), Blocks()
        for part in [*reader.push(text), *reader.finish()]:
            list(blocks.push(part))
        assert len(blocks.calls()) == count == len(blocks.all)
    reader = ToolReader(format, {"add": ADD["parameters"]})
    assert "".join(getattr(part, "text", "") for part in reader.push(CALLS[format])) == (
        '{"a": 1, "b": "z\\n", "d": [1.5]}'
    )


@pytest.mark.parametrize("format", ["hermes", "xml"])
def test_nothing_else_is_allowed(format: Format) -> None:
    forced = structure(format, calls=TOOLS, parallel=False)
    assert allowed(forced, CALLS[format])
    for text in ("", "hello", f"{NOW[format]}\n{NOW[format]}", CALLS[format].replace("add", "sub")):
        assert not allowed(forced, text)
    if format == "hermes":  # white space is that of the chat template
        assert not allowed(forced, CALLS[format].replace('"a": 1', '"a" :1'))
    assert not allowed(forced, CALLS[format].replace("1", "one", 1))


@pytest.mark.parametrize("format", ["hermes", "xml"])
def test_reasoning_comes_first_and_is_free(format: Format) -> None:
    forced = structure(format, calls=TOOLS, reasoning=True)
    assert allowed(forced, f'so: {{"a"\n</think>\n\n{CALLS[format]}')
    assert not allowed(forced, CALLS[format])


def test_a_form_may_be_left_for_a_call() -> None:
    both = structure("hermes", json_schema({"const": 5}), TOOLS)
    assert allowed(both, "5") and allowed(both, NOW["hermes"]) and not allowed(both, "6")


@pytest.mark.parametrize(
    ("form", "text"),
    [(regex("a/[b-d]+"), "a/bcd"), (choice(['"yes"', "no"]), '"yes"'), (json_object(), '{"a": [1]}')],
)
def test_forms_behind_reasoning(form: Structure, text: str) -> None:
    assert structure("hermes", form) == form
    assert allowed(structure("hermes", form, reasoning=True), f"hm\n</think>\n\n{text}")
    assert not allowed(structure("hermes", form, reasoning=True), f"hm\n</think>\n\n{text}!")


def test_a_grammar_stands_alone() -> None:
    assert structure("hermes", grammar('start: "a"')) == grammar('start: "a"')
    with pytest.raises(Exception, match="neither tools nor reasoning"):
        structure("hermes", grammar('start: "a"'), reasoning=True)


def schema(value: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


@pytest.mark.parametrize(
    "fields",
    [
        schema({"type": "integer", "minimum": 5, "maximum": 4}),
        schema({"type": "nothing"}),
        schema({"$ref": "#/nowhere"}),
        {"guided_regex": "("},
        {"guided_regex": "(?=a)"},
        {"guided_grammar": "start: nowhere"},
        {"guided_grammar": 'start: "a'},
        {"guided_json": "{"},
        {"guided_choice": [""]},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_forms_that_no_answer_can_have_are_refused_at_once(server: Running, fields: dict[str, Any]) -> None:
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    response = HTTP.post(f"{server.url}/v1/chat/completions", json=chat | fields, timeout=20)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    assert not server.engine.requests
