"""Calls of tools, read out of an answer while it comes, in the two formats that Qwen3-Next's models write.

    <tool_call>                                       <tool_call>
    {"name": "add", "arguments": {"a": 1}}            <function=add>
    </tool_call>                                      <parameter=a>
                                                      1
                                                      </parameter>
                                                      </function>
                                                      </tool_call>

What is no call after all is passed on as the text that it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, Protocol

from tenfold.engine.stopping import held_back
from tenfold.server.parts import CallArguments, CallStart, Part, Text, call_id

Format = Literal["hermes", "xml"]
Schemas = Mapping[str, Mapping[str, Any]]  # of the parameters, by the name of the tool
OPEN, CLOSE, FUNCTION, VALUE_END = "<tool_call>", "</tool_call>", "<function=", "</parameter>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
XML_HEAD = re.compile(r"\s*<function=([^>\n]+)>")
XML_NEXT = re.compile(r"<parameter=([^>\n]+)>\n?|</function>")
JSON_TYPES: Mapping[type, set[str]] = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    list: {"array"},
    dict: {"object"},
    str: {"string"},
    NoneType: {"null"},
}
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def tool_format(template: str) -> Format | None:
    """The format that a chat template teaches."""
    if OPEN not in template:
        return None
    return "xml" if FUNCTION in template else "hermes"


class CallReader(Protocol):
    """Reads one call; `rest` is what follows it, once it is `done`."""

    done: bool
    rest: str

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


class ToolReader:
    """Tells calls from text. White space between text and a call, or between calls, is part of the format."""

    def __init__(self, format: Format, schemas: Schemas) -> None:
        self._format, self._schemas = format, schemas
        self._tags = [OPEN] if format == "hermes" else [OPEN, FUNCTION]
        self._buffer = ""
        self._call: CallReader | None = None
        self._told = False  # text since the last call

    def push(self, text: str) -> Sequence[Part]:
        self._buffer += text
        parts: list[Part] = []
        while self._buffer:
            if self._call is None and not self._begin_call(parts):
                break
            parts += self._read_call()
            if self._call is not None:
                break
        return parts

    def finish(self) -> Sequence[Part]:
        if self._call is not None:
            return self._call.finish()
        return self._text(self._buffer) if self._told or self._buffer.strip() else []

    def _begin_call(self, parts: list[Part]) -> bool:
        found = [(at, tag) for tag in self._tags if (at := self._buffer.find(tag)) >= 0]
        if not found:
            body = self._buffer[: len(self._buffer) - held_back(self._buffer, self._tags)].rstrip()
            parts += self._text(body)
            self._buffer = self._buffer[len(body) :]
            return False
        at, tag = min(found)
        before = self._buffer[:at]
        if self._told or before.strip():
            parts += self._text(before.removesuffix("\n"))
        self._call = self._new_call(tag)
        self._buffer = self._buffer[at + len(OPEN) if tag == OPEN else at :]
        return True

    def _new_call(self, tag: str) -> CallReader:
        return HermesCall() if self._format == "hermes" else XmlCall(self._schemas, OPEN if tag == OPEN else "")

    def _read_call(self) -> list[Part]:
        assert self._call is not None
        parts = self._call.push(self._buffer)
        self._buffer = ""
        if self._call.done:
            self._buffer, self._call = self._call.rest, None
            self._told = isinstance(parts[-1], Text) if parts else False
        return parts

    def _text(self, text: str) -> list[Part]:
        self._told = self._told or bool(text)
        return [Text(text)] if text else []


class HermesCall:
    """A call as JSON. The arguments are passed on as they are written, so that a model reads later what it wrote."""

    def __init__(self) -> None:
        self.done, self.rest = False, ""
        self._buffer = ""
        self._state: Literal["head", "arguments", "tail"] = "head"
        self._scan = JsonScan()

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        parts: list[Part] = []
        if self._state == "head":
            parts += self._head()
        if self._state == "arguments":
            parts += self._arguments()
        if self._state == "tail" and CLOSE in self._buffer:
            self.done, self.rest = True, self._buffer.partition(CLOSE)[2]
        return parts

    def finish(self) -> list[Part]:
        return self._whole(self._buffer, "") if self._state == "head" else []

    def _head(self) -> list[Part]:
        if match := HEAD.match(self._buffer):
            self._buffer, self._state = self._buffer[match.end() :], "arguments"
            return [CallStart(_loads(match[1]) or "", call_id())]
        if CLOSE not in self._buffer:
            return []
        body, _, self.rest = self._buffer.partition(CLOSE)
        self.done = True
        return self._whole(body, CLOSE)

    def _arguments(self) -> list[Part]:
        end = self._scan.end(self._buffer)
        size = len(self._buffer) if end is None else end
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        if end is not None:
            self._state = "tail"
        return [CallArguments(piece)] if piece else []

    def _whole(self, body: str, close: str) -> list[Part]:
        call = _loads(body)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return [Text(OPEN + body + close)]
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [CallStart(call["name"], call_id()), CallArguments(text)]


class JsonScan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._string, self._escaped = 0, False, False

    def end(self, text: str) -> int | None:
        """Where in this piece the object ends, behind its last brace."""
        for at, character in enumerate(text):
            if self._string:
                self._inside(character)
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None

    def _inside(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._string = False


class XmlCall:
    """A call as tags. Arguments that are strings are passed on as they come, others once they are complete."""

    def __init__(self, schemas: Schemas, opened: str) -> None:
        """opened: the tag that was read before, for a call that turns out to be text."""
        self.done, self.rest = False, ""
        self._schemas, self._opened = schemas, opened
        self._buffer, self._sent = "", 0  # arguments that were begun
        self._schema: Mapping[str, Any] = {}
        self._value: Mapping[str, Any] | None = None  # the schema of the argument that is being read
        self._state: Literal["head", "between", "value", "tail"] = "head"

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        parts: list[Part] = []
        before = None
        while not self.done and before != (self._state, len(self._buffer)):
            before = self._state, len(self._buffer)
            step = {"head": self._head, "between": self._between, "value": self._read_value, "tail": self._tail}
            parts += step[self._state]()
        return parts

    def finish(self) -> list[Part]:
        if self._state == "head":
            return [Text(self._opened + self._buffer)]
        if self._state == "value" and is_string(self._value):
            return [CallArguments(_quoted(self._buffer))]
        return []

    def _head(self) -> list[Part]:
        if match := XML_HEAD.match(self._buffer):
            name = match[1].strip()
            self._schema = self._schemas.get(name, {}).get("properties") or {}
            self._buffer, self._state = self._buffer[match.end() :], "between"
            return [CallStart(name, call_id())]
        begun = self._buffer.lstrip()
        if FUNCTION.startswith(begun) or (begun.startswith(FUNCTION) and "\n" not in begun):
            return []
        self.done = True
        return [Text(self._opened + self._buffer)]

    def _between(self) -> list[Part]:
        match = XML_NEXT.search(self._buffer)
        if match is None or (match.end() == len(self._buffer) and match[0][-1] == ">" and match[1]):
            return []  # or the line break behind the tag has yet to come
        self._buffer = self._buffer[match.end() :]
        opening = "{" if not self._sent else ", "
        if match[1] is None:
            self._state = "tail"
            return [CallArguments("}" if self._sent else "{}")]
        self._sent += 1
        name = match[1].strip()
        self._value, self._state = self._schema.get(name) or {}, "value"
        quote = '"' if is_string(self._value) else ""
        return [CallArguments(f"{opening}{json.dumps(name, ensure_ascii=False)}: {quote}")]

    def _read_value(self) -> list[Part]:
        end = self._buffer.find(VALUE_END)
        if end >= 0:
            value, self._buffer = self._buffer[:end].removesuffix("\n"), self._buffer[end + len(VALUE_END) :]
            self._state = "between"
            closed = _quoted(value) + '"' if is_string(self._value) else convert(value, self._value or {})
            return [CallArguments(closed)]
        if not is_string(self._value):
            return []
        size = len(self._buffer) - held_back(self._buffer, ["\n" + VALUE_END, VALUE_END])
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        return [CallArguments(_quoted(piece))] if piece else []

    def _tail(self) -> list[Part]:
        begun = self._buffer.lstrip()
        if begun.startswith(CLOSE):
            self.done, self.rest = True, begun[len(CLOSE) :]
        elif not CLOSE.startswith(begun):
            self.done, self.rest = True, self._buffer
        return []


def convert(text: str, schema: Mapping[str, Any]) -> str:
    """An argument as JSON of a type that its schema has; a string where it is none of them."""
    types = _types(schema)
    try:
        value = json.loads(PYTHON_WORDS.get(text.strip(), text))
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    fits = JSON_TYPES[type(value)] & types
    return json.dumps(value if fits else text, ensure_ascii=False)


def _types(schema: object) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    types = schema.get("type")
    found = (
        {types}
        if isinstance(types, str)
        else {t for t in types if isinstance(t, str)}
        if isinstance(types, list)
        else set()
    )
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        found |= set().union(*map(_types, options)) if isinstance(options, list) else set()
    return found


def is_string(schema: Mapping[str, Any] | None) -> bool:
    """Whether an argument can be nothing but text, as it is where its schema says nothing."""
    return not _types(schema or {}) - {"string"}


def _quoted(text: str) -> str:
    """The inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
