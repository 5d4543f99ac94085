"""Rotary frequencies of a configuration: plain, or stretched by YaRN; and a table of their cos and sin."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tenfold.ops.rotary import rotary_table

FIRST_POSITIONS = 4096


def inverse_frequencies(theta: float, dim: int, scaling: Mapping[str, object] | None) -> tuple[Tensor, float]:
    """fp32 `[dim / 2]` angles per token, and the factor on cos and sin.

    `scaling` is Hugging Face's `rope_scaling`: None, `{"rope_type": "default"}`, or YaRN (Peng et al. 2023, section 3)
    with `factor` and `original_max_position_embeddings`. Raises ValueError for other kinds, and a theta of 1 or less.
    """
    if not theta > 1:
        raise ValueError(f"rope_theta must be above 1, got {theta}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim  # real even in a model built on meta
    frequencies = 1.0 / theta**exponents
    kind = str(scaling.get("rope_type", scaling.get("type", "default"))) if scaling else "default"
    if scaling is None or kind == "default":
        return frequencies, 1.0
    if kind != "yarn":
        raise ValueError(f"rope_scaling: got rope_type {kind!r}, expected 'default' or 'yarn'")
    return _yarn(frequencies, theta, dim, scaling)


class RotaryTable:
    """cos and sin `[.., dim / 2]` by position, kept up to the longest one asked for, and doubled beyond."""

    def __init__(self, frequencies: Tensor, factor: float) -> None:
        self._frequencies, self._factor = frequencies, factor
        self._positions = 0
        self._tables = torch.empty(0), torch.empty(0)

    def __call__(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Those of int64 `[T]` positions, which lie below `end`."""
        if end > self._positions:
            self._positions = max(FIRST_POSITIONS, 2 * end)
            self._tables = rotary_table(torch.arange(self._positions), self._frequencies, self._factor)
        cos, sin = self._tables
        return cos[positions], sin[positions]


def _yarn(frequencies: Tensor, theta: float, dim: int, scaling: Mapping[str, object]) -> tuple[Tensor, float]:
    factor = _number(scaling, "factor")
    trained = _number(scaling, "original_max_position_embeddings")

    def dim_of_turns(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_of_turns(_number(scaling, "beta_fast", 32))), 0)
    high = min(math.ceil(dim_of_turns(_number(scaling, "beta_slow", 1))), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 1e-3)).clamp(0, 1)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    return blended, _number(scaling, "attention_factor", 0.1 * math.log(factor) + 1.0)


def _number(scaling: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = scaling.get(key, default)
    if not isinstance(value, int | float):
        raise ValueError(f"rope_scaling: {key} must be a number, got {value!r}")
    return float(value)
