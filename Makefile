# Bare `make` lists what there is. Everything runs in .venv, which is made when it is first needed.

.DEFAULT_GOAL := help
.PHONY: help venv demo test fast lint format types docs screenshots bench wheel schema lock clean chromium secrets audit compose-test
SHELL := /bin/bash

# Python to make .venv with; 3.11 or newer.
PYTHON ?= python3
# Which build of torch to install, as pip is told: `make demo TORCH="torch==2.13.0 --index-url <address of another build>"`.
# The plain release is the CPU build where pip knows one; models also run on it everywhere.
TORCH ?= torch==2.13.0
# What `make test` hands to pytest: `make test PYTEST="tests/core -k rows"`.
PYTEST ?=
# Which data folder `make screenshots` shows; empty takes HEADSCOPE_DATA, or the demo's.
DATA ?=
# Which benchmark `make bench` runs; empty lists them.
NAME ?=

BIN := .venv/bin
STAMP := .venv/.installed

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Headscope needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12"; exit 2; }
	@echo "Making .venv: about 400 MB to download where torch is the CPU build, 2 GB on disk, a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "Python could not make a virtual environment; on Debian install python3-venv."; exit 2; }
	@# torch first and alone, so that nothing that needs it chooses another build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e '.[worker,test]'
	@touch $@

demo: $(STAMP) ## Train on a real model, publish it and open the pages on 127.0.0.1:8000
	@$(BIN)/headscope demo

test: $(STAMP) chromium ## Run every test, those on real weights and in the browser too
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

fast: $(STAMP) ## Run the tests that need neither real weights nor a browser
	$(BIN)/python -m pytest -m "not real and not browser" $(PYTEST)

lint: $(STAMP) ## Check style: ruff's rules and its format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP) ## Bring the code into ruff's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## Check types: mypy --strict
	$(BIN)/mypy

docs: $(STAMP) ## Check that README and friends say what the code does
	$(BIN)/python -m pytest tests/test_docs.py tests/test_makefile.py

screenshots: $(STAMP) chromium ## Take pictures of every page of a data folder: `make screenshots DATA=<folder>`
	@$(BIN)/python docs/screenshots.py $(if $(DATA),--data $(DATA))

schema: $(STAMP) ## Check that the migrations make exactly the tables of tables.py
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && export HEADSCOPE_DATA="$$folder" HEADSCOPE_CACHE="$$folder/cache" \
	  && unset HEADSCOPE_DATABASE_URL && $(BIN)/alembic upgrade head && $(BIN)/alembic check

bench: $(STAMP) ## Measure: `make bench NAME=<name>`
	@$(BIN)/python -m bench $(NAME)

# Hashes and weights look random too, so only what has the shape of a key, or stands after `password =`, counts.
NO_SECRETS := --disable-plugin HexHighEntropyString --disable-plugin Base64HighEntropyString
secrets: $(STAMP) ## Look for passwords and keys in what git tracks
	@git ls-files -z | grep -zvE '^(tests/fixtures/|static/vendor/|constraints\.txt$$)|\.(png|ipynb)$$' \
	  | xargs -0 $(BIN)/detect-secrets-hook --no-verify $(NO_SECRETS)

audit: $(STAMP) ## Report known faults of the pinned packages; needs a network, and fails nothing
	@timeout 120 $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off --timeout 20 \
	  || echo "pip-audit found something, or could not ask (see above); nothing fails for it."

compose-test: $(STAMP) ## Run docker-compose.yml for real, with podman; needs root (see tests/compose/run.py)
	@$(BIN)/python -m tests.compose.run

wheel: $(STAMP) ## Build dist/headscope-*.whl
	$(BIN)/python -m build --wheel --no-isolation

lock: ## Write constraints.txt anew, from the newest packages that pyproject.toml allows
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder/venv" \
	  && "$$folder/venv/bin/pip" install --quiet $(TORCH) && "$$folder/venv/bin/pip" install --quiet '.[worker,test]' \
	  && { sed -n '/^#/p' constraints.txt; "$$folder/venv/bin/pip" freeze --exclude headscope --exclude torch; } > "$$folder/new" \
	  && cp "$$folder/new" constraints.txt

clean: ## Remove .venv and everything that was built; data, downloads and trained SAEs stay
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis test-results *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

chromium:
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	  then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "The browser tests drive Chromium, which is missing; install it (Debian: apt-get install chromium) or run make fast."; exit 2; \
	  fi; }
