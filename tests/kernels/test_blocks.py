"""Half a layer in one call is what its kernels give one by one, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenfold.kernels import cpu

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

HIDDEN, TOKENS = 64, 37


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def packed(rows: int, cols: int = HIDDEN, format: str = "int4") -> cpu.PackedLinear:
    return cpu.pack_linear(normal(rows, cols, seed=rows + cols), format)


def norm(dim: int = HIDDEN) -> cpu.NormWeight:
    return cpu.norm_weight(normal(dim, seed=1), 1e-6, zero_centered=True)


def stream() -> Tensor:
    return normal(TOKENS, HIDDEN, seed=2)


@pytest.mark.parametrize("gated", [False, True])
def test_attention_block(isa: str, gated: bool) -> None:
    q, k, v = packed(4 * 16 * (1 + gated)), packed(2 * 16), packed(2 * 16)
    output, q_norm, k_norm = packed(HIDDEN, 4 * 16), norm(16), norm(16)
    angles = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.1])
    batch = cpu.batch([0, TOKENS], past=[0], pages=[[1, 0, 2]], rotation=cpu.rotation(angles.cos(), angles.sin()))
    x = stream()
    pages = [cpu.empty_pages(3, 2, 16, 16, torch.float32) for _ in range(2)]

    block = cpu.attention_block(norm(), q, k, v, q_norm, k_norm, output, gated)
    residual = cpu.residual(x)
    cpu.mix(block, residual, cpu.key_value_pages(*pages[0]), batch)
    residual.settle()

    normed = cpu.rms_norm(stream(), norm())
    queries, keys, values = cpu.linear(normed, [q, k, v])
    mixed = cpu.attention(queries, keys, values, q_norm, k_norm, cpu.key_value_pages(*pages[1]), batch, gated)
    assert torch.equal(x, stream() + cpu.linear(mixed, [output])[0])
    assert all(torch.equal(*pair) for pair in zip(*pages, strict=True))


@pytest.mark.parametrize("format", cpu.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_what_is_remembered_is_what_attention_leaves(isa: str, dtype: torch.dtype, format: str) -> None:
    """Of two sequences, one of which goes on."""
    q, k, v = (packed(rows, format=format) for rows in (2 * 4 * 16, 2 * 16, 2 * 16))
    block = cpu.attention_block(norm(), q, k, v, norm(16), norm(16), packed(HIDDEN, 4 * 16), gated=True)
    angles = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.1])
    rotation = cpu.rotation(angles.cos(), angles.sin())
    batch = cpu.batch([0, 30, TOKENS], past=[0, 18], pages=[[4, 0], [3, 2]], rotation=rotation)
    attended, remembered = (cpu.empty_pages(5, 2, 16, 16, dtype) for _ in range(2))
    cpu.mix(block, cpu.residual(stream()), cpu.key_value_pages(*attended), batch)
    x = stream()
    cpu.remember(block, cpu.residual(x), cpu.key_value_pages(*remembered), batch)
    assert all(torch.equal(*pair) for pair in zip(attended, remembered, strict=True))
    assert any(part[:, 2].any() for part in remembered) and torch.equal(x, stream())


def test_delta_net_block(isa: str) -> None:
    key_heads, heads, dim = 2, 4, 16
    channels = (2 * key_heads + heads) * dim
    weights = cpu.delta_net_weights(
        normal(channels, 4), normal(heads), normal(heads, seed=4), normal(dim), key_heads, 1e-6
    )
    qkvz, ba, output = packed(channels + heads * dim), packed(2 * heads, format="int8"), packed(HIDDEN, heads * dim)
    batch = cpu.batch([0, TOKENS], slots=[0])
    states = [(torch.zeros(1, channels, 3), torch.zeros(1, heads, dim, dim)) for _ in range(2)]
    x = stream()

    block = cpu.delta_net_block(norm(), qkvz, ba, weights, output)
    residual = cpu.residual(x)
    cpu.mix(block, residual, cpu.recurrent_states(*states[0]), batch)
    residual.settle()

    mixed_in, rates = cpu.linear(cpu.rms_norm(stream(), norm()), [qkvz, ba])
    mixed = cpu.gated_delta_net(mixed_in, rates, weights, cpu.recurrent_states(*states[1]), batch)
    assert torch.equal(x, stream() + cpu.linear(mixed, [output])[0])
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


@pytest.mark.parametrize("shared", [1, 3])
def test_sparse_block(isa: str, shared: int) -> None:
    experts = cpu.pack_experts(normal(5 + shared, 64, HIDDEN), normal(5 + shared, HIDDEN, 32), "int8")
    router, gate = packed(5, format="bf16"), packed(1, format="bf16")
    x = stream()
    residual = cpu.residual(x)
    cpu.feed_forward(cpu.sparse_block(norm(), router, gate, experts, 2, True), residual)
    residual.settle()
    normed = cpu.rms_norm(stream(), norm())
    logits, shared_gate = cpu.linear(normed, [router, gate])
    weights, chosen = cpu.route(logits, 2, True, shared_gate, shared)
    assert chosen[0, 2:].tolist() == list(range(5, 5 + shared))
    assert torch.equal(x, stream() + cpu.expert_layer(normed, experts, chosen, weights))


def test_dense_blocks_one_after_another(isa: str) -> None:
    gate, up, down = packed(96), packed(96), packed(HIDDEN, 96)
    block = cpu.dense_block(norm(), gate, up, down)
    x, y = stream(), stream()
    residual = cpu.residual(x)
    for _ in range(2):
        cpu.feed_forward(block, residual)
        h = cpu.swiglu(*cpu.linear(cpu.rms_norm(y, norm()), [gate, up]))
        y = y + cpu.linear(h, [down])[0]
    residual.settle()
    residual.settle()  # once is enough
    assert torch.equal(x, y)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="as many columns as its norm"):
        cpu.dense_block(norm(32), packed(96), packed(96), packed(HIDDEN, 96))
    with pytest.raises(ValueError, match="back to the residual stream"):
        cpu.dense_block(norm(), packed(96), packed(96), packed(HIDDEN, 64))
    with pytest.raises(ValueError, match="all bf16, or none"):
        cpu.dense_block(norm(), packed(96), packed(96, format="bf16"), packed(HIDDEN, 96))
    experts = cpu.empty_experts("int4", 5, HIDDEN, 32)
    with pytest.raises(ValueError, match="must come the shared one"):
        cpu.sparse_block(norm(), packed(5, format="bf16"), packed(1, format="bf16"), experts, 2, True)


def test_arrays_that_do_not_fit_are_refused() -> None:
    block = cpu.dense_block(norm(), packed(96), packed(96), packed(HIDDEN, 96))
    with pytest.raises(ValueError, match=r"x must be float32 \[3, 64\], got shape \[3, 32\]"):
        cpu.feed_forward(block, cpu.residual(torch.zeros(3, 32)))
    with pytest.raises(ValueError, match="x must be float32"):
        cpu.residual(torch.zeros(3, 64, dtype=torch.bfloat16))


def test_pages_that_do_not_fit_are_not_written() -> None:
    q, k, v = packed(4 * 16), packed(2 * 16), packed(2 * 16)
    block = cpu.attention_block(norm(), q, k, v, norm(16), norm(16), packed(HIDDEN, 4 * 16), gated=False)
    rotation = cpu.rotation(torch.ones(TOKENS, 2), torch.zeros(TOKENS, 2))
    pages = cpu.key_value_pages(*cpu.empty_pages(3, 2, 16, 16, torch.float32))
    with pytest.raises(ValueError, match="needs 3 pages, got 2"):
        batch = cpu.batch([0, TOKENS], past=[0], pages=[[0, 1]], rotation=rotation)
        cpu.remember(block, cpu.residual(stream()), pages, batch)
    with pytest.raises(ValueError, match=r"k must be float32 \[5, 32\], got shape \[37, 32\]"):
        batch = cpu.batch([0, 5], past=[0], pages=[[0, 1, 2]], rotation=rotation)
        cpu.remember(block, cpu.residual(stream()), pages, batch)


def test_a_profile_counts_the_work() -> None:
    gate, up, down = packed(96), packed(96), packed(HIDDEN, 96)
    block = cpu.dense_block(norm(), gate, up, down)
    with cpu.profile() as uses:
        cpu.feed_forward(block, cpu.residual(stream()))
    cpu.feed_forward(block, cpu.residual(stream()))  # no longer counted
    found = {use.kernel: use for use in uses}
    assert set(found) == {"norm", "linear int4", "swiglu"}
    products = found["linear int4"]
    assert (products.calls, products.bytes) == (2, gate.nbytes + up.nbytes + down.nbytes)
    assert products.operations == 2 * TOKENS * 3 * 96 * HIDDEN
    assert 0 < products.seconds < 10
