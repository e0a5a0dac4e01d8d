# Foveate. `make demo` is the first thing to run; `make test` is what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL ?= smollm2
TOKENS ?= 7000
SAMPLES ?= 2

.PHONY: demo test eval-smoke lint types check benchmarks clean install install-dev

demo: install
	@command -v $${CXX:-g++} >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || \
	  echo "No C++ compiler found: the compiled backend (flex) is off and the slower torch backend runs instead."
	$(BIN)/foveate compare --model $(MODEL) --tokens $(TOKENS) --report report --json report/compare.json

test: install-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# A look at quality: SmolLM2, dense beside one recipe, four tasks. Two samples take about 7 minutes on two AVX2 cores, five
# (SAMPLES=5) about 14; the folder eval-smoke can be resumed.
eval-smoke: install-dev
	$(BIN)/foveate eval --model $(MODEL) --recipes minference@8k --suites needle_word,passkey,kv_retrieval,vt \
	  --lengths 2048,4096 --samples $(SAMPLES) --looks 1 --rounds 1 --out eval-smoke
	$(BIN)/foveate frontier --out eval-smoke

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

check: lint types test

# README.md's tables, BENCHMARKS.md and docs/methods, from the registry and benchmarks/results/*.json
benchmarks: install-dev
	$(BIN)/python scripts/render.py
	$(BIN)/python scripts/pages.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Foveate needs Python 3.11 or newer; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml requirements/constraints.txt requirements/data.txt
	$(PIP) install -q --no-warn-conflicts -c requirements/constraints.txt -e '.[demo]'
	$(PIP) install -q --no-warn-conflicts --no-deps -r requirements/data.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q --no-warn-conflicts -c requirements/constraints.txt -e '.[demo,dev,eval]'
	@touch $@

clean:
	rm -rf $(VENV) report eval-smoke build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
