"""Reasoning is told from the answer behind it, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.engine.reasoning import ReasoningSplitter, begins_in_reasoning

texts = st.text("ab<\n/", max_size=12)


def split(text: str, cuts: list[int], inside: bool) -> tuple[str, str]:
    """The reasoning and the answer of a text that comes in pieces."""
    places = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    splitter = ReasoningSplitter(inside)
    pieces = [piece for a, b in pairwise(places) for piece in splitter.push(text[a:b])] + list(splitter.finish())
    assert all(piece.text for piece in pieces)
    thoughts = "".join(piece.text for piece in pieces if piece.reasoning)
    return thoughts, "".join(piece.text for piece in pieces if not piece.reasoning)


@given(
    thought=texts.map(lambda text: text.strip("\n")),
    answer=texts.map(lambda text: text.lstrip("\n")),
    opened=st.sampled_from(["no", "prompt", "answer"]),
    cuts=st.lists(st.integers(0, 99), max_size=8),
)
def test_reasoning_is_told_apart_however_it_is_cut(thought: str, answer: str, opened: str, cuts: list[int]) -> None:
    before = {"no": "", "prompt": f"{thought}\n</think>\n\n", "answer": f"<think>\n{thought}</think>\n\n"}[opened]
    assert split(before + answer, cuts, opened == "prompt") == ("" if opened == "no" else thought, answer)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_only_a_prompt_that_opens_reasoning_begins_in_it(prompt: str, inside: bool) -> None:
    assert begins_in_reasoning(prompt) == inside
