"""Generation: what comes out, where it ends, and that the cache changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenfold import cli
from tenfold.engine import LLM, SamplingParams, generate, stream_text
from tenfold.kernels import cpu
from tenfold.models import Model
from tenfold.models.native import NativeModel
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tenfold.models.weights import save_model
from tenfold.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=20)


class Counting:
    """A model that says the next number, having seen each token once; after 9 comes 0."""

    def __init__(self, eos: int | None = None, context: int = 50) -> None:
        self.config = Qwen3Config(num_hidden_layers=1, vocab_size=10, max_position_embeddings=context, eos_token_id=eos)
        self.seen: list[int] = []

    def new_cache(self) -> list[int]:
        return self.seen

    def next_logits(self, tokens: Sequence[int], cache: list[int]) -> Tensor:
        assert not torch.is_grad_enabled()
        cache += tokens
        return torch.eye(10)[(tokens[-1] + 1) % 10]


def test_each_token_is_fed_once() -> None:
    model = Counting()
    assert list(generate(model, [3, 7], replace(GREEDY, max_tokens=5))) == [8, 9, 0, 1, 2]
    assert model.seen == [3, 7, 8, 9, 0, 1]  # not the last one: nobody asked what follows it


def test_tokens_come_as_soon_as_they_are_known() -> None:
    model = Counting()
    stream = generate(model, [0], GREEDY)
    assert model.seen == []
    assert next(stream) == 1 and model.seen == [0]
    assert torch.is_grad_enabled()  # between two tokens as before


@pytest.mark.parametrize(
    ("eos", "stop_ids", "expected"),
    [(5, (), [3, 4]), (None, (4,), [3]), (5, (8,), [3, 4]), (3, (), [])],
)
def test_ends_before_a_stop_token(eos: int | None, stop_ids: tuple[int, ...], expected: list[int]) -> None:
    assert list(generate(Counting(eos), [2], replace(GREEDY, stop_ids=stop_ids))) == expected


def test_any_of_several_eos_tokens_ends() -> None:
    model = Counting()
    model.config = replace(model.config, eos_token_id=(7, 5))
    assert list(generate(model, [2], GREEDY)) == [3, 4]


def test_ends_where_the_context_is_full() -> None:
    assert list(generate(Counting(context=6), [0, 1, 2], GREEDY)) == [3, 4, 5]
    assert list(generate(Counting(context=3), [0, 1, 2], GREEDY)) == []
    assert list(generate(Counting(), [0], replace(GREEDY, max_tokens=0))) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([0] * 51, "the prompt has 51 tokens, the model takes 50: shorten it"),
        ([1, 10], "the prompt has token 10, the model knows 0 to 9"),
        ([-1], "the prompt has token -1"),
    ],
)
def test_bad_prompts_are_refused_on_the_call(prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(Counting(), prompt, GREEDY)


# ---- real models -------------------------------------------------------------------------------------------

NEXT = Qwen3NextConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    initializer_range=0.2,  # large enough that the text does not settle on one token
)
WIDE = replace(  # in multiples of what the native kernels take at once
    NEXT, linear_key_head_dim=16, linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=32
)
DENSE = Qwen3Config(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.2,
)


def new_model(config: Qwen3NextConfig | Qwen3Config) -> Model:
    model = Qwen3Next(config) if isinstance(config, Qwen3NextConfig) else Qwen3(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("config", [NEXT, DENSE], ids=["qwen3_next", "qwen3"])
def test_512_steps_through_the_cache_do_not_drift(config: Qwen3NextConfig | Qwen3Config) -> None:
    model, prompt = new_model(config), [5, 1, 200, 17, 90]
    answer = list(generate(model, prompt, SamplingParams(temperature=0, max_tokens=512)))
    assert len(answer) == 512 and len(set(answer)) > 20
    logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    lead = logits.amax(1) - chosen
    assert (lead == 0).sum() >= 510  # two near-ties at most may fall the other way
    assert lead.max() < 1e-4 * logits.abs().max()


def test_same_seed_same_text() -> None:
    model = new_model(NEXT)
    texts = [list(generate(model, [1], SamplingParams(seed=seed, max_tokens=30))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# ---- text --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["to be or not to be"], 300)


def test_stream_gives_whole_characters(tokenizer: Tokenizer) -> None:
    text = "naïve 深い 🙂"
    pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and all(pieces)


def test_llm_from_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(new_model(NEXT), tmp_path, tokenizer=tokenizer)
    llm, params = LLM.load(tmp_path), SamplingParams(temperature=0, max_tokens=12)
    expected = generate(new_model(NEXT), tokenizer.encode("to be"), replace(params, stop_ids=tokenizer.stop_ids))
    assert "".join(llm.generate("to be", params)) == tokenizer.decode(list(expected), skip_special_tokens=True)
    assert isinstance("".join(llm.generate("", params)), str)
    messages = [{"role": "user", "content": "to be?"}]
    rendered = tokenizer.apply_chat_template(messages)
    assert list(llm.chat(messages, params)) == list(llm.generate(rendered, params))


def test_llm_needs_a_tokenizer(tmp_path: Path) -> None:
    save_model(new_model(DENSE), tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        LLM.load(tmp_path)


@pytest.mark.skipif(not cpu.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("quantization", cpu.FORMATS)
@pytest.mark.parametrize("config", [WIDE, DENSE], ids=["qwen3_next", "qwen3"])
def test_native_generation_through_the_command(
    config: Qwen3NextConfig | Qwen3Config,
    quantization: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(new_model(config), tmp_path, tokenizer=tokenizer)
    command = ["generate", str(tmp_path), "--prompt", "to be", "--max-tokens", "12", "--temperature", "0"]
    assert cli.main([*command, "--quantization", quantization]) == 0
    told = capsys.readouterr().out
    native = NativeModel.pack(config, new_model(config).named_parameters(), quantization)
    params = SamplingParams(temperature=0, max_tokens=12, stop_ids=tokenizer.stop_ids)
    expected = generate(native, tokenizer.encode("to be"), params)
    assert told == "to be" + "".join(stream_text(tokenizer, expected)) + "\n"


def test_without_the_kernels_quantization_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "_load", lambda: ImportError("not built"))
    assert cli.main(["generate", "/nowhere", "--prompt", "x", "--quantization", "int8"]) == 2
    told = capsys.readouterr().err
    assert "the native kernels are not available (not built): install" in told and told.count("\n") == 1
