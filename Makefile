# One verb each; CI runs the same verbs. PYTHON picks the interpreter for the environment, CONSTRAINTS the pinned versions.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help demo test test-slow chaos test-browser check protos bench tools-labelstudio clean

help:
	@echo "make demo    environment, synthetic scenes, training from boxes, server, masks, one HTML page"
	@echo "make test    the whole test suite"
	@echo "make test-browser  the page in Chromium, which the system has to have"
	@echo "make chaos   load and faults in full, with figures"
	@echo "make check   format, lint, types, spelling, prose, generated files"
	@echo "make protos  regenerate the gRPC stubs"
	@echo "make bench   the speed figures, as ratios; also into bench.json"

$(VENV)/.all: pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a few minutes (PyTorch's Linux wheels bring several GB of CUDA libraries; the README says how to avoid them)"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.all
	@$(PIP) -e '.[all,dev]'
	@touch $@

# The oldest grpcio we support, with the stub generator: stubs are checked, and the client is tried, against it.
.venv-protos/.pins: protos/generate.sh
	@PYTHON=$(PYTHON) protos/generate.sh --tools
	@touch $@

demo: $(VENV)/.all
	@$(BIN)/python -m deploy.demo

test: $(VENV)/.dev .venv-protos/.pins
	@$(BIN)/pytest -m "not slow"

# Load and faults in their full form, all of them whatever fails: about 45 minutes on two quiet cores. Seeds: MAL_CHAOS_SEED=n.
# Five minutes of them are all faults at random; MAL_SOAK_S=3600 makes an hour of it.
chaos: $(VENV)/.dev
	@MAL_CHAOS=full $(BIN)/pytest -s tests/chaos

test-slow: $(VENV)/.dev .venv-protos/.pins
	@$(BIN)/pytest -m slow

# The pages in a real browser: Chromium comes from the system (`apt-get install chromium`), or MAL_CHROMIUM names one.
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

# A real Label Studio and a driver for Debian's Chromium, for a slow test; it pins its own versions, so it lives apart.
tools-labelstudio: .venv-labelstudio/.pins

.venv-labelstudio/.pins: Makefile
	@test -x .venv-labelstudio/bin/python || $(PYTHON) -m venv .venv-labelstudio
	@.venv-labelstudio/bin/pip install -qq --disable-pip-version-check label-studio==1.23.2 playwright==1.65.2
	@COLLECT_ANALYTICS=false .venv-labelstudio/bin/label-studio init empty --quiet --data-dir .venv-labelstudio/data > /dev/null 2>&1
	@touch $@

clean:
	rm -rf $(VENV) .venv-protos .venv-labelstudio build dist demo_out results *.egg-info .mypy_cache .ruff_cache .pytest_cache
