# Everyday commands. `make` lists them; the ones that need Python packages install them first, once.

PYTHON ?= python3
VENV ?= .venv
COMET_VENV ?= .venv-comet
WORKERS ?= 2
SCALE ?= nano
# Recorded, so that it takes seconds: quality (all four tasks, 15 and 25 %). Every table: tables, hours.
SWEEP_nano ?= quality
SWEEP_llama ?= llama/tables
SWEEP_multi30k ?= multi30k

# What `make setup` installs. Not there: page, whose gradio asks for older packages than the others, and liger, for GPUs.
EXTRAS := dev dashboard docs gguf lm-eval mlflow serve sweep tensorboard

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
COMET_INSTALLED := $(COMET_VENV)/.installed

# Removes a half-made environment's marker, so that an interrupted set-up starts over.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo gpu test test-nano lint format docs nano nano-data comet reproduce-tables lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s%s\n", $$1, $$2 }' Makefile
	@echo "Options: PYTHON=$(PYTHON)  VENV=$(VENV)  WORKERS=$(WORKERS) (parallel test processes)  SCALE=$(SCALE) (tables: nano, llama or multi30k)"

setup: $(INSTALLED) ## install firstlab and its locked dependencies into .venv

demo test test-nano: export HF_HUB_OFFLINE := 1

demo: setup ## train, evaluate and plot the bundled model twice: 15 % and 25 % of layers skipped
	$(PY) -m firstlab.train +experiment=demo
	$(PY) -m firstlab.train +experiment=demo method.target_skip=0.25

gpu: setup ## measure everything on one H100 or H200, at most 20 minutes; without a GPU: docs/gpu.md
	$(PY) -m firstlab.benchmark preset=gpu

test: export OMP_NUM_THREADS := 1
test: lint ## lint, then run the test suite
	$(PY) -m pytest -n $(WORKERS)

lint: setup ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## fix what style and formatting checks can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup ## write the documentation's site to site/; look at it: python -m http.server --directory site
	$(PY) -m mkdocs build --strict

nano: setup ## train the bundled model again, from generated text
	$(PY) experiments/nano/train.py

nano-data: setup ## write the bundled tasks' examples again
	$(PY) experiments/nano/freeze.py

test-nano: export OMP_NUM_THREADS := 1
test-nano: setup ## test the recipe of the bundled model and tasks
	$(PY) -m pytest -n $(WORKERS) experiments/nano/tests

comet: $(COMET_INSTALLED) ## install the COMET metric into .venv-comet, its own environment

# What fails is listed and the tables are written all the same. docs/results keeps the page and a picture.
reproduce-tables: setup ## run what the tables lack (SCALE=nano, or llama on a GPU), then write them; only write: python -m firstlab.tables
	$(PY) -m firstlab.train +sweep=$(SWEEP_$(SCALE)); failed=$$?; $(PY) -m firstlab.tables scale=$(SCALE) \
	  && cp tables/$(SCALE)/index.html docs/results/$(SCALE).html \
	  && { cp tables/$(SCALE)/svg/pareto.svg docs/results/$(SCALE)_pareto.svg || true; } && exit $$failed

lock: setup ## renew constraints.txt: the newest versions that work together on Python 3.10 and later
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile pyproject.toml --quiet --universal --python-version 3.10 $(EXTRAS:%=--extra %) --extra liger \
	  --no-annotate --no-header --upgrade --output-file $(VENV)/resolved.txt
	sed -n '/^#/p' constraints.txt > $(VENV)/constraints.txt
	sed -E "/^(cuda-|nvidia-|triton=)/d; /sys_platform == 'emscripten'/d; s/ (and|;) sys_platform != 'emscripten'//" \
	  $(VENV)/resolved.txt >> $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean: ## remove caches and build output; keep environments and runs
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --constraint constraints.txt --editable ".[$(shell echo $(EXTRAS) | tr ' ' ,)]"
	@touch $@

$(COMET_INSTALLED): constraints-comet.txt | $(COMET_VENV)/bin/python
	$(COMET_VENV)/bin/python -m pip install --requirement constraints-comet.txt
	@touch $@

$(PY) $(COMET_VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no program called '$(PYTHON)': name a Python 3.10 or newer," \
	  "for instance: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("make: $(PYTHON) is Python %d.%d, but" \
	  " firstlab needs 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.11" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments:" \
	  "install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)/..
