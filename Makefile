# Every target runs from the checkout, installed or not: the root is put on the path by hand,
# and PYTHONSAFEPATH keeps the current directory from shadowing installed packages.
PYTHON ?= python
RUN = PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)

.PHONY: demo test test-gpu sanitize check bench

demo:
	$(RUN) -m offload_runtime demo

# Workers of one thread each: OpenMP threads of several processes would wait for each other.
test:
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 8 -m "not gpu and not model and not slow"

# -v: a run that is cut short has said what failed.
test-gpu:
	OMP_NUM_THREADS=1 $(RUN) -m pytest -v -n auto --maxprocesses 24 -m "gpu or not slow"

# compute-sanitizer's memcheck and racecheck over the kernel tests, on a GPU.
sanitize:
	OMP_NUM_THREADS=1 $(RUN) -m tests.sanitize --out sanitizer_logs

check:
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# TEXTS: a folder with the three books that bench/reproduce.py names; without it what needs them is left out.
bench:
	$(RUN) -m bench.reproduce --texts "$(TEXTS)" --out bench/results
