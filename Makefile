# `make help` lists what there is. PYTHON= names the interpreter that .venv is made from.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .tools
CHART := deploy/helm/tenora
PIP := -m pip --disable-pip-version-check install --quiet

# Written last, so it exists only where an installation ran to its end; it says for which checkout.
READY := $(VENV)/.ready
# Exists while pip works on .venv: found at the start, it means that an earlier run was cut off.
UNFINISHED := $(VENV)/.unfinished
# Not to be repaired: cut off half-way (pip believes what it finds there), without its interpreter, or moved with its checkout.
USABLE = [ ! -e $(UNFINISHED) ] && $(BIN)/python -m pip --version >/dev/null 2>&1 \
  && { [ ! -e $(READY) ] || [ "$$(cat $(READY))" = '$(CURDIR)' ]; }

ARGS ?=

.PHONY: help setup tools demo test test-full lint fmt client serve bench bench-peers gpu-check clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything that developing needs (does nothing when nothing changed)
	@:

# An interpreter that is gone leaves no trace in the dates of files.
ifneq ($(shell $(BIN)/python -c 'print(0)' 2>/dev/null; cat $(READY) 2>/dev/null),0 $(CURDIR))
.PHONY: $(READY)
endif

$(READY): pyproject.toml clients/python/pyproject.toml constraints.txt
	@if ! { $(USABLE); }; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'Tenora needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; exit 1; }; \
	  echo 'making $(VENV) with $(PYTHON)'; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); \
	fi
	@touch $(UNFINISHED)
	@echo 'installing Tenora into $(VENV); the first time takes minutes, PyTorch is large'
	@$(BIN)/python $(PIP) --constraint constraints.txt --upgrade pip
	@$(BIN)/python $(PIP) --constraint constraints.txt --editable clients/python --editable '.[dev]'
	@rm $(UNFINISHED)
	@echo '$(CURDIR)' > $@

tools: $(TOOLS)/venv/.ready $(TOOLS)/bin/helm ## fetch helm, hadolint and kubernetes-validate into .tools

$(TOOLS)/venv/.ready: deploy/tools/requirements.txt | $(READY)
	@echo 'installing the checkers of the deployment files into $(TOOLS)/venv'
	@$(BIN)/python -m venv --clear $(TOOLS)/venv
	@$(TOOLS)/venv/bin/python $(PIP) --requirement deploy/tools/requirements.txt
	@touch $@

$(TOOLS)/bin/helm: deploy/tools/fetch_helm.py | $(READY)
	@echo 'fetching helm into $(TOOLS)/bin'
	@$(BIN)/python deploy/tools/fetch_helm.py $@

demo: setup ## the whole product in one run: serve, fine-tune on a sample file, compare base and adapter
	@$(BIN)/python clients/demo/demo.py $(ARGS)

# Three lanes of about the same length for two cores, since many tests wait for a process: those that compute, those of
# the state, and the others, which are the engine, the commands and whole services.
COMPUTING := tests/kernels tests/model tests/data tests/training tests/adapters
STATE := tests/control tests/api tests/architecture tests/client tests/deploy tests/docs

define LANES
logs=$$(mktemp -d); trap 'rm -rf "$$logs"' EXIT; \
lane() { name=$$1; shift; $(BIN)/python -m pytest -m '$(1)' -o cache_dir=.pytest_cache/$$name "$$@"; }; \
lane computing $(COMPUTING) >"$$logs"/computing 2>&1 & computing=$$!; \
lane state $(STATE) >"$$logs"/state 2>&1 & state=$$!; \
failed=0; lane services tests $(COMPUTING:%=--ignore=%) $(STATE:%=--ignore=%) || failed=1; \
wait $$state || failed=1; cat "$$logs"/state; \
wait $$computing || failed=1; cat "$$logs"/computing; exit $$failed
endef

test: setup ## run the tests (ARGS="tests/api -k name" for some of them)
ifeq ($(strip $(ARGS)),)
	@$(call LANES,not full)
else
	@$(BIN)/python -m pytest $(ARGS)
endif

test-full: setup ## run what make test leaves out: slow tests, and the rest of every matrix
	@$(call LANES,full)

lint: setup tools ## ruff, mypy, import-linter, hadolint, helm
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TOOLS)/venv/bin/hadolint Dockerfile
	for values in '' values-cpu.yaml values-gpu.yaml; do \
	  flags="$${values:+--values $(CHART)/$$values}"; \
	  $(TOOLS)/bin/helm lint --strict --quiet $(CHART) $$flags; \
	  $(TOOLS)/bin/helm template tenora $(CHART) $$flags >/dev/null; \
	done

fmt: setup ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

client: setup ## make the synchronous client of the asynchronous one
	@$(BIN)/python clients/python/scripts/unasync.py
	@$(BIN)/python clients/python/scripts/settings.py

serve: setup ## start the service on this machine (ARGS="--port 8001")
	@$(BIN)/tenora serve $(ARGS)

bench: setup ## our own server against itself: adapters, ranks, slots, loading (ARGS="--help"; minutes)
	@$(BIN)/python -m tests.bench.serving.cases $(ARGS)

bench-peers: setup ## vLLM, PEFT and llama.cpp beside us, each in an environment of its own under .bench (an hour)
	@$(BIN)/python -m tests.bench.peers all $(ARGS)

gpu-check: setup ## the kernels' tests and benchmark on a GPU; exits 3 where there is none
	@$(BIN)/python -m tests.bench.gpu.check $(ARGS)

clean: ## remove .venv, the tools, caches and build outputs (the state in TENORA_HOME stays)
	rm -rf $(VENV) $(TOOLS) .demo .bench dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
