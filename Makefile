PYTHON ?= python3
PYDVL_PYTHON ?= $(PYTHON)
SOURCE ?= packaged
NOTEBOOK ?=

BIN := .venv/bin
READY := .venv/installed
PEERS := .venv/peers
PYDVL := .venv-pydvl/installed

# Fitted factors are kept inside the clone, so that a fresh clone starts from nothing.
export SUPPORT_CACHE := $(CURDIR)/build/cache
# Searched before a kernel of the same name that the user may have installed elsewhere.
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter

.PHONY: help notebooks execute test docs bench lint lab clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

notebooks: $(READY) ## run all notebooks into build/notebooks (CI=1: small sizes; SOURCE=hub)
	$(BIN)/python -m support.collection $(if $(filter 1,$(CI)),--ci) --source $(SOURCE)

# From an empty cache: a bar of work that was not done would be missing from the stored output.
execute: $(READY) ## execute the committed notebooks in place (NOTEBOOK=notebooks/…: only that one)
	rm -rf build/cache
	$(BIN)/python -m support.collection --in-place $(NOTEBOOK)

test: $(PEERS) ## unit tests, then every notebook in CI mode
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 notebooks/

docs: $(READY) ## build/html from the committed outputs, with the API reference
	$(BIN)/python -m pip install -r docs/requirements.txt
	$(BIN)/python -m sphinx -W -c docs notebooks build/html

bench: $(PEERS) $(PYDVL) ## measure engine and peers side by side into benchmarks/ (QUICK=1: toy sizes)
	$(BIN)/python -m benchmarks $(if $(filter 1,$(QUICK)),--quick)

lint: $(READY) ## ruff on code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab --notebook-dir=notebooks

clean: ## back to a fresh clone: remove build/ and the environments
	rm -rf build .venv .venv-pydvl

# Written last, so that an installation cut short is taken up again.
$(READY): requirements-notebooks.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; this needs 3.11 or newer. Name one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-notebooks.txt
	touch $@

# Without dependencies: requirements-peers.txt says why.
$(PEERS): requirements-peers.txt $(READY)
	$(BIN)/python -m pip install --no-deps -r requirements-peers.txt
	touch $@

# An environment of its own: benchmarks/requirements-pydvl.txt says why.
$(PYDVL): benchmarks/requirements-pydvl.txt
	@$(PYDVL_PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit("$(PYDVL_PYTHON) is Python %d.%d; pyDVL with numpy 1 needs 3.11 or 3.12. Name one: make bench PYDVL_PYTHON=python3.12" % sys.version_info[:2])'
	$(PYDVL_PYTHON) -m venv .venv-pydvl
	.venv-pydvl/bin/python -m pip install -r benchmarks/requirements-pydvl.txt
	touch $@
