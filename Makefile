# Needs nothing but make and Python >= 3.11: every target makes its own environment in .venv first.
PYTHON ?= python3
DATA := glyphs
TIER := lecture
SEED := 0

VENV := .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles the modules it meets; compiling all of PyTorch first would take longer.
INSTALL := python -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/$(INSTALL)
READY := $(VENV)/.ready
# Other people's servers, in two environments: those that samelib runs inside of see the packages of .venv too, so that
# PyTorch is there once; those that it runs before need none of them, and other versions.
SERVERS := _build/servers
UPSTREAMS := _build/upstreams
# Where bytecode may not be written, every process would compile the same three thousand modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help book lab colab test servers lint env clean

help: ## this list
	@echo "usage: make TARGET [VARIABLE=VALUE ...]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile
	@echo "variables of book: DATA=$(DATA) (glyphs glyphs-matched shapes mnist cifar10)  TIER=$(TIER) (smoke lecture paper)  SEED=$(SEED)"
	@echo "  JOBS=N runs N notebooks at a time (default: one for each core; on one GPU choose few)"
	@echo "PYTHON=$(PYTHON) makes the environment; SAMELIB_DATA=PATH is a folder that already has mnist or cifar10"

book: $(READY) ## run the notebooks, build the book and say where its first page is
	@$(BIN)/python book/build.py --tier "$(TIER)" --data "$(DATA)" --seed "$(SEED)" $(if $(JOBS),--jobs "$(JOBS)")

lab: $(READY) ## JupyterLab with the student edition: hints fold, solutions are out
	@$(BIN)/python -m course.editions student _build/student
	@$(BIN)/jupyter lab --notebook-dir _build/student

colab: $(READY) ## run the Colab edition at smoke tier with Colab's packages (another environment, 5 GB)
	@$(BIN)/python -m course.colab

# One process a core with one thread each: small models gain little from a second thread.
test: lint ## lint, unit tests, every notebook at smoke tier, the book built and its pages checked
	@echo "Testing: the book of the smoke tier will be in $(CURDIR)/_build/smoke-glyphs/html/"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# One thread for the tests; the servers run as they do elsewhere.
servers: $(SERVERS)/.ready $(UPSTREAMS)/.ready ## samelib inside and before the servers that people run (two more environments, 0.5 GB)
	@OMP_NUM_THREADS=1 $(SERVERS)/bin/python -m pytest tests/servers

lint: $(READY) ## check style, the arrows between the packages, and the workflows
	@echo "Linting"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

env: $(READY) ## only make the environment

# The stamp is newer than what decides the environment, or the environment is brought up to date. An interrupted
# installation leaves no stamp.
$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; name a Python >= 3.11: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; name a Python >= 3.11: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Installing into $(CURDIR)/$(VENV) (the first time takes about two minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --editable .
	@touch $@

# pip counts what the .pth file leads to as installed, and keeps to its versions.
$(SERVERS)/.ready: $(READY) tests/servers/requirements.txt
	@echo "Installing into $(CURDIR)/$(SERVERS)"
	@$(BIN)/python -m venv --clear $(SERVERS)
	@$(BIN)/python -c 'import glob, sysconfig; (site,) = glob.glob("$(SERVERS)/lib/python*/site-packages"); \
		open(site + "/repository.pth", "w").write("import site; site.addsitedir(%r)\n" % sysconfig.get_path("purelib"))'
	@$(SERVERS)/bin/$(INSTALL) -c requirements.txt -r tests/servers/requirements.txt
	@touch $@

$(UPSTREAMS)/.ready: $(READY) tests/servers/upstreams.txt
	@echo "Installing into $(CURDIR)/$(UPSTREAMS)"
	@$(BIN)/python -m venv --clear $(UPSTREAMS)
	@$(UPSTREAMS)/bin/$(INSTALL) -r tests/servers/upstreams.txt
	@touch $@

clean: ## remove what was built; the environment stays (rm -rf .venv removes it too)
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache
