# Needs Python 3.11 or later and make. Everything is installed into VENV, through constraints.txt.
#   make demo                      install, then show the package at work
#   make test PYTHON=python3.12    another interpreter (remove the old environment first: make clean)

PYTHON ?= python3
VENV ?= .venv
# Extra arguments for pytest, for example: make test PYTEST_ARGS="-k calibration -x"
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Whole files go to one process: module-scoped models are then built once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
# What an installed environment depends on: a change of any of these installs again.
INPUTS := pyproject.toml constraints.txt trl_cwdpo/_version.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installs into one environment at a time would race.
.NOTPARALLEL:
.PHONY: help demo test test-all test-lowest test-latest contracts lint format types docs build check-wheel check \
  release-notes clean

help:
	@echo "make demo         install and run the demonstration"
	@echo "make test         quick tests on two processes"
	@echo "make test-all     every test this machine can run, with the optional extras"
	@echo "make test-lowest  quick tests with the lowest versions that pyproject.toml admits"
	@echo "make test-latest  quick tests with the newest versions that pip finds"
	@echo "make contracts    what this package assumes about TRL and transformers"
	@echo "make lint         ruff: rules and format, changing nothing"
	@echo "make format       ruff: repair what can be repaired"
	@echo "make types        mypy"
	@echo "make docs         the documentation site, in site/"
	@echo "make check        all of it: lint, types, tests, docs, the wheel on its own"
	@echo "make build        source distribution and wheel in dist/"
	@echo "make check-wheel  install the wheel elsewhere and run the quick tests against it"
	@echo "make release-notes  what the changelog says of this version"
	@echo "make clean        remove the environment, build results and caches"

# --- Environment: one stamp per set of extras, so that a target installs only what it needs, and only once ---

$(VENV)/.stamp-python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: trl-cwdpo needs Python 3.11 or later, and there is no '$(PYTHON)' on this machine." >&2; \
	  echo "       Name another interpreter: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: trl-cwdpo needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "       Name another interpreter: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-core: $(VENV)/.stamp-python $(INPUTS)
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-python $(INPUTS)
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@ $(VENV)/.stamp-core

$(VENV)/.stamp-dev: $(VENV)/.stamp-python $(INPUTS)
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/.stamp-core

$(VENV)/.stamp-docs: $(VENV)/.stamp-python $(INPUTS)
	$(PIP_INSTALL) --editable ".[docs]"
	@touch $@ $(VENV)/.stamp-core

$(VENV)/.stamp-all: $(VENV)/.stamp-python $(INPUTS)
	$(PIP_INSTALL) --editable ".[test,quantization,deepspeed,report,eval,examples,endpoint,serving]"
	@touch $@ $(VENV)/.stamp-core $(VENV)/.stamp-test

# --- Use ---

demo: $(VENV)/.stamp-core
	$(BIN)/trl-cwdpo demo

# --- Checks ---

test: $(VENV)/.stamp-test
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(VENV)/.stamp-all
	$(PYTEST) $(PYTEST_ARGS)

# After an upgrade of TRL or transformers within the environment: a failing test names the assumption that broke.
contracts: $(VENV)/.stamp-test
	$(PYTEST) -m "contract and not gpu" $(PYTEST_ARGS)

# Other versions of the dependencies than the pinned ones, each in an environment of its own.
#   make test-lowest TORCH=2.13.0    another torch than the lowest, for one whose build for CPU is at hand
#   make test-latest TORCH=2.14.1    another torch than the newest; LATEST="trl @ git+https://…" for more
TORCH ?=
LATEST ?=
ELSEWHERE = HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(PYTEST_ARGS)

$(VENV)-lowest/.stamp: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint constraints.txt uv
	$(VENV)-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra test --no-annotate pyproject.toml \
	  --python $(VENV)-lowest/bin/python --output-file $(VENV)-lowest/resolved.txt
# What torch needs for CUDA depends on where its wheel comes from, so torch itself says it
	grep -v -E '^(nvidia-|cuda-|triton)' $(VENV)-lowest/resolved.txt \
	  $(if $(TORCH),| sed 's/^torch==.*/torch==$(TORCH)/') > $(VENV)-lowest/requirements.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --requirement $(VENV)-lowest/requirements.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)-latest/.stamp: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-latest
	$(VENV)-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test]" \
	  torch$(if $(TORCH),==$(TORCH)) $(LATEST)
	@touch $@

test-lowest: $(VENV)-lowest/.stamp
	$(call ELSEWHERE,$(VENV)-lowest)

test-latest: $(VENV)-latest/.stamp
	$(call ELSEWHERE,$(VENV)-latest)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

check: lint types test docs check-wheel

# --- Distribution ---

build: $(VENV)/.stamp-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The wheel must stand on its own: an empty environment, outside the repository, with the tests but not the sources.
# pyproject.toml goes along for pytest's settings only.
check-wheel: build
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(PYTHON) -m venv "$$dir/venv"; \
	wheel=$$(ls "$(CURDIR)"/dist/*.whl); \
	"$$dir/venv/bin/python" -m pip install --quiet --constraint constraints.txt "$$wheel[test]"; \
	cp -R tests pyproject.toml "$$dir"; \
	cd "$$dir"; \
	"$$dir/venv/bin/python" -c 'import trl_cwdpo; print("testing", trl_cwdpo.__version__, "at", trl_cwdpo.__file__)'; \
	"$$dir/venv/bin/python" -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(PYTEST_ARGS)

# From this version's heading to the next one; until a version is released, what has gathered under Unreleased
release-notes: $(VENV)/.stamp-core
	@version=$$($(BIN)/python -c 'import trl_cwdpo; print(trl_cwdpo.__version__)'); \
	grep -q -F "## [$$version]" CHANGELOG.md || version=Unreleased; \
	awk -v heading="## [$$version]" '/^## \[/ { inside = index($$0, heading) == 1; next } inside' CHANGELOG.md

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-latest build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
