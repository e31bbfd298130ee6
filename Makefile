# Everything from a fresh clone: `make demo` and `make test` set up what they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint slow docs wheel bench clean
help:
	@echo "make demo   set up, train five rows on real text, compare them, write a report (8 minutes)"
	@echo "make test   set up and run the tests (10 minutes on 2 cores)"
	@echo "make lint   format, style, types and the import rule"
	@echo "make slow   the tests that take long"
	@echo "make docs   build the documentation into site/"
	@echo "make wheel  build a wheel into dist/, to be installed anywhere with pip"
	@echo "make bench  the CPU benchmarks against transformers' own classes"

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.done: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

.venv/test.done: .venv/demo.done
	$(PIP) -e ".[test,dev]"
	touch $@

demo: .venv/demo.done
	$(BIN)/subquad arena --out runs/demo

test: .venv/test.done
	$(BIN)/python -m pytest

slow: .venv/test.done
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: .venv/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/demo.done
	$(PIP) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

wheel: .venv/bin/python
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

bench: .venv/test.done
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist site
