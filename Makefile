# Two commands are all a fresh machine with Python 3.11 and make needs: `make demo` and `make test`.
# Choices:  make demo PYTHON=python3.12    make demo TORCH=cpu|cuda|cu130|<what pip takes>    make test VENV=/else/where

.DEFAULT_GOAL := help
.PHONY: help demo test check faults matrix bench install install-dev clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
TORCH ?= auto
VENV ?= .venv
BIN := $(VENV)/bin
TOGETHER ?= -n auto --maxprocesses 4 --dist loadfile
PARTS := pyproject.toml constraints.txt tools/install.py

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.installed  ## install what is missing and make a video with the built-in model
	@$(BIN)/wanloom demo

test: check  ## the same with the development tools, then style, types and all tests
	$(BIN)/python -m pytest $(TOGETHER) -m "not faults and not matrix"

check: $(VENV)/.installed-dev  ## style and types only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

faults: $(VENV)/.installed-dev  ## the long fault-injection runs: kills at every point, damaged files
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m faults --result-table docs/results/faults.md

matrix: $(VENV)/.installed-dev  ## every model on every layout of processes, and what takes long (half an hour)
	$(BIN)/python -m pytest -m matrix --result-table docs/results/matrix.md

bench: $(VENV)/.installed-dev  ## speed and memory beside diffusers, on this CPU
	$(BIN)/python benchmarks/cpu.py

install: $(VENV)/.installed  ## only install
install-dev: $(VENV)/.installed-dev  ## only install, with the development tools

$(VENV)/.installed: $(PARTS)
	@test -n "$(PYTHON)" || { echo "wanloom needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python" >&2; exit 8; }
	@$(PYTHON) tools/install.py $(VENV) --torch "$(TORCH)"
	@touch $@

$(VENV)/.installed-dev: $(PARTS)
	@test -n "$(PYTHON)" || { echo "wanloom needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python" >&2; exit 8; }
	@$(PYTHON) tools/install.py $(VENV) --dev --torch "$(TORCH)"
	@touch $@ $(VENV)/.installed

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
