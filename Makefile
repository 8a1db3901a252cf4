# Every target sets up what it needs: all that must be there is make and Python 3.11+.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: help install demo test test-all lint types fast slow sweep docs format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## create the environment in .venv

# The groups of pyproject.toml need pip 25.1 or newer.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	@touch $@

demo: $(STAMP) ## train on real digits with plain SGD and each technique, and compare
	$(BIN)/python -m benchmarks compare classification --dataset digits --runners 2

test: lint types fast ## what to run before every push: lint, types and the fast tests

test-all: test slow ## what CI runs: the slow tests too

lint: $(STAMP) ## style, common mistakes, and which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP) ## types
	$(BIN)/mypy

fast: $(STAMP) ## tests and doctests, without those marked slow
	$(PYTEST) -m "not slow"

slow: $(STAMP) ## the tests marked slow, with a part of each sweep
	$(PYTEST) -m "slow and not sweep"

sweep: $(STAMP) ## the rest of the sweeps: kills at every point, every network's program
	$(PYTEST) -m sweep

docs: $(VENV)/.docs ## the site in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	@touch $@

format: $(STAMP) ## format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist site
