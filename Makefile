# make demo and make test set up everything they need; the second time that takes no time.
# PYTHON=python3.12 picks an interpreter, TORCH_INDEX=https://download.pytorch.org/whl/cu130 a build of torch for GPUs.

TORCH       := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON      ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
                 $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN         := .venv/bin
READY       := .venv/.ready
PIP         := $(BIN)/python -m pip install -qq --disable-pip-version-check
SANITIZED   := build/sanitized
CHECKERS    := .venv-conformance
COMPILED_CODE := tests/kernels tests/models tests/engine/test_engine_native.py tests/engine/test_llm.py tests/engine/test_bench.py
ONE_THREAD  := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check soak sanitize conformance format clean

help:  ## what can be made
	@sed -n 's/^\([a-z]*\):.*## */make \1 \t/p' Makefile

setup: $(READY)  ## install everything into .venv

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "tenfold needs Python 3.11, 3.12 or 3.13; none found (python3 is $$(python3 -V 2>&1)). Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing Tenfold and torch into .venv and compiling the kernels; this takes a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf .venv; exit 1; }
	@$(BIN)/python -c 'import sys, importlib.metadata as m; sys.exit("$(TORCH)" != "torch==" + m.version("torch").split("+")[0])' 2>/dev/null || \
	    $(PIP) --no-deps --retries 0 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || $(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## train the dense predecessor and Qwen3-Next on this machine, and compare what they cost
	@$(BIN)/tenfold demo --out runs/demo

test: $(READY)  ## all tests
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2

soak: $(READY)  ## ten hard minutes for tenfold serve: hang-ups, garbage, kill -9; MINUTES=1 is shorter
	@$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),10)

# An environment of its own, with all that .venv has but the module. The tests are those that reach compiled code; others
# measure memory, or start programs that do not bear a sanitizer. Python is not compiled for them: they are loaded first.
# A report goes past Python to stderr, which pytest would keep to itself and lose with the process: hence --capture=sys.
sanitize: $(SANITIZED)/.ready  ## kernels under gcc's sanitizers: addresses, undefined behaviour, races between threads
	@$(SANITIZED)/thread/threads
	@$(ONE_THREAD) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(ldd $(SANITIZED)/lib/python3*/site-packages/tenfold/kernels/_native*.so | awk '/lib(asan|stdc\+\+)/ {print $$3}' | xargs)" \
	    $(SANITIZED)/bin/python -m pytest -q -n 2 -p no:faulthandler --capture=sys $(or $(TESTS),$(COMPILED_CODE))

$(SANITIZED)/.ready: $(READY) tests/kernels/threads.cpp
	@echo "Compiling the kernels with sanitizers; this takes ten minutes on two cores, once."
	@$(BIN)/python -m venv --without-pip $(SANITIZED)
	@for python in $(BIN)/python $(SANITIZED)/bin/python; do $$python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done | \
	    { read from; read to; echo "$$from" >"$$to/borrowed.pth"; }
	@CXX=$(CXX) $(BIN)/python -m pip --python $(SANITIZED)/bin/python install -qq --disable-pip-version-check --no-deps -e . \
	    -C build-dir=$(SANITIZED)/address -C cmake.define.TENFOLD_SANITIZE=address,undefined -C wheel.cmake=true -C install.strip=false
	@CXX=$(CXX) $(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps -w $(SANITIZED) . \
	    -C build-dir=$(SANITIZED)/thread -C cmake.define.TENFOLD_SANITIZE=thread -C wheel.cmake=true
	@touch $@

conformance: $(READY) $(CHECKERS)/.ready  ## official clients, schemathesis, llm-comply and lm-eval against a running server
	@$(BIN)/python benchmarks/conformance.py --checkers $(CHECKERS)/bin

$(CHECKERS)/.ready: constraints.txt
	@echo "Installing lm-eval and llm-comply into $(CHECKERS), beside the development tools, without torch; 1 GB, once."
	@test -x $(CHECKERS)/bin/python || $(BIN)/python -m venv $(CHECKERS)
	@$(CHECKERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt 'lm-eval[api]' llm-comply transformers
	@touch $@

check: $(READY)  ## formatting, lint, types, layering
	@$(BIN)/ruff format --check --quiet --output-format concise
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/pyright --level error
	@$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h tests/kernels/*.cpp
	@$(CXX) -std=c++20 -fsyntax-only -Wall -Wextra -Werror -Icsrc tests/kernels/threads.cpp
	@$(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_layering.py

format: $(READY)  ## format and sort imports
	@$(BIN)/ruff check -q --fix --select I
	@$(BIN)/ruff format -q
	@$(BIN)/clang-format -i csrc/*.cpp csrc/*.h tests/kernels/*.cpp

clean:  ## remove what tools left behind; keeps .venv and runs
	@rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	@find src tests -name __pycache__ -prune -exec rm -rf {} +
