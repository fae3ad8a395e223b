# Every target creates the environment .venv if it does not exist, so that a fresh machine with Python
# and pip needs one command. To use another interpreter: make test PYTHON=python3.12

PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>&- \
	&& echo $$python && break; done),python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PYTEST_ARGS ?=
# Number of test processes; each takes a core and about 1.5 GB. JOBS=0: run everything in one process.
JOBS ?= 2
DEFAULT_TESTS := not slow and not gpu and not interop and not simulated_gpu
# Tests marked "alone" have time limits for several servers and run afterwards, one at a time; those on a
# simulated GPU change torch and have a process of their own. Exit code 5 of pytest means that PYTEST_ARGS
# selects none of them.
define run_tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "$(DEFAULT_TESTS) and not alone" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "$(DEFAULT_TESTS) and alone" $(or $(PYTEST_ARGS),tests/serve) || test $$? = 5
	$(BIN)/python -m pytest -m simulated_gpu $(or $(PYTEST_ARGS),tests/simulated_gpu) || test $$? = 5
endef
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test slow gpu check format bench fuzz interop docs clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: $(STAMP) ## quantize a real 135M chat model, compare it with the original, and prompt both
	$(BIN)/halfbyte demo

test: $(STAMP) ## run the unit tests
	$(run_tests)

slow: $(STAMP) ## run the tests that take minutes, such as compiling every GPU kernel
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

gpu: $(STAMP) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

check: $(STAMP) ## run all checks of CI: format, lint, types, layers, docstrings, docs, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pydoclint --quiet src
	$(run_tests)

format: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## run the benchmarks, and update the tables in README and docs
	$(BIN)/python bench/run_all.py
	$(BIN)/python bench/tables.py

fuzz: $(STAMP) ## read 10,000 damaged checkpoints; each must be refused or read correctly
	$(BIN)/python -m tests.fuzz.fuzz_checkpoint --mutations 10000
	$(BIN)/python -m tests.fuzz.fuzz_convert --mutations 10000

interop: $(STAMP) ## test exchanging checkpoints with other tools, each in its own environment
	$(BIN)/python -m bench.peers.environments gptqmodel vllm llamacpp guidellm litellm ray
	$(BIN)/python -m pytest -m interop $(PYTEST_ARGS)

docs: $(STAMP) ## update the generated parts of docs/
	$(BIN)/python docs/generate.py
	$(BIN)/python bench/tables.py

clean: ## remove the environment and all build products
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	sys.exit(0 if (3, 11) <= v < (3, 14) else \
	f"halfbyte needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}. " \
	"Install one of them, then: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing halfbyte and its development tools into $(VENV) (takes a few minutes the first time)"
	$(BIN)/python -m pip install $(if $(CI),--quiet) -c constraints.txt -e ".[dev,convert,sign]"
	@touch $@
