# CI runs the same verbs. PYTHON is the interpreter of the environment, CONSTRAINTS the file of pinned versions.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help demo test test-slow chaos test-browser check protos bench tools-labelstudio clean

help:
	@echo "make demo    create .venv, train on boxes of synthetic scenes, serve, label, write one HTML page"
	@echo "make test    run the tests"
	@echo "make test-slow     run the slow tests: wheel, container, proxies"
	@echo "make test-browser  test the playground in Chromium, which must be installed"
	@echo "make chaos   run load and fault tests in full, with their measurements"
	@echo "make check   format, lint, types, spelling, prose, generated files"
	@echo "make protos  regenerate the gRPC stubs"
	@echo "make bench   measure speed as ratios; writes bench.json"

$(VENV)/.all: pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a few minutes (PyTorch's Linux wheels contain several GB of CUDA libraries; the README states the alternative)"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.all
	@$(PIP) -e '.[all,dev]'
	@touch $@

# The oldest supported grpcio with its stub generator: the stubs are checked and the client is tested against it.
.venv-protos/.pins: protos/generate.sh
	@PYTHON=$(PYTHON) protos/generate.sh --tools
	@touch $@

demo: $(VENV)/.all
	@$(BIN)/python -m deploy.demo

test: $(VENV)/.dev .venv-protos/.pins
	@$(BIN)/pytest -m "not slow"

# Load and fault tests in full: about 45 minutes on two idle cores. MAL_CHAOS_SEED=n sets the seed. Five minutes of them are
# all faults at random; MAL_SOAK_S=3600 extends them to an hour.
chaos: $(VENV)/.dev
	@MAL_CHAOS=full $(BIN)/pytest -s tests/chaos

test-slow: $(VENV)/.dev .venv-protos/.pins
	@$(BIN)/pytest -m slow

# Chromium comes from the system (`apt-get install chromium`), or MAL_CHROMIUM names it.
test-browser: $(VENV)/.dev
	@$(PIP) -e '.[all,dev,browser]'
	@$(BIN)/pytest tests/mal_client/playground/test_page.py

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m tests.repository.prose
	PYTHON=$(PYTHON) protos/generate.sh --check

protos:
	PYTHON=$(PYTHON) protos/generate.sh

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks --json bench.json

# A real Label Studio and a driver for Chromium, for a slow test, in an environment of its own because it pins its versions.
tools-labelstudio: .venv-labelstudio/.pins

.venv-labelstudio/.pins: Makefile
	@test -x .venv-labelstudio/bin/python || $(PYTHON) -m venv .venv-labelstudio
	@.venv-labelstudio/bin/pip install -qq --disable-pip-version-check label-studio==1.23.2 playwright==1.65.2
	@COLLECT_ANALYTICS=false .venv-labelstudio/bin/label-studio init empty --quiet --data-dir .venv-labelstudio/data > /dev/null 2>&1
	@touch $@

clean:
	rm -rf $(VENV) .venv-protos .venv-labelstudio build dist demo_out results *.egg-info .mypy_cache .ruff_cache .pytest_cache
