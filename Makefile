# Every target sets up what it needs: a virtual environment, with the versions of
# constraints.txt. `make PYTHON=/path/to/python3.12 test` chooses the interpreter.
PYTHON ?= python3
SOURCES := $(wildcard qkv_jax experiments benchmarks tests)
PYTEST_ARGS ?=
# Most of a test is XLA compiling, on one core; the rest waits, for files and for other processes: so
# one process more than there are cores, and at most 4, for the memory.
CORES := $(shell $(PYTHON) -c 'import os; print(os.cpu_count() or 1)' 2> /dev/null || echo 1)
PARALLEL := -n $(shell echo $$(($(CORES) < 3 ? $(CORES) + 1 : 4))) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-peers check format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo        train, evaluate and use a small translator (about 8 minutes on 2 cores)"
	@echo "make test        run the tests"
	@echo "make test-slow   run the further cases that take longer"
	@echo "make test-peers  run the tests against torch, transformers, tokamax and ctranslate2"
	@echo "make check       check formatting, lint, types and the import rule"
	@echo "make format      format the code, and fix what ruff can fix"
	@echo "make clean       remove the virtual environments and caches"

demo: .venv/ready
	.venv/bin/qkv-jax demo

test: .venv/ready
	.venv/bin/python -m pytest $(PARALLEL) --ignore=tests/peers $(PYTEST_ARGS)

test-slow: .venv/ready
	.venv/bin/python -m pytest $(PARALLEL) --ignore=tests/peers -m slow $(PYTEST_ARGS)

test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest $(PARALLEL) tests/peers $(PYTEST_ARGS)

check: .venv/ready
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/mypy $(filter-out tests,$(SOURCES))
	.venv/bin/python -m pytest -q tests/test_imports.py

format: .venv/ready
	.venv/bin/ruff format $(SOURCES)
	.venv/bin/ruff check --fix $(SOURCES)

clean:
	rm -rf .venv .venv-peers .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Setting up .venv (once, a few minutes) ..."
	$(call install,.venv,constraints.txt,dev)
	@touch $@

.venv-peers/ready: pyproject.toml constraints.txt constraints-peers.txt | .venv-peers/bin/python
	@echo "Setting up .venv-peers (once, a few minutes) ..."
	@grep -v -E "^($$(sed -n 's/==.*//p' constraints-peers.txt | paste -s -d '|' -))==" constraints.txt \
		| cat - constraints-peers.txt > .venv-peers/constraints.txt
	$(call install,.venv-peers,.venv-peers/constraints.txt,dev$(comma)peers)
	@touch $@

comma := ,
# $(call install,ENVIRONMENT,CONSTRAINTS,EXTRAS). The build backend comes from the constraints
# as well, so nothing is installed in a version that they do not name. Modules are compiled as they
# are first imported: of most packages that is a part, and to compile all takes half of the set-up.
define install
@$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) --upgrade pip
@$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) hatchling editables
@$(1)/bin/python -m pip install -q --no-compile --disable-pip-version-check -c $(2) --no-build-isolation -e '.[$(3)]'
endef

%/bin/python:
	@command -v $(PYTHON) > /dev/null \
		|| { echo "make: $(PYTHON) is not there: install Python 3.11 or newer, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1): name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null \
		|| { echo "make: $(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $*
