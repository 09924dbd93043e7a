# `make` or `make help` lists what there is. Everything runs in .venv, which is made on first use and made again only
# when constraints.txt or pyproject.toml change. Needed beforehand: Python 3.10 or newer with its headers (3.11 for the
# pinned versions), a C++17 compiler, pip.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

# What the compiled kernels and the installed package are made from.
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo plot test lint types checks suite build bench format clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo $(VENV)/.kernels  ## make a family of small models, merge it in eight ways, search three more, score all
	@$(BIN)/python -m demo

plot: $(VENV)/.demo $(VENV)/.kernels  ## PCB-Merging's score over density and lambda, on the demo's models, as a picture
	@$(PIP) $(call requirements,plot)
	@$(BIN)/python -m demo.plot_pcb

# Every linter runs, whatever another one found; pytest comes last, so that the output ends with its summary.
test: $(VENV)/.dev $(VENV)/.built  ## linters, type check, repository checks and the whole test suite
	@failed=0; \
	for part in lint types checks suite; do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	if [ "$$failed" != 0 ]; then echo "make test: failed:$${failed#0}" >&2; exit 1; fi

lint: $(VENV)/.dev  ## ruff and clang-format
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs --no-run-if-empty $(BIN)/clang-format --dry-run --Werror || status=1; \
	exit $$status

types: $(VENV)/.dev $(VENV)/.built  ## mypy
	$(BIN)/mypy

checks: $(VENV)/.dev $(VENV)/.built  ## what the repository promises about layers, flags and symbols
	$(BIN)/python -m checks

suite: $(VENV)/.dev $(VENV)/.built  ## the test suite (ARGS="-m 'not slow'" and the like are passed on)
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

build: $(VENV)/.built  ## the environment, with the package and its compiled kernels

bench: $(VENV)/.dev $(VENV)/.built  ## the benchmarks of the ops
	$(BIN)/python -m pytest bench -q --benchmark-only $(ARGS)

format: $(VENV)/.dev  ## lay out all sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs --no-run-if-empty $(BIN)/clang-format -i

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist *.egg-info demo/models demo/models.partial demo/merged bench/data
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastmerge -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say what the environment holds: what the package needs to be built and run, then the demo's and the
# developers' tools on top. The package itself is installed in place and without isolation: the build needs only what
# is there, and is repeated when a source of the kernels changes.
requirements = $$($(BIN)/python -c "import tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    groups = {'run': project['dependencies'], **project['optional-dependencies']}; \
    print(*(need for name in '$(1)'.split() for need in groups[name] if not need.startswith(project['name'])))")

$(VENV)/.base: constraints.txt pyproject.toml
	@echo "environment: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) pip setuptools pybind11
	@$(PIP) $(call requirements,run)
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	@echo "environment: adding what the demo needs"
	@$(PIP) $(call requirements,demo)
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "environment: adding tools, test libraries and peers"
	@$(PIP) $(call requirements,dev test peers)
	@touch $@

# The demo needs the kernels for CPUs. Developers need all: where there is nvcc those for GPUs, which take minutes, and
# the emulator in which the tests run them.
$(VENV)/.kernels: $(VENV)/.base $(SOURCES)
	@echo "fastmerge: compiling the kernels and installing in place"
	@FASTMERGE_CUDA=0 $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.built: $(VENV)/.base $(SOURCES)
	@echo "fastmerge: compiling all kernels and installing in place"
	@FASTMERGE_OBJECTS=$(CURDIR)/build/objects FASTMERGE_CUDA_EMULATED=1 $(PIP) --no-build-isolation --no-deps --editable .
	@touch $(VENV)/.kernels $@
