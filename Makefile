# Everything runs in .venv, which is made on the first call and reused after that.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo federation test check bench clean

demo: $(STAMP)  ## run the main job on the embedded default
	$(BIN)/fedgraft simulate

federation: $(STAMP)  ## the main job again, over real processes with mutual TLS
	$(BIN)/python -m fedgraft_simulations.federation

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP)  ## format, lint, types, import boundaries
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=common:client:server:simulations $(BIN)/lint-imports

bench: $(STAMP)  ## every benchmark; each prints a ratio measured in one run
	$(BIN)/python -m fedgraft_simulations.benchmarks

clean:
	rm -rf .venv runs

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)
