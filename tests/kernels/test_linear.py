"""Products with packed weights: right against float64, and the same bits whatever the company."""

from __future__ import annotations

import pytest
import torch

from tenfold.kernels import cpu

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

# Relative error (Frobenius) of rounding normal inputs to int8 in groups of 32, or to bf16 where the
# instruction set multiplies bf16 with bf16; sums in fp32 add a few 1e-7.
ROUNDING = {"int8": 0.007, "int4": 0.007, "bf16": 0.0025}
TOKENS = [1, 2, 3, 6, 7, 13, 14, 15, 29, 64, 70]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", cpu.FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (33, 64), (100, 544)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_is_near_float64(isa: str, format: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = cpu.pack_linear(normal(*shape), format)
    x = normal(70, shape[1], seed=1).to(dtype)
    expected = x.double() @ cpu.unpack(weight).double().T
    for tokens in TOKENS:
        (y,) = cpu.linear(x[:tokens], [weight])
        error = (y - expected[:tokens]).norm() / expected[:tokens].norm()
        assert error < ROUNDING[format]


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_rows_have_the_same_bits_in_any_company(isa: str, format: str) -> None:
    weight = cpu.pack_linear(normal(300, 544), format)
    x = normal(70, 544, seed=1)
    cpu.set_threads(1)
    alone = torch.cat([cpu.linear(row, [weight])[0] for row in x.split(1)])
    for count in (1, 2, 3):
        cpu.set_threads(count)
        for tokens in TOKENS:
            assert torch.equal(cpu.linear(x[-tokens:], [weight])[0], alone[-tokens:])


def test_merged_products_equal_separate_ones(isa: str) -> None:
    weights = [
        cpu.pack_linear(normal(rows, 64), format)
        for rows, format in [(70, "int4"), (1, "int8"), (64, "int4"), (33, "int8")]
    ]
    x = normal(9, 64, seed=1)
    for merged, weight in zip(cpu.linear(x, weights), weights, strict=True):
        assert torch.equal(merged, cpu.linear(x, [weight])[0])


def test_output_in_bf16_is_the_rounded_output(isa: str) -> None:
    weight = cpu.pack_linear(normal(45, 64), "int8")
    x = normal(9, 64, seed=1)
    assert torch.equal(cpu.linear(x, [weight], torch.bfloat16)[0], cpu.linear(x, [weight])[0].to(torch.bfloat16))


@pytest.mark.parametrize("format", cpu.FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(isa: str, format: str, bad: float) -> None:
    weight = cpu.pack_linear(normal(40, 64), format)
    x = normal(7, 64, seed=1)
    clean = cpu.linear(x, [weight])[0]
    x[3, 17] = bad
    y = cpu.linear(x, [weight])[0]
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 1, 2, 4, 5, 6]], clean[[0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize("format", cpu.FORMATS)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e30])
def test_inputs_of_any_size(isa: str, format: str, scale: float) -> None:
    weight = cpu.pack_linear(normal(40, 64), format)
    x = normal(3, 64, seed=1) * scale
    expected = x.double() @ cpu.unpack(weight).double().T
    torch.testing.assert_close(cpu.linear(x, [weight])[0].double(), expected, rtol=0, atol=max(1e-28, 0.3 * scale))


def test_rows_apart_in_memory(isa: str) -> None:
    weight = cpu.pack_linear(normal(40, 64), "int4")
    wide = normal(5, 200, seed=1)
    assert torch.equal(cpu.linear(wide[:, :64], [weight])[0], cpu.linear(wide[:, :64].clone(), [weight])[0])


def test_no_tokens(isa: str) -> None:
    assert cpu.linear(torch.empty(0, 64), [cpu.pack_linear(normal(40, 64), "int4")])[0].shape == (0, 40)


def test_bad_arguments_are_refused() -> None:
    weight = cpu.pack_linear(normal(40, 64), "int4")
    with pytest.raises(ValueError, match="as many columns"):
        cpu.linear(normal(3, 32), [weight])
    with pytest.raises(ValueError, match="x must be a matrix"):
        cpu.linear(normal(64), [weight])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        cpu.linear(torch.zeros(3, 64, dtype=torch.float64), [weight])
    with pytest.raises(ValueError, match="neighbours"):
        cpu.linear(normal(64, 3).T, [weight])
    with pytest.raises(ValueError, match="one weight at least"):
        cpu.linear(normal(3, 64), [])
    with pytest.raises(ValueError, match="all bf16, or none"):
        cpu.linear(normal(3, 64), [weight, cpu.pack_linear(normal(40, 64), "bf16")])
    with pytest.raises(ValueError, match="threads must be between"):
        cpu.set_threads(0)
    with pytest.raises(ValueError, match="no kernels for 'mmx'"):
        cpu.use_isa("mmx")


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_rows_are_taken_from_weights_below_each_other(isa: str, format: str) -> None:
    weights = [cpu.pack_linear(torch.randn(rows, 64), format) for rows in (33, 5)]
    values = torch.cat([cpu.unpack(weight) for weight in weights])
    rows = torch.tensor([37, 0, 32, 33, 33])
    assert torch.equal(cpu.take_rows(weights, rows), values[rows])
    for wrong in (-1, 38):
        with pytest.raises(ValueError, match=f"no row {wrong}"):
            cpu.take_rows(weights, torch.tensor([wrong]))


def test_products_of_weights_below_each_other_stand_side_by_side(isa: str) -> None:
    weights = [cpu.pack_linear(torch.randn(rows, 64), format) for rows, format in ((33, "int8"), (5, "int4"))]
    x = torch.randn(3, 64)
    assert torch.equal(cpu.linear_stacked(x, weights), torch.cat(cpu.linear(x, weights), 1))
