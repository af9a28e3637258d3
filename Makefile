# Every target makes .venv when it is missing or out of date. What it installs is pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
TEST_WORKERS ?= 2
# The lowest torch that `make test-lowest` takes; pyproject.toml's own, where an index has it without CUDA.
LOWEST_TORCH ?=

.PHONY: demo test test-all test-lowest coverage reliability lint docs bench dist clean

demo: .venv/ready
	$(BIN)/vraxion-ckpt demo build/demo

# The fast tests: three minutes on two cores.
test: .venv/ready
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m 'not slow' --ignore tests/reliability

# All tests but reliability: eight minutes.
test-all: .venv/ready
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --ignore tests/reliability

# The fast tests, and a table of the lines that they do not reach: six minutes.
coverage: .venv/ready
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m 'not slow' --ignore tests/reliability --cov --cov-report term-missing:skip-covered

# The fast tests, with the lowest versions of the dependencies: three minutes, and two to install them.
test-lowest: .venv-lowest/ready
	.venv-lowest/bin/python -m pytest -n $(TEST_WORKERS) -m 'not slow' --ignore tests/reliability

# Kills, faults and power losses: ten minutes.
reliability: .venv/ready
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal tests/reliability

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

bench: .venv/ready
	$(BIN)/python benchmarks/bench.py

dist: .venv/ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv .venv-lowest build dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

.venv-lowest/ready: pyproject.toml constraints.txt tests/tools/lowest_versions.py
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python tests/tools/lowest_versions.py $(LOWEST_TORCH) > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet -c constraints.txt hatchling editables
	.venv-lowest/bin/python -m pip install --quiet -c .venv-lowest/constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
