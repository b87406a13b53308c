# Needs Python 3.10+ and make, nothing else: the first target that needs the environment makes it in .venv.
#   make demo    a story written by the built-in model        make test    lint, types and all tests
#   make lint    ruff and mypy                                make bench   measure this machine
#   make docs    write the tables of docs/ from the code      make clean   remove the environment and all caches of tools
# PYTHON=python3.12 chooses the interpreter. pip's own variables (PIP_INDEX_URL, …) are honoured.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -5

demo: $(VENV)/installed
	@echo "make: the model that is built in writes a story (a few seconds)"
	@$(BIN)/torchchat generate --prompt "Once upon a time" --max-new-tokens 200
	@echo "make: done; try: $(BIN)/torchchat generate --help"

test: lint
	@echo "make: tests, up to four at a time (some minutes)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed-dev
	@echo "make: ruff and mypy (seconds, the first time a minute)"
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(VENV)/installed
	@echo "make: measuring this machine and the built-in model, eager and compiled (a minute or two)"
	@$(BIN)/torchchat bench
	@$(BIN)/torchchat bench --compile
	@echo "make: done; other models: $(BIN)/torchchat bench --random-weights llama3.2-1b --compile"

docs: $(VENV)/installed-dev
	@$(BIN)/python -m tests.generated_docs

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp older than pyproject.toml: what is to be installed may have changed. The code itself is used in place.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.10 or newer is needed, this is " + sys.version.split()[0] + \
	  "; choose another with PYTHON=...") if sys.version_info < (3, 10) else None'
	@echo "make: an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu the package python3-venv has it" >&2; exit 1; }

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "make: installing torchchat and what it needs; PyTorch is the large part (minutes, by your connection)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	@echo "make: installing torchchat and what its tests need; PyTorch is the large part (minutes, by your connection)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,executorch]'
	@touch $@ $(VENV)/installed
