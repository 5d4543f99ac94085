"""GGML's tensor types: rows of blocks, each with its own scales, and how a block becomes numbers.

The layouts are those of `ggml-common.h` of llama.cpp. All products and sums are in fp32 and in the order of its
own `dequantize_row_*`, so the numbers are the same to the bit. Shape letters: n blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Unpack = Callable[[Tensor], Tensor]  # uint8 `[n, bytes]` to numbers `[n, weights]`


@dataclass(frozen=True)
class BlockType:
    """A type of tensor: `weights` that lie together in `bytes`, and how to unpack them."""

    number: int  # that stands for the type in a file
    weights: int
    bytes: int
    unpack: Unpack


def dequantize(raw: Tensor, dtype: str) -> Tensor:
    """The numbers in whole blocks: uint8 `[bytes]` to `[weights]`, fp32 or a half precision type's own."""
    kind = BLOCK_TYPES[dtype]
    return kind.unpack(raw.view(-1, kind.bytes)).flatten()


# ---- 32 weights to a block ---------------------------------------------------------------------------------


def _q8_0(blocks: Tensor) -> Tensor:
    """fp16 scale, 32 int8."""
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    """fp16 scale, 16 bytes: weights 0 to 15 in the low halves, 16 to 31 in the high ones, all plus 8."""
    return _nibbles(blocks[:, 2:], 16).sub_(8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    """fp16 scale, fp16 least value, 16 bytes as above without the 8."""
    return _nibbles(blocks[:, 4:], 16) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    """fp16 scale, 4 bytes with the fifth bits, 16 bytes as of Q4_0; all plus 16."""
    return (_nibbles(blocks[:, 6:], 16) + _fifths(blocks[:, 2:6])).sub_(16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    """fp16 scale, fp16 least value, 4 and 16 bytes as above without the 16."""
    return (_nibbles(blocks[:, 8:], 16) + _fifths(blocks[:, 4:8])) * _half(blocks, 0) + _half(blocks, 2)


def _fifths(packed: Tensor) -> Tensor:
    """uint8 `[n, 32]`, 0 or 16: bit i of byte j is of weight 8 j + i."""
    return (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1) * 16


# ---- 256 weights to a block, which has parts with scales of their own -----------------------------------------


def _q4_k(blocks: Tensor) -> Tensor:
    """fp16 scale of scales, fp16 scale of minima, 12 bytes of these, 128 bytes of nibbles."""
    return _scaled(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes before the nibbles: bit i of byte j is the fifth of weight j in part i."""
    fifth = _bits(blocks[:, 16:48], 32, 1).flatten(1)
    return _scaled(blocks, _nibbles(blocks[:, 48:], 32) + fifth * 16)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes with the low 4 bits, 64 with the high 2, 16 int8 scales of 16 weights each, fp16 scale of these."""
    low, high = _nibbles(blocks[:, :128], 64), _bits(blocks[:, 128:192], 32, 2).flatten(1)
    scales = blocks[:, 192:208].view(torch.int8) * _half(blocks, 208)
    return ((low + high * 16 - 32).unflatten(1, (16, 16)) * scales[:, :, None]).flatten(1)


def _scaled(blocks: Tensor, quants: Tensor) -> Tensor:
    """Eight parts of 32 weights: `scale * q - min`, the scales and minima being 6 bits each in 12 bytes.

    Bytes 0 to 3 hold scales 0 to 3 in their low 6 bits, 4 to 7 minima 0 to 3; their high 2 bits are those of
    scales and minima 4 to 7, whose low 4 bits are the low and high halves of bytes 8 to 11.
    """
    low, middle, both = blocks[:, 4:16].split(4, 1)
    scales = torch.cat((low & 63, both & 15 | low >> 6 << 4), 1) * _half(blocks, 0)
    minima = torch.cat((middle & 63, both >> 4 | middle >> 6 << 4), 1) * _half(blocks, 2)
    return (quants.unflatten(1, (8, 32)) * scales[:, :, None] - minima[:, :, None]).flatten(1)


# ---- bits --------------------------------------------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at a byte of each block, as fp32 `[n, 1]`."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """fp32 `[n, 2 * bytes]`: of each `run` bytes first all low halves, then all high ones."""
    return _bits(packed, run, 4).flatten(1).float()


def _bits(packed: Tensor, run: int, width: int) -> Tensor:
    """uint8 `[n, runs, 8 / width, run]`: of each `run` bytes the lowest `width` bits, then the next, and so on."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    return packed.unflatten(1, (-1, 1, run)) >> shifts & (1 << width) - 1


BLOCK_TYPES = {
    "F32": BlockType(0, 1, 4, lambda blocks: blocks.view(torch.float32)),
    "F16": BlockType(1, 1, 2, lambda blocks: blocks.view(torch.float16)),
    "BF16": BlockType(30, 1, 2, lambda blocks: blocks.view(torch.bfloat16)),
    "Q4_0": BlockType(2, 32, 18, _q4_0),
    "Q4_1": BlockType(3, 32, 20, _q4_1),
    "Q5_0": BlockType(6, 32, 22, _q5_0),
    "Q5_1": BlockType(7, 32, 24, _q5_1),
    "Q8_0": BlockType(8, 32, 34, _q8_0),
    "Q4_K": BlockType(12, 256, 144, _q4_k),
    "Q5_K": BlockType(13, 256, 176, _q5_k),
    "Q6_K": BlockType(14, 256, 210, _q6_k),
}
