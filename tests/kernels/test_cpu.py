"""The module itself: how it is found, forced, forked and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

from tenfold.kernels import cpu

needs_module = pytest.mark.skipif(not cpu.available(), reason="the native kernels are not built")

MULTIPLY = """
import torch
from tenfold.kernels import cpu
cpu.set_threads(4)
weight = cpu.pack_linear(torch.ones(4096, 64), "bf16")
def multiply():
    assert (cpu.linear(torch.ones(1, 64), [weight])[0] == 64).all()
multiply()
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@needs_module
def test_widest_instruction_set_is_chosen() -> None:
    if "TENFOLD_ISA" not in os.environ:
        assert cpu.isa() == cpu.isas()[-1]
    assert cpu.isas()[0] == "baseline"


@needs_module
def test_variable_forces_an_instruction_set() -> None:
    done = run("from tenfold.kernels import cpu; print(cpu.isa())", TENFOLD_ISA="baseline")
    assert done.stdout.strip() == "baseline"


@needs_module
def test_unknown_instruction_set_is_one_clear_error() -> None:
    done = run("from tenfold.kernels import cpu; cpu.available()", TENFOLD_ISA="sse9")
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: TENFOLD_ISA: no kernels for 'sse9' on this processor; it can run: baseline"
    )


def test_a_missing_module_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenfold.kernels._native", None)
    monkeypatch.delattr("tenfold.kernels._native", raising=False)
    forget()
    try:
        with pytest.warns(UserWarning, match="native kernels are not available"):
            assert not cpu.available()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not cpu.available()
        with pytest.raises(ValueError, match=r"native kernels are not available \(.*\): install .* C\+\+20 compiler"):
            cpu.require()
    finally:
        forget()


def forget() -> None:
    cpu._load.cache_clear()
    cpu.available.cache_clear()


@needs_module
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = MULTIPLY + "import os\nif os.fork() == 0:\n    multiply()\n    os._exit(7)\nprint(os.wait()[1] >> 8)"
    assert run(code).stdout.strip() == "7"


@needs_module
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_threads_are_as_many_as_the_cores_that_the_process_may_use() -> None:
    code = "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    assert run(code + "from tenfold.kernels import cpu; print(cpu.threads())").stdout.strip() == "1"


@needs_module
def test_interpreter_ends_while_threads_sleep_or_spin() -> None:
    assert run(MULTIPLY).returncode == 0
    assert run(MULTIPLY + "import time; time.sleep(0.1)").returncode == 0


@needs_module
def test_callers_on_several_threads() -> None:
    weight = cpu.pack_linear(torch.randn(300, 64), "int4")
    x = torch.randn(5, 64)
    expected = cpu.linear(x, [weight])[0]
    before, equal = cpu.threads(), []

    def call() -> None:
        for count in range(200):
            cpu.set_threads(1 + count % 3)
            equal.append(torch.equal(cpu.linear(x, [weight])[0], expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    cpu.set_threads(before)
    assert len(equal) == 800 and all(equal)


@needs_module
def test_memory_is_read_at_some_speed() -> None:
    start = time.monotonic()
    assert 0.1 < cpu.memory_read_gb_s(64) < 10000
    assert time.monotonic() - start < 30
    with pytest.raises(ValueError, match="megabytes"):
        cpu.memory_read_gb_s(0)
