# Each target sets up $(VENV) on first use, and again when pyproject.toml or constraints-cpu.txt change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help evolve test lint docs soak setup clean

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
KILLS ?= 200
SEED ?= 0
TORCH_INDEX ?=

# The driver says up to which CUDA version it goes; no driver, no GPU.
ifndef EXTRA
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9]*\).*/\1/p' | head -n 1)
EXTRA := $(if $(CUDA),$(if $(filter 12,$(CUDA)),cuda12,cuda13),cpu)
endif

UV := $(shell command -v uv 2>/dev/null)
ifdef UV
INSTALL := $(UV) pip install --quiet --python $(VENV)/bin/python --index-strategy unsafe-best-match \
  $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
else
INSTALL := $(VENV)/bin/python -m pip install -qq --no-input --disable-pip-version-check
endif
INSTALL += $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CONSTRAINTS := $(if $(filter cpu,$(EXTRA)),--constraint constraints-cpu.txt)
STAMP := $(VENV)/.ready-$(EXTRA)

# The environment is $(VENV) alone: nothing of the user's gets in, and nothing of ours gets out.
export PYTHONNOUSERSITE := 1
export PIP_USER := 0
unexport PYTHONPATH VIRTUAL_ENV

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: ARGS= for the command, JOBS=$(JOBS) tests at a time, PYTHON=$(PYTHON), VENV=$(VENV), EXTRA=$(EXTRA) (or cpu, cuda12, cuda13),"
	@echo "             KILLS=$(KILLS) and SEED=$(SEED) of the soak,"
	@echo "             TORCH_INDEX= an index of torch builds to look in as well"

evolve: $(STAMP)  ## run the main job: engine evolve $(ARGS)
	@$(VENV)/bin/engine evolve $(ARGS)

test: $(STAMP)  ## run the tests: pytest $(ARGS)
	@$(VENV)/bin/python -m pytest $(if $(ARGS),$(ARGS),--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder)

lint: $(STAMP)  ## ruff's rules and format, then strict types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy engine kernels

docs: $(STAMP)  ## build the documents into site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

soak: $(STAMP)  ## kill searches $(KILLS) times at random moments; each must end as if nothing had been
	@OMP_NUM_THREADS=1 $(VENV)/bin/python tests/soak.py --kills $(KILLS) --seed $(SEED) $(ARGS)

setup: $(STAMP)  ## only set up the environment

clean:  ## delete the environment, caches and build results; runs and shards stay
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find engine kernels recipes tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints-cpu.txt
	@rm -f $(VENV)/.ready-*
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is missing or older than Python 3.11; name another with PYTHON=" >&2; exit 1; }
	@$(VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
	@echo "make: setting up $(VENV) for '$(EXTRA)': $(if $(CONSTRAINTS),3 GB and a few minutes,10 GB and ten minutes or more), once; nothing is printed meanwhile"
	@SECONDS=0; $(INSTALL) $(CONSTRAINTS) --editable '.[$(EXTRA),dev]' \
	  || { echo "make: the set-up failed, and will be tried again by the next make." >&2; \
	       echo "make: if torch's version could not be met: TORCH_INDEX= takes the address of an index of torch builds; see CONTRIBUTING.md" >&2; \
	       exit 1; }; echo "make: ready after $$SECONDS s"
	@touch $@
