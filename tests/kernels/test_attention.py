"""Attention over pages: right against float64; decode and prefill give the same bits, whatever the company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.ops.attention import naive_attention
from tenfold.ops.norm import naive_rms_norm
from tenfold.ops.rotary import naive_rotary, rotary_table

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

EPS = 1e-6
# Of the largest output: fp32 sums over a few hundred keys; else half a step of rounding keys and values.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.int8: 2e-2}
TYPES = list(TOLERANCE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Layer:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    rotated: int = 8
    gated: bool = True

    def norms(self) -> tuple[Tensor, Tensor]:
        return normal(self.dim, seed=1) / 4, normal(self.dim, seed=2) / 4

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        width = self.heads * self.dim * (2 if self.gated else 1)
        keys = self.kv_heads * self.dim
        return normal(tokens, width, seed=3), normal(tokens, keys, seed=4), normal(tokens, keys, seed=5)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, 1e4 ** -torch.arange(0, 1, 2 / self.rotated))


LAYERS = [
    Layer(heads=16, dim=256, rotated=64),
    Layer(),
    Layer(heads=3, kv_heads=3, dim=48, rotated=48, gated=False),
    Layer(heads=14, kv_heads=2, dim=16, rotated=6, gated=False),
]


@dataclass
class Pages:
    """A cache that hands out its pages in no order. What nobody wrote is NaN."""

    layer: Layer
    dtype: torch.dtype = torch.float32
    size: int = 16
    count: int = 64
    handle: cpu.KeyValuePages = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = cpu.empty_pages(self.count, self.layer.kv_heads, self.layer.dim, self.size, self.dtype)
        for array in self.arrays:
            array.fill_(float("nan") if array.is_floating_point() else 77)
        self.handle = cpu.key_value_pages(*self.arrays)
        # The last page first: who reads beyond it is seen by the address sanitizer.
        order = torch.randperm(self.count - 1, generator=torch.Generator().manual_seed(6))
        self.free = [*order.tolist(), self.count - 1]

    def take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // self.size))]


def run(pages: Pages, inputs: Sequence[Tensor], bounds: list[int], past: list[int], tables: list[list[int]]) -> Tensor:
    layer = pages.layer
    longest = max(p + b - a for p, (a, b) in zip(past, pairwise(bounds), strict=True))
    rotation = cpu.rotation(*layer.rotation(torch.arange(longest)))
    batch = cpu.batch(bounds, past=past, pages=tables, rotation=rotation)
    norms = [cpu.norm_weight(w, EPS, zero_centered=True) for w in layer.norms()]
    q, k, v = inputs
    return cpu.attention(q, k, v, norms[0], norms[1], pages.handle, batch, layer.gated)


def in_pieces(pages: Pages, inputs: Sequence[Tensor], sizes: Sequence[int], table: list[int]) -> Tensor:
    """One sequence in several calls."""
    outputs, past = [], 0
    for piece in zip(*(x.split(list(sizes)) for x in inputs), strict=True):
        outputs.append(run(pages, piece, [0, len(piece[0])], [past], [table]))
        past += len(piece[0])
    return torch.cat(outputs)


def expected(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    """One sequence from its start, by the definitions in float64."""
    q, k, v = (x.double() for x in inputs)
    gate = None
    q = q.unflatten(-1, (layer.heads, -1))
    if layer.gated:
        q, gate = q.chunk(2, -1)
    k, v = (x.unflatten(-1, (layer.kv_heads, -1)) for x in (k, v))
    cos, sin = (x.double() for x in layer.rotation(torch.arange(len(q))))
    q, k = (
        naive_rotary(naive_rms_norm(x, w.double(), EPS, zero_centered=True), cos, sin)
        for x, w in zip((q, k), layer.norms(), strict=True)
    )
    y = naive_attention(q[None], k[None], v[None])[0]
    return (y if gate is None else y * gate.sigmoid()).flatten(-2)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 65, 255, 256, 257, 500])
def test_a_prompt_is_near_float64(isa: str, layer: Layer, tokens: int) -> None:
    pages, inputs, right = Pages(layer), layer.inputs(tokens), expected(layer, layer.inputs(tokens))
    y = run(pages, inputs, [0, tokens], [0], [pages.take(tokens)])
    assert (y - right).abs().max() <= TOLERANCE[torch.float32] * right.abs().max()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_every_type_of_cache(isa: str, layer: Layer, dtype: torch.dtype, size: int) -> None:
    tokens = 300
    pages, inputs, right = (
        Pages(layer, dtype, size),
        layer.inputs(tokens),
        expected(layer, layer.inputs(tokens)),
    )
    y = in_pieces(pages, inputs, [200, 99, 1], pages.take(tokens))
    assert (y - right).abs().max() <= TOLERANCE[dtype] * right.abs().max()


@pytest.mark.parametrize("layer", LAYERS[:3], ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_decode_and_prefill_give_the_same_bits(isa: str, layer: Layer, dtype: torch.dtype) -> None:
    tokens = 270
    inputs = layer.inputs(tokens)
    cpu.set_threads(1)
    whole = Pages(layer, dtype, 32)
    y = run(whole, inputs, [0, tokens], [0], [whole.take(tokens)])
    for threads in (1, 2, 9):
        cpu.set_threads(threads)
        for sizes in ([240] + [1] * 30, [3, 16, 1, 250], [17, 200, 53], [tokens]):
            pages = Pages(layer, dtype, 32)
            assert torch.equal(in_pieces(pages, inputs, sizes, pages.take(tokens)), y)


def test_pages_of_any_size_give_the_same_bits(isa: str) -> None:
    layer, tokens = LAYERS[1], 300
    outputs = []
    for size in (16, 32, 64):
        pages = Pages(layer, torch.float16, size)
        outputs.append(run(pages, layer.inputs(tokens), [0, tokens], [0], [pages.take(tokens)]))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    layer, past, fresh = LAYERS[1], [0, 299, 17, 255], [40, 1, 3, 2]
    total = sum(past) + sum(fresh)
    inputs = layer.inputs(total)
    pieces = list(zip(*(x.split([p + n for p, n in zip(past, fresh, strict=True)]) for x in inputs), strict=True))
    alone, pages = Pages(layer, dtype), Pages(layer, dtype)
    tables = [pages.take(p + n) for p, n in zip(past, fresh, strict=True)]
    right = []
    for piece, before, table in zip(pieces, past, tables, strict=True):
        right.append(in_pieces(alone, piece, [n for n in (before, len(piece[0]) - before) if n], table)[before:])
        if before:
            run(pages, [x[:before] for x in piece], [0, before], [0], [table])
    new = [torch.cat([p[i][n:] for p, n in zip(pieces, past, strict=True)]) for i in range(3)]
    for threads in (1, 2, 7):
        cpu.set_threads(threads)
        bounds = torch.tensor([0, *fresh]).cumsum(0).tolist()
        assert torch.equal(run(pages, new, bounds, past, tables), torch.cat(right))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_a_long_walk_gives_the_same_bits_on_any_threads(isa: str, dtype: torch.dtype) -> None:
    """One thread takes a walk as a whole; more take runs of its blocks, of so long a one in several waves."""
    layer, past = LAYERS[1], 33_333
    pages = Pages(layer, dtype, 32, count=past // 32 + 1)
    for array in pages.arrays:
        array.copy_(normal(*array.shape, seed=7) * (40 if array.dtype == torch.int8 else 1))
    table = pages.take(past + 1)
    outputs = []
    for threads in (1, 2, 5):
        cpu.set_threads(threads)
        outputs.append(run(pages, layer.inputs(1), [0, 1], [past], [table]))
    assert outputs[0].isfinite().all()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_sequences_share_pages_that_they_only_read(isa: str) -> None:
    layer, shared, own = LAYERS[1], 32, 5
    prefix, ends = layer.inputs(shared), [tuple(x[i : i + own] for x in layer.inputs(50)) for i in (10, 30)]
    pages = Pages(layer)
    common = pages.take(shared)
    run(pages, prefix, [0, shared], [0], [common])
    tables = [common + pages.take(own) for _ in ends]
    both = [torch.cat(x) for x in zip(*ends, strict=True)]
    y = run(pages, both, [0, own, 2 * own], [shared, shared], tables)
    for end, part in zip(ends, y.split(own), strict=True):
        right = expected(layer, [torch.cat(x) for x in zip(prefix, end, strict=True)])[shared:]
        assert (part - right).abs().max() <= TOLERANCE[torch.float32] * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_later_bad_token_spoils_nothing_before_it(isa: str, dtype: torch.dtype) -> None:
    layer, tokens, bad = LAYERS[1], 40, 21  # in bf16, the second of a pair
    inputs, pages = layer.inputs(tokens), Pages(layer, dtype)
    right = run(pages, inputs, [0, tokens], [0], [pages.take(tokens)])
    for x in inputs[1:]:
        x[bad] = float("nan")
    y = run(pages, inputs, [0, tokens], [0], [pages.take(tokens)])
    assert torch.equal(y[:bad], right[:bad]) and y[bad:].isnan().all()


def test_huge_scores_stay_exact(isa: str) -> None:
    layer, tokens = Layer(gated=False), 300
    inputs, pages = layer.inputs(tokens), Pages(layer)
    norms = [cpu.norm_weight(torch.full((layer.dim,), w), EPS, zero_centered=False) for w in (60.0, 60.0)]
    batch = cpu.batch([0, tokens], past=[0], pages=[pages.take(tokens)])
    y = cpu.attention(*inputs, norms[0], norms[1], pages.handle, batch, False)
    q, k, v = (x.double().unflatten(-1, (-1, layer.dim)) for x in inputs)
    weight = torch.full((layer.dim,), 60.0, dtype=torch.float64)
    q, k = (naive_rms_norm(x, weight, EPS) for x in (q, k))
    right = naive_attention(q[None], k[None], v[None])[0].flatten(-2)
    assert (y - right).abs().max() <= 5e-2 * right.abs().max()  # scores of 20,000 have an fp32 step of 0.002


def test_nothing_to_do(isa: str) -> None:
    layer = LAYERS[1]
    norms = [cpu.norm_weight(w, EPS, zero_centered=True) for w in layer.norms()]
    batch = cpu.batch([0], past=[], pages=[])
    y = cpu.attention(*layer.inputs(0), norms[0], norms[1], Pages(layer).handle, batch, layer.gated)
    assert y.shape == (0, layer.heads * layer.dim)


def test_bad_arguments_are_refused() -> None:
    layer = LAYERS[1]
    pages, (q, k, v) = Pages(layer), layer.inputs(20)
    norm = cpu.norm_weight(layer.norms()[0], EPS, zero_centered=True)
    short = cpu.norm_weight(torch.ones(16), EPS, zero_centered=True)

    def call(batch: cpu.Batch, q: Tensor = q, k: Tensor = k, norm: cpu.NormWeight = norm) -> Tensor:
        return cpu.attention(q, k, v, norm, norm, pages.handle, batch, layer.gated)

    def one(past: int = 0, table: Sequence[int] = (0, 1), rotation: cpu.Rotation | None = None) -> cpu.Batch:
        return cpu.batch([0, 20], past=[past], pages=[list(table)], rotation=rotation)

    def two(tables: list[list[int]]) -> cpu.Batch:
        return cpu.batch([0, 10, 20], past=[16, 0], pages=tables)

    keys, values = pages.arrays
    wide = torch.ones(20, 32)
    integers = cpu.empty_pages(4, layer.kv_heads, layer.dim, 16, torch.int8)
    refusals = [
        ("needs 2 pages, got 1", lambda: call(one(table=[0]))),
        ("needs 3 pages, got 2", lambda: call(one(past=13))),
        ("64 pages, got number 64", lambda: call(one(table=[0, 64]))),
        ("got number -1", lambda: call(one(table=[0, -1]))),
        ("page 3 is written and used more than once", lambda: call(one(table=[3, 3]))),
        ("page 5 is written", lambda: call(two([[5, 6], [5]]))),
        ("2 sequences and 0 lists of pages", lambda: call(cpu.batch([0, 10, 20]))),
        ("past must not be negative", lambda: one(past=-1)),
        ("past and pages", lambda: cpu.batch([0, 20], past=[0, 0], pages=[[0, 1]])),
        ("k must be float32", lambda: call(one(), k=v[:5])),
        ("q must have", lambda: call(one(), q=q[:, :80])),
        ("head dim", lambda: call(one(), norm=short)),
        (
            "20 tokens, cos and sin 3 positions",
            lambda: one(rotation=cpu.rotation(*layer.rotation(torch.arange(3)))),
        ),
        (
            "turn more than",
            lambda: call(cpu.batch([0, 20], rotation=cpu.rotation(wide, wide), past=[0], pages=[[0, 1]])),
        ),
        ("16, 32 or 64 tokens, got 8", lambda: cpu.key_value_pages(keys[..., :8].contiguous(), values)),
        ("same dtype", lambda: cpu.key_value_pages(keys, values.half())),
        ("values must be contiguous", lambda: cpu.key_value_pages(keys, keys)),
        ("float32, bfloat16, float16 or int8", lambda: cpu.key_value_pages(keys.double(), values.double())),
        ("int8 and bfloat16 keys must be", lambda: cpu.key_value_pages(integers[0][..., 0], *integers[1:])),
        ("key_scales and value_scales", lambda: cpu.key_value_pages(*integers[:2])),
    ]
    for message, refused in refusals:
        with pytest.raises(ValueError, match=message):
            refused()
