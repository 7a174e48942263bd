# `make` prints this list: each target's own `##` comment.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# PY=python3 takes an interpreter that has the packages already (a machine without a network) and installs nothing.
ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
INSTALLED := $(STAMP)
endif
# One process for one GPU, torchrun for more. For several nodes: TORCHRUN="--nnodes 2 --rdzv-endpoint HOST:PORT".
# Signals reach the ranks, which write a checkpoint and leave; torchrun kills what is left after two minutes.
TORCHRUN ?= --standalone
SIGNALS := --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 120
LAUNCH = $(PY) -m distill.launch $(TORCHRUN) $(SIGNALS) --nproc-per-node $(NGPU)
RANKS = $(if $(filter 1--standalone,$(NGPU)$(TORCHRUN)),$(PY),$(LAUNCH))
NGPU ?= 1
PRESET ?= recommended
# ARGS may name a preset or a whole configuration instead.
CHOSEN = $(if $(findstring --preset,$(ARGS))$(findstring --config,$(ARGS)),,--preset $(PRESET))
ARGS ?=
export OMP_NUM_THREADS ?= 1
# A path as one word, whatever spaces it holds; `~` as the shell has it.
path = "$(if $(filter ~/%,$(firstword $1)),$(patsubst ~/%,$(HOME)/%,$1),$1)"

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint shards verify-shards cache verify-cache train probe export evidence bench bench-gpu test-gpu

help: ## Print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## Create .venv and install the pinned dependencies (once)

# The stamp is written last: an install that was cut short is taken up again, a finished one is not repeated.
$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11. Call make with PYTHON=/path/to/python3.11 or newer."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned dependencies into $(VENV) (about 7 GB, a few minutes, once)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $(STAMP)

# A target that lacks a variable says which, before it installs anything.
EXAMPLE_shards := DATA=/data/imagenet/train SHARDS=/data/shards/train
EXAMPLE_verify-shards := SHARDS=/data/shards/train
EXAMPLE_cache := SHARDS=/data/shards/train CACHE=/nvme/cache NGPU=8
EXAMPLE_verify-cache := CACHE=/nvme/cache
EXAMPLE_train := SHARDS=/data/shards/train CACHE=/nvme/cache NGPU=8 RUN=runs/first
EXAMPLE_evidence := SHARDS=/data/shards/train VAL=/data/shards/val CACHE=/nvme/cache ARGS="--data imagenet --recipes five regression"
EXAMPLE_probe := RUN=runs/first
EXAMPLE_export := RUN=runs/first
GOAL := $(firstword $(MAKECMDGOALS))
need-%:
	@test -n "$($*)" || { echo "make $(GOAL) needs $*, for example: make $(GOAL) $(EXAMPLE_$(GOAL))"; \
	  echo "No data at hand? make demo runs the whole path on a small set it makes itself."; exit 1; }

demo: setup ## The whole path on a small image set it makes itself: about 5 minutes on 2 cores
	$(PY) -m demo $(ARGS)

test: lint ## Lint, types, import directions, then every test that fits a CPU
	$(PY) -m pytest -n 2 --dist loadfile -q -m "not slow" $(ARGS)

test-slow: setup ## The tests that take minutes each: compiled gradients, long fault storms
	$(PY) -m pytest -q -m slow $(ARGS)

lint: setup ## Ruff, mypy strict and import-linter
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())'

shards: need-DATA need-SHARDS setup ## Pack images into shards: DATA=folder, tar or parquet  SHARDS=folder to write
	$(PY) -m shards pack --source $(call path,$(DATA)) --output $(call path,$(SHARDS)) $(ARGS)

verify-shards: need-SHARDS setup ## Check every hash, header and count of packed shards: SHARDS=
	$(PY) -m shards verify $(call path,$(SHARDS)) $(ARGS)

cache: need-SHARDS need-CACHE setup ## Write the teacher's outputs to zarr: SHARDS= CACHE= [NGPU=1]
	$(RANKS) -m cache_tools build --shards $(call path,$(SHARDS)) --cache $(call path,$(CACHE)) $(ARGS)

verify-cache: need-CACHE setup ## Check every committed byte of a cache: CACHE=
	$(PY) -m cache_tools verify $(call path,$(CACHE)) --deep $(ARGS)

train: need-SHARDS setup ## Distill: SHARDS= [CACHE=] [VAL=] [NGPU=1] [RUN=runs/default] [PRESET=recommended]; again to resume
	$(RANKS) train.py $(CHOSEN) --data_path $(call path,$(SHARDS)) $(if $(CACHE),--cache_path $(call path,$(CACHE))) \
	  $(if $(VAL),--val_data_path $(call path,$(VAL))) --output_dir $(call path,$(or $(RUN),runs/default)) $(ARGS)

probe: need-RUN setup ## k-NN and linear probe of student, teacher and random weights: RUN=
	$(PY) probe.py --run $(call path,$(RUN)) $(ARGS)

export: need-RUN setup ## Write the student as timm and torch.hub load it: RUN=
	$(PY) -m distill.export --run $(call path,$(RUN)) $(ARGS)

evidence: need-SHARDS need-VAL need-CACHE setup ## Compare recipes over seeds: SHARDS= VAL= CACHE= ARGS="--data NAME --recipes ..."
	$(PY) -m benchmarks.evidence --train $(call path,$(SHARDS)) --val $(call path,$(VAL)) \
	  --cache $(call path,$(CACHE)) $(ARGS)

bench: setup ## Measure data path, cache and kernel on this machine; rows go to benchmarks/results/
	$(PY) -m benchmarks.bench_shards $(ARGS)
	$(PY) -m benchmarks.bench_data $(ARGS)
	$(PY) -m benchmarks.bench_cache $(ARGS)
	$(PY) -m benchmarks.bench_spd $(ARGS)
	$(PY) -m benchmarks.bench_train

bench-gpu: setup ## The same on a GPU, each figure beside its floor
	@$(PY) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "bench-gpu: torch sees no CUDA device")'
	$(PY) -m benchmarks.bench_spd --device cuda
	$(PY) -m benchmarks.spd_accuracy --device cuda
	$(PY) -m benchmarks.bench_data --only gpu
	$(PY) -m benchmarks.bench_cache
	$(PY) -m benchmarks.bench_train

test-gpu: setup ## Hardware against CPU; skipped visibly without a GPU
	$(PY) -m pytest -q tests/gpu $(ARGS)
