# Two commands on a fresh machine: `make run` and `make test`.
.DEFAULT_GOAL := help
# pipefail: a lock that could not be resolved is not written.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip's settings reach uv too: a folder of wheels (a CPU build of torch, say) is found by both.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
# Stages, services and tests are processes of their own: without bytecode on disk each would compile torch, MLflow and
# Prefect anew, for as long as many a stage takes.
unexport PYTHONDONTWRITEBYTECODE

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# Scripts and the editable install hold the path of their environment: one that was moved or copied here is made anew.
ifneq ($(shell test -e $(VENV)/ready && test "$$(cat $(VENV)/ready)" != "$$(pwd -P)" && ! grep -qsF "$$(pwd -P)/$(VENV)/" $(BIN)/loopwright && echo moved),)
.PHONY: $(VENV)/ready
$(VENV)/ready: STALE := rm -rf $(VENV)
endif

$(VENV)/ready: requirements.lock pyproject.toml
	@$(STALE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON): Python 3.11 or newer is needed; run make PYTHON=/path/to/python3.11"; rm -rf $(VENV); exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -o '^uv==[0-9.]*' requirements.lock)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@pwd -P > $@

setup: $(VENV)/ready  ## build .venv from requirements.lock

run: setup  ## the reference pipeline: from the standard library's documentation to a registered, served agent
	@$(BIN)/loopwright run

up: setup  ## the platform in the foreground: MLflow, Prefect, worker, endpoint
	@$(BIN)/loopwright up

# Two workers with two torch threads each on two cores: threads spin while they wait, for some files three quarters of
# the processor time.
test: setup  ## the whole suite
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 40

test-distributed: setup  ## trainings on several processes
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -m "distributed and not long"

test-distributed-long: setup  ## their kills at random steps, and bf16
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -m "distributed and long"

test-cluster: setup  ## trainings on a Ray of this machine (extra cluster)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[cluster]"
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -m cluster

check: setup  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## speed beside peers, in one run
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.constrained
	$(BIN)/python -m benchmarks.classify
	$(BIN)/python -m benchmarks.ingestion

bench-base: setup  ## a real base (extra bases) beside transformers and peft
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[bases]"
	$(BIN)/python -m benchmarks.base
	$(BIN)/python -m benchmarks.base_training
	$(BIN)/python -m benchmarks.adapters

bench-gpu: setup  ## training and decoding on a CUDA device, some eight minutes
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/$$(date +%F)-gpu.md

lock: setup  ## the three locks from pyproject.toml, and the versions that stages declare
	$(BIN)/$(COMPILE) pyproject.toml --group dev | $(TORCH_ANYWHERE) > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	$(BIN)/$(COMPILE) --group serve --constraint requirements.lock | $(TORCH_ANYWHERE) > requirements-serve.lock.new
	@mv requirements-serve.lock.new requirements-serve.lock
	$(BIN)/$(COMPILE) pyproject.toml --extra mcp --extra otel --group worker --constraint requirements.lock | $(TORCH_ANYWHERE) > requirements-worker.lock.new
	@mv requirements-worker.lock.new requirements-worker.lock
	$(BIN)/python -m components.config.versions
COMPILE := uv pip compile --universal --python-version 3.11 --quiet --no-header --no-annotate --generate-hashes
# torch pins its CUDA packages itself, and a CPU build wants none: leave them to the installing machine. Its own hash
# differs from index to index (PyPI, CPU, CUDA); uv verifies the hashes of all others.
TORCH_ANYWHERE := awk '/^[^ ]/ {drop = /^(nvidia-[a-ln-z]|triton|cuda-)/; torch = /^torch==/} !drop && !(torch && /^ /)' | sed -E 's/^torch==([0-9.]+).*/torch==\1/' | uniq

sbom: setup  ## sbom.cdx.json: every package of requirements.lock, with licences and hashes, in CycloneDX
	$(BIN)/uvx --quiet --from "cyclonedx-bom>=7,<8" cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible --of JSON --output-file sbom.cdx.json

.PHONY: help setup run up test test-distributed test-distributed-long test-cluster check bench bench-base bench-gpu lock sbom
