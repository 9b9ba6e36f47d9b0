# Every target makes .venv first when it is missing or older than the pinned dependencies.

.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
# Idle threads of torch would spin and take the cores from the data tasks; it must be set before Python starts.
export OMP_WAIT_POLICY := PASSIVE
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS := bench-demo bench-pairs bench-concepts bench-manifests bench-parity bench-teachers bench-train \
	bench-alignment bench-group_plan bench-ovsam

.PHONY: help install demo test test-slow lint bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Create .venv with the pinned dependencies

demo: $(INSTALLED)  ## The whole path on a small drawn world: crawl, train, evaluate, serve, report
	$(BIN)/python workflows/demo.py

test: $(INSTALLED)  ## All tests but the slow ones
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## The longer proofs
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BENCHMARKS)  ## The benchmarks, but for the trainings of clip_towers
bench-%: benchmarks/%.py $(INSTALLED)
	$(BIN)/python $<

clean:  ## Remove caches; .venv and runs stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find workflows data_prep ovd_models tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing the pinned dependencies into $(VENV); the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
