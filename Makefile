# Two commands do everything, environment included:
#   make demo    train and evaluate a small Mask R-CNN with an MRLA backbone
#   make test    the test suite
# and: make bench (what MRLA costs beside the plain network), make config-table, make model-index,
#      make model-zoo (the table of the main configs; with ZOO_ARGS="--rounds 0" nothing is timed anew),
#      make results (train what docs/results.md compares, and write it; resumable),
#      make docs (the site of docs/, into build/docs; default stack)
#
# PYTHON=python3.12   the interpreter that .venv is made with (3.10 to 3.12)
# VENV=path           another virtual environment; VENV= (empty) takes the active one. One that
#                     already has torch and the mm packages keeps them as they are.
# STACK=openmmlab     the OpenMMLab originals, in .venv-openmmlab; default: onedl, in .venv
#                     (make test-essential: the tests that show whether a stack works, in minutes)

PYTHON ?= python3
STACK ?= onedl
ifeq ($(STACK),onedl)
  STACK_VENV := .venv
  REQUIREMENTS := requirements.txt
else ifeq ($(STACK),openmmlab)
  STACK_VENV := .venv-openmmlab
  REQUIREMENTS := requirements/openmmlab.txt
else
  $(error STACK must be onedl or openmmlab, got '$(STACK)')
endif
VENV ?= $(STACK_VENV)
ifeq ($(strip $(VENV)),)
  override VENV := $(VIRTUAL_ENV)
  ifeq ($(strip $(VENV)),)
    $(error VENV is empty and no virtual environment is active)
  endif
endif
PY := $(VENV)/bin/python
STAMP := $(VENV)/.mmrla-installed
DOCS_STAMP := $(VENV)/.mmrla-docs-installed
DEMO_DIR ?= work_dirs/demo
PYTEST_ARGS ?=
# Two processes of one thread each: most tests are Python, which a second thread does not help.
TEST_WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal

.PHONY: help env demo test test-essential test-slow lint format config-table model-index model-zoo bench results docs clean

help:
	@sed -n 's/^#   make/  make/p' Makefile
	@echo "  make test-essential, make test-slow, make lint, make format, make docs, make clean"

env: $(STAMP)

$(STAMP): $(REQUIREMENTS) requirements/dev.txt requirements/extras.txt pyproject.toml requirements/install.sh
	@VENV="$(VENV)" PYTHON="$(PYTHON)" STACK_VENV="$(STACK_VENV)" \
		REQUIREMENTS="$(REQUIREMENTS)" bash requirements/install.sh
	@touch $@

demo: $(STAMP)
	$(PY) tools/demo.py --work-dir $(DEMO_DIR)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-essential: $(STAMP)
	$(PYTEST) -m "not slow" $(shell sed 's/\#.*//' tests/essential.txt) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m mmrla cost speed $(BENCH_ARGS)

results: $(STAMP)
	$(PY) tools/results.py $(RESULTS_ARGS)

config-table: $(STAMP)
	$(PY) -m mmrla cost flops --write

model-index: $(STAMP)
	$(PY) tools/analysis/model_index.py

model-zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) tools/analysis/model_zoo.py $(ZOO_ARGS)

$(DOCS_STAMP): requirements/docs.txt | $(STAMP)
ifneq ($(STACK),onedl)
	$(error make docs needs the default stack)
endif
	@$(PY) -m pip install --disable-pip-version-check --quiet -r requirements/docs.txt
	@touch $@

docs: $(STAMP) $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf work_dirs data/shapes build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
