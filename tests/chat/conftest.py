"""A server that speaks OpenAI's chat API and says what a test wants, and the chat page in a real browser before it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "src" / "tenfold" / "server" / "page"
CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
HEARTBEAT = 0.05  # seconds
MOUSE = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
ARGUMENTS = (
    "--headless=new",
    "--incognito",  # what pages store stays in memory: a busy disk would hold up each test's beginning
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1200,850",
    f"--blink-settings={MOUSE}",  # without a screen there is none, and the page is a phone's
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@dataclass(frozen=True)
class Reasoning:
    """A piece of an answer that is not its text."""

    text: str


@dataclass(frozen=True)
class Refusal:
    """Before the answer: a status of HTTP. Within it: an error in the stream."""

    message: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)


class Wait:
    """Nothing comes until the test sets `server.go`; the client hears heartbeats."""


Piece = str | Reasoning | Refusal | Wait
USAGE = {
    "prompt_tokens": 4012,
    "completion_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 3980},
    "completion_tokens_details": {"accepted_prediction_tokens": 57, "rejected_prediction_tokens": 23},
}


class FakeServer(ThreadingHTTPServer):
    """Answers the last message of a request with `answers[message]`, or else with the message itself.

    Several scripts of a message are used in turn, the last one again and again.
    """

    daemon_threads = True
    Reasoning, Refusal, Wait = Reasoning, Refusal, Wait  # for tests, which can't import this file

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(PAGE)))
        self.answers: dict[str, list[Sequence[Piece]]] = {}
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.go, self.gone = threading.Event(), threading.Event()
        self.delay = 0.0  # seconds before each piece
        self.key: str | None = None
        self.finish = "stop"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def script(self, message: str) -> Sequence[Piece]:
        scripts = self.answers.get(message, [[f"You said: {message}"]])
        return scripts.pop(0) if len(scripts) > 1 else scripts[0]

    def forget(self) -> None:
        """As it was made."""
        self.answers, self.requests, self.keys = {}, [], []
        self.go, self.gone = threading.Event(), threading.Event()
        self.delay, self.key, self.finish = 0.0, None, "stop"


class Handler(SimpleHTTPRequestHandler):
    server: FakeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            super().do_GET()
        elif self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.refuse(Refusal("invalid API key", 401))
        else:
            self.reply(200, {"object": "list", "data": [{"id": "models/qwen3-next-mid"}, {"id": "other"}]}, {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers["Authorization"])
        pieces = list(self.server.script(request["messages"][-1]["content"]))
        if isinstance(pieces[0], Refusal):
            self.refuse(pieces[0])
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(pieces)
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def stream(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            time.sleep(self.server.delay)
            if isinstance(piece, Wait):
                while not self.server.go.wait(HEARTBEAT):
                    self.wfile.write(b": heartbeat\n\n")
            elif isinstance(piece, Refusal):
                self.event({"error": {"message": piece.message}})
                return
            elif isinstance(piece, Reasoning):
                self.event({"choices": [{"delta": {"reasoning_content": piece.text}}]})
            else:
                self.event({"choices": [{"delta": {"content": piece}}]})
        self.event({"choices": [{"delta": {}, "finish_reason": self.server.finish}]})
        self.event({"choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def refuse(self, refusal: Refusal) -> None:
        self.reply(refusal.status, {"error": {"message": refusal.message}}, refusal.headers)

    def reply(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@pytest.fixture(scope="session")
def running_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(running_server: FakeServer) -> FakeServer:
    running_server.forget()
    return running_server


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; what it logs, such as a breach of the content policy, can be read."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromedriver is not installed (Debian and Ubuntu: apt install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()
