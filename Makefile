# make quickstart   train, evaluate and search a miniature on real data; report in runs/quickstart
# make compare      the same, and what stage 1 is worth (several times as long)
# make test         the test suite
# make lint         ruff, mypy and clang-format
#
# DOCS=folder       use a folder of HTML pages instead of the Debian packages
# ARGS="key=value"  settings of `moca quickstart`, e.g. ARGS="output=runs/again seed=1"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt .ci/constraints.txt $(shell find csrc -type f)
# sentence-transformers' image processors want torchvision, whose wheel does not import beside a CPU
# build of torch: it is kept out of the environment, and the one test that needs it says where it is.
TORCHVISION := .cache/torchvision

.PHONY: quickstart compare test lint clean

quickstart: $(VENV)/.quickstart
	$(BIN)/moca quickstart $(if $(DOCS),docs=$(DOCS)) $(ARGS)

compare: $(VENV)/.quickstart
	$(BIN)/moca quickstart output=runs/compare compare=true $(if $(DOCS),docs=$(DOCS)) $(ARGS)

test: $(VENV)/.test $(TORCHVISION)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

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
