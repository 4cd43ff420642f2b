# Everything a developer runs. Each target sets up what it needs, once; `make help` lists them.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python3.14,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
DATA ?= ../shared/data
WORKERS := -n $(JOBS) --dist worksteal
INSTALL := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

# What the tests import is compiled once, and not anew by every process that they begin.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-numeric test-slow test-data test-all lint format types docs bench clean

help: ## Show this list.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Make the environment (.venv) with all that development needs.

demo: $(VENV)/.runs ## Let the embedded model write at three cache sizes.
	@$(BIN)/swapless demo

test: $(VENV)/.ready ## The fast tests: nothing from outside the repository.
	$(BIN)/python -m pytest $(WORKERS)

test-numeric: $(VENV)/.ready ## The fast tests of what must not depend on the machine: OPENBLAS_CORETYPE=Haswell make test-numeric.
	$(BIN)/python -m pytest $(WORKERS) tests/predict tests/locality tests/cache tests/trace

test-slow: $(VENV)/.ready ## The slow ones: family sweep, memory cgroup, wheel, browser.
	$(BIN)/python -m pytest $(WORKERS) -m "slow and not data"

test-data: $(VENV)/.ready ## The checks on the handed traces and texts: make test-data DATA=DIR.
	$(BIN)/python -m pytest -m data --data="$(DATA)"

test-all: test test-slow test-data ## All of them.

lint: $(VENV)/.ready ## Style of the code.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready ## Put the code in shape.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready ## Check the types.
	$(BIN)/mypy

docs: $(VENV)/.ready ## Write docs/cli.md anew from the command line itself.
	$(BIN)/python -m typer swapless.cli.main utils docs --name swapless --output docs/cli.md

bench: $(VENV)/.ready ## Run the benchmarks; results go to benchmarks/results/.
	$(BIN)/python -m benchmarks

clean: ## Remove the environment and what was built.
	rm -rf $(VENV) dist build out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Swapless needs Python 3.11 or newer: install it, or say which with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) (once; some minutes and about 1 GB, more where torch comes with CUDA) ..." >&2
	$(INSTALL) -e .
	@touch $@

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) with the test tools (once) ..." >&2
	$(INSTALL) -e '.[test,dev]'
	@touch $(VENV)/.runs $@
