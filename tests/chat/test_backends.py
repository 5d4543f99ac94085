"""What answers in a chat: a model alone, the engine, a server; and how a conversation is kept."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from tenfold import cli
from tenfold.chat.backend import Cost, Options
from tenfold.chat.conversation import Conversation
from tenfold.chat.display import AnswerDisplay, finished, keep_maths
from tenfold.chat.local import EngineBackend, open_local
from tenfold.chat.remote import ServerBackend
from tenfold.engine.llm import LLM
from tenfold.engine.reasoning import Piece
from tenfold.engine.request import Request, Update, Usage
from tenfold.engine.sampler import SamplingParams
from tenfold.kernels import cpu
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.weights import save_model
from tenfold.tokenizer import Tokenizer

SMALL = Qwen3Config(
    vocab_size=280, num_hidden_layers=1, hidden_size=32, intermediate_size=32, max_position_embeddings=120
)
HELLO = [{"role": "user", "content": "to be?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["to be or not to be"], 300)


# ---- here --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("model"), Qwen3(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder, tokenizer=tokenizer)
    return folder


def test_a_model_alone_answers_as_llm_does(folder: Path) -> None:
    backend, llm = open_local(str(folder), "float32", "cpu", None), LLM.load(folder)
    *pieces, cost = backend.answer(HELLO, Options(max_tokens=12, temperature=0.0))
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    assert text == "".join(llm.chat(HELLO, SamplingParams(max_tokens=12, temperature=0)))
    prompt = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(HELLO))
    assert isinstance(cost, Cost) and cost.prompt_tokens == len(prompt) and cost.cached_tokens is None


def test_the_command_talks_with_a_model_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("to be?\n"))
    assert cli.main(["chat", str(folder), "--max-tokens", "12", "--temperature", "0"]) == 0
    llm = LLM.load(folder, quantization="bf16" if cpu.available() else None)
    assert capsys.readouterr().out == "".join(llm.chat(HELLO, SamplingParams(max_tokens=12, temperature=0))) + "\n"


def test_a_seed_repeats_an_answer_and_without_one_it_varies(folder: Path) -> None:
    backend = open_local(str(folder), "float32", "cpu", None)
    options = [Options(max_tokens=20, temperature=2.0, seed=seed) for seed in (1, 1, None, None)]
    answers = [list(backend.answer(HELLO, chosen)) for chosen in options]
    assert answers[0] == answers[1] and answers[2] != answers[3]


@pytest.mark.skipif(not cpu.available(), reason="the native kernels are not built")
def test_a_second_turn_reads_only_what_is_new(folder: Path) -> None:
    backend = open_local(str(folder), None, "cpu", None)
    conversation, costs = Conversation("to be"), []
    for question in ("or not?", "to be?"):
        conversation.ask(question)
        *pieces, cost = backend.answer(conversation.messages, Options(max_tokens=8, temperature=0.0))
        conversation.answered("".join(piece.text for piece in pieces if isinstance(piece, Piece)))
        assert isinstance(cost, Cost)
        costs.append(cost)
    first, second = costs
    assert first.cached_tokens == 0 and first.prompt_tokens and first.prompt_tokens <= (second.cached_tokens or 0)


# ---- the engine --------------------------------------------------------------------------------------------


class FakeEngine:
    """Answers with given tokens, two a step, and ends as it is told."""

    def __init__(self, tokens: Sequence[int], finish: Any = "stop") -> None:
        self.tokens, self.finish = list(tokens), finish
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.steps = 0

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.left = list(self.tokens)

    def step(self) -> list[Update]:
        self.steps += 1
        now, self.left = self.left[:2], self.left[2:]
        usage = Usage(prompt_tokens=9, cached_tokens=7, completion_tokens=3, drafted_tokens=2, accepted_tokens=1)
        finish = None if self.left else self.finish
        return [
            Update(request_id=self.requests[-1].id, tokens=now, usage=usage, finish=finish, error="the engine is ill")
        ]

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)


def test_the_engine_answers(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer.encode("<think>hm</think>\n\nnot to be, 深い"))
    backend = EngineBackend("x", engine, tokenizer, SMALL)
    *pieces, cost = backend.answer([*HELLO, {"role": "assistant", "content": "or"}, *HELLO], Options())
    shown = [piece for piece in pieces if isinstance(piece, Piece)]
    assert "".join(piece.text for piece in shown if piece.reasoning) == "hm"
    assert "".join(piece.text for piece in shown if not piece.reasoning) == "not to be, 深い"
    assert cost == Cost(prompt_tokens=9, cached_tokens=7, completion_tokens=3, drafted_tokens=2, accepted_tokens=1)
    [request] = engine.requests
    borders = [tokenizer.decode(request.prompt_ids[:border]).endswith("<|im_end|>") for border in request.borders]
    assert borders == [True] * 3 and engine.cancelled == []


def test_an_error_of_the_engine_is_told(tokenizer: Tokenizer) -> None:
    backend = EngineBackend("x", FakeEngine([1, 2, 3], finish="error"), tokenizer, SMALL)
    with pytest.raises(ValueError, match="the engine is ill"):
        list(backend.answer(HELLO, Options()))


def test_an_answer_that_nobody_reads_is_cancelled(tokenizer: Tokenizer) -> None:
    engine = FakeEngine([40] * 50)
    stream = EngineBackend("x", engine, tokenizer, SMALL).answer(HELLO, Options())
    next(stream)
    stream.close()
    assert engine.cancelled == [engine.requests[0].id]


def test_an_interrupt_waits_for_the_end_of_a_step(tokenizer: Tokenizer) -> None:
    class Interrupted(FakeEngine):
        def step(self) -> list[Update]:
            if self.steps == 2:
                os.kill(os.getpid(), signal.SIGINT)
            updates = super().step()
            self.whole = self.steps
            return updates

    engine, before = Interrupted([40] * 50), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(EngineBackend("x", engine, tokenizer, SMALL).answer(HELLO, Options()))
    assert engine.whole == engine.steps == 4  # the third step to its end, and one in which the request is let go
    assert engine.cancelled == [engine.requests[0].id] and signal.getsignal(signal.SIGINT) is before


# ---- a server ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_server_answers(path: str, server: Any) -> None:
    server.answers["hello"] = [[server.Reasoning("hm"), "na", "ïve"]]
    backend = ServerBackend(server.url + path)
    assert backend.name == "models/qwen3-next-mid"
    *pieces, cost = backend.answer([{"role": "user", "content": "hello"}], Options(max_tokens=5))
    assert pieces == [Piece("hm", reasoning=True), Piece("na"), Piece("ïve")]
    assert cost == Cost(
        prompt_tokens=4012, cached_tokens=3980, completion_tokens=120, drafted_tokens=80, accepted_tokens=57
    )
    assert server.requests[0]["max_tokens"] == 5


# ---- the screen --------------------------------------------------------------------------------------------


def split(text: str, cuts: Sequence[int]) -> Iterator[str]:
    """The text in pieces."""
    places = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    return (text[a:b] for a, b in pairwise(places))


BLOCKS = st.sampled_from(
    [
        "a paragraph\nof two lines",
        "```python\ncode\n\n# more\n```",
        "- a\n- b",
        "1. a\n\n2. b",
        "# Title",
        "> quote",
        "**b**",
        "---",
    ]
)


def lines_of(markdown: str) -> list[str]:
    """Markdown as rich shows it, without empty lines."""
    console = Console(width=60, force_terminal=True)
    with console.capture() as capture:
        console.print(Markdown(markdown, code_theme="ansi_dark"))
    return [line for line in capture.get().splitlines() if line.strip()]


@given(blocks=st.lists(BLOCKS, min_size=1, max_size=5), cuts=st.lists(st.integers(0, 99), max_size=8))
def test_blocks_are_shown_one_by_one_as_they_would_be_together(blocks: list[str], cuts: list[int]) -> None:
    text, pending, shown = "\n\n".join(blocks), "", []
    for part in split(text, cuts):
        done, pending = finished(pending + part)
        shown += lines_of(done) if done else []
    assert shown + lines_of(pending) == lines_of(text)


def screen(output: str) -> list[str]:
    """What stands on a terminal's lines after an output of text, colours, erased lines and moves up."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\r\x1b":
            lines[row] += part
    return [line.rstrip() for line in lines]


def test_nothing_on_the_screen_is_lost_or_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are printed above a part that another thread draws again and again."""
    monkeypatch.setattr("tenfold.chat.display.FRAME", 0.0005)
    output = io.StringIO()
    text = "".join(f"paragraph {i}\nof two lines\n\n" for i in range(150))
    with AnswerDisplay(Console(file=output, force_terminal=True, width=60, height=20, legacy_windows=False)) as display:
        for piece in (text[i : i + 9] for i in range(0, len(text), 9)):
            display.push(Piece(piece))
    shown = [line for line in screen(output.getvalue()) if line]
    assert shown == [f"paragraph {i} of two lines" for i in range(150)]


@pytest.mark.parametrize(
    "formula", [r"$a_1 * b_2 * c\, d$", r"$$ \left[x\right]_i^* \\ <y> $$", r"\(a_b_c\)", r"\[ \frac{a}{b}\! \]"]
)
def test_formulas_are_shown_as_written(formula: str) -> None:
    shown = Text.from_ansi("\n".join(lines_of(keep_maths(f"x {formula} y `$\\_$`\n\n```\n$\\_$\n```")))).plain
    assert formula in shown and shown.count(r"$\_$") == 2


def test_money_is_no_formula() -> None:
    assert keep_maths("*$5* and $10") == "*$5* and $10"


MESSAGES = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=8)), max_size=6)


@given(turns=MESSAGES, system=st.text(max_size=8))
def test_a_conversation_is_loaded_as_it_was_saved(
    turns: list[tuple[str, str]], system: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "talk.json"
    talk, again = Conversation(system), Conversation("another")
    for role, content in turns:
        talk.ask(content) if role == "user" else talk.answered(content)
    talk.save(path)
    again.load(path)
    assert again.messages == talk.messages


NONE = [
    *("", "\x00", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": "user"}]}'),
    *('{"messages": [{"role": "x", "content": ""}]}', '{"messages": [{"role": "user", "content": 3}]}'),
]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_conversation_changes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(text)
    talk = Conversation("system")
    talk.ask("hello")
    with pytest.raises(ValueError, match=r"talk\.json: "):
        talk.load(tmp_path / "talk.json")
    assert [message["content"] for message in talk.messages] == ["system", "hello"]
