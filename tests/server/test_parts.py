"""Reasoning, text and calls of tools, told apart however the answer is cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.server.parts import Blocks, CallArguments, PlainReader, Reader
from tenfold.server.reasoning import ReasoningReader
from tenfold.server.tools import Format, ToolReader, convert, tool_format

SCHEMAS: dict[str, dict[str, Any]] = {
    "write": {
        "properties": {
            "path": {"type": "string"},
            "count": {"type": "integer"},
            "deep": {"type": "object"},
            "flag": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        }
    },
    "now": {},
}


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


def read(reader: Reader, pieces: Sequence[str]) -> list[tuple[str, str, str]]:
    """(kind, name, text) of all blocks."""
    blocks = Blocks()
    for parts in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        for part in parts:
            assert list(blocks.push(part))
    return [(block.kind, block.name, block.text) for block in blocks.all]


def hermes(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def xml(name: str, arguments: dict[str, object]) -> str:
    """As Qwen3-Coder's template shows earlier calls to the model."""
    text = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{text}</function>\n</tool_call>"


WRITERS: dict[Format, Callable[[str, dict[str, object]], str]] = {"hermes": hermes, "xml": xml}
plain = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<"), max_size=20)
said = plain.map(str.strip)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "path": plain,
        "count": st.integers(-999, 999),
        "deep": st.dictionaries(plain, st.one_of(plain, st.integers(), st.lists(plain)), max_size=3),
        "flag": st.sampled_from([True, False, None]),
    },
)
calls = st.lists(st.tuples(st.sampled_from(["write", "now"]), arguments), max_size=3)
places = st.lists(st.integers(0, 10_000), max_size=30)


@pytest.mark.parametrize("format", ["hermes", "xml"])
@given(text=said, calls=calls, places=places)
def test_calls_are_read_however_they_are_cut(
    format: Format, text: str, calls: list[tuple[str, dict[str, object]]], places: list[int]
) -> None:
    written = "\n".join([*([text] if text else []), *(WRITERS[format](name, given) for name, given in calls)])
    blocks = read(
        ToolReader(format, SCHEMAS if format == "hermes" else {n: SCHEMAS["write"] for n in SCHEMAS}),
        cut(written, places),
    )
    expected = [("text", "", text)] if text else []
    assert [(kind, name, "" if kind == "call" else body) for kind, name, body in blocks] == [
        *expected,
        *(("call", name, "") for name, _ in calls),
    ]
    assert [json.loads(body) for kind, _, body in blocks if kind == "call"] == [given for _, given in calls]


@pytest.mark.parametrize("format", ["hermes", "xml"])
@given(text=st.text(st.sampled_from('<>/=_ \nab{}"toolcallfunction'), max_size=60), places=places)
def test_text_without_a_call_passes_unchanged(format: Format, text: str, places: list[int]) -> None:
    if text.strip() and "<tool_call>" not in text and "<function=" not in text:
        assert read(ToolReader(format, {}), cut(text, places)) == [("text", "", text)]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", "a <tool_call>\nno JSON\n</tool_call> b"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "wri'),
        ("xml", "<tool_call>\nwhat?\n</tool_call>\n"),
        ("xml", "if x <function= y"),
    ],
)
@given(places=places)
def test_what_is_no_call_is_text(format: Format, text: str, places: list[int]) -> None:
    assert read(ToolReader(format, SCHEMAS), cut(text, places)) == [("text", "", text)]


@given(places=places)
def test_the_arguments_of_a_call_are_those_that_the_model_wrote(places: list[int]) -> None:
    """Also where their JSON is unusual: the conversation then has the tokens that the cache knows."""
    odd = '{"path":  "a}\\"</tool_call",\t"count":1 }'
    text = f'<tool_call>\n{{"name": "write", "arguments": {odd}}}\n</tool_call>'
    assert read(ToolReader("hermes", SCHEMAS), cut(text, places)) == [("call", "write", odd)]


def test_other_ways_to_write_a_call() -> None:
    swapped = '<tool_call>{"arguments": {"path": "x"}, "name": "write"}</tool_call>'
    assert read(ToolReader("hermes", SCHEMAS), [swapped]) == [("call", "write", '{"path": "x"}')]
    quoted = '<tool_call>{"name": "write", "arguments": "{\\"path\\": 1}"}</tool_call>'
    assert read(ToolReader("hermes", SCHEMAS), [quoted]) == [("call", "write", '{"path": 1}')]
    unclosed = '<tool_call>\n{"name": "now", "arguments": {}}'
    assert read(ToolReader("hermes", SCHEMAS), [unclosed]) == [("call", "now", "{}")]
    bare = "ok\n<function=now>\n</function>\nbye"
    assert read(ToolReader("xml", SCHEMAS), [bare]) == [
        ("text", "", "ok"),
        ("call", "now", "{}"),
        ("text", "", "\nbye"),
    ]


def test_strings_are_streamed_before_they_are_complete() -> None:
    reader = ToolReader("xml", SCHEMAS)
    reader.push("<tool_call>\n<function=write>\n<parameter=path>\n")
    assert reader.push('a "long" ') == [CallArguments('a \\"long\\" ')]
    assert reader.push("text\n</para") == [CallArguments("text")]


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("7", {"type": "integer"}, 7),
        ("7.5", {"type": "integer"}, "7.5"),
        ("7", {"type": "number"}, 7),
        ("True", {"type": "boolean"}, True),
        ("true", {"type": "integer"}, "true"),
        ("None", {"type": ["integer", "null"]}, None),
        ("abc", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "abc"),
        ("[1, {}]", {"type": "array"}, [1, {}]),
        ("[1", {"type": "array"}, "[1"),
        ("1", {"type": 5, "anyOf": "x"}, "1"),
    ],
)
def test_arguments_have_the_type_of_their_schema(text: str, schema: dict[str, Any], expected: object) -> None:
    assert json.loads(convert(text, schema)) == expected


def test_the_template_tells_the_format() -> None:
    assert tool_format("...<tool_call>{...}") == "hermes"
    assert tool_format("...<tool_call><function=x>") == "xml"
    assert tool_format("...") is None


# ---- reasoning -----------------------------------------------------------------------------------


@given(thought=said, text=said, places=places, inside=st.booleans())
def test_reasoning_is_separated(thought: str, text: str, places: list[int], inside: bool) -> None:
    written = ("" if inside else "<think>\n") + f"{thought}\n</think>\n\n{text}"
    expected = [*([("reasoning", "", thought)] if thought else []), *([("text", "", text)] if text else [])]
    assert read(ReasoningReader(PlainReader(), inside), cut(written, places)) == expected


@given(text=plain, places=places)
def test_an_answer_without_reasoning_passes_unchanged(text: str, places: list[int]) -> None:
    expected = [("text", "", text)] if text else []
    assert read(ReasoningReader(PlainReader(), False), cut(text, places)) == expected


def test_reasoning_that_was_cut_off_is_reasoning() -> None:
    assert read(ReasoningReader(PlainReader(), True), ["\nhm", "\n</thi"]) == [("reasoning", "", "hm\n</thi")]
    assert read(ReasoningReader(PlainReader(), False), ["<thi"]) == [("text", "", "<thi")]
