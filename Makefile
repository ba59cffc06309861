# Every target prepares what it needs: a fresh clone needs only Python >= 3.11 and a package index.
#   make serve ARGS="--port 8000"      serve (a small demo model unless ARGS names one)
#   make test                          run the tests, on any machine
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= test,bench
PIP_ARGS ?=
ARGS ?=

.PHONY: help setup serve test test-gpu lint pics clean
help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP) ## make .venv with pinned versions, when it is missing or out of date

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (first time: about a minute, mostly torch) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "simple-flashinfer needs Python >= 3.11; name one with: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

serve: $(STAMP) ## start the daemon; ARGS="..." are its flags
	@exec $(BIN)/python -m simple_flashinfer.main $(ARGS)

test: $(STAMP) ## run the tests (ARGS="-k scheduler" selects some)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## ruff and mypy --strict
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test-gpu: ## tests that need a CUDA device, with the Python that has torch for CUDA and flashinfer
	@$(PYTHON) -m pytest test/attention test/model test/bench -m gpu -W ignore::pytest.PytestConfigWarning $(ARGS)

pics: $(STAMP) ## draw the pictures of README.md
	@$(BIN)/python pics/architecture.py

clean: ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
