# make demo   set up, then build nano in FP8 and INT8, and run it
# make check  set up, then lint, types and the quick tests (under two minutes)
# make test   set up, then lint, types and all tests
# make setup  the environment alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := cpu,rtx,quant,serve,datasets,embed,video,faiss,train,plots,eval,dev

# Bytecode is written, in every environment: without it each of two workers and of many processes that
# tests start compiles the package and rewrites every assertion again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo check test lint types clean

setup: $(READY)

# The link lets mypy see the package under its own name, for any name of this folder.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/ivl_export
	touch $(READY)

demo: setup
	$(BIN)/ivl-export build --precision fp8 --targets sm89 --out bundles/internvl-nano-fp8
	$(BIN)/ivl-export build --precision int8-smoothquant --targets sm89 --out bundles/internvl-nano-int8
	$(BIN)/ivl-export train scenes bundles/scenes --count 6 --force
	$(BIN)/ivl-export run caption bundles/internvl-nano-fp8 bundles/scenes
	$(BIN)/ivl-export profile bundles/internvl-nano-fp8 --batch 1,8 --seconds 0.3

check: setup lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow" --hypothesis-profile quick

test: setup lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	MYPYPATH=$(VENV)/typing $(BIN)/mypy -p ivl_export

clean:
	rm -rf $(VENV) bundles runs .pytest_cache .mypy_cache .ruff_cache
