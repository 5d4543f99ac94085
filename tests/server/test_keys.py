"""Keys: who may ask, how much, and what leaks of them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tenfold import cli
from tenfold.server import keys
from tenfold.server.callers import Bucket, Caller
from tenfold.server.errors import ApiError
from tenfold.server.keys import Key, KeyFile
from tenfold.server.settings import Settings

if TYPE_CHECKING:
    from tests.server.conftest import Running

HTTP = httpx.Client(timeout=20)  # one for all: each would load the certificates anew
COMPLETION = {"model": "fake", "prompt": "a b c", "max_tokens": 4}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


# ---- the file ----------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_a_hash(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--api-keys", str(path)]
    assert cli.main(["keys", "add", "alice", "--requests-per-minute", "5", "--concurrency", "2", *options]) == 0
    secret = capsys.readouterr().out.strip()
    assert len(secret) > 40 and secret.encode() not in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert cli.main(["keys", "list", *options]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and "5 requests per minute, 2 concurrency" in listed and secret not in listed
    assert cli.main(["keys", "add", "alice", *options]) == cli.MISTAKE
    assert "already" in capsys.readouterr().err
    assert cli.main(["keys", "revoke", "alice", *options]) == 0
    assert cli.main(["keys", "revoke", "alice", *options]) == cli.MISTAKE
    assert KeyFile.read(path) == KeyFile([])


def test_the_default_file_is_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cli.main(["keys", "add", "bob"]) == 0
    assert (tmp_path / "tenfold" / "keys.json").exists()


def test_keys_that_are_made_at_once_are_all_there(path: Path) -> None:
    makers = [threading.Thread(target=keys.add, args=(path, Key(name=f"key {i}"))) for i in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert {key.name for key in KeyFile.read(path).keys} == {f"key {i}" for i in range(8)}


@pytest.mark.parametrize("content", ["{", "[]", '{"keys": [{"name": "a", "sha256": "xyz"}]}', '{"other": 1}', "\xff"])
def test_a_damaged_file_is_named(path: Path, content: str) -> None:
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"keys\.json"):
        KeyFile.read(path)


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute", "concurrency"])
def test_limits_are_above_zero(limit: Any) -> None:
    with pytest.raises(ValueError, match=limit):
        replace(Key(name="a"), **{limit: 0})


# ---- limits ------------------------------------------------------------------------------------------------


def test_a_bucket_fills_up_by_the_minute() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    assert bucket.wait(60) == 0
    bucket.take(60)
    assert bucket.wait(1) == pytest.approx(1)
    now[0] = 30
    assert bucket.wait(30) == 0 and bucket.wait(40) == pytest.approx(10)
    bucket.take(90)  # overdrawn
    assert bucket.wait(1) == pytest.approx(61)
    now[0] = 1e6
    assert bucket.wait(1e9) == 0  # more than it ever holds: a full one will do


def test_a_caller_gets_what_its_key_allows() -> None:
    now = [0.0]
    caller = Caller(Key(name="a", sha256="0" * 64, requests_per_minute=2, concurrency=1), lambda: now[0])
    with caller.request(), pytest.raises(ApiError, match="1 requests at once"), caller.request():
        pass
    with caller.request():
        pass
    with pytest.raises(ApiError, match="2 requests a minute") as refused, caller.request():
        pass
    assert refused.value.status_code == 429 and refused.value.headers == {"retry-after": "30"}
    now[0] = 30
    with caller.request():
        pass


# ---- a service with keys -----------------------------------------------------------------------------------


def test_every_route_but_health_and_page_wants_a_key(path: Path, servers: Callable[[Settings], Running]) -> None:
    secret = keys.add(path, Key(name="alice"))
    server = servers(Settings(model_names=("fake",), context_length=500, api_keys=path))
    description = HTTP.get(f"{server.url}/openapi.json", headers=bearer(secret)).json()
    routes = [(method, route) for route, methods in description["paths"].items() for method in methods]
    assert len(routes) > 10
    for method, route in [*routes, ("get", "/openapi.json"), ("get", "/v1/nothing"), ("get", "/v1/models/fake")]:
        for headers in ({}, bearer("tf-wrong"), {"authorization": f"Basic {secret}"}, {"x-api-key": "no such key"}):
            response = HTTP.request(method, f"{server.url}{route}", headers=headers)
            assert response.status_code == (200 if route in ("/health", "/ready") else 401), route
    assert HTTP.get(f"{server.url}/").status_code in (200, 404)
    for headers in (bearer(secret), {"authorization": f"bearer  {secret}"}, {"x-api-key": secret}):
        assert HTTP.post(f"{server.url}/v1/completions", headers=headers, json=COMPLETION).status_code == 200
    refused = HTTP.post(f"{server.url}/v1/messages", json={}).json()
    assert refused["error"]["type"] == "authentication_error"


def test_keys_come_and_go_while_the_service_runs(path: Path, servers: Callable[[Settings], Running]) -> None:
    keys.add(path, Key(name="first"))
    server = servers(Settings(model_names=("fake",), context_length=500, api_keys=path))

    def status(secret: str) -> int:
        return HTTP.get(f"{server.url}/v1/models", headers=bearer(secret)).status_code

    second = keys.add(path, Key(name="second"))
    assert status(second) == 200
    path.write_text("{ damaged")
    assert status(second) == 200  # the last good file counts
    KeyFile([Key(name="second", sha256=keys.hash_key(second))]).write(path)
    keys.revoke(path, "second")
    assert status(second) == 401
    os.unlink(path)
    assert status(second) == 401


def test_limits_of_a_key(path: Path, servers: Callable[[Settings], Running]) -> None:
    few = keys.add(path, Key(name="few", requests_per_minute=2))
    small = keys.add(path, Key(name="small", tokens_per_minute=10))
    single = keys.add(path, Key(name="single", concurrency=1))
    server = servers(Settings(model_names=("fake",), context_length=500, api_keys=path))

    def post(secret: str, **fields: object) -> httpx.Response:
        return HTTP.post(f"{server.url}/v1/completions", headers=bearer(secret), json=COMPLETION | fields)

    assert [post(few).status_code for _ in range(3)] == [200, 200, 429]
    assert [post(small).status_code for _ in range(2)] == [200, 200]  # 3 and 4 tokens each: overdrawn
    refused = post(small)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    server.engine.answers["slow"] = "word " * 20
    server.engine.seconds_per_token = 0.05
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        headers=bearer(single),
        json=COMPLETION | {"prompt": "slow", "stream": True},
    ):
        assert post(single).status_code == 429
    server.wait_for(lambda: server.engine.running == 0)
    server.wait_for(lambda: post(single).status_code == 200)


@pytest.mark.parametrize("isolate", [True, False])
def test_isolated_keys_share_no_prefix(path: Path, servers: Callable[[Settings], Running], isolate: bool) -> None:
    secrets = [keys.add(path, Key(name=name)) for name in ("a", "b")]
    server = servers(Settings(model_names=("fake",), context_length=500, api_keys=path, isolate_cache=isolate))
    for secret in (*secrets, secrets[0]):
        HTTP.post(f"{server.url}/v1/completions", headers=bearer(secret), json=COMPLETION)
    words = [request.isolation for request in server.engine.requests]
    assert (words[0] == words[2]) and (len(set(words)) == (2 if isolate else 1))
    content = json.loads(path.read_text())
    assert not isolate or all(len(word) >= 64 and word not in json.dumps(content) for word in words)
