"""Who asks: keys in use, and what each has left of its limits."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tenfold.server.errors import ApiError
from tenfold.server.keys import Key, KeyFile, hash_key

log = logging.getLogger("tenfold")


class Bucket:
    """An amount a minute: all of it at once, or bit by bit. It may be overdrawn, and is then empty for longer."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._size, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def wait(self, amount: float) -> float:
        """Seconds until an amount is there; a larger one than there ever is needs a full bucket."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._at) * self._size / 60)
        self._at = now
        return max(0.0, (min(amount, self._size) - self._level) * 60 / self._size)

    def take(self, amount: float) -> None:
        self._level -= amount


class Caller:
    """A key in use: what it has left."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self.isolation = hmac.new(bytes.fromhex(key.sha256), b"cached prefixes", "sha256").hexdigest()
        self._requests = Bucket(key.requests_per_minute, clock) if key.requests_per_minute else None
        self._tokens = Bucket(key.tokens_per_minute, clock) if key.tokens_per_minute else None
        self._open = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is open. Raises ApiError where the key may not ask now."""
        if self.key.concurrency and self._open >= self.key.concurrency:
            what = f"{self.key.concurrency} requests at once, which this key may have"
            raise ApiError(429, f"there are {what}; wait for one to end", code="concurrency_exceeded", retry_after=1)
        _take(self._requests, 1, f"the key's {self.key.requests_per_minute} requests a minute are used up")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def take_tokens(self, count: int) -> None:
        """Before a prompt is read. Raises ApiError where the key has not as many left."""
        _take(self._tokens, count, f"the key's {self.key.tokens_per_minute} tokens a minute are used up")

    def owe_tokens(self, count: int) -> None:
        """For an answer, whose length was not known before."""
        if self._tokens:
            self._tokens.take(count)


def _take(bucket: Bucket | None, amount: int, complaint: str) -> None:
    if bucket is None:
        return
    wait = bucket.wait(amount)
    if wait > 0:
        raise ApiError(429, f"{complaint}; ask again in {wait:.1f} s", code="rate_limit_exceeded", retry_after=wait)
    bucket.take(amount)


class Callers:
    """The keys of a file, which is read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: object = None
        self._callers: dict[str, Caller] = {}
        self._load(KeyFile.read(path))

    def find(self, secret: str) -> Caller | None:
        """Who has this key. All are compared, each in constant time, so that time tells nothing."""
        self._reload()
        digest, found = hash_key(secret), None
        for sha256, caller in self._callers.items():
            if hmac.compare_digest(sha256, digest):
                found = caller
        return found

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load(KeyFile.read(self._path))
        except (ValueError, OSError) as error:
            log.error("%s; the keys stay as they were", error)

    def _load(self, file: KeyFile) -> None:
        """Keys that have not changed keep what they have used up."""
        old = self._callers
        new = [
            old[key.sha256] if key.sha256 in old and old[key.sha256].key == key else Caller(key) for key in file.keys
        ]
        self._callers = {caller.key.sha256: caller for caller in new}


def _stamp(path: Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
