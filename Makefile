# `make demo` and `make test` need nothing but a Python; both build the virtual environment once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Nothing that these targets run may fetch a model or a data set.
export HF_HUB_OFFLINE := 1

.PHONY: help venv demo test check lint bench clean distclean

help:
	@echo "make demo   fit the embedded adapter and print the table (builds $(VENV) when missing)"
	@echo "make test   run the tests (builds $(VENV) when missing)"
	@echo "make check  ruff, mypy and the tests with warnings as errors"
	@echo "make bench  run benchmarks/"
	@echo "make venv   only build $(VENV);  PYTHON=python3.12 picks the interpreter"
	@echo "make clean  remove caches;  make distclean removes $(VENV) as well"

venv: $(STAMP)

# A CUDA build of torch requires one exact triton, which then replaces the pinned one;
# a CPU build requires none. Which build the index serves is known only once it is installed.
$(STAMP): constraints.txt pyproject.toml setup.py
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
	  'constraints.txt pins packages for Python 3.11 or newer; try: make PYTHON=python3.12 ...')"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt torch
	if $(PY) -c "import importlib.metadata as m, sys; \
	  sys.exit(any(r.startswith('triton') for r in m.requires('torch') or ()))"; \
	then cp constraints.txt $(VENV)/constraints.txt; fi
	$(PIP) install -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(PY) -m tfb demo

# Warnings are errors by default (pyproject.toml); a user's run only shows them.
test: $(STAMP)
	$(PY) -m pytest -W default

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy tfb tfb_kernels benchmarks

check: lint
	$(PY) -m pytest

bench: $(STAMP)
	$(PY) -m pytest benchmarks/ --benchmark-only -W default

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf

distclean: clean
	rm -rf $(VENV)
