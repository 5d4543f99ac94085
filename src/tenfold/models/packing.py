"""How a model's parameters are packed for the native kernels: which format each gets, and under which names.

`native.NativeModel` is built from the packed weights of owners: the layers, the trunk, the head, and those of
multi-token prediction. Names are Hugging Face's without the owner's.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cpu
from tenfold.models import Config, Model
from tenfold.models.qwen3_next import Qwen3NextConfig

if TYPE_CHECKING:
    from tenfold.kernels._native import PackedExperts, PackedLinear

Weights = Mapping[str, Tensor]  # of an owner
SENSITIVE = {"bf16": "bf16", "int8": "int8", "int4": "int8"}  # never under 8 bits
SENSITIVE_NAMES = re.compile(r"linear_attn\.in_proj_ba\.weight|fc\.weight")
ROUTER = "bf16"  # whose logits decide between experts that are nearly as good
ROUTER_NAMES = re.compile(r"mlp\.(gate|shared_expert_gate)\.weight")
EXPERT_NAMES = re.compile(r"mlp\.(experts|shared_expert)\..+")
OWNER = re.compile(r"(model\.layers\.\d+|mtp\.layers\.\d+|\w+)\.(.+)")
FREQUENT = 8  # one in so many tokens, the first ones, is frequent: byte pairs are numbered as they were merged


@dataclass(kw_only=True)
class Packed:
    """The weights of an owner: matrices, what stays a tensor, and experts, the shared ones last."""

    matrices: dict[str, PackedLinear] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    experts: PackedExperts | None = None

    def nbytes(self) -> int:
        """Bytes of matrices and experts."""
        return sum(x.nbytes for x in self.matrices.values()) + (self.experts.nbytes if self.experts else 0)


def pack_owner(config: Config, owner: str, weights: Weights, format: str) -> Packed:
    """All weights of one owner; raises ValueError for a format or a shape that the kernels lack."""
    if format not in cpu.FORMATS:
        raise ValueError(f"unknown format {format!r}: {', '.join(cpu.FORMATS)}")
    if owner.startswith("mtp"):
        format = SENSITIVE[format]
    packed = Packed()
    if "mlp.experts.gate_up_proj" in weights:
        assert isinstance(config, Qwen3NextConfig)
        packed.experts = pack_experts(config, weights, format)
    for name, weight in weights.items():
        if EXPERT_NAMES.fullmatch(name):
            continue
        if owner == "lm_head" or name == "embed_tokens.weight":
            packed.matrices |= pack_vocabulary(name, weight, format)
        elif weight.ndim == 2:
            packed.matrices[name] = cpu.pack_linear(weight, format_of(name, format))
        else:
            packed.tensors[name] = weight.clone()
    return packed


def format_of(name: str, format: str) -> str:
    """The format of a matrix, where the large ones have this one."""
    if ROUTER_NAMES.fullmatch(name):
        return ROUTER
    return SENSITIVE[format] if SENSITIVE_NAMES.fullmatch(name) else format


def pack_vocabulary(name: str, weight: Tensor, format: str) -> dict[str, PackedLinear]:
    """A row per token, in two parts where few tokens make up most of a text: they get 8 bits, the rest 4."""
    frequent = len(weight) if format == SENSITIVE[format] else math.ceil(len(weight) / FREQUENT)
    parts = {f"{name}.0": cpu.pack_linear(weight[:frequent], SENSITIVE[format])}
    if frequent < len(weight):
        parts[f"{name}.1"] = cpu.pack_linear(weight[frequent:], format)
    return parts


def pack_experts(config: Qwen3NextConfig, weights: Weights, format: str) -> PackedExperts:
    """A layer's experts; the shared one last, in as many parts of their width as it takes, the end zeros."""
    count, width = config.num_experts, config.moe_intermediate_size
    parts = max(1, math.ceil(config.shared_expert_intermediate_size / width))
    experts = cpu.empty_experts(format, count + parts, config.hidden_size, width)
    gate_up, down = weights["mlp.experts.gate_up_proj"], weights["mlp.experts.down_proj"]
    for e in range(count):
        gate, up = gate_up[e].chunk(2)
        experts.pack(e, gate, up, down[e])
    zeros = parts * width - config.shared_expert_intermediate_size
    gate, up = (F.pad(weights[f"mlp.shared_expert.{x}_proj.weight"], (0, 0, 0, zeros)) for x in ("gate", "up"))
    down = F.pad(weights["mlp.shared_expert.down_proj.weight"], (0, zeros))
    for i, part in enumerate(zip(gate.split(width), up.split(width), down.split(width, 1), strict=True)):
        experts.pack(count + i, *part)
    return experts


def complete_owners(
    skeleton: Model, parameters: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """`model.layers.N`, `mtp.layers.N`, `lm_head`, and `model` and `mtp` for their rest, each once it is complete.

    The mapping that comes with an owner, of names without the owner's, is emptied when the next one is asked for.
    """
    expected = Counter(_owner(name)[0] for name, _ in skeleton.named_parameters())
    waiting: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in parameters:
        owner, rest = _owner(name)
        waiting[owner][rest] = parameter.detach()
        if len(waiting[owner]) == expected[owner]:
            yield owner, waiting[owner]
            del waiting[owner]


def _owner(name: str) -> tuple[str, str]:
    found = OWNER.fullmatch(name)
    assert found, name
    return found[1], found[2]
