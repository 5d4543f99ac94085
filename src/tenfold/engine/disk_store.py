"""Records in files: written whole or not at all, checked when read, and the oldest removed for want of room.

Any number of processes may use one folder, and each may be killed at any moment: a record appears by renaming a
finished file, its name says what is in it, so whoever writes it writes the same, and one that has vanished is no error.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

Buffer = bytes | memoryview

MAGIC = b"tenfold cache 1\n"
DIGEST = 32  # bytes
FOLDER = "tenfold-prefixes-"  # and the version; nothing else in the root is looked at
TEMPORARY = ".part"
STALE = 600.0  # seconds after which an unfinished file has no writer any more
logger = logging.getLogger(__name__)


class DiskStore:
    """The records of one version, in a folder of their own; the byte budget is that of all versions together."""

    def __init__(self, folder: Path, version: str, limit_bytes: int) -> None:
        """Raises OSError where the folder can't be made or read."""
        self._root, self._folder, self._limit = folder, folder / f"{FOLDER}{version}", limit_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self.names: set[str] = set()
        self.used_bytes = 0
        self._scanned = -1
        self._lock = threading.Lock()  # of what is in flight
        self._folder_lock = threading.Lock()  # so that no look at the folder misses what appears meanwhile
        self._waiting: queue.SimpleQueue[tuple[str, Sequence[Buffer]] | None] = queue.SimpleQueue()
        self._in_flight: set[str] = set()
        self.waiting_bytes = 0  # handed over and not written yet
        self.refresh()
        self._measure()
        self._writer = threading.Thread(target=self._write_all, name="prefix cache", daemon=True)
        self._writer.start()

    # ---- reading

    def refresh(self) -> bool:
        """Looks whether anyone has added or removed something. May be called from any thread."""
        with suppress(OSError), self._folder_lock:
            stamp = self._folder.stat().st_mtime_ns
            if stamp != self._scanned:
                self._scanned = stamp
                self.names = {entry.name for entry in os.scandir(self._folder) if not entry.name.endswith(TEMPORARY)}
                return True
        return False

    def read(self, name: str, size: int) -> memoryview | None:
        """A record of `size` bytes, writable. One that is damaged is removed, and not there. May be called from any
        thread."""
        data = memoryview(bytearray(len(MAGIC) + DIGEST + size))
        try:
            with (self._folder / name).open("rb") as file:
                whole = file.readinto(data) == len(data) and not file.read(1)
        except OSError:
            self.names.discard(name)
            return None
        head, content = data[: len(MAGIC) + DIGEST], data[len(MAGIC) + DIGEST :]
        if not whole or head != MAGIC + _digest(name, [content]):
            logger.warning("%s is damaged, and removed", self._folder / name)
            self._remove(self._folder / name)
            return None
        return content

    def touch(self, names: Sequence[str]) -> None:
        """They were of use: others go before them."""
        now = time.time_ns()
        for name in names:
            with suppress(OSError):
                os.utime(self._folder / name, ns=(now, now))

    # ---- writing

    def has(self, name: str) -> bool:
        """Whether it is there, or is about to be."""
        return name in self.names or name in self._in_flight

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        """Soon, in a thread of its own, in the order of the calls."""
        with self._lock:
            self._in_flight.add(name)
            self.waiting_bytes += sum(map(len, parts))
        self._waiting.put((name, parts))

    def close(self) -> None:
        """Waits until all is written."""
        self._waiting.put(None)
        self._writer.join()

    def _write_all(self) -> None:
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        """False at the end. Nothing that was written is held until more comes."""
        item = self._waiting.get()
        if item is None:
            return False
        name, parts = item
        try:
            self._write(name, parts)
        except OSError as error:  # a full disk, above all: the cache is smaller then, nothing else
            logger.warning("the prefix cache could not be written: %s", error)
        with self._lock:
            self._in_flight.discard(name)
            self.waiting_bytes -= sum(map(len, parts))
        return True

    def _write(self, name: str, parts: Sequence[Buffer]) -> None:
        size = len(MAGIC) + DIGEST + sum(map(len, parts))
        self._make_room(size)
        if self.used_bytes + size > self._limit:
            return
        part = self._folder / f"{name}.{os.getpid()}{TEMPORARY}"
        try:
            with part.open("wb") as file:
                file.writelines([MAGIC, _digest(name, parts), *parts])
            with self._folder_lock:
                part.replace(self._folder / name)
                self.names.add(name)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        self.used_bytes += size

    # ---- the budget

    def _make_room(self, size: int) -> None:
        """Removes the oldest files; what others have written counts as well."""
        if self.used_bytes + size <= self._limit:
            return
        files = self._measure()
        if self.used_bytes + size <= self._limit:
            return
        for _, count, path in files:
            if self.used_bytes + size <= self._limit * 0.95:  # some more, so that the folder is not read for each file
                return
            self._remove(path)
            self.used_bytes -= count

    def _measure(self) -> list[tuple[float, int, Path]]:
        """All files, oldest first, which make up `used_bytes`."""
        files = sorted(self._files())
        self.used_bytes = sum(count for _, count, _ in files)
        return files

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was last of use, its size, and where it is."""
        now = time.time()
        for path in self._root.glob(f"{FOLDER}*/*"):
            with suppress(OSError):
                stat = path.stat()
                if path.name.endswith(TEMPORARY) and now - stat.st_mtime > STALE:
                    path.unlink()
                else:
                    yield stat.st_mtime, stat.st_size, path

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if path.parent == self._folder:
            self.names.discard(path.name)


def _digest(name: str, parts: Sequence[Buffer]) -> bytes:
    digest = hashlib.blake2b(name.encode(), digest_size=DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()
