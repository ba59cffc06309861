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

.PHONY: help setup serve test test-gpu lint bench bench-gpu bench-peers bench-compile pics clean
help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

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
	@$(PYTHON) -m pytest test/attention test/model test/bench -m gpu -W ignore::pytest.PytestConfigWarning \
		-p test.gpu_report --gpu-report benchmark/results/gpu_tests.json $(ARGS)

bench: $(STAMP) ## measure the daemon on this machine (4 minutes): benchmark/results/cpu, pics/latency.png, pics/throughput.png
	@$(BIN)/python -m benchmark.standard $(ARGS)

bench-gpu: ## what is promised of a GPU (8 minutes), with the Python that has torch for CUDA, flashinfer and the extra bench
	@$(PYTHON) -m benchmark.promised $(ARGS)

bench-peers: $(STAMP) ## measure it beside vLLM, transformers serve and llama.cpp (installs them into .bench), fill README.md's table
	@$(BIN)/python -m benchmark.peers.run $(ARGS)

bench-compile: $(STAMP) ## locust's charts with and without torch.compile: pics/torch_compile.png (3 minutes)
	@$(BIN)/python -m pics.torch_compile $(ARGS)

pics: $(STAMP) ## draw the pictures of README.md
	@$(BIN)/python pics/architecture.py

clean: ## remove the environment, all caches, and what bench-peers installed
	rm -rf $(VENV) .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
