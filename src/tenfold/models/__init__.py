"""The architectures, one readable file each."""

from __future__ import annotations

from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig

Config = Qwen3NextConfig | Qwen3Config
Model = Qwen3Next | Qwen3

ARCHITECTURES: dict[str, tuple[type[Qwen3NextConfig], type[Qwen3Next]] | tuple[type[Qwen3Config], type[Qwen3]]] = {
    "qwen3_next": (Qwen3NextConfig, Qwen3Next),
    "qwen3": (Qwen3Config, Qwen3),
}
