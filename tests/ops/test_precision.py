"""Which dtype a product runs in, and how the speed of a device is measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tenfold.ops import precision
from tenfold.ops.precision import autocast_dtype, matmul_gflops, multiplies_bfloat16


@pytest.fixture(autouse=True)
def nothing_measured_yet() -> Iterator[None]:
    matmul_gflops.cache_clear()
    yield
    matmul_gflops.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, gflops: dict[torch.dtype, float]) -> list[int]:
    """A device of these speeds; returns the list of sizes that it will have been asked to multiply."""
    sizes: list[int] = []

    def seconds(a: Tensor) -> float:
        sizes.append(len(a))
        return 2e-9 * len(a) ** 3 / gflops[a.dtype]

    monkeypatch.setattr(precision, "_seconds", seconds)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_product_runs_in_its_tensors_dtype_without_autocast(dtype: torch.dtype) -> None:
    assert autocast_dtype(torch.zeros(1, dtype=dtype)) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_runs_in_autocasts_dtype_but_for_fp64(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(torch.zeros(1, dtype=dtype)) == torch.bfloat16
        assert autocast_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


def test_speed_is_measured_and_remembered() -> None:
    speed = matmul_gflops(torch.float32, size=128)
    assert speed > 0 and matmul_gflops(torch.float32, size=128) == speed


@pytest.mark.parametrize("gflops, largest", [(1000.0, 1024), (1.0, 512), (0.001, 128)])
def test_a_slow_device_multiplies_something_smaller(
    monkeypatch: pytest.MonkeyPatch, gflops: float, largest: int
) -> None:
    sizes = pretend(monkeypatch, {torch.float32: gflops})
    assert matmul_gflops(torch.float32) == pytest.approx(gflops)
    assert sizes[-8:] == [largest] * 8


@pytest.mark.parametrize("bfloat16, worth_it", [(100.0, False), (149.0, False), (151.0, True), (0.5, False)])
def test_bfloat16_is_worth_it_where_it_is_half_as_fast_again(
    monkeypatch: pytest.MonkeyPatch, bfloat16: float, worth_it: bool
) -> None:
    pretend(monkeypatch, {torch.float32: 100.0, torch.bfloat16: bfloat16})
    assert multiplies_bfloat16() == worth_it
