# `make quickstart` and `make test` are all the set-up there is: each creates the environment when it is missing.
# PYTHON names the interpreter that makes it (3.10 to 3.12).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NEWEST := .venv-newest
WHEEL  := .venv-wheel

# A module's tests run in one worker, since many share fixtures that take long to make. A worker that is ended by a test
# that hangs is replaced.
WORKERS ?= 3
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 8

.PHONY: quickstart test test-fast test-long test-newest test-wheel notebooks lint format clean

quickstart: $(STAMP)
	$(BIN)/python -m electra_composer.quickstart

test: $(STAMP)
	$(BIN)/python $(PYTEST) tests

# Less than a minute: the tests that start no program and train no model.
test-fast: $(STAMP)
	$(BIN)/python $(PYTEST) -n 2 --fast tests

# What `test` leaves out: torch's C++ code generator, and the script for a GPU machine.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long tests

# The suite with the newest torch that can be installed, in an environment of its own; Composer's pin is overridden.
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -c 'import sys, torch, composer; print(f"torch {torch.__version__}, Composer {composer.__version__}, Python {sys.version.split()[0]}")'
	$(NEWEST)/bin/python $(PYTEST) tests

# The wheel, in an environment that has nothing else than what it asks for, in a folder away from this one. Its packages
# are downloaded (6.5 GB on disk). FAST=1 installs the wheel alone and takes its dependencies from $(VENV): minutes less,
# but a dependency that pyproject.toml lacks is not noticed.
test-wheel: $(STAMP)
	rm -rf build $(WHEEL)
	$(BIN)/uv build -q --wheel --out-dir $(WHEEL)/dist
	rm -rf build
	$(BIN)/python -m venv $(WHEEL)/environment
	$(BIN)/uv pip install -q --python $(WHEEL)/environment/bin/python $(COMPILE) $(if $(FAST),--no-deps,-c constraints.txt) \
	    $(WHEEL)/dist/*.whl
	$(if $(FAST),$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$($(WHEEL)/environment/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth)
	tests/wheel.sh $(WHEEL)/environment/bin

# Executes the notebooks, in a quarter of an hour, and stores their outputs. SOURCE is the model that the third one starts from.
notebooks: $(STAMP)
	SOURCE=$${SOURCE:-runs/first/export/discriminator} $(BIN)/python notebooks/execute.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs data exports .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build $(NEWEST) $(WHEEL)

# The stamp is written last, so that an interrupted install is repeated. 6.5 GB on disk, mostly CUDA libraries (PyPI has no
# CPU build of torch for Linux). uv installs several times as fast as pip. Where Python may not write bytecode, it is
# compiled now: every start of a program would compile all libraries again.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install -q -c constraints.txt uv && \
	    $(BIN)/uv pip install --python $(BIN)/python $(COMPILE) -c constraints.txt -e '.[dev]'; then :; else \
	    echo 'uv could not be installed or used; installing with pip, which takes some minutes more' >&2; \
	    $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'; fi
	touch $(STAMP)

$(NEWEST)/.installed: $(STAMP)
	$(BIN)/python -m venv --clear $(NEWEST)
	grep -v '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	printf 'torch>=2.7\ntorchvision\n' > $(NEWEST)/override.txt
	$(BIN)/uv pip install --python $(NEWEST)/bin/python $(COMPILE) -c $(NEWEST)/constraints.txt \
	    --override $(NEWEST)/override.txt -e '.[dev]'
	touch $(NEWEST)/.installed
