"""Hostile files: a sound one, altered in ways that damage, chance or malice might choose."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

NUMBERS = (-1, 0, 1, 3, 31, 255, 4096, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 10**40)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    0.5,
    -1e300,
    1e308,
    "",
    "int3",
    "mlp",
    [],
    [[]],
    {},
    {"a": 1},
    [1 << 60] * 4,
)


def _mutate_bytes(raw: bytes, chance: random.Random) -> bytes:
    """Some bytes replaced by others or by a number, or a piece cut out, doubled, or cut off."""
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        end = at + chance.choice((1, 4, 8, 100))
        new = chance.choice(
            (
                chance.randbytes(chance.choice((1, 2, 8))),
                (chance.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little"),
                b"",
                bytes(changed[at:end]) * 2,
                bytes([chance.choice(b'[]{}",:0123456789e-')]),
            )
        )
        changed[at:end] = new
        if chance.random() < 0.1:
            del changed[at:]
    return bytes(changed)


def _mutate_json(value: Any, chance: random.Random) -> Any:
    """A value somewhere inside replaced, taken out, copied to another place, or wrapped."""
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        value = value.copy()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        kind = chance.random()
        if kind < 0.08:
            del value[key]
        elif kind < 0.16:
            value[key] = value[chance.choice(keys)]
        elif kind < 0.2 and isinstance(value, dict):
            value[chance.choice(("", "x", "model.layers.9", "mtp.norm.weight"))] = value.pop(key)
        elif kind < 0.2 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = _mutate_json(value[key], chance)
        return value
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice((-4096, -64, -1, 1, 64, 4096, value))
    return chance.choice(VALUES)


@pytest.fixture(scope="session")
def mutate_bytes() -> Callable[[bytes, random.Random], bytes]:
    return _mutate_bytes


@pytest.fixture(scope="session")
def mutate_json() -> Callable[[Any, random.Random], Any]:
    return _mutate_json
