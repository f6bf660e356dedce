# `make sweep` and `make test` do all their own set-up: a virtual environment in .venv, the packages, then the run.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: sweep test lint bench clean

sweep: $(VENV)/.run  ## find an SAE for the embedded model; no downloads but packages
	$(BIN)/python jobs/sweep_sae.py --config configs/quickstart.yaml $(ARGS)

test: $(VENV)/.dev  ## the whole test suite, two tests at a time; names the slowest
	$(BIN)/python -m pytest -n 2 --durations=15 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev  ## every benchmark, each with a table
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/sweep_overhead.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/saelens_evals.py
	$(BIN)/python benchmarks/evaluate_many.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/near_duplicates.py

clean:  ## the environment and caches; results stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[all]'
	touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) requirements-peers.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps -r requirements-peers.txt
	touch $@ $(VENV)/.run
