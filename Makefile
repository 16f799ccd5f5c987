# Everything starts from Python 3.11 (or newer), pip and make. `make help` lists the targets.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo lint types test test-long check clean

TORCH := torch==2.13.0
# Index to take torch from instead of pip's own, for instance one of CPU-only builds.
TORCH_INDEX ?=
# The first of these that runs and is new enough.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# A virtual environment holds absolute paths: one that came along with a copied checkout is made anew.
OURS := grep -qsF '$(CURDIR)/$(VENV)' $(VENV)/pyvenv.cfg
ifneq ($(shell $(OURS) && echo yes),yes)
.PHONY: $(STAMP)
endif

# The second form is for a Python that was packaged without ensurepip.
NEW_VENV = $(PYTHON) -m venv --clear $(VENV) || { \
	$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo 'Variables: PYTHON (interpreter to start from), TORCH_INDEX (package index for torch alone)'

setup: $(STAMP)  ## create .venv with the pinned dependencies and this package, editable

# The stamp is written last, so an interrupted or failed setup is taken up again by the next one.
# torch goes in first and alone: what follows then never looks for another build of it.
# With TORCH_INDEX its dependencies are left to the second installation, from pip's own index.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $(STAMP)
	@test -n '$(PYTHON)' || { echo 'make: needs Python 3.11 or newer; name one with PYTHON=' >&2; exit 1; }
	@{ $(OURS) && $(BIN)/python -m pip --version >/dev/null 2>&1; } || $(NEW_VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url '$(TORCH_INDEX)') $(TORCH)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(STAMP)

demo: setup  ## prune the embedded network, clean and noisy; report in demo-report/
	rm -rf demo-report
	$(BIN)/swap-prune demo --out demo-report

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy, strict, on src
	$(BIN)/mypy

test: setup  ## the default test suite (no long, slow or gpu tests)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-long: setup  ## the long tests, which the default suite leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'long and not slow and not gpu'

check: lint types test  ## lint, types and test

clean:  ## remove what these targets made
	rm -rf $(VENV) demo-report build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
