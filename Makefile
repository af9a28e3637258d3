# Every target makes .venv first if it is missing or out of date. The versions in it are pinned in constraints.txt.
# Durations are those on two cores. The first target takes a minute or two more, most of it to install torch.
PYTHON ?= python3
BIN := .venv/bin
TEST_WORKERS ?= 2

.PHONY: help demo test reliability lint docs bench dist clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/core ## run the whole loop on a real checkpoint (5 seconds)
	$(BIN)/vraxion-ckpt demo build/demo

test: .venv/ready ## run the tests (11 minutes)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --ignore tests/reliability

reliability: .venv/ready ## kill it, fail its system calls, cut its power (5 minutes)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal tests/reliability

lint: .venv/ready ## check rules, format and types (30 seconds, later 5)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready ## build the manual into build/docs (10 seconds)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

bench: .venv/ready ## measure what conversions cost (3 minutes)
	$(BIN)/python benchmarks/bench.py

dist: .venv/ready ## build source archive and wheel into dist (5 seconds)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean: ## remove .venv and everything that was built (1 second)
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

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
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
