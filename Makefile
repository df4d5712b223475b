# make demo   install, distil the embedded Fashion-MNIST, show the table and the report's path
# make test   install, lint, types, all tests that need no GPU
# make soak   a run whose processes are killed at random for minutes, and which must give the same bytes
# make clean  forget the demo's results (keeps .venv)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test soak lint unit clean

demo: $(INSTALLED)
	$(BIN)/ims3 distill --config demo

# One pytest per floor: the Ray of tests/ray is gone before tests/e2e starts its own. One thread for each process: several
# processes run at once, and threads that wait for a core that another process has would stall all others of their process.
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -m "not gpu and not soak" tests/unit
	$(BIN)/python -m pytest -m "not gpu and not soak" tests/ray
	$(BIN)/python -m pytest -m "not gpu and not soak" tests/e2e

soak: export OMP_NUM_THREADS := 1
soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak tests/e2e

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit

# torch goes first: with it in place, whichever build it is, no requirement below fetches another.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep -o 'torch==[0-9.]*' pyproject.toml | head -n 1)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf runs
