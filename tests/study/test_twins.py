"""The demo trains its arms with everything else held fixed, tells what they cost, and goes on where it was stopped."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from tenfold.engine.llm import continue_text
from tenfold.models.weights import load
from tenfold.study.twins import DemoConfig, demo_arms, run_demo
from tenfold.train.corpus import CorpusConfig, build_corpus

RATIOS = ("flops_vs_d0", "time_vs_d0", "flops_vs_d2", "time_vs_d2")
SCALE = 0.01  # 9, 4 and 3 steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text in which a word says something about the next one."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ko", "mi", "ru", "te") for b in ("lan", "nor", "sil", "ver")]
    for number in range(40):
        place, text = draw.randrange(20), []
        for _ in range(400):
            place = (place * 7 + draw.randrange(3)) % 20
            text.append(words[place])
        (folder / f"{number}.txt").write_text(" ".join(text))
    build_corpus([folder], folder / "corpus", CorpusConfig(vocab_size=300, validation_fraction=0.2), workers=1)
    return folder / "corpus"


def demo(out: Path, corpus: Path, scale: float = SCALE) -> tuple[dict[str, object], str]:
    """The report that a demo wrote, and what it printed."""
    console = Console(file=io.StringIO(), width=100)
    run_demo(DemoConfig(out=out, corpus=corpus, scale=scale, precision="float32"), continue_text, console)
    assert isinstance(console.file, io.StringIO)
    return json.loads((out / "report.json").read_text()), console.file.getvalue()


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo."""
    out = tmp_path_factory.mktemp("demo")
    demo(out, corpus)
    return out


def test_report_has_every_number_that_was_asked_for(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert tuple(report["ratios"]) == RATIOS
    assert all(value is None or value > 0 for value in report["ratios"].values())
    assert [arm["name"] for arm in report["arms"]] == ["D0", "D2", "N1"]
    for arm in report["arms"]:
        assert arm["final_validation_loss"] == arm["curve"][-1]["validation_loss"] < arm["curve"][0]["validation_loss"]
        assert arm["flops"] > arm["optimizer_flops"] >= 0 and 0 < arm["seconds_steps"] <= arm["seconds_total"]
        assert arm["samples"] and arm["peak_memory_gb"] > 0
    n1 = report["arms"][2]
    assert n1["parameters_active"] < n1["parameters_total"]
    assert [len(layer) for layer in n1["router_load"]] == [64] * 4
    assert all(sum(layer) == pytest.approx(1.0) for layer in n1["router_load"])
    assert "<svg" in (finished / "report.html").read_text()


def test_finished_models_can_be_loaded(finished: Path) -> None:
    for name in ("d0", "d2", "n1"):
        _, tokenizer = load(finished / name / "final")
        assert tokenizer is not None


def test_same_seed_gives_the_same_curves_over_flops(finished: Path, corpus: Path, tmp_path: Path) -> None:
    first, (second, _) = json.loads((finished / "report.json").read_text()), demo(tmp_path, corpus)
    assert isinstance(second["arms"], list) and isinstance(second["ratios"], dict)
    for a, b in zip(first["arms"], second["arms"], strict=True):
        assert [(p["flops"], p["validation_loss"]) for p in a["curve"]] == [
            (p["flops"], p["validation_loss"]) for p in b["curve"]
        ]
    assert [first["ratios"][name] for name in RATIOS[::2]] == [second["ratios"][name] for name in RATIOS[::2]]


def test_a_finished_demo_reports_again_without_training(finished: Path, corpus: Path) -> None:
    before = (finished / "n1" / "metrics.jsonl").read_text()
    _, printed = demo(finished, corpus)
    assert (finished / "n1" / "metrics.jsonl").read_text() == before
    assert "report.html" in printed


def test_other_settings_are_not_mixed_in(finished: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"another recipe, tokens.* changed"):
        demo(finished, corpus, scale=2 * SCALE)


def test_all_but_model_and_recipe_are_held_fixed() -> None:
    recipes = [arm.recipe for arm in demo_arms(DemoConfig(precision="float32"))]
    free = {name: getattr(recipes[0], name) for name in ("out", "tokens", "model", "optim", "checkpoint", "samples")}
    fixed = [asdict(replace(recipe, **free)) for recipe in recipes]
    for recipe in fixed:
        del recipe["validation"]["every"]
    assert fixed[0] == fixed[1] == fixed[2]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be above 0"):
        DemoConfig(scale=scale)
