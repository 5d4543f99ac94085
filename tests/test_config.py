"""Configurations: what is written reads back, and every mistake is told in one line that says what to do."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.config import from_dict, load_toml, to_toml


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "wsd"] = "wsd"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    steps: int = 1
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    optim: Optim = Optim()
    stages: tuple[Stage, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    nested: dict[str, dict[str, int]] = field(default_factory=dict)
    out: Path = Path("runs/x")
    resume_from: Path | None = None
    control: Optim | None = None
    batch: int | Literal["auto"] = "auto"
    compile: bool = False


text = st.text(st.characters(exclude_categories=["Cs"]))
optims = st.builds(
    Optim,
    learning_rate=st.floats(min_value=0, exclude_min=True),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    schedule=st.sampled_from(["cosine", "wsd"]),
)
recipes = st.builds(
    Recipe,
    name=text,
    optim=optims,
    stages=st.lists(st.builds(Stage, name=text, steps=st.integers(), note=st.none() | text), max_size=3).map(tuple),
    weights=st.dictionaries(text, st.floats(allow_nan=False), max_size=3),
    nested=st.dictionaries(text, st.dictionaries(text, st.integers(), max_size=2), max_size=2),
    out=st.sampled_from([Path("runs/ä b"), Path("/tmp/x"), Path(".")]),
    resume_from=st.none() | st.just(Path('a"b')),
    control=st.none() | optims,
    batch=st.integers() | st.just("auto"),
    compile=st.booleans(),
)


@given(recipes)
def test_what_is_written_reads_back(recipe: Recipe) -> None:
    assert from_dict(Recipe, tomllib.loads(to_toml(recipe)), where="x") == recipe


def test_it_reads_well() -> None:
    recipe = Recipe(name="tiny", weights={"wiki text": 0.5}, stages=(Stage(name="warm"),))
    assert to_toml(recipe) == (
        'name = "tiny"\nstages = [{name = "warm", steps = 1}]\n'
        'out = "runs/x"\nbatch = "auto"\ncompile = false\n'
        '\n[optim]\nlearning_rate = 0.02\nbetas = [0.9, 0.95]\nschedule = "wsd"\n'
        '\n[weights]\n"wiki text" = 0.5\n\n[nested]\n'
    )


MISTAKES = [
    ("nam = 'x'", "recipe.toml: unknown key 'nam', did you mean 'name'?"),
    ("name='x'\nzzz=1", "unknown key 'zzz', known are name, optim, "),
    ("compile = true", "missing 'name', which has no default"),
    ("name = 3", "name: expected a string, got int 3"),
    ("name='x'\nbatch = 1.5", "batch: expected an integer or one of 'auto', got float 1.5"),
    ("name='x'\nbatch = true", "batch: expected an integer or one of 'auto', got bool True"),
    ("name='x'\ncompile = 1", "compile: expected true or false, got int 1"),
    ("name='x'\noptim = 1", "optim: expected a table, got int 1"),
    (
        "name='x'\n[optim]\nlerning_rate = 1",
        "optim: unknown key 'lerning_rate', did you mean 'learning_rate'?",
    ),
    ("name='x'\n[optim]\nlearning_rate = 'fast'", "optim.learning_rate: expected a number, got str 'fast'"),
    ("name='x'\n[optim]\nlearning_rate = -1", "optim: learning_rate must be above 0, got -1.0"),
    ("name='x'\n[optim]\nschedule = 'cos'", "optim.schedule: expected one of 'cosine', 'wsd', got str 'cos'"),
    ("name='x'\n[optim]\nbetas = [1]", "optim.betas: expected an array of 2, got 1 values"),
    ("name='x'\nstages = 'abc'", "stages: expected an array, got str 'abc'"),
    ("name='x'\nstages = [{name='a'}, {steps=1}]", "stages.1: missing 'name', which has no default"),
    ("name='x'\nweights = {a = 'b'}", "weights.a: expected a number, got str 'b'"),
    ("name='x'\nresume_from = 2020-01-01", "resume_from: expected a path (a string), got date datetime.date"),
    ("name = ", "recipe.toml: not a TOML file: "),
]


@pytest.mark.parametrize(("toml", "complaint"), MISTAKES)
def test_mistakes_are_told_in_one_line(toml: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(toml)
    with pytest.raises(ValueError) as caught:
        load_toml(Recipe, path)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"recipe\.toml: not a TOML file"):
        load_toml(Recipe, tmp_path / "recipe.toml")


def test_home_is_understood() -> None:
    assert from_dict(Recipe, {"name": "x", "out": "~/runs"}, where="x").out == Path.home() / "runs"


def test_an_integer_is_a_number() -> None:
    learning_rate = from_dict(Optim, {"learning_rate": 1}, where="x").learning_rate
    assert learning_rate == 1.0 and type(learning_rate) is float
