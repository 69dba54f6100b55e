# SPDX-License-Identifier: Apache-2.0
# The ways in: `make demo` generates text, `make test` runs the tests. Both first make the environment .venv.
#
#   PYTHON=python3.12   another interpreter (3.10 or later)
#   VENV=.venv          another place for the environment
#   TORCH_INDEX=URL     package index for torch, where it has to be installed
#   PIP_FLAGS="..."     more options for installing m2n itself, as: --no-deps
#   M2N_CUDA=OFF        ON, OFF or AUTO: compile for CUDA
#   GPU_FLAGS="..."     for `make gpu`, as: --output DIR

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?=
export PYTHON VENV TORCH_INDEX PIP_FLAGS
# Where it is set every process that imports torch compiles its sources anew: seconds, a hundred times in all tests.
unexport PYTHONDONTWRITEBYTECODE

# Relative paths throughout: make cannot handle a space in the path of the repository.
SOURCES := pyproject.toml CMakeLists.txt constraints-cpu.txt .ci/install $(sort $(shell find csrc bindings benchmarks/contenders/native -type f))
CXX_FILES := $(sort $(shell find csrc bindings benchmarks tests examples -name "*.h" -o -name "*.cc" -o -name "*.cu"))
PYTHON_PATHS := m2n reference_model benchmarks tests examples
# The extra `test` contains `model`: where it is installed, the demo needs nothing more.
DEMO_READY := $(if $(wildcard $(VENV)/.installed-test),$(VENV)/.installed-test,$(VENV)/.installed-model)
BIN := "$(VENV)/bin"

.PHONY: help demo test test-all test-fast lint format gpu checkpoint clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

demo: $(DEMO_READY)  ## text from two attention and two expert processes
	$(BIN)/m2n-generate --attention-ranks 2 --expert-ranks 2 --microbatches 2 --max-new-tokens 64 \
	  --prompt "And it came to pass" --prompt "And the LORD said unto Moses"

# Two files at once: most tests wait, for processes to start, a compiler, a model checker.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)
test: $(VENV)/.installed-test  ## the tests, the fast ones first (under six minutes on two cores)
	$(PYTEST) -m "not slow or essential"

test-all: $(VENV)/.installed-test  ## all tests: those of `make test`, then the other slow ones (about 14 minutes)
	@$(MAKE) test; first=$$?; $(PYTEST) -m "slow and not essential" && exit $$first

test-fast: $(VENV)/.installed-test  ## tests without the marker `slow` (about four minutes)
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-test  ## ruff, clang-format, mypy
	$(BIN)/ruff check $(PYTHON_PATHS)
	$(BIN)/ruff format --check --quiet $(PYTHON_PATHS)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.installed-test  ## rewrites the sources in the house style
	$(BIN)/ruff check --fix $(PYTHON_PATHS)
	$(BIN)/ruff format $(PYTHON_PATHS)
	$(BIN)/clang-format -i $(CXX_FILES)

# With what is installed: a machine with a GPU may reach no package index.
gpu:  ## on a machine with a GPU: builds, tests, checks and measures (under 9 minutes); elsewhere it compiles
	$(if $(wildcard $(VENV)/bin/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu/suite.py $(GPU_FLAGS)

CHECKPOINT ?= build/kjv-moe
checkpoint: $(DEMO_READY)  ## trains the checkpoint that ships, anew, into CHECKPOINT=build/kjv-moe (an hour)
	$(BIN)/python -m m2n.reference_model.training.train --output "$(CHECKPOINT)-base" --minutes 50
	$(BIN)/python -m m2n.reference_model.training.train --init "$(CHECKPOINT)-base" --output "$(CHECKPOINT)" --minutes 9 \
	  --learning-rate 8e-4 --warmup-steps 5 --loop-rows 8 --seed 1 --log-every 10 --save-minutes 60
	$(BIN)/python -m m2n.reference_model.training.train --evaluate "$(CHECKPOINT)"

clean:  ## removes the environment and everything built
	rm -rf "$(VENV)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Sources in C++ are built at installation; Python sources are used where they lie.
$(VENV)/.installed-%: $(SOURCES)
	@bash .ci/install "$*"
	@touch "$@"
