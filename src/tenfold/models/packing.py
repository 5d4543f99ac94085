"""How a model's parameters are packed for the native kernels: which format each gets, and under which names.

`native.NativeModel` is built from the packed weights of owners: the layers, the trunk, the head, and those of
multi-token prediction. Names are Hugging Face's without the owner's.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cpu
from tenfold.models import Config, Model
from tenfold.models.qwen3_next import Qwen3NextConfig

if TYPE_CHECKING:
    from tenfold.kernels._native import PackedExperts, PackedLinear

Weights = Mapping[str, Tensor]  # of an owner
Importance = Mapping[str, Tensor]  # what a squared error in a column costs, fp32
Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["matrix", "tensor", "experts"]
EXPERTS = "experts"  # the name of an owner's
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


class Planned(NamedTuple):
    """What becomes of a parameter: a matrix or a tensor, or with others the experts, `[count, D, F]`.

    A matrix may be rows of its parameter only, from `first_row` on.
    """

    kind: Kind
    format: str  # of a tensor, empty: it stays as it is
    shape: tuple[int, ...]
    parameter: str
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes when packed; of a tensor, at most."""
        if self.kind == "matrix":
            return cpu.packed_bytes(self.format, *self.shape)
        if self.kind == "experts":
            return self.shape[0] * cpu.expert_bytes(self.format, *self.shape[1:])
        return 4 * math.prod(self.shape)


def plan_owner(config: Config, owner: str, shapes: Shapes, format: str) -> dict[str, Planned]:
    """What an owner's parameters are packed into, where the large matrices have this format, by name.

    Raises ValueError for a format that the kernels lack.
    """
    if format not in cpu.FORMATS:
        raise ValueError(f"unknown format {format!r}: {', '.join(cpu.FORMATS)}")
    if owner.startswith("mtp"):
        format = SENSITIVE[format]
    plan: dict[str, Planned] = {}
    if "mlp.experts.gate_up_proj" in shapes:
        plan[EXPERTS] = Planned("experts", format, _experts_shape(config), "mlp.experts.gate_up_proj")
    for name, shape in shapes.items():
        if EXPERT_NAMES.fullmatch(name) and EXPERTS in plan:
            continue
        if owner == "lm_head" or name == "embed_tokens.weight":
            plan |= _plan_vocabulary(name, shape, format)
        elif len(shape) == 2:
            plan[name] = Planned("matrix", format_of(name, format), shape, name)
        else:
            plan[name] = Planned("tensor", "", shape, name)
    return plan


def format_of(name: str, format: str) -> str:
    """The format of a matrix, where the large ones have this one."""
    if ROUTER_NAMES.fullmatch(name):
        return ROUTER
    return SENSITIVE[format] if SENSITIVE_NAMES.fullmatch(name) else format


def _plan_vocabulary(name: str, shape: tuple[int, ...], format: str) -> dict[str, Planned]:
    """A row per token, in two parts where few tokens make up most of a text: they get 8 bits, the rest 4."""
    rows, cols = shape
    frequent = rows if format == SENSITIVE[format] else math.ceil(rows / FREQUENT)
    parts = {f"{name}.0": Planned("matrix", SENSITIVE[format], (frequent, cols), name)}
    if frequent < rows:
        parts[f"{name}.1"] = Planned("matrix", format, (rows - frequent, cols), name, frequent)
    return parts


def _experts_shape(config: Config) -> tuple[int, ...]:
    """Count, D and F; the shared expert is one more, or as many as it takes."""
    assert isinstance(config, Qwen3NextConfig)
    width = config.moe_intermediate_size
    shared = max(1, math.ceil(config.shared_expert_intermediate_size / width))
    return config.num_experts + shared, config.hidden_size, width


def planned_bytes(skeleton: Model, format: str) -> int:
    """Bytes of the whole model when packed."""
    return sum(
        planned.nbytes
        for owner, shapes in owner_shapes(skeleton).items()
        for planned in plan_owner(skeleton.config, owner, shapes, format).values()
    )


def pack_owner(
    config: Config, owner: str, weights: Weights, format: str, importance: Importance | None = None
) -> Packed:
    """All weights of one owner; raises ValueError for a format or a shape that the kernels lack.

    importance: of the columns of matrices, by parameter, `[K]`; of experts `[E, K]`, the shared expert's apart.
    """
    packed, importance = Packed(), importance or {}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name, (kind, matrix_format, shape, parameter, first) in plan_owner(config, owner, shapes, format).items():
        if kind == "experts":
            assert isinstance(config, Qwen3NextConfig)
            packed.experts = pack_experts(config, weights, matrix_format, importance)
        elif kind == "matrix":
            rows = weights[parameter][first : first + shape[0]]
            packed.matrices[name] = cpu.pack_linear(rows, matrix_format, importance.get(parameter))
        else:
            packed.tensors[name] = weights[parameter].clone()
    return packed


def pack_experts(
    config: Qwen3NextConfig, weights: Weights, format: str, importance: Importance | None = None
) -> PackedExperts:
    """A layer's experts; the shared one last, in as many parts of their width as it takes, the end zeros."""
    experts = cpu.empty_experts(format, *_experts_shape(config))
    count, width, importance = config.num_experts, config.moe_intermediate_size, importance or {}
    gate_up, down = weights["mlp.experts.gate_up_proj"], weights["mlp.experts.down_proj"]
    of_inputs, of_width = (importance.get(f"mlp.experts.{x}_proj", [None] * count) for x in ("gate_up", "down"))
    for e in range(count):
        gate, up = gate_up[e].chunk(2)
        experts.pack(e, gate, up, down[e], of_inputs[e], of_width[e])
    shared = "mlp.shared_expert.{}_proj.weight".format
    parts = experts.shape[0] - count
    zeros = parts * width - config.shared_expert_intermediate_size
    gate, up = (F.pad(weights[shared(x)], (0, 0, 0, zeros)) for x in ("gate", "up"))
    down = F.pad(weights[shared("down")], (0, zeros))
    of_down = importance.get(shared("down"))
    widths = [None] * parts if of_down is None else F.pad(of_down, (0, zeros)).split(width)
    for i, part in enumerate(zip(gate.split(width), up.split(width), down.split(width, 1), strict=True)):
        experts.pack(count + i, *part, importance.get(shared("gate")), widths[i])
    return experts


def owner_shapes(skeleton: Model) -> dict[str, dict[str, tuple[int, ...]]]:
    """The owners, in the order in which a token meets them, and the shapes of their parameters."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in skeleton.named_parameters():
        owner, rest = _owner(name)
        shapes.setdefault(owner, {})[rest] = tuple(parameter.shape)
    return shapes


def owner_by_owner(skeleton: Model, without: Collection[str] = ()) -> list[str]:
    """The names of all parameters in the order of `owner_shapes`: read so, no owner waits for another one.

    without: owners to leave out.
    """
    owners = owner_shapes(skeleton).items()
    return [f"{owner}.{name}" for owner, shapes in owners if owner not in without for name in shapes]


def complete_owners(
    skeleton: Model, parameters: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """`model.layers.N`, `mtp.layers.N`, `lm_head`, and `model` and `mtp` for their rest, each once it is complete.

    The mapping that comes with an owner, of names without the owner's, is emptied when the next one is asked for.
    """
    expected = {owner: len(shapes) for owner, shapes in owner_shapes(skeleton).items()}
    waiting: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in parameters:
        owner, rest = _owner(name)
        waiting[owner][rest] = parameter.detach()
        if len(waiting[owner]) == expected[owner]:
            yield owner, waiting[owner]
            waiting.pop(owner).clear()  # or who asked for it would keep it while the next one is read


def _owner(name: str) -> tuple[str, str]:
    found = OWNER.fullmatch(name)
    assert found, name
    return found[1], found[2]
