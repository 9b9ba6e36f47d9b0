# Every target first creates .venv, or updates it if the pinned dependencies have changed.

.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
# Otherwise idle torch threads spin and take cores from the data tasks. It must be set before Python starts.
export OMP_WAIT_POLICY := PASSIVE
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS := bench-demo bench-host_waits bench-pairs bench-corpus bench-concepts bench-manifests bench-parity bench-teachers bench-train \
	bench-alignment bench-group_plan bench-ovsam bench-eval bench-gpu bench-serve bench-export bench-recovery

.PHONY: help install demo claims test test-slow lint docs first-hour bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Create .venv with the pinned dependencies

demo: $(INSTALLED)  ## Crawl, train, evaluate and serve on a small drawn world; results in runs/demo
	$(BIN)/python workflows/demo.py

claims: $(INSTALLED)  ## Measure the papers' claims that docs/claims does not hold yet, and render docs/claims.md
	$(BIN)/python workflows/claims.py

test: $(INSTALLED)  ## Run the tests, without the slow ones, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(INSTALLED)  ## Run the slow tests
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: $(INSTALLED)  ## Build the documentation as a site in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(BENCHMARKS)  ## Run all benchmarks except clip_towers and scale; bench-NAME runs one; results in runs/bench
bench-%: benchmarks/%.py $(INSTALLED)
	$(BIN)/python $<

first-hour: $(INSTALLED)  ## Run the README's commands on a fresh clone, in about 24 minutes
	$(BIN)/python benchmarks/first_hour.py

clean:  ## Remove caches; keep .venv, runs and store
	rm -rf .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find workflows data_prep ovd_models tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing the pinned dependencies into $(VENV); the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# lvis brings opencv-python, whose files replace the headless ones and need a display's libraries.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --force-reinstall \
		opencv-python-headless
	@touch $@
