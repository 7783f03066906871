# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 3
# two more than cores, as many tests wait for processes; nproc alone would answer with OMP_NUM_THREADS, which CI sets to 1
JOBS ?= $(shell expr $$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) + 2)

# one thread a process, for there are many; groups: tests of one fixture that takes long to make
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# else every process of a test compiles the library anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all check setup setup-dev clean

demo: .venv/installed
	$(BIN)/unlocked compare --seeds $(SEEDS) --out runs/demo

test: .venv/installed-dev
	$(PYTEST) tests

test-all: .venv/installed-dev
	$(PYTEST) --all-pairs tests

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed

setup-dev: .venv/installed-dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
