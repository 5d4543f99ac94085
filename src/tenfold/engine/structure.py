"""Answers of a given form: JSON by a schema, a regular expression, one of several texts, or a grammar.

llguidance says which tokens may come next. It compiles most grammars in a millisecond and needs less than that for
most masks. Some grammars explode: a new one is first compiled by a process of its own, which may die of it, and a
request whose masks take too long ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tenfold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

STACK_LOCK = threading.Lock()  # the size is a setting of the whole process
LONGEST_SOURCE = 1 << 18  # characters
LONGEST_MESSAGE = 300
KEPT = 1 << 20  # characters of the grammars kept; a compiled one takes up to 70 bytes for each
AT_LEAST = 1 << 14  # characters that one counts for: small ones take memory too
STACK = 128 << 20  # bytes of address space; several times what was enough for the check
CHECK = Path(__file__).with_name("grammar_check.py")
MOST_ITEMS = 1000  # of a row of the parser; ambiguous grammars have ever more, and take ever longer
MOST_SECONDS = 0.1  # of CPU time for one mask, which the other requests wait for
WHITE_SPACE = r"[ \n\r\t]{1,40}"  # between the parts of JSON; without an end, models lose themselves in it


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


class Constraint:
    """Where an answer stands in its structure. Only tokens of the answer are pushed; drafts are tried and taken back.

    To verify drafts: take `mask`, draw, `advance` by the token drawn, and go on while it is the draft.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_done(self) -> bool:
        """Nothing but a stop token can follow: the answer may end here, without one."""
        return self._matcher.is_stopped()

    @property
    def is_complete(self) -> bool:
        """The answer may end here."""
        return self._matcher.is_accepting()

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, `[vocab]` of the tokenizer; stop tokens where the answer may end.

        Raises ValueError where the grammar turns out to be too complex; the request ends with that."""
        started = time.thread_time()
        bits = self._matcher.compute_bitmask()
        self._check()
        if time.thread_time() - started > MOST_SECONDS:
            raise ValueError("the structure cannot be followed: its grammar is too ambiguous, write it simpler")
        unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._vocab_size, bitorder="little")
        return unpacked.view(np.bool_)

    def advance(self, token: int) -> None:
        """The answer goes on with a token. Raises ValueError where it may not, and nothing has changed then; or
        where the grammar turns out to be too complex."""
        taken = self._matcher.try_consume_tokens([token])
        self._check()
        if not taken:
            raise ValueError(f"the structure does not allow token {token} here")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the structure cannot be followed: {_reason(self._matcher.get_error())}")

    def rollback(self, count: int) -> None:
        """As before the last `count` tokens."""
        if not self._matcher.rollback(count):
            raise ValueError(f"the structure cannot be taken back by {count} tokens")

    def legal(self, drafts: Sequence[int]) -> int:
        """How many of the drafts, from the first one on, may follow here."""
        return self._matcher.validate_tokens(list(drafts))

    def forced(self) -> list[int]:
        """The tokens that have to follow, as the tokenizer would cut their text: drafts that cost nothing."""
        return self._matcher.compute_ff_tokens()


class _Vocabulary:
    """The tokens as llguidance asks for them. Tags such as `<tool_call>` are text to it, and special tokens are not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.stop_ids[0], None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = tokenizer.special_ids

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"))


class StructureCompiler:
    """Makes constraints for a tokenizer; may be called from several threads. The latest grammars are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Structure, LLMatcher] = OrderedDict()  # the latest at the end

    def compile(self, structure: Structure) -> Constraint:
        """A constraint at the beginning of an answer.

        Takes up to a second for very large sources, once, so not in the engine's thread. Raises ValueError for
        what is wrong, not supported, or can't be fulfilled, and where llguidance is not installed.
        """
        environment = self.environment
        with self._lock:
            fresh = self._compiled.get(structure)
        fresh = fresh or self._compile(structure)
        with self._lock:  # it may not be copied by two at a time
            self._keep(structure, fresh)
            return Constraint(fresh.deep_copy(), environment.vocab_size)

    def _keep(self, structure: Structure, fresh: LLMatcher) -> None:
        """As the latest; the oldest go where that is too much."""
        self._compiled[structure] = fresh
        self._compiled.move_to_end(structure)
        while sum(max(len(kept.source), AT_LEAST) for kept in self._compiled) > KEPT:
            self._compiled.popitem(last=False)

    @property
    def environment(self) -> LLTokenizer:
        """The tokenizer as llguidance sees it, built on first use: 1.5 s for a vocabulary of 150,000."""
        with self._lock:
            return self._environment

    @cached_property
    def _environment(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise ValueError("structured output needs llguidance: pip install 'tenfold[serve]'") from None
        stop_ids = list(self._tokenizer.stop_ids)
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)), eos_token=stop_ids)

    def _compile(self, structure: Structure) -> LLMatcher:
        try:
            grammar = _grammar(structure)
            _check(grammar)
            return _with_stack(lambda: self._matcher(grammar))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{structure.kind}: {_reason(str(error))}") from None

    def _matcher(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_items_in_row=MOST_ITEMS, verbose_errors=False)
        matcher = LLMatcher(self._environment, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out where nothing can follow with this vocabulary
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher


def _check(grammar: str) -> None:
    """Raises ValueError for a grammar that is wrong or takes too much, as a process found out that was at stake.

    It limits its own CPU time and memory; the clock on the wall would refuse sound grammars on a busy machine.
    """
    command = [sys.executable, "-P", str(CHECK), str(MOST_ITEMS)]
    done = subprocess.run(command, input=grammar.encode(), capture_output=True)
    if done.returncode:
        raise ValueError("it takes too much time, memory or depth to compile, write it simpler")
    if done.stdout:
        raise ValueError(done.stdout.decode(errors="replace"))


def _with_stack(task: Callable[[], T]) -> T:
    """Runs a task in a thread with a stack of its own: llguidance recurses, and an overflow would end the process."""
    with ThreadPoolExecutor(1) as pool:
        with STACK_LOCK:
            usual = threading.stack_size(STACK)
            try:
                future = pool.submit(task)  # starts the thread
            finally:
                threading.stack_size(usual)
        return future.result()


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher

    match structure.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(structure.source, {"whitespace_pattern": WHITE_SPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(structure.source)
        case "choice":
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(_choices(structure.source))}")
        case "grammar":
            return LLMatcher.grammar_from_lark(structure.source)


def _choices(source: str) -> list[str]:
    """The texts as literals of Lark, which are those of JSON."""
    texts = json.loads(source)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("expected a list of texts, at least one and none empty")
    return [json.dumps(text, ensure_ascii=False) for text in texts]


def _reason(message: str) -> str:
    """One short line of what llguidance has to say."""
    if "NoExtensionBias" in message:
        return "no text can fulfil it"
    line = " ".join(message.split("<non-verbose/>")[0].split())
    return line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "..."
