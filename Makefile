# Braid. `make help` lists what there is.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.14 || echo python3)
BIN := .venv/bin
FAST := not engine and not system and not shapes and not gpu and not slow
SLOW := slow and not engine and not system and not shapes and not gpu
ENGINES := (engine or system) and not shapes and not gpu
TWO := -q -n 2 --dist loadfile
.DEFAULT_GOAL := help
.PHONY: help install up test test-all check fmt lock bench clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '  make %-8s  %s\n' "$$target" "$$text"; done

install: ## install everything into .venv; nothing to do if it is current
	@$(PYTHON) scripts/install.py

up: install ## serve the demo model at http://127.0.0.1:8000 (ARGS="..." for `braid up`)
	@exec $(BIN)/braid up $(ARGS)

test: check ## the suite: check, then the slow tests and those with real engines
	$(BIN)/python -m pytest $(TWO) -m "$(SLOW)"
	$(BIN)/python -m pytest -m "$(ENGINES)" --durations=25

test-all: test ## everything that runs here: test, then every shape of cache and engine (a quarter of an hour)
	$(BIN)/python -m pytest -m shapes

check: install ## the one gate before a commit: format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(TWO) -m "$(FAST)"

fmt: install ## format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## write requirements.lock again (UPGRADE=1: newest versions that fit)
	@$(PYTHON) scripts/lock.py $(if $(UPGRADE),--upgrade)

bench: install ## benchmark a running server (ARGS="..." for `braid bench`)
	@$(BIN)/braid bench $(ARGS)

clean: ## remove the environment and everything that was generated
	rm -rf .venv build dist run *.egg-info .coverage .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
