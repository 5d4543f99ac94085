"""What the configurations of both architectures share: Hugging Face's `config.json`, and which values make a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

MAY_BE_ZERO = re.compile("expert|moe|nextn")  # among the counts and sizes
LARGEST, LONGEST = 1 << 20, 1 << 32  # of the counts and sizes; and of a context, in tokens


def known_fields(cls: type, values: Mapping[str, object]) -> dict[str, Any]:
    """The entries of a `config.json` that `cls` knows, with transformers 5's `rope_parameters` taken apart."""
    merged = {key: value for key, value in values.items() if value is not None}
    rope = merged.pop("rope_parameters", None)
    if isinstance(rope, Mapping):
        merged |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type", "default") != "default":
            merged["rope_scaling"] = dict(rope)
    if merged.get("attention_bias"):
        raise ValueError("config.json: attention_bias true is not supported, expected false as in every released model")
    names = {f.name for f in fields(cls)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items() if key in names}


def hf_fields(config: object, architecture: str) -> dict[str, object]:
    """All fields for a `config.json`, with rotary settings in both spellings."""
    values: dict[str, object] = {key: value for key, value in asdict(config).items() if value is not None}  # type: ignore[call-overload]
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    scaling = values.get("rope_scaling") or {"rope_type": "default"}
    assert isinstance(scaling, dict)
    rope = {
        "rope_theta": values["rope_theta"],
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
    }
    return {"architectures": [architecture], **values, "rope_parameters": {**scaling, **rope}}


def check_fields(config: object) -> None:
    """Raises ValueError for a field of the wrong type, and for a count, size or number that makes no model."""
    for field in fields(config):  # type: ignore[arg-type]
        kind = type(field.default)
        value: Any = getattr(config, field.name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in (bool, int, float, str, tuple) and not fits:
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
        if kind is int:
            _check_count(field.name, value)
        if kind is float and not 0 <= value < 1e30:
            raise ValueError(f"{field.name} must be a number from 0 on, got {value}")
    scaling, rotated = (getattr(config, name, None) for name in ("rope_scaling", "partial_rotary_factor"))
    if scaling is not None and not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be an object, got {scaling!r}")
    if rotated is not None and rotated > 1:
        raise ValueError(f"partial_rotary_factor must be 1 at most, got {rotated}")


def _check_count(name: str, value: int) -> None:
    least, most = 0 if MAY_BE_ZERO.search(name) else 1, LONGEST if "position" in name else LARGEST
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    if value > most:
        raise ValueError(f"{name} must be {most} at most, got {value:.3g}")
