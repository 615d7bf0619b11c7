# Two commands on a fresh clone with Python 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUANTISED := $(VENV)/.quantised
# Tests keep to one thread each; every worker needs about 1 GB.
WORKERS ?= 2

.PHONY: demo test test-lowest parity benchmarks-quick lint typecheck install clean

demo: install
	$(BIN)/peft-sae demo --output outputs/demo

test: install $(QUANTISED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The table of what LoRA and SAE_SUBSPACE can do.
parity: install $(QUANTISED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/parity --parity-table docs/parity.md

# Whether the benchmarks' machinery works, on small models; the numbers mean nothing.
benchmarks-quick: install
	$(BIN)/python -m benchmarks.safety.run --quick --folder outputs/quick/bases --output outputs/quick/safety
	$(BIN)/python -m benchmarks.recovery.run --quick --output outputs/quick/recovery

# The lower bounds that pyproject.toml claims, in an environment of their own.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints-lowest.txt)
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e . pytest pytest-xdist hypothesis
	HF_HUB_OFFLINE=1 $(VENV)-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m 'not demo'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: install
	$(BIN)/mypy

install: $(STAMP)

# torch comes first and by its exact version: an unpinned one brings gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Packages that only tests need, and that have much to say wherever PEFT finds them.
$(QUANTISED): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,quantised,paper]'
	touch $(QUANTISED)

clean:
	rm -rf $(VENV) $(VENV)-lowest outputs
