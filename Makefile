PYTHON ?= python3
BIN := .venv/bin
# An empty value installs the newest versions.
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
INSTALL := $(BIN)/python $(PIP_INSTALL)
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo space test test-slow check format bench docs gpu dist clean

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

.venv/.installed-space: .venv/.installed
	$(INSTALL) --editable '.[space]'
	touch $@

space: .venv/.installed-space  ## Open a page that generates text and shows what LSH attention saw (options: ARGS='…')
	$(BIN)/python examples/space/app.py $(ARGS)

test: .venv/.installed  ## Run the quick tests
	$(PYTEST) -m 'not slow' -n 2

test-slow: .venv/.installed  ## Run the slow tests
	$(PYTEST) -m slow

check: .venv/.installed  ## Check lint, format, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy reformer_hf experiments
	$(BIN)/lint-imports

format: .venv/.installed  ## Sort imports and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-bench  ## Run the benchmarks (options: ARGS='…')
	$(BIN)/python -m benchmarks $(ARGS)

# Installs nothing: it takes a torch that is there. `constraints.txt` pins the version of torch and not its build; CPU
# builds, as on a machine without a GPU, are refused. With the packages in another environment than .venv, such as that
# of a container: `make gpu GPU_PYTHON=python3`. Results: `benchmarks/results/<date>-required.json`, table and plots.
GPU_PYTHON ?= $(BIN)/python
gpu:  ## Run the CUDA tests and the required benchmarks (options: ARGS='…')
	@$(GPU_PYTHON) -c 'import torch; torch.cuda.is_available() or exit(f"make gpu needs a CUDA device and a CUDA build \
	of torch; here is torch {torch.__version__}, which sees no device. The CPU tests: make test.")'
	HF_HUB_OFFLINE=1 $(GPU_PYTHON) -m pytest -m cuda tests
	$(GPU_PYTHON) -m benchmarks --suite required --device cuda $(ARGS)

dist: .venv/.installed  ## Build wheel and sdist, check them, and use each in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	set -e; for package in dist/*; do \
		folder=$$(mktemp -d); \
		$(PYTHON) -m venv $$folder/env; \
		$$folder/env/bin/python $(PIP_INSTALL) torch; \
		$$folder/env/bin/python $(PIP_INSTALL) $$package accelerate; \
		cp tests/smoke.py $$folder; \
		(cd $$folder && HF_HUB_OFFLINE=1 env/bin/python smoke.py); \
		rm -rf $$folder; \
	done

.venv/.installed-docs: .venv/.installed
	$(INSTALL) --editable '.[docs]'
	touch $@

docs: .venv/.installed-docs  ## Build the documentation site in build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs

clean:  ## Remove the virtual environment and all generated files
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
