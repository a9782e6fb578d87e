# make demo   two rounds of the loop, and a report       make test   linters, types and all tests
# make bench  the ops beside their baselines and limits    make clean  remove what these made
#
# Each makes a virtual environment under the checkout if there is none, and installs and builds only
# what changed since. A plain `torch` would bring gigabytes of CUDA: TORCH names the one to install.

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
SOURCES := setup.py $(shell find csrc build_cuda -type f -not -name '*.pyc')
CXX_SOURCES := $(shell find csrc python_tests/csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test lint bench build clean

demo: build
	$(BIN)/fastagg demo --out demo-out

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

bench: build
	OMP_WAIT_POLICY=passive $(BIN)/fastagg bench --out bench-out

build: $(VENV)/built

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    "setuptools>=77" wheel ninja numpy "pybind11>=2.13"
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-out bench-out *.egg-info fastagg/*.so
