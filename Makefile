# Two commands do everything: `make demo` and `make test`. Both set up .venv first and touch nothing else.
PYTHON ?= python3
# The CPU build on the package index this project is developed against; set TORCH for another.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: setup demo test check format bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml setup.py native/lab_kernels.cpp
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23.1" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation "$(TORCH)" --editable ".[dev,demo]"
	touch $@

demo: setup
	$(BIN)/python -m examples.demo

test: setup
	$(BIN)/python -m pytest -m "slow or not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation "$(TORCH)" --editable ".[dev,demo,peers]"
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.backbones
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.budgets
	$(BIN)/python -m benchmarks.memory_table
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.accuracy

clean:
	rm -rf .venv build runs
