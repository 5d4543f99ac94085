"""Answers of a given form: JSON by a schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LONGEST_SOURCE = 1 << 20  # characters; what is longer than any schema in use is refused unread


@dataclass(frozen=True)
class Structure:
    """The form that an answer must have.

    source: a JSON schema as text, a regular expression (of Rust's `regex`: no look-around, no back-references), the
    texts to choose from as a JSON array of strings, or a grammar in llguidance's dialect of Lark.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "choice", "grammar"):
            raise ValueError(f"structure: {self.kind!r} is unknown, use json_schema, regex, choice or grammar")
        if len(self.source) > LONGEST_SOURCE:
            raise ValueError(f"{self.kind}: {len(self.source)} characters, at most {LONGEST_SOURCE} are taken")
