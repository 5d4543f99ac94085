"""The comparison with peers: what their output says, which setting counts, and where a run goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engines import Job, PythonEngine, parse_llama_bench, run_process
from peers import Options, Record, Turn, best_read, missing_rounds, report, resume, speed_ratio

from tenfold.models.shapes import init_checkpoint

TURN = Turn(
    round=0,
    format="int4",
    peer="tenfold",
    setting="",
    version="1",
    prefill={"512": 600.0},
    decode=60.0,
    peak_gb=2.0,
    running_gb=1.5,
    token_gb=0.5,
    read_gb_s=40.0,
)
THEIRS = replace(TURN, peer="ik_llama.cpp", running_gb=None)
TURNS = [
    TURN,
    replace(THEIRS, setting="-rtr 0", prefill={"512": 200.0}, decode=60.0),
    replace(THEIRS, setting="-rtr 1", prefill={"512": 300.0}, decode=40.0, read_gb_s=50.0),
    replace(TURN, round=1, prefill={"512": 300.0}, decode=30.0),
    replace(THEIRS, round=1, setting="-rtr 0", prefill={"512": 100.0}, decode=15.0),
]


def test_the_output_of_llama_bench() -> None:
    tests = [
        {"n_prompt": 512, "n_gen": 0, "avg_ts": 300.5, "build_commit": "abc"},
        {"n_prompt": 2048, "n_gen": 0, "avg_ts": 280.0, "build_commit": "abc"},
        {"n_prompt": 0, "n_gen": 64, "avg_ts": 52.25, "build_commit": "abc"},
    ]
    figures = parse_llama_bench(f"loading...\n{json.dumps(tests, indent=2)}\n")
    assert figures.prefill == {"512": 300.5, "2048": 280.0}
    assert (figures.decode, figures.version) == (52.25, "build abc")


@pytest.mark.parametrize(
    "output", ["", "error: unknown model\n", "[\n]", '[\n{"n_prompt": 5, "n_gen": 0, "avg_ts": 1}]']
)
def test_an_output_without_figures_is_an_error(output: str) -> None:
    with pytest.raises(ValueError, match="llama-bench printed no JSON"):
        parse_llama_bench(output)


def test_the_best_setting_of_a_peer_counts_round_by_round() -> None:
    assert speed_ratio(TURNS, "ik_llama.cpp", "512") == "2.50x (2.00 to 3.00)"
    assert speed_ratio(TURNS, "ik_llama.cpp", None) == "1.50x (1.00 to 2.00)"
    assert speed_ratio(TURNS, "llama.cpp", None) == ""


def test_the_report_tells_the_share_of_the_rounds_best_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert (best_read(TURNS, 0), best_read(TURNS, 1)) == (50.0, 40.0)
    report(TURNS[:3], "int4")
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("tenfold  "))
    assert row == ["tenfold", "600.0", "60.00", "0.60", "0.500", "2.00", "1.50"]


def test_a_run_goes_on_after_the_last_whole_round(tmp_path: Path) -> None:
    path, about = tmp_path / "run.json", {"machine": "this one", "prompts": [512]}
    Record(about=about, turns=[TURN, replace(TURN, round=1)]).save(path)
    record = resume(path, about)
    engines = [PythonEngine(peer="tenfold"), PythonEngine(peer="transformers", slow=True)]
    assert record.turns == [TURN, replace(TURN, round=1)]
    assert missing_rounds(record.turns, "int4", engines, 3) == [2]
    assert missing_rounds(record.turns, "int8", engines, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="holds another run"):
        resume(path, {**about, "machine": "another one"})


def test_tenfold_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    init_checkpoint("tiny", tmp_path, progress=False)
    engine = PythonEngine(peer="tenfold")
    job = Job(folder=tmp_path, gguf=None, format="int4", prompts=(8, 16), new_tokens=2, threads=1)
    output, _ = run_process(engine.command(job))
    figures = engine.parse(output)
    assert set(figures.prefill) == {"8", "16"} and min(figures.decode, *figures.prefill.values()) > 0
    assert figures.loading_gb and figures.running_gb and figures.token_gb
    assert figures.token_gb < min(figures.loading_gb, figures.running_gb)


def test_a_process_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"ended with 3: no such model$"):
        run_process([sys.executable, "-c", "import sys; print('so\\nno such model', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(ValueError, match="ended with -9"):
        run_process([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.2)


def test_options_compare_everything_that_is_found() -> None:
    assert Options().formats == ("int4", "int8", "bf16") and "vllm" in Options().peers
