"""How memory for caches is divided into pages and slots."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.engine.model_runner import EngineModel

LEAST_CONTEXT = 1024  # tokens for which there must be pages
MOST_SLOTS = 1024


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an engine's caches consist of."""

    pages: int
    slots: int
    disk_buffer: int = 0  # bytes on their way to the disk or from it; a record at a time passes whatever it has

    def context(self, model: EngineModel) -> int:
        """Tokens that one request may have, prompt and answer together."""
        return min(model.config.max_position_embeddings, self.pages * model.page_tokens)


def divide(model: EngineModel, memory_bytes: int, max_batch: int, max_drafts: int, disk: bool = False) -> Budget:
    """Half for pages and half for slots, but first the slots that a full batch needs, and no more than can be used.

    A sequence has one slot, and while it drafts one for each draft and one more. With a disk, its records take an
    eighth, and at least what two of them need, one to be read and one to be written. Raises ValueError where not even
    one short request would fit.
    """
    context = model.config.max_position_embeddings
    most_pages = -(-context // model.page_tokens)
    least_pages = -(-min(context, LEAST_CONTEXT) // model.page_tokens)
    records = 2 * record_bytes(model) if disk else 0
    least = least_pages * model.page_bytes + model.state_bytes + records
    if memory_bytes < least:
        raise ValueError(f"{_mb(memory_bytes)} for caches is too little, this model needs {_mb(least)} at least")
    disk_buffer = records + (memory_bytes - least) // 8 if disk else 0
    memory_bytes -= disk_buffer
    room = memory_bytes - least_pages * model.page_bytes
    batch = max_batch + (max_drafts + 1 if max_drafts and model.can_draft else 0)
    state_bytes, page_bytes = max(1, model.state_bytes), max(1, model.page_bytes)  # a dense model has no state
    slots = min(max(memory_bytes // 2 // state_bytes, batch), room // state_bytes, MOST_SLOTS)
    pages = min((memory_bytes - slots * model.state_bytes) // page_bytes, most_pages * slots)
    return Budget(pages=pages, slots=slots, disk_buffer=disk_buffer)


def record_bytes(model: EngineModel) -> int:
    """Of the largest record on disk: a state, its last page, and a hidden state."""
    return model.state_bytes + model.page_bytes + 4 * model.config.hidden_size


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
