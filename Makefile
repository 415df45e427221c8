# `make quickstart` and `make test` are all the set-up there is: each creates the environment when it is missing.
# PYTHON names the interpreter that makes it (3.10 to 3.12).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart test test-long lint format clean

quickstart: $(STAMP)
	$(BIN)/python -m electra_composer.quickstart

# A file's tests go to one process, since many share what takes long to make.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 tests

# What `test` leaves out: torch's C++ code generator, and the script for a GPU machine.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs data exports .pytest_cache .mypy_cache .ruff_cache

# The stamp is written last, so that an install that was cut off is done again. 6.5 GB on disk, mostly CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(STAMP)
