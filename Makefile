# Two commands do all the set-up: `make quickstart` and `make test`. Needs Python >= 3.11 with venv, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes: one more than cores, since some wait for what they have started. WORKERS=0 is this process alone.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
PYTEST = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# Stamps: installing again costs nothing until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nanochat needs Python 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

.PHONY: install quickstart test test-slow lint docs reference clean

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/nanochat run experiments/quickstart.toml

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow
	NANOCHAT_FUZZ=60 $(PYTEST) -m fuzz --timeout 7200

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The guides as a site: open site/index.html.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# docs/reference/, which a test compares with the code.
reference: $(VENV)/.installed
	$(BIN)/python tools/reference.py

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
