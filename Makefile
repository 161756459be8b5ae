# Secateur. `make sweep` and `make test` set up what they need; `make help` lists everything.
# .venv holds exactly what requirements.lock names. An environment of your own, with other versions:
# make sweep PYTHON=/path/to/python (with `pip install -e '.[eval,dev]'` done there).
SHELL := /bin/bash
EXPERIMENT ?= shapes
PYTHON ?= .venv/bin/python
PYTHON3 ?= python3
UV := .venv/tools/bin/uv
# NAME=value words on the command line that are not make's own go to Hydra: make sweep pruner=scope budget=16,32 limit=20
OVERRIDES = $(foreach word,$(filter-out EXPERIMENT=% PYTHON=% PYTHON3=% OUT=% MATRIX=%,$(MAKEOVERRIDES)),'$(word)')

.DEFAULT_GOAL := help
.PHONY: help sweep tables report bench bench-gpu flops test test-faults test-matrix test-newest \
	bench-sweep lint golden bench-select methods readme train-shapes clean lock checked

help:  ## list the targets
	@grep -hE '^[.a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# with PYTHON=... the environment is the caller's
ifeq ($(PYTHON),.venv/bin/python)
READY := checked
endif

.venv: .venv/ready  ## create the environment from the lock (about a minute with a quick network)
.venv/ready: requirements.lock
	$(PYTHON3) scripts/environment.py

checked: .venv/ready
	@.venv/bin/python scripts/environment.py --check

lock: .venv/ready  ## renew requirements.lock from pyproject.toml, then run every test on it
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url --no-header \
	  --prerelease disallow --python-version 3.11 --all-extras pyproject.toml -o requirements.lock
	$(MAKE) test
	$(MAKE) test-matrix

sweep: $(READY)  ## run the grid of EXPERIMENT (default: shapes); Hydra overrides pass through
	$(PYTHON) scripts/sweep.py -m experiment=$(EXPERIMENT) $(OVERRIDES)

test: $(READY)  ## run the tests
	$(PYTHON) -m pytest

# the releases of transformers that injection is tested on; eval/injection/contract.py, TESTED
MATRIX := 5.0.0 5.17.0 5.23.0 5.24.0
INJECTION := tests/test_inject*.py tests/test_qwen_vision.py tests/test_geometry.py tests/test_families.py tests/test_bench.py

test-faults: $(READY)  ## run the long fault tests: kills, full disks, several processes
	$(PYTHON) -m pytest -n 0 -m faults tests/test_faults.py tests/test_launchers.py tests/test_wandb_log.py

test-thorough: $(READY)  ## run the property tests on three times as many generated inputs
	$(PYTHON) -m pytest tests/test_properties.py --hypothesis-profile=thorough

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

test-matrix: .venv/ready  ## run the injection tests on every release of MATRIX, in environments of their own
	set -e; for release in $(MATRIX); do \
	  echo "== transformers $$release"; home=.venv-matrix/$$release; \
	  $(UV) venv --quiet --clear --python .venv/bin/python $$home; \
	  $(UV) pip sync --quiet --python $$home --require-hashes requirements.lock; \
	  echo "transformers==$$release" > $$home/override; \
	  $(UV) pip install --quiet --python $$home --override $$home/override --editable '.[eval,dev]'; \
	  $$home/bin/python -m pytest $(INJECTION); \
	done

# the canary: what a fresh install without the lock would meet today
test-newest: .venv/ready  ## injection tests and a short sweep on the newest release of every dependency
	$(UV) venv --quiet --clear --python .venv/bin/python .venv-matrix/newest
	$(UV) pip install --quiet --upgrade --python .venv-matrix/newest --editable '.[eval,slurm,gpu,dev]'
	@echo "== moved since the lock:"; .venv-matrix/newest/bin/python scripts/environment.py --moved
	.venv-matrix/newest/bin/python -m pytest $(INJECTION)
	.venv-matrix/newest/bin/python scripts/sweep.py -m results=.venv-matrix/newest/results \
	  pruner=none,scope budget=16 'tasks=[pope,gqa]' limit=10

lint: $(READY)  ## check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf build/links && mkdir -p build/links/secateur  # mypy reads no editable install
	ln -s $(abspath $(wildcard eval/*) pruners) build/links/secateur
	$(PYTHON) -m mypy

train-shapes: $(READY)  ## train the embedded model into the folder OUT (about an hour on two cores)
	$(PYTHON) scripts/training/train_shapes.py $(or $(OUT),results/shapes_llava)

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
