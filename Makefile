# The two commands: `make study` runs the main job on the bundled model, `make test` runs the tests.
# Both need only Python >= 3.11; they make .venv and install everything into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRA := $(VENV)/.installed-extra
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: study test test-extra mutants check install clean
study: $(STAMP)
	$(BIN)/demur study

test: $(STAMP)
	$(PYTEST)

# What `make test` leaves out: slow tests (long commands of the docs among them), and those that need SAELens or
# lm-evaluation-harness (installed here).
test-extra: $(EXTRA)
	$(PYTEST) --slow -m "slow or saelens or eval"

# Which changes of the code no test notices (hours; `.venv/bin/mutmut results` lists them).
mutants: $(EXTRA)
	OMP_NUM_THREADS=1 $(BIN)/mutmut run

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "demur needs Python >= 3.11; say which: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "installing demur into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

$(EXTRA): $(STAMP)
	$(PIP) -e '.[dev,saelens,eval]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
