"""Structured answers: whatever is drawn, it has the form; and no grammar does harm."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.engine import LLM, SamplingParams
from tenfold.engine.sampler import Sampler
from tenfold.engine.structure import Constraint, Structure, StructureCompiler
from tenfold.models.qwen3 import Qwen3Config
from tenfold.tokenizer import Tokenizer

pytest.importorskip("llguidance")

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "深い"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"type": "object", "additionalProperties": False}]},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def qwen() -> StructureCompiler:
    return StructureCompiler(Tokenizer.embedded())


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(['{"name": "to be", "age": 12, "tags": []} or not'], 300)


@pytest.fixture(scope="module")
def small(small_tokenizer: Tokenizer) -> StructureCompiler:
    return StructureCompiler(small_tokenizer)


def answer(constraint: Constraint, vocab_size: int, seed: int, limit: int = 400) -> list[int]:
    """Tokens drawn from random logits under the constraint, more of them than the tokenizer knows."""
    sampler = Sampler(SamplingParams(seed=seed, temperature=2, top_p=1))
    random = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not constraint.is_done:
        logits = torch.randn(vocab_size + 100, generator=random)
        token = sampler.sample(logits, len(tokens), mask=constraint.mask())
        constraint.advance(token)
        tokens.append(token)
        assert len(tokens) < limit
    return tokens


def check_person(text: str) -> None:
    value = json.loads(text)
    assert isinstance(value, dict) and {"name", "age", "home"} <= set(value) <= set(PERSON["properties"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 8
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert value["home"] in (None, {})
    tags = value.get("tags", [])
    assert len(tags) <= 3 and set(tags) <= {"a", "b", "深い"}


@pytest.mark.parametrize("seed", range(4))
def test_random_logits_give_valid_json(qwen: StructureCompiler, seed: int) -> None:
    tokenizer = qwen._tokenizer
    tokens = answer(qwen.compile(Structure("json_schema", json.dumps(PERSON))), tokenizer.vocab_size, seed)
    check_person(tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("seed", range(8))
def test_random_logits_and_a_tokenizer_of_our_own(
    small: StructureCompiler, small_tokenizer: Tokenizer, seed: int
) -> None:
    tokens = answer(small.compile(Structure("json_schema", json.dumps(PERSON))), small_tokenizer.vocab_size, seed)
    check_person(small_tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (Structure("regex", r"\d{3}-[a-f]+!"), r"\d{3}-[a-f]+!"),
        (Structure("choice", json.dumps(["to be", 'n"ot\n', "深い"])), 'to be|n"ot\n|深い'),
        (Structure("grammar", 'start: "<" inner ">"\ninner: /[a-z]{1,3}/ ("," inner)?'), r"<[a-z]{1,3}(,[a-z]{1,3})*>"),
    ],
)
def test_other_forms(small: StructureCompiler, small_tokenizer: Tokenizer, structure: Structure, pattern: str) -> None:
    for seed in range(5):
        tokens = answer(small.compile(structure), small_tokenizer.vocab_size, seed)
        text = small_tokenizer.decode(tokens, skip_special_tokens=True)
        assert re.fullmatch(pattern, text), text


def test_stop_tokens_are_allowed_exactly_where_the_answer_may_end(small: StructureCompiler) -> None:
    constraint, tokenizer = small.compile(Structure("regex", "ab?")), small._tokenizer
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert np.flatnonzero(constraint.mask()).tolist() == [a] and not constraint.is_complete
    constraint.advance(a)
    assert set(np.flatnonzero(constraint.mask())) == {b, *tokenizer.stop_ids}
    assert constraint.is_complete and not constraint.is_done
    constraint.advance(b)
    assert set(np.flatnonzero(constraint.mask())) == set(tokenizer.stop_ids) and constraint.is_done


# ---- drafts --------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 50), steps=st.lists(st.integers(1, 6), max_size=5))
def test_drafts_are_taken_back_exactly(seed: int, steps: list[int]) -> None:
    """A constraint that was led astray between any two tokens still gives the same masks."""
    compiler = shared()
    plain, tried = (compiler.compile(Structure("json_schema", json.dumps(PERSON))) for _ in range(2))
    random = np.random.default_rng(seed)
    for length in steps:
        for draft in range(length):
            tried.advance(int(random.choice(np.flatnonzero(tried.mask()))))
            if tried.is_done:
                length = draft + 1
                break
        tried.rollback(length)
        assert np.array_equal(tried.mask(), plain.mask())
        token = int(random.choice(np.flatnonzero(plain.mask())))
        plain.advance(token)
        tried.advance(token)
        if plain.is_done:
            return


_shared: list[StructureCompiler] = []


def shared() -> StructureCompiler:
    """For tests under hypothesis, which has no fixtures of a module."""
    if not _shared:
        _shared.append(StructureCompiler(Tokenizer.train(['{"name": "to be", "age": 12}'], 280)))
    return _shared[0]


def test_drafts_are_checked_without_moving(small: StructureCompiler) -> None:
    constraint, tokenizer = small.compile(Structure("choice", '["to be"]')), small._tokenizer
    tokens = tokenizer.encode("to be")
    before = constraint.mask()
    assert constraint.forced() == tokens
    assert constraint.legal([*tokens, tokens[0]]) == len(tokens)
    assert constraint.legal([tokenizer.encode("x")[0]]) == 0
    assert np.array_equal(constraint.mask(), before)


def test_a_token_that_is_not_allowed_changes_nothing(small: StructureCompiler) -> None:
    constraint = small.compile(Structure("regex", "ab"))
    before = constraint.mask()
    with pytest.raises(ValueError, match="does not allow token 3 here"):
        constraint.advance(3)
    assert np.array_equal(constraint.mask(), before)
    with pytest.raises(ValueError, match="taken back by 2"):
        constraint.rollback(2)


# ---- bad structures ------------------------------------------------------------------------------------


def chain(length: int) -> str:
    """A schema whose references go so deep that following them overflows a stack."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return json.dumps({"$defs": links | {f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", "{", "json_schema: EOF while parsing"),
        ("json_schema", "false", "json_schema: "),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable schema"),
        ("json_schema", '{"$ref": "https://example.com/x"}', "failed"),
        ("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000, "recursion limit"),
        (
            "json_schema",
            json.dumps({"allOf": [{"anyOf": [{"required": [str(i)]} for i in range(9)]}] * 9}),
            "too large",
        ),
        ("json_schema", '{"type": "integer", "multipleOf": 100000007}', "too much time, memory or depth"),
        ("json_schema", chain(9000)[: 1 << 18], "json_schema: "),
        ("regex", "(a", "regex: .*unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"[^\s\S]", "no text can fulfil it"),
        ("regex", "(" * 50_000, "regex: "),
        ("regex", "\ud800", "surrogates not allowed"),
        ("choice", "[]", "choice: expected a list of texts"),
        ("choice", '["a", ""]', "choice: expected a list of texts"),
        ("choice", "[" * 50_000, "choice: "),
        ("grammar", "start: foo", 'unknown name: "foo"'),
        ("grammar", "start: start", "no text can fulfil it"),
        (
            "grammar",
            "start: A\nA: B B\nB: C C\n"
            + "".join(f"{a}: {b} {b}\n" for a, b in zip("CDEFGHIJKLMNOPQRSTU", "DEFGHIJKLMNOPQRSTUV", strict=True))
            + 'V: "x" | "y"',
            "grammar: ",
        ),
        ("grammar", "start: " + "(" * 50_000, "too deeply nested"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_bad_structures_are_refused_in_one_line(small: StructureCompiler, kind: Any, source: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        small.compile(Structure(kind, source))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350
    assert time.process_time() - started < 5


def test_deep_references_do_not_end_the_process(small: StructureCompiler) -> None:
    """5,000 of them need more stack than threads have."""
    source = chain(5000)
    try:
        constraint = small.compile(Structure("json_schema", source))
    except ValueError as error:
        assert "depth" in str(error)
    else:
        assert constraint.legal(small._tokenizer.encode("null"))


def test_unknown_kinds_and_long_sources() -> None:
    with pytest.raises(ValueError, match="'xml' is unknown"):
        Structure("xml", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="300000 characters"):
        Structure("regex", "a" * 300_000)


def test_a_grammar_that_explodes_while_it_runs_ends_its_own_request_only(small: StructureCompiler) -> None:
    """Ambiguous: each token could end any of ever more parts."""
    constraint = small.compile(
        Structure("grammar", 'start: s\ns: s s s s s s | s s s s s | s s s s | s s s | s s | "a" |')
    )
    other = small.compile(Structure("regex", "[ab]*"))
    (a,), slowest, started = small._tokenizer.encode("a"), 0.0, time.thread_time()
    with pytest.raises(ValueError, match="structure cannot be followed") as caught:
        for _ in range(3000):
            constraint.mask()
            constraint.advance(a)
            slowest, started = max(slowest, time.thread_time() - started), time.thread_time()
    assert "\n" not in str(caught.value) and slowest < 1
    assert other.mask()[a]


# ---- the compiler --------------------------------------------------------------------------------------


def test_compiled_grammars_are_kept_and_not_shared(small: StructureCompiler) -> None:
    structure = Structure("regex", "kept[ab]")
    first = small.compile(structure)
    first.advance(small._tokenizer.encode("k")[0])
    started = time.process_time()
    second = small.compile(structure)
    assert time.process_time() - started < 0.05
    assert second.mask()[small._tokenizer.encode("k")[0]]


def test_the_grammars_kept_take_no_more_than_so_much(small_tokenizer: Tokenizer) -> None:
    compiler = StructureCompiler(small_tokenizer)
    for number in range(6):  # as large as they may be, each another
        words = [f"{number} {word:05}" for word in range(18_000)]
        compiler.compile(Structure("regex", f"({'|'.join(words)})"))
        kept = [structure.source for structure in compiler._compiled]
        assert sum(map(len, kept)) <= 1 << 20
        assert kept[-1].startswith(f"({number} ")
    for number in range(100):
        compiler.compile(Structure("regex", f"a{{{number}}}b"))
    assert len(compiler._compiled) <= 64


def test_several_threads(small: StructureCompiler) -> None:
    found: list[int] = []
    structure = Structure("regex", "[ab]{3}")

    def work() -> None:
        for seed in range(20):
            found.append(len(answer(small.compile(structure), small._tokenizer.vocab_size, seed)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and set(found) <= {1, 2, 3, 4}


class Noise:
    """A model whose logits are random, but the same for the same position."""

    def __init__(self, vocab_size: int) -> None:
        self.config = Qwen3Config(num_hidden_layers=1, vocab_size=vocab_size, max_position_embeddings=2000)

    def new_cache(self) -> list[int]:
        return []

    def next_logits(self, tokens: Any, cache: list[int]) -> torch.Tensor:
        cache += tokens
        return torch.randn(self.config.vocab_size, generator=torch.Generator().manual_seed(len(cache)))


def test_llm_answers_in_the_form(small_tokenizer: Tokenizer) -> None:
    llm = LLM(Noise(small_tokenizer.vocab_size), small_tokenizer)
    structure = Structure("json_schema", json.dumps(PERSON))
    texts = ["".join(llm.generate("x", SamplingParams(seed=seed, structure=structure))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    for text in texts:
        check_person(text)


def test_llm_ends_at_stop_strings(small_tokenizer: Tokenizer) -> None:
    llm, params = LLM(Noise(small_tokenizer.vocab_size), small_tokenizer), SamplingParams(max_tokens=60)
    whole = "".join(llm.generate("x", params))
    stop = whole[20:23]
    assert "".join(llm.generate("x", SamplingParams(max_tokens=60, stop=(stop,)))) == whole[: whole.index(stop)]
