"""API keys: who may ask, and how much.

A key is 256 random bits, so its SHA-256 gives nothing away: there is no dictionary to try. The slow hashes that
passwords need would only make each request slower. The file holds hashes alone, and is replaced in one piece.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tenfold import config
from tenfold.server.errors import ApiError

PREFIX = "tf-"
log = logging.getLogger("tenfold")


@dataclass(frozen=True, kw_only=True)
class Key:
    """What the file says of a key."""

    name: str
    sha256: str = ""  # of the key, hexadecimal
    created: str = ""  # date and time, UTC
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    concurrency: int | None = None  # requests at once

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ValueError(f"name: {self.name!r} is no name for a key; use letters")
        if self.sha256 and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 of the key {self.name!r} is none; make the key anew")
        for limit in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise ValueError(f"{limit} must be 1 or more, got {value}; to take a key away: tenfold keys revoke")


@dataclass(frozen=True)
class KeyFile:
    """The file of keys."""

    keys: list[Key]

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """An empty one where there is none. Raises ValueError where it is damaged."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls([])
        except ValueError as error:
            raise ValueError(f"{path}: no file of keys ({error}); restore it, or make a new one") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: no file of keys; restore it, or make a new one")
        return config.from_dict(cls, values, where=str(path))

    def write(self, path: Path) -> None:
        """Readable for its owner alone, and never seen in half."""
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            keys = [{name: value for name, value in asdict(key).items() if value is not None} for key in self.keys]
            file.write(json.dumps({"keys": keys}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def default_path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "tenfold" / "keys.json"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time changes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add(path: Path, key: Key) -> str:
    """Makes a key, which is told this once. `key` has all but the hash. Raises ValueError for a name in use."""
    secret = PREFIX + secrets.token_urlsafe(32)
    with _locked(path):
        keys = KeyFile.read(path).keys
        if any(key.name == other.name for other in keys):
            raise ValueError(f"{path}: there is a key {key.name!r} already; revoke it first, or choose another name")
        KeyFile([*keys, replace(key, sha256=_hash(secret))]).write(path)
    return secret


def revoke(path: Path, name: str) -> None:
    """Raises ValueError where there is none of that name."""
    with _locked(path):
        keys = KeyFile.read(path).keys
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise ValueError(f"{path}: there is no key {name!r}; tenfold keys list shows those there are")
        KeyFile(left).write(path)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


# ---- who asks ----------------------------------------------------------------------------------------------


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
        digest, found = _hash(secret), None
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
