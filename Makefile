# `make demo` and `make test` do their own set-up, into .venv, the first time and whenever what is installed changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs clean

demo: $(READY)
	$(BIN)/vecattention demo

# A file is one process's, so that what its tests share is made once, and the long files come early, as by name;
# tests/conftest.py shares out the cores.
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out site

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("PYTHON is %d.%d, wanted 3.11 or newer for the pinned packages; make PYTHON=python3.12 ..." % v[:2])'
	@echo "setting up $(VENV): torch and what the demo and the tests need, about 5 GB on disk, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
