# `make demo` and `make test` need Python >= 3.10 and, for the compiled kernel, a C++ compiler.
# Everything is installed into .venv, made at first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# a process for each core, of one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
# what the installation is made from; the Python files themselves are installed editable
SOURCES := setup.py pyproject.toml $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

# the compiled kernel with AddressSanitizer and UndefinedBehaviorSanitizer, in builds of their own
SANITIZERS := -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
FUZZ_RUNS ?= 4000
FUZZ_CXX ?= clang++

.PHONY: demo bench test test-long coverage docs test-versions test-install lint wheel dist hub-kernel sanitize fuzz compile-gpu clean

# what the energy does to features, to a real network and to its checkpoints, into out/
demo: $(INSTALLED)
	$(BIN)/python -m bench demo $(ARGS)

# everything beside its peers, into bench/results and the documents; ARGS="sweep --quick" for a part
bench: $(INSTALLED)-bench
	$(BIN)/python -m bench $(or $(ARGS),all)

test: lint
	$(PYTEST) -m "not long" $(ARGS)

test-long: lint
	$(PYTEST) $(ARGS)

# which lines of Python the quick tests run, in build/coverage/index.html; the compiled kernels are
# not counted, and Triton's run in its interpreter
coverage: $(INSTALLED)
	rm -rf build/coverage && mkdir -p build/coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n auto --maxprocesses 4 --dist worksteal \
		-m "not long" $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

# the site of the documentation, into build/site; broken links and anchors fail
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# the core tests under other versions, each in an environment of its own, into docs/versions.md:
# VERSIONS="2.6.0 2.14.1:python3.13"; ARGS="--tests FILE ..." for others, without the page
test-versions: $(INSTALLED)
	$(BIN)/python -m tools.versions $(VERSIONS) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

# what a release uploads, into dist/, checked: the sdist, and the wheel that was built from it
dist: $(INSTALLED)
	rm -rf build dist
	$(BIN)/pip install --quiet --editable ".[release]"
	$(BIN)/python -m build --outdir dist
ifeq ($(shell uname -s),Linux)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 \
		--wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
endif
	$(BIN)/twine check --strict dist/*

# that installed into clean environments, into docs/versions.md: PYTHONS="python3.10 python3.13"
test-install: dist
	$(BIN)/python -m tools.install $(PYTHONS)

# the package as a kernel of the Hugging Face Hub, into build/hub-kernel
hub-kernel: $(INSTALLED)
	$(BIN)/python -m tools.hub_kernel

# the kernel's tests on a sanitized build
sanitize: $(INSTALLED)
	CFLAGS="$(SANITIZERS)" CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib \
		$(BIN)/pytest -m "not long" $(ARGS) tests/kernels/test_cpu_*.py

# random calls of its C interface, by libFuzzer
fuzz:
	mkdir -p build/fuzz
	for unit in dispatch baseline "avx2 -mavx2 -mfma" \
		"avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma"; do \
		set -- $$unit; name=$$1; shift; \
		$(FUZZ_CXX) -O1 -std=c++17 $(SANITIZERS) -fsanitize=fuzzer-no-link -fno-exceptions \
			-fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast "$$@" \
			-c kernels/cpu/$$name.cpp -o build/fuzz/$$name.o || exit 1; \
	done
	$(FUZZ_CXX) -O1 -std=c++17 $(SANITIZERS) -fsanitize=fuzzer -fopenmp tests/kernels/fuzz_cpu.cpp \
		build/fuzz/*.o -lm -o build/fuzz/fuzz
	build/fuzz/fuzz -runs=$(FUZZ_RUNS) -max_len=64 -len_control=0 -seed=1 -artifact_prefix=build/fuzz/

# every Triton kernel for sm_80, sm_90, sm_100 and gfx942, no GPU needed; ARGS=--small for a part,
# ARGS=--all for every variant
compile-gpu: $(INSTALLED)
	$(BIN)/python -m tools.compile_gpu $(ARGS)

# .venv stays: remove it by hand to install anew
clean:
	rm -rf build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find comhe_ext kernels bench tests tools -name __pycache__ -prune -exec rm -rf {} +

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

# the peers, none of which may change torch
$(INSTALLED)-bench: $(INSTALLED)
	$(BIN)/pip install torch==2.13.0 --editable ".[bench]"
	touch $@
