"""What clients should not send: it is refused at once, in the form of the API, and the others do not notice."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tenfold.server.settings import Settings

if TYPE_CHECKING:
    from tests.server.conftest import Running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
IMPATIENT = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
HTTP = httpx.Client(timeout=20)  # one for all: each would load the certificates anew
USER = {"role": "user", "content": "hi"}
CHAT = {"model": "fake", "messages": [USER]}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


def receive(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(1 << 16):
        data += piece
    return data


def raw(server: Running, data: bytes, seconds: float = 10) -> tuple[int, dict[str, Any]]:
    """Status and error of what the server answers before it closes the connection."""
    with server.connect(seconds) as connection:
        connection.sendall(data)
        head, _, body = receive(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def head(path: str = "/v1/chat/completions", **headers: object) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    return head(path, content_length=len(body)) + body


@pytest.fixture
def bystander(server: Running) -> Iterator[None]:
    """Another stream runs all the while, and gets all that it asked for."""
    server.engine.answers["bystander"] = "word " * 60
    server.engine.seconds_per_token = 0.005
    texts: list[str] = []

    def listen() -> None:
        body = {"model": "fake", "prompt": "bystander", "stream": True, "max_tokens": 100}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))

    thread = threading.Thread(target=listen)
    thread.start()
    server.wait_for(lambda: server.engine.running == 1)
    yield
    thread.join(20)
    assert texts == ["word " * 60]


# ---- fields ------------------------------------------------------------------------------------------------

BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10_000_000}, "n"),
    ({"seed": 1 << 70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "</tool_call>"}}]}, "tools.0.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema.schema"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "response_format"),
    ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=lambda value: json.dumps(value)[:50])
def test_fields_that_make_no_sense_are_named(server: Running, fields: dict[str, Any], param: str) -> None:
    response = HTTP.post(f"{server.url}/v1/chat/completions", json=CHAT | fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and "\n" not in error["message"]
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "fake", "prompt": [[-1]]}),
        ("/v1/completions", {"model": "fake", "prompt": [10**9]}),
        ("/v1/completions", {"model": "fake", "prompt": [[]]}),
        ("/v1/completions", {"model": "fake", "prompt": []}),
        ("/v1/completions", {"model": "fake", "prompt": [1, "a"]}),
        ("/v1/completions", {"model": "fake", "prompt": ["a"] * 65}),
        ("/v1/completions", {"model": "fake", "prompt": "a", "best_of": 2}),
        ("/v1/completions", {"model": "fake", "prompt": "a", "max_tokens": -1}),
        ("/v1/responses", {"model": "fake", "input": []}),
        ("/v1/responses", {"model": "fake", "input": [{"type": "item_reference", "id": "x"}]}),
        ("/v1/responses", {"model": "fake", "input": "a", "previous_response_id": "resp_1"}),
        ("/v1/responses", {"model": "fake", "input": "a", "tools": [{"type": "web_search"}]}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/v1/messages", {"model": "fake", "messages": [USER]}),
        (
            "/v1/messages",
            {"model": "fake", "max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        ),
        ("/v1/messages", {"model": "fake", "max_tokens": 5, "messages": [USER], "tool_choice": {"type": "any"}}),
        ("/v1/messages/count_tokens", {"model": "fake", "messages": []}),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_the_other_routes_refuse_in_their_own_form(server: Running, path: str, body: dict[str, Any]) -> None:
    response = HTTP.post(f"{server.url}{path}", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error" and response.json()["error"]["message"]
    assert (response.json().get("type") == "error") == path.startswith("/v1/messages")
    assert not server.engine.requests


def test_a_prompt_that_is_too_long(server: Running) -> None:
    words = "word\nand " * 1500
    for path, body in [
        ("/v1/chat/completions", CHAT | {"messages": [USER | {"content": words}]}),
        ("/v1/completions", {"model": "fake", "prompt": words}),
        ("/v1/completions", {"model": "fake", "prompt": [5] * 3000}),
    ]:
        error = HTTP.post(f"{server.url}{path}", json=body).json()["error"]
        assert error["code"] == "context_length_exceeded" and "1999" in error["message"]
    exact = HTTP.post(f"{server.url}/v1/completions", json={"model": "fake", "prompt": [5] * 1999, "max_tokens": 50})
    assert exact.status_code == 200 and exact.json()["usage"]["completion_tokens"] == 1


# ---- bodies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'{"model": "fake", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"tools":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"model": "fake", "messages": [], "max_tokens": ' + b"9" * 100_000 + b"}",
    ],
    ids=lambda body: str(body[:70]),
)
@pytest.mark.usefixtures("bystander")
def test_bodies_that_are_no_json(server: Running, body: bytes) -> None:
    began = time.monotonic()
    status, error = raw(server, post(body))
    assert status == 400 and error["type"] == "invalid_request_error"
    assert time.monotonic() - began < 2


def test_another_kind_of_body_is_refused(server: Running) -> None:
    """Also because a web page may send plain text to any address, without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = HTTP.post(
            f"{server.url}/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": kind}
        )
        assert response.status_code == 400 and "application/json" in response.json()["error"]["message"]


@pytest.mark.usefixtures("bystander")
def test_a_body_of_200_mb_is_refused_before_it_is_read(server: Running) -> None:
    began = time.monotonic()
    with server.connect() as connection:
        connection.sendall(head(content_length=200_000_000))
        answer = receive(connection)
    assert time.monotonic() - began < 1
    assert answer.startswith(b"HTTP/1.1 413") and b"at most 16 MB" in answer


def test_a_client_that_sends_all_of_it_still_gets_the_answer(server: Running) -> None:
    response = HTTP.post(
        f"{server.url}/v1/messages", content=b"x" * 40_000_000, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413 and response.json()["error"]["type"] == "request_too_large"


def test_a_body_of_unknown_length_is_read_to_the_limit_only(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(head(transfer_encoding="chunked"))
        chunk = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
        for _ in range(17):
            connection.sendall(chunk)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


# ---- the wire ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        head(content_length=-5),
        head(content_length="5, 6"),
        head(transfer_encoding="gzip"),
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        + b"".join(b"h%d: v\r\n" % i for i in range(10_000))
        + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nh: " + b"a" * 1_000_000,
    ],
    ids=lambda data: str(data[:40]),
)
@pytest.mark.usefixtures("bystander")
def test_what_is_no_http_is_refused(server: Running, data: bytes) -> None:
    began = time.monotonic()
    status, error = raw(server, data)
    assert 400 <= status < 500 and error["message"]
    assert time.monotonic() - began < 4


def test_many_headers_are_refused(server: Running) -> None:
    headers = {f"h{i}": "v" for i in range(150)}
    response = HTTP.post(f"{server.url}/v1/messages", json={}, headers=headers)
    assert response.status_code == 431 and response.json()["type"] == "error"


def test_slow_clients_are_ended(servers: Callable[[Settings], Running]) -> None:
    server = servers(Settings(model_names=("fake",), context_length=500, body_seconds=0.3))
    for data in (b"", b"POST / HT", head(content_length=10) + b"{"):
        status, error = raw(server, data)
        assert status == 408 and "0.3 s" in error["message"]


def test_a_client_that_never_reads_is_ended(servers: Callable[[Settings], Running]) -> None:
    """Its answer is larger than all buffers between; the engine is told."""
    server = servers(Settings(model_names=("fake",), context_length=100_000, send_seconds=0.3))
    server.engine.answers["hi"], server.engine.seconds_per_token = "word " * 5000, 0.001
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        connection.sendall(post(json.dumps(CHAT | {"stream": True}).encode()))
        server.wait_for(lambda: bool(server.engine.cancelled), 15)
    assert server.engine.running == 0
    assert HTTP.post(f"{server.url}/v1/completions", json={"model": "fake", "prompt": "b"}).status_code == 200


def test_too_many_requests_at_once(servers: Callable[[Settings], Running]) -> None:
    server = servers(Settings(model_names=("fake",), context_length=500, max_connections=1))
    server.engine.prefill_seconds = 0.5
    thread = threading.Thread(target=HTTP.post, args=(f"{server.url}/v1/chat/completions",), kwargs={"json": CHAT})
    thread.start()
    server.wait_for(lambda: server.engine.running == 1)
    refused = HTTP.get(f"{server.url}/v1/models")
    assert refused.status_code == 429 and refused.headers["retry-after"]
    thread.join()


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/nothing", 404, ""),
        ("POST", "/v1/responses/compact", 404, ""),
        ("POST", "/v1/models", 405, "GET"),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/completions", 405, "POST"),
        ("PUT", "/", 405, "GET, HEAD"),
        ("GET", "/v1/messages", 405, "POST"),
        ("GET", "/v1/messages/nothing", 404, ""),
    ],
)
def test_unknown_routes_and_methods(server: Running, method: str, path: str, status: int, allowed: str) -> None:
    response = HTTP.request(method, f"{server.url}{path}")
    assert response.status_code == status and "openapi.json" in response.json()["error"]["message"]
    assert (response.json().get("type") == "error") == path.startswith("/v1/messages")
    assert sorted(response.headers.get("allow", "").split(", ")) == allowed.split(", ")


def test_an_address_that_is_none(server: Running) -> None:
    assert HTTP.get(f"{server.url}/%ff%00/../x").status_code == 404


def test_the_page_is_served_to_browsers_and_their_caches(server: Running) -> None:
    for path in ("/", "/index.html", "/js/app.js"):
        first = HTTP.get(f"{server.url}{path}")
        assert first.status_code == 200 and HTTP.head(f"{server.url}{path}").status_code == 200
        again = HTTP.get(f"{server.url}{path}", headers={"if-none-match": first.headers["etag"]})
        assert again.status_code == 304


# ---- the description ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GenerationMode)
def test_whatever_the_description_allows_or_forbids_is_no_error_of_the_server(
    server: Running, mode: GenerationMode
) -> None:
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    paths = set()
    for found in description.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()

        @settings(max_examples=2, database=None, phases=[Phase.generate], suppress_health_check=IMPATIENT)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "fake"  # or all else would hide behind a model that is not there
            response = case.call()
            case.validate_response(response, checks=CHECKS)
            assert response.status_code < 400 or response.json()["error"]["message"]

        with suppress(Unsatisfiable):  # nothing is forbidden
            check()
        paths.add(operation.path)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"} <= paths
