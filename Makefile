# make quickstart   train, evaluate and search a miniature on real data; report in runs/quickstart
# make compare      the same, and what stage 1 is worth (several times as long)
# make test         the test suite
# make bench        benchmarks into benchmarks/results/, and docs/performance.md from them
# make bench-smoke  the same on tiny sizes, into runs/: does everything run?
# make gpu          on a machine with a GPU, in ten minutes: build, test, measure; into runs/gpu
# make sanitize     the tests of the native kernels under address and undefined-behaviour sanitizers
# make cuda         the CUDA kernels for three architectures, no GPU needed: no warnings, no spills
# make lint         ruff, mypy and clang-format
#
# DOCS=folder       use a folder of HTML pages instead of the Debian packages
# ARGS="key=value"  settings of `moca quickstart`, e.g. ARGS="output=runs/again seed=1"; options of
#                   pytest for test and bench, e.g. ARGS="-k attention"
#                   for gpu, those of python -m benchmarks.gpu, e.g. ARGS="--stage bench"
# OUT=folder        of the results of make gpu
# NAME=machine      the file of `make bench` in benchmarks/results/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt .ci/constraints.txt $(shell find csrc -type f)
# sentence-transformers' image processors want torchvision, whose wheel does not import beside a CPU
# build of torch: it is kept out of the environment, and the one test that needs it says where it is.
TORCHVISION := .cache/torchvision

# nvcc of these versions, outside the environment: torch's own packages may want others.
NVCC := .cache/nvcc
# CUDA kernels are only compiled where there is a GPU to run them; where nvcc is, setup.py finds it.
export MOCA_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),,0)

BENCH := $(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,rounds
NAME ?= latest

# Training on CPUs is faster with tcmalloc, and its memory does not grow (moca/quickstart/allocator.py).
PRELOAD_TCMALLOC = LD_PRELOAD="$$($(BIN)/python -m moca.quickstart.allocator)"

.PHONY: quickstart compare test bench bench-smoke gpu sanitize cuda lint clean

quickstart: $(VENV)/.quickstart
	$(PRELOAD_TCMALLOC) $(BIN)/moca quickstart $(if $(DOCS),"docs=$(DOCS)") $(ARGS)

compare: $(VENV)/.quickstart
	$(PRELOAD_TCMALLOC) $(BIN)/moca quickstart output=runs/compare compare=true $(if $(DOCS),"docs=$(DOCS)") $(ARGS)

test: $(VENV)/.test $(TORCHVISION)
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.test
	$(BENCH) --benchmark-json=benchmarks/results/$(NAME).json $(ARGS)
	$(BIN)/python -m benchmarks.report

bench-smoke: $(VENV)/.test
	mkdir -p runs
	$(BENCH) --size tiny --peers --benchmark-json=runs/bench-smoke.json $(ARGS)
	$(BIN)/python -m benchmarks.report runs/bench-smoke.json --output=runs/bench-smoke.md

# With whatever Python and packages the machine has: nothing is fetched, and no environment made.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--output=$(OUT)) $(ARGS)

# Tests of another build than the installed one; tests/conftest.py refuses to run on any other.
tested = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(1) PYTEST_ADDOPTS="-o pythonpath=$(CURDIR)/$(1)"

# Python must load the sanitizers' runtimes first, and libstdc++ for them to see exceptions. Torch
# and Python never free some things, so leaks are not looked for.
PRELOAD = $(foreach lib,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(lib)))
SANITIZED = env $(call tested,build/sanitize/lib) LD_PRELOAD="$(PRELOAD)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive
sanitize: $(VENV)/.test
	$(PIP) cmake ninja pybind11 setuptools
	$(BIN)/cmake --preset sanitize -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build --preset sanitize
	$(BIN)/python setup.py --quiet build_py --build-lib build/sanitize/lib
	for isa in $$($(SANITIZED) $(BIN)/python -c "from moca_fast import _C; print(*_C.supported_isas())"); do \
	  echo "== $$isa"; \
	  MOCA_CPU_ISA=$$isa $(SANITIZED) $(BIN)/pytest -q -m kernel -k "not reference" tests/ops || exit 1; \
	done

# ptxas gives notice, but no warning, where it makes products of a warpgroup wait for one another.
CUDA_TESTS := tests/packaging tests/ops/test_dispatch.py
cuda: SHELL := bash
cuda: .SHELLFLAGS := -o pipefail -c
cuda: $(VENV)/.test $(NVCC)/.nvcc
	$(PIP) cmake ninja pybind11 setuptools
	CUDACXX=$(abspath $(NVCC))/nvidia/cu13/bin/nvcc $(BIN)/cmake --preset cuda \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build --preset cuda 2>&1 | tee build/cuda/build.log
	! grep -E "instructions are serialized|warpgroup.wait is injected" build/cuda/build.log
	$(BIN)/python setup.py --quiet build_py --build-lib build/cuda/lib
	env $(call tested,build/cuda/lib) $(BIN)/pytest -q $(CUDA_TESTS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build runs

$(VENV)/.torch: .ci/constraints.txt
	@echo "== virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

# Installing builds the native kernels: it is done again when a source of theirs has changed.
$(VENV)/.quickstart: $(VENV)/.torch $(SOURCES)
	@echo "== packages and native kernels (a few minutes the first time)"
	$(PIP) --editable ".[quickstart]"
	@touch $@

$(VENV)/.test: $(VENV)/.quickstart
	@echo "== packages for the tests"
	$(PIP) --editable ".[test]"
	@touch $@

$(TORCHVISION): $(VENV)/.torch
	@echo "== torchvision for one test, outside the environment"
	$(PIP) --no-deps --target $@ torchvision==0.28.0

$(NVCC)/.nvcc: $(VENV)/.torch .ci/nvcc.txt
	@echo "== nvcc in $(NVCC) (100 MB)"
	$(PIP) --no-deps --upgrade --target $(NVCC) --requirement .ci/nvcc.txt
	@touch $@
