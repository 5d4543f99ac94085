"""Forms that an answer must have: what requests ask for, as the engine's structures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tenfold.engine.reasoning import CLOSE as THOUGHT_END
from tenfold.engine.structure import Structure
from tenfold.server.errors import invalid
from tenfold.server.tools import CLOSE, OPEN, Format, is_string

Tool = Mapping[str, Any]
ANY_TEXT = "/(?s:.*)/"
AS_TRAINED = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


def json_schema(schema: Mapping[str, Any] | str) -> Structure:
    """JSON by a schema, which may come as text."""
    return _structure("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def regex(source: str) -> Structure:
    return _structure("regex", source)


def choice(texts: Sequence[str]) -> Structure:
    if not texts:
        raise invalid("guided_choice: give at least one text to choose", param="guided_choice")
    return _structure("choice", json.dumps(texts, ensure_ascii=False))


def grammar(source: str) -> Structure:
    return _structure("grammar", source)


def _structure(kind: Literal["json_schema", "regex", "choice", "grammar"], source: str) -> Structure:
    try:
        return Structure(kind, source)
    except ValueError as error:
        raise invalid(str(error)) from None


def json_object() -> Structure:
    return Structure("json_schema", '{"type": "object"}')


def answer_structure(
    form: Structure | None,
    calls: Sequence[Tool],
    format: Format,
    *,
    parallel: bool,
    reasoning: bool,
) -> Structure | None:
    """An answer that has this form or is nothing but calls of these tools, behind reasoning that is free.

    reasoning: the answer begins in the middle of it.
    """
    if form is None and not calls:
        return None
    if form is not None and not calls and not reasoning:
        return form
    choices = [*(["form"] if form else []), *(["calls"] if calls else [])]
    lines = [f"start: {'thought BREAKS ' if reasoning else ''}({' | '.join(choices)})"]
    if reasoning:
        lines += [f"thought[suffix={_quoted(THOUGHT_END)}]: {ANY_TEXT}", "BREAKS: /\\n*/"]
    if form is not None:
        lines += [f"form: {_form(form)}"]
    if calls:
        rule = _hermes_rule if format == "hermes" else _xml_rule
        opening, closing = _quoted(OPEN + "\n"), _quoted("\n" + CLOSE)
        lines += [f"calls: call{' (BREAK call)*' if parallel else ''}", 'BREAK: "\\n"']
        lines += [f"call: {opening} ({' | '.join(f'call{i}' for i in range(len(calls)))}) {closing}"]
        lines += [line for i, tool in enumerate(calls) for line in rule(i, tool["function"])]
    return grammar("\n".join(lines) + "\n")


def _form(form: Structure) -> str:
    """As the right side of a rule."""
    if form.kind == "json_schema":
        return f"%json {form.source}"
    if form.kind == "regex":
        return "/" + form.source.replace("/", "\\/").replace("\n", "\\n") + "/"
    if form.kind == "choice":
        return " | ".join(_quoted(text) for text in json.loads(form.source))
    raise invalid("a grammar goes with neither tools nor reasoning: ask without tools, and with enable_thinking false")


def _hermes_rule(index: int, function: Mapping[str, Any]) -> list[str]:
    head = _quoted(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
    schema = json.dumps({"type": "object", **(function.get("parameters") or {}), **AS_TRAINED})
    return [f'call{index}: {head} arguments{index} "}}"', f"arguments{index}: %json {schema}"]


def _xml_rule(index: int, function: Mapping[str, Any]) -> list[str]:
    """Arguments come in the order of the schema; those that may be missing may be left out."""
    schema = function.get("parameters") or {}
    required = schema.get("required") or []
    lines, body = [], []
    for number, (name, value) in enumerate((schema.get("properties") or {}).items()):
        rule = f"argument{index}_{number}"
        body.append(rule if name in required else f"{rule}?")
        lines += _xml_argument(rule, name, value if isinstance(value, dict) else {})
    head, tail = _quoted(f"<function={function['name']}>\n"), _quoted("</function>")
    return [f"call{index}: {' '.join([head, *body, tail])}", *lines]


def _xml_argument(rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
    head, tail = _quoted(f"<parameter={name}>\n"), _quoted("\n</parameter>\n")
    texts = schema.get("enum")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return [f"{rule}: {head} ({' | '.join(map(_quoted, texts))}) {tail}"]
    if is_string(schema):
        return [f"{rule}: {head} {rule}_text", f"{rule}_text[suffix={tail}]: {ANY_TEXT}"]
    return [f"{rule}: {head} {rule}_value {tail}", f"{rule}_value: %json {json.dumps({**schema, **AS_TRAINED})}"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
