"""Rotary position embedding, on the leading part of each head where it is partial.

Shape letters: T tokens, H heads, K head dim, R <= K the rotated part.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, as complex numbers: pairs (i, i + R/2) of x `[..., T, H, K]` turned by their token's angle."""
    half = cos.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin).unsqueeze(-2)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[..., T, H, K]` with its first R dims rotated; cos, sin `[..., T, R/2]` from `rotary_table`."""
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"rotary: {2 * half} dims to rotate, but heads of {x.shape[-1]}")
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def rotary_table(positions: Tensor, inverse_frequencies: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 `[..., R/2]`, of the angles at integer positions `[...]`; `scaling` is YaRN's factor."""
    angles = positions[..., None].float() * inverse_frequencies.to(positions.device)
    return angles.cos() * scaling, angles.sin() * scaling
