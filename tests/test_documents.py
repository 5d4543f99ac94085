"""What the documents say is so: commands can be typed, what is named is there, recipes are valid."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenfold import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.toml"))


def command_lines() -> Iterator[list[str]]:
    """Every line of the documents' code blocks that is a command, as words."""
    for document in DOCUMENTS:
        for block in re.findall(r"```\w*\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            if "make " in block or "tenfold " in block:
                for line in block.replace("\\\n", " ").splitlines():
                    yield shlex.split(line.removeprefix("$ "), comments=True)


def arguments_of(program: str) -> list[list[str]]:
    """What the documents call a program with."""
    return [words[1:] for words in command_lines() if words and Path(words[0]).name == program]


@pytest.mark.parametrize("args", arguments_of("tenfold"), ids=shlex.join)
def test_commands_can_be_typed(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert callable(cli.parse(args))


def test_the_unit_starts_a_command_that_can_be_typed() -> None:
    block = re.search(r"```ini\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(block[1].replace("\\\n", " "))  # strict: no option twice
    assert callable(cli.parse(shlex.split(unit["Service"]["ExecStart"])[1:]))


def test_the_image_starts_a_command_that_can_be_typed() -> None:
    lines = dict(
        line.split(" ", 1)
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith(("ENTRY", "CMD"))
    )
    assert json.loads(lines["ENTRYPOINT"]) == ["tenfold"]
    assert callable(cli.parse(json.loads(lines["CMD"])))


def test_make_has_the_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {args[0] for args in arguments_of("make")} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_files_of_the_tree_are_there() -> None:
    tree = re.search(r"```\n(src/tenfold/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree
    there = {path.name for path in (ROOT / "src").rglob("*.py")}
    assert set(re.findall(r"\w+\.py", tree[1])) - there == set()
    assert {path.parent.name for path in (ROOT / "src").rglob("*.py")} <= set(re.findall(r"(\w+)/", tree[1]))


def test_recipes_exist() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid(recipe: Path) -> None:
    assert callable(cli.parse(["train", str(recipe), "--resume"]))
