# Secateur. `make sweep` and `make test` set up what they need; `make help` lists everything.
# An environment of your own: make sweep PYTHON=/path/to/python (with `pip install -e .[dev]` done there).
SHELL := /bin/bash
EXPERIMENT ?= shapes
PYTHON ?= .venv/bin/python
# NAME=value words on the command line that are not make's own go to Hydra: make sweep pruner=scope budget=16,32 limit=20
OVERRIDES = $(foreach word,$(filter-out EXPERIMENT=% PYTHON=% OUT=%,$(MAKEOVERRIDES)),'$(word)')

.DEFAULT_GOAL := help
.PHONY: help sweep tables report bench bench-gpu flops test test-faults test-matrix bench-sweep lint golden bench-select methods readme train-shapes clean

help:  ## list the targets
	@grep -hE '^[.a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# with PYTHON=... the environment is the caller's
ifeq ($(PYTHON),.venv/bin/python)
READY := .venv/ready
endif

.venv: .venv/ready  ## create the environment (about a minute with a quick network)
.venv/ready: pyproject.toml
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Secateur needs Python 3.11 or newer, python3 is " + sys.version)'
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python --editable '.[dev]'
	touch $@

sweep: $(READY)  ## run the grid of EXPERIMENT (default: shapes); Hydra overrides pass through
	$(PYTHON) scripts/sweep.py -m experiment=$(EXPERIMENT) $(OVERRIDES)

test: $(READY)  ## run the tests
	$(PYTHON) -m pytest

# oldest, middle and newest transformers that injection is tested on; eval/inject/families.py, TESTED
MATRIX := 5.0.0 5.17.0 newest
INJECTION := tests/test_inject*.py tests/test_qwen_vision.py tests/test_geometry.py tests/test_families.py tests/test_bench.py

test-faults: $(READY)  ## run the long fault tests: kills, full disks, several processes
	$(PYTHON) -m pytest -n 0 -m faults tests/test_faults.py tests/test_launchers.py tests/test_wandb_log.py

tables: $(READY)  ## print every published table beside what was reproduced, from the records in OUT (default: results)
	$(PYTHON) scripts/tables.py --results $(or $(OUT),results)

report: $(READY)  ## write the report: one HTML page and a summary, from the records in OUT (default: results)
	$(PYTHON) scripts/report.py --results $(or $(OUT),results)

bench: $(READY)  ## latency and memory of every method on this CPU at reduced geometry (two minutes), into results/bench
	$(PYTHON) scripts/bench.py --config-name bench_cpu $(OVERRIDES)

bench-gpu: $(READY)  ## the same on a GPU at true geometry, random weights, within ten minutes
	$(PYTHON) scripts/bench.py $(OVERRIDES)

flops: $(READY)  ## print the FLOPs of every family, method, budget and convention
	$(PYTHON) scripts/flops.py

bench-sweep: $(READY)  ## documents per second of a sweep, beside lmms-eval's own model class; memory of a long cell
	$(PYTHON) scripts/bench_sweep.py
	$(PYTHON) scripts/bench_memory.py

test-matrix: $(READY)  ## run the injection tests on three releases of transformers, in environments of their own
	set -e; for release in $(MATRIX); do \
	  echo "== transformers $$release"; home=.venv-matrix/$$release; pin=transformers$${release:+==$$release}; \
	  test -x $$home/bin/python || $(PYTHON) -m venv $$home; \
	  .venv/bin/uv pip install --quiet --python $$home/bin/python --editable '.[dev]' $${pin%==newest}; \
	  $$home/bin/python -m pytest $(INJECTION); \
	done

lint: $(READY)  ## check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

train-shapes: $(READY)  ## train the embedded model from nothing (about an hour on two cores) into OUT
	$(PYTHON) scripts/train_shapes.py $(or $(OUT),results/shapes_llava)

golden: $(READY)  ## compare every selection with the outputs of the official code in tests/golden
	$(PYTHON) scripts/check_golden.py tests/golden

bench-select: $(READY)  ## time every selection beside the literal formulation of its steps, into results/bench
	$(PYTHON) scripts/bench_select.py

methods: $(READY)  ## write pruners/METHODS.md from the classes
	$(PYTHON) scripts/methods_table.py

readme: $(READY)  ## put the newest sweep's table and pictures into the README
	$(PYTHON) scripts/readme.py

clean:  ## remove the environment and all results that were generated here
	rm -rf .venv .venv-matrix results/runs results/hydra results/data build *.egg-info
