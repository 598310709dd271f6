# make demo            trains a small generator on this machine and draws its samples
# make test            lint, types and every test that needs no Ray cluster: under 15 minutes on 2 cores
# make test-cluster    the tests that start Ray clusters and break them: 23 minutes on 2 cores
# make help            everything else
#
# All tools live in .venv, which is made on first use and renewed when pyproject.toml or constraints.txt change.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-cluster lint format wheel clean

VENV := .venv
BIN := $(VENV)/bin/python
# The first interpreter that is new enough; choose another with `make PYTHON=python3.12 ...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
ARGS ?=
PYTEST_ARGS ?=
# A process per core, eight at most, each with whole files; tests/integration, where the longest are, comes first.
PARALLEL := -n $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8))) --dist loadfile --no-loadscope-reorder

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(or $(PYTHON),python3) is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN) -m pip install --quiet -c constraints.txt -e '.[all,services,test]'
	@touch $@

demo: $(VENV)/.installed  ## train a small generator here and draw samples; ARGS="key=value ..." changes settings
	$(BIN) -m jobs.demo $(ARGS)

lint: $(VENV)/.installed  ## style and types
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

test: lint  ## lint, types and every test without a Ray cluster; PYTEST_ARGS="-k name" selects
	$(BIN) -m pytest -m "not cluster" $(PARALLEL) --durations=15 $(PYTEST_ARGS)

test-cluster: $(VENV)/.installed  ## tests on real Ray clusters of this machine, whose parts are killed; root for all of them
	$(BIN) -m pytest -m cluster --durations=15 $(PYTEST_ARGS)

format: $(VENV)/.installed  ## rewrite files in the project's style
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

wheel: $(VENV)/.installed  ## dist/cips_pipeline-*.whl, which ray_cluster.yaml installs on every node
	rm -rf dist build  # an old build folder would bring deleted files back
	$(BIN) -m pip wheel --quiet --no-deps -w dist .

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
