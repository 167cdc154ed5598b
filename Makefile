# Two commands do all the set-up: `make demo` and `make test`. Both build .venv the first time.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test lint types unit quick shuffled each docs clean

demo: .venv/installed
	$(BIN)/filterfold demo --out runs/demo

test: lint types unit

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

# One thread a process: the workers share the cores, and results do not depend on how many there are.
unit: .venv/installed-dev
	$(PYTEST) -n $(WORKERS) --dist worksteal

# About a minute on two cores, for the inner loop: lint, types and the slow tests are left out.
quick: .venv/installed-dev
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow"

# The tests must pass in any order, and each file alone.
shuffled: .venv/installed-dev
	for seed in 1 2 3; do $(PYTEST) -n $(WORKERS) --shuffle $$seed || exit 1; done

each: .venv/installed-dev
	failed=; for file in $$(find tests -name 'test_*.py' | sort); do \
	  echo "$$file"; $(PYTEST) -q -n 0 "$$file" || failed="$$failed $$file"; \
	done; if [ -n "$$failed" ]; then echo "FAILED alone:$$failed"; exit 1; fi

# The site, in build/docs: start at build/docs/index.html. Runs the notebooks; anything wrong with a page is an error.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Filterfold needs Python 3.11 or newer; set PYTHON=/path/to/it") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[lab]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[dev,zoo,onnx,examples]'
	touch $@ .venv/installed

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@ .venv/installed
