"""The rules of the house that a machine can check: imports go down only, and files stay readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "tenfold"
FLOORS = {"cli": 6, "chat": 5, "study": 5, "server": 5, "engine": 4, "train": 4, "models": 3, "ops": 2, "kernels": 1}
LEAVES = {"config", "memory", "tokenizer"}  # that floors from 3 up may import, and that import none of the house
ENTRIES = {"__init__", "__main__"}
FILES = sorted(SOURCE.rglob("*.py"))
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
FILE_ACCESS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "save"}
LONGEST_FILE, LONGEST_FUNCTION = 600, 60


def home(path: Path) -> str:
    """The part of the house that a file belongs to: `models` or `cli`."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(importer: str, imported: str) -> bool:
    if importer in ENTRIES or importer == imported or imported == "__version__":
        return True
    if importer in LEAVES:
        return False
    if imported in LEAVES:
        return FLOORS[importer] >= 3
    return FLOORS[importer] > FLOORS[imported]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name.startswith("tenfold."):
            assert allowed(home(path), name.split(".")[1]), f"{home(path)} may not import {name}"
        if home(path) in {"models", "ops"}:
            assert not name.startswith("torch.distributed"), "only train/ and engine/ know of other processes"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    assert path.stem not in VAGUE and path.parent.name not in VAGUE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, f"{node.name} is too long"
            assert node.args.kwarg is None, f"{node.name}: **kwargs hides what may be given"


@pytest.mark.parametrize("path", [path for path in FILES if home(path) == "models"], ids=lambda path: path.name)
def test_models_touch_files_where_formats_are_read_only(path: Path) -> None:
    if path.name not in {"weights.py", "gguf.py", "packed_file.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert name not in FILE_ACCESS, (
                    f"line {node.lineno}: {name}() belongs in weights.py, gguf.py or packed_file.py"
                )
