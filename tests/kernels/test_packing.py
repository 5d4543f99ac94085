"""The packed layout: what comes back, what is refused, and that it is the same everywhere."""

from __future__ import annotations

import pytest
import torch

from tenfold.kernels import cpu

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

# Relative error (Frobenius) of rounding normal weights: bf16 2^-9 at most; int8 and int4 a step of 1/127 and
# 1/8 of the largest of 32, about 2.3 standard deviations, over sqrt(12); int4's grid takes off a tenth.
ROUNDING = {"bf16": 0.002, "int8": 0.006, "int4": 0.08}
BITS = {"bf16": 16, "int8": 8.5, "int4": 4.5}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", cpu.FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (31, 64), (32, 96), (70, 544)], ids=str)
def test_unpacked_weights_are_near(format: str, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    packed = cpu.pack_linear(weight, format)
    error = (cpu.unpack(packed) - weight).norm() / weight.norm()
    assert error < ROUNDING[format]
    assert packed.shape == shape and packed.format == format
    assert packed.nbytes == -(-shape[0] // 32) * 32 * shape[1] * BITS[format] / 8


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_every_instruction_set_packs_the_same_bytes(format: str) -> None:
    weight = normal(33, 128) * normal(33, 1).exp()
    packed = []
    for isa in cpu.isas():
        cpu.use_isa(isa)
        packed.append(torch.from_numpy(cpu.pack_linear(weight, format).bytes.copy()))
    assert all(torch.equal(packed[0], other) for other in packed)


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_packing_what_was_unpacked_changes_nothing(format: str) -> None:
    once = cpu.unpack(cpu.pack_linear(normal(32, 64), format))
    again = cpu.unpack(cpu.pack_linear(once, format))
    torch.testing.assert_close(again, once, rtol=1e-3, atol=0)


def test_bf16_weights_come_back_exactly() -> None:
    weight = normal(40, 64).bfloat16()
    assert torch.equal(cpu.unpack(cpu.pack_linear(weight, "bf16")), weight.float())


def test_the_grid_beats_even_steps_from_the_largest_value() -> None:
    weight = normal(256, 512)
    groups = weight.view(256, -1, 32)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).half().float()
    plain = ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)
    searched = cpu.unpack(cpu.pack_linear(weight, "int4"))
    assert (searched - weight).square().sum() < 0.85 * (plain - weight).square().sum()


def test_importance_moves_the_error_to_where_it_costs_less() -> None:
    weight = normal(64, 256)
    importance = torch.where(torch.arange(256) % 4 == 0, 100.0, 1.0)
    plain, weighted = (cpu.unpack(cpu.pack_linear(weight, "int4", i)) for i in (None, importance))
    costs = [((w - weight).square() * importance).sum() for w in (plain, weighted)]
    assert costs[1] < 0.9 * costs[0]


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_zeros_and_tiny_groups(format: str) -> None:
    weight = torch.zeros(32, 64)
    weight[3, :32] = 1e-38
    assert cpu.unpack(cpu.pack_linear(weight, format)).abs().max() < 1e-37


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_packed_bytes_are_used_in_place(format: str) -> None:
    packed = cpu.pack_linear(normal(40, 64), format)
    storage = torch.zeros(packed.nbytes + 64, dtype=torch.uint8)
    room = storage[-storage.data_ptr() % 64 :][: packed.nbytes]
    mapped = cpu.packed_linear(room, format, 40, 64)
    room.copy_(torch.from_numpy(packed.bytes.copy()))
    assert torch.equal(cpu.unpack(mapped), cpu.unpack(packed))


def test_experts_lie_on_pages() -> None:
    experts = cpu.pack_experts(normal(3, 128, 96), normal(3, 96, 64), "int4")
    assert experts.shape == (3, 96, 64)
    assert experts.nbytes % (3 * 4096) == 0 and experts.nbytes < 3 * (3 * 96 * 64 * 4.5 / 8 + 4096)
    assert experts.bytes.ctypes.data % 4096 == 0


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown format 'int3'"):
        cpu.pack_linear(normal(4, 32), "int3")
    with pytest.raises(ValueError, match=r"multiple of 32 columns, got \[4, 33\]"):
        cpu.pack_linear(normal(4, 33), "int4")
    with pytest.raises(ValueError, match="not finite"):
        cpu.pack_linear(torch.full((4, 32), torch.nan), "int8")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        cpu.pack_linear(torch.zeros(4, 32, dtype=torch.int32), "int8")
    with pytest.raises(ValueError, match="importance"):
        cpu.pack_linear(normal(4, 32), "int4", torch.ones(4))
    with pytest.raises(ValueError, match=r"uint8 \[18432\], got shape \[5\]"):
        cpu.packed_linear(torch.zeros(5, dtype=torch.uint8), "int4", 32, 1024)


def test_bad_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        cpu.empty_experts("int4", 2, 64, 40)
    experts = cpu.empty_experts("int4", 2, 64, 32)
    with pytest.raises(ValueError, match="there are 2 experts, got number 2"):
        experts.pack(2, normal(32, 64), normal(32, 64), normal(64, 32))
    with pytest.raises(ValueError, match=r"down must be \[64, 32\]"):
        experts.pack(0, normal(32, 64), normal(32, 64), normal(32, 64))
