# `make demo` and `make test` need Python >= 3.10 and, for the compiled kernel, a C++ compiler.
# Everything is installed into .venv, made at first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# what the installation is made from; the Python files themselves are installed editable
SOURCES := setup.py pyproject.toml $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inc)

.PHONY: demo test test-long lint wheel clean

# how it regularizes a real network, and the operator against naive PyTorch; ARGS=--save keeps the
# numbers and puts them into README.md
demo: $(INSTALLED)
	$(BIN)/python bench/demo.py $(ARGS)

test: lint
	$(BIN)/pytest -m "not long" $(ARGS)

test-long: lint
	$(BIN)/pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

# .venv stays: remove it by hand to install anew
clean:
	rm -rf build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find comhe_ext kernels bench tests -name __pycache__ -prune -exec rm -rf {} +

# torch first, in the version the package asks for, so that nothing else chooses another; Triton,
# which exists for Linux alone, without the rest: its kernels are compiled and interpreted in tests
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
ifeq ($(shell uname -s),Linux)
	$(BIN)/pip install --no-deps triton==3.7.1
endif
	$(BIN)/pip install --editable ".[dev,demo]"
	touch $@
