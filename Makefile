# Every target sets up what it needs in .venv first; a second run of that takes no time.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-deep lint format up down bench docs migration constraints clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
FORGEARR := $(BIN)/forgearr

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/installed ## Install everything, in .venv

# llama-cpp-python is compiled for any processor: a native build dies on machines that advertise more than they can do.
# Its library for pictures and sound (mtmd) is left out, and ccache is used where it is installed.
CCACHE := $(if $(shell command -v ccache),-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
.venv/installed: export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF $(CCACHE)
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@

# A home and ports of its own, so that it disturbs nothing that runs already.
demo: export FORGEARR_HOME := $(CURDIR)/.state/demo
demo: export FORGEARR_SERVE__PORT := 8390
demo: export FORGEARR_RAY__PORT := 6390
demo: export FORGEARR_RAY__DASHBOARD_PORT := 8395
demo: export FORGEARR_MLFLOW__PORT := 5390
demo: setup ## Train a tiny model, export, validate and serve it, and show what it has learned
	@$(FORGEARR) up --detach
	@trap '$(FORGEARR) down' EXIT; $(FORGEARR) demo

# Several at once, since much of what tests do is waiting.
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadfile --durations=25

test: setup ## Run the quick tests: they show that the product works
	$(PYTEST) -m "not deep"

test-deep: setup ## Run the tests that take long
	$(PYTEST) -m deep

lint: setup ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup ## Put the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

up: setup ## Start Forgearr in the foreground
	$(FORGEARR) up

down: setup ## Stop Forgearr
	$(FORGEARR) down

bench: setup ## Measure, next to peers; writes tests/bench/results
	$(BIN)/python -m tests.bench

docs: setup ## Write docs/settings.md and the table of kinds in docs/jobs.md anew
	$(BIN)/python -m tests.test_docs

migration: setup ## Write a migration: make migration MESSAGE="add teams"
	$(BIN)/python -m cluster.migrations "$(MESSAGE)"

constraints: setup ## Pin exactly what is installed now
	{ echo "# Exact versions of everything that setting up installs. Made by 'make constraints'."; \
	$(BIN)/pip freeze --exclude-editable | sed "s|+cpu||"; } > constraints.txt
	touch .venv/installed

clean: ## Remove everything that can be made again
	rm -rf .venv .state build dist .pytest_cache .ruff_cache .hypothesis
