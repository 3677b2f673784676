# Each target makes the virtual environment it needs, once, and again when pyproject.toml changes.
# Variables: PYTHON (interpreter the environment is made from), VENV (where; BENCH_VENV for
# the benchmarks), ARGS (extra arguments for pytest, uvicorn or the benchmarks), DJANGO (a minor
# version, such as 5.2), TEST_PROCESSES (how many tests at a time).

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venvs/bench
DJANGO ?=
ARGS ?=

PY := $(VENV)/bin/python
# Many tests wait for processes of their own: one more at a time than there are cores.
TEST_PROCESSES ?= $(shell $(PY) -c 'import os; print(1 + \
  (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
# Development mode without the debug modes of asyncio and of memory, which take a third of the time:
# those are for `make test-all`.
TEST_MODE := PYTHONFAULTHANDLER=1 PYTHONWARNINGS=default
MATRIX := 3.11:5.2 3.12:6.0 3.13:6.1 3.14:6.1
SOURCES := $(wildcard leasepool_django example_project tests benchmarks docs manage.py)
TYPED := $(wildcard leasepool_django example_project tests benchmarks manage.py)

.DELETE_ON_ERROR:
.PHONY: help demo serve test test-all coverage bench bench-quick bench-baseline bench-report bench-environment check format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-serve ## Count primes on all cores in leased workers, and compare with doing it serially
	$(PY) manage.py leasepool run example_project.cpu.count_primes 1000000 1050000 1100000 1150000 --compare-serial

serve: $(VENV)/.installed-serve ## Serve the example project with uvicorn on http://127.0.0.1:8000/
	$(PY) -m uvicorn example_project.asgi:application $(ARGS)

test: $(VENV)/.installed-test ## Run the tests, up to 4 at a time, in random order, warnings as errors
	$(TEST_MODE) $(PY) -m pytest -n $(TEST_PROCESSES) --maxprocesses 4 -m "not slow" $(ARGS)

coverage: $(VENV)/.installed-test ## Run the tests and list the statements they do not reach
	PYTHONDEVMODE=1 $(PY) -m pytest -n $(TEST_PROCESSES) --maxprocesses 4 -m "not slow" --cov --cov-report=term-missing $(ARGS)

.PHONY: server-table
server-table: $(VENV)/.installed-test ## Run every server, and write what they do into docs/deployment.md
	PYTHONDEVMODE=1 $(PY) -m pytest tests/test_servers_*.py $(ARGS)
	$(PY) -m tests.servers.report

.PHONY: chaos soak
chaos: $(VENV)/.installed-test ## Kill and stop workers for a minute under load, and prove that every promise is kept
	$(PY) -m tests.chaos --seconds 60 --min-calls 20000 --min-kills 200 $(ARGS)

soak: $(VENV)/.installed-test ## Make 100,000 calls of all sizes: memory flat, descriptors equal
	$(PY) -m tests.chaos --soak --calls 100000 --min-calls 100000 $(ARGS)

check: $(VENV)/.installed-dev ## Check format, lint and strict types
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy $(TYPED)

format: $(VENV)/.installed-dev ## Format the code and apply the safe fixes
	$(PY) -m ruff check --fix-only $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

# The benchmarks have an environment of their own: what they compare is no part of development.
bench: bench-environment ## Measure beside the alternatives, one run of many minutes; report in docs/benchmarks.md
	$(BENCH_VENV)/bin/python -m benchmarks $(ARGS)
	$(BENCH_VENV)/bin/python -m benchmarks --report

bench-quick: bench-environment ## Compare ratios with the stored ones; fail when one is worse by more than 25 %
	$(BENCH_VENV)/bin/python -m benchmarks --quick $(ARGS)

bench-baseline: bench-environment ## Store this machine's ratios, the medians of five quick runs, for bench-quick
	$(BENCH_VENV)/bin/python -m benchmarks --store-baseline $(ARGS)

bench-report: bench-environment ## Write docs/benchmarks.md from what the last runs measured
	$(BENCH_VENV)/bin/python -m benchmarks --report $(ARGS)

bench-environment:
	@$(MAKE) --no-print-directory VENV=$(BENCH_VENV) $(BENCH_VENV)/.installed-bench

# Interpreters are looked for as python3.X on PATH and below pyenv's versions; one counts when it
# runs (pyenv's shims exist without an interpreter behind them) and can make environments.
test-all: ## Run the tests, the slow ones too, in development mode, on every Python present: 3.11, 3.12, 3.13, 3.14, each with its Django
	@results=; failed=0; \
	for pair in $(MATRIX); do \
	  python=$${pair%:*}; django=$${pair#*:}; found=; \
	  for candidate in "python$$python" $$(ls -d "$$(pyenv root 2>/dev/null)/versions/$$python"[.-]*/bin/"python$$python" 2>/dev/null | sort -rV); do \
	    if "$$candidate" -c "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$$python')" >/dev/null 2>&1; \
	    then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    line="skipped  Python $$python, Django $$django: no such interpreter here"; echo "$$line"; \
	  else \
	    echo "Python $$python, Django $$django: $$found"; \
	    if $(MAKE) --no-print-directory test PYTHON="$$found" DJANGO="$$django" \
	        TEST_MODE=PYTHONDEVMODE=1 VENV=".venvs/python$$python-django$$django" ARGS="-m '' $(ARGS)"; \
	    then line="passed   Python $$python, Django $$django"; \
	    else line="FAILED   Python $$python, Django $$django"; failed=1; fi; \
	  fi; \
	  results="$$results$$line\n"; \
	done; \
	printf "\n$$results"; exit $$failed

clean: ## Remove environments, caches and build products
	rm -rf .venv .venvs .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist
	find leasepool_django example_project tests $(wildcard benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]' $(if $(DJANGO),'Django~=$(DJANGO).0')
	@touch $@
