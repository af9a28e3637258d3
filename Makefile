# Every target makes .venv first if it is missing or out of date. The versions in it are pinned in constraints.txt.
# Durations are those on two cores. The first target takes a minute or two more, most of it to install torch.
PYTHON ?= python3
BIN := .venv/bin
TEST_WORKERS ?= 2
# Options of the benchmarks, as in: make bench BENCH=--full
BENCH ?=
# The lowest torch that `make test-lowest` takes; pyproject.toml's own, where an index has it without CUDA.
LOWEST_TORCH ?=

.PHONY: help demo test test-all test-lowest coverage reliability lint docs bench dist clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/core ## run the whole loop on a real checkpoint (5 seconds)
	$(BIN)/vraxion-ckpt demo build/demo

test: .venv/ready ## run the fast tests (3 minutes)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m 'not slow' --ignore tests/reliability

test-all: .venv/ready ## run all tests but reliability (8 minutes)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --ignore tests/reliability

coverage: .venv/ready ## run the fast tests and list the lines that they do not reach (6 minutes)
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m 'not slow' --ignore tests/reliability --cov --cov-report term-missing:skip-covered

test-lowest: .venv-lowest/ready ## run the fast tests with the lowest versions of the dependencies (5 minutes)
	.venv-lowest/bin/python -m pytest -n $(TEST_WORKERS) -m 'not slow' --ignore tests/reliability

reliability: .venv/ready ## kill it, fail its system calls, cut its power (6 minutes)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal tests/reliability

lint: .venv/ready ## check rules, format and types (30 seconds, later 5)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready ## build the manual into build/docs (10 seconds)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

bench: .venv/ready ## measure what the program costs, as ratios (4 minutes)
	$(BIN)/python -m benchmarks $(BENCH)

dist: .venv/ready ## build source archive and wheel into dist (5 seconds)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean: ## remove .venv, .venv-lowest and everything that was built (1 second)
	rm -rf .venv .venv-lowest build dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

# What the commands need.
.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is not Python 3.11 or newer; \
	name one that is, as in: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) has no module venv or ensurepip; \
	on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e .
	touch $@

# What development needs besides.
.venv/ready: .venv/core
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,interop]'
	touch $@

.venv-lowest/ready: pyproject.toml constraints.txt tests/tools/lowest_versions.py
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python tests/tools/lowest_versions.py $(LOWEST_TORCH) > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet -c constraints.txt hatchling editables
	.venv-lowest/bin/python -m pip install --quiet -c .venv-lowest/constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
