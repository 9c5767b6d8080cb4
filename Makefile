PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint test-slow bench docs dist wheels image photographs screenshots clean

help:       ## this list
	@sed -n 's/^\([a-z-]*:\)[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: .venv/dev.stamp  ## an environment in .venv with everything that developing needs

demo: .venv/runtime.stamp  ## caption, ask and chat about a bundled image (installs what running needs)
	$(BIN)/python examples/demo.py

test: export OMP_NUM_THREADS = 1
test: lint  ## style, types, and the quick tests
	$(BIN)/pytest -q -n 2

lint: venv  ## style and types only
	$(BIN)/ruff check
	$(BIN)/mypy blip2

test-slow: venv  ## the tests that `make test` leaves out: real sizes, training runs
	$(BIN)/pytest -q -m 'slow or real_shapes or training'

bench: venv  ## every benchmark, one after the other
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

docs: venv    ## the site, into docs/_build/html (docs/conf.py); any warning is an error
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo docs/_build/html/index.html

dist: .venv/release.stamp  ## an sdist and a wheel for this machine in dist/ (BLIP2_KERNELS=no: for every machine)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

wheels: .venv/release.stamp  ## wheels with compiled kernels in dist/ (by cibuildwheel; on Linux it needs Docker)
	$(BIN)/cibuildwheel --output-dir dist

image:      ## an image for containers, blip2:latest (TORCH=cu130: with CUDA 13.0; needs Docker)
	docker build --build-arg TORCH=$(or $(TORCH),cpu) --tag blip2 .

photographs: venv  ## the second miniature, blip2.load("photographs"): fetches packages, trains for an hour or more
	PYTHON=$(BIN)/python miniature/photographs/make.sh

screenshots: venv  ## pictures of the server's page into docs/ (needs a Chromium)
	$(BIN)/python docs/screenshots.py

clean:      ## remove the environment, caches and build results
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist docs/_build docs/generated
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "blip2 needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/runtime.stamp: pyproject.toml constraints.txt blip2/native/kernels.c blip2/native/build.py | .venv/bin/pip
	$(INSTALL) .
	@touch $@

.venv/release.stamp: constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt build twine cibuildwheel
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt blip2/native/kernels.c blip2/native/build.py | .venv/bin/pip
	$(INSTALL) '.[dev]'
	@touch $@ .venv/runtime.stamp
