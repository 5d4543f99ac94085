"""The chat in a terminal: reads lines, answers them, and does what begins with a slash."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.theme import Theme

from tenfold.chat.backend import ChatBackend, Cost, Options
from tenfold.chat.conversation import Conversation
from tenfold.chat.display import AnswerDisplay, printable
from tenfold.engine.reasoning import Piece

PROMPT, MORE, BLOCK = "> ", ". ", '"""'
THEME = Theme({"markdown.code": "cyan", "markdown.block_quote": "dim", "markdown.h1": "bold underline"})


class Ended(Exception):
    """Nothing more is typed."""


class Session:
    """A conversation with a model, as long as lines come."""

    def __init__(self, backend: ChatBackend, options: Options, conversation: Conversation) -> None:
        self.backend, self.options, self.conversation = backend, options, conversation
        self.screen = Console(theme=THEME, highlight=False)
        self.notes = Console(stderr=True, style="dim", highlight=False, soft_wrap=True)

    def run(self) -> None:
        """Until Ctrl-D. A mistake, an error of the model or Ctrl-C ends an answer, not the conversation."""
        prepare_keys()
        self.note(f"{self.backend.name}; /help tells what can be done, Ctrl-D leaves")
        while True:
            try:
                self.take(read_message())
            except Ended:
                return
            except KeyboardInterrupt:
                print()
            except (ValueError, OSError) as error:
                self.note(f"error: {' '.join(str(error).split())}", style="red")

    def note(self, text: str, style: str | None = None) -> None:
        """Says something that is not of the conversation."""
        self.notes.print(printable(text), style=style, markup=False)

    def take(self, text: str) -> None:
        """A message, or a command. Raises ValueError for a mistake, and what the model raises."""
        word, _, rest = text.strip().partition(" ")
        if word.startswith("/") and word[1:].isalpha():
            command_named(word[1:]).run(self, rest.strip())
        elif text.strip():
            self.conversation.ask(text.strip())
            self.answer()

    def answer(self) -> None:
        """Lets the model answer the last message. What came before an interrupt or an error is kept."""
        cost, stopped = Cost(), ""
        display = AnswerDisplay(self.screen)
        try:
            with display, closing(self.backend.answer(self.conversation.messages, self.options)) as stream:
                for part in stream:
                    if isinstance(part, Piece):
                        display.push(part)
                    else:
                        cost = part
        except KeyboardInterrupt:
            stopped = "stopped"
        finally:
            self.conversation.answered(display.text)
        told = " · ".join(filter(None, (stopped, display.told(cost))))
        self.note(f"{told}\n" if told else "")


def prepare_keys() -> None:
    """Gives `input` the keys of readline, and pasted lines as one message. Without readline there is neither."""
    with suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


def read_message() -> str:
    """A line; several where a line ends with a backslash, or between lines of three quotes. Raises Ended."""
    line = read_line(PROMPT)
    if line.strip() == BLOCK:
        lines = iter(lambda: read_line(MORE), BLOCK)
        return "\n".join(lines)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read_line(MORE)
    return line


def read_line(prompt: str) -> str:
    """A line with the keys of readline, or of a pipe. Raises Ended."""
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        print(end="\n" if sys.stdin.isatty() else "")
        raise Ended from None


def edited(text: str) -> str:
    """A text, after it could be changed. Raises ValueError where there is no readline to do that with."""
    try:
        import readline
    except ImportError:
        raise ValueError(
            "/edit needs Python's readline, which is not there; /undo, and type the message anew"
        ) from None
    readline.set_startup_hook(lambda: readline.insert_text(text))
    try:
        return read_line(PROMPT)
    finally:
        readline.set_startup_hook(None)


# ---- commands ----------------------------------------------------------------------------------------------


def retry(session: Session, rest: str) -> None:
    session.conversation.ask(session.conversation.take_back())
    session.answer()


def edit(session: Session, rest: str) -> None:
    question = edited(session.conversation.last_question)
    session.conversation.take_back()
    session.take(question)


def undo(session: Session, rest: str) -> None:
    question = session.conversation.take_back()
    session.note(f"taken back: {question}")


def system(session: Session, rest: str) -> None:
    if rest:
        session.conversation.system = rest
    session.note(f"system prompt: {session.conversation.system or 'none'}")


def new(session: Session, rest: str) -> None:
    session.conversation = Conversation(session.conversation.system)
    session.note("a new conversation")


def save(session: Session, rest: str) -> None:
    session.conversation.save(path_in(rest, "/save"))
    session.note(f"{rest}: saved")


def load(session: Session, rest: str) -> None:
    session.conversation.load(path_in(rest, "/load"))
    for turn in session.conversation.turns:
        session.note(f"{turn['role']}: {turn['content']}")


def show_help(session: Session, rest: str) -> None:
    for name, command in COMMANDS.items():
        session.note(f"/{name + ' ' + command.argument:<16} {command.summary}")
    session.note(f"{'Ctrl-C':<17} stop an answer, or forget a line")
    session.note(f"{'Ctrl-D':<17} leave")
    session.notes.print(
        f"A line that ends with \\ goes on; lines between {BLOCK} and {BLOCK} are one message.", markup=False
    )


def path_in(rest: str, command: str) -> Path:
    if not rest:
        raise ValueError(f"{command} needs a file: {command} talk.json")
    return Path(rest).expanduser()


class Command(NamedTuple):
    """What a word with a slash does."""

    run: Callable[[Session, str], None]
    argument: str
    summary: str


COMMANDS = {
    "retry": Command(retry, "", "answer the last message again"),
    "edit": Command(edit, "", "change the last message, and have it answered"),
    "undo": Command(undo, "", "take the last message and its answer back"),
    "system": Command(system, "[TEXT]", "show or set the system prompt"),
    "new": Command(new, "", "begin anew"),
    "save": Command(save, "FILE", "write the conversation to a file"),
    "load": Command(load, "FILE", "go on with a saved one, or one that the chat page exported"),
    "help": Command(show_help, "", "this"),
}


def command_named(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    near = get_close_matches(name, COMMANDS, n=1)
    raise ValueError(f"no command /{name}; " + (f"did you mean /{near[0]}?" if near else "/help lists them"))
