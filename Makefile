# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs, once, in
# .venv: the pinned dependencies, the package in place, its compiled modules.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=

# A machine without a compiler should be an error here, not a slow demo.
export LOSSOPS_BUILD ?= cpu
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH  # another checkout must not be tested in the place of this one

sources := $(wildcard csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
cuda_sources := $(wildcard csrc/cuda/* $(addprefix tests/emulator/,*.h *.cpp *.cu programs/*))
built := .venv/built-$(LOSSOPS_BUILD)
# Threads that wait for work leave the processor to the other process.
waiting := OMP_WAIT_POLICY=passive
# The demo runs on a CPU and does not wait for these.
cuda := $(if $(shell command -v nvcc),.venv/built-cuda)

.PHONY: help demo test test-compiled test-emulator test-interpreter gpu-check lint format build clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(built)  ## Train a small language model, lossops beside plain PyTorch; ARGS="..." for options
	lossops-bench demo $(ARGS)

test: $(built) $(cuda)  ## Run the test suite; ARGS="-k name" or any other pytest options
	$(waiting) pytest $(or $(ARGS),--numprocesses 2 --dist loadfile)
	$(if $(ARGS),,$(MAKE) test-interpreter test-compiled test-emulator)

test-interpreter: $(built)  ## Run the GPU kernels in an interpreter that checks their memory
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 pytest --numprocesses 2 tests/interpreter

test-compiled: $(built) $(cuda)  ## Compile the GPU kernels for every architecture, within their budgets
	pytest tests/compiled

test-emulator: $(built)  ## Run the CUDA kernels on the CPU, which checks their memory and threads
	OMP_NUM_THREADS=1 pytest tests/emulator

gpu-check: $(built) $(cuda)  ## Tests, memory checker and timings on a GPU, into gpu-check.txt
	lossops-bench gpu-check

lint: .venv/dependencies  ## Check style, format and types
	ruff check
	ruff format --check
	mypy
	clang-format --dry-run -Werror $(sources) $(cuda_sources)

format: .venv/dependencies  ## Format the Python and C++ sources
	ruff check --fix
	ruff format
	clang-format -i $(sources) $(cuda_sources)

build: $(built) $(cuda)  ## Set up .venv and build the compiled parts in place

clean:  ## Remove everything that was set up or built
	rm -rf .venv build dist *.egg-info lossops/_cpu_*.so lossops/_cuda*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/dependencies: requirements-dev.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

# The package in place and the command lossops-bench; the modules are built below, where ninja
# compiles again only what has changed.
.venv/package: pyproject.toml .venv/dependencies
	LOSSOPS_BUILD=none python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(built): setup.py lossops/switches.py $(sources) .venv/package
	rm -f .venv/built-* lossops/_cpu_*.so
	python setup.py --quiet build_ext --inplace
	touch $@

.venv/built-cuda: $(built) $(wildcard csrc/cuda/* csrc/*.h)
	rm -f lossops/_cuda*.so
	LOSSOPS_BUILD=cuda python setup.py --quiet build_ext --inplace
	touch $@
