# Every target makes .venv when it is missing or out of date. What it installs is pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
TEST_WORKERS ?= 2

.PHONY: demo test reliability lint docs bench dist clean

demo: .venv/ready
	$(BIN)/vraxion-ckpt demo build/demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --ignore tests/reliability

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
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
