# CI runs the same verbs. PYTHON is the interpreter of the environment, CONSTRAINTS the file of pinned versions.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help demo test test-slow chaos test-browser test-proxies promises check protos bench tools tools-labelstudio clean

help:
	@echo "make demo    create .venv, train on boxes of synthetic scenes, serve, label, write one HTML page"
	@echo "make test    run the tests"
	@echo "make tools   install programs that some tests need (as root, from Debian's packages)"
	@echo "make test-browser  test only the playground in Chromium"
	@echo "make test-proxies  test only servers behind HAProxy and nginx"
	@echo "make test-slow     run the slow tests: wheel, container, proxies"
	@echo "make chaos   run load and fault tests in full, with their measurements"
	@echo "make promises  record what the tests of promises measure, and write docs/reliability.md"
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

# Records what tests with a promise measure, in their short forms, and writes the page from it.
promises: $(VENV)/.dev
	@MAL_PROMISES=docs/promises.jsonl $(BIN)/pytest -m promise
	@$(BIN)/python -m tests.repository.reliability_page > docs/reliability.md

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

# Chromium comes from `make tools`, or MAL_CHROMIUM names it.
test-browser: $(VENV)/.dev
	@MAL_REQUIRE_TOOLS=1 $(BIN)/pytest tests/mal_client/playground/test_page.py

test-proxies: $(VENV)/.dev
	@MAL_REQUIRE_TOOLS=1 $(BIN)/pytest -m slow tests/chaos/test_proxied.py

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

# The programs of tests/tools.py, and the tools that read exported files. Without them `make test` skips their tests.
tools: .venv-readers/.pins
	@PYTHON=$(PYTHON) .ci/tools

# An environment of their own, because they pin versions; it takes PyTorch, NumPy and OpenCV from $(VENV). Ultralytics
# would install another OpenCV and what its training needs.
.venv-readers/.pins: Makefile $(VENV)/.dev
	@$(BIN)/python -m venv --clear .venv-readers
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-readers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@.venv-readers/bin/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) labelme
	@.venv-readers/bin/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) --no-deps ultralytics
	@touch $@

# A real Label Studio and a driver for Chromium, for a slow test, in an environment of its own because it pins its versions.
tools-labelstudio: .venv-labelstudio/.pins

.venv-labelstudio/.pins: Makefile
	@test -x .venv-labelstudio/bin/python || $(PYTHON) -m venv .venv-labelstudio
	@.venv-labelstudio/bin/pip install -qq --disable-pip-version-check label-studio==1.23.2 playwright==1.65.2
	@COLLECT_ANALYTICS=false .venv-labelstudio/bin/label-studio init empty --quiet --data-dir .venv-labelstudio/data > /dev/null 2>&1
	@touch $@

clean:
	rm -rf $(VENV) .venv-protos .venv-labelstudio .venv-readers build dist demo_out results *.egg-info .mypy_cache .ruff_cache .pytest_cache
