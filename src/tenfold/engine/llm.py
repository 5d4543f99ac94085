"""Generation: a prompt in one pass, then one token at a time through the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from tenfold.engine.sampler import Sampler, SamplingParams
from tenfold.engine.stopping import Stopping
from tenfold.engine.structure import Constraint, StructureCompiler
from tenfold.models import Config
from tenfold.models.native import NativeModel, load_native
from tenfold.models.packed_file import is_packed
from tenfold.models.weights import load
from tenfold.tokenizer import Tokenizer

C = TypeVar("C")


class LanguageModel(Protocol[C]):
    """What generation needs of a model: `Qwen3Next`, `Qwen3` and `NativeModel` have it, and so may a fake."""

    @property
    def config(self) -> Config: ...

    def new_cache(self) -> C:
        """What the model remembers of a sequence; nothing yet."""
        ...

    def next_logits(self, tokens: Sequence[int], cache: C) -> Tensor:
        """Logits `[vocab]` after tokens that follow those in the cache, which is advanced."""
        ...


def generate(
    model: LanguageModel[C],
    prompt_ids: Sequence[int],
    params: SamplingParams,
    constraint: Constraint | None = None,
) -> Iterator[int]:
    """Yields tokens that continue the prompt, each as soon as it is known.

    Ends after `max_tokens`, before a stop token (one of `params` or an eos token of the configuration), where the
    constraint, made of `params.structure`, is fulfilled, or where the context is full; of stop strings it knows
    nothing. Raises ValueError, on the call, for a prompt that is empty, too long, or not of the model's vocabulary.
    """
    check_prompt(prompt_ids, model.config)
    params.check_vocabulary(model.config.vocab_size)
    return _tokens(model, list(prompt_ids), params, constraint)


def check_prompt(prompt_ids: Sequence[int], config: Config) -> None:
    """Raises ValueError for a prompt that a model cannot take."""
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token, for example the end-of-text token")
    if len(prompt_ids) > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the model takes {limit}: shorten it")
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= config.vocab_size:
        bad, last = (low if low < 0 else high), config.vocab_size - 1
        raise ValueError(f"the prompt has token {bad}, the model knows 0 to {last}: is it its tokenizer?")


def _tokens(
    model: LanguageModel[C], prompt_ids: list[int], params: SamplingParams, constraint: Constraint | None
) -> Iterator[int]:
    cache = model.new_cache()
    eos = () if params.ignore_eos else eos_ids(model.config)
    sampler, stops = Sampler(params, prompt_ids, eos), {*params.stop_ids, *eos}
    room = model.config.max_position_embeddings - len(prompt_ids)
    answer: list[int] = []
    fresh = prompt_ids
    for position in range(min(params.max_tokens, room)):
        with torch.no_grad():
            logits = model.next_logits(fresh, cache)
        token = sampler.sample(logits, position, answer, constraint.mask() if constraint else None)
        if token in stops:
            return
        yield token
        if constraint:
            constraint.advance(token)
            if constraint.is_done:
                return
        answer.append(token)
        fresh = [token]


def eos_ids(config: Config) -> tuple[int, ...]:
    """The tokens with which the configuration ends a text."""
    ids = config.eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, in whole characters; special tokens are left out."""
    decoder = tokenizer.stream(skip_special_tokens=True)
    for token in ids:
        if text := decoder.push(token):
            yield text
    if rest := decoder.finish():
        yield rest


def stopped_text(stopping: Stopping, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, up to where it ends."""
    for token in ids:
        verdict = stopping.push(token)
        if verdict.text:
            yield verdict.text
        if verdict.finish:
            return
    if rest := stopping.finish().text:
        yield rest


def continue_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> str:
    """What the model writes after the prompt, always the same: a sample to judge a training by."""
    return "".join(LLM(model, tokenizer).generate(prompt, SamplingParams(max_tokens=max_tokens)))


def start_native(
    path_or_name: str | Path, format: str | None, kv_format: str = "bf16"
) -> tuple[NativeModel, Tokenizer | None]:
    """`load_native`, in a process that is then the kernels': torch keeps one thread."""
    torch.set_num_threads(1)  # or its threads, which spin for a while after each op, take the cores from the kernels'
    return load_native(path_or_name, format, kv_format)


def require_tokenizer(tokenizer: Tokenizer | None, path_or_name: str | Path) -> Tokenizer:
    """Raises ValueError where a checkpoint came without one."""
    if tokenizer is None:
        raise ValueError(f"{path_or_name}: no tokenizer.json, which is needed to read a prompt")
    return tokenizer


class LLM:
    """A model and its tokenizer: text in, text out."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._structures = StructureCompiler(tokenizer)

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        quantization: str | None = None,
    ) -> Self:
        """From a folder, a GGUF file or a hub name, as `tenfold.load`; ValueError where there is no tokenizer.

        quantization: `bf16`, `int8` or `int4` run the model on the native kernels, with weights packed so; dtype and
        device then don't matter. torch is left with one thread in this process. A folder of `tenfold quantize` needs
        no mention: it runs there anyway.
        """
        packed = is_packed(Path(path_or_name).expanduser())
        if packed and (dtype, str(device)) != ("float32", "cpu"):
            raise ValueError(
                f"{path_or_name}: packed for the native kernels of the CPU; leave out --dtype and --device"
            )
        native = packed or quantization is not None
        model, tokenizer = start_native(path_or_name, quantization) if native else load(path_or_name, dtype, device)
        return cls(model, require_tokenizer(tokenizer, path_or_name))

    def generate(self, prompt: str, params: SamplingParams | None = None) -> Iterator[str]:
        """Continues the text; an empty one is begun as a new document. Yields pieces of text.

        Raises ValueError, on the call, for a prompt that is too long, or a structure that cannot be had.
        """
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        params = params or SamplingParams()
        stops = () if params.ignore_eos else self.tokenizer.stop_ids
        constraint = self._structures.compile(params.structure) if params.structure else None
        params = replace(params, stop_ids=(*params.stop_ids, *stops))
        decoder = self.tokenizer.stream(skip_special_tokens=True)
        stopping = Stopping((), strings=params.stop, decoder=decoder, min_tokens=params.min_tokens)
        return stopped_text(stopping, generate(self.model, ids, params, constraint))

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> Iterator[str]:
        """Answers messages, which have `role` and `content`. Yields pieces of text; errors as above."""
        return self.generate(self.tokenizer.apply_chat_template(messages), params)
