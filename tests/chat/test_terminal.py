"""The chat in a terminal: the real command in a pseudo-terminal, before a server that answers as told."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

PATIENCE = 20.0  # seconds, on a busy machine
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\a")
CTRL_C, CTRL_D, ESCAPE = "\x03", "\x04", "\x1b"


class Terminal:
    """A command in a terminal of 80 by 24, and what a person would read in it."""

    def __init__(self, *args: str, **variables: str) -> None:
        self.fd, other = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"} | variables
        command = [sys.executable, "-m", "tenfold", *args]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, preexec_fn=partial(own_terminal, other)
        )
        os.close(other)
        self.raw = ""
        self.looked_at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def wait_for(self, words: str) -> str:
        """Reads on until these words come; gives what came since the last time, up to them."""
        end = time.monotonic() + PATIENCE
        while words not in (text := CONTROL.sub("", self.raw)[self.looked_at :]):
            assert time.monotonic() < end and self.process.poll() is None, f"no {words!r} in {text!r}"
            self.receive()
        text = text[: text.index(words) + len(words)]
        self.looked_at += len(text)
        return text

    def receive(self) -> None:
        if select.select([self.fd], [], [], 0.05)[0]:
            with suppress(OSError):  # the other end is closed
                self.raw += os.read(self.fd, 1 << 16).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def say(self, text: str) -> None:
        self.type(text + "\r")

    def forget(self, text: str) -> None:
        """Types, then Ctrl-C: Python's readline hears that only while it waits for a key, not while it shows one."""
        self.type(text)
        self.wait_for(text)
        time.sleep(0.2)
        self.type(CTRL_C)

    def exit_code(self) -> int:
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end, "it goes on"
            self.receive()
        return self.process.returncode


def own_terminal(fd: int) -> None:
    """Makes it the terminal of a new session, so that Ctrl-C goes to who runs there."""
    os.setsid()
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def running(running_server: Any) -> Iterator[Terminal]:
    with Terminal("chat", running_server.url) as terminal:
        terminal.wait_for("> ")
        yield terminal


@pytest.fixture
def terminal(running: Terminal, server: Any) -> Terminal:
    """A new conversation: starting the command for each takes a second."""
    running.say("/new")
    running.wait_for("a new conversation")
    running.wait_for("> ")
    return running


def contents(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"]]


def test_a_chat(terminal: Terminal, server: Any) -> None:
    server.answers["hello"] = [["**Hi**", " ", "there"]]
    server.delay = 0.1
    terminal.say("hello")
    shown = terminal.wait_for("> ")
    assert "Hi there" in shown and "**" not in shown.split("Hi there")[-1]
    assert "tokens/s" in shown and "3,980 of 4,012 cached · 57 of 80 drafts accepted" in shown
    terminal.say("again")
    terminal.wait_for("You said: again")
    assert contents(server.requests[1]) == ["hello", "**Hi** there", "again"]
    assert "temperature" not in server.requests[1]


def test_ctrl_d_leaves(server: Any) -> None:
    with Terminal("chat", server.url) as terminal:
        terminal.wait_for("> ")
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_stays(terminal: Terminal, server: Any) -> None:
    server.answers["count"] = [["one two\n\nthree", server.Wait(), "four"]]
    terminal.say("count")
    terminal.wait_for("three")
    terminal.type(CTRL_C)
    assert "stopped" in terminal.wait_for("> ")
    assert server.gone.wait(PATIENCE)  # the server need not write what nobody reads
    terminal.say("go on")
    terminal.wait_for("You said: go on")
    assert contents(server.requests[1]) == ["count", "one two\n\nthree", "go on"]


def test_ctrl_c_while_the_server_reads(terminal: Terminal, server: Any) -> None:
    server.answers["count"] = [[server.Wait(), "one"], ["two"]]
    terminal.say("count")
    terminal.wait_for("reading, 0 s")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    terminal.say("/retry")
    terminal.wait_for("two")
    assert contents(server.requests[1]) == ["count"]


def test_ctrl_c_forgets_a_line(terminal: Terminal, server: Any) -> None:
    terminal.forget("nonsense")
    terminal.wait_for("\n> ")
    terminal.say("hello")
    terminal.wait_for("You said: hello")
    assert contents(server.requests[0]) == ["hello"]


def test_retry_edit_and_undo(terminal: Terminal, server: Any) -> None:
    server.answers["dice"] = [["four"], ["five"]]
    for line, answer in (("dice", "four"), ("/retry", "five"), ("more", "You said: more")):
        terminal.say(line)
        terminal.wait_for(answer)
        terminal.wait_for("> ")
    terminal.say("/edit")
    terminal.wait_for("> more")
    terminal.say(" or less")
    terminal.wait_for("You said: more or less")
    assert contents(server.requests[-1]) == ["dice", "five", "more or less"]
    terminal.say("/undo")
    terminal.wait_for("taken back: more or less")
    terminal.say("end")
    terminal.wait_for("You said: end")
    assert contents(server.requests[-1]) == ["dice", "five", "end"]


@pytest.mark.parametrize(
    "typed",
    ['"""\rone\r\rtwo\r"""\r', "one\\\r\\\rtwo\r", f"{ESCAPE}[200~one\n\ntwo{ESCAPE}[201~\r"],
    ids=["quotes", "backslash", "pasted"],
)
def test_messages_of_several_lines(typed: str, terminal: Terminal, server: Any) -> None:
    terminal.type(typed)
    terminal.wait_for("You said: one")
    assert contents(server.requests[0]) == ["one\n\ntwo"]
    terminal.wait_for("> ")


def test_save_and_load(terminal: Terminal, server: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    terminal.say("/system Be brief.")  # which /new keeps, and /load replaces
    terminal.wait_for("system prompt: Be brief.")
    terminal.say("hello")
    terminal.wait_for("You said: hello")
    terminal.say(f"/save {file}")
    terminal.wait_for("saved")
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["system", "user", "assistant"]
    terminal.say("/new")
    terminal.wait_for("a new conversation")
    terminal.say(f"/load {file}")
    terminal.wait_for("assistant: You said: hello")
    terminal.say("more")
    terminal.wait_for("You said: more")
    assert contents(server.requests[-1]) == ["Be brief.", "hello", "You said: hello", "more"]
    file.write_text('{"messages": []}')
    terminal.say(f"/load {file}")


def test_mistakes_do_not_end_it(terminal: Terminal, server: Any) -> None:
    refusal = server.Refusal("the queue\nis full", 429, {"Retry-After": "3"})
    server.answers |= {"busy": [[refusal]], "broken": [["half", server.Refusal("out of memory")]]}
    for line, complaint in {
        "/undo": "error: nothing has been said yet",
        "/hlep": "error: no command /hlep; did you mean /help?",
        "/save": "error: /save needs a file",
        "/load /nowhere": "/nowhere",
        "busy": "error: the queue is full (429); try again in 3 s",
        "broken": "error: out of memory",
    }.items():
        terminal.say(line)
        terminal.wait_for(complaint)
        terminal.wait_for("> ")
    terminal.say("/usr/bin is a folder")
    terminal.wait_for("You said: /usr/bin is a folder")
    assert contents(server.requests[-1]) == ["busy", "broken", "half", "/usr/bin is a folder"]


def test_reasoning_is_seen_while_it_is_written(terminal: Terminal, server: Any) -> None:
    server.answers["why"] = [[server.Reasoning("because"), server.Wait(), "so"]]
    terminal.say("why")
    terminal.wait_for("thinking, 0 s\nbecause")
    server.go.set()
    assert "so" in terminal.wait_for("> ").split("thought for")[1]
    terminal.say("go on")
    terminal.wait_for("You said")
    assert contents(server.requests[1]) == ["why", "so", "go on"]


def test_a_model_cannot_control_the_terminal(terminal: Terminal, server: Any) -> None:
    attack = "\x1b]0;owned\x07\x1b[2Jclear\x9b31m"
    server.answers["attack"] = [[server.Reasoning(attack), *attack], [server.Refusal(attack)]]
    before = len(terminal.raw)
    terminal.say("attack")
    terminal.wait_for("]0;owned[2Jclear31m")
    terminal.wait_for("> ")
    terminal.say("/retry")
    terminal.wait_for("error: ]0;owned[2Jclear31m")
    assert not re.search("\x1b]|\x1b\\[2J|\x07|\x9b", terminal.raw[before:])


def test_editing_can_be_left(terminal: Terminal, server: Any) -> None:
    terminal.say("hello")
    terminal.wait_for("You said: hello")
    terminal.say("/edit")
    terminal.wait_for("> hello")
    terminal.forget(" you")
    terminal.wait_for("\n> ")
    terminal.say("more")
    terminal.wait_for("You said: more")
    assert contents(server.requests[-1]) == ["hello", "You said: hello", "more"]


def test_through_pipes_it_is_the_text(server: Any) -> None:
    server.answers["a"] = [["**b**", "\n\n- c"]]
    command = [sys.executable, "-m", "tenfold", "chat", server.url, "--temperature", "0"]
    done = subprocess.run(command, input="a\n", capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "**b**\n\n- c\n"
    assert server.requests[0]["temperature"] == 0


def test_the_key_is_the_environments(server: Any) -> None:
    server.key = "secret"
    command = [sys.executable, "-m", "tenfold", "chat", server.url]
    run = partial(subprocess.run, command, input="hello\n", capture_output=True, text=True, timeout=60, check=False)
    assert run(env=os.environ | {"TENFOLD_API_KEY": "secret"}).returncode == 0
    done = run(env=os.environ | {"TENFOLD_API_KEY": "wrong"})
    assert done.returncode == 2
    assert done.stderr == "tenfold: error: invalid API key (401); set TENFOLD_API_KEY\n"
    assert server.keys == ["Bearer secret"]


def test_no_server_is_told_in_one_line() -> None:
    command = [sys.executable, "-m", "tenfold", "chat", "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "http://127.0.0.1:9/v1 cannot be reached" in done.stderr
