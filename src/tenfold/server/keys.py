"""API keys: who may ask, and how much.

A key is 256 random bits, so its SHA-256 gives nothing away: there is no dictionary to try. The slow hashes that
passwords need would only make each request slower. The file holds hashes alone, and is replaced in one piece.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tenfold import config

PREFIX = "tf-"


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
        KeyFile([*keys, replace(key, sha256=hash_key(secret))]).write(path)
    return secret


def revoke(path: Path, name: str) -> None:
    """Raises ValueError where there is none of that name."""
    with _locked(path):
        keys = KeyFile.read(path).keys
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise ValueError(f"{path}: there is no key {name!r}; tenfold keys list shows those there are")
        KeyFile(left).write(path)


def hash_key(secret: str) -> str:
    """Hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
