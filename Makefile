# `make demo` and `make test` need nothing but a Python; both build the virtual environment once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOWEST ?= .venv-lowest

# Nothing that these targets run may fetch a model or a data set.
export HF_HUB_OFFLINE := 1

.PHONY: help venv demo test test-faults test-lowest check lint docs wheel bench clean distclean

help:
	@echo "make demo   fit the embedded adapter and print the table (builds $(VENV) when missing)"
	@echo "make test   run the tests (builds $(VENV) when missing)"
	@echo "make test-faults  kills, full disks, changed and hostile files, fuzzed rows (minutes)"
	@echo "make check  ruff, mypy, the tests with warnings as errors, a dry run of benchmarks/gpu.sh"
	@echo "make test-lowest  the tests with the lowest supported versions (builds $(LOWEST), 5 GB)"
	@echo "make docs   build the documentation into site/, and run its notebook"
	@echo "make bench  run benchmarks/"
	@echo "make wheel  build the wheel and the source archive into dist/, and check both"
	@echo "make venv   only build $(VENV);  PYTHON=python3.12 picks the interpreter"
	@echo "make clean  remove caches;  make distclean removes $(VENV) as well"

venv: $(STAMP)

# The folder of the target gets the versions of its first prerequisite.
# A CUDA build of torch requires one exact triton, which then replaces the pinned one;
# a CPU build requires none. Which build the index serves is known only once it is installed.
define install
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
	  '$< pins packages for Python 3.11 or newer; try: make PYTHON=python3.12 ...')"
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -v '^triton==' $< > $(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install -c $(@D)/constraints.txt torch
	if $(@D)/bin/python -c "import importlib.metadata as m, sys; \
	  sys.exit(any(r.startswith('triton') for r in m.requires('torch') or ()))"; \
	then cp $< $(@D)/constraints.txt; fi
	$(@D)/bin/python -m pip --disable-pip-version-check install \
	  -c $(@D)/constraints.txt -e ".[$(EXTRAS)]"
	touch $@
endef

EXTRAS = dev
$(STAMP): EXTRAS = dev,dev-data
$(STAMP): constraints.txt pyproject.toml setup.py
	$(install)

$(LOWEST)/.installed: constraints-lowest.txt pyproject.toml setup.py
	$(install)

demo: $(STAMP)
	$(PY) -m tfb demo

# Warnings are errors by default (pyproject.toml); a user's run only shows them.
test: $(STAMP)
	$(PY) -m pytest -W default -n logical

# TFB_KILLS and TFB_FUZZ, the kills and fuzzed rows, may be greater.
test-faults: $(STAMP)
	$(PY) -m pytest tests/faults -n logical

# Old versions warn of what newer ones mended; only results count here.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -W default -n logical

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy tfb tfb_kernels benchmarks

check: lint
	$(PY) -m pytest -n logical
	PYTHON=$(PY) benchmarks/gpu.sh --toy

$(VENV)/.wheel: $(STAMP)
	$(PY) -m pip --disable-pip-version-check install -c constraints.txt build twine
	touch $@

# The wheel is built from the source archive, so both are complete.
wheel: $(VENV)/.wheel
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*

$(VENV)/.docs: $(STAMP)
	$(PY) -m pip --disable-pip-version-check install \
	  -c $(VENV)/constraints.txt -e ".[docs]"
	touch $@

# A broken link, or a name without a docstring, is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(STAMP)
	$(PY) -m pytest benchmarks/ --benchmark-only -W default

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf

distclean: clean
	rm -rf $(VENV) $(LOWEST)
