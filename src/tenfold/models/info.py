"""What a checkpoint is and what it costs to run, from its configuration and the headers of its files alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.models import Config
from tenfold.models.cache import FULL_ATTENTION
from tenfold.models.packed_file import PackedFile, is_packed, open_packed
from tenfold.models.weights import build_on_meta, open_checkpoint

if TYPE_CHECKING:
    from rich.table import Table

MIXERS = {FULL_ATTENTION: "attention", "linear_attention": "GDN"}
ONE_OF_SEPARATE = re.compile(r"\.mlp\.experts\.\d+\.")
KV_BYTES, STATE_BYTES = 2, 4  # keys and values are kept in half precision, states in fp32


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A checkpoint described. Parameters are counted from the files; `active` ones work on each token."""

    folder: str
    architecture: str
    layers: int
    layout: str  # "12 x (3 GDN + 1 attention)"
    hidden_size: int
    vocab_size: int
    context: int  # tokens
    experts: int  # per sparse layer; 0 in a dense model
    experts_per_token: int
    expert_layout: str | None  # "separate", "stacked" or "packed" in the files
    parameters: int  # MTP left out
    mtp_parameters: int
    active_body: int  # neither embedding nor output head
    active_with_head: int
    bytes_by_dtype: dict[str, int]
    files: int
    state_bytes: int  # recurrent and conv state of a sequence, fp32
    kv_bytes_per_token: int  # in half precision
    tokenizer: bool

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(title=self.folder, show_header=False)
        for label, value in _rows(self):
            table.add_row(label, value)
        return table


def describe(path: str | Path) -> ModelInfo:
    """Reads configuration and headers, no tensor. Raises ValueError or OSError as `open_checkpoint` does."""
    if is_packed(Path(path)):
        return _describe_packed(open_packed(Path(path)))
    checkpoint = open_checkpoint(path)
    held = [(tensor.dtype, tensor.nbytes) for tensor in checkpoint.tensors.values()]
    sizes = {name: math.prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    files = len({tensor.path for tensor in checkpoint.tensors.values()})
    return _describe(checkpoint.path, checkpoint.config, sizes, held, files, checkpoint.has_tokenizer)


def _describe_packed(file: PackedFile) -> ModelInfo:
    held = [(entry.format, entry.nbytes) for entries in file.owners.values() for entry in entries]
    sizes = {name: parameter.numel() for name, parameter in build_on_meta(file.config).named_parameters()}
    folder = file.path.parent
    info = _describe(folder, file.config, sizes, held, 1, (folder / "tokenizer.json").is_file())
    return replace(info, expert_layout="packed" if info.experts else None)


def _describe(
    path: Path, config: Config, sizes: Mapping[str, int], held: Sequence[tuple[str, int]], files: int, tokenizer: bool
) -> ModelInfo:
    """sizes: parameters of each tensor; held: dtype and bytes of what is in the files."""
    bytes_by_dtype: Counter[str] = Counter()
    for dtype, nbytes in held:
        bytes_by_dtype[dtype] += nbytes
    experts = getattr(config, "num_experts", 0)
    per_token = getattr(config, "num_experts_per_tok", 0)
    body, head, embedding, mtp = _parameter_counts(sizes)
    active = _active_parameters(sizes, per_token / experts if experts else 0.0)
    kinds = config.layer_kinds
    attending = sum(kind == FULL_ATTENTION for kind in kinds)
    return ModelInfo(
        folder=str(path),
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        layout=layer_layout(kinds),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        experts=experts,
        experts_per_token=per_token,
        expert_layout=_expert_layout(sizes),
        parameters=body + head + embedding,
        mtp_parameters=mtp,
        active_body=active,
        active_with_head=active + (head or embedding),
        bytes_by_dtype=dict(bytes_by_dtype),
        files=files,
        state_bytes=_state_bytes(config, len(kinds) - attending),
        kv_bytes_per_token=2 * config.num_key_value_heads * config.head_dim * attending * KV_BYTES,
        tokenizer=tokenizer,
    )


def layer_layout(kinds: tuple[str, ...]) -> str:
    """The shortest pattern that repeats, as in "12 x (3 GDN + 1 attention)"."""
    length = len(kinds)
    period = next(n for n in range(1, length + 1) if length % n == 0 and kinds[:n] * (length // n) == kinds)
    runs = " + ".join(f"{len(list(run))} {MIXERS[kind]}" for kind, run in groupby(kinds[:period]))
    return f"{length // period} x ({runs})" if period > 1 else f"{length} {MIXERS[kinds[0]]}"


def _parameter_counts(sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Parameters of body, output head, embedding and MTP."""
    counts: Counter[str] = Counter()
    for name, size in sizes.items():
        counts[_part(name)] += size
    return counts["body"], counts["head"], counts["embedding"], counts["mtp"]


def _part(name: str) -> str:
    if name.startswith("mtp."):
        return "mtp"
    return {"lm_head.weight": "head", "model.embed_tokens.weight": "embedding"}.get(name, "body")


def _active_parameters(sizes: Mapping[str, int], share_of_experts: float) -> int:
    """The body's parameters that work on a token: of the routed experts only the chosen ones."""
    body = {name: size for name, size in sizes.items() if _part(name) == "body"}
    routed = sum(count for name, count in body.items() if ".mlp.experts." in name)
    return sum(body.values()) - routed + round(routed * share_of_experts)


def _expert_layout(names: Collection[str]) -> str | None:
    if any(ONE_OF_SEPARATE.search(name) for name in names):
        return "separate"
    return "stacked" if any(".mlp.experts." in name for name in names) else None


def _state_bytes(config: Config, recurrent_layers: int) -> int:
    if not recurrent_layers:
        return 0
    return recurrent_layers * STATE_BYTES * sum(map(math.prod, config.state_shapes()))


def _rows(info: ModelInfo) -> list[tuple[str, str]]:
    held = ", ".join(f"{_size(count)} {dtype}" for dtype, count in info.bytes_by_dtype.items())
    mtp = f" + {_count(info.mtp_parameters)} MTP" if info.mtp_parameters else ""
    experts = f"{info.experts_per_token} of {info.experts} per token, {info.expert_layout} in files"
    return [
        ("architecture", info.architecture),
        ("layers", f"{info.layers}: {info.layout}"),
        ("hidden, vocabulary", f"{info.hidden_size:,}, {info.vocab_size:,}"),
        ("experts", experts if info.experts else "none"),
        ("parameters", _count(info.parameters) + mtp),
        (
            "active per token",
            f"{_count(info.active_body)}, {_count(info.active_with_head)} with the output head",
        ),
        ("on disk", f"{held} in {info.files} file{'s' if info.files > 1 else ''}"),
        ("context", f"{info.context:,} tokens"),
        ("state per sequence", f"{_binary_size(info.state_bytes)} in fp32"),
        ("keys and values", f"{_binary_size(info.kv_bytes_per_token)} per token in half precision"),
        ("tokenizer", "yes" if info.tokenizer else "no"),
    ]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _size(count: int) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u), (1, "B"))
    return f"{count / unit:.4g} {name}"


def _binary_size(count: int) -> str:
    return f"{count / 2**20:.4g} MiB" if count >= 2**20 else f"{count / 2**10:.4g} KiB"
