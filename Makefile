# `make sweep` and `make test` do everything on a fresh machine: environment, installation, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SCALE ?=
OUT ?=
PYTEST_WORKERS ?= auto

.PHONY: sweep test test-slow test-gpu lint format

sweep: $(VENV)/.core
	$(BIN)/python -m zoology.run experiments/mqar_sweep.py $(if $(SCALE),--scale $(SCALE)) $(if $(OUT),--out $(OUT))

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m "not slow"

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m slow

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A torch that is already there stays: its pin is left out of the constraints then.
$(VENV)/constraints.txt: constraints.txt $(VENV)/bin/python
	if $(BIN)/python -c "import torch" 2>/dev/null; then grep -v '^torch==' constraints.txt > $@; else cp constraints.txt $@; fi

$(VENV)/.core: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e ".[test]"
	touch $@ $(VENV)/.core
