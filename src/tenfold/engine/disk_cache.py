"""The prefix cache's snapshots on disk, where a restarted server, or another one, finds them.

A page is a record of its own, named by a hash of all tokens up to its end; a snapshot is one more, named by the hash of
its full pages and by that of its tail. So what conversations share is stored once, and any prompt's names can be
computed from its tokens: there is no index that could be out of step with the files. A snapshot is written after its
pages, and read only with all of them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tenfold.engine.cache_manager import PrefixCache, Snapshot
from tenfold.engine.disk_store import DiskStore
from tenfold.engine.model_runner import EngineModel

FORMAT = "1"  # changes with what is in a record
STEP_BYTES = 64 << 20  # that a step copies at most, but for one record
MOST_WAITING = 64  # snapshots that wait to be copied
NAME = 16  # bytes of a hash


class DiskCache:
    """Copies what the memory's cache holds to files, and back."""

    def __init__(self, model: EngineModel, cache: PrefixCache, folder: Path, limit_bytes: int) -> None:
        """Raises ValueError where the folder can't be used."""
        self._model, self._cache = model, cache
        shape = (model.page_tokens, model.page_bytes, model.state_bytes, cache.lookahead)
        self._version = _hash(FORMAT, model.fingerprint, *map(str, shape))
        try:
            self._store = DiskStore(folder, self._version, limit_bytes)
        except OSError as error:
            raise ValueError(f"{folder}: the prefix cache can't be kept there ({error.strerror})") from None
        self._copies: deque[Iterator[int]] = deque(maxlen=MOST_WAITING)
        self._states = self._list_states()

    @property
    def used_bytes(self) -> int:
        return self._store.used_bytes

    # ---- names

    def _chain(self, isolation: str, tokens: Sequence[int]) -> Iterator[str]:
        """Names of the prefixes of 0, 1, ... full pages, each with the token behind it that belongs to its page."""
        size, more = self._cache.page_tokens, self._cache.lookahead
        name = _hash(self._version, isolation)
        yield name
        for start in range(0, len(tokens) - size - more + 1, size):
            name = _hash(name, _packed(tokens[start : start + size + more]))
            yield name

    def _list_states(self) -> dict[str, set[tuple[int, str]]]:
        """Snapshots by the name of their full pages: the length of the tail, and their own name."""
        states: dict[str, set[tuple[int, str]]] = {}
        for name in list(self._store.names):
            pages, _, rest = name.partition("-")
            length = rest.partition("-")[0]
            if length.isdecimal():
                states.setdefault(pages, set()).add((int(length), name))
        return states

    # ---- writing

    def note(self, snapshot: Snapshot, isolation: str, tokens: Sequence[int]) -> None:
        """Will be written when there is time; forgotten if it is evicted before."""
        self._copies.append(self._copy(snapshot, list(self._chain(isolation, tokens[: snapshot.length]))))

    @property
    def has_work(self) -> bool:
        return bool(self._copies)

    def write_some(self, idle: bool) -> None:
        """Copies the next records for the writing thread, as many as don't hold up a step for long.

        idle: there is time to wait for that thread.
        """
        limit = STEP_BYTES
        if idle:
            self._store.settle()
        while self._copies and limit > 0 and not self._store.is_busy:
            copied = next(self._copies[0], None)
            if copied is None:
                self._copies.popleft()
            else:
                limit -= copied

    def _copy(self, snapshot: Snapshot, chain: list[str]) -> Iterator[int]:
        """Hands one record after the other to be written, pages first, where it is missing; yields their bytes."""
        if not self._cache.holds(snapshot):
            return
        for name, node in zip(chain[1:], self._cache.path(snapshot), strict=True):
            if not self._store.has(name):
                self._store.write(name, [_bytes(self._model.read_page(node.page))])
                yield self._model.page_bytes
                if not self._cache.holds(snapshot):
                    return
        name = _state_name(chain[-1], snapshot.tail)
        if self._store.has(name):
            return
        parts = [_bytes(self._model.read_state(snapshot.slot)), _bytes(snapshot.hidden)]
        if snapshot.page is not None:
            parts.append(_bytes(self._model.read_page(snapshot.page)))
        self._store.write(name, parts)
        self._states.setdefault(chain[-1], set()).add((len(snapshot.tail), name))
        yield sum(map(len, parts))

    def close(self) -> None:
        """Writes all that waits."""
        while self._copies:
            self.write_some(idle=True)
        self._store.close()

    # ---- reading

    def recall(self, isolation: str, tokens: Sequence[int], beyond: int) -> None:
        """Brings the longest prefix, of more than `beyond` tokens, into memory, if there is one and room for it."""
        if self._store.refresh():
            self._states = self._list_states()
        size, chain = self._cache.page_tokens, list(self._chain(isolation, tokens))
        for full in reversed(range(beyond // size, len(chain))):
            for count, name in sorted(self._states.get(chain[full], ()), reverse=True):
                length = full * size + count
                tail = tuple(tokens[full * size : length])
                if length < beyond + size or name != _state_name(chain[full], tail):
                    continue
                if self._bring(isolation, tokens[:length], chain[1 : full + 1], name):
                    return

    def _bring(self, isolation: str, tokens: Sequence[int], names: list[str], state: str) -> bool:
        """Makes a snapshot in memory of one on disk; False where that does not work out."""
        cache = self._cache
        pages = [node.page for node in cache.match(isolation, tokens).path[: len(names)]]
        for page in pages:
            cache.pages.hold(page)
        missing = names[len(pages) :]
        extended = cache.extend(pages, len(tokens))
        slot = cache.take_slot() if extended else None
        hidden = self._read(missing, state, pages, slot, len(tokens)) if slot is not None else None
        if slot is not None and hidden is not None:
            cache.insert(isolation, tokens, pages, slot, hidden, final=True)
            self._store.touch([*names, state])
            return True
        cache.give_back(pages)
        if slot is not None:
            cache.slots.release(slot)
        return False

    def _read(self, names: list[str], state: str, pages: list[int], slot: int, length: int) -> Tensor | None:
        """Reads pages and a state to where they belong; its hidden state, or None where something is missing."""
        model, full = self._model, (length - self._cache.lookahead) // self._cache.page_tokens
        for name, page in zip(names, pages[full - len(names) : full], strict=True):
            content = self._store.read(name, model.page_bytes)
            if content is None:
                return None
            model.write_page(page, _tensor(content, torch.uint8))
        tail_bytes = model.page_bytes if len(pages) > full else 0
        hidden_bytes = 4 * model.config.hidden_size
        content = self._store.read(state, model.state_bytes + hidden_bytes + tail_bytes)
        if content is None:
            return None
        model.write_state(slot, _tensor(content[: model.state_bytes], torch.uint8))
        content = content[model.state_bytes :]
        if tail_bytes:
            model.write_page(pages[full], _tensor(content[hidden_bytes:], torch.uint8))
        return _tensor(content[:hidden_bytes], torch.float32)


def _state_name(pages: str, tail: Sequence[int]) -> str:
    return f"{pages}-{len(tail)}-{_hash(pages, _packed(tail))}"


def _packed(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int64).tobytes()


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=NAME)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _tensor(content: memoryview, dtype: torch.dtype) -> Tensor:
    """A copy: what was read is one buffer for several; and of a model without states it may be empty."""
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
