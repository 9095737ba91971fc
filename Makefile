PYTHON ?= python3
PYDVL_PYTHON ?= $(PYTHON)
SOURCE ?= packaged
NOTEBOOK ?=
PORT ?= 8000

BIN := .venv/bin
READY := .venv/installed
PEERS := .venv/peers
PYDVL := .venv-pydvl/installed
DOCS := .venv/docs
BROWSER := .venv/browser

# Tests are many and small, and leave a second core idle: a process for each.
SIDE_BY_SIDE := --numprocesses=logical --maxprocesses=4

# Fitted factors are kept inside the clone, so that a fresh clone starts from nothing.
export SUPPORT_CACHE := $(CURDIR)/build/cache
# Searched before a kernel of the same name that the user may have installed elsewhere.
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter

.PHONY: chromium help notebooks execute test test-code test-notebooks test-browser docs docs-serve port bench lint lab clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

notebooks: $(READY) ## run all notebooks into build/notebooks (CI=1: small sizes; SOURCE=hub)
	$(BIN)/python -m experiments.collection $(if $(filter 1,$(CI)),--ci) --source $(SOURCE)

# From an empty cache: a bar of work that was not done would be missing from the stored output.
execute: $(READY) ## execute the committed notebooks in place (NOTEBOOK=notebooks/…: only that one)
	rm -rf build/cache
	$(BIN)/python -m experiments.collection --in-place $(NOTEBOOK)

test: lint test-code test-notebooks test-browser ## all four: lint, unit tests, notebooks in CI mode, browser

test-code: $(PEERS) ## the unit tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist=worksteal

test-notebooks: $(READY) ## the notebooks at small size
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) --nbmake --nbmake-timeout=900 notebooks/

test-browser: docs $(BROWSER) ## the site and JupyterLab in a headless Chromium
	@command -v chromium >/dev/null || $(MAKE) --no-print-directory chromium
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist=worksteal browser

# Debian's; the ones that test tools download are not needed.
chromium:
	@command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] || { echo "Chromium is missing. Install the package chromium (as root: apt-get install chromium), then go on." >&2; exit 1; }
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium

docs: $(DOCS) ## build/html from the committed outputs, with the API reference
	$(BIN)/python -m sphinx -W -c docs notebooks build/html

docs-serve: port docs ## show the site on 127.0.0.1 (PORT=8000)
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory build/html

# Asked first: who has to name another port should not wait for the site.
port:
	@$(PYTHON) -c 'import socket, sys; s = socket.socket(); sys.exit("Port %d is taken. Name another: make docs-serve PORT=%d" % ($(PORT), $(PORT) + 1) if s.connect_ex(("127.0.0.1", $(PORT))) == 0 else 0)'

bench: $(PEERS) $(PYDVL) ## measure engine and peers side by side into benchmarks/ (QUICK=1: toy sizes)
	$(BIN)/python -m benchmarks $(if $(filter 1,$(QUICK)),--quick)
	$(BIN)/python -m benchmarks.savings $(if $(filter 1,$(QUICK)),--quick)
	$(BIN)/python -m benchmarks.job $(if $(filter 1,$(QUICK)),--quick)
	$(BIN)/python -m benchmarks.index $(if $(filter 1,$(QUICK)),--quick)

lint: $(READY) ## code and notebooks: ruff, spelling, links, no traces of a run in the metadata
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m pytest -q tests/test_links.py
	$(BIN)/nbstripout --verify --keep-output --keep-count --keep-id notebooks/*.ipynb

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab --notebook-dir=notebooks

clean: ## back to a fresh clone: remove build/ and the environments
	rm -rf build .venv .venv-pydvl

# The language model without dependencies: requirements-language.txt says why.
# Written last, so that an installation cut short is taken up again.
$(READY): requirements-notebooks.txt requirements-language.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; this needs 3.11 or newer. Name one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-notebooks.txt
	$(BIN)/python -m pip install --no-deps -r requirements-language.txt
	touch $@

# Without dependencies: requirements-peers.txt says why.
$(PEERS): requirements-peers.txt $(READY)
	$(BIN)/python -m pip install --no-deps -r requirements-peers.txt
	touch $@

$(DOCS): docs/requirements.txt $(READY)
	$(BIN)/python -m pip install -r docs/requirements.txt
	touch $@

$(BROWSER): browser/requirements.txt $(READY)
	$(BIN)/python -m pip install -r browser/requirements.txt
	touch $@

# An environment of its own: benchmarks/requirements-pydvl.txt says why.
$(PYDVL): benchmarks/requirements-pydvl.txt
	@$(PYDVL_PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit("$(PYDVL_PYTHON) is Python %d.%d; pyDVL with numpy 1 needs 3.11 or 3.12. Name one: make bench PYDVL_PYTHON=python3.12" % sys.version_info[:2])'
	$(PYDVL_PYTHON) -m venv .venv-pydvl
	.venv-pydvl/bin/python -m pip install -r benchmarks/requirements-pydvl.txt
	touch $@
