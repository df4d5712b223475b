# make demo   install, distil the embedded Fashion-MNIST, show the table and the report's path
# make test   install, lint, types, the tests that need no GPU and not minutes each
# make soak   the tests that take minutes: killed processes, growing clusters, whole comparisons and searches
# make kills  those of them in which a process is killed, a command is ended or a node goes away
# make docs   the pages of docs/ as a site, in site/
# make clean  forget the demo's results (keeps .venv)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two processes, where the tests of one would leave a core idle. The tests of tests/ray use both cores by themselves.
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: demo test soak kills lint unit docs clean

demo: $(INSTALLED)
	$(BIN)/ims3 distill --config demo

# One pytest per floor: the Ray of tests/ray is gone before tests/e2e starts its own. One thread for each process: several
# processes run at once, and threads that wait for a core that another process has would stall all others of their process.
test soak kills unit: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -m "not gpu" $(SIDE_BY_SIDE) tests/unit
	$(BIN)/python -m pytest -m "not gpu and not slow" tests/ray
	$(BIN)/python -m pytest -m "not gpu and not slow" $(SIDE_BY_SIDE) tests/e2e

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/ray
	$(BIN)/python -m pytest -m slow tests/e2e

kills: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -k "kill or signals" tests/ray
	$(BIN)/python -m pytest -m slow -k "kill or signals" tests/e2e

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/unit

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --quiet

# torch goes first: with it in place, whichever build it is, no requirement below fetches another.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$$($(PYTHON) --version) is not among 3.11 to 3.13; name another, as in make demo PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q ims3_ray  # as pip does for packages that are not editable: every worker would do it again
	touch $@

clean:
	rm -rf runs
