PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format bench clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Install torch first, so that no other package pulls in a different build.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[train,dev]'
	touch $@

.venv/.installed-bench: .venv/.installed
	$(INSTALL) --editable '.[bench]'
	touch $@

demo: .venv/.installed  ## Train a small byte-level model and generate text with it
	$(BIN)/python examples/demo.py

test: .venv/.installed  ## Run the quick tests
	$(PYTEST) -m 'not slow' -n 2

test-slow: .venv/.installed  ## Run the slow tests
	$(PYTEST) -m slow

check: .venv/.installed  ## Check lint, format, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy reformer_hf
	$(BIN)/lint-imports

format: .venv/.installed  ## Sort imports and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-bench  ## Run the benchmarks (options: ARGS='…')
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## Remove the virtual environment and all generated files
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
