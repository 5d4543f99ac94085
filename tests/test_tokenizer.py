"""What the tokenizer promises: no text is lost, and transformers sees the same tokens and the same chats."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.tokenizer import PATTERN, Tokenizer, slices
from tenfold.train.sources import wikitext_documents

TEXTS = [
    "Hello, world! It's 2024; don't  stop.\n\n\tnext   line\r\n",
    "naïve café, Ελληνικά, हिन्दी, 日本語テキスト, cafe\u0301, \u1100\u1161",
    "emoji: 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \U0001f9ff",
    "<|im_start|>user\nhi<|im_end|>\n<think>\nx</think><tool_call>{}</tool_call><|endoftext|>",
    " = Title = \n  \n a @-@ b \x00 \u2028 \ufeff",
    "",
]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "What is 2+2? 🤔"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
    {"role": "user", "content": "And in \"Chinese\"? 'é'"},
]
CALLS: list[dict[str, Any]] = [
    *CHAT[:2],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": "ü<>"}}}],
    },
    {"role": "tool", "content": "4"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Füge <hinzu>", "parameters": {}}}]


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.embedded()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(wikitext_documents("validation"), 1024)


@pytest.fixture(params=["qwen", "trained"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


PIECES = [*TEXTS, "\n", "a", "e\u0301", " ", ",", "、", "か", "\u3099", "\u3000", "_", "'s", "5"]
any_text = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@settings(max_examples=200)
@given(text=any_text)
def test_any_text_survives(qwen: Tokenizer, trained: Tokenizer, text: str) -> None:
    for tokenizer in (qwen, trained):
        for special in (True, False):
            assert tokenizer.decode(tokenizer.encode(text, special)) == unicodedata.normalize("NFC", text)


@settings(max_examples=200)
@given(st.data())
def test_streamed_pieces_are_whole_characters_and_make_up_the_text(trained: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, trained.vocab_size + 2)))
    skip = data.draw(st.booleans())
    stream = trained.stream(skip_special_tokens=skip)
    assert "".join([*map(stream.push, ids), stream.finish()]) == trained.decode(ids, skip_special_tokens=skip)


def test_stream_waits_for_the_last_byte(trained: Tokenizer) -> None:
    ids = trained.encode("👍🏽")
    stream = trained.stream()
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert len(ids) > 2 and "\ufffd" not in "".join(pieces) and "👍" in pieces


@settings(max_examples=200)
@given(text=any_text, size=st.integers(0, 8))
def test_slices_have_the_tokens_of_the_whole(qwen: Tokenizer, text: str, size: int) -> None:
    parts = list(slices(text, size))
    assert "".join(parts) == text
    assert [i for part in parts for i in qwen.encode(part, False)] == qwen.encode(text, False)


@pytest.mark.parametrize("text", ["word " * 100, "字、" * 200, "one\n" * 100])
def test_a_text_of_short_words_has_short_slices(text: str) -> None:
    assert max(map(len, slices(text, 50))) <= 55


def test_special_tokens_in_a_text_can_be_mere_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>", special_tokens=False)
    assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.token_id("<|im_end|>"))


def test_training_is_deterministic_and_special_tokens_come_last(trained: Tokenizer, tmp_path: Path) -> None:
    again = Tokenizer.train(wikitext_documents("validation"), 1024)
    trained.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert trained.vocab_size == 1024 and trained.eos_id == 1021


def test_trained_and_embedded_cut_text_alike(trained: Tokenizer, qwen: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "a")
    qwen.save(tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "tokenizer.json").read_text(encoding="utf-8")) for name in "ab")
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        assert a[part] == b[part]
    assert PATTERN in json.dumps(a["pre_tokenizer"]).replace("\\\\", "\\")


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 100 is too small: 259 at least"):
        Tokenizer.train(["text"], 100)


def test_transformers_gives_the_same_tokens_and_chats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours is not None and len(theirs) == ours.vocab_size
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == tokenizer.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
    for messages, tools in ((CHAT, None), (CALLS, TOOLS), (CHAT[1:2], None)):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, tools=tools)
            assert ours.apply_chat_template(messages, prompt, tools) == expected


def test_thinking_can_be_turned_off(qwen: Tokenizer) -> None:
    text = qwen.apply_chat_template(CHAT[:2], enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_template_may_stand_in_its_own_file(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{{ eos_token }}{{ strftime_now('%%') }}", encoding="utf-8"
    )
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded is not None and loaded.apply_chat_template(CHAT) == "Be brief & <kind>.<|endoftext|>%"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{% if %}", "cannot render"),
        (None, "no chat template"),
    ],
)
def test_bad_templates_are_told_in_one_line(trained: Tokenizer, template: str | None, complaint: str) -> None:
    changed = Tokenizer(trained._backend, {**trained.config, "chat_template": template})
    with pytest.raises(ValueError, match=complaint) as caught:
        changed.apply_chat_template(CHAT)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    assert Tokenizer.from_folder(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[]", b"{}"])
def test_damaged_files_are_told_in_one_line(trained: Tokenizer, tmp_path: Path, name: str, content: bytes) -> None:
    trained.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    if (name, content) == ("tokenizer_config.json", b"{}"):
        assert Tokenizer.from_folder(tmp_path) is not None
        return
    with pytest.raises(ValueError, match=name) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="expected a byte-level BPE"):
        Tokenizer.from_folder(tmp_path)
