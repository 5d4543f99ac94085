"""The cache on disk: believed only where every byte is right, whoever was killed while writing it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path
from random import Random
from unittest.mock import Mock

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tenfold.engine import disk_store
from tenfold.engine.budget import Budget
from tenfold.engine.disk_store import DiskStore
from tenfold.engine.engine import Engine, EngineSettings
from tenfold.engine.request import Request
from tests.engine.fake_model import FakeModel
from tests.engine.reference import answer, request, run, tokens_of

VOCAB, CONTEXT = 24, 200
FORK = multiprocessing.get_context("fork")  # the child has torch already
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def start(
    folder: Path,
    state_bytes: int = 64,
    limit: int = 1 << 20,
    slots: int = 6,
    fingerprint: str = "a",
    buffer: int = 1 << 20,
) -> Engine:
    model = FakeModel(state_bytes=state_bytes, vocab_size=VOCAB, context=CONTEXT, fingerprint=fingerprint)
    knobs = EngineSettings(max_batch=2, disk=folder, disk_bytes=limit)
    return Engine(model, knobs, budget=Budget(pages=100, slots=slots, disk_buffer=buffer))


def prompts(random: Random, count: int) -> list[Request]:
    """Three conversations, each continued and edited."""
    bases = [[random.randrange(1, VOCAB) for _ in range(60)] for _ in range(3)]
    return [
        request(
            random.choice(bases)[: random.randint(20, 60)] + [random.randrange(1, VOCAB) for _ in range(5)],
            temperature=0.8,
            seed=index,
        )
        for index in range(count)
    ]


def check(engine: Engine, requests: list[Request]) -> int:
    """Runs them one after the other; how many of their tokens were cached."""
    cached = 0
    for one in requests:
        updates = run(engine, [one])[one.id]
        assert (tokens_of(updates), updates[-1].finish) == answer(one, VOCAB, engine.context, 0)
        cached += updates[-1].usage.cached_tokens
    return cached


def test_a_restarted_engine_starts_where_the_last_one_was(tmp_path: Path) -> None:
    first = request(range(1, 24), max_tokens=9, seed=5, temperature=1.0)
    engine = start(tmp_path)
    said = tokens_of(run(engine, [first])[first.id])
    engine.close()
    engine = start(tmp_path)
    second = request([*first.prompt_ids, *said, 7, 8, 9])
    updates = run(engine, [second])[second.id]
    assert tokens_of(updates) == answer(second, VOCAB, engine.context, 0)[0]
    assert updates[-1].usage.cached_tokens == 23 + 9 - 1, "all but the last token, which was never run"
    engine.close()
    other = start(tmp_path, fingerprint="b")
    assert check(other, [second]) == 0, "another model's states are of no use"
    other.close()


def test_isolation_holds_on_disk(tmp_path: Path) -> None:
    engine = start(tmp_path)
    run(engine, [request(range(1, 24), isolation="mine")])
    engine.close()
    engine = start(tmp_path)
    for isolation, cached in (("", 0), ("yours", 0), ("mine", 23)):
        again = request(range(1, 24), isolation=isolation)
        assert run(engine, [again])[again.id][-1].usage.cached_tokens == cached
    engine.close()


def test_the_others_go_on_while_the_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, other = request(range(1, 24)), request([9] * 5, max_tokens=20)
    engine = start(tmp_path)
    check(engine, [asked])
    engine.close()
    engine, may_read, read = start(tmp_path), threading.Event(), DiskStore.read
    monkeypatch.setattr(DiskStore, "read", lambda *args: read(*args) if may_read.wait(60) else None)
    again = request(range(1, 24))
    for one in (again, other):
        engine.add(one)
    updates = [update for _ in range(60) for update in engine.step()]
    engine.check_integrity()
    assert {update.request_id for update in updates} == {other.id} and updates[-1].finish, "it was second"
    may_read.set()
    while engine.has_work:
        updates += engine.step()
    updates = [update for update in updates if update.request_id == again.id]
    assert tokens_of(updates) == answer(again, VOCAB, engine.context, 0)[0]
    assert updates[-1].usage.cached_tokens == 23
    engine.close()


@pytest.mark.parametrize("fault", [MemoryError("too little"), RuntimeError("the model broke")])
def test_a_read_that_fails_is_no_fault_of_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    engine = start(tmp_path)
    check(engine, [request(range(1, 24))])
    engine.close()
    engine = start(tmp_path)
    monkeypatch.setattr(engine.model, "write_page", Mock(side_effect=fault))
    assert check(engine, [request(range(1, 24))]) == 0
    assert engine.stats().pages_held == engine.stats().slots_held == 0
    engine.close()


def test_a_copy_that_fails_is_no_fault_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(tmp_path)
    monkeypatch.setattr(engine.model, "read_state", Mock(side_effect=RuntimeError("no memory")))
    check(engine, [request(range(1, 24))])
    assert not [*tmp_path.glob("*/*-*")], "no snapshot could be copied"
    monkeypatch.undo()
    check(engine, [request(range(2, 24))])
    engine.close()
    assert [*tmp_path.glob("*/*-*")], "those of the second one could"


def test_what_waits_for_the_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its share of the memory, however slow the disk is; answers don't wait for it."""
    may_write, write = threading.Event(), DiskStore._write
    monkeypatch.setattr(DiskStore, "_write", lambda *args: write(*args) if may_write.wait() else None)
    engine = start(tmp_path, state_bytes=20_000, slots=40, buffer=100_000)
    store, held = engine._disk._store, []  # pyright: ignore[reportOptionalMemberAccess]
    for one in prompts(Random(3), 10):
        engine.add(one)
        for _ in range(40):
            engine.step()
            held.append(store.waiting_bytes)
    assert 60_000 < max(held) <= 80_000, "all but the room for a record that is read"
    assert engine.stats().finished == 10
    may_write.set()
    engine.close()
    assert len([*tmp_path.glob("*/*-*")]) > 10, "every snapshot is there"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000), at=st.floats(0, 0.999), damage=st.sampled_from(["flip", "cut", "more", "empty", "swap"])
)
def test_a_damaged_file_is_removed_and_never_believed(
    tmp_path_factory: pytest.TempPathFactory, seed: int, at: float, damage: str
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    asked = request([seed % 20 + 1, *range(1, 24)], max_tokens=3)
    engine = start(folder)
    run(engine, [asked])
    engine.close()
    files = sorted(folder.glob("*/*"))
    path = files[seed % len(files)]
    break_file(path, files[(seed + 1) % len(files)], damage, at)
    engine = start(folder)
    check(engine, [request(asked.prompt_ids, max_tokens=3)])
    engine.close()
    engine = start(folder)
    assert check(engine, [request(asked.prompt_ids, max_tokens=3)]) > 24 - 4, "what was computed anew is there again"
    engine.close()


def break_file(path: Path, other: Path, damage: str, at: float) -> None:
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    if damage == "flip":
        data[place] ^= 1 << (place % 8)
    elif damage == "cut":
        del data[place:]
    elif damage == "more":
        data += bytes(data[:1])
    elif damage == "swap":
        data = bytearray(other.read_bytes())
    path.write_bytes(b"" if damage == "empty" else data)


def serve(folder: Path, seed: int, limit: int, count: int) -> None:
    """What a process does: answers, and checks its answers."""
    engine = start(folder, state_bytes=20_000, limit=limit)
    check(engine, prompts(Random(seed), count))
    engine.close()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    for turn in range(8):
        process = FORK.Process(target=serve, args=(tmp_path, 1, 1 << 30, 10_000))
        process.start()
        time.sleep(0.15 + 0.05 * turn)
        process.kill()
        process.join()
        assert process.exitcode == -9, "it failed, or was through too early"
    engine = start(tmp_path, state_bytes=20_000)
    assert check(engine, prompts(Random(1), 20)) > 0
    assert not [path for path in tmp_path.glob("*/*") if broken(path)]
    engine.close()


def broken(path: Path) -> bool:
    """Whether a file that counts is not whole."""
    store = DiskStore(path.parent.parent, path.parent.name.removeprefix(disk_store.FOLDER), 1 << 40)
    size = path.stat().st_size - len(disk_store.MAGIC) - disk_store.DIGEST
    found = path.name.endswith(disk_store.TEMPORARY) or store.read(path.name, size) is not None
    store.close()
    return not found


def test_two_servers_share_a_folder_that_is_too_small(tmp_path: Path) -> None:
    limit = 300_000  # about ten snapshots
    processes = [FORK.Process(target=serve, args=(tmp_path, seed, limit, 40)) for seed in (1, 1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    used = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    assert 0 < used < limit + 3 * 25_000, "each may have had one file under way"


def test_one_server_finds_what_another_has_written(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path)
    run(first, [request(range(1, 24))])
    first.close()
    assert check(second, [request(range(1, 24))]) == 23
    second.close()


def test_the_oldest_goes_first_and_unfinished_files_with_time(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, "v", 1000)
    for name in "abcd":
        store.write(name, [bytes(200)])
    store.close()
    store = DiskStore(tmp_path, "v", 1000)
    os.utime(tmp_path / f"{disk_store.FOLDER}v" / "b", (1, 1))
    old, new = (tmp_path / f"{disk_store.FOLDER}v" / f"x.{age}{disk_store.TEMPORARY}" for age in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    store.write("e", [bytes(200)])
    store.close()
    assert "b" not in store.names and {"c", "d", "e"} <= store.names
    assert new.exists() and not old.exists()
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 1000


def test_what_others_keep_in_the_folder_is_let_be(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "2020").mkdir(parents=True)
    (photos / "one.jpg").write_bytes(bytes(5000))
    os.utime(photos / "one.jpg", (1, 1))
    store = DiskStore(tmp_path, "v", 1000)
    for name in "abcdefgh":
        store.write(name, [bytes(200)])
    store.close()
    assert (photos / "one.jpg").stat().st_size == 5000
    assert "h" in store.names and store.used_bytes <= 1000


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="prefix cache can't be kept there"):
        start(tmp_path / "file")
