"""Where answers end: as if the whole text had been there at once, however it was cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.engine.stopping import Stopping, Verdict
from tenfold.tokenizer import StreamDecoder, Tokenizer

END = 1000


class Pieces:
    """Token i is the i-th piece of a text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["to be or not to be"], 300)


def run(stopping: Stopping, tokens: Sequence[int]) -> tuple[str, list[int], Verdict]:
    """All text, all tokens and the last verdict."""
    text, told = "", list[int]()
    for token in tokens:
        verdict = stopping.push(token)
        text, told = text + verdict.text, [*told, *verdict.tokens]
        if verdict.finish:
            return text, told, verdict
    rest = stopping.finish()
    return text + rest.text, [*told, *rest.tokens], rest


def naive(text: str, strings: Sequence[str]) -> tuple[str, str | None]:
    """The text before the string that is complete first, and that string."""
    for end in range(len(text) + 1):
        for string in sorted(strings, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], string
    return text, None


TEXT = st.text("ab", max_size=6)


@given(pieces=st.lists(TEXT, max_size=12), strings=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_stop_strings_do_not_depend_on_tokens(pieces: list[str], strings: list[str]) -> None:
    text, told, last = run(Stopping([], strings=strings, decoder=Pieces(pieces)), range(len(pieces)))
    expected, found = naive("".join(pieces), strings)
    assert (text, last.stopped_by, last.finish) == (expected, found, "stop" if found else None)
    assert told == list(range(len(told)))
    if found:  # the tokens that begin in the text, and no others; empty ones at its end may be there
        begins = [len("".join(pieces[:i])) for i in range(len(pieces))]
        assert all(begins[i] < len(text) or not pieces[i] for i in told)
        assert all(begins[i] >= len(text) for i in range(len(told), len(pieces)))
    else:
        assert len(told) == len(pieces)


@given(pieces=st.lists(TEXT, max_size=12), strings=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_only_what_may_become_a_stop_string_is_held_back(pieces: list[str], strings: list[str]) -> None:
    stopping, told = Stopping([], strings=strings, decoder=Pieces(pieces)), ""
    for token in range(len(pieces)):
        verdict = stopping.push(token)
        told += verdict.text
        if verdict.finish:
            return
        held = "".join(pieces[: token + 1])[len(told) :]
        assert not held or any(s != held and s.startswith(held) for s in strings)


@given(text=st.text(st.sampled_from("ab é深🙂"), max_size=12), stop=st.sampled_from(["🙂", "é", "深b", " a"]))
def test_real_tokens_with_characters_of_several_bytes(text: str, stop: str) -> None:
    tokenizer = trained()
    decoder = tokenizer.stream(skip_special_tokens=True)
    told, _, last = run(Stopping([], strings=[stop], decoder=decoder), tokenizer.encode(text))
    whole = tokenizer.decode(tokenizer.encode(text))
    assert (told, last.stopped_by) == naive(whole, [stop])


def trained() -> Tokenizer:
    return Tokenizer.train(["ab"], 259)


def test_a_character_that_never_gets_complete(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🙂")[:-1]
    stopping = Stopping([END], decoder=tokenizer.stream())
    assert run(stopping, [*tokens, END]) == ("\ufffd", tokens, Verdict(text="\ufffd", finish="stop", stopped_by=END))


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    special, (a, *_) = tokenizer.eos_id, tokenizer.encode("b")
    decoder: StreamDecoder = tokenizer.stream(skip_special_tokens=True)
    text, told, _ = run(Stopping([], strings=["bb"], decoder=decoder), [special, a, special])
    assert (text, told) == ("b", [special, a, special])


def test_stop_tokens_end_and_are_not_told() -> None:
    text, told, last = run(Stopping([2], strings=["cx"], decoder=Pieces("abcd")), [0, 1, 2, 3])
    assert (text, told, last.finish, last.stopped_by) == ("ab", [0, 1], "stop", 2)
    assert Stopping([2]).push(1) == Verdict(tokens=[1])


def test_what_was_held_back_is_told_at_the_end() -> None:
    stopping = Stopping([], strings=["bcd"], decoder=Pieces("abce"), max_tokens=3)
    assert [stopping.push(token) for token in range(3)] == [
        Verdict(tokens=[0], text="a"),
        Verdict(tokens=[]),
        Verdict(tokens=(1, 2), text="bc", finish="length"),
    ]


def test_a_stop_string_at_the_last_token_counts() -> None:
    _, told, last = run(Stopping([], strings=["bc"], decoder=Pieces("abc"), max_tokens=3), [0, 1, 2])
    assert (told, last.finish, last.stopped_by) == ([0], "stop", "bc")


def test_before_min_tokens_no_stop_string_is_looked_for() -> None:
    pieces = Pieces(["b", "b", "a", "b"])
    text, _, last = run(Stopping([], strings=["b"], decoder=pieces, min_tokens=3), range(4))
    assert (text, last.stopped_by) == ("bba", "b")


def test_strings_need_a_decoder() -> None:
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        Stopping([], strings=["x"])
