"""The prefix cache's snapshots on disk, where a restarted server, or another one, finds them.

A page is a record of its own, named by a hash of all tokens up to its end; a snapshot is one more, named by the hash of
its full pages and by that of its tail. So what conversations share is stored once, and any prompt's names can be
computed from its tokens: there is no index that could be out of step with the files. A snapshot is written after its
pages, and read only with all of them.

Files are written by one thread and read by another, while the engine's steps go on. What is read goes straight to pages
and a slot that nobody else holds; the engine takes it into the memory's cache once all of it is there.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tenfold.engine.budget import record_bytes
from tenfold.engine.cache_manager import PrefixCache, Snapshot
from tenfold.engine.disk_store import DiskStore
from tenfold.engine.model_runner import EngineModel

FORMAT = "1"  # changes with what is in a record
STEP_BYTES = 64 << 20  # that a step copies at most, but for one record
MOST_WAITING = 64  # snapshots that wait to be copied
NAME = 16  # bytes of a hash
MOMENT = 0.01  # seconds that the engine waits for a thread before it looks for other work
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A snapshot on disk."""

    length: int
    pages: list[str]  # names of its full pages
    state: str  # its own name


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A snapshot on its way to memory, which it holds."""

    isolation: str
    tokens: Sequence[int]
    pages: list[int]
    slot: int
    hidden: Future[Tensor | None]  # the last hidden state, or None where something is missing


class DiskCache:
    """Copies what the memory's cache holds to files, and back."""

    def __init__(
        self, model: EngineModel, cache: PrefixCache, folder: Path, limit_bytes: int, buffer_bytes: int
    ) -> None:
        """buffer_bytes: of memory, for what is written or read. Raises ValueError where the folder can't be used."""
        self._model, self._cache = model, cache
        self._record = record_bytes(model)
        self._most_waiting = buffer_bytes - self._record  # the rest is for the record that is read
        shape = (model.page_tokens, model.page_bytes, model.state_bytes, cache.lookahead)
        self._version = _hash(FORMAT, model.fingerprint, *map(str, shape))
        try:
            self._store = DiskStore(folder, self._version, limit_bytes)
        except OSError as error:
            raise ValueError(f"{folder}: the prefix cache can't be kept there ({error.strerror})") from None
        self._copies: deque[Iterator[int]] = deque(maxlen=MOST_WAITING)
        self._states = self._list_states()
        self._reader = ThreadPoolExecutor(1, "prefix cache")
        self.reading: Reading | None = None

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
        return bool(self._copies or self.reading)

    def write_some(self, idle: bool) -> None:
        """Copies the next records for the writing thread, as many as don't hold up a step for long.

        idle: there is time to wait a moment for that thread.
        """
        limit = STEP_BYTES
        if idle and self._copies and self._is_full:
            time.sleep(MOMENT)
        while self._copies and limit > 0 and not self._is_full:
            copied = self._copy_next()
            if copied is None:
                self._copies.popleft()
            else:
                limit -= copied

    @property
    def _is_full(self) -> bool:
        """Whether another record has to wait until one is written."""
        waiting = self._store.waiting_bytes
        return waiting > 0 and waiting + self._record > self._most_waiting

    def _copy_next(self) -> int | None:
        """The bytes of the next record; None where there is none."""
        try:
            return next(self._copies[0], None)
        except Exception:  # of memory or of the model; the snapshot is not on disk then, nothing else
            logger.exception("the prefix cache could not be copied")
            return None

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
        """Waits for what is read, and writes all that waits."""
        if self.reading:
            wait([self.reading.hidden])
            self.receive()
        while self._copies:
            self.write_some(idle=True)
        self._store.close()
        self._reader.shutdown()

    # ---- reading

    def find(self, isolation: str, tokens: Sequence[int]) -> list[Stored]:
        """The snapshots that these tokens begin with, longest first. May be called from any thread."""
        if self._store.refresh():
            self._states = self._list_states()
        size, chain = self._cache.page_tokens, list(self._chain(isolation, tokens))
        found: list[Stored] = []
        for full, pages in enumerate(chain):
            if full and pages not in self._store.names:
                break
            for count, name in sorted(self._states.get(pages, ())):
                length = full * size + count
                fits = length <= len(tokens) and name == _state_name(pages, tokens[full * size : length])
                if fits and name in self._store.names:
                    found.append(Stored(length=length, pages=chain[1 : full + 1], state=name))
        return found[::-1]

    def read(self, isolation: str, tokens: Sequence[int], stored: Stored) -> None:
        """Begins to bring one into memory, which has room for it; one at a time."""
        assert self.reading is None
        cache, tokens = self._cache, tokens[: stored.length]
        pages = [node.page for node in cache.match(isolation, tokens).path[: len(stored.pages)]]
        for page in pages:
            cache.pages.hold(page)
        there = len(pages)
        extended, slot = cache.extend(pages, len(tokens)), cache.take_slot()
        assert extended and slot is not None, "read without room"
        hidden = self._reader.submit(self._fetch, stored, there, pages, slot)
        self.reading = Reading(isolation=isolation, tokens=tokens, pages=pages, slot=slot, hidden=hidden)

    def receive(self) -> None:
        """Takes what has been read into the memory's cache."""
        reading = self.reading
        if reading is None or not reading.hidden.done():
            return
        self.reading = None
        try:
            hidden = reading.hidden.result()
        except Exception:  # of memory or of the model; the request does without
            logger.exception("the prefix cache could not be read")
            hidden = None
        if hidden is None:
            self._cache.give_back(reading.pages)
            self._cache.slots.release(reading.slot)
        else:
            self._cache.insert(reading.isolation, reading.tokens, reading.pages, reading.slot, hidden, final=True)

    def wait(self) -> None:
        """A moment for what is being read; the engine has nothing else to do."""
        if self.reading:
            wait([self.reading.hidden], timeout=MOMENT)

    def _fetch(self, stored: Stored, there: int, pages: Sequence[int], slot: int) -> Tensor | None:
        """Reads the pages but the first ones, and the state; the last hidden state. In a thread of its own."""
        model, full = self._model, len(stored.pages)
        for name, page in zip(stored.pages[there:], pages[there:], strict=False):
            content = self._store.read(name, model.page_bytes)
            if content is None:
                return None
            model.write_page(page, _tensor(content, torch.uint8))
        state_bytes, hidden_bytes = model.state_bytes, 4 * model.config.hidden_size
        tail_bytes = model.page_bytes if len(pages) > full else 0
        content = self._store.read(stored.state, state_bytes + hidden_bytes + tail_bytes)
        if content is None:
            return None
        model.write_state(slot, _tensor(content[:state_bytes], torch.uint8))
        if tail_bytes:
            model.write_page(pages[full], _tensor(content[state_bytes + hidden_bytes :], torch.uint8))
        self._store.touch([*stored.pages, stored.state])
        return _tensor(content[state_bytes : state_bytes + hidden_bytes], torch.float32).clone()


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
    """The same memory; a model without states has none of them."""
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
