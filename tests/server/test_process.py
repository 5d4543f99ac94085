"""The service as a process: from its start to a good end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tenfold import cli
from tenfold.server import keys, launch
from tenfold.server.keys import Key
from tenfold.server.launch import EngineOptions
from tenfold.server.serve import bound
from tenfold.server.settings import Settings
from tenfold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tests.server.conftest import FakeEngine, Running

SCRIPT = Path(__file__).with_name("conftest.py")
NO_KEYS = "tenfold: no keys: whoever reaches this address may ask. tenfold keys add makes one\n"


class Process:
    """A service with a fake engine, which says 40 words in 2 seconds to a prompt with `long`."""

    def __init__(self, drain_seconds: float, folder: Path) -> None:
        file = folder / "keys.json"
        self.headers = {"authorization": f"Bearer {keys.add(file, Key(name='a'))}"}
        command = [sys.executable, str(SCRIPT), str(drain_seconds), str(file)]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.popen.stderr is not None
        found = None
        while found is None:
            line = self.popen.stderr.readline()
            assert line, "it did not start"
            found = re.match(r"listening on (http://127\.0\.0\.1:(\d+))", line)
        self.url, self.port = found[1], int(found[2])
        self.lines: list[str] = []
        self.listener = threading.Thread(target=self.listen)

    def listen(self) -> None:
        body = {"model": "fake", "prompt": "long", "max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, headers=self.headers) as response:
            self.lines += [line for line in response.iter_lines() if line]

    def terminate_in_the_middle(self) -> None:
        self.listener.start()
        while not self.running():
            time.sleep(0.02)
        self.popen.send_signal(signal.SIGTERM)

    def running(self) -> bool:
        metrics = httpx.get(f"{self.url}/metrics", headers=self.headers).text
        return "tenfold_requests_running 1.0" in metrics

    def end(self) -> tuple[int, str]:
        """Exit code, and the text of the stream."""
        code = self.popen.wait(20)
        self.listener.join()
        chunks = [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]
        return code, "".join(chunk["choices"][0]["text"] for chunk in chunks if "choices" in chunk)


@pytest.fixture
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    started = Process(request.param, tmp_path)
    yield started
    started.popen.kill()
    started.popen.wait()


@pytest.mark.parametrize("process", [20.0], indirect=True)
def test_sigterm_lets_streams_end_and_takes_no_more(process: Process) -> None:
    with httpx.Client(base_url=process.url, headers=process.headers) as before:
        assert before.get("/ready").status_code == 200
        process.terminate_in_the_middle()
        time.sleep(0.5)
        assert process.popen.poll() is None
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", process.port), timeout=1)
    code, text = process.end()
    assert code == 0 and text == "word " * 40 and process.lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("process", [0.3], indirect=True)
def test_what_takes_longer_than_the_drain_is_told_so(process: Process) -> None:
    process.terminate_in_the_middle()
    code, text = process.end()
    assert code == 0 and 0 < len(text) < len("word " * 40)
    assert "the service is stopping" in process.lines[-2] and process.lines[-1] == "data: [DONE]"


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, complaint in [
        (["--port", "70000"], "--port 70000"),
        (["--api-keys", str(tmp_path / "none.json")], "keys add"),
        (["--max-body-mb", "-1"], "max_body_mb"),
        (["--port", "0"], "no-such-model"),
    ]:
        assert cli.main(["serve", str(tmp_path / "no-such-model"), *options]) == cli.MISTAKE
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1


def test_keys_and_address_are_looked_at_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        for options, complaint in [
            (["--api-keys", str(damaged)], "no file of keys"),
            (["--api-keys", str(tmp_path)], "Is a directory"),
            (["--port", taken], f"127.0.0.1:{taken}: Address already in use; choose another"),
            (["--host", "192.0.2.1"], "192.0.2.1:8000: Cannot assign"),
            (["--host", "no-such-host.invalid"], "no-such-host.invalid:8000: "),
        ]:
            assert cli.main(["serve", str(tmp_path / "no-such-model"), *options]) == cli.MISTAKE
            error = capsys.readouterr().err.removeprefix(NO_KEYS)
            assert complaint in error and error.count("\n") == 1


def test_what_fails_after_the_model_was_read_ends_the_engine(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bound("127.0.0.1", 0) as other:  # listens only while the model is read
        port, engine = other.getsockname()[1], server.engine

        def start(model: str, options: EngineOptions) -> tuple[FakeEngine, Tokenizer, int]:
            with socket.socket() as refused:
                assert refused.connect_ex(("127.0.0.1", port))
            other.listen()
            return engine, engine.tokenizer, 100

        monkeypatch.setattr(launch, "start_engine", start)
        assert cli.main(["serve", str(tmp_path), "--port", str(port)]) == cli.MISTAKE
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use" in error and error.count("\n") == 1
    assert engine.drained


def test_memory_that_is_not_there_beside_the_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["init", "--shape", "tiny", "--out", str(tmp_path / "model")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(launch, "available_memory", lambda: 400_000_000)
    assert cli.main(["serve", str(tmp_path / "model"), "--port", "0"]) == cli.MISTAKE
    error = capsys.readouterr().err.removeprefix(NO_KEYS)
    assert error == "tenfold: error: --memory 1: 0.40 GB are available beside the weights\n"


def test_every_knob_is_in_the_table() -> None:
    table = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    names = {field.name for options in (Settings, EngineOptions) for field in fields(options)}
    assert set(re.findall(r"`--([a-z-]+)`", table)) >= {name.replace("_", "-") for name in names}
