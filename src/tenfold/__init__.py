"""Tenfold: pretrain, compare and run Qwen3-Next language models, on the machine at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.models.weights import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports torch only once something that needs it is asked for."""
    if name == "load":
        from tenfold.models.weights import load

        return load
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
