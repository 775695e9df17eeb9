# Two commands do everything: `make demo` and `make test`. Both set up .venv first and touch nothing else.
PYTHON ?= python3
# The CPU build on the package index this project is developed against; set TORCH for another.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: setup demo test check format bench bench-device bench-search clean

setup: .venv/.installed .venv/.built

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -rf src/tinytl.egg-info src/tinytl/ops/_lab_kernels.cpython-*.so
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23.1" "scikit-build-core>=0.10"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation "$(TORCH)" --editable ".[dev,demo]"
	touch $@

# The compiled half, beside the Python sources. A compiler that fails is an error; none at all is not: the lab does without.
.venv/.built: .venv/.installed CMakeLists.txt $(shell find native -type f)
	@if command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null; then \
	    $(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" --log-level=WARNING && \
	    $(BIN)/cmake --build build/native && $(BIN)/cmake --install build/native --prefix src >/dev/null; \
	else echo "no C++ compiler: tinytl.runtime is not built, and the lab runs in plain PyTorch, more slowly"; fi
	touch $@

demo: setup
	$(BIN)/python -m examples.demo

test: setup
	$(BIN)/python -m pytest -m "slow or not slow" --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

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

# Photographs and weights are yours: make bench-search SETS="signs=FOLDER cifar10=FOLDER" WEIGHTS=FILE
bench-search: setup
	$(BIN)/python -m benchmarks.search $(SETS) --weights $(WEIGHTS) --processes 2

bench-device: setup
	$(BIN)/python -m benchmarks.device

clean:
	rm -rf .venv build runs src/tinytl/runtime/tinytl-step src/tinytl/runtime/*.so src/tinytl/ops/*.so
