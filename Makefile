# Every target runs from the checkout, installed or not: the root is put on the path by hand,
# and PYTHONSAFEPATH keeps the current directory from shadowing installed packages.
PYTHON ?= python
RUN = PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)

.PHONY: demo test test-gpu check bench

demo:
	$(RUN) -m offload_runtime demo

test:
	$(RUN) -m pytest -q -m "not gpu and not model and not slow"

test-gpu:
	$(RUN) -m pytest -q -m "gpu or not slow"

check:
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench:
	$(RUN) -m bench.ops
	$(RUN) -m offload_runtime bench --out bench/results/decode.json
