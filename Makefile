PYTHON ?= python3
AGENT_VERSION := $(shell sed -n "s/^ARG HERMES_AGENT_VERSION=//p" Dockerfile)
IMAGE := hermes-agent:$(AGENT_VERSION)
CACHE := .cache
LINTERS := ruff==0.17.6 mypy==2.4.1
# The first engine that answers; without one, `make run` uses the sandbox.
ENGINE ?= $(shell for engine in docker podman; do $$engine info >/dev/null 2>&1 && echo $$engine && break; done)
PYTEST = $(shell $(PYTHON) -c 'import pytest' 2>/dev/null && echo $(PYTHON) || echo $(CACHE)/pytest/bin/python)

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /make \1	/p' Makefile | expand -t 20

.PHONY: run
run: ## run the container: make run ARGS="--version"; an image that is there is not built anew
ifneq ($(ENGINE),)
	@if $(ENGINE) image inspect $(IMAGE) >/dev/null 2>&1 || { mkdir -p $(CACHE) && \
	    echo "make run: building $(IMAGE) with $(ENGINE), once; the build's output is in $(CACHE)/build.log" >&2 && \
	    $(MAKE) --no-print-directory image >$(CACHE)/build.log 2>&1; }; then \
	  exec $(ENGINE) run --rm $(ENGINE_RUN_OPTIONS) -i $$([ -t 0 ] && echo -t) -v hermes-make-run:/opt/data $(IMAGE) $(ARGS); \
	else \
	  echo "make run: $(ENGINE) cannot build the image: $$(grep -v ^make $(CACHE)/build.log | tail -n 1 | cut -c1-200);" \
	    "this runs without it, as \`make run ENGINE=\` does" >&2; \
	  exec $(PYTHON) tests/sandbox.py run -- $(ARGS); \
	fi
else
	@$(PYTHON) tests/sandbox.py run -- $(ARGS)
endif

.PHONY: image
image: ## build the image
	$(ENGINE) build $(if $(findstring podman,$(ENGINE)),--format docker) $(ENGINE_BUILD_OPTIONS) --build-arg HERMES_AGENT_VERSION=$(AGENT_VERSION) -t $(IMAGE) -t hermes-agent .

.PHONY: test
test: ## run the tests; TESTS="-k wrapper" picks some
	@$(PYTHON) -c 'import pytest' 2>/dev/null || [ -x $(CACHE)/pytest/bin/pytest ] || \
	  { $(PYTHON) -m venv $(CACHE)/pytest && $(CACHE)/pytest/bin/pip -q install pytest; }
	@PYTHONDONTWRITEBYTECODE= $(PYTEST) -m pytest tests $(TESTS)

.PHONY: lint
lint: ## look over the code: ruff (format and lint) and mypy, fetched when they are missing
	@[ -x $(CACHE)/lint/bin/mypy ] || { $(PYTHON) -m venv $(CACHE)/lint && $(CACHE)/lint/bin/pip -q --disable-pip-version-check install $(LINTERS); }
	@$(CACHE)/lint/bin/ruff format --check -q .
	@$(CACHE)/lint/bin/ruff check -q .
	@$(CACHE)/lint/bin/mypy --no-error-summary

.PHONY: test-engine
test-engine: ## run the tests that a real image can show, with docker or podman; docs/CONTRIBUTING.md says how to replace what cannot be fetched
	@HERMES_TEST_ENGINE=1 ENGINE=$(ENGINE) $(MAKE) --no-print-directory test

.PHONY: bench
bench: ## measure the boot against what the machine can do; QUICK=1 takes under a minute
	@$(PYTHON) tests/bench.py

.PHONY: clean
clean: ## remove everything that was built or fetched
	rm -rf $(CACHE) .mypy_cache .pytest_cache .ruff_cache __pycache__ tests/__pycache__ tests/docker/__pycache__
