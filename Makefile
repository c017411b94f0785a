# make demo   install, then align the embedded model end to end (no network needed after the install)
# make test   install, then run every test this machine can run
# make lint   ruff (rules and format), mypy, and pip-audit where its service can be reached
# make bench  kernel benchmarks against the peers of the `bench` extra
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PYTHONUNBUFFERED = 1

.PHONY: demo test lint format bench clean

# One stamp an extra: the install is redone only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python -m bdpo_pl.fit

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.kernels

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
