"""What packing does to a model: a text goes through it twice, with the weights as they are and with the packed ones.

An owner's weights are used both ways while they are at hand, layer after layer, so the model is never in memory as a
whole. The weights as they are run in fp32 on torch, the packed ones on the native kernels. A second text can go
along, to see how large the inputs of each matrix are: what a squared error in each of its columns costs.

Shape letters: N sequences, T tokens of each, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.cache import FULL_ATTENTION
from tenfold.models.native import DecoderLayer, norm_weight
from tenfold.models.native_cache import NativeCache
from tenfold.models.packing import Packed, Weights
from tenfold.models.qwen3_next import Experts, Qwen3NextConfig
from tenfold.models.weights import build_on_meta
from tenfold.ops.linear import swiglu
from tenfold.ops.rotary import rotary_table

Rotation = Callable[[int], tuple[Tensor, Tensor]]
LAYERS = "model.layers."
CHUNK = 128  # tokens whose logits are in memory at once
PRIOR = 4.0  # tokens that an expert's own are mixed with: few of its own say little


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Relative errors (Frobenius) of a layer's output."""

    layer: int
    mixer: str
    own: float  # of what it adds to the residual stream, given the right input
    total: float  # of the residual stream, given the packed layers before


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Of the packed model from the original, per token."""

    tokens: int
    kl: float  # mean of sum p log(p / q), in nats
    perplexity: float  # of the original
    packed_perplexity: float
    same_top: float  # share of tokens whose likeliest successor is the same


class Comparison:
    """Takes the owners in the order of `owner_shapes`; `streams` and what was found make up its whole state.

    streams: `exact` and `packed`, fp32 `[N, T, D]`, and `calibration`, of another text; once the embedding was seen.
    """

    def __init__(self, config: Config, tokens: Tensor | None, calibration: Tensor | None) -> None:
        """tokens: int64 `[N, T]` to measure on; calibration: others, to weigh errors by. Either may be missing."""
        self.config, self.tokens, self.calibration = config, tokens, calibration
        self.streams: dict[str, Tensor] = {}
        self.layers: list[LayerError] = []
        self.divergence: Divergence | None = None
        self._skeleton = build_on_meta(config)
        self._head = f"{LAYERS}{config.num_hidden_layers - 1}" if config.tie_word_embeddings else "lm_head"

    @torch.no_grad()
    def importance(self, owner: str, weights: Weights) -> dict[str, Tensor]:
        """What an error in each column of the owner's matrices costs, by parameter; fp32, of mean 1."""
        if self.calibration is None:
            return {}
        if owner == "model":
            self.streams.setdefault("calibration", F.embedding(self.calibration, weights["embed_tokens.weight"]))
            self._norm = weights["norm.weight"]
        elif owner.startswith(LAYERS):
            inputs = Inputs(self._skeleton.model.layers[_number(owner)])
            with inputs:
                self.streams["calibration"] = self._exact_layer(owner, weights, self.streams["calibration"])
            return inputs.importance()
        elif owner == "lm_head":
            return {"weight": _relative(self._exact_norm(self.streams["calibration"]).flatten(0, 1).square().mean(0))}
        return {}

    @torch.no_grad()
    def step(self, owner: str, weights: Weights, packed: Packed) -> None:
        """Sends the text through an owner, both ways."""
        if self.tokens is None:
            return
        if owner == "model":
            self._begin(self.tokens, weights, packed)
        elif owner.startswith(LAYERS):
            self._layer(owner, weights, packed)
        if owner == "lm_head":
            self._exact_head, self._packed_head = weights["weight"], packed
        if owner == self._head:
            self.divergence = self._compare_logits(self.tokens)

    def _begin(self, tokens: Tensor, weights: Weights, packed: Packed) -> None:
        self._norm = weights["norm.weight"]
        self._exact_head, self._packed_head = weights["embed_tokens.weight"], packed
        if "exact" not in self.streams:
            self.streams["exact"] = F.embedding(tokens, weights["embed_tokens.weight"])
            rows = cpu.take_rows(list(packed.matrices.values()), tokens.flatten())
            self.streams["packed"] = rows.view(*tokens.shape, -1)

    def _layer(self, owner: str, weights: Weights, packed: Packed) -> None:
        number, x = _number(owner), self.streams["exact"]
        kind = self.config.layer_kinds[number]
        layer = partial(_packed_layer, DecoderLayer(self.config, packed), _one_layer(self.config, kind), self._rotation)
        exact, given = self._exact_layer(owner, weights, x), layer(x)
        self.streams |= {"exact": exact, "packed": layer(self.streams["packed"])}
        mixer = "attention" if kind == FULL_ATTENTION else "GDN"
        own, total = _error(given - x, exact - x), _error(self.streams["packed"], exact)
        self.layers.append(LayerError(layer=number, mixer=mixer, own=own, total=total))

    def _exact_layer(self, owner: str, weights: Weights, x: Tensor) -> Tensor:
        rotation = self._rotation(x.shape[1])
        layer = self._skeleton.model.layers[_number(owner)]
        out = functional_call(layer, dict(weights), (x, rotation, None, None), strict=True)
        return out[0] if isinstance(out, tuple) else out

    def _rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin of a sequence's positions `[T, R/2]`, the same for all."""
        return rotary_table(torch.arange(tokens), self._skeleton.frequencies, self._skeleton.rope_factor)

    def _exact_norm(self, x: Tensor) -> Tensor:
        return functional_call(self._skeleton.model.norm, {"weight": self._norm}, (x,))

    def _compare_logits(self, tokens: Tensor) -> Divergence:
        norm, head = norm_weight(self.config, self._norm), list(self._packed_head.matrices.values())
        exact, packed = (self.streams[name].flatten(0, 1).split(CHUNK) for name in ("exact", "packed"))
        return compare_logits(
            tokens,
            (F.linear(self._exact_norm(x), self._exact_head) for x in exact),
            (cpu.linear_stacked(cpu.rms_norm(y.contiguous(), norm), head) for y in packed),
        )


def compare_logits(tokens: Tensor, exact: Iterable[Tensor], packed: Iterable[Tensor]) -> Divergence:
    """Of two models' logits after tokens `[N, T]`, in pieces `[t, vocab]`, one after another and equally long."""
    following = F.pad(tokens[:, 1:], (0, 1), value=-1).flatten()
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for p, q in zip(exact, packed, strict=True):
        sums += _compare(p.log_softmax(-1), q.log_softmax(-1), following[count : count + len(p)])
        count += len(p)
    kl, same, nll, packed_nll = sums.tolist()
    predicted = max(int((following >= 0).sum()), 1)
    perplexity, packed_perplexity = torch.tensor([nll, packed_nll]).div(predicted).exp().tolist()
    return Divergence(
        tokens=count,
        kl=kl / count,
        same_top=same / count,
        perplexity=perplexity,
        packed_perplexity=packed_perplexity,
    )


def _compare(p: Tensor, q: Tensor, following: Tensor) -> Tensor:
    """Sums over tokens, of log probabilities `[T, vocab]`: KL divergence, same likeliest ones, both cross-entropies."""
    known = following >= 0
    kl = (p.exp() * (p - q)).double().sum()
    same = (p.argmax(-1) == q.argmax(-1)).double().sum()
    losses = (F.nll_loss(x[known], following[known], reduction="sum").double() for x in (p, q))
    return torch.stack([kl, same, *losses])


def _packed_layer(layer: DecoderLayer, one: Config, rotation: Rotation, x: Tensor) -> Tensor:
    """A layer's output `[N, T, D]`, sequence by sequence; `one` is a configuration with this layer alone."""
    return torch.stack(
        [_packed_sequence(layer, NativeCache(one), cpu.rotation(*rotation(x.shape[1])), row.clone()) for row in x]
    )


def _packed_sequence(layer: DecoderLayer, cache: NativeCache, rotation: cpu.Rotation, x: Tensor) -> Tensor:
    batch = cache.next_batch(len(x), rotation)
    residual = cpu.residual(x)
    layer(residual, cache.pool.layers[0], batch)
    residual.settle()
    return x


def _one_layer(config: Config, kind: str) -> Config:
    if isinstance(config, Qwen3NextConfig):
        return replace(config, num_hidden_layers=1, layer_types=(kind,))
    return replace(config, num_hidden_layers=1)


def _number(owner: str) -> int:
    return int(owner.removeprefix(LAYERS))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _relative(squares: Tensor) -> Tensor:
    """Of mean 1 in each row; ones where there was nothing. A column that is never used still costs a little."""
    mean = squares.mean(-1, keepdim=True)
    return torch.where(mean > 0, squares / mean, 1.0).clamp(min=1e-4)


# ---- importance --------------------------------------------------------------------------------------------


class Inputs:
    """A context in which a layer's matrices are watched: the mean square of their inputs, column by column."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._found: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self._hooks = [
            module.register_forward_pre_hook(partial(watch, name))
            for name, module in self._layer.named_modules()
            for kind, watch in ((nn.Linear, self._linear), (Experts, self._experts))
            if isinstance(module, kind)
        ]

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def importance(self) -> dict[str, Tensor]:
        """By parameter."""
        return {name: _relative(squares) for name, squares in self._found.items()}

    def _linear(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._found[f"{name}.weight"] = args[0].flatten(0, -2).square().mean(0)

    def _experts(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Each expert by its own tokens, and by all of them where it has few."""
        x, weights, chosen = args
        gate_up, down = (getattr(module, matrix) for matrix in ("gate_up_proj", "down_proj"))
        of_inputs, of_width = torch.empty(len(down), x.shape[1]), torch.empty(len(down), down.shape[2])
        everyone = x.square().mean(0)
        for e in range(len(down)):
            token, place = (chosen == e).nonzero(as_tuple=True)
            weight = weights[token, place, None]  # the smaller, the less an error costs
            inner = swiglu(*F.linear(x[token], gate_up[e]).chunk(2, -1)) * weight
            of_inputs[e] = _mixed((x[token] * weight).square(), everyone * weights.square().mean())
            of_width[e] = _mixed(inner.square(), inner.square().mean().nan_to_num())
        self._found |= {f"{name}.gate_up_proj": of_inputs, f"{name}.down_proj": of_width}


def _mixed(squares: Tensor, prior: Tensor) -> Tensor:
    return (squares.sum(0) + PRIOR * prior) / (len(squares) + PRIOR)
