"""Text to token ids and back: Qwen3's tokenizer, one read from a folder, or one trained on the text at hand.

All are byte-level BPE, so any text has an encoding. Text is normalised (NFC) and cut by Qwen3's pattern, and
each cut is merged by itself. `<|endoftext|>` ends a document; `<|im_start|>` and `<|im_end|>` frame the turns
of a conversation.
"""

from __future__ import annotations

import codecs
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
SLICE = 1 << 16  # characters; long texts are worked off in slices of about this size
CUT = re.compile(  # where PATTERN ends a match whatever stands around
    r"\n(?=\w)|(?<=\S)(?= )|(?<=[^\W_])(?=[,;\u3000-\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)


class Tokenizer:
    """A byte-level BPE tokenizer with its chat template."""

    def __init__(self, backend: Backend, config: Mapping[str, Any]) -> None:
        """`config` is what `tokenizer_config.json` holds. Raises ValueError where Tenfold cannot use them."""
        self._backend = backend
        self.config = dict(config)
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(f"expected a byte-level BPE tokenizer, got the decoder {backend.decoder!r}")
        eos_id = self.token_id(END_OF_TEXT)
        if eos_id is None:
            eos_id = self.token_id(self._special("eos_token"))
        if eos_id is None:
            raise ValueError(f"neither {END_OF_TEXT} nor an eos_token is there to end documents with")
        self.eos_id = eos_id

    @classmethod
    def embedded(cls) -> Self:
        """Qwen3's tokenizer, the same as Qwen3-Next's."""
        packed = files("tenfold").joinpath("data/tokenizer.json.xz").read_bytes()
        return cls(Backend.from_buffer(lzma.decompress(packed)), _embedded_config())

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self | None:
        """The tokenizer beside a model or a corpus; None where there is no `tokenizer.json`.

        Raises ValueError where a file is damaged or the tokenizer is of another kind."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            return None
        text = _read_text(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{path}: no tokenizer ({_one_line(error)}); download it again") from None
        try:
            return cls(backend, _folder_config(Path(folder)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        added: Mapping[str, bool],
        config: Mapping[str, Any],
    ) -> Self:
        """Qwen3's way of cutting text, with another vocabulary; `config` as above.

        added: the tokens of the vocabulary that stand for themselves in a text, and whether each is a special one,
        which answers are shown without. Raises ValueError where the parts do not fit together.
        """
        try:
            backend = _byte_level(models.BPE(dict(vocabulary), list(merges)))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"no tokenizer ({_one_line(error)}); download it again") from None
        backend.add_tokens([AddedToken(t, normalized=False, special=special) for t, special in added.items()])
        return cls(backend, config)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learns a byte-level BPE; the same texts in the same order give the same tokenizer.

        The vocabulary is smaller than `vocab_size` where the texts run out of pairs to merge. Raises
        ValueError where it could not even hold the 256 bytes and the three special tokens.
        """
        special = (END_OF_TEXT, TURN_START, TURN_END)
        least = 256 + len(special)
        if vocab_size < least:
            raise ValueError(f"vocab_size {vocab_size} is too small: {least} at least, such as 4096")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((part for text in texts for part in slices(text)), trainer)
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        names = {"eos_token": END_OF_TEXT, "additional_special_tokens": [TURN_START, TURN_END]}
        inherited = {k: v for k, v in _embedded_config().items() if k != "added_tokens_decoder"}
        return cls(backend, inherited | names)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them. Raises OSError."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "tokenizer.json", self.to_json())
        config = json.dumps(self.config, ensure_ascii=False, indent=2)
        _write_text(folder / "tokenizer_config.json", config + "\n")

    def to_json(self) -> str:
        """What `tokenizer.json` holds."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the end of the text, and of the assistant's turn."""
        found = (self.token_id(token) for token in (self._special("eos_token"), TURN_END))
        return tuple(dict.fromkeys((self.eos_id, *(i for i in found if i is not None))))

    @property
    def special_ids(self) -> list[int]:
        """Tokens that are no text, and that answers are shown without."""
        return [i for i, token in self._backend.get_added_tokens_decoder().items() if token.special]

    def token_id(self, token: str | None) -> int | None:
        """The id of a token; None where there is none."""
        return None if token is None else self._backend.token_to_id(token)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which need not be whole characters; nothing where there is none."""
        name = self._backend.id_to_token(token)
        return b"" if name is None else _token_bytes(name)

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with nothing added. `special_tokens=False` reads `<|im_end|>` as mere text."""
        return self.encode_batch([text], special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, worked off by as many threads as there are cores."""
        backend = self._backend if special_tokens else self._literal
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder for tokens that come one at a time."""
        return StreamDecoder(self._backend, frozenset(self.special_ids if skip_special_tokens else ()))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the text that the model was trained on.

        Messages have a `role` and a `content`. `enable_thinking` goes to templates that know it; None leaves
        them their default; `options` are whatever else they know. Raises ValueError where there is no template, or
        where it refuses the messages."""
        from jinja2 import TemplateError

        values: dict[str, Any] = {**(options or {}), **{name: self._special(name) or "" for name in SPECIAL_NAMES}}
        values |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        source = self.config.get("chat_template")
        if not isinstance(source, str):
            raise ValueError("this tokenizer has no chat template; give the prompt as plain text instead")
        try:
            return _template(source).render(values)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template cannot render these messages: {_one_line(error)}") from error

    @cached_property
    def _literal(self) -> Backend:
        """The same tokenizer, to which special tokens in a text are only text."""
        backend = Backend.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _special(self, name: str) -> str | None:
        value = self.config.get(name)
        return value.get("content") if isinstance(value, dict) else value


class StreamDecoder:
    """Turns tokens into text as they come; all pieces together are what `decode` gives for all tokens."""

    def __init__(self, backend: Backend, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes: whole characters, often none."""
        name = None if token in self._skipped else self._backend.id_to_token(token)
        return "" if name is None else self._utf8.decode(_token_bytes(name))

    def finish(self) -> str:
        """What is left of a character that never got complete."""
        return self._utf8.decode(b"", final=True)


def slices(text: str, size: int = SLICE) -> Iterator[str]:
    """Cuts a text into parts of at least `size` characters whose tokens, joined, are the tokens of the whole.

    Cuts fall between a line break and a letter or digit, before a space, and between a word and some punctuation, for
    Chinese has no spaces. PATTERN never matches across such a place. Without any, a part is as long as the text."""
    begin = 0
    while match := CUT.search(text, begin + max(size, 1)):
        yield text[begin : match.end()]
        begin = match.end()
    if begin < len(text):
        yield text[begin:]


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


# ---- bytes -------------------------------------------------------------------------------------------------


@cache
def _alphabet() -> dict[str, int]:
    """The byte that each character in a token's name stands for: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _token_bytes(name: str) -> bytes:
    alphabet = _alphabet()
    try:
        return bytes(alphabet[character] for character in name)
    except KeyError:  # an added token, written as it is
        return name.encode()


# ---- files and templates -----------------------------------------------------------------------------------


def _embedded_config() -> dict[str, Any]:
    return json.loads(files("tenfold").joinpath("data/tokenizer_config.json").read_text(encoding="utf-8"))


def _folder_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the template of `chat_template.jinja` where there is that file."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(_read_text(path)) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON ({error}); copy or download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds {type(config).__name__}, expected an object; download it again")
    return config | ({"chat_template": _read_text(template)} if template.is_file() else {})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; copy or download it again") from None


def _write_text(path: Path, text: str) -> None:
    """Writes a file under another name first, so that the name never stands for half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@cache
def _environment() -> Any:
    """Where templates are rendered. They come with downloaded models, so they may call and change nothing."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:  # jinja2's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


@lru_cache(maxsize=8)
def _template(source: str) -> Any:
    """A template, compiled: that takes longer than most renderings."""
    return _environment().from_string(source)
