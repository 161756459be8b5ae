# `make sweep` and `make test` set up what they need; `make help` lists everything.
# .venv holds exactly what requirements.lock names. To use an environment of your own instead:
# make sweep PYTHON=/path/to/python, after `pip install -e '.[eval,dev]'` in it.
SHELL := /bin/bash
EXPERIMENT ?= shapes
PYTHON ?= .venv/bin/python
PYTHON3 ?= python3
UV := .venv/tools/bin/uv
# Other NAME=value words on the command line go to Hydra: make sweep pruner=scope budget=16,32
OURS := EXPERIMENT=% PYTHON=% PYTHON3=% OUT=% MATRIX=%
OVERRIDES = $(foreach word,$(filter-out $(OURS),$(MAKEOVERRIDES)),'$(word)')
# files with methods of your own, as `make sweep` takes them: make tables plugins=[mine.py]
PLUGINS = $(if $(plugins),--plugins '$(plugins)')
# make splits values at spaces: a word without a "=" is the rest of one
REST = $(strip $(foreach word,$(MAKEOVERRIDES),$(if $(findstring =,$(word)),,$(word))))
WHOLE = $(if $(REST),$(error make takes no value with a space ("$(REST)"); \
	run python scripts/sweep.py -m with the same words))

.DEFAULT_GOAL := help
.PHONY: help sweep tables claims report bench bench-gpu flops test test-faults test-slurm \
	test-thorough test-matrix test-newest bench-sweep lint golden bench-select coverage methods readme \
	train-shapes clean lock checked compare paper kept

help:  ## list the targets
	@grep -hE '^[.a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# with PYTHON=... nothing is checked
ifeq ($(PYTHON),.venv/bin/python)
READY := checked
endif

.venv: .venv/ready  ## create the environment from the lock (about a minute)
.venv/ready: requirements.lock
	$(PYTHON3) scripts/environment.py

# The check reads thousands of files, so it is left out if nothing has changed since the last one:
# the lock, the set of packages, or a file of the two packages that decide answers.
checked: .venv/ready
	@site=$$(echo .venv/lib/python3*/site-packages); if [ ! -e .venv/checked ] || [ -n "$$( \
	  find $$site -maxdepth 0 -newer .venv/checked; find requirements.lock pyproject.toml \
	  $$site/transformers $$site/lmms_eval -newer .venv/checked -print -quit)" ]; then \
	  .venv/bin/python scripts/environment.py --check && touch .venv/checked; fi

lock: .venv/ready  ## renew requirements.lock from pyproject.toml, then run every test on it
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url --no-header \
	  --prerelease disallow --python-version 3.11 --all-extras pyproject.toml -o requirements.lock
	$(MAKE) test
	$(MAKE) test-matrix

sweep: $(READY)  ## run the grid of EXPERIMENT (default: shapes); takes Hydra overrides
	$(WHOLE)$(PYTHON) scripts/sweep.py -m experiment=$(EXPERIMENT) $(OVERRIDES)

test: $(READY)  ## run the tests
	$(PYTHON) -m pytest

# the tested releases of transformers, as in eval/families/contract.py
MATRIX := 5.0.0 5.17.0 5.23.0 5.24.0
INJECTION := tests/test_inject*.py tests/test_invariants.py tests/test_qwen_vision.py \
	tests/test_geometry.py tests/test_families.py tests/test_prefixes.py tests/test_bench.py

# every test of what may go wrong, with the long ones that `make test` leaves out
FAULTS := $(addprefix tests/test_,$(addsuffix .py,faults hub sweep launchers wandb_log store cache \
	answers versions source settings models support))

test-faults: $(READY)  ## run all fault tests: 50 kills, full disks, damaged files, a hub that fails
	$(PYTHON) -m pytest -n 0 -m "" $(FAULTS)

test-slurm: $(READY)  ## sweeps on a real SLURM of one node; as root, says what it needs
	$(PYTHON) tests/slurm_node.py
	$(PYTHON) -m pytest -n 0 -m slurm tests/test_slurm.py

test-thorough: $(READY)  ## run the property tests on three times as many generated inputs
	$(PYTHON) -m pytest tests/test_properties.py --hypothesis-profile=thorough

tables: $(READY)  ## print published numbers beside those of the records in OUT (default: results)
	$(PYTHON) scripts/tables.py --results $(or $(OUT),results) $(PLUGINS)

coverage: $(READY)  ## count the papers' numbers that one command recomputes; write the page
	$(PYTHON) scripts/coverage.py

claims: $(READY)  ## judge the claims of the papers' abstracts by the records in OUT (default: results)
	$(PYTHON) scripts/claims.py --results $(or $(OUT),results)

# variables of the environment do not count
A :=
B :=
MODEL :=
BUDGET :=
COMPARED = $(strip $(and $(A),--a '$(A)') $(and $(B),--b '$(B)') \
	$(and $(MODEL),--model '$(MODEL)') $(and $(BUDGET),--budget '$(BUDGET)'))
NOT_COMPARED = $(filter-out A=% B=% MODEL=% BUDGET=% OUT=% PYTHON=%,$(MAKEOVERRIDES))

compare: $(READY)  ## which of the methods A and B is better, of MODEL at BUDGET; without A, B: all
	$(if $(NOT_COMPARED),$(error make compare takes A, B, MODEL, BUDGET and OUT, not \
	  $(NOT_COMPARED)))$(PYTHON) scripts/compare.py --results $(or $(OUT),results) $(COMPARED)

report: $(READY)  ## write an HTML page and a summary from the records in OUT (default: results)
	$(PYTHON) scripts/report.py --results $(or $(OUT),results) $(PLUGINS)

# options of their own, where a variable of the environment does not count
RESULTS :=
HIGHLIGHT :=
DOC :=
METHODS :=
DATA :=

paper: $(READY)  ## write LaTeX, figures, BibTeX and provenance of RESULTS (default: results) to OUT
	$(if $(OUT),,$(error name a folder: make paper OUT=paper))$(PYTHON) scripts/paper.py \
	  --results $(or $(RESULTS),results) --out $(OUT) $(PLUGINS) \
	  $(and $(HIGHLIGHT),--highlight '$(HIGHLIGHT)')

kept: $(READY)  ## draw the tokens that METHODS (default: all) keep of DOC=gqa:7,pope:3 into OUT
	$(PYTHON) scripts/kept.py $(DOC) --results $(or $(RESULTS),results) $(and $(OUT),--out $(OUT)) \
	  $(PLUGINS) $(and $(METHODS),--methods '$(METHODS)') $(and $(DATA),--data-root $(DATA))

bench: $(READY)  ## latency and throughput of the methods on this CPU, small models (minutes)
	$(PYTHON) scripts/bench.py --config-name bench_cpu $(OVERRIDES)

bench-gpu: $(READY)  ## the same on a GPU at true geometry, shared prefixes, checks (ten minutes)
	$(PYTHON) scripts/bench.py $(OVERRIDES)
	$(PYTHON) scripts/bench_prefixes.py --device cuda
	$(PYTHON) scripts/gpu_check.py

flops: $(READY)  ## print the FLOPs of every family, method, budget and convention
	$(PYTHON) scripts/flops.py

bench-sweep: $(READY)  ## a sweep beside lmms-eval's own model class, shared prefixes, memory
	$(PYTHON) scripts/bench_sweep.py
	$(PYTHON) scripts/bench_prefixes.py
	$(PYTHON) scripts/bench_memory.py

test-matrix: .venv/ready  ## run the injection tests on each release of transformers in MATRIX
	set -e; for release in $(MATRIX); do \
	  echo "== transformers $$release"; home=.venv-matrix/$$release; \
	  $(UV) venv --quiet --clear --python .venv/bin/python $$home; \
	  $(UV) pip sync --quiet --python $$home --require-hashes requirements.lock; \
	  echo "transformers==$$release" > $$home/override; \
	  $(UV) pip install --quiet --python $$home --override $$home/override --editable '.[eval,dev]'; \
	  $$home/bin/python -m pytest -m "not faults and not slurm" $(INJECTION); \
	done

# what an installation without the lock gets today
test-newest: .venv/ready  ## injection tests and a short sweep on the newest release of each package
	$(UV) venv --quiet --clear --python .venv/bin/python .venv-matrix/newest
	$(UV) pip install --quiet --upgrade --python .venv-matrix/newest --editable '.[eval,slurm,gpu,dev]'
	@echo "== versions that differ from the lock:"
	.venv-matrix/newest/bin/python scripts/environment.py --moved
	.venv-matrix/newest/bin/python -m pytest $(INJECTION)
	.venv-matrix/newest/bin/python scripts/sweep.py -m results=.venv-matrix/newest/results \
	  pruner=none,scope budget=16 'tasks=[pope,gqa]' limit=10

lint: $(READY)  ## check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf build/links && mkdir -p build/links/secateur  # mypy reads no editable install
	ln -s $(abspath $(wildcard eval/*) pruners) build/links/secateur
	$(PYTHON) -m mypy

# the commit that has version 1 of the embedded model, whose language model training starts from
VERSION1 := bda7bc8
train-shapes: $(READY)  ## train the embedded model into OUT (an hour and a half on one core)
	rm -rf build/version1 && mkdir -p build/version1
	git archive $(VERSION1) eval/shapes/model | tar -x -C build/version1
	$(PYTHON) -m scripts.training.train_shapes build/version1/eval/shapes/model \
	  $(or $(OUT),results/shapes_llava)

golden: $(READY)  ## compare selections with recorded outputs of the official codes
	$(PYTHON) scripts/check_golden.py tests/golden

bench-select: $(READY)  ## time each selection beside a literal formulation of its steps
	$(PYTHON) scripts/bench_select.py

methods: $(READY)  ## write pruners/METHODS.md from the classes
	$(PYTHON) scripts/methods_table.py

readme: $(READY)  ## put tables and pictures of the newest shapes sweep into README and results
	$(PYTHON) scripts/readme.py

clean:  ## remove the environments and the results that were generated here
	rm -rf .venv .venv-matrix results/runs results/hydra results/data build *.egg-info
